"""attention: softmax(scale * q k^T + key_bias) v per head. Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.1.

q [B,Sq,H,Dh]; k, v [B,Sk,Hkv,Dh], where query head h reads key head h // (H / Hkv) (grouped queries); one dtype for
the three. kv_lengths int32 [B]: key j of sample b is visible if j < kv_lengths[b]. key_bias [B,Sk] of any float dtype
is added to the logits: -1e4 is a number like any other, -inf hides the key. A query that sees no key gives zeros.

The kernels want a contiguous last dimension, every other stride is free: views of a packed projection [B,S,3,H,Dh]
and transposed [B,H,S,Dh] tensors need no copy. Sums and the softmax are float32 at least (float64 on the reference);
the result [B,Sq,H,Dh] is contiguous and has q's dtype. Online softmax and its recomputation in the backward pass:
Dao et al. 2022 (arXiv:2205.14135).
"""
import torch

from difuse_kernels.checks import apply, check_shape, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

ATTENTION = Op("attention", "difuse_kernels.attention.attention", "cpu")


def _check(q, k, v, scale, kv_lengths, key_bias):
    check_tensor("attention", "q", q, "[B,Sq,H,Dh]", 4)
    check_tensor("attention", "k", k, "[B,Sk,Hkv,Dh]", 4)
    check_tensor("attention", "v", v, "[B,Sk,Hkv,Dh]", 4)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype. "
                        "Convert them with .to(q.dtype)")
    batch, _, heads, head_dim = q.shape
    k_batch, keys, kv_heads, k_head_dim = k.shape
    if k_batch != batch or k_head_dim != head_dim:
        raise ValueError(f"attention: k has shape {tuple(k.shape)}; expected ({batch}, Sk, Hkv, {head_dim}) to go with "
                         f"q {tuple(q.shape)}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v has shape {tuple(v.shape)}; expected k's, {tuple(k.shape)}")
    if kv_heads == 0 or heads % kv_heads or head_dim == 0:
        raise ValueError(f"attention: q has {heads} heads, k and v have {kv_heads}, head dimension {head_dim}; "
                         "expected a multiple of the key heads and at least one dimension. The layout is [B,S,H,Dh]")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"attention: scale is {type(scale).__name__}; expected a Python number or None (Dh**-0.5)")
    if key_bias is not None:
        check_shape("attention", "key_bias", key_bias, (batch, keys))
    if kv_lengths is not None:
        _check_lengths(kv_lengths, batch)


def _check_lengths(kv_lengths, batch):
    if not isinstance(kv_lengths, torch.Tensor) or kv_lengths.dtype != torch.int32:
        got = getattr(kv_lengths, "dtype", type(kv_lengths).__name__)
        raise TypeError(f"attention: kv_lengths is {got}; expected an int32 tensor [B]. "
                        "Convert it with .to(torch.int32)")
    if kv_lengths.shape != (batch,):
        raise ValueError(f"attention: kv_lengths has shape {tuple(kv_lengths.shape)}; expected ({batch},)")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(implementation, q, k, v, kv_lengths, key_bias, scale):
        return implementation.forward(q, k, v, kv_lengths, key_bias, scale, save=True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, q, k, v, kv_lengths, key_bias, ctx.scale = inputs
        stats = output[1]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, kv_lengths, key_bias, stats)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _stats):
        if grad is None:
            return (None,) * 7
        _, need_q, need_k, need_v, _, need_bias, _ = ctx.needs_input_grad
        dq, dk, dv, dbias = ctx.implementation.backward(grad, *ctx.saved_tensors, ctx.scale,
                                                        (need_q, need_k, need_v, need_bias))
        return None, dq, dk, dv, None, dbias, None


def attention(q, k, v, *, scale=None, kv_lengths=None, key_bias=None, backend="auto"):
    """softmax(scale * q k^T + key_bias) v over the visible keys -> [B,Sq,H,Dh], contiguous, q's dtype.

    scale defaults to Dh**-0.5. Shapes: see the module's docstring; Sq, Sk and B may be zero. Gradients flow to q, k, v
    and key_bias. Raises ValueError or TypeError for a wrong shape, dtype or device, RuntimeError where `backend` cannot
    run.
    """
    _check(q, k, v, scale, kv_lengths, key_bias)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    inputs = (q, k, v, kv_lengths, key_bias)
    implementation = ATTENTION.select(backend, inputs)
    if implementation.backward is None:
        return implementation.forward(*inputs, scale)
    if needs_grad(q, k, v, key_bias):
        return apply(_Attention, implementation, *inputs, scale)[0]
    return implementation.forward(*inputs, scale, save=False)[0]
