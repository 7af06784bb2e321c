"""attention on the C++ CPU kernels: allocate the outputs, hand over, return. Kernels: csrc/attention/."""
import torch

from difuse_kernels.checks import KERNEL_DTYPES, dense_last, why_not_cpu
from difuse_kernels.native import ext


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    q, k, v, _, key_bias = inputs
    head_dim = q.shape[3]
    if head_dim % 8 or head_dim > 256:
        return "the head dimension is not a multiple of 8 up to 256"
    if key_bias is not None and key_bias.dtype not in KERNEL_DTYPES:
        return f"key_bias has dtype {key_bias.dtype}; the kernels take float32, bfloat16 and float16"
    return why_not_cpu((q, k, v))


def attention_forward(q, k, v, kv_lengths, key_bias, scale, save):
    """(out, stats); stats [B,H,Sq,2], each query's largest score and 1 / sum of exponentials, is None unless `save`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    stats = None
    if save:
        batch, queries, heads, _ = q.shape
        stats = torch.empty((batch, heads, queries, 2), dtype=torch.float32)
    ext.attention_forward(q, k, v, kv_lengths, key_bias, scale, out, stats)
    return out, stats


def attention_backward(grad, q, k, v, kv_lengths, key_bias, stats, scale, needs):
    """Gradients of q, k, v, key_bias; None where not needed."""
    dq, dk, dv, dbias = (torch.empty(t.shape, dtype=t.dtype) if need else None
                         for t, need in zip((q, k, v, key_bias), needs, strict=True))
    ext.attention_backward(dense_last(grad), q, k, v, kv_lengths, key_bias, scale, stats, dq, dk, dv, dbias)
    return dq, dk, dv, dbias
