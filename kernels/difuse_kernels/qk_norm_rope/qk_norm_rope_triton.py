"""qk_norm_rope in Triton: a program takes T tokens x HB heads of q, k or v; one launch serves all three.

A row is held as two tiles [T,HB,PAIRS], the two halves of what the rotation pairs: for neighbours the row is loaded
whole, 16 bytes a thread, and split in registers; for halves the two parts are loaded apart. Statistics are taken in
registers, again in the backward pass, which walks over CHUNK tokens of a sample so that the sums for the weights are
written once per chunk. A second kernel adds these up in order; a chunk does not depend on the batch.
"""
# ruff: noqa: SIM102  Triton drops a branch only where the whole condition is known at compile time
from math import gcd

import torch
import triton
import triton.language as tl

from difuse_kernels.checks import dense_last
from difuse_kernels.library import like
from difuse_kernels.qk_norm_rope import qk_norm_rope_triton_config as configs
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


@triton.jit
def _elements(D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """Where the two elements of each pair lie in a row, and whether they do: four [1,1,PAIRS]. Beyond P any will do."""
    i = tl.arange(0, PAIRS)[None, None, :]
    if not HALF:
        first, second, first_there, second_there = 2 * i, 2 * i + 1, 2 * i < D, 2 * i + 1 < D
    elif 2 * P == D:
        first, second, first_there, second_there = i, i + P, i < P, i < P
    else:
        first, second = tl.where(i < P, i, i + P), tl.where(i < P, i + P, i + D // 2)
        first_there, second_there = i < D // 2, i < D // 2
    return first, second, first_there, second_there


@triton.jit
def _load(rows, inside, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The pairs of rows that begin at the pointers `rows` [T,HB,1], as two float32 tiles."""
    if HALF:
        first, second, there, _ = _elements(D, P, HALF, PAIRS)
        a = tl.load(rows + first, mask=inside & there, other=0.0).to(tl.float32)
        b = tl.load(rows + second, mask=inside & there, other=0.0).to(tl.float32)
    else:
        d = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.load(rows + d, mask=inside & (d < D), other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], PAIRS, 2]))
    return a, b


@triton.jit
def _store(rows, inside, a, b, D: tl.constexpr, P: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The reverse of `_load`, rounding."""
    a, b = a.to(rows.dtype.element_ty), b.to(rows.dtype.element_ty)
    if HALF:
        first, second, there, _ = _elements(D, P, HALF, PAIRS)
        tl.store(rows + first, a, mask=inside & there)
        tl.store(rows + second, b, mask=inside & there)
    else:
        d = tl.arange(0, 2 * PAIRS)[None, None, :]
        x = tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * PAIRS])
        tl.store(rows + d, x, mask=inside & (d < D))


@triton.jit
def _rows(x, batch, tokens, heads, x_b, x_s, x_h, ALIGN: tl.constexpr):
    """Pointers [T,HB,1] to the rows of x. Strides come divided by ALIGN, which tells the compiler what divides them."""
    unit = tl.full([], ALIGN, tl.int64)  # times ALIGN a stride may need 64 bits again
    return x + batch * (x_b * unit) + tokens * (x_s * unit) + heads.to(tl.int64) * (x_h * unit)


@triton.jit
def _parameter(weight, heads, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr,
               HALF: tl.constexpr, PAIRS: tl.constexpr):
    """The pairs of a weight or bias, [1, 1 or HB, PAIRS]."""
    if FULL:
        a, b = _load(weight + heads * D, heads < H, D, P, HALF, PAIRS)
    else:
        a, b = _load(weight + tl.zeros([1, 1, 1], tl.int32), tl.full([1, 1, 1], True, tl.int1), D, P, HALF, PAIRS)
    return a, b


@triton.jit
def _angles(cos, sin, strides, b, tokens, heads, inside, SIGN: tl.constexpr, P: tl.constexpr, PER_HEAD: tl.constexpr,
            PAIRS: tl.constexpr):
    """cos and SIGN * sin [T, 1 or HB, PAIRS]; 1 and 0 for what does not turn."""
    cos_b, cos_s, cos_h, cos_p, sin_b, sin_s, sin_h, sin_p = strides
    i = tl.arange(0, PAIRS)[None, None, :].to(tl.int64)
    c_at = cos + b * cos_b + tokens * cos_s + i * cos_p
    s_at = sin + b * sin_b + tokens * sin_s + i * sin_p
    if PER_HEAD:
        c_at += heads * cos_h
        s_at += heads * sin_h
    c = tl.load(c_at, mask=inside & (i < P), other=1.0).to(tl.float32)
    s = tl.load(s_at, mask=inside & (i < P), other=0.0).to(tl.float32)
    return c, s * SIGN


@triton.jit
def _total(a, b, FULL: tl.constexpr):
    """Sums over a head, or over a token: [T,HB,1] or [T,1,1]."""
    total = tl.sum(a + b, axis=2, keep_dims=True)
    if FULL:
        total = tl.sum(total, axis=1, keep_dims=True)
    return total


@triton.jit
def _normalise(a, b, inside, eps, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
               FULL: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr):
    """(x - mean) * rstd of both elements, and rstd; zeros where there is no element."""
    SHARE: tl.constexpr = 1.0 / (H * D if FULL else D)
    if NORM == "layer":
        _, _, first, second = _elements(D, P, HALF, PAIRS)
        mean = _total(a, b, FULL) * SHARE
        a, b = tl.where(inside & first, a - mean, 0.0), tl.where(inside & second, b - mean, 0.0)
    rstd = tl.rsqrt(_total(a * a, b * b, FULL) * SHARE + eps)
    return a * rstd, b * rstd, rstd


@triton.jit
def _forward_rows(x, out, weight, bias, cos, sin, x_b, x_s, x_h, out_b, tables, batch, tile, block, length, eps,
                  H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr, FULL: tl.constexpr,
                  HALF: tl.constexpr, INVERSE: tl.constexpr, PER_HEAD: tl.constexpr, ALIGN: tl.constexpr,
                  T: tl.constexpr, HB: tl.constexpr, PAIRS: tl.constexpr):
    """T tokens by HB heads of one tensor."""
    tokens = tile * T + tl.arange(0, T)[:, None, None]
    heads = block * HB + tl.arange(0, HB)[None, :, None]
    inside = (tokens < length) & (heads < H)
    a, b = _load(_rows(x, batch, tokens, heads, x_b, x_s, x_h, ALIGN), inside, D, P, HALF, PAIRS)
    if NORM is not None:
        a, b, _ = _normalise(a, b, inside, eps, H, D, P, NORM, FULL, HALF, PAIRS)
    if weight is not None:
        first, second = _parameter(weight, heads, H, D, P, FULL, HALF, PAIRS)
        a, b = a * first, b * second
    if bias is not None:
        first, second = _parameter(bias, heads, H, D, P, FULL, HALF, PAIRS)
        a, b = a + first, b + second
    if cos is not None:
        there = inside if PER_HEAD else tokens < length
        c, s = _angles(cos, sin, tables, batch, tokens, heads, there, -1.0 if INVERSE else 1.0, P, PER_HEAD, PAIRS)
        a, b = a * c - b * s, b * c + a * s
    to = out + batch * (out_b * tl.full([], ALIGN, tl.int64)) + tokens * (H * D) + heads * D
    _store(to, inside, a, b, D, P, HALF, PAIRS)


@triton.jit(do_not_specialize=["q_b", "q_s", "q_h", "k_b", "k_s", "k_h", "v_b", "v_s", "v_h", "q_out_b", "k_out_b",
                               "v_out_b", "q_length", "k_length"])
def _forward_kernel(q, k, v, q_out, k_out, v_out, q_weight, k_weight, q_bias, k_bias, cos, sin, q_b, q_s, q_h, k_b, k_s,
                    k_h, v_b, v_s, v_h, q_out_b, k_out_b, v_out_b, cos_b, cos_s, cos_h, cos_p, sin_b, sin_s, sin_h,
                    sin_p, q_length, k_length, eps, H: tl.constexpr, KV_H: tl.constexpr, D: tl.constexpr,
                    P: tl.constexpr, NORM: tl.constexpr, FULL: tl.constexpr, HALF: tl.constexpr, INVERSE: tl.constexpr,
                    PER_HEAD: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr, HB: tl.constexpr,
                    PAIRS: tl.constexpr):
    """A program: T tokens, and by program_id(1) one block of heads of q, of k or of v."""
    tables = (cos_b, cos_s, cos_h, cos_p, sin_b, sin_s, sin_h, sin_p)
    Q_BLOCKS: tl.constexpr = 0 if q is None else (H + HB - 1) // HB
    K_BLOCKS: tl.constexpr = 0 if k is None else (KV_H + HB - 1) // HB
    tiles, block = tl.cdiv(tl.maximum(q_length, k_length), T), tl.program_id(1)
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64)
    if q is not None:
        if block < Q_BLOCKS:
            _forward_rows(q, q_out, q_weight, q_bias, cos, sin, q_b, q_s, q_h, q_out_b, tables, batch, tile, block,
                          q_length, eps, H, D, P, NORM, FULL, HALF, INVERSE, PER_HEAD, ALIGN, T, HB, PAIRS)
    if k is not None:
        if (block >= Q_BLOCKS) & (block < Q_BLOCKS + K_BLOCKS):
            _forward_rows(k, k_out, k_weight, k_bias, cos, sin, k_b, k_s, k_h, k_out_b, tables, batch, tile,
                          block - Q_BLOCKS, k_length, eps, KV_H, D, P, NORM, FULL, HALF, INVERSE, PER_HEAD, ALIGN, T,
                          HB, PAIRS)
    if v is not None:
        if block >= Q_BLOCKS + K_BLOCKS:
            _forward_rows(v, v_out, None, None, None, None, v_b, v_s, v_h, v_out_b, tables, batch, tile,
                          block - Q_BLOCKS - K_BLOCKS, k_length, eps, KV_H, D, P, None, False, False, False, False,
                          ALIGN, T, HB, PAIRS)


