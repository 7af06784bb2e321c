"""adaln's backward kernels in Triton: a walk over the tokens, then sums over tokens and samples in a fixed order."""
import triton
import triton.language as tl

from difuse_kernels.adaln.adaln_triton_forward import columns, load, load_modulation, part, place, store, token_rows


@triton.jit
def _factor(SCALE, SCALE_TABLE, WEIGHT, b, s, live, scale_b, scale_s, d, inside, SCALE_TOKENS: tl.constexpr):
    """What of weight * (1 + scale) all tokens of the sample share."""
    factor = tl.full(d.shape, 1.0, tl.float32)
    if WEIGHT is not None:
        factor *= load(WEIGHT, s * 0, live, d, inside)
    if SCALE is not None and not SCALE_TOKENS:
        factor *= 1.0 + load_modulation(SCALE, SCALE_TABLE, b * scale_b + s * 0, live, d, inside)
    return factor


@triton.jit
def _norm_inputs(DH, X, SCALE, SCALE_TABLE, factor, mean, rstd, b, s, live, dh_b, dh_s, x_b, x_s, scale_b, scale_s, d,
                 inside, SCALE_TOKENS: tl.constexpr):
    """(dh, dh times 1 + scale if that has a row per token, the gradient of xhat, xhat)."""
    dh = load(DH, b * dh_b + s * dh_s, live, d, inside)
    xhat = (load(X, b * x_b + s * x_s, live, d, inside) - mean[:, None]) * rstd[:, None]
    dn = dh
    if SCALE_TOKENS:
        dn = dh * (1.0 + load_modulation(SCALE, SCALE_TABLE, b * scale_b + s * scale_s, live, d, inside))
    return dh, dn, dn * factor, xhat


@triton.jit
def _stream_gradients(dx, y, gate, GATE, GATE_TABLE, DX, DY, DGATE, b, s, live, row, gate_b, gate_s, d, inside,
                      GATE_TOKENS: tl.constexpr):
    if DX is not None:
        store(DX, dx, row, live, d, inside)
    if DY is not None:
        if GATE_TOKENS:
            gate = load_modulation(GATE, GATE_TABLE, b * gate_b + s * gate_s, live, d, inside)
        store(DY, dx * gate, row, live, d, inside)
    if DGATE is not None:
        store(DGATE, dx * y, row, live, d, inside)


@triton.jit
def _token_gradients(dh, xhat, WEIGHT, BIAS, DSCALE, DSHIFT, row, live, d, inside):
    """Modulation per token: its gradients are rows of their own."""
    if DSCALE is not None:
        n = xhat
        if WEIGHT is not None:
            n *= load(WEIGHT, row * 0, live, d, inside)
        if BIAS is not None:
            n += load(BIAS, row * 0, live, d, inside)
        store(DSCALE, dh * n, row, live, d, inside)
    if DSHIFT is not None:
        store(DSHIFT, dh, row, live, d, inside)


@triton.jit
def replaced(parts, i: tl.constexpr, value):
    """The tuple with its i-th entry replaced."""
    return parts[:i] + (value,) + parts[i + 1:]


@triton.jit
def _store_sum(PARTIAL, total, slot: tl.constexpr, D: tl.constexpr, d, inside):
    tl.store(PARTIAL + slot * D + d, tl.sum(total, 0)[None, :], mask=inside)


