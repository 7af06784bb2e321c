"""Cases of gated_activation."""
from difuse_kernels.testing.case import Case


def _dense(*shape, scale=2.0, **kwargs):
    """Wide enough values that both tails of the activation are met."""
    return lambda make: ((make("h", *shape, scale=scale),), kwargs)


def _slice(make):
    h = make("h", 3, 9, 3 * 40)[:, 2:, 40:]  # [q,k,v | a,b] of one projection, some tokens left out
    return (h,), dict(activation="silu", act_on="first")


def _transposed(make):
    h = make("h", 2, 3, 4, 5, 24).permute(0, 3, 1, 2, 4)[:, :, ::2]  # leading dimensions that do not merge
    return (h,), dict(activation="gelu_tanh")


def _expanded(make):
    return (make("h", 2, 1, 22).expand(-1, 6, -1),), dict(activation="silu")


def _shifted(make):
    h = make("h", 2, 3, 2 * 24 + 1)[..., 1:]  # F fills vectors of 16 bytes; addresses and strides are none
    return (h,), dict(activation="silu")


def _row(name, build, why, **rest):
    return Case("gated_activation", name, build, why, **rest)


_SPEED = [((8, 256, 2 * 1536), "DiT-S/2 width"), ((2, 256, 2 * 4608), "DiT-XL/2 width"),
          ((2, 1024, 2 * 9216), "Flux.2 single block")]

CASES = [
    _row("dense", _dense(2, 5, 2 * 384), "whole vectors; gelu by default", grad="transposed"),
    _row("odd", _dense(3, 7, 2 * 37, activation="gelu_tanh", act_on="first"), "masked tail, second half unaligned"),
    _row("narrow", _dense(3, 2), "one leading dimension, F = 1"),
    _row("one_row", _dense(1, 1, 2 * 12), "aligned as a whole, its second half not"),
    _row("silu_second", _dense(2, 4, 2 * 20, activation="silu"), "SwiGLU of diffusers", grad="expanded"),
    _row("gelu_first", _dense(2, 4, 2 * 20, act_on="first"), "halves exchanged"),
    _row("tails", _dense(2, 3, 2 * 70, scale=12.0), "values where the activation is 0 or the identity"),
    _row("tails_tanh", _dense(2, 3, 2 * 72, scale=12.0, activation="gelu_tanh"), "the same by tanh"),
    _row("tails_silu", _dense(2, 3, 2 * 70, scale=50.0, activation="silu"), "e^x beyond float32"),
    _row("no_rows", _dense(2, 0, 16), "zero rows"),
    _row("no_columns", _dense(2, 3, 0), "zero columns"),
    _row("slice", _slice, "part of a wider projection", grad="transposed"),
    _row("shifted", _shifted, "whole vectors at addresses that are not"),
    _row("leading", _transposed, "four leading dimensions in another order", grad="transposed"),
    _row("expanded", _expanded, "stride 0 over the tokens", grad="expanded"),
    *[_row(f"speed_{B}x{S}x{W // 2}", _dense(B, S, W, scale=1.0), why, speed=True) for (B, S, W), why in _SPEED],
]
