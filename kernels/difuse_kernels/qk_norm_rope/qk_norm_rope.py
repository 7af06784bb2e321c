"""Query-key norm (arXiv:2010.04245) and rotary position embedding (Su et al. 2021, arXiv:2104.09864) in one pass.

    n = norm(x) * weight + bias                               RMSNorm, LayerNorm or none
    (y1, y2) = (n1 cos - n2 sin, n2 cos + n1 sin)             for each pair of elements of a head

q [B,S,H,Dh], k and v [B,S,Hkv,Dh], e.g. slices of a projection [B,S,3,H,Dh]: any strides but the last, one dtype
(float32, bfloat16, float16; float64 on the reference). Computed in float32, rounded once; results are contiguous.

norm        "rms", "layer" (which alone takes biases) or None, over Dh of each head (norm_scope="head"; weight, bias
            [Dh]) or over the whole token before its split into heads (norm_scope="full"; [H*Dh], for k [Hkv*Dh])
cos, sin    both or none, any dtype and strides, no gradient: [S,P], [B,S,P], or [B,S,H,P] where heads differ. P pairs
            of a head turn, 2P <= Dh, the rest stays. Of a table that holds every angle twice pass cos[..., ::2]
rope        the pairs: "interleaved" (2i, 2i+1) or "half" (i, i+P)
"""
from typing import NamedTuple

import torch

from difuse_kernels.checks import apply, check_one_of, check_shape, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

QK_NORM_ROPE = Op("qk_norm_rope", __name__, "cpu", "cuda", "triton")
QK_NORM_ROPE_JOINT = Op("qk_norm_rope_joint", __name__, "cpu", "cuda", "triton")


class Stream(NamedTuple):
    """One run of tokens for `qk_norm_rope_joint`, e.g. the text's; without cos and sin it is not rotated."""
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    q_bias: torch.Tensor | None = None
    k_bias: torch.Tensor | None = None
    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None


FIELDS = len(Stream._fields)


def _check(op, stream, norm, norm_scope, rope):
    q, k, _, q_weight, k_weight, q_bias, k_bias, cos, sin = stream
    check_one_of(op, "norm", norm, ("rms", "layer", None))
    check_one_of(op, "norm_scope", norm_scope, ("head", "full"))
    check_one_of(op, "rope", rope, ("interleaved", "half"))
    check_tensor(op, "q", q, "[B,S,H,Dh]", 4)
    if k is not None:
        check_tensor(op, "k", k, "[B,S,Hkv,Dh]", 4)
        check_shape(op, "k", k, (q.shape[0], *k.shape[1:3], q.shape[3]))
        if k.dtype != q.dtype:
            raise TypeError(f"{op}: k has dtype {k.dtype}, q {q.dtype}; expected one dtype. Convert one with .to()")
    for name, x, weight, bias in (("q", q, q_weight, q_bias), ("k", k, k_weight, k_bias)):
        if weight is None and bias is None:
            continue
        if x is None or norm is None or (bias is not None and norm != "layer"):
            raise ValueError(f"{op}: {name}_weight or {name}_bias is given, {name} is {'None' if x is None else 'too'} "
                             f"and norm {norm!r}; a weight goes with a norm, a bias with norm='layer'. Leave it out")
        row = (x.shape[3] if norm_scope == "head" else x.shape[2] * x.shape[3],)
        check_shape(op, f"{name}_weight", weight, row)
        check_shape(op, f"{name}_bias", bias, row)
    if cos is not None or sin is not None:
        _check_tables(op, q, k, cos, sin)


def _check_tables(op, q, k, cos, sin):
    if cos is None or sin is None:
        raise ValueError(f"{op}: {'sin' if cos is None else 'cos'} is given alone; expected cos and sin, or neither")
    check_tensor(op, "cos", cos, "[S,P], [B,S,P] or [B,S,H,P]", (2, 3, 4))
    (B, S, H, Dh), P = q.shape, cos.shape[-1]
    check_shape(op, "cos", cos, (S, P), (B, S, P), (B, S, H, P))
    check_shape(op, "sin", sin, cos.shape)
    if Dh < 2 * P or Dh % 2:
        raise ValueError(f"{op}: cos has {P} pairs for heads of {Dh}; expected 2P <= Dh, Dh even. If it holds every "
                         "angle twice, pass cos[..., ::2] (interleaved) or cos[..., :P] (half)")
    if k is not None and (k.shape[1] != S or (cos.dim() == 4 and k.shape[2] != H)):
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, q {tuple(q.shape)}; rotated together they need as many "
                         "tokens, and as many heads where cos has angles for each")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(f"{op}: cos and sin get no gradient; pass cos.detach() and sin.detach()")


