"""Cases of patchify and unpatchify. Patch sizes are tuples and orders complete, as the eager rival takes them."""
from math import prod

from difuse_kernels.testing.case import Case


def _image(order, patch, B, C, *sizes):
    return lambda make: ((make("x", B, C, *sizes), patch), {"order": order})


def _tokens(order, patch, grid, B, C):
    def build(make):
        return (make("tokens", B, prod(grid), C * prod(patch)), patch, grid), {"order": order}
    return build


def _channel_slice(make):
    x = make("x", 3, 7, 6, 10)  # the mean half of a model's output, between its neighbours
    return (x[:, 2:5], (2, 2)), {"order": "cpq"}


def _every_stride(make):
    x = make("x", 2, 3, 4, 9, 14)[:, :, ::2, :8, 2:12]
    return (x, (1, 2, 2)), {"order": "tpqc"}


def _expanded(make):
    return (make("x", 2, 1, 6, 8).expand(-1, 3, -1, -1), (3, 2)), {"order": "pqc"}


def _token_slice(make):
    x = make("tokens", 2, 5 + 12, 30)[:, 5:, 6:]  # image tokens behind the text, in a wider buffer
    return (x, (2, 2), (3, 4)), {"order": "pqc"}


def _rows(op, table):
    return [Case(op, name, build, why, grad=grad) for name, build, why, grad in table]


PATCHIFY = _rows("patchify", [
    ("cpq", _image("cpq", (2, 2), 3, 4, 10, 14), "DiT's patch convolution", "dense"),
    ("pqc", _image("pqc", (2, 2), 2, 16, 8, 18), "channels last, whole tiles and a rest", "transposed"),
    ("cqp", _image("cqp", (4, 2), 2, 3, 8, 6), "column before row: Wan2.2's VAE", "dense"),
    ("pcq", _image("pcq", (3, 1), 2, 5, 9, 7), "no production model; a patch one pixel wide", "expanded"),
    ("odd", _image("qcp", (3, 5), 2, 3, 9, 15), "no size is a power of two", "transposed"),
    ("wide", _image("cpq", (1, 8), 2, 1, 3, 24), "runs longer than a vector of 16-bit elements", "dense"),
    ("one_pixel", _image("pqc", (1, 1), 2, 6, 5, 3), "a plain transpose", "transposed"),
    ("video_ctpq", _image("ctpq", (1, 2, 2), 2, 16, 3, 6, 26), "Wan's patch convolution", "dense"),
    ("video_tpqc", _image("tpqc", (2, 2, 2), 2, 8, 4, 6, 10), "frames inside the patch", "transposed"),
    ("video_ctqp", _image("ctqp", (4, 2, 2), 2, 3, 4, 4, 6), "LTX's VAE", "dense"),
    ("channel_slice", _channel_slice, "foreign strides of batch and channel", "dense"),
    ("every_stride", _every_stride, "slices in frames, rows and columns", "transposed"),
    ("expanded", _expanded, "stride 0 over the channels", "expanded"),
    ("vectors", _image("cpq", (2, 2), 2, 4, 4, 32), "16 bytes at a time on both sides", "dense"),
    ("groups", _image("cpq", (1, 2), 2, 3, 3, 32), "several tokens in 16 bytes", "dense"),
    ("no_samples", _image("cpq", (2, 2), 0, 3, 4, 4), "zero samples", "dense"),
    ("no_tokens", _image("cpq", (2, 2), 2, 3, 0, 4), "zero tokens", "dense"),
    ("no_width", _image("pqc", (2, 2), 2, 3, 4, 0), "zero columns", "dense"),
    ("no_channels", _image("cpq", (2, 2), 2, 0, 4, 4), "zero channels", "dense"),
    ("gradcheck", _image("cqp", (2, 3), 2, 2, 4, 6), "small", "dense"),
])
UNPATCHIFY = _rows("unpatchify", [
    ("pqc", _tokens("pqc", (2, 2), (5, 7), 3, 4), "DiT's output layer", "dense"),
    ("pqc_learn_sigma", _tokens("pqc", (2, 2), (4, 9), 2, 8), "eight channels", "transposed"),
    ("pqc_rest", _tokens("pqc", (2, 2), (3, 11), 2, 19), "whole tiles of channels and a rest", "dense"),
    ("cpq", _tokens("cpq", (4, 4), (2, 3), 2, 3), "channels first", "transposed"),
    ("cqp", _tokens("cqp", (2, 4), (3, 2), 2, 5), "column before row", "dense"),
    ("odd", _tokens("qpc", (5, 3), (3, 5), 2, 3), "no size is a power of two", "transposed"),
    ("one_pixel", _tokens("pqc", (1, 1), (4, 3), 2, 7), "a plain transpose", "expanded"),
    ("video_tpqc", _tokens("tpqc", (1, 2, 2), (3, 3, 13), 2, 16), "Wan's output layer", "dense"),
    ("video_ctqp", _tokens("ctqp", (4, 2, 2), (2, 3, 3), 2, 3), "LTX's VAE", "transposed"),
    ("token_slice", _token_slice, "foreign strides of sample and token", "dense"),
    ("no_samples", _tokens("pqc", (2, 2), (2, 2), 0, 3), "zero samples", "dense"),
    ("no_grid", _tokens("pqc", (2, 2), (2, 0), 2, 3), "zero tokens", "dense"),
    ("gradcheck", _tokens("pqc", (2, 1), (2, 3), 2, 2), "small", "dense"),
])

_IMAGES = [(8, 4, 32, 32), (2, 4, 64, 64), (2, 16, 128, 128), (64, 1, 8, 8)]  # DiT's latents, Flux's; the demo's digits


def _speed():
    for B, C, H, W in _IMAGES:
        for order in ("cpq", "pqc"):
            name, why = f"speed_{B}x{C}x{H}x{W}_{order}", "latents of one image model"
            yield Case("patchify", name, _image(order, (2, 2), B, C, H, W), why, speed=True)
            yield Case("unpatchify", name, _tokens(order, (2, 2), (H // 2, W // 2), B, C), why, speed=True)
    video = "speed_1x16x21x60x104"
    yield Case("patchify", video + "_ctpq", _image("ctpq", (1, 2, 2), 1, 16, 21, 60, 104), "Wan's 81 frames",
               speed=True)
    yield Case("unpatchify", video + "_tpqc", _tokens("tpqc", (1, 2, 2), (21, 30, 52), 1, 16), "Wan's 81 frames",
               speed=True)


CASES = [*PATCHIFY, *UNPATCHIFY, *_speed()]
