"""Launch configurations of attention on Triton, as data."""
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Blocks:
    """Queries and keys per block, warps, and how many blocks of the loop are in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Run:
    """Elements per block of a plain pass over rows."""

    BLOCK: int
    num_warps: int = 4
    num_stages: int = 1


SUM_HEADS = Run(256)


_KIND = {"sm_90": "hopper", "sm_100": "blackwell", "sm_103": "blackwell", "gfx942": "cdna", "gfx950": "cdna"}


def split(head_dim, dtype, architecture):
    """head_dim as a power of two and a rest (0, or 16 and up), where that takes fewer columns than one power of two.

    Halves where one part is too wide: float32 above 128, since a chain of 256 sums loses to eager PyTorch; 128
    and up on Ampere, whose products hold whole operands in registers: the backward pass spilled 1,000 bytes.
    """
    if dtype == torch.float32 and head_dim > 128:
        return 128, 1 << max(head_dim - 128 - 1, 15).bit_length()
    whole = 1 << head_dim.bit_length() - 1
    rest = head_dim - whole and max(1 << (head_dim - whole - 1).bit_length(), 16)
    if rest and whole >= 16 and whole + rest < 2 * whole:
        return whole, rest
    width = max(whole if rest == 0 else 2 * whole, 16)
    halves = width >= 128 and dtype != torch.float32 and _KIND.get(architecture, "ampere") == "ampere"
    return (width // 2, width // 2) if halves else (width, 0)


# (kernel, kind of machine) -> (widest padded head, blocks), first that fits. What decides, as the compiler reports it:
# registers (65,536 per multiprocessor, 255 per thread, none spilled), shared memory, warp-group products (HGMMA need 64
# rows of the left operand per four warps). Rows are queries in "forward" and "dq", keys in "dkdv".
_NARROW = {
    ("forward", "hopper"): (
        (64, Blocks(128, 64, 8, 3)),  # 128 registers: two programs share a multiprocessor, softmax beside products
        (128, Blocks(128, 128, 8, 2)),  # 128 keys: shared memory read per product falls to what HGMMA can hide
        (256, Blocks(128, 64, 8, 2)),  # the accumulator alone takes 128 registers
    ),
    ("biased forward", "hopper"): ((256, Blocks(128, 64, 8, 2)),),  # 128 keys spill with a bias at 128
    ("biased forward", "blackwell"): ((256, Blocks(64, 64, 4, 2)),),  # and 128 queries spill there
    ("biased dq", "blackwell"): ((256, Blocks(64, 32, 4, 2)),),
    ("biased forward", "ampere"): ((128, Blocks(64, 64, 4, 2)), (256, Blocks(64, 32, 4, 2))),
    ("dq", "hopper"): (
        (64, Blocks(128, 64, 8, 3)),
        (128, Blocks(128, 64, 8, 2)),
        (192, Blocks(64, 32, 4, 2)),
        (256, Blocks(128, 32, 8, 1)),
    ),
    ("dkdv", "hopper"): (
        (96, Blocks(64, 128, 8, 3)),
        (128, Blocks(32, 128, 8, 2)),  # 64 queries spill: two accumulators of 64 registers each
        (256, Blocks(16, 64, 8, 1)),
    ),
    ("forward", "ampere"): ((128, Blocks(128, 64, 8, 2)), (256, Blocks(64, 32, 4, 2))),
    ("dq", "ampere"): ((128, Blocks(64, 32, 4, 2)), (256, Blocks(64, 16, 4, 1))),
    ("dkdv", "ampere"): ((128, Blocks(16, 128, 8, 2)), (256, Blocks(16, 64, 8, 1))),
    ("forward", "cdna"): ((128, Blocks(128, 64, 4, 1)), (256, Blocks(64, 32, 4, 1))),
    ("dq", "cdna"): ((128, Blocks(64, 64, 4, 1)), (256, Blocks(32, 32, 4, 1))),
    ("dkdv", "cdna"): ((128, Blocks(32, 64, 4, 1)), (256, Blocks(16, 64, 4, 1))),
}
_FLOAT32 = ((64, Blocks(32, 32, 8, 1)), (256, Blocks(16, 16, 8, 1)))  # no tensor cores: operands lie in registers
_INTERPRETER = Blocks(64, 64, 4, 1)  # large, since every operation costs; small enough for several blocks and tails


def config(kernel, head_dim, dtype, architecture):
    """Blocks of "forward", "dq" (which also prepares delta) or "dkdv", each also "biased", with a key_bias."""
    if architecture == "interpreter":
        return _INTERPRETER
    kind, plain = _KIND.get(architecture, "ampere"), kernel.removeprefix("biased ")
    # Blackwell takes Hopper's blocks but for what is named: untuned, as no such GPU was at hand
    rows = [(kernel, kind), (plain, kind), (kernel, "hopper"), (plain, "hopper")]
    table = next(_NARROW[row] for row in rows if row in _NARROW)
    if dtype == torch.float32:
        table = _FLOAT32
    return next(blocks for width, blocks in table if sum(split(head_dim, dtype, architecture)) <= width)