@triton.jit
def _backward_rows(dy, x, dx, weight, weight_sums, bias_sums, cos, sin, dy_b, dy_s, dy_h, x_b, x_s, x_h, tables, chunks,
                   length, eps, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
                   FULL: tl.constexpr, HALF: tl.constexpr, PER_HEAD: tl.constexpr, ALIGN: tl.constexpr, T: tl.constexpr,
                   HB: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr):
    """CHUNK tokens of one tensor, all its heads: dx [B,S,H,D], and the chunk's row of the sums [B * chunks, W]."""
    SHARE: tl.constexpr = 1.0 / (H * D if FULL else D)
    batch, chunk = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    if weight_sums is not None:
        weight_a, weight_b = tl.zeros([T, HB, PAIRS], tl.float32), tl.zeros([T, HB, PAIRS], tl.float32)
    if bias_sums is not None:
        bias_a, bias_b = tl.zeros([T, HB, PAIRS], tl.float32), tl.zeros([T, HB, PAIRS], tl.float32)
    BLOCKS: tl.constexpr = (H + HB - 1) // HB
    for step in tl.range(0, CHUNK // T * BLOCKS, num_stages=STAGES):
        tokens = chunk * CHUNK + step // BLOCKS * T + tl.arange(0, T)[:, None, None]
        heads = step % BLOCKS * HB + tl.arange(0, HB)[None, :, None]
        inside = (tokens < length) & (heads < H)
        a, b = _load(_rows(x, batch, tokens, heads, x_b, x_s, x_h, ALIGN), inside, D, P, HALF, PAIRS)
        grad_a, grad_b = _load(_rows(dy, batch, tokens, heads, dy_b, dy_s, dy_h, ALIGN), inside, D, P, HALF, PAIRS)
        a, b, rstd = _normalise(a, b, inside, eps, H, D, P, NORM, FULL, HALF, PAIRS)
        if cos is not None:
            there = inside if PER_HEAD else tokens < length
            c, s = _angles(cos, sin, tables, batch, tokens, heads, there, -1.0, P, PER_HEAD, PAIRS)
            grad_a, grad_b = grad_a * c - grad_b * s, grad_b * c + grad_a * s
        if weight_sums is not None:
            weight_a += grad_a * a
            weight_b += grad_b * b
        if bias_sums is not None:
            bias_a += grad_a
            bias_b += grad_b
        if dx is not None:
            if weight is not None:
                first, second = _parameter(weight, heads, H, D, P, FULL, HALF, PAIRS)
                grad_a, grad_b = grad_a * first, grad_b * second
            along = _total(grad_a * a, grad_b * b, FULL) * SHARE
            dx_a, dx_b = grad_a - a * along, grad_b - b * along
            if NORM == "layer":
                mean = _total(grad_a, grad_b, FULL) * SHARE
                dx_a, dx_b = dx_a - mean, dx_b - mean
            to = dx + (batch * length + tokens) * (H * D) + heads * D
            _store(to, inside, dx_a * rstd, dx_b * rstd, D, P, HALF, PAIRS)
    row = tl.program_id(0).to(tl.int64)
    if weight_sums is not None:
        _store_sums(weight_sums, row, weight_a, weight_b, H, D, P, FULL, HALF, HB, PAIRS)
    if bias_sums is not None:
        _store_sums(bias_sums, row, bias_a, bias_b, H, D, P, FULL, HALF, HB, PAIRS)


@triton.jit
def _store_sums(sums, row, a, b, H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FULL: tl.constexpr,
                HALF: tl.constexpr, HB: tl.constexpr, PAIRS: tl.constexpr):
    """The sums over a chunk's tokens, and heads unless FULL, into their row."""
    a, b = tl.sum(a, axis=0, keep_dims=True), tl.sum(b, axis=0, keep_dims=True)
    if FULL:
        heads = tl.arange(0, HB)[None, :, None]
        _store(sums + row * (H * D) + heads * D, heads < H, a, b, D, P, HALF, PAIRS)
    else:
        a, b = tl.sum(a, axis=1, keep_dims=True), tl.sum(b, axis=1, keep_dims=True)
        _store(sums + row * D + tl.zeros([1, 1, 1], tl.int32), tl.full([1, 1, 1], True, tl.int1), a, b, D, P, HALF,
               PAIRS)


@triton.jit(do_not_specialize=["dq_out_b", "dq_out_s", "dq_out_h", "dk_out_b", "dk_out_s", "dk_out_h", "q_b", "q_s",
                               "q_h", "k_b", "k_s", "k_h", "q_length", "k_length"])
def _backward_kernel(dq_out, dk_out, q, k, dq, dk, q_weight, k_weight, q_weight_sums, k_weight_sums, q_bias_sums,
                     k_bias_sums, cos, sin, dq_out_b, dq_out_s, dq_out_h, dk_out_b, dk_out_s, dk_out_h, q_b, q_s, q_h,
                     k_b, k_s, k_h, cos_b, cos_s, cos_h, cos_p, sin_b, sin_s, sin_h, sin_p, q_length, k_length, eps,
                     H: tl.constexpr, KV_H: tl.constexpr, D: tl.constexpr, P: tl.constexpr, NORM: tl.constexpr,
                     FULL: tl.constexpr, HALF: tl.constexpr, PER_HEAD: tl.constexpr, ALIGN: tl.constexpr,
                     T: tl.constexpr, HB: tl.constexpr, PAIRS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr):
    """A program: CHUNK tokens of q, or of k. The sums are those over the chunk, [B * chunks, W] float32."""
    tables = (cos_b, cos_s, cos_h, cos_p, sin_b, sin_s, sin_h, sin_p)
    chunks = tl.maximum(tl.cdiv(tl.maximum(q_length, k_length), CHUNK), 1)
    if dq_out is not None:
        if tl.program_id(1) == 0:
            _backward_rows(dq_out, q, dq, q_weight, q_weight_sums, q_bias_sums, cos, sin, dq_out_b, dq_out_s, dq_out_h,
                           q_b, q_s, q_h, tables, chunks, q_length, eps, H, D, P, NORM, FULL, HALF, PER_HEAD, ALIGN, T,
                           HB, PAIRS, CHUNK, STAGES)
    if dk_out is not None:
        if tl.program_id(1) == tl.num_programs(1) - 1:
            _backward_rows(dk_out, k, dk, k_weight, k_weight_sums, k_bias_sums, cos, sin, dk_out_b, dk_out_s, dk_out_h,
                           k_b, k_s, k_h, tables, chunks, k_length, eps, KV_H, D, P, NORM, FULL, HALF, PER_HEAD, ALIGN,
                           T, HB, PAIRS, CHUNK, STAGES)


@triton.jit
def _sum_rows(sums, out, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(sums + row.to(tl.int64) * WIDTH + columns, mask=(row < rows) & (columns < WIDTH), other=0.0)
    tl.store(out + columns, tl.sum(total, axis=0, keep_dims=True).to(out.dtype.element_ty), mask=columns < WIDTH)


@triton.jit(do_not_specialize=["rows"])
def _sum_kernel(q_weight_sums, k_weight_sums, q_bias_sums, k_bias_sums, dq_weight, dk_weight, dq_bias, dk_bias, rows,
                Q_WIDTH: tl.constexpr, K_WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The chunks' sums added up in order: program_id(1) chooses the parameter."""
    if dq_weight is not None:
        if tl.program_id(1) == 0:
            _sum_rows(q_weight_sums, dq_weight, rows, Q_WIDTH, ROWS, COLUMNS)
    if dk_weight is not None:
        if tl.program_id(1) == 1:
            _sum_rows(k_weight_sums, dk_weight, rows, K_WIDTH, ROWS, COLUMNS)
    if dq_bias is not None:
        if tl.program_id(1) == 2:
            _sum_rows(q_bias_sums, dq_bias, rows, Q_WIDTH, ROWS, COLUMNS)
    if dk_bias is not None:
        if tl.program_id(1) == 3:
            _sum_rows(k_bias_sums, dk_bias, rows, K_WIDTH, ROWS, COLUMNS)


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None. The last two of each stream, cos and sin, may be strided."""
    if 0 in inputs[0].shape[2:]:
        return "there are no heads, or no elements in them"
    return why_not_triton([t[..., None] if t is not None and i % 9 > 6 and t.stride(-1) != 1 else t
                           for i, t in enumerate(inputs)])


def _strides(rows, batches=()):
    """(ALIGN, strides divided by it): of samples, tokens and heads of `rows` [B,S,H,D], of samples of `batches`."""
    found = [stride for t in rows for stride in ((0, 0, 0) if t is None else t.stride()[:3])]
    found += [0 if t is None else t.stride(0) for t in batches]
    align = gcd(16, *found)
    return align, [stride // align for stride in found]


def _table_strides(*tables):
    found = []
    for t in tables:
        if t is None:
            found += (0, 0, 0, 0)
        else:
            found += (t.stride(0) if t.dim() > 2 else 0, t.stride(-2) if t.dim() < 4 else t.stride(1),
                      t.stride(2) if t.dim() == 4 else 0, t.stride(-1))
    return found


def _shape(q, k, cos, norm_scope, rope):
    """(tokens, batch, constants of the kernels); q or k may be None."""
    some = k if q is None else q
    B, S, H, D = some.shape
    KV_H = H if k is None else k.shape[2]
    lengths = (S if q is None else q.shape[1], S if k is None else k.shape[1])
    turned = cos is not None and cos.shape[-1] > 0
    return lengths, B, dict(H=H if q is not None else KV_H, KV_H=KV_H, D=D, P=cos.shape[-1] if turned else 0,
                            FULL=norm_scope == "full", HALF=turned and rope == "half",
                            PER_HEAD=turned and cos.dim() == 4)


def _forward(parts, outputs, weights, biases, cos, sin, norm, norm_scope, eps, rope, inverse):
    q, k, v = parts
    (q_length, k_length), B, constants = _shape(q, k, cos, norm_scope, rope)
    if not constants["P"]:
        cos = sin = None
    full = constants["FULL"] and norm is not None
    constants["FULL"] = full
    arch = architecture(k if q is None else q)
    config = configs.forward(max(constants["H"], constants["KV_H"]), constants["D"], full, arch)
    blocks = sum(triton.cdiv(t.shape[2], config.HB) for t in parts if t is not None)
    align, strides = _strides(parts, outputs)
    launch(_forward_kernel, (triton.cdiv(max(q_length, k_length), config.T) * B, blocks), *parts, *outputs, *weights,
           *biases, cos, sin, *strides, *_table_strides(cos, sin), q_length, k_length, eps, config=config, NORM=norm,
           INVERSE=inverse, ALIGN=align, **constants)


def qk_norm_rope_forward(*arguments):
    """(q, k, v) of all streams joined over the tokens; k or v None where the streams have none.

    arguments: the 9 fields of each stream, then norm, norm_scope, eps, rope.
    """
    *inputs, norm, norm_scope, eps, rope = arguments
    streams = [inputs[i : i + 9] for i in range(0, len(inputs), 9)]
    tokens = None if len(streams) == 1 else sum(stream[0].shape[1] for stream in streams)
    outputs = [None if x is None else torch.empty((x.shape[0], x.shape[1] if tokens is None else tokens, *x.shape[2:]),
                                                  dtype=x.dtype, device=x.device) for x in inputs[:3]]
    start = 0
    for stream in streams:
        here = slice(start, start + stream[0].shape[1])
        into = outputs if tokens is None else [out[:, here] for out in outputs]
        _forward(stream[:3], into, stream[3:5], stream[5:7], *stream[7:], norm, norm_scope, eps, rope, False)
        start = here.stop
    return tuple(outputs)


def qk_norm_rope_backward(grad_q, grad_k, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, norm, norm_scope, eps,
                          rope, needs):
    """One stream's gradients of q, k, q_weight, k_weight, q_bias, k_bias; None where not needed or without a gradient.

    grad_q or grad_k may be None; q and k are not needed (may be None) where norm is None.
    """
    grads = [None if grad is None else dense_last(grad) for grad in (grad_q, grad_k)]
    if norm is None:  # turning back
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
        dx = [None if grad is None else like(grad) for grad in grads]
        if dx != [None, None]:
            _forward((*grads, None), (*dx, None), (None, None), (None, None), cos, sin, None, norm_scope, eps, rope,
                     True)
        return *dx, None, None, None, None
    found = [like(t) if needs[i] and grads[i % 2] is not None and t is not None else None
             for i, t in enumerate((q, k, q_weight, k_weight, q_bias, k_bias))]
    lengths, B, constants = _shape(q, k, cos, norm_scope, rope)
    if not constants["P"]:
        cos = sin = None
    eps, arch = max(eps, 1e-37), architecture(q)  # rows beyond the last have no variance, and 0 * inf is no zero
    config = configs.backward(max(constants["H"], constants["KV_H"]), constants["D"], constants["FULL"],
                              q.element_size(), arch)
    chunks = triton.cdiv(max(lengths), config.CHUNK) if max(lengths) else 1  # no tokens: the sums are still zeros
    rows = B * chunks
    sums = [None if grad is None else torch.empty((rows, grad.shape[0]), dtype=torch.float32, device=q.device)
            for grad in found[2:]]
    align, strides = _strides((*grads, q, k))
    launch(_backward_kernel, (rows, 2 - grads.count(None)), *grads, q, k, *found[:2], q_weight, k_weight, *sums,
           cos, sin, *strides, *_table_strides(cos, sin), *lengths, eps, config=config, NORM=norm, ALIGN=align,
           **constants)
    if any(grad is not None for grad in found[2:]):
        config = configs.total(arch)
        widths = [constants[name] * constants["D"] if constants["FULL"] else constants["D"] for name in ("H", "KV_H")]
        launch(_sum_kernel, (triton.cdiv(max(widths), config.COLUMNS), 4, 1), *sums, *found[2:], rows, config=config,
               Q_WIDTH=widths[0], K_WIDTH=widths[1])
    return tuple(found)


qk_norm_rope_joint_forward, qk_norm_rope_joint_backward = qk_norm_rope_forward, qk_norm_rope_backward