@triton.jit(do_not_specialize=["S"])
def backward_kernel(DX_NEW, DH, X, Y, GATE, SCALE, WEIGHT, BIAS, GATE_TABLE, SCALE_TABLE, MEAN, RSTD, C1, C2, DX, DY,
                    DGATE, DSCALE, DSHIFT, PARTIAL, S, dx_new_b, dx_new_s, dh_b, dh_s, x_b, x_s, y_b, y_s, gate_b,
                    gate_s, scale_b, scale_s, D: tl.constexpr, GATE_TOKENS: tl.constexpr, SCALE_TOKENS: tl.constexpr,
                    RMS: tl.constexpr, SUM_XHAT: tl.constexpr, SUM_DN: tl.constexpr, SUM_GATE: tl.constexpr,
                    SUM_PRODUCT: tl.constexpr, SUM_DH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
                    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr, STAGES: tl.constexpr):
    """TOKENS tokens of one sample: DX, DY, gradients of modulations per token, PARTIAL [B,runs,sums,D] for the others.

    No DH is gate_residual alone. C1, C2 [B,S] are the means of dxhat and dxhat * xhat over wide rows. The sums, those
    wanted of: dn * xhat, dn, dx * y, dh * xhat, dh. dn is dh * (1 + scale) where scale has a row per token; a row per
    sample is left to the second stage.
    """
    b, run, start = place(S, D, TOKENS, CHUNKS * WIDTH + TAIL)
    xhat_sums, dn_sums, gate_sums, product_sums, dh_sums, factors, gates = (), (), (), (), (), (), ()
    some, all_live = tl.arange(0, ROWS).to(tl.int64), tl.full([ROWS], True, tl.int1)
    for i in tl.static_range(CHUNKS + (TAIL > 0)):
        zeros = tl.zeros([ROWS, WIDTH if i < CHUNKS else TAIL], tl.float32)
        xhat_sums, dn_sums = xhat_sums + (zeros,), dn_sums + (zeros,)
        gate_sums, product_sums, dh_sums = gate_sums + (zeros,), product_sums + (zeros,), dh_sums + (zeros,)
        d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
        factors = factors + (
            _factor(SCALE, SCALE_TABLE, WEIGHT, b, some, all_live, scale_b, scale_s, d, inside, SCALE_TOKENS),)
        gate = zeros + 1.0
        if GATE is not None and DY is not None and not GATE_TOKENS:
            gate = load_modulation(GATE, GATE_TABLE, b * gate_b + some * 0, all_live, d, inside)
        gates = gates + (gate,)
    for first in tl.range(run * TOKENS, tl.minimum(run * TOKENS + TOKENS, S), ROWS, num_stages=STAGES):
        s, live = token_rows(first, S, ROWS)
        row = (b * S + s) * D
        dxhats, xhats = (), ()
        c1, c2 = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
        if DH is not None:
            mean = tl.load(MEAN + b * S + s, mask=live, other=0.0)
            rstd = tl.load(RSTD + b * S + s, mask=live, other=0.0)
            if C1 is not None:
                c1 = tl.load(C1 + b * S + s, mask=live, other=0.0)
                c2 = tl.load(C2 + b * S + s, mask=live, other=0.0)
        for i in tl.static_range(CHUNKS + (TAIL > 0)):
            d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
            if DH is not None:
                dh, dn, dxhat, xhat = _norm_inputs(DH, X, SCALE, SCALE_TABLE, factors[i], mean, rstd, b, s, live, dh_b,
                                                   dh_s, x_b, x_s, scale_b, scale_s, d, inside, SCALE_TOKENS)
                xhat_sums = replaced(xhat_sums, i, xhat_sums[i] + dn * xhat)
                dn_sums = replaced(dn_sums, i, dn_sums[i] + dn)
                product_sums = replaced(product_sums, i, product_sums[i] + dh * xhat)
                dh_sums = replaced(dh_sums, i, dh_sums[i] + dh)
                _token_gradients(dh, xhat, WEIGHT, BIAS, DSCALE, DSHIFT, row, live, d, inside)
                dxhats, xhats = dxhats + (dxhat,), xhats + (xhat,)
                if C1 is None:
                    c2 += tl.sum(dxhat * xhat, 1) / D
                    if not RMS:
                        c1 += tl.sum(dxhat, 1) / D
        for i in tl.static_range(CHUNKS + (TAIL > 0)):
            d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
            dx = tl.zeros([ROWS, WIDTH if i < CHUNKS else TAIL], tl.float32)
            y = dx
            if DX_NEW is not None:
                dx = load(DX_NEW, b * dx_new_b + s * dx_new_s, live, d, inside)
            if SUM_GATE or DGATE is not None:
                y = load(Y, b * y_b + s * y_s, live, d, inside)
            if DH is not None:
                dx += rstd[:, None] * (dxhats[i] - c1[:, None] - xhats[i] * c2[:, None])
            gate_sums = replaced(gate_sums, i, gate_sums[i] + dx * y)
            _stream_gradients(dx, y, gates[i], GATE, GATE_TABLE, DX, DY, DGATE, b, s, live, row, gate_b, gate_s, d,
                              inside, GATE_TOKENS)
    count: tl.constexpr = SUM_XHAT + SUM_DN + SUM_GATE + SUM_PRODUCT + SUM_DH
    PARTIAL += (b * tl.cdiv(S, TOKENS) + run) * count * D
    for i in tl.static_range(CHUNKS + (TAIL > 0)):
        d, inside = part(i, start, D, CHUNKS, WIDTH, TAIL)
        if SUM_XHAT:
            _store_sum(PARTIAL, xhat_sums[i], 0, D, d, inside)
        if SUM_DN:
            _store_sum(PARTIAL, dn_sums[i], SUM_XHAT, D, d, inside)
        if SUM_GATE:
            _store_sum(PARTIAL, gate_sums[i], SUM_XHAT + SUM_DN, D, d, inside)
        if SUM_PRODUCT:
            _store_sum(PARTIAL, product_sums[i], SUM_XHAT + SUM_DN + SUM_GATE, D, d, inside)
        if SUM_DH:
            _store_sum(PARTIAL, dh_sums[i], count - 1, D, d, inside)


