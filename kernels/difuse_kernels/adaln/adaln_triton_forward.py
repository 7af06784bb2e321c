"""adaln's forward kernels in Triton, and the parts that the backward kernels share.

A program holds ROWS tokens of one sample by CHUNKS parts of WIDTH columns and one of TAIL: the whole row, or, where D
is too wide for registers, a block of WIDTH columns, the statistics coming from a kernel that loops over the row.
Operands that are absent are None. Outputs are contiguous, so only inputs bring strides; a modulation per sample has
stride 0 over the tokens: read as a tile like any other it lies in the threads that need it, read as one row it would
have to be handed around through shared memory.
"""
import triton
import triton.language as tl


@triton.jit
def columns(START, WIDTH: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Column numbers [1,WIDTH] and which of them exist, a constant where all do."""
    d = START + tl.arange(0, WIDTH)[None, :]
    return d, (tl.full([1, WIDTH], True, tl.int1) if WHOLE else d < D)


@triton.jit
def part(i: tl.constexpr, start, D: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """The columns of part i of a row, or of the block of columns from `start` on."""
    if i == CHUNKS:
        return columns(CHUNKS * WIDTH, TAIL, D, CHUNKS * WIDTH + TAIL == D)
    else:
        return columns(start + i * WIDTH, WIDTH, D, (i + 1) * WIDTH <= D if CHUNKS > 1 or TAIL > 0 else D % WIDTH == 0)


@triton.jit
def load(P, rows, live, d, inside):
    """[ROWS,WIDTH] in float32, zeros outside. `rows` are offsets [ROWS] in int64."""
    return tl.load(P + rows[:, None] + d, mask=live[:, None] & inside, other=0.0).to(tl.float32)


@triton.jit
def load_modulation(P, TABLE, rows, live, d, inside):
    """A modulation, with its table's row added if it has one."""
    modulation = load(P, rows, live, d, inside)
    if TABLE is not None:
        modulation += load(TABLE, rows * 0, live, d, inside)
    return modulation


@triton.jit
def store(P, value, rows, live, d, inside):
    """The reverse of `load`, rounding."""
    tl.store(P + rows[:, None] + d, value.to(P.dtype.element_ty), mask=live[:, None] & inside)


@triton.jit
def _residual(X, Y, GATE, GATE_TABLE, X_NEW, b, s, live, row, x_b, x_s, y_b, y_s, gate_b, gate_s, d, inside):
    """x' = x + gate * y, rounded to x's dtype, stored if X_NEW is there, in float32; without y x itself."""
    x = load(X, b * x_b + s * x_s, live, d, inside)
    if Y is not None:
        y = load(Y, b * y_b + s * y_s, live, d, inside)
        if GATE is not None:
            y *= load_modulation(GATE, GATE_TABLE, b * gate_b + s * gate_s, live, d, inside)
        rounded = (x + y).to(X.dtype.element_ty)
        x = rounded.to(tl.float32)
        if X_NEW is not None:
            store(X_NEW, rounded, row, live, d, inside)
    return x


@triton.jit
def modulate(H, x, mean, rstd, SCALE, SHIFT, SCALE_TABLE, SHIFT_TABLE, WEIGHT, BIAS, b, s, live, row, scale_b, scale_s,
             shift_b, shift_s, d, inside):
    """Stores the modulated norm of x."""
    h = (x - mean[:, None]) * rstd[:, None]
    if WEIGHT is not None:
        h *= load(WEIGHT, s * 0, live, d, inside)
    if BIAS is not None:
        h += load(BIAS, s * 0, live, d, inside)
    if SCALE is not None:
        h *= 1.0 + load_modulation(SCALE, SCALE_TABLE, b * scale_b + s * scale_s, live, d, inside)
    if SHIFT is not None:
        h += load_modulation(SHIFT, SHIFT_TABLE, b * shift_b + s * shift_s, live, d, inside)
    store(H, h, row, live, d, inside)


@triton.jit
def squares_of(x, mean, inside):
    """Each row's sum of squares about its mean."""
    centred = tl.where(inside, x - mean[:, None], 0.0)
    return tl.sum(centred * centred, 1)


@triton.jit
def place(S, D: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr):
    """(sample, number of the span of SPAN tokens in it, first column) of this program; columns run fastest."""
    blocks: tl.constexpr = (D + WIDTH - 1) // WIDTH
    span, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    spans = tl.cdiv(S, SPAN)
    return (span // spans).to(tl.int64), (span % spans).to(tl.int64), block * WIDTH


@triton.jit
def token_rows(first, S, ROWS: tl.constexpr):
    """Numbers of ROWS tokens in 64 bits, and which of them exist."""
    s = tl.arange(0, ROWS).to(tl.int64) + first
    return s, (tl.full([1], True, tl.int1) if ROWS == 1 else s < S)


@triton.jit(do_not_specialize=["S"])
def forward_kernel(X, Y, GATE, SCALE, SHIFT, WEIGHT, BIAS, GATE_TABLE, SCALE_TABLE, SHIFT_TABLE, X_NEW, H, MEAN, RSTD,
                   eps, S, x_b, x_s, y_b, y_s, gate_b, gate_s, scale_b, scale_s, shift_b, shift_s,
                   D: tl.constexpr, RMS: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr,
                   CHUNKS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """All three ops: no y is norm_modulate, no H is gate_residual. GIVEN: MEAN and RSTD are inputs."""
    b, span, start = place(S, D, ROWS, CHUNKS * WIDTH + TAIL)
    s, live = token_rows(span * ROWS, S, ROWS)
    row = (b * S + s) * D
    parts = ()
    for i in tl.static_range(CHUNKS + (TAIL > 0)):
        d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
        parts = parts + (_residual(X, Y, GATE, GATE_TABLE, X_NEW, b, s, live, row, x_b, x_s, y_b, y_s, gate_b, gate_s,
                                   d, inside),)
    if H is not None:
        if GIVEN:
            mean = tl.load(MEAN + b * S + s, mask=live, other=0.0)
            rstd = tl.load(RSTD + b * S + s, mask=live, other=0.0)
        else:
            mean = tl.zeros([ROWS], tl.float32)
            if not RMS:
                for i in tl.static_range(CHUNKS + (TAIL > 0)):
                    mean += tl.sum(parts[i], 1)
                mean /= D
            squares = tl.zeros([ROWS], tl.float32)
            for i in tl.static_range(CHUNKS + (TAIL > 0)):
                d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
                squares += squares_of(parts[i], mean, inside)
            rstd = tl.rsqrt(squares / D + eps)
            if MEAN is not None:
                tl.store(MEAN + b * S + s, mean, mask=live)
                tl.store(RSTD + b * S + s, rstd, mask=live)
        for i in tl.static_range(CHUNKS + (TAIL > 0)):
            d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
            modulate(H, parts[i], mean, rstd, SCALE, SHIFT, SCALE_TABLE, SHIFT_TABLE, WEIGHT, BIAS, b, s, live, row,
                     scale_b, scale_s, shift_b, shift_s, d, inside)


@triton.jit(do_not_specialize=["S"])
def statistics_kernel(X, Y, GATE, GATE_TABLE, MEAN, RSTD, eps, S, x_b, x_s, y_b, y_s, gate_b, gate_s,
                      D: tl.constexpr, RMS: tl.constexpr, ROWS: tl.constexpr,
                      CHUNKS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """MEAN and RSTD of wide rows of x', block by block, twice."""
    b, span, _ = place(S, 1, ROWS, 1)
    s, live = token_rows(span * ROWS, S, ROWS)
    mean = tl.zeros([ROWS], tl.float32)
    if not RMS:
        for start in range(0, D, WIDTH):
            d, inside = columns(start, WIDTH, D, D % WIDTH == 0)
            x = _residual(X, Y, GATE, GATE_TABLE, None, b, s, live, s, x_b, x_s, y_b, y_s, gate_b, gate_s, d, inside)
            mean += tl.sum(x, 1)
        mean /= D
    squares = tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        d, inside = columns(start, WIDTH, D, D % WIDTH == 0)
        x = _residual(X, Y, GATE, GATE_TABLE, None, b, s, live, s, x_b, x_s, y_b, y_s, gate_b, gate_s, d, inside)
        squares += squares_of(x, mean, inside)
    tl.store(MEAN + b * S + s, mean, mask=live)
    tl.store(RSTD + b * S + s, tl.rsqrt(squares / D + eps), mask=live)
