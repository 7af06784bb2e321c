"""Launch configurations of the Triton qk_norm_rope kernels: functions of (H, Dh, architecture), never of the batch.

Bytes that q and k take and the time at 4.3 TB/s (H200, measured copy), bf16, tables and partial sums left out:

                bytes per element   Flux [1,4608,24,128]   SD3.5-L [1,4429,38,64]   Wan [1,4096,40,128]
    forward     4                   26 us                  20 us                    39 us
    backward    6                   39                     30                       59
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """T tokens by HB heads by 2 * PAIRS elements."""

    T: int
    HB: int
    PAIRS: int
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Walk(Tile):
    """The same, walking over CHUNK tokens and all heads, loads STAGES - 1 steps ahead."""

    CHUNK: int = 0
    STAGES: int = 1


@dataclass(frozen=True)
class Sum:
    """ROWS partial sums by COLUMNS at a time."""

    ROWS: int
    COLUMNS: int
    num_warps: int
    num_stages: int = 1


# Shared memory for a step to come, beside the reductions: nothing of AMD's 64 KB; on sm_100 a step ahead spills
AHEAD_BYTES = {"sm_80": 96 << 10, "sm_90": 96 << 10, "sm_100": 0, "gfx942": 0}


def _next_power_of_2(n):
    return 1 << max(n - 1, 0).bit_length()


def _tile(heads, head_dim, full, elements, per_thread, arch):
    """(T, HB, PAIRS, num_warps) for about `elements` elements, or for a whole token where that is more."""
    pairs = _next_power_of_2((head_dim + 1) // 2)
    HB = _next_power_of_2(heads) if full else min(8, _next_power_of_2(heads))  # 8 share a token's angles
    if arch == "interpreter":  # several blocks of tokens and of heads, and two chunks, in cases of 9 tokens
        return 4, HB if full else min(2, HB), pairs, 4
    T = max(1, elements // (2 * pairs * HB))
    lanes = 64 if arch.startswith("gfx") else 32
    return T, HB, pairs, max(1, min(16, T * HB * 2 * pairs // (per_thread * lanes)))


def forward(heads, head_dim, full, arch):
    """The Tile for rows of `head_dim` (or, with `full`, heads * head_dim) elements."""
    return Tile(*_tile(heads, head_dim, full, 4096, 32, arch))  # 32 a thread: four 16-byte loads in flight at 16 bits


def backward(heads, head_dim, full, element_size, arch):
    """The Walk for the same rows."""
    # x, dy and the sums for the weights are held at once: half the elements of the forward pass, 16 a thread
    T, HB, pairs, num_warps = _tile(heads, head_dim, full, 2048, 16, arch)
    if arch == "interpreter":
        return Walk(T, HB, pairs, num_warps, CHUNK=8, STAGES=2)
    # 16 tokens a chunk: partial sums stay below a tenth of what is read, and 4096 tokens make 512 programs of q and k.
    # Per head four or five programs share a multiprocessor, and one step ahead keeps 32 KB under way. A token of 5120
    # leaves room for one program only; two steps ahead cost it registers that it spills
    step = 2 * T * HB * 2 * pairs * element_size
    ahead = min(1, AHEAD_BYTES.get(arch, 32 << 10) // step)
    return Walk(T, HB, pairs, num_warps, CHUNK=max(T, 16), STAGES=1 + ahead)


def total(arch):
    """The Sum of the chunks' rows."""
    # few columns (Dh) and many rows: 128 rows at a time hide the latency, 16 columns fill 64-byte segments
    return Sum(4, 16, 4) if arch == "interpreter" else Sum(128, 16, 4)
