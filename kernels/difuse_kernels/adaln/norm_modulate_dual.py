"""norm_modulate_dual: one norm, modulated twice, for the two attentions of SD3.5-medium's blocks (MMDiT-X).

    h = norm(x) * (1 + scale) + shift        h2 = norm(x) * (1 + scale2) + shift2

Shapes, strides, dtypes and precision are those of norm_modulate in adaln.py; x is read once. On GPUs it runs on Triton.
"""
import torch

from difuse_kernels.adaln.adaln import _STEM
from difuse_kernels.adaln.adaln_checks import check_modulation, check_norm
from difuse_kernels.checks import apply, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

NORM_MODULATE_DUAL = Op("norm_modulate_dual", _STEM, "cpu", "triton")


class _NormModulateDual(torch.autograd.Function):
    @staticmethod
    def forward(implementation, *arguments):
        return implementation.forward(*arguments, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *tensors, ctx.norm, _ = inputs
        *_, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad2, _mean, _rstd):
        grads = ctx.implementation.backward(grad, grad2, *ctx.saved_tensors, ctx.norm, ctx.needs_input_grad[1:6])
        return None, *grads, None, None


def norm_modulate_dual(x, scale, shift, scale2, shift2, *, norm="layer", eps=1e-6, backend="auto"):
    """(norm(x) * (1 + scale) + shift, norm(x) * (1 + scale2) + shift2), both of x's shape and dtype.

    x [B,S,D], the modulations [B,D] or [B,S,D] each, all of them given. Raises ValueError or TypeError for a wrong
    shape, dtype, device or name, RuntimeError where `backend` cannot run.
    """
    check_tensor("norm_modulate_dual", "x", x, "[B,S,D]", 3)
    for name, value in (("scale", scale), ("shift", shift), ("scale2", scale2), ("shift2", shift2)):
        check_tensor("norm_modulate_dual", name, value, "[B,D] or [B,S,D]", (2, 3))
    check_modulation("norm_modulate_dual", x, scale=scale, shift=shift, scale2=scale2, shift2=shift2)
    check_norm("norm_modulate_dual", x, norm)
    inputs = (x, scale, shift, scale2, shift2)
    implementation = NORM_MODULATE_DUAL.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, norm, eps)
    if needs_grad(*inputs):
        return apply(_NormModulateDual, implementation, *inputs, norm, eps)[:2]
    return implementation.forward(*inputs, norm, eps, save=False)[:2]
