"""group_norm_act: GroupNorm of x plus a row per sample, then an activation. Wu & He 2018 (arXiv:1803.08494).

    y = act((u - mean) * rstd * weight + bias)      u = x + add[:, :, None, ...]

mean and rstd = 1 / sqrt(variance + eps): of u over a group of C / groups channels and all positions, per sample.
activation: "none" or "silu". add is the time embedding of a ResNet block, which joins before the norm.

x [B,C,*spatial] with 1 to 3 spatial dimensions; add [B,C], any strides; weight, bias [C]. For the kernels x is dense in
either memory format, contiguous or channels_last (any number of spatial dimensions), which the result and the gradient
of x share; what is strided otherwise runs on the reference. Dtypes may be mixed (float32, bfloat16, float16; float64 on
the reference); arithmetic is float32; the result has x's dtype.
"""
import torch

from difuse_kernels.checks import apply, check_one_of, check_shape, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

ACTIVATIONS = ("none", "silu")
GROUP_NORM_ACT = Op("group_norm_act", "difuse_kernels.group_norm_act.group_norm_act", "cpu", "triton")


def _check(x, groups, add, weight, bias, activation):
    check_tensor("group_norm_act", "x", x, "[B,C,*spatial] with 1 to 3 spatial dimensions", (3, 4, 5))
    B, C = x.shape[:2]
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"group_norm_act: groups is {groups!r}; expected an int")
    if groups < 1 or C < 1 or C % groups:
        raise ValueError(f"group_norm_act: groups is {groups} and x has {C} channels; expected a divisor of {C}")
    check_shape("group_norm_act", "add", add, (B, C))
    check_shape("group_norm_act", "weight", weight, (C,))
    check_shape("group_norm_act", "bias", bias, (C,))
    check_one_of("group_norm_act", "activation", activation, ACTIVATIONS)


class _GroupNormAct(torch.autograd.Function):
    @staticmethod
    def forward(implementation, x, add, weight, bias, groups, activation, eps):
        return implementation.forward(x, add, weight, bias, groups, activation, eps, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, x, add, weight, bias, ctx.groups, ctx.activation, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, add, weight, bias, mean, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _rstd):
        grads = ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.groups, ctx.activation,
                                            ctx.needs_input_grad[1:5])
        return None, *grads, None, None, None


def group_norm_act(x, groups, weight=None, bias=None, *, add=None, activation="none", eps=1e-5, backend="auto"):
    """act(GroupNorm(x + add) * weight + bias), shape, dtype and memory format of x. Shapes: see the module's docstring.

    Raises ValueError or TypeError for a wrong shape, dtype, device or name, RuntimeError where `backend` cannot run.
    """
    _check(x, groups, add, weight, bias, activation)
    inputs = (x, add, weight, bias)
    implementation = GROUP_NORM_ACT.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, groups, activation, eps)
    if needs_grad(*inputs):
        return apply(_GroupNormAct, implementation, *inputs, groups, activation, eps)[0]
    return implementation.forward(*inputs, groups, activation, eps, save=False)[0]
