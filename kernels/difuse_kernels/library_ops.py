"""Every op as torch.library knows it: schema, what it returns as empty tensors, what its backward pass needs.

Imported by the first trace. A program that was exported, and is loaded without tracing, imports this by itself.
"""
from math import prod

import torch

from difuse_kernels.adaln import adaln, norm_modulate_dual
from difuse_kernels.attention import attention
from difuse_kernels.gated_activation import gated_activation
from difuse_kernels.gelu_tanh import gelu_tanh
from difuse_kernels.gram import gram
from difuse_kernels.group_norm_act import group_norm_act
from difuse_kernels.group_norm_act.group_norm_act_layout import image_like
from difuse_kernels.library import define, like, without_nones
from difuse_kernels.patchify import patchify
from difuse_kernels.qk_norm_rope import qk_norm_rope
from difuse_kernels.sampler_step import sampler_step


def _rows(x, *_):
    """norm_modulate: h, mean, rstd."""
    return like(x), like(x[..., 0], torch.float32), like(x[..., 0], torch.float32)


_NORM = "Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias"
_TABLES = "Tensor? scale_table, Tensor? shift_table, str norm, float eps"
define(adaln.NORM_MODULATE, adaln._NormModulate, f"Tensor x, {_NORM}, {_TABLES} -> (Tensor, Tensor, Tensor)", _rows,
       context="str norm")
define(adaln.GATE_RESIDUAL, adaln._GateResidual, "Tensor x, Tensor y, Tensor? gate, Tensor? gate_table -> Tensor",
       lambda x, *_: like(x))
define(adaln.GATE_RESIDUAL_NORM_MODULATE, adaln._GateResidualNormModulate,
       f"Tensor x, Tensor y, Tensor? gate, {_NORM}, Tensor? gate_table, {_TABLES} -> (Tensor, Tensor, Tensor, Tensor)",
       lambda x, *_: (like(x), *_rows(x)), context="str norm", results=2)
define(norm_modulate_dual.NORM_MODULATE_DUAL, norm_modulate_dual._NormModulateDual,
       "Tensor x, Tensor scale, Tensor shift, Tensor scale2, Tensor shift2, str norm, float eps"
       " -> (Tensor, Tensor, Tensor, Tensor)", lambda x, *_: (like(x), *_rows(x)), context="str norm", results=2)


def _attended(q, *_):
    """attention: the result and two numbers per query."""
    B, S, H, _ = q.shape
    return like(q), torch.empty((B, H, S, 2), dtype=torch.float32, device=q.device)


_MASKS = "Tensor? kv_lengths, Tensor? key_bias, float scale -> (Tensor, Tensor)"
define(attention.ATTENTION, attention._Attention, f"Tensor q, Tensor k, Tensor v, {_MASKS}", _attended)
define(attention.ATTENTION_PACKED, attention._AttentionPacked, f"Tensor qkv, {_MASKS}",
       lambda qkv, *_: _attended(qkv[:, :, 0]))

