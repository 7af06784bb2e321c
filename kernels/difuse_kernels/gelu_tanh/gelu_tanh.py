"""gelu_tanh: GELU by its approximation with tanh. Hendrycks & Gimpel 2016 (arXiv:1606.08415), section 2.

    x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

x [...] of any shape. float32, bfloat16 or float16 (float64 on the reference); arithmetic is float32; the result has x's
dtype. The kernel is for contiguous tensors on CPUs, where torch computes tanh in three times the time. On a GPU torch's
GELU moves no byte more, and torch.compile fuses it: wherever the kernel has nothing to offer, backend="auto" is F.gelu.
"""
import torch
import torch.nn.functional as F

from difuse_kernels.checks import FLOATS, apply, needs_grad
from difuse_kernels.dispatch import Op, forced_backend

GELU_TANH = Op("gelu_tanh", "difuse_kernels.gelu_tanh.gelu_tanh", "cpu")


class _GeluTanh(torch.autograd.Function):
    @staticmethod
    def forward(implementation, x):
        return implementation.forward(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, x = inputs
        ctx.save_for_backward(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, ctx.implementation.backward(grad, *ctx.saved_tensors)


def _is_torchs(x):
    """Whether backend="auto" is F.gelu here: the same function, so nothing need be said."""
    forced = forced_backend()
    if forced != "auto":
        return forced in ("cuda", "triton")  # not a word of GELU in them
    return (torch.compiler.is_compiling() or type(x) not in (torch.Tensor, torch.nn.Parameter)
            or GELU_TANH.refusal("cpu", (x,)) is not None)


def gelu_tanh(x, *, backend="auto"):
    """The approximate GELU of every element of x. Shapes and dtypes: see the module's docstring.

    Raises TypeError for what is no floating tensor, RuntimeError where `backend` cannot run.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATS:
        got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise TypeError(f"gelu_tanh: x is {got}; expected a floating tensor. Convert it with .float()")
    if backend == "auto" and _is_torchs(x):
        return F.gelu(x, approximate="tanh")
    implementation = GELU_TANH.select(backend, (x,))
    if implementation.backward is not None and needs_grad(x):
        return apply(_GeluTanh, implementation, x)
    return implementation.forward(x)
