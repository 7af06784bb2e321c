"""attention: softmax(scale * q k^T + key_bias) v per head. Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.1.

q [B,Sq,H,Dh]; k, v [B,Sk,Hkv,Dh], where query head h reads key head h // (H / Hkv) (grouped queries); one dtype for
the three. kv_lengths int32 [B]: key j of sample b is visible if j < kv_lengths[b]. key_bias [B,Sk] of any float dtype
is added to the logits: -1e4 is a number like any other, -inf hides the key. A query that sees no key gives zeros.

attention_packed is the same on qkv [B,S,3,H,Dh], one projection's output, whose gradient is one tensor as well.

The kernels want a contiguous last dimension, every other stride is free: views of a packed projection [B,S,3,H,Dh] and
transposed [B,H,S,Dh] tensors need no copy. Sums and the softmax are float32 at least (float64 on the reference); the
result [B,Sq,H,Dh] is contiguous and has q's dtype. A length above Sk is refused where it can be read for nothing, on
the CPU; kernels clamp lengths on the GPU to 0 .. Sk, since reading them would stall the stream. Online softmax and its
recomputation in the backward pass: Dao et al. 2022 (arXiv:2205.14135).
"""
import torch

from difuse_kernels.checks import apply, check_shape, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

ATTENTION = Op("attention", "difuse_kernels.attention.attention", "cpu", "triton")
ATTENTION_PACKED = Op("attention_packed", "difuse_kernels.attention.attention", "cpu", "triton")


def _check(q, k, v):
    check_tensor("attention", "q", q, "[B,Sq,H,Dh]", 4)
    check_tensor("attention", "k", k, "[B,Sk,Hkv,Dh]", 4)
    check_tensor("attention", "v", v, "[B,Sk,Hkv,Dh]", 4)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype. "
                        "Convert them with .to(q.dtype)")
    batch, _, heads, head_dim = q.shape
    k_batch, _, kv_heads, k_head_dim = k.shape
    if k_batch != batch or k_head_dim != head_dim:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}; expected ({batch}, Sk, Hkv, {head_dim}) to go with "
                         f"q {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}; expected k's, {tuple(k.shape)}")
    if 0 in (heads, kv_heads, head_dim) or heads % kv_heads:
        raise ValueError(f"attention: q has {heads} heads, k and v have {kv_heads}, head dimension {head_dim}; "
                         "expected a multiple of the key heads, and at least one of each. The layout is [B,S,H,Dh]")


def _check_options(op, batch, keys, scale, kv_lengths, key_bias):
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"{op}: scale is {type(scale).__name__}; expected a Python number or None (Dh**-0.5)")
    if key_bias is not None:
        check_shape(op, "key_bias", key_bias, (batch, keys))
    if kv_lengths is not None:
        _check_lengths(op, kv_lengths, batch, keys)


def _check_lengths(op, kv_lengths, batch, keys):
    if not isinstance(kv_lengths, torch.Tensor) or kv_lengths.dtype != torch.int32:
        got = getattr(kv_lengths, "dtype", type(kv_lengths).__name__)
        raise TypeError(f"{op}: kv_lengths is {got}; expected an int32 tensor [B]. Convert it with .to(torch.int32)")
    if kv_lengths.shape != (batch,):
        raise ValueError(f"{op}: kv_lengths has shape {tuple(kv_lengths.shape)}; expected ({batch},)")
    if not kv_lengths.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # values that cannot be read, or not without stalling the GPU: the kernels clamp them
    for sample, length in enumerate(kv_lengths.tolist()):
        if not 0 <= length <= keys:
            raise ValueError(f"{op}: kv_lengths[{sample}] is {length}; expected 0 to {keys}, the number of keys")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(implementation, q, k, v, kv_lengths, key_bias, scale):
        return implementation.forward(q, k, v, kv_lengths, key_bias, scale, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, q, k, v, kv_lengths, key_bias, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, kv_lengths, key_bias, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _stats):
        if grad is None:
            return (None,) * 7
        _, need_q, need_k, need_v, _, need_bias, _ = ctx.needs_input_grad
        dq, dk, dv, dbias = ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.scale,
                                                        (need_q, need_k, need_v, need_bias))
        return None, dq, dk, dv, None, dbias, None


class _AttentionPacked(torch.autograd.Function):
    @staticmethod
    def forward(implementation, qkv, kv_lengths, key_bias, scale):
        return implementation.forward(qkv, kv_lengths, key_bias, scale, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, qkv, kv_lengths, key_bias, ctx.scale = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(qkv, kv_lengths, key_bias, *output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _stats):
        if grad is None:
            return (None,) * 5
        _, need_qkv, _, need_bias, _ = ctx.needs_input_grad
        dqkv, dbias = ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.scale, (need_qkv, need_bias))
        return None, dqkv, None, dbias, None


def attention(q, k, v, *, scale=None, kv_lengths=None, key_bias=None, backend="auto"):
    """softmax(scale * q k^T + key_bias) v over the visible keys -> [B,Sq,H,Dh], contiguous, q's dtype.

    scale defaults to Dh**-0.5. Shapes: see the module's docstring; Sq, Sk and B may be zero. Gradients flow to q, k, v
    and key_bias. Raises ValueError or TypeError for a wrong shape, dtype or device, RuntimeError where `backend` cannot
    run.
    """
    _check(q, k, v)
    _check_options("attention", q.shape[0], k.shape[1], scale, kv_lengths, key_bias)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    inputs = (q, k, v, kv_lengths, key_bias)
    implementation = ATTENTION.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, scale)
    if needs_grad(q, k, v, key_bias):
        return apply(_Attention, implementation, *inputs, scale)[0]
    return implementation.forward(*inputs, scale, save=False)[0]


def attention_packed(qkv, *, scale=None, kv_lengths=None, key_bias=None, backend="auto"):
    """attention(*qkv.unbind(2), ...) of qkv [B,S,3,H,Dh] -> [B,S,H,Dh]; its gradient is written as one such tensor.

    Options and errors are those of `attention`.
    """
    check_tensor("attention_packed", "qkv", qkv, "[B,S,3,H,Dh]", 5)
    if qkv.shape[2] != 3 or 0 in qkv.shape[3:]:
        raise ValueError(f"attention_packed: qkv has shape {tuple(qkv.shape)}; expected [B,S,3,H,Dh], at least one "
                         "head and one dimension")
    _check_options("attention_packed", qkv.shape[0], qkv.shape[1], scale, kv_lengths, key_bias)
    scale = qkv.shape[4] ** -0.5 if scale is None else float(scale)
    inputs = (qkv, kv_lengths, key_bias)
    implementation = ATTENTION_PACKED.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, scale)
    if needs_grad(qkv, key_bias):
        return apply(_AttentionPacked, implementation, *inputs, scale)[0]
    return implementation.forward(*inputs, scale, save=False)[0]
