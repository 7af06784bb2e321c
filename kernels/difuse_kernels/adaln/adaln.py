"""adaLN: norm_modulate, gate_residual and both in one pass. Peebles & Xie 2023 (arXiv:2212.09748), figure 3.

    norm_modulate(x)   = norm(x) * (1 + scale) + shift      norm(x) = LayerNorm or RMSNorm over D, then weight, bias
    gate_residual(x,y) = x + gate * y

x, y [B,S,D]; scale, shift, gate [B,D] (one row per sample) or [B,S,D] (one per token); weight, bias [D].
scale_table, shift_table, gate_table [D]: a learned row, the same for all samples, that is added in float32 to its
modulation, 1 + (scale + scale_table) and so on, as PixArt and Wan do; its gradient is summed unrounded.
The last dimension is contiguous, every other stride is free, so chunks of one projection need no copy. Dtypes may
be mixed (float32, bfloat16, float16; float64 on the reference); sums are float32; results have x's dtype.
"""
import torch

from difuse_kernels.adaln.adaln_checks import check_modulation, check_norm, check_stream, check_tables
from difuse_kernels.checks import apply, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

_STEM = "difuse_kernels.adaln.adaln"
NORM_MODULATE = Op("norm_modulate", _STEM, "cpu", "cuda", "triton")
GATE_RESIDUAL = Op("gate_residual", _STEM, "cpu", "cuda", "triton")
GATE_RESIDUAL_NORM_MODULATE = Op("gate_residual_norm_modulate", _STEM, "cpu", "cuda", "triton")


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(implementation, *arguments):
        return implementation.forward(*arguments, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *tensors, ctx.norm, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _mean, _rstd):
        grads = ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.norm, ctx.needs_input_grad[1:8])
        return None, *grads, None, None


class _GateResidual(torch.autograd.Function):
    @staticmethod
    def forward(implementation, x, y, gate, gate_table):
        return implementation.forward(x, y, gate, gate_table)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, *ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.needs_input_grad[1:])


class _GateResidualNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(implementation, *arguments):
        return implementation.forward(*arguments, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, _, *tensors, ctx.norm, _ = inputs
        x_new, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_new, *tensors, mean, rstd)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x, grad_h, _mean, _rstd):
        grads = ctx.implementation.backward(grad_x, grad_h, *ctx.saved_tensors, ctx.norm, ctx.needs_input_grad[1:11])
        return None, *grads, None, None


def norm_modulate(x, scale=None, shift=None, *, scale_table=None, shift_table=None, norm="layer", weight=None,
                  bias=None, eps=1e-6, backend="auto"):
    """norm(x) * (1 + scale) + shift, shape and dtype of x. Shapes and errors: see the module's docstring.

    Raises ValueError or TypeError for a wrong shape, dtype, device or name, RuntimeError where `backend` cannot run.
    """
    check_tensor("norm_modulate", "x", x, "[B,S,D]", 3)
    check_modulation("norm_modulate", x, scale=scale, shift=shift)
    check_norm("norm_modulate", x, norm, weight, bias)
    if scale_table is not None or shift_table is not None:
        check_tables("norm_modulate", x, scale=(scale, scale_table), shift=(shift, shift_table))
    inputs = (x, scale, shift, weight, bias, scale_table, shift_table)
    implementation = NORM_MODULATE.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, norm, eps)
    if needs_grad(*inputs):
        return apply(_NormModulate, implementation, *inputs, norm, eps)[0]
    return implementation.forward(*inputs, norm, eps, save=False)[0]


def gate_residual(x, y, gate=None, *, gate_table=None, backend="auto"):
    """x + gate * y, shape and dtype of x; gate None means 1. Errors as in `norm_modulate`."""
    check_stream("gate_residual", x, y)
    check_modulation("gate_residual", x, gate=gate)
    if gate_table is not None:
        check_tables("gate_residual", x, gate=(gate, gate_table))
    inputs = (x, y, gate, gate_table)
    implementation = GATE_RESIDUAL.select(backend, inputs)
    if implementation.backward is not None and needs_grad(*inputs):
        return apply(_GateResidual, implementation, *inputs)
    return implementation.forward(*inputs)


def gate_residual_norm_modulate(x, y, gate=None, scale=None, shift=None, *, gate_table=None, scale_table=None,
                                shift_table=None, norm="layer", weight=None, bias=None, eps=1e-6, backend="auto"):
    """(x', norm_modulate(x', scale, shift)) with x' = gate_residual(x, y, gate), in one pass over memory."""
    check_stream("gate_residual_norm_modulate", x, y)
    check_modulation("gate_residual_norm_modulate", x, gate=gate, scale=scale, shift=shift)
    check_norm("gate_residual_norm_modulate", x, norm, weight, bias)
    if gate_table is not None or scale_table is not None or shift_table is not None:
        check_tables("gate_residual_norm_modulate", x, gate=(gate, gate_table), scale=(scale, scale_table),
                      shift=(shift, shift_table))
    inputs = (x, y, gate, scale, shift, weight, bias, gate_table, scale_table, shift_table)
    implementation = GATE_RESIDUAL_NORM_MODULATE.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, norm, eps)
    if needs_grad(*inputs):
        return apply(_GateResidualNormModulate, implementation, *inputs, norm, eps)[:2]
    return implementation.forward(*inputs, norm, eps, save=False)[:2]
