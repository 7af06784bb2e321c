"""attention on Triton, forward kernel, and what both passes share. Launchers: attention_triton.py.

A head is held in two parts, e.g. 72 = 64 + 16 with eight masked columns, and every product is one or two dots. Scores
are exponents of 2. Strides come in units of UNIT elements: so the compiler knows the alignment.
"""
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # a running maximum starts here: finite, so that 2^(-inf - it) is 0
LOWEST_BIAS = tl.constexpr(-3.39e38)  # above it, so that the smallest finite bias is still a number, times log2(e) too


@triton.jit
def _load_part(base, rows, stride, left, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr,
               MASKED: tl.constexpr):
    """Columns START .. START + WIDTH of rows [rows]; zeros from column D on and, if MASKED, from row `left` on."""
    cols = START + tl.arange(0, WIDTH)
    at = base + rows[:, None] * stride + cols[None, :]
    if START + WIDTH > D:
        if MASKED:
            tile = tl.load(at, mask=(rows < left)[:, None] & (cols < D)[None, :], other=0.0)
        else:
            tile = tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        tile = tl.load(at, mask=(rows < left)[:, None], other=0.0) if MASKED else tl.load(at)
    return tile


@triton.jit
def load(base, rows, stride, left, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, MASKED: tl.constexpr):
    """Both parts of a head's rows; the first twice where there is no second."""
    first = _load_part(base, rows, stride, left, D, 0, D0, MASKED)
    rest = first
    if D1 > 0:
        rest = _load_part(base, rows, stride, left, D, D0, D1, MASKED)
    return first, rest


@triton.jit
def store(base, rows, stride, left, first, rest, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """The reverse of `load`, rounding."""
    cols = tl.arange(0, D0)
    tl.store(base + rows[:, None] * stride + cols[None, :], first.to(base.dtype.element_ty),
             mask=(rows < left)[:, None] & (cols < D)[None, :])
    if D1 > 0:
        cols = D0 + tl.arange(0, D1)
        tl.store(base + rows[:, None] * stride + cols[None, :], rest.to(base.dtype.element_ty),
                 mask=(rows < left)[:, None] & (cols < D)[None, :])


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr):
    """a b^T over both parts."""
    result = tl.dot(a0, tl.trans(b0), input_precision="ieee")
    if D1 > 0:
        result = tl.dot(a1, tl.trans(b1), result, input_precision="ieee")
    return result


@triton.jit
def accumulate(weights, b0, b1, acc0, acc1, D1: tl.constexpr):
    """acc + weights b for both parts."""
    weights = weights.to(b0.dtype)
    acc0 = tl.dot(weights, b0, acc0, input_precision="ieee")
    acc1 = tl.dot(weights, b1, acc1, input_precision="ieee") if D1 > 0 else acc0
    return acc0, acc1


