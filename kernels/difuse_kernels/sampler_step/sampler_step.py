"""sampler_step: the update of a diffusion sampler, a few linear combinations of a few tensors, in one pass.

    out_i = sum_j C[i,j] * inputs_j          i = 1..I, I <= 4          j = 1..J, J <= 8

DDIM, DDPM, Euler and multistep solvers are rows of C; classifier-free guidance is two columns, w*C for the conditional
and (1-w)*C for the unconditional half of the model's output (Ho & Salimans 2022, arXiv:2207.12598), so that the guided
output is never written. C is float32 [I,J], or [B,I,J] with one set per sample, and lives on the device.

Inputs have one shape [B,...]; their strides are free and their dtypes may be mixed (float32, bfloat16, float16; float64
on the reference, which then sums in float64). Sums are float32, each input is read once, each output written once. The
arithmetic is plain: a coefficient of 0 turns an infinity or NaN into NaN, it does not switch the input off.
"""
import torch

from difuse_kernels.checks import FLOATS, apply, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

SAMPLER_STEP = Op("sampler_step", "difuse_kernels.sampler_step.sampler_step", "cpu")
_MAX_INPUTS, _MAX_OUTPUTS = 8, 4


def _check(inputs, coefficients, out_dtypes):
    if not isinstance(inputs, (tuple, list)) or not 1 <= len(inputs) <= _MAX_INPUTS:
        got = len(inputs) if isinstance(inputs, (tuple, list)) else type(inputs).__name__
        raise ValueError(f"sampler_step: inputs is {got}; expected a tuple or list of 1 to {_MAX_INPUTS} tensors")
    shape = None
    for x in inputs:
        if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"sampler_step: an input is {got}; expected floating tensors. Convert it with .float()")
        shape = shape or x.shape
        if x.shape != shape or not shape:
            raise ValueError(f"sampler_step: inputs have shapes {tuple(shape)} and {tuple(x.shape)}; expected one "
                             "shape [B,...]. Slice off what the step does not use, e.g. the learned variance")
    check_tensor("sampler_step", "coefficients", coefficients, "[I,J] or [B,I,J]", (2, 3))
    if coefficients.dtype != torch.float32:
        raise TypeError(f"sampler_step: coefficients has dtype {coefficients.dtype}; expected torch.float32. Compute "
                        "it in float64 and convert it with .float()")
    *B, I, J = coefficients.shape  # noqa: E741
    if not 1 <= I <= _MAX_OUTPUTS or len(inputs) != J or (B and B[0] != shape[0]):
        raise ValueError(f"sampler_step: coefficients has shape {tuple(coefficients.shape)}; expected [I,{len(inputs)}]"
                         f" or [B,I,{len(inputs)}] with I from 1 to {_MAX_OUTPUTS}, for {len(inputs)} inputs of shape "
                         f"{tuple(shape)}")
    if out_dtypes is None:
        return (inputs[0].dtype,) * I
    listed = isinstance(out_dtypes, (tuple, list))
    if not listed or len(out_dtypes) != I or any(dtype not in FLOATS for dtype in out_dtypes):
        raise ValueError(f"sampler_step: out_dtypes is {out_dtypes}; expected {I} floating dtypes, one per output")
    return out_dtypes


class _SamplerStep(torch.autograd.Function):
    @staticmethod
    def forward(implementation, coefficients, out_dtypes, *inputs):
        return implementation.forward(inputs, coefficients, out_dtypes)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, coefficients, _, *inputs = inputs
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coefficients)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.implementation.backward(grads, *ctx.saved_tensors, ctx.dtypes, needs)


def sampler_step(inputs, coefficients, *, out_dtypes=None, backend="auto"):
    """A tuple of I contiguous tensors, out_i = sum_j coefficients[..., i, j] * inputs[j], shaped like the inputs.

    inputs: 1 to 8 tensors [B,...]; coefficients: float32 [I,J] or [B,I,J]; out_dtypes: I dtypes, else inputs[0]'s.
    Raises ValueError or TypeError for a wrong count, shape, dtype or device, RuntimeError where `backend` cannot run.
    """
    out_dtypes = _check(inputs, coefficients, out_dtypes)
    tensors = (*inputs, coefficients)
    implementation = SAMPLER_STEP.select(backend, tensors)
    if implementation.backward is not None and needs_grad(*inputs):
        return apply(_SamplerStep, implementation, coefficients, out_dtypes, *inputs)
    return implementation.forward(inputs, coefficients, out_dtypes)
