"""attention on Triton, backward kernels. Launchers: attention_triton.py.

With P = 2^(score - largest) / total recomputed block by block:

  dV = P^T dout   dP = dout V^T   dS = P (dP - delta)   dQ = scale dS K   dK = scale dS^T Q   dbias = sum_i dS

where delta = sum_j P dP = dout . out. No atomics: dQ walks over keys in a kernel of its own.
"""
import triton
import triton.language as tl

from difuse_kernels.attention.attention_triton_forward import (
    accumulate,
    load,
    load_bias,
    load_oriented,
    place,
    product,
    row_stride,
    store,
    visible_keys,
    weights,
    zeros,
)


@triton.jit
def _recompute(s, factor, bias, shift, inverse, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr):
    """P from bare products, with bias, shift and inverse broadcastable against them."""
    if HAS_BIAS:
        s = tl.fma(s, factor, bias)
    p = weights(s, factor, shift, HAS_BIAS, EXACT)
    if EXACT or HAS_BIAS:
        p *= inverse
    return p


@triton.jit
def _row_values(at, rows, left, plane, MASKED: tl.constexpr, APART: tl.constexpr):
    """shift, delta, inverse. Beyond the last query shift is inf, so that P is 0 there."""
    if MASKED:
        shift = tl.load(at + rows, mask=rows < left, other=float("inf"))
        delta = tl.load(at + plane + rows, mask=rows < left, other=0.0)
        inverse = tl.load(at + plane + plane + rows, mask=rows < left, other=0.0) if APART else shift
    else:
        shift = tl.load(at + rows)
        delta = tl.load(at + plane + rows)
        inverse = tl.load(at + plane + plane + rows) if APART else shift
    return shift, delta, inverse


@triton.jit
def _query_step(q0, q1, g0, g1, k_at, k_ss, v_at, v_ss, bias_at, keys, left, factor, shift, delta, inverse, sum0, sum1,
                D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
                DELTA: tl.constexpr, TAIL: tl.constexpr):
    """One block of keys, seen by a block of queries: adds dS K, or, to find delta, the row sums of P dP."""
    k0, k1 = load(k_at, keys, k_ss, left, D, D0, D1, TAIL)
    s = product(q0, q1, k0, k1, D1)
    bias = load_bias(bias_at, keys, left, TAIL)[None, :] if HAS_BIAS else 0.0
    p = _recompute(s, factor, bias, shift[:, None], inverse[:, None], HAS_BIAS, EXACT)
    if TAIL:
        p = tl.where((keys < left)[None, :], p, 0.0)
    v0, v1 = load(v_at, keys, v_ss, left, D, D0, D1, TAIL)
    dp = product(g0, g1, v0, v1, D1)
    if DELTA:
        sum0 += tl.sum(p * dp, 1)
    else:
        ds = p * (dp - delta[:, None])
        sum0, sum1 = accumulate(ds, k0, k1, sum0, sum1, D1)
        if EXACT and k0.dtype != tl.float32:  # a row of dS sums to 0, which few roundings leave: take them along
            sum0, sum1 = accumulate(ds - ds.to(k0.dtype).to(tl.float32), k0, k1, sum0, sum1, D1)
    return sum0, sum1


