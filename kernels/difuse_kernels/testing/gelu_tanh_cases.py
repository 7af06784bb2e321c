"""Cases of gelu_tanh."""
from difuse_kernels.testing.case import Case


def _dense(*shape, scale=2.0):
    """Wide enough values that both tails are met."""
    return lambda make: ((make("x", *shape, scale=scale),), {})


def _row(name, build, why, **rest):
    return Case("gelu_tanh", name, build, why, **rest)


_SPEED = [((8, 256, 1536), "DiT-S/2"), ((2, 256, 4608), "DiT-XL/2"), ((2, 4096, 12288), "Flux.1 single block")]

CASES = [
    _row("dense", _dense(2, 5, 384), "whole vectors", grad="transposed"),
    _row("odd", _dense(3, 7, 37), "masked tail", grad="expanded"),
    _row("one_dimension", _dense(19), "no leading dimension"),
    _row("one_element", _dense(1, 1), "less than a vector"),
    _row("tails", _dense(2, 3, 70, scale=12.0), "values where it is 0 or the identity"),
    _row("no_rows", _dense(2, 0, 16), "zero rows"),
    _row("no_columns", _dense(2, 3, 0), "zero columns"),
    _row("chunks", _dense(3, 41, 67), "several chunks, the last one short", grad="transposed"),
    *[_row(f"speed_{B}x{S}x{F}", _dense(B, S, F, scale=1.0), why, speed=True) for (B, S, F), why in _SPEED],
]
