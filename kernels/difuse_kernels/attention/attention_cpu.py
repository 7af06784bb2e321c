"""attention on the C++ CPU kernels: allocate the outputs, hand over, return. Kernels: csrc/attention/."""
import torch

from difuse_kernels.checks import KERNEL_DTYPES, dense_last, why_not_cpu
from difuse_kernels.native import ext


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    *tensors, _, key_bias = inputs
    head_dim = tensors[0].shape[-1]
    if head_dim % 8 or head_dim > 256:
        return "the head dimension is not a multiple of 8 up to 256"
    if key_bias is not None and key_bias.dtype not in KERNEL_DTYPES:
        return f"key_bias has dtype {key_bias.dtype}; the kernels take float32, bfloat16 and float16"
    return why_not_cpu(tensors)


def attention_forward(q, k, v, kv_lengths, key_bias, scale, save):
    """(out, stats); stats [B,H,Sq,2], each query's largest score and 1 / sum of exponentials, is None unless `save`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    stats = None
    if save:
        batch, queries, heads, _ = q.shape
        stats = torch.empty((batch, heads, queries, 2), dtype=torch.float32)
    ext.attention_forward(q, k, v, kv_lengths, key_bias, scale, out, stats)
    return out, stats


def attention_backward(grad, q, k, v, kv_lengths, key_bias, _out, stats, scale, needs, into=None):
    """Gradients of q, k, v, key_bias, None where not needed; those of q, k, v in the tensors `into` if given."""
    dq, dk, dv = into or (torch.empty(t.shape, dtype=t.dtype) if need else None
                          for t, need in zip((q, k, v), needs, strict=False))
    dbias = torch.empty(key_bias.shape, dtype=key_bias.dtype) if needs[3] else None
    ext.attention_backward(dense_last(grad), q, k, v, kv_lengths, key_bias, scale, stats, dq, dk, dv, dbias)
    return dq, dk, dv, dbias


def attention_packed_forward(qkv, kv_lengths, key_bias, scale, save):
    """attention_forward on the three of qkv [B,S,3,H,Dh]."""
    return attention_forward(*qkv.unbind(2), kv_lengths, key_bias, scale, save)


def attention_packed_backward(grad, qkv, kv_lengths, key_bias, out, stats, scale, needs):
    """Gradients of qkv and key_bias; None where not needed."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype) if needs[0] else None
    into = dqkv.unbind(2) if needs[0] else None
    dbias = attention_backward(grad, *qkv.unbind(2), kv_lengths, key_bias, out, stats, scale,
                               (needs[0],) * 3 + (needs[1],), into)[3]
    return dqkv, dbias
