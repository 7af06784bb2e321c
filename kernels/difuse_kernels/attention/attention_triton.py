"""attention on Triton: refusals and launchers. Dao 2023 (arXiv:2307.08691), without atomics.

Kernels: attention_triton_forward.py, attention_triton_backward.py; block sizes: attention_triton_config.py.
"""
import math

import torch
import triton

from difuse_kernels.attention import attention_triton_backward, attention_triton_forward
from difuse_kernels.attention.attention_triton_config import SUM_HEADS, config, split
from difuse_kernels.checks import dense_last
from difuse_kernels.triton_launch import architecture, launch, why_not_triton

LOG2E = math.log2(math.e)
WIDE = 2**23  # from here on a row stride times the rows of a block may leave 32 bits


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    *tensors, kv_lengths, key_bias = inputs
    head_dim = tensors[0].shape[-1]
    if head_dim % 8 or head_dim > 256:
        return "the head dimension is not a multiple of 8 up to 256"
    if kv_lengths is not None and kv_lengths.device != tensors[0].device:
        return "kv_lengths is on another device than the queries"
    return why_not_triton((*tensors, key_bias))


def _constants(*tensors):
    """The outer strides of [B,S,H,D] tensors (None: zeros) in units of UNIT elements, and the constants of a launch."""
    strides = [stride for t in tensors for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
    unit = math.gcd(8, *strides)  # 8: vectors of 16 bytes, also where a head is 72 wide, no multiple of 16
    head_dim = tensors[0].shape[3]
    D0, D1 = split(head_dim, tensors[0].dtype, architecture(tensors[0]))
    return [stride // unit for stride in strides], {
        "UNIT": unit, "WIDE": max(strides[1::3]) >= WIDE, "D": head_dim, "D0": D0, "D1": D1}


def _options(k, kv_lengths, key_bias, scale):
    """Stride of the bias over samples, the factor that makes products exponents of 2, and the constants of both passes.

    EXACT, for float32 and where keys are few: differences of products before they are scaled, and delta = sum P dP.
    Measured against the error budget: dout . out has the rounding of out, which many keys average away from dS. With 3
    keys it cost dq six times eager's error in bfloat16; in float32 it costs the budget at any length.
    """
    constants = {"HAS_LENGTHS": kv_lengths is not None, "HAS_BIAS": key_bias is not None,
                 "NEGATE": scale < 0, "EXACT": k.dtype == torch.float32 or k.shape[1] <= 128}
    factor = max(abs(scale) * LOG2E, 1e-30)  # not 0: what is hidden is -inf and must stay so
    return 0 if key_bias is None else key_bias.stride(0), factor, constants


def _with(key_bias, kernel):
    return kernel if key_bias is None else f"biased {kernel}"


def _dense(kv_lengths):
    """Lengths side by side, as the kernels read them."""
    return None if kv_lengths is None else kv_lengths.contiguous()


def attention_forward(q, k, v, kv_lengths, key_bias, scale, save):
    """(out, stats); stats [B,H,Sq,2], each query's largest score and 1 / sum, is None unless `save`."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    stats = torch.empty((batch, heads, queries, 2), dtype=torch.float32, device=q.device) if save else None
    cfg = config(_with(key_bias, "forward"), head_dim, q.dtype, architecture(q))
    strides, constants = _constants(q, k, v)
    bias_stride, factor, options = _options(k, kv_lengths, key_bias, scale)
    launch(attention_triton_forward.forward_kernel, (triton.cdiv(queries, cfg.BLOCK_M) * batch * heads,), q, k, v,
           _dense(kv_lengths), key_bias, out, stats, *strides, bias_stride, queries, keys, heads, heads // kv_heads,
           factor, **constants, PAIRED=strides[4] == strides[7], **options, SAVE=save, config=cfg)
    return out, stats


def attention_backward(grad, q, k, v, kv_lengths, key_bias, out, stats, scale, needs, into=None):
    """Gradients of q, k, v, key_bias, None where not needed; those of q, k, v in the tensors `into` if given."""
    batch, queries, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    dq, dk, dv = into or (torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else None
                          for t, need in zip((q, k, v), needs, strict=False))
    dbias = torch.empty(key_bias.shape, dtype=key_bias.dtype, device=q.device) if needs[3] else None
    heads_bias = torch.empty((batch, kv_heads, keys), dtype=torch.float32, device=q.device) if needs[3] else None
    grad, kv_lengths = dense_last(grad), _dense(kv_lengths)
    bias_stride, factor, options = _options(k, kv_lengths, key_bias, scale)
    planes = 3 if options["EXACT"] or options["HAS_BIAS"] else 2
    rows = torch.empty((planes, batch, heads, queries), dtype=torch.float32, device=q.device)
    sizes = batch * heads * queries, queries, keys, heads, heads // kv_heads, scale, factor

    for delta in (True, False):
        if delta or dq is not None:
            cfg = config(_with(key_bias, "dq"), head_dim, q.dtype, architecture(q))
            strides, constants = _constants(q, k, v, grad, dq)
            launch(attention_triton_backward.query_kernel, (triton.cdiv(queries, cfg.BLOCK_M) * batch * heads,), q, k,
                   v, grad, kv_lengths, key_bias, stats, out, rows, dq, *strides, bias_stride, *sizes, **constants,
                   **options, DELTA=delta, config=cfg)
    if dk is not None or dv is not None or dbias is not None:
        cfg = config(_with(key_bias, "dkdv"), head_dim, q.dtype, architecture(q))
        strides, constants = _constants(q, k, v, grad, dk, dv)
        launch(attention_triton_backward.key_kernel, (triton.cdiv(keys, cfg.BLOCK_N) * batch * kv_heads,), q, k, v,
               grad, kv_lengths, key_bias, rows, dk, dv, heads_bias, *strides, bias_stride, *sizes, **constants,
               **options, DK=dk is not None, DV=dv is not None, DBIAS=dbias is not None, config=cfg)
    if dbias is not None:
        launch(attention_triton_backward.sum_heads_kernel, (triton.cdiv(keys, SUM_HEADS.BLOCK) * batch,), heads_bias,
               dbias, keys, kv_heads, config=SUM_HEADS)
    return dq, dk, dv, dbias


def attention_packed_forward(qkv, kv_lengths, key_bias, scale, save):
    """attention_forward on the three of qkv [B,S,3,H,Dh]."""
    return attention_forward(*qkv.unbind(2), kv_lengths, key_bias, scale, save)


def attention_packed_backward(grad, qkv, kv_lengths, key_bias, out, stats, scale, needs):
    """Gradients of qkv and key_bias; None where not needed."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if needs[0] else None
    into = dqkv.unbind(2) if needs[0] else None
    dbias = attention_backward(grad, *qkv.unbind(2), kv_lengths, key_bias, out, stats, scale,
                               (needs[0],) * 3 + (needs[1],), into)[3]
    return dqkv, dbias
