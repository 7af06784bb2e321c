"""gated_activation: one half of a projection, times an activation of the other. Shazeer 2020 (arXiv:2002.05202).

    act_on="second":  a * act(b), GEGLU and SwiGLU of diffusers       h = [a | b] along the last dimension
    act_on="first":   act(a) * b, Flux.2 and LLaMA's SwiGLU

activation: "silu", "gelu" (by erf), "gelu_tanh" (its approximation by tanh).

h [...,2F] with one leading dimension or more; the last is contiguous, every other stride is free, so a slice of a
wider projection needs no copy. float32, bfloat16 or float16 (float64 on the reference); arithmetic is float32; the
result [...,F] is contiguous and has h's dtype.
"""
import torch

from difuse_kernels.checks import FLOATS, apply, check_one_of, needs_grad
from difuse_kernels.dispatch import Op

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
GATED_ACTIVATION = Op("gated_activation", "difuse_kernels.gated_activation.gated_activation", "cpu", "cuda", "triton")


def _check(h, activation, act_on):
    if not isinstance(h, torch.Tensor):
        raise TypeError(f"gated_activation: h is {type(h).__name__}; expected a tensor [...,2F]")
    if h.dtype not in FLOATS:
        raise TypeError(f"gated_activation: h has dtype {h.dtype}; expected a floating dtype. Convert it with .float()")
    if h.dim() < 2 or h.shape[-1] % 2:
        raise ValueError(f"gated_activation: h has shape {tuple(h.shape)}; expected [...,2F], two halves of one width "
                         "behind at least one leading dimension")
    check_one_of("gated_activation", "activation", activation, ACTIVATIONS)
    check_one_of("gated_activation", "act_on", act_on, ("first", "second"))


class _GatedActivation(torch.autograd.Function):
    @staticmethod
    def forward(implementation, h, activation, act_on):
        return implementation.forward(h, activation, act_on)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, h, ctx.activation, ctx.act_on = inputs
        ctx.save_for_backward(h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.activation, ctx.act_on), None, None


def gated_activation(h, *, activation="gelu", act_on="second", backend="auto"):
    """[...,2F] -> [...,F]: act(a) * b or a * act(b). Shapes, names and dtypes: see the module's docstring.

    Raises ValueError or TypeError for a wrong shape, dtype or name, RuntimeError where `backend` cannot run.
    """
    _check(h, activation, act_on)
    implementation = GATED_ACTIVATION.select(backend, (h,))
    if implementation.backward is not None and needs_grad(h):
        return apply(_GatedActivation, implementation, h, activation, act_on)
    return implementation.forward(h, activation, act_on)