@triton.jit
def zeros(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Both parts of an accumulator."""
    first = tl.zeros([ROWS, D0], tl.float32)
    rest = first
    if D1 > 0:
        rest = tl.zeros([ROWS, D1], tl.float32)
    return first, rest


@triton.jit
def place(BLOCK: tl.constexpr, size, heads):
    """Of this program: the first row of its block, sample and head in 64 bits. Blocks of one head are neighbours."""
    blocks = tl.cdiv(size, BLOCK)
    pair = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks * BLOCK, (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)


@triton.jit
def visible_keys(lengths_ptr, b, Sk, HAS_LENGTHS: tl.constexpr):
    """The keys sample b sees. Lengths are clamped here: reading them on the host would stall the stream."""
    if HAS_LENGTHS:
        return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), Sk)
    else:
        return Sk


@triton.jit
def load_bias(at, keys, left, MASKED: tl.constexpr):
    """key_bias in base 2. Only -inf hides; a finite bias stays finite, nan stays nan (which minimum would drop)."""
    bias = tl.load(at + keys, mask=keys < left, other=0.0) if MASKED else tl.load(at + keys)
    bias = bias.to(tl.float32)
    bias = tl.where((bias < LOWEST_BIAS / LOG2E) & (bias > float("-inf")), LOWEST_BIAS / LOG2E, bias)
    return tl.where((bias > -LOWEST_BIAS / LOG2E) & (bias < float("inf")), -LOWEST_BIAS / LOG2E, bias) * LOG2E


@triton.jit
def row_stride(stride, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """A row stride in elements. Offsets inside a block have 32 bits unless WIDE."""
    if WIDE:
        return tl.full([], UNIT, tl.int64) * stride
    else:
        return stride * UNIT


@triton.jit
def weights(s, factor, shift, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr):
    """2^(score - shift). With a bias it was added and s is a score already; EXACT, s and shift are still products.

    EXACT takes the difference first: the largest gets exactly 1, so that a lone key's gradient is exactly 0.
    """
    if HAS_BIAS:
        p = tl.exp2(s - shift)
    elif EXACT:
        p = tl.exp2((s - shift) * factor)
    else:
        p = tl.exp2(tl.fma(s, factor, -shift))
    return p


@triton.jit
def load_oriented(base, rows, stride, left, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEGATE: tl.constexpr):
    """Both parts, negated for a negative scale: so that without a bias the largest product wins."""
    first, rest = load(base, rows, stride, left, D, D0, D1, True)
    if NEGATE:
        first, rest = (-first.to(tl.float32)).to(first.dtype), (-rest.to(tl.float32)).to(rest.dtype)
    return first, rest


@triton.jit
def _attend(q0, q1, k_at, k_ss, v_at, v_ss, bias_at, keys, left, factor, largest, total, o0, o1, D: tl.constexpr,
            D0: tl.constexpr, D1: tl.constexpr, HAS_BIAS: tl.constexpr, EXACT: tl.constexpr, TAIL: tl.constexpr):
    """One block of keys. `largest` is in the units of `weights`."""
    k0, k1 = load(k_at, keys, k_ss, left, D, D0, D1, TAIL)
    s = product(q0, q1, k0, k1, D1)
    if HAS_BIAS:
        s = tl.fma(s, factor, load_bias(bias_at, keys, left, TAIL)[None, :])
    if TAIL:
        s = tl.where((keys < left)[None, :], s, float("-inf"))
    best = tl.max(s, 1) if HAS_BIAS or EXACT else tl.max(s, 1) * factor
    now = tl.maximum(largest, best)
    p = weights(s, factor, now[:, None], HAS_BIAS, EXACT)
    shrink = tl.exp2((largest - now) * factor) if EXACT and not HAS_BIAS else tl.exp2(largest - now)
    total = total * shrink + tl.sum(p, 1)
    o0 *= shrink[:, None]
    if D1 > 0:
        o1 *= shrink[:, None]
    v0, v1 = load(v_at, keys, v_ss, left, D, D0, D1, TAIL)
    o0, o1 = accumulate(p, v0, v1, o0, o1, D1)
    return now, total, o0, o1


@triton.jit(do_not_specialize=["Sq", "Sk"])
def forward_kernel(q_ptr, k_ptr, v_ptr, lengths_ptr, bias_ptr, out_ptr, stats_ptr, q_sb, q_ss, q_sh, k_sb, k_ss, k_sh,
                   v_sb, v_ss, v_sh, bias_sb, Sq, Sk, H, GROUP, factor, D: tl.constexpr, D0: tl.constexpr,
                   D1: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr, PAIRED: tl.constexpr,
                   HAS_LENGTHS: tl.constexpr, HAS_BIAS: tl.constexpr, NEGATE: tl.constexpr, EXACT: tl.constexpr,
                   SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """One block of queries of one head."""
    begin, b, h = place(BLOCK_M, Sq, H)
    n = visible_keys(lengths_ptr, b, Sk, HAS_LENGTHS)
    queries, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    q_at = q_ptr + (b * q_sb + h * q_sh + begin.to(tl.int64) * q_ss) * UNIT
    k_at = k_ptr + (b * k_sb + h // GROUP * k_sh) * UNIT
    v_at = v_ptr + (b * v_sb + h // GROUP * v_sh) * UNIT
    bias_at = bias_ptr + b * bias_sb if HAS_BIAS else bias_ptr
    k_ss = row_stride(k_ss, UNIT, WIDE)
    v_ss = k_ss if PAIRED else row_stride(v_ss, UNIT, WIDE)  # one set of offsets in registers
    q0, q1 = load_oriented(q_at, queries, row_stride(q_ss, UNIT, WIDE), Sq - begin, D, D0, D1, NEGATE)
    largest, total = tl.full([BLOCK_M], LOWEST, tl.float32), tl.zeros([BLOCK_M], tl.float32)
    o0, o1 = zeros(BLOCK_M, D0, D1)
    whole = n // BLOCK_N * BLOCK_N
    for _ in tl.range(0, whole, BLOCK_N):
        largest, total, o0, o1 = _attend(q0, q1, k_at, k_ss, v_at, v_ss, bias_at, keys, BLOCK_N, factor, largest, total,
                                         o0, o1, D, D0, D1, HAS_BIAS, EXACT, False)
        k_at += BLOCK_N * k_ss
        v_at += BLOCK_N * v_ss
        if HAS_BIAS:
            bias_at += BLOCK_N
    for _ in tl.range(whole, n, BLOCK_N, num_stages=1):  # at most once
        largest, total, o0, o1 = _attend(q0, q1, k_at, k_ss, v_at, v_ss, bias_at, keys, n - whole, factor, largest,
                                         total, o0, o1, D, D0, D1, HAS_BIAS, EXACT, True)
    inverse = tl.where(total == 0, 0.0, 1 / total)
    out_at = out_ptr + ((b * Sq + begin) * H + h) * D
    o0 *= inverse[:, None]
    if D1 > 0:
        o1 *= inverse[:, None]
    store(out_at, queries, H * D, Sq - begin, o0, o1, D, D0, D1)
    if SAVE:
        at = stats_ptr + ((b * H + h) * Sq + begin) * 2 + queries * 2
        tl.store(at, largest, mask=queries < Sq - begin)
        tl.store(at + 1, inverse, mask=queries < Sq - begin)
