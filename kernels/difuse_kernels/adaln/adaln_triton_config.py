"""Launch configurations of the Triton adaln kernels: pure functions of (S, D, architecture), never of the batch.

Bytes each kernel must move and the time at 4.3 TB/s (H200, measured copy), bf16, partial sums left out:

                                        bytes per element   [8,256,1152]   [8,1024,1152]   [8,4096,3072]
    norm_modulate forward               4                   2.2 us         8.8 us          94 us
    gate_residual forward, backward     6                   3.3            13.2            140
    gate_residual_norm_modulate         8                   4.4            17.6            187
    norm_modulate backward              6                   3.3            13.2            140
    gate_residual_norm_modulate backw.  12                  6.6            26.3            281

To keep 4.3 TB/s in flight over some 0.7 us of latency, each of 132 multiprocessors needs 23 KB of loads under way.
"""
from dataclasses import dataclass
from math import isqrt

# Widest rows held in registers, forward and backward; beyond them statistics take kernels of their own. The fused
# backward at D = 8192 with 16 warps spilled on sm_90. Interpreted, D = 384 goes beyond.
WHOLE_ROW = 8192, 6144
WHOLE_ROW_INTERPRETED = 256, 256


@dataclass(frozen=True)
class Tile:
    """ROWS tokens at a time by CHUNKS * WIDTH + TAIL columns."""

    ROWS: int
    CHUNKS: int
    WIDTH: int
    TAIL: int
    num_warps: int
    num_stages: int = 1

    @property
    def columns(self):
        """Columns a program holds."""
        return self.CHUNKS * self.WIDTH + self.TAIL


@dataclass(frozen=True)
class Run(Tile):
    """The same, walking over TOKENS consecutive tokens of one sample, loads STAGES - 1 steps ahead."""

    TOKENS: int = 0
    STAGES: int = 1


@dataclass(frozen=True)
class Sum:
    """ROWS partial sums by WIDTH columns at a time."""

    ROWS: int
    WIDTH: int
    num_warps: int
    num_stages: int = 1


def _floor(n):
    """The largest power of two up to n, at least 1."""
    return 1 << max(n, 1).bit_length() - 1


def _lanes(architecture):
    return 64 if architecture.startswith("gfx") else 32


def parts(D, width):
    """(CHUNKS, WIDTH, TAIL) for a row: chunks of `width`, and a power of two for what is left."""
    chunks, rest = divmod(D, width)
    tail = 1 << (rest - 1).bit_length() if rest else 0
    if chunks == 0:
        return 1, max(tail, 1), 0
    return (chunks + 1, width, 0) if tail == width else (chunks, width, tail)


def forward(D, itemsize, architecture):
    """Elementwise and row kernels of the forward passes, and the statistics of wide rows."""
    if architecture == "interpreter":
        return Tile(16, *(parts(D, 64) if WHOLE_ROW_INTERPRETED[0] >= D else (1, 256, 0)), num_warps=4)
    warp = _lanes(architecture) * 16 // itemsize  # columns that one warp reads with 16 bytes a lane
    if WHOLE_ROW[0] < D:
        return Tile(2, 1, 8 * warp, 0, num_warps=8)
    # a warp to a row and 4 rows a program: no barrier in the reductions, no lane idle (1152 = 4 x 256 + 128), 9 KB of a
    # tensor a program at D = 1152 (programs start at some 1 per ns: 2 KB ones would be held up by that)
    if 8 * warp >= D:
        return Tile(4, *parts(D, warp), num_warps=4)
    return Tile(1, *parts(D, 4 * warp), num_warps=4)  # four warps to a row: 4 times fewer registers


def backward(S, D, itemsize, streams, architecture, sums=2):
    """The backward pass over tokens, which reads `streams` tensors: 2, with a residual 4, with rows per token more.

    sums: how many modulations' gradients it keeps in registers; 4 at 12 elements of each a thread spill on sm_100.
    """
    if architecture == "interpreter":
        row = parts(D, 64) if WHOLE_ROW_INTERPRETED[1] >= D else (1, 256, 0)
        return Run(8, *row, num_warps=4, TOKENS=16, STAGES=2)
    warp = _lanes(architecture) * 16 // itemsize
    # sqrt(S) / 2 tokens a program: 64 programs a sample at S = 1024 (512 at B = 8, one wave of 4 a multiprocessor),
    # whose float32 partial sums are 12 to 17 % of the bytes moved, most of it inside L2; 3 % at S = 75600
    tokens = min(max(_floor(isqrt(S) // 2), 8), 128)
    # loads run ahead through shared memory, as the sums leave few registers for them: one row of 4 tensors or two
    # of 2; none where that takes much of what a small GPU has (99 KB; the compiler needs up to half as much again)
    stages = 2 if streams > 2 else 3
    if WHOLE_ROW[1] < D:
        return Run(1, 1, 4 * warp, 0, num_warps=4, TOKENS=tokens, STAGES=stages)
    if (stages - 1) * streams * D * itemsize > 64 << 10:
        stages = 1
    # one row at a time, up to 12 elements of it a thread: sm_90, D = 1152: 128 registers, 4 programs a multiprocessor
    warps = next(n for n in (1, 2, 4, 8, 16) if n == 16 or 3 * n * warp >= sums * D)
    return Run(1, *parts(D, warps * warp), num_warps=warps, TOKENS=tokens, STAGES=stages)


def sums(architecture):
    """The second stage: few programs, many loads under way. With 16 rows Triton 3.6 unrolls further, and spills."""
    return Sum(4 if architecture == "interpreter" else 32, 64, num_warps=4)
