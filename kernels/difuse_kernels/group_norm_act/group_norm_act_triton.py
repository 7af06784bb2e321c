"""group_norm_act in Triton. A tile holds CHANNELS channels by POSITIONS positions of a sample, in either memory format.

Forward: means and centred squares per channel and tile; their combination per group; an elementwise kernel. Backward:
sums per channel and tile; their combination per group; an elementwise kernel; the gradients of the rows. Every tile of
any pass can run at any time, sums are taken in the order of the tiles, and tiles depend on the shape alone.
"""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from difuse_kernels.group_norm_act.group_norm_act_layout import (
    NOT_DENSE,
    channels_last,
    image_like,
    in_format_of,
    memory,
)
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


@dataclass(frozen=True)
class Tile:
    """CHANNELS by POSITIONS elements."""

    CHANNELS: int
    POSITIONS: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Combination:
    """ENTRIES channels or partial results at a time."""

    ENTRIES: int
    num_warps: int
    num_stages: int = 1


def tile(C, N, last, architecture):
    """Bytes to move, bf16: 6 an element forward (x twice), 10 backward; at 4.3 TB/s [2,320,64,64] takes 3.7 and 6.1 us.

    4096 elements and 4 warps a program: 32 elements a thread, four 16-byte loads under way of each tensor. In
    channels_last 64 channels are whole lines of 128 bytes, and 64 positions keep the partial results, 8 bytes forward
    and 12 backward per channel and tile, at a tenth of the bytes read. A program that waits holds few registers, so the
    combinations, some microseconds of latency each, overlap nothing: at small sizes launches are what is paid for.
    """
    if architecture == "interpreter":
        return Tile(16, 32, num_warps=4) if last else Tile(8, 64, num_warps=4)
    if last:
        return Tile(64, 64, num_warps=4)
    positions = min(max(triton.next_power_of_2(N), 64), 4096)
    return Tile(min(4096 // positions, triton.next_power_of_2(C)), positions, num_warps=4)


def combination(architecture):
    """Partial results are few and lie in L2: as many loads under way as registers allow."""
    return Combination(64 if architecture == "interpreter" else 1024, num_warps=4)


ROWS = Combination(64, num_warps=1)  # sample after sample: programs enough to hide the latency of each


@triton.jit
def _place(N, C: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """(sample, tile of positions, channels [CHANNELS,1], positions [1,POSITIONS], offsets, mask) of this program."""
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    tiles = tl.cdiv(N, POSITIONS)
    program = tl.program_id(0)
    if LAST:  # neighbours share lines of memory: channels run fastest
        block, t, b = program % blocks, program // blocks % tiles, (program // blocks // tiles).to(tl.int64)
    else:
        t, block, b = program % tiles, program // tiles % blocks, (program // tiles // blocks).to(tl.int64)
    c = block * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    n = t.to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    mask = (c < C) & (n < N)
    if LAST:
        return b, t, c, n, (b * N + n) * C + c, mask
    else:
        return b, t, c, n, (b * C + c) * N + n, mask


@triton.jit
def _row(P, offset, mask, otherwise: tl.constexpr):
    """Entries of a row in float32; of a row that is absent, the constant."""
    if P is None:
        return tl.full(offset.shape, otherwise, tl.float32)
    else:
        return tl.load(P + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _channel(ADD, WEIGHT, BIAS, MEAN, RSTD, b, c, inside, add_b, add_c, GROUPS: tl.constexpr, K: tl.constexpr):
    """(shift, mul, bias) of channels: d = x - shift, z = d * mul + bias."""
    group = b * GROUPS + c // K
    mean, rstd = _row(MEAN, group, inside, 0.0), _row(RSTD, group, inside, 0.0)
    shift = mean - _row(ADD, b * add_b + c.to(tl.int64) * add_c, inside, 0.0)
    return shift, rstd * _row(WEIGHT, c, inside, 1.0), _row(BIAS, c, inside, 0.0)


@triton.jit
def _sigmoid(z):
    """1 / (1 + e^-z) and one minus it, without overflow or cancellation."""
    e = tl.exp(-tl.abs(z))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(z < 0, small, large), tl.where(z < 0, large, small)


@triton.jit
def _slope(z, SILU: tl.constexpr):
    """act'(z)."""
    if SILU:
        s, rest = _sigmoid(z)
        return s * (1.0 + z * rest)
    else:
        return tl.full(z.shape, 1.0, tl.float32)


@triton.jit
def statistics_kernel(X, MOMENTS, N, C: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr,
                      POSITIONS: tl.constexpr):
    """MOMENTS [B,tiles,C,2]: a channel's mean and centred squares over the positions of a tile."""
    b, t, c, n, offset, mask = _place(N, C, LAST, CHANNELS, POSITIONS)
    x = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32)
    count = tl.minimum(N - t * POSITIONS, POSITIONS).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / count
    d = tl.where(mask, x - mean, 0.0)
    mean += tl.sum(d, 1)[:, None] / count  # what rounding left
    d = tl.where(mask, x - mean, 0.0)
    to = MOMENTS + ((b * tl.cdiv(N, POSITIONS) + t) * C + c) * 2
    tl.store(to, mean, mask=c < C)
    tl.store(to + 1, tl.sum(d * d, 1)[:, None], mask=c < C)


@triton.jit
def _moments(MOMENTS, ADD, i, b, N, tiles, add_b, add_c, group, C: tl.constexpr, K: tl.constexpr,
             POSITIONS: tl.constexpr):
    """(means of u, centred squares, counts) of entries i of a group, zeros beyond its end; its channels run fastest."""
    inside, t, c = i < K * tiles, i // K, (group * K + i % K).to(tl.int64)
    count = tl.where(inside, tl.minimum(N - t * POSITIONS, POSITIONS), 0).to(tl.float32)
    at = MOMENTS + ((b * tiles + t) * C + c) * 2
    mean = tl.load(at, mask=inside, other=0.0) + _row(ADD, b * add_b + c * add_c, inside, 0.0)
    return mean, tl.load(at + 1, mask=inside, other=0.0), count


@triton.jit
def group_statistics_kernel(MOMENTS, ADD, MEAN, RSTD, eps, N, add_b, add_c, C: tl.constexpr, GROUPS: tl.constexpr,
                            POSITIONS: tl.constexpr, ENTRIES: tl.constexpr):
    """MEAN and RSTD of one group of one sample: the mean of its entries' means, then the squares about it."""
    b, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    K: tl.constexpr = C // GROUPS
    tiles = tl.cdiv(N, POSITIONS)
    size = K * (N * 1.0)
    lead = tl.load(MOMENTS + (b * tiles * C + group * K) * 2)
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, K * tiles, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        mean, _squares, count = _moments(MOMENTS, ADD, i, b, N, tiles, add_b, add_c, group, C, K, POSITIONS)
        total += count * (mean - lead)  # of a large mean the digits that all entries share stay out of the sum
    centre = lead + tl.sum(total) / size
    total = tl.zeros([ENTRIES], tl.float32)
    for start in range(0, K * tiles, ENTRIES):
        i = start + tl.arange(0, ENTRIES)
        mean, squares, count = _moments(MOMENTS, ADD, i, b, N, tiles, add_b, add_c, group, C, K, POSITIONS)
        total += squares + count * (mean - centre) * (mean - centre)
    tl.store(MEAN + tl.program_id(0), centre)
    tl.store(RSTD + tl.program_id(0), 1.0 / tl.sqrt(tl.sum(total) / size + eps))


@triton.jit
def forward_kernel(X, ADD, WEIGHT, BIAS, MEAN, RSTD, Y, N, add_b, add_c, C: tl.constexpr, GROUPS: tl.constexpr,
                   SILU: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """One tile of Y."""
    b, _t, c, n, offset, mask = _place(N, C, LAST, CHANNELS, POSITIONS)
    shift, mul, bias = _channel(ADD, WEIGHT, BIAS, MEAN, RSTD, b, c, c < C, add_b, add_c, GROUPS, C // GROUPS)
    z = (tl.load(X + offset, mask=mask, other=0.0).to(tl.float32) - shift) * mul + bias
    if SILU:
        s, _rest = _sigmoid(z)
        z *= s
    tl.store(Y + offset, z.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _inputs(DY, X, offset, mask, shift, mul, bias, SILU: tl.constexpr):
    """dz and d of a tile, zeros outside."""
    d = tl.load(X + offset, mask=mask, other=0.0).to(tl.float32) - shift
    dy = tl.load(DY + offset, mask=mask, other=0.0).to(tl.float32)
    return dy * _slope(d * mul + bias, SILU), tl.where(mask, d, 0.0)


@triton.jit
def backward_sums_kernel(DY, X, ADD, WEIGHT, BIAS, MEAN, RSTD, PARTIAL, N, add_b, add_c, C: tl.constexpr,
                         GROUPS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr,
                         POSITIONS: tl.constexpr):
    """PARTIAL [B,tiles,C,3]: a channel's sums of dz, dz d and d over the positions of a tile."""
    b, t, c, n, offset, mask = _place(N, C, LAST, CHANNELS, POSITIONS)
    shift, mul, bias = _channel(ADD, WEIGHT, BIAS, MEAN, RSTD, b, c, c < C, add_b, add_c, GROUPS, C // GROUPS)
    dz, d = _inputs(DY, X, offset, mask, shift, mul, bias, SILU)
    to = PARTIAL + ((b * tl.cdiv(N, POSITIONS) + t) * C + c) * 3
    tl.store(to, tl.sum(dz, 1)[:, None], mask=c < C)
    tl.store(to + 1, tl.sum(dz * d, 1)[:, None], mask=c < C)
    tl.store(to + 2, tl.sum(d, 1)[:, None], mask=c < C)


@triton.jit
def channel_sums_kernel(PARTIAL, SUMS, rows, tiles, C: tl.constexpr, ENTRIES: tl.constexpr):
    """SUMS [B*C,3]: the tiles' sums, ENTRIES / 16 channels by 16 tiles at a time."""
    row = tl.program_id(0).to(tl.int64) * (ENTRIES // 16) + tl.arange(0, ENTRIES // 16)[:, None]
    dz = tl.zeros([ENTRIES // 16, 16], tl.float32)
    dzd, ds = dz, dz
    for start in range(0, tiles, 16):
        t = start + tl.arange(0, 16)[None, :]
        at, mask = PARTIAL + ((row // C * tiles + t) * C + row % C) * 3, (row < rows) & (t < tiles)
        dz += tl.load(at, mask=mask, other=0.0)
        dzd += tl.load(at + 1, mask=mask, other=0.0)
        ds += tl.load(at + 2, mask=mask, other=0.0)
    tl.store(SUMS + row * 3, tl.sum(dz, 1)[:, None], mask=row < rows)
    tl.store(SUMS + row * 3 + 1, tl.sum(dzd, 1)[:, None], mask=row < rows)
    tl.store(SUMS + row * 3 + 2, tl.sum(ds, 1)[:, None], mask=row < rows)


@triton.jit
def group_sums_kernel(SUMS, WEIGHT, RSTD, SHARED, N, GROUPS: tl.constexpr, K: tl.constexpr, ENTRIES: tl.constexpr):
    """SHARED [B,G,2]: k1 and k2 of dx = mul dz - k1 - d k2, which are rstd c1 and rstd^2 c2."""
    group = tl.program_id(0) % GROUPS
    c1, c2 = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    for start in range(0, K, ENTRIES):
        k = start + tl.arange(0, ENTRIES)
        weight = _row(WEIGHT, group * K + k, k < K, 1.0)
        at = SUMS + (tl.program_id(0).to(tl.int64) * K + k) * 3
        c1 += weight * tl.load(at, mask=k < K, other=0.0)
        c2 += weight * tl.load(at + 1, mask=k < K, other=0.0)
    rstd, size = tl.load(RSTD + tl.program_id(0)), K * (N * 1.0)
    tl.store(SHARED + tl.program_id(0) * 2, rstd * tl.sum(c1) / size)
    tl.store(SHARED + tl.program_id(0) * 2 + 1, rstd * rstd * rstd * tl.sum(c2) / size)


@triton.jit
def backward_kernel(DY, X, ADD, WEIGHT, BIAS, MEAN, RSTD, SHARED, DX, N, add_b, add_c, C: tl.constexpr,
                    GROUPS: tl.constexpr, SILU: tl.constexpr, LAST: tl.constexpr, CHANNELS: tl.constexpr,
                    POSITIONS: tl.constexpr):
    """One tile of DX."""
    b, _t, c, n, offset, mask = _place(N, C, LAST, CHANNELS, POSITIONS)
    shift, mul, bias = _channel(ADD, WEIGHT, BIAS, MEAN, RSTD, b, c, c < C, add_b, add_c, GROUPS, C // GROUPS)
    dz, d = _inputs(DY, X, offset, mask, shift, mul, bias, SILU)
    shared = SHARED + (b * GROUPS + c // (C // GROUPS)) * 2
    k1, k2 = tl.load(shared, mask=c < C, other=0.0), tl.load(shared + 1, mask=c < C, other=0.0)
    tl.store(DX + offset, (dz * mul - k1 - d * k2).to(DX.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B"])
def rows_kernel(SUMS, WEIGHT, RSTD, SHARED, DADD, DWEIGHT, DBIAS, B, N, C: tl.constexpr, GROUPS: tl.constexpr,
                ENTRIES: tl.constexpr):
    """DADD = sum of dx over the positions; DWEIGHT and DBIAS over these and over the samples, in order."""
    c = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    weight = _row(WEIGHT, c, c < C, 1.0)
    dweight, dbias = tl.zeros([ENTRIES], tl.float32), tl.zeros([ENTRIES], tl.float32)
    group, row = c // (C // GROUPS), c.to(tl.int64)
    for _b in range(0, B):
        rstd, at = tl.load(RSTD + group, mask=c < C, other=0.0), SUMS + row * 3
        dz, dzd = tl.load(at, mask=c < C, other=0.0), tl.load(at + 1, mask=c < C, other=0.0)
        dbias += dz
        dweight += dzd * rstd
        if DADD is not None:
            ds, k1 = tl.load(at + 2, mask=c < C, other=0.0), tl.load(SHARED + group * 2, mask=c < C, other=0.0)
            k2 = tl.load(SHARED + group * 2 + 1, mask=c < C, other=0.0)
            dadd = weight * rstd * dz - (N * 1.0) * k1 - k2 * ds
            tl.store(DADD + row, dadd.to(DADD.dtype.element_ty), mask=c < C)
        group += GROUPS
        row += C
    if DWEIGHT is not None:
        tl.store(DWEIGHT + c, dweight.to(DWEIGHT.dtype.element_ty), mask=c < C)
    if DBIAS is not None:
        tl.store(DBIAS + c, dbias.to(DBIAS.dtype.element_ty), mask=c < C)


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    x, add, weight, bias = inputs
    if channels_last(x) is None:
        return NOT_DENSE
    return why_not_triton((memory(x), None if add is None else add[:, :1], weight, bias))  # add: any strides


class _Sizes:
    """What the launches of one call share."""

    def __init__(self, x, groups):
        self.B, self.C = x.shape[:2]
        self.N, self.K, self.last = x[0, 0].numel() if self.B else 0, self.C // groups, channels_last(x)
        self.tile = tile(self.C, self.N, self.last, architecture(x))
        self.tiles = triton.cdiv(self.N, self.tile.POSITIONS)
        self.grid = (self.B * self.tiles * triton.cdiv(self.C, self.tile.CHANNELS),)
        self.groups = (self.B * groups,)
        self.combination = combination(architecture(x))


def _floats(*shape, like):
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _image(x):
    return image_like(x, lambda shape: torch.empty(shape, dtype=x.dtype, device=x.device))


def _strides(add):
    return (0, 0) if add is None else add.stride()


def group_norm_act_forward(x, add, weight, bias, groups, activation, eps, save):
    """(y, mean, rstd); the last two, [B,groups], are None unless `save`."""
    size, y = _Sizes(x, groups), _image(x)
    mean, rstd = _floats(size.B, groups, like=x), _floats(size.B, groups, like=x)
    if x.numel():
        moments = _floats(size.B, size.C, size.tiles, 2, like=x)
        launch(statistics_kernel, size.grid, x, moments, size.N, config=size.tile, C=size.C, LAST=size.last)
        launch(group_statistics_kernel, size.groups, moments, add, mean, rstd, eps, size.N, *_strides(add),
               config=size.combination, C=size.C, GROUPS=groups, POSITIONS=size.tile.POSITIONS)
        launch(forward_kernel, size.grid, x, add, weight, bias, mean, rstd, y, size.N, *_strides(add), config=size.tile,
               C=size.C, GROUPS=groups, SILU=activation == "silu", LAST=size.last)
    return (y, mean, rstd) if save else (y, None, None)


def group_norm_act_backward(grad, x, add, weight, bias, mean, rstd, groups, activation, needs):
    """Gradients of x, add, weight, bias; None where not needed."""
    size = _Sizes(x, groups)
    dx = _image(x) if needs[0] else None
    dadd, dweight, dbias = (torch.empty(like.shape, dtype=like.dtype, device=x.device) if need and like is not None
                            else None for like, need in zip((add, weight, bias), needs[1:], strict=True))
    if not x.numel():
        for gradient in (dadd, dweight, dbias):
            if gradient is not None:
                gradient.zero_()
        return dx, dadd, dweight, dbias
    grad = in_format_of(x, grad)
    operands = (grad, x, add, weight, bias, mean, rstd)
    constants = dict(C=size.C, GROUPS=groups, SILU=activation == "silu", LAST=size.last)
    partial, sums = _floats(size.B, size.C, size.tiles, 3, like=x), _floats(size.B, size.C, 3, like=x)
    shared = _floats(size.B, groups, 2, like=x)
    launch(backward_sums_kernel, size.grid, *operands, partial, size.N, *_strides(add), config=size.tile, **constants)
    rows = size.B * size.C
    launch(channel_sums_kernel, (triton.cdiv(rows, size.combination.ENTRIES // 16),), partial, sums, rows, size.tiles,
           config=size.combination, C=size.C)
    launch(group_sums_kernel, size.groups, sums, weight, rstd, shared, size.N, config=size.combination, GROUPS=groups,
           K=size.K)
    if dx is not None:
        launch(backward_kernel, size.grid, *operands, shared, dx, size.N, *_strides(add), config=size.tile, **constants)
    if any(gradient is not None for gradient in (dadd, dweight, dbias)):
        launch(rows_kernel, (triton.cdiv(size.C, ROWS.ENTRIES),), sums, weight, rstd, shared, dadd, dweight, dbias,
               size.B, size.N, config=ROWS, C=size.C, GROUPS=groups)
    return dx, dadd, dweight, dbias