@triton.jit(do_not_specialize=["S"])
def backward_statistics_kernel(DH, X, SCALE, SCALE_TABLE, WEIGHT, MEAN, RSTD, C1, C2, S, dh_b, dh_s, x_b, x_s,
                               scale_b, scale_s, D: tl.constexpr, SCALE_TOKENS: tl.constexpr, RMS: tl.constexpr,
                               ROWS: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr, TAIL: tl.constexpr):
    """C1 and C2 of wide rows, block by block."""
    b, span, _ = place(S, 1, ROWS, 1)
    s, live = token_rows(span * ROWS, S, ROWS)
    mean = tl.load(MEAN + b * S + s, mask=live, other=0.0)
    rstd = tl.load(RSTD + b * S + s, mask=live, other=0.0)
    c1, c2 = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in range(0, D, WIDTH):
        d, inside = columns(start, WIDTH, D, D % WIDTH == 0)
        factor = _factor(SCALE, SCALE_TABLE, WEIGHT, b, s, live, scale_b, scale_s, d, inside, SCALE_TOKENS)
        _dh, _dn, dxhat, xhat = _norm_inputs(DH, X, SCALE, SCALE_TABLE, factor, mean, rstd, b, s, live, dh_b, dh_s,
                                             x_b, x_s, scale_b, scale_s, d, inside, SCALE_TOKENS)
        c2 += tl.sum(dxhat * xhat, 1)
        if not RMS:
            c1 += tl.sum(dxhat, 1)
    tl.store(C1 + b * S + s, c1 / D, mask=live)
    tl.store(C2 + b * S + s, c2 / D, mask=live)


@triton.jit
def _sum_rows(P, count, stride, d, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """[1,WIDTH]: the sum of `count` rows that lie `stride` apart, in an order that depends on `count` only."""
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, count, ROWS):
        i = first + tl.arange(0, ROWS)
        total += load(P, i.to(tl.int64) * stride, i < count, d, inside)
    return tl.sum(total, 0)[None, :]


@triton.jit
def _store_row(P, ROWS, value, b, D: tl.constexpr, d, inside):
    """A gradient per sample, rounded; in float32 for the table beside it. Either may be None."""
    if P is not None:
        tl.store(P + b * D + d, value.to(P.dtype.element_ty), mask=inside)
    if ROWS is not None:
        tl.store(ROWS + b * D + d, value, mask=inside)


