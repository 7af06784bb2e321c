"""norm_modulate_dual's kernels in Triton: one norm, modulated twice. Parts and layout as in adaln_triton_forward.py."""
import triton
import triton.language as tl

from difuse_kernels.adaln.adaln_triton_backward import replaced
from difuse_kernels.adaln.adaln_triton_forward import (
    columns,
    load,
    modulate,
    part,
    place,
    squares_of,
    store,
    token_rows,
)


@triton.jit(do_not_specialize=["S"])
def dual_kernel(X, SCALE, SHIFT, SCALE2, SHIFT2, H, H2, MEAN, RSTD, eps, S, x_b, x_s, scale_b, scale_s, shift_b,
                shift_s, scale2_b, scale2_s, shift2_b, shift2_s, D: tl.constexpr, RMS: tl.constexpr,
                GIVEN: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
                TAIL: tl.constexpr):
    """H and H2 of X, which stays in registers. GIVEN: MEAN and RSTD are inputs."""
    b, span, start = place(S, D, ROWS, CHUNKS * WIDTH + TAIL)
    s, live = token_rows(span * ROWS, S, ROWS)
    row = (b * S + s) * D
    parts = ()
    for i in tl.static_range(CHUNKS + (TAIL > 0)):
        d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
        parts = parts + (load(X, b * x_b + s * x_s, live, d, inside),)
    if GIVEN:
        mean = tl.load(MEAN + b * S + s, mask=live, other=0.0)
        rstd = tl.load(RSTD + b * S + s, mask=live, other=0.0)
    else:
        mean, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        if not RMS:
            for i in tl.static_range(CHUNKS + (TAIL > 0)):
                mean += tl.sum(parts[i], 1)
            mean /= D
        for i in tl.static_range(CHUNKS + (TAIL > 0)):
            d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
            squares += squares_of(parts[i], mean, inside)
        rstd = tl.rsqrt(squares / D + eps)
        if MEAN is not None:
            tl.store(MEAN + b * S + s, mean, mask=live)
            tl.store(RSTD + b * S + s, rstd, mask=live)
    for i in tl.static_range(CHUNKS + (TAIL > 0)):
        d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
        modulate(H, parts[i], mean, rstd, SCALE, SHIFT, None, None, None, None, b, s, live, row, scale_b, scale_s,
                 shift_b, shift_s, d, inside)
        modulate(H2, parts[i], mean, rstd, SCALE2, SHIFT2, None, None, None, None, b, s, live, row, scale2_b, scale2_s,
                 shift2_b, shift2_s, d, inside)


@triton.jit
def _inputs(DH, DH2, X, SCALE, SCALE2, factor, factor2, mean, rstd, b, s, live, dh_b, dh_s, dh2_b, dh2_s, x_b, x_s,
            scale_b, scale_s, scale2_b, scale2_s, d, inside, TOKENS1: tl.constexpr, TOKENS2: tl.constexpr):
    """(dh, dh2, the gradient of xhat, xhat); the factors are 1 + scale where that has a row per sample."""
    dh = load(DH, b * dh_b + s * dh_s, live, d, inside)
    dh2 = load(DH2, b * dh2_b + s * dh2_s, live, d, inside)
    xhat = (load(X, b * x_b + s * x_s, live, d, inside) - mean[:, None]) * rstd[:, None]
    if TOKENS1:
        factor = 1.0 + load(SCALE, b * scale_b + s * scale_s, live, d, inside)
    if TOKENS2:
        factor2 = 1.0 + load(SCALE2, b * scale2_b + s * scale2_s, live, d, inside)
    return dh, dh2, dh * factor + dh2 * factor2, xhat


@triton.jit
def _factor(SCALE, b, rows, live, scale_b, d, inside, PER_TOKEN: tl.constexpr):
    if PER_TOKEN:
        return tl.full(d.shape, 1.0, tl.float32)
    else:
        return 1.0 + load(SCALE, b * scale_b + rows * 0, live, d, inside)


@triton.jit
def _store_sums(PARTIAL, products, total, D: tl.constexpr, d, inside):
    tl.store(PARTIAL + d, tl.sum(products, 0)[None, :], mask=inside)
    tl.store(PARTIAL + D + d, tl.sum(total, 0)[None, :], mask=inside)