@triton.jit(do_not_specialize=["Sq", "Sk"])
def query_kernel(q_ptr, k_ptr, v_ptr, grad_ptr, lengths_ptr, bias_ptr, stats_ptr, out_ptr, rows_ptr, dq_ptr, q_sb, q_ss,
                 q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, g_sb, g_ss, g_sh, dq_sb, dq_ss, dq_sh, bias_sb, plane, Sq,
                 Sk, H, GROUP, scale, factor, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, UNIT: tl.constexpr,
                 WIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr,
                 NEGATE: tl.constexpr, EXACT: tl.constexpr, DELTA: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr):
    """One block of queries of one head: dQ, or with DELTA what the other kernels need per row.

    rows [2 or 3,B,H,Sq], `plane` elements each: shift, delta and, if EXACT or with a bias, inverse, so that P is
    2^(score - shift) (* inverse): its logarithm is lost next to a score of 1e4, or of -1e9. EXACT sums P dP for delta.
    """
    begin, b, h = place(BLOCK_M, Sq, H)
    n = visible_keys(lengths_ptr, b, Sk, HAS_LENGTHS)
    queries, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first = begin.to(tl.int64)
    row = (b * H + h) * Sq + begin
    g_at = grad_ptr + (b * g_sb + h * g_sh + first * g_ss) * UNIT
    g0, g1 = load(g_at, queries, row_stride(g_ss, UNIT, WIDE), Sq - begin, D, D0, D1, True)
    if DELTA:
        seen = queries < Sq - begin
        shift = tl.load(stats_ptr + row * 2 + queries * 2, mask=seen, other=0.0)
        inverse = tl.load(stats_ptr + row * 2 + queries * 2 + 1, mask=seen, other=0.0)
        if not (EXACT or HAS_BIAS):
            shift -= tl.log2(tl.where(inverse == 0, 1.0, inverse))
        shift = tl.where(inverse == 0, float("inf"), shift)
        tl.store(rows_ptr + row + queries, shift, mask=seen)
        if EXACT or HAS_BIAS:
            tl.store(rows_ptr + plane + plane + row + queries, inverse, mask=seen)
        delta = shift
    else:
        shift, delta, inverse = _row_values(rows_ptr + row, queries, Sq - begin, plane, True, EXACT or HAS_BIAS)
    if DELTA and not EXACT:
        o0, o1 = load(out_ptr + ((b * Sq + begin) * H + h) * D, queries, H * D, Sq - begin, D, D0, D1, True)
        sum0 = tl.sum(g0.to(tl.float32) * o0.to(tl.float32), 1)
        if D1 > 0:
            sum0 += tl.sum(g1.to(tl.float32) * o1.to(tl.float32), 1)
    else:
        if DELTA:
            sum0 = tl.zeros([BLOCK_M], tl.float32)
            sum1 = sum0
        else:
            sum0, sum1 = zeros(BLOCK_M, D0, D1)
        q_at = q_ptr + (b * q_sb + h * q_sh + first * q_ss) * UNIT
        q0, q1 = load_oriented(q_at, queries, row_stride(q_ss, UNIT, WIDE), Sq - begin, D, D0, D1, NEGATE)
        k_at = k_ptr + (b * k_sb + h // GROUP * k_sh) * UNIT
        v_at = v_ptr + (b * v_sb + h // GROUP * v_sh) * UNIT
        bias_at = bias_ptr + b * bias_sb if HAS_BIAS else bias_ptr
        k_ss, v_ss = row_stride(k_ss, UNIT, WIDE), row_stride(v_ss, UNIT, WIDE)
        whole = n // BLOCK_N * BLOCK_N
        for _ in tl.range(0, whole, BLOCK_N):
            sum0, sum1 = _query_step(q0, q1, g0, g1, k_at, k_ss, v_at, v_ss, bias_at, keys, BLOCK_N, factor, shift,
                                     delta, inverse, sum0, sum1, D, D0, D1, HAS_BIAS, EXACT, DELTA, False)
            k_at += BLOCK_N * k_ss
            v_at += BLOCK_N * v_ss
            if HAS_BIAS:
                bias_at += BLOCK_N
        for _ in tl.range(whole, n, BLOCK_N, num_stages=1):  # at most once
            sum0, sum1 = _query_step(q0, q1, g0, g1, k_at, k_ss, v_at, v_ss, bias_at, keys, n - whole, factor, shift,
                                     delta, inverse, sum0, sum1, D, D0, D1, HAS_BIAS, EXACT, DELTA, True)
    if DELTA:
        tl.store(rows_ptr + plane + row + queries, sum0, mask=queries < Sq - begin)
    else:
        dq_at = dq_ptr + (b * dq_sb + h * dq_sh + first * dq_ss) * UNIT
        sum0 *= scale
        if D1 > 0:
            sum1 *= scale
        store(dq_at, queries, row_stride(dq_ss, UNIT, WIDE), Sq - begin, sum0, sum1, D, D0, D1)


@triton.jit
def _key_step(k0, k1, v0, v1, bias, q_at, q_ss, g_at, g_ss, rows_at, plane, queries, left, factor, dk0, dk1, dv0, dv1,
              dbias, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr,
              DK: tl.constexpr, DV: tl.constexpr, DBIAS: tl.constexpr, TAIL: tl.constexpr):
    """One block of queries, as columns, seen by a block of keys."""
    q0, q1 = load(q_at, queries, q_ss, left, D, D0, D1, TAIL)
    shift, delta, inverse = _row_values(rows_at, queries, left, plane, TAIL, EXACT or HAS_BIAS)
    s = product(k0, k1, q0, q1, D1)
    p = _recompute(s, factor, bias, shift[None, :], inverse[None, :], HAS_BIAS, EXACT)
    g0, g1 = load(g_at, queries, g_ss, left, D, D0, D1, TAIL)
    if DV:
        dv0, dv1 = accumulate(p, g0, g1, dv0, dv1, D1)
    if DK or DBIAS:
        ds = p * (product(v0, v1, g0, g1, D1) - delta[None, :])
        if DK:
            dk0, dk1 = accumulate(ds, q0, q1, dk0, dk1, D1)
        if DBIAS:
            dbias += tl.sum(ds, 1)
    return dk0, dk1, dv0, dv1, dbias


@triton.jit(do_not_specialize=["Sq", "Sk"])
def key_kernel(q_ptr, k_ptr, v_ptr, grad_ptr, lengths_ptr, bias_ptr, rows_ptr, dk_ptr, dv_ptr, dbias_ptr, q_sb, q_ss,
               q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, g_sb, g_ss, g_sh, dk_sb, dk_ss, dk_sh, dv_sb, dv_ss, dv_sh,
               bias_sb, plane, Sq, Sk, H, GROUP, scale, factor, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
               UNIT: tl.constexpr, WIDE: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr,
               NEGATE: tl.constexpr, EXACT: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DBIAS: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One block of keys of one key head: dK, dV and the head's dbias [B,Hkv,Sk], over all queries of all its heads.

    Hidden keys are computed as zeros and dropped at the end: whatever that gives stays in their own rows.
    """
    begin, b, h = place(BLOCK_N, Sk, H // GROUP)
    n = visible_keys(lengths_ptr, b, Sk, HAS_LENGTHS)
    queries, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    first = begin.to(tl.int64)
    k_at = k_ptr + (b * k_sb + h * k_sh + first * k_ss) * UNIT
    v_at = v_ptr + (b * v_sb + h * v_sh + first * v_ss) * UNIT
    k0, k1 = load_oriented(k_at, keys, row_stride(k_ss, UNIT, WIDE), n - begin, D, D0, D1, NEGATE)
    v0, v1 = load(v_at, keys, row_stride(v_ss, UNIT, WIDE), n - begin, D, D0, D1, True)
    bias = load_bias(bias_ptr + b * bias_sb + begin, keys, n - begin, True)[:, None] if HAS_BIAS else 0.0
    dk0, dk1 = zeros(BLOCK_N, D0, D1)
    dv0, dv1 = zeros(BLOCK_N, D0, D1)
    dbias = tl.zeros([BLOCK_N], tl.float32)
    q_step, g_step = row_stride(q_ss, UNIT, WIDE), row_stride(g_ss, UNIT, WIDE)
    seen = tl.where(begin < n, Sq, 0)  # no query looks at a block that is hidden
    whole = seen // BLOCK_M * BLOCK_M
    for i in range(0, GROUP):
        head = h * GROUP + i
        q_at = q_ptr + (b * q_sb + head * q_sh) * UNIT
        g_at = grad_ptr + (b * g_sb + head * g_sh) * UNIT
        rows_at = rows_ptr + (b * H + head) * Sq
        for _ in tl.range(0, whole, BLOCK_M):
            dk0, dk1, dv0, dv1, dbias = _key_step(
                k0, k1, v0, v1, bias, q_at, q_step, g_at, g_step, rows_at, plane, queries, BLOCK_M, factor,
                dk0, dk1, dv0, dv1, dbias, D, D0, D1, HAS_BIAS, EXACT, DK, DV, DBIAS, False)
            q_at += BLOCK_M * q_step
            g_at += BLOCK_M * g_step
            rows_at += BLOCK_M
        for _ in tl.range(whole, seen, BLOCK_M, num_stages=1):  # at most once
            dk0, dk1, dv0, dv1, dbias = _key_step(
                k0, k1, v0, v1, bias, q_at, q_step, g_at, g_step, rows_at, plane, queries, seen - whole,
                factor, dk0, dk1, dv0, dv1, dbias, D, D0, D1, HAS_BIAS, EXACT, DK, DV, DBIAS, True)
    visible = keys < n - begin
    if DK:
        dk0 = tl.where(visible[:, None], dk0 * scale, 0.0)
        if D1 > 0:
            dk1 = tl.where(visible[:, None], dk1 * scale, 0.0)
        at = dk_ptr + (b * dk_sb + h * dk_sh + first * dk_ss) * UNIT
        store(at, keys, row_stride(dk_ss, UNIT, WIDE), Sk - begin, dk0, dk1, D, D0, D1)
    if DV:
        dv0 = tl.where(visible[:, None], dv0, 0.0)
        if D1 > 0:
            dv1 = tl.where(visible[:, None], dv1, 0.0)
        at = dv_ptr + (b * dv_sb + h * dv_sh + first * dv_ss) * UNIT
        store(at, keys, row_stride(dv_ss, UNIT, WIDE), Sk - begin, dv0, dv1, D, D0, D1)
    if DBIAS:
        tl.store(dbias_ptr + (b * (H // GROUP) + h) * Sk + begin + keys, tl.where(visible, dbias, 0.0),
                 mask=keys < Sk - begin)


@triton.jit(do_not_specialize=["Sk"])
def sum_heads_kernel(heads_ptr, dbias_ptr, Sk, heads, BLOCK: tl.constexpr):
    """dbias [B,Sk] from [B,heads,Sk], in order."""
    begin, b, _ = place(BLOCK, Sk, 1)
    keys = begin + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, heads):
        total += tl.load(heads_ptr + (b * heads + i) * Sk + keys, mask=keys < Sk, other=0.0)
    tl.store(dbias_ptr + b * Sk + keys, total.to(dbias_ptr.dtype.element_ty), mask=keys < Sk)