@triton.jit(do_not_specialize=["runs"])
def sample_sums_kernel(PARTIAL, WEIGHT, BIAS, DGATE, DSCALE, DSHIFT, GATE_ROWS, SCALE_ROWS, SHIFT_ROWS, TOTAL, runs,
                       D: tl.constexpr, SCALE_TOKENS: tl.constexpr, SUM_XHAT: tl.constexpr, SUM_DN: tl.constexpr,
                       SUM_GATE: tl.constexpr, SUM_PRODUCT: tl.constexpr, SUM_DH: tl.constexpr, ROWS: tl.constexpr,
                       WIDTH: tl.constexpr):
    """Gradients of modulations per sample; TOTAL [B,2,D], the sums that weight and bias need; for tables the sums over
    the tokens of their modulations' gradients, [B,D] each.
    """
    b, _, start = place(1, D, 1, WIDTH)
    d, inside = columns(start, WIDTH, D, D % WIDTH == 0)
    count: tl.constexpr = SUM_XHAT + SUM_DN + SUM_GATE + SUM_PRODUCT + SUM_DH
    PARTIAL += b * runs * count * D
    if SUM_XHAT:
        xhat_sum = _sum_rows(PARTIAL, runs, count * D, d, inside, ROWS, WIDTH)
        if TOTAL is not None:
            tl.store(TOTAL + b * 2 * D + d, xhat_sum, mask=inside)
    if SUM_DN:
        dn_sum = _sum_rows(PARTIAL + SUM_XHAT * D, runs, count * D, d, inside, ROWS, WIDTH)
        if TOTAL is not None:
            tl.store(TOTAL + (b * 2 + 1) * D + d, dn_sum, mask=inside)
    if SUM_DH:
        dh_sum = _sum_rows(PARTIAL + (count - 1) * D, runs, count * D, d, inside, ROWS, WIDTH)
    if DSCALE is not None or SCALE_ROWS is not None:
        if SUM_PRODUCT:
            dscale = _sum_rows(PARTIAL + (SUM_XHAT + SUM_DN + SUM_GATE) * D, runs, count * D, d, inside, ROWS, WIDTH)
        else:
            dscale = xhat_sum
        if WEIGHT is not None:
            dscale *= tl.load(WEIGHT + d, mask=inside, other=0.0).to(tl.float32)
        if BIAS is not None:
            dscale += (dh_sum if SCALE_TOKENS else dn_sum) * tl.load(BIAS + d, mask=inside, other=0.0).to(tl.float32)
        _store_row(DSCALE, SCALE_ROWS, dscale, b, D, d, inside)
    if DSHIFT is not None or SHIFT_ROWS is not None:
        _store_row(DSHIFT, SHIFT_ROWS, dh_sum if SUM_DH else dn_sum, b, D, d, inside)
    if DGATE is not None or GATE_ROWS is not None:
        dgate = _sum_rows(PARTIAL + (SUM_XHAT + SUM_DN) * D, runs, count * D, d, inside, ROWS, WIDTH)
        _store_row(DGATE, GATE_ROWS, dgate, b, D, d, inside)


@triton.jit(do_not_specialize=["B"])
def batch_sums_kernel(TOTAL, SCALE, SCALE_TABLE, DWEIGHT, DBIAS, B, scale_b, D: tl.constexpr, ROWS: tl.constexpr,
                      WIDTH: tl.constexpr):
    """dweight and dbias, sums over the samples of (1 + scale) times TOTAL; SCALE is None unless it is per sample."""
    d, inside = columns(tl.program_id(0) * WIDTH, WIDTH, D, D % WIDTH == 0)
    dweight, dbias = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for first in range(0, B, ROWS):
        i = first + tl.arange(0, ROWS)
        b, live = i.to(tl.int64), i < B
        factor = tl.full([ROWS, WIDTH], 1.0, tl.float32)
        if SCALE is not None:
            factor += load_modulation(SCALE, SCALE_TABLE, b * scale_b, live, d, inside)
        if DWEIGHT is not None:
            dweight += factor * load(TOTAL, b * 2 * D, live, d, inside)
        if DBIAS is not None:
            dbias += factor * load(TOTAL, (b * 2 + 1) * D, live, d, inside)
    if DWEIGHT is not None:
        tl.store(DWEIGHT + d, tl.sum(dweight, 0)[None, :].to(DWEIGHT.dtype.element_ty), mask=inside)
    if DBIAS is not None:
        tl.store(DBIAS + d, tl.sum(dbias, 0)[None, :].to(DBIAS.dtype.element_ty), mask=inside)


@triton.jit
def _table_sum(ROWS_OF, DTABLE, B, D: tl.constexpr, d, inside, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    if DTABLE is not None:
        total = _sum_rows(ROWS_OF, B, D, d, inside, ROWS, WIDTH)
        tl.store(DTABLE + d, total.to(DTABLE.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["B"])
def table_sums_kernel(GATE_ROWS, SCALE_ROWS, SHIFT_ROWS, DGATE_TABLE, DSCALE_TABLE, DSHIFT_TABLE, B, D: tl.constexpr,
                      ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Gradients of tables: sums over the samples of those of their modulations, unrounded."""
    d, inside = columns(tl.program_id(0) * WIDTH, WIDTH, D, D % WIDTH == 0)
    _table_sum(GATE_ROWS, DGATE_TABLE, B, D, d, inside, ROWS, WIDTH)
    _table_sum(SCALE_ROWS, DSCALE_TABLE, B, D, d, inside, ROWS, WIDTH)
    _table_sum(SHIFT_ROWS, DSHIFT_TABLE, B, D, d, inside, ROWS, WIDTH)
