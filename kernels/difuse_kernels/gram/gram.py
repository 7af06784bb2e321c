"""gram: the Gram matrix of a few tensors and of 1, sample by sample, in one pass.

    G[b,i,j] = <v_i, v_j>          v_0 = 1, v_1 .. v_n = the inputs of sample b, n <= 4

so that G[b,0,0] is a sample's number of elements, G[b,0,j] the sum of input j, G[b,i,j] an inner product. Norms,
projections and standard deviations of any sum of the inputs are a few numbers away: this is what guidance by norms
(CFG rescaled, arXiv:2305.08891; CFG-Zero*, arXiv:2503.18886; APG, arXiv:2410.02416) and Langevin steps
(arXiv:2011.13456) must know before their update, which is a `sampler_step` then, with coefficients of each sample.

Inputs have one shape [B,...]; float32, bfloat16 and float16 may be mixed (float64 on the reference). Products and sums
are float64, in an order that a sample's size alone decides.
"""
import torch

from difuse_kernels.checks import FLOATS, apply, needs_grad
from difuse_kernels.dispatch import Op

GRAM = Op("gram", "difuse_kernels.gram.gram", "cpu", "triton")
MAX_INPUTS = 4


def _check(inputs):
    if not isinstance(inputs, (tuple, list)) or not 1 <= len(inputs) <= MAX_INPUTS:
        got = len(inputs) if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise ValueError(f"gram: inputs is {got}; expected a tuple or list of 1 to {MAX_INPUTS} tensors")
    for x in inputs:
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"gram: an input is {got}; expected floating tensors. Convert it with .float()")
        if x.shape != inputs[0].shape or not x.shape:
            raise ValueError(f"gram: inputs have shapes {tuple(inputs[0].shape)} and {tuple(x.shape)}; expected one "
                             "shape [B,...]")


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(implementation, *inputs):
        return implementation.forward(inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *inputs = inputs
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *ctx.implementation.backward(grad, ctx.saved_tensors, ctx.needs_input_grad[1:])


def dense(inputs):
    """The inputs, copied where a sample does not lie in memory without gaps."""
    return tuple([x if x.is_contiguous() or x[:1].is_contiguous() else x.contiguous() for x in inputs])


def backward_step(grad, inputs):
    """The gradients of the inputs as a sampler_step: of the inputs and of 1, with coefficients [B,n,n+1]."""
    both = grad + grad.mT  # [B,n+1,n+1]
    ones = torch.ones((), dtype=torch.float32, device=grad.device).expand(inputs[0].shape)
    return (*inputs, ones), torch.cat((both[:, 1:, 1:], both[:, 1:, :1]), 2).float()


def gram(inputs, *, backend="auto"):
    """G [B,n+1,n+1], float64, of n = 1 to 4 tensors [B,...]; see the module's docstring.

    Raises ValueError or TypeError for a wrong count, shape, dtype or device, RuntimeError where `backend` cannot run.
    """
    _check(inputs)
    inputs = tuple(inputs)
    implementation = GRAM.select(backend, inputs)
    if implementation.backward is not None and needs_grad(*inputs):
        return apply(_Gram, implementation, *inputs)
    return implementation.forward(inputs)