class _QkNormRope(torch.autograd.Function):
    @staticmethod
    def forward(implementation, *arguments):
        return implementation.forward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, *inputs, ctx.norm, ctx.norm_scope, ctx.eps, ctx.rope = inputs
        ctx.set_materialize_grads(False)
        ctx.lengths = [q.shape[1] for q in inputs[::FIELDS]]
        dropped = (2,) if ctx.norm else (0, 1, 2)  # turning back needs no q and k
        ctx.save_for_backward(*(None if i % FIELDS in dropped else t for i, t in enumerate(inputs)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        settings = ctx.norm, ctx.norm_scope, ctx.eps, ctx.rope
        saved, needs, found, start = ctx.saved_tensors, ctx.needs_input_grad[1:], [], 0
        for i, length in enumerate(ctx.lengths):
            stream, alone = slice(i * FIELDS, (i + 1) * FIELDS), len(ctx.lengths) == 1
            here = [grad if grad is None or alone else grad[:, start : start + length] for grad in grads]
            q, k, _, *parameters = saved[stream]
            need_q, need_k, need_v, *need_parameters = needs[stream]
            dq, dk, *others = ctx.implementation.backward(
                *here[:2], q, k, *parameters, *settings, (need_q, need_k, *need_parameters))
            found += [dq, dk, here[2] if need_v else None, *others, None, None]
            start += length
        return None, *found, None, None, None, None


def _run(op, backend, inputs, *settings):
    implementation = op.select(backend, inputs)
    if implementation.backward is not None and needs_grad(*inputs):
        return apply(_QkNormRope, implementation, *inputs, *settings)
    return implementation.forward(*inputs, *settings)


def qk_norm_rope(q, k, *, q_weight=None, k_weight=None, q_bias=None, k_bias=None, cos=None, sin=None, norm="rms",
                 norm_scope="head", eps=1e-6, rope="interleaved", backend="auto"):
    """(q', k'), normalised and rotated, as the module's docstring says; k' is None where k is (cached keys).

    Without cos and sin, q and k may differ in their number of tokens. Raises ValueError or TypeError for a wrong shape,
    dtype, device or name, RuntimeError where `backend` cannot run.
    """
    inputs = (q, k, None, q_weight, k_weight, q_bias, k_bias, cos, sin)
    _check("qk_norm_rope", inputs, norm, norm_scope, rope)
    return _run(QK_NORM_ROPE, backend, inputs, norm, norm_scope, eps, rope)[:2]


def qk_norm_rope_joint(streams, *, norm="rms", norm_scope="head", eps=1e-6, rope="interleaved", backend="auto"):
    """(q, k, v) of all streams, one after the other in each [B, sum of S, H or Hkv, Dh]: the concatenation is free.

    streams: 1 to 4 `Stream`s in joint order, each with weights and angles of its own; v is copied. B, H, Hkv, Dh and
    dtype agree. Errors as in `qk_norm_rope`.
    """
    if not 1 <= len(streams) <= 4:
        raise ValueError(f"qk_norm_rope_joint: got {len(streams)} streams; expected 1 to 4")
    for i, stream in enumerate(streams):
        op = f"qk_norm_rope_joint: stream {i}"
        for name, x, first in zip("qkv", stream, streams[0], strict=False):
            check_tensor(op, name, x, "[B,S,heads,Dh]", 4)
            like, heads = streams[0].q, (streams[0].k if name == "v" else first).shape[2]
            check_shape(op, name, x, (like.shape[0], stream.q.shape[1], heads, like.shape[3]))
            if x.dtype != like.dtype:
                raise TypeError(f"{op}: {name} has dtype {x.dtype}, stream 0's q {like.dtype}; expected one dtype")
        _check(op, stream, norm, norm_scope, rope)
    return _run(QK_NORM_ROPE_JOINT, backend, sum(map(tuple, streams), ()), norm, norm_scope, eps, rope)