define(gated_activation.GATED_ACTIVATION, gated_activation._GatedActivation,
       "Tensor h, str activation, str act_on -> Tensor", lambda h, *_: like(h[..., : h.shape[-1] // 2]))

define(gelu_tanh.GELU_TANH, gelu_tanh._GeluTanh, "Tensor x -> Tensor", lambda x, *_: like(x))

define(gram.GRAM, gram._Gram, "Tensor[] tensors, int[] absent -> Tensor",
       lambda x, *more: x.new_empty((x.shape[0], len(more) + 2, len(more) + 2), dtype=torch.float64),
       context="", pack=without_nones)


def _image_and_statistics(x, _add, _weight, _bias, groups, *_):
    """group_norm_act: y in x's memory format, mean, rstd."""
    return (image_like(x, x.new_empty), *(x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2)))


def _image_and_rows(_grads, saved, *_):
    x, *rows = saved[:4]
    return [image_like(x, x.new_empty), *(None if row is None else like(row) for row in rows)]


define(group_norm_act.GROUP_NORM_ACT, group_norm_act._GroupNormAct,
       "Tensor x, Tensor? add, Tensor? weight, Tensor? bias, int groups, str activation, float eps"
       " -> (Tensor, Tensor, Tensor)", _image_and_statistics, context="int groups, str activation",
       fake_backward=_image_and_rows)


def _tokens(x, patch, _order):
    B, C, *sizes = x.shape
    return torch.empty((B, prod(sizes) // prod(patch), C * prod(patch)), dtype=x.dtype, device=x.device)


def _image(tokens, patch, grid, _order):
    B, _, K = tokens.shape
    sizes = [n * p for n, p in zip(grid, patch, strict=True)]
    return torch.empty((B, K // prod(patch), *sizes), dtype=tokens.dtype, device=tokens.device)


define(patchify.PATCHIFY, patchify._Patchify, "Tensor x, SymInt[] patch, str order -> Tensor", _tokens,
       context="SymInt[] patch, SymInt[] grid, str order",
       fake_backward=lambda grads, _saved, *context: [_image(grads[0], *context)])
define(patchify.UNPATCHIFY, patchify._Unpatchify, "Tensor tokens, SymInt[] patch, SymInt[] grid, str order -> Tensor",
       _image, context="SymInt[] patch, str order",
       fake_backward=lambda grads, _saved, *context: [_tokens(grads[0], *context)])


def _joined(*arguments):
    """qk_norm_rope: q, k, v of all streams, one after the other."""
    tensors = arguments[:-4]
    length = sum(q.shape[1] for q in tensors[:: qk_norm_rope.FIELDS])
    joint = len(tensors) > qk_norm_rope.FIELDS or tensors[1] is None
    lengths = length, length if joint else tensors[1].shape[1], length
    return [None if x is None else torch.empty((x.shape[0], S, *x.shape[2:]), dtype=x.dtype, device=x.device)
            for x, S in zip(tensors, lengths, strict=False)]


def _parted(grads, saved, _norm, _norm_scope, _eps, _rope, lengths):
    """Its backward: what was saved has the shape of its gradient; q, k and v have their part of the joint ones'."""
    found, start = [], 0
    for stream, length in enumerate(lengths):
        for field in range(qk_norm_rope.FIELDS):
            kept = saved[stream * qk_norm_rope.FIELDS + field]
            grad = grads[field] if field < len(grads) else None
            if grad is not None and len(lengths) > 1:
                grad = grad[:, start : start + length]
            found.append(like(kept) if kept is not None else None if grad is None else like(grad))
        start += length
    return found


_STREAMS = "Tensor[] streams, int[] absent, str? norm, str norm_scope, float eps, str rope"
for _op in (qk_norm_rope.QK_NORM_ROPE, qk_norm_rope.QK_NORM_ROPE_JOINT):
    define(_op, qk_norm_rope._QkNormRope, f"{_STREAMS} -> Tensor[]", _joined, results=3, fake_backward=_parted,
           context="str? norm, str norm_scope, float eps, str rope, SymInt[] lengths",
           pack=lambda *arguments: (*without_nones(arguments[:-4]), *arguments[-4:]))


class _SamplerStep(sampler_step._SamplerStep):
    """The same with dtypes by name: torch.library's own checks take no list of dtypes."""

    @staticmethod
    def forward(implementation, *arguments):
        *tensors, names = arguments
        return sampler_step._SamplerStep.forward(implementation, *tensors, [getattr(torch, name) for name in names])

    @staticmethod
    def setup_context(ctx, inputs, output):
        sampler_step._SamplerStep.setup_context(ctx, inputs, output)
        ctx.names = [_name(dtype) for dtype in ctx.dtypes]

    @staticmethod
    def backward(ctx, *grads):
        ctx.dtypes = [getattr(torch, name) for name in ctx.names]
        return sampler_step._SamplerStep.backward(ctx, *grads)


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def _outputs(x, *rest):
    return [like(x, getattr(torch, name)) for name in rest[-1]]


def _input_grads(grads, _saved, names):
    return [*_outputs(next(grad for grad in grads if grad is not None), names), None, None]  # coefficients, noise


define(sampler_step.SAMPLER_STEP, _SamplerStep, "Tensor[] tensors, int[] absent, str[] out_dtypes -> Tensor[]",
       _outputs, results=None, context="str[] names", fake_backward=_input_grads,
       pack=lambda inputs, coefficients, noise, dtypes: (*without_nones([*inputs, coefficients, noise]),
                                                         [_name(dtype) for dtype in dtypes]))