@triton.jit(do_not_specialize=["S"])
def dual_backward_kernel(DH, DH2, X, SCALE, SCALE2, MEAN, RSTD, C1, C2, DX, DSCALE, DSHIFT, DSCALE2, DSHIFT2, PARTIAL,
                         PARTIAL2, S, dh_b, dh_s, dh2_b, dh2_s, x_b, x_s, scale_b, scale_s, scale2_b, scale2_s,
                         D: tl.constexpr, RMS: tl.constexpr, TOKENS1: tl.constexpr, TOKENS2: tl.constexpr,
                         TOKENS: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr,
                         TAIL: tl.constexpr, STAGES: tl.constexpr):
    """TOKENS tokens of one sample: DX, gradients of modulations per token, and for those per sample the sums of
    dh * xhat and dh, PARTIAL and PARTIAL2 [B,runs,2,D]. C1, C2 [B,S] are the means of dxhat and dxhat * xhat over wide
    rows.
    """
    b, run, start = place(S, D, TOKENS, CHUNKS * WIDTH + TAIL)
    products, totals, products2, totals2, factors, factors2 = (), (), (), (), (), ()
    some, all_live = tl.arange(0, ROWS).to(tl.int64), tl.full([ROWS], True, tl.int1)
    for i in tl.static_range(CHUNKS + (TAIL > 0)):
        zeros = tl.zeros([ROWS, WIDTH if i < CHUNKS else TAIL], tl.float32)
        products, totals = products + (zeros,), totals + (zeros,)
        products2, totals2 = products2 + (zeros,), totals2 + (zeros,)
        d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
        factors = factors + (_factor(SCALE, b, some, all_live, scale_b, d, inside, TOKENS1),)
        factors2 = factors2 + (_factor(SCALE2, b, some, all_live, scale2_b, d, inside, TOKENS2),)
    for first in tl.range(run * TOKENS, tl.minimum(run * TOKENS + TOKENS, S), ROWS, num_stages=STAGES):
        s, live = token_rows(first, S, ROWS)
        row = (b * S + s) * D
        mean = tl.load(MEAN + b * S + s, mask=live, other=0.0)
        rstd = tl.load(RSTD + b * S + s, mask=live, other=0.0)
        dxhats, xhats = (), ()
        c1, c2 = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        if C1 is not None:
            c1 = tl.load(C1 + b * S + s, mask=live, other=0.0)
            c2 = tl.load(C2 + b * S + s, mask=live, other=0.0)
        for i in tl.static_range(CHUNKS + (TAIL > 0)):
            d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
            dh, dh2, dxhat, xhat = _inputs(DH, DH2, X, SCALE, SCALE2, factors[i], factors2[i], mean, rstd, b, s, live,
                                           dh_b, dh_s, dh2_b, dh2_s, x_b, x_s, scale_b, scale_s, scale2_b, scale2_s,
                                           d, inside, TOKENS1, TOKENS2)
            products, totals = replaced(products, i, products[i] + dh * xhat), replaced(totals, i, totals[i] + dh)
            products2 = replaced(products2, i, products2[i] + dh2 * xhat)
            totals2 = replaced(totals2, i, totals2[i] + dh2)
            if DSCALE is not None:
                store(DSCALE, dh * xhat, row, live, d, inside)
            if DSHIFT is not None:
                store(DSHIFT, dh, row, live, d, inside)
            if DSCALE2 is not None:
                store(DSCALE2, dh2 * xhat, row, live, d, inside)
            if DSHIFT2 is not None:
                store(DSHIFT2, dh2, row, live, d, inside)
            dxhats, xhats = dxhats + (dxhat,), xhats + (xhat,)
            if C1 is None:
                c2 += tl.sum(dxhat * xhat, 1) / D
                if not RMS:
                    c1 += tl.sum(dxhat, 1) / D
        if DX is not None:
            for i in tl.static_range(CHUNKS + (TAIL > 0)):
                d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
                dx = rstd[:, None] * (dxhats[i] - c1[:, None] - xhats[i] * c2[:, None])
                store(DX, dx, row, live, d, inside)
    if PARTIAL is not None:
        offset = (b * tl.cdiv(S, TOKENS) + run) * 2 * D
        for i in tl.static_range(CHUNKS + (TAIL > 0)):
            d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
            _store_sums(PARTIAL + offset, products[i], totals[i], D, d, inside)
            _store_sums(PARTIAL2 + offset, products2[i], totals2[i], D, d, inside)


@triton.jit(do_not_specialize=["S"])
def dual_backward_statistics_kernel(DH, DH2, X, SCALE, SCALE2, MEAN, RSTD, C1, C2, S, dh_b, dh_s, dh2_b, dh2_s, x_b,
                                    x_s, scale_b, scale_s, scale2_b, scale2_s, D: tl.constexpr, RMS: tl.constexpr,
                                    TOKENS1: tl.constexpr, TOKENS2: tl.constexpr, ROWS: tl.constexpr,
                                    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """C1 and C2 for wide rows, block by block."""
    b, span, _ = place(S, 1, ROWS, 1)
    s, live = token_rows(span * ROWS, S, ROWS)
    mean = tl.load(MEAN + b * S + s, mask=live, other=0.0)
    rstd = tl.load(RSTD + b * S + s, mask=live, other=0.0)
    c1, c2 = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        d, inside = columns(start, WIDTH, D, D % WIDTH == 0)
        factor = _factor(SCALE, b, s, live, scale_b, d, inside, TOKENS1)
        factor2 = _factor(SCALE2, b, s, live, scale2_b, d, inside, TOKENS2)
        _dh, _dh2, dxhat, xhat = _inputs(DH, DH2, X, SCALE, SCALE2, factor, factor2, mean, rstd, b, s, live, dh_b, dh_s,
                                         dh2_b, dh2_s, x_b, x_s, scale_b, scale_s, scale2_b, scale2_s, d, inside,
                                         TOKENS1, TOKENS2)
        c2 += tl.sum(dxhat * xhat, 1)
        if not RMS:
            c1 += tl.sum(dxhat, 1)
    tl.store(C1 + b * S + s, c1 / D, mask=live)
    tl.store(C2 + b * S + s, c2 / D, mask=live)
