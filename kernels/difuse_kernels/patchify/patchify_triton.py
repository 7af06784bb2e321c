"""patchify and unpatchify in Triton, one kernel for both directions.

A program moves a tile through registers. On the image side it is a few rows (one for each channel, frame and row inside
the patch) of neighbouring pixels, on the token side a few neighbouring tokens of neighbouring elements: the tile is
read in one shape, permuted, and written in the other, so that both sides are contiguous. Sizes of the patch and of the
channels are compile-time constants, since they are the model's.
"""
import functools
from dataclasses import dataclass
from math import gcd, prod
from operator import mul

import torch
import triton
import triton.language as tl

from difuse_kernels.checks import dense_last
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


@dataclass(frozen=True)
class Tile:
    """AB elements of a token before the column's letter in its order, ZB after it, WB neighbouring tokens."""

    AB: int
    ZB: int
    WB: int
    num_warps: int
    num_stages: int = 1  # no loop to pipeline


def tile(before, after, q, cells, arch):
    """The Tile for tokens of before*q*after elements, `cells` tokens in an image row."""
    # 32 image rows make 64 neighbouring elements of a token at patch width 2; 2048 elements are 16 a thread of 4 warps.
    # Interpreted, small tiles reach every branch on small images.
    rows, elements = (16, 256) if arch == "interpreter" else (32, 2048)
    width = triton.next_power_of_2(q)
    rows = max(1, min(rows, elements // width))
    ZB = min(triton.next_power_of_2(after), rows)
    AB = min(triton.next_power_of_2(before), rows // ZB)
    WB = min(triton.next_power_of_2(cells), max(1, elements // (AB * ZB * width)))
    # 8 elements a thread fill a 128-bit access of 16-bit elements; latents are small, and so are their programs
    return Tile(AB, ZB, WB, num_warps=max(1, min(4, AB * ZB * WB * width // 256)))


@triton.jit(do_not_specialize=["image_b", "image_f", "image_h", "image_0", "image_1", "image_2", "token_b", "token_s",
                               "cells_h", "cells", "W"])
def _move(image, tokens, image_b, image_f, image_h, image_0, image_1, image_2, token_b, token_s, cells_h, cells, W,
          TO_IMAGE: tl.constexpr, IMAGE_ALIGN: tl.constexpr, TOKEN_ALIGN: tl.constexpr,
          BEFORE: tl.constexpr, AFTER: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, Q: tl.constexpr,
          QP: tl.constexpr, AB: tl.constexpr, ZB: tl.constexpr, WB: tl.constexpr):
    """One tile: `cells` tokens a sample, cells_h rows of them a frame. Strides and W come divided by their ALIGN, which
    is how the compiler learns what divides them without a kernel for every combination."""
    row = tl.program_id(0)  # of grid cells
    b, cell_row = (row // cells).to(tl.int64), (row % cells).to(tl.int64)
    f, h = (row % cells // cells_h).to(tl.int64), (row % cells_h).to(tl.int64)
    w0 = tl.program_id(1) * WB
    a0 = tl.program_id(2) // tl.cdiv(AFTER, ZB) * AB
    z0 = tl.program_id(2) % tl.cdiv(AFTER, ZB) * ZB
    cells_w = W * IMAGE_ALIGN // Q

    line = tl.arange(0, AB * ZB)  # image side: [AB,ZB] lines of [WB,QP] pixels
    a, z = a0 + line // ZB, z0 + line % ZB
    line_mask = (a < BEFORE) & (z < AFTER)
    r = a * AFTER + z  # three digits: the letters beside q, slowest first
    lines = ((r // (N1 * N2)).to(tl.int64) * image_0 + (r // N2 % N1).to(tl.int64) * image_1
             + (r % N2).to(tl.int64) * image_2) * IMAGE_ALIGN
    pixel = tl.arange(0, WB * QP)
    if QP == Q:
        x = w0 * Q + pixel
        pixel_mask = x < W * IMAGE_ALIGN
    else:
        x = (w0 + pixel // QP) * Q + pixel % QP
        pixel_mask = (pixel % QP < Q) & (x < W * IMAGE_ALIGN)
    image += (b * image_b + f * image_f + h * image_h) * IMAGE_ALIGN
    image_at = image + lines[:, None] + x[None, :]
    image_mask = line_mask[:, None] & pixel_mask[None, :]

    element = tl.arange(0, AB * QP * ZB)  # token side: WB tokens of [AB,QP,ZB] elements
    if QP == Q and ZB == AFTER:
        k = a0 * (Q * AFTER) + element
        element_mask = k < BEFORE * Q * AFTER
    else:
        ka, kq, kz = a0 + element // (QP * ZB), element // ZB % QP, z0 + element % ZB
        k = (ka * Q + kq) * AFTER + kz
        element_mask = (ka < BEFORE) & (kq < Q) & (kz < AFTER)
    w = w0 + tl.arange(0, WB)
    tokens += (b * token_b + cell_row * cells_w * token_s) * TOKEN_ALIGN
    token_at = tokens + (w.to(tl.int64) * token_s * TOKEN_ALIGN)[:, None] + k[None, :]
    token_mask = (w < cells_w)[:, None] & element_mask[None, :]

    if TO_IMAGE:
        values = tl.load(token_at, mask=token_mask)
        values = tl.permute(tl.reshape(values, (WB, AB, QP, ZB)), (1, 3, 0, 2))
        tl.store(image_at, tl.reshape(values, (AB * ZB, WB * QP)), mask=image_mask)
    else:
        values = tl.load(image_at, mask=image_mask)
        values = tl.permute(tl.reshape(values, (AB, ZB, WB, QP)), (2, 0, 3, 1))
        tl.store(token_at, tl.reshape(values, (WB, AB * QP * ZB)), mask=token_mask)


@functools.lru_cache(maxsize=1024)
def _plan(shape, strides, token_strides, patch, order, arch):
    """(grid, integer arguments, constants, config) of one launch. The image's shape and strides, [B,C,(F,)H,W]."""
    t, p, q = (1, *patch)[-3:]
    (B, C, *_, H, W), F = shape, shape[2] if len(patch) == 3 else 1
    stride = {"c": strides[1], "t": strides[2] if len(patch) == 3 else 0, "p": strides[-2]}
    size = {"c": C, "t": t, "p": p}
    letters = ["t"] * ("t" not in order) + [letter for letter in order if letter != "q"]
    after = prod(size[letter] for letter in order[order.index("q") + 1:])
    before = C * t * p // after if after else 0
    steps = strides[0], stride["t"] * t, stride["p"] * p, *(stride[letter] for letter in letters)
    align = gcd(16, W, *steps)
    token_align = gcd(16, *token_strides[:2])
    cells_h, cells_w = H // p, W // q
    cells = F // t * cells_h
    config = tile(before, after, q, cells_w, arch)
    grid = (B * cells, triton.cdiv(cells_w, config.WB),
            triton.cdiv(before, config.AB) * triton.cdiv(after, config.ZB))
    integers = (*(step // align for step in steps), *(step // token_align for step in token_strides[:2]), cells_h,
                cells, W // align)
    constants = {"IMAGE_ALIGN": align, "TOKEN_ALIGN": token_align, "BEFORE": before, "AFTER": after,
                 "N1": size[letters[1]], "N2": size[letters[2]], "Q": q, "QP": triton.next_power_of_2(q)}
    return grid, integers, constants, config


def _launch(image, tokens, patch, order, to_image):
    if image.numel() == 0:
        return
    grid, integers, constants, config = _plan(image.shape, image.stride(), tokens.stride(), tuple(patch), order,
                                              architecture(image))  # a compiled graph hands over lists
    launch(_move, grid, image, tokens, *integers, config=config, TO_IMAGE=to_image, **constants)


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    return why_not_triton(inputs)


def patchify_forward(x, patch, order):
    """[B,C,(F,)H,W] -> [B,S,K]."""
    B, C, *sizes = x.shape
    cell = prod(patch)
    tokens = torch.empty((B, prod(sizes) // cell, C * cell), dtype=x.dtype, device=x.device)
    _launch(x, tokens, patch, order, False)
    return tokens


def unpatchify_forward(tokens, patch, grid, order):
    """[B,S,K] -> [B,C,(F,)H,W]."""
    B, _, K = tokens.shape
    image = torch.empty((B, K // prod(patch), *map(mul, grid, patch)), dtype=tokens.dtype, device=tokens.device)
    _launch(image, tokens, patch, order, True)
    return image


def patchify_backward(grad, patch, grid, order):
    """Gradient of x from that of the tokens."""
    return unpatchify_forward(dense_last(grad), patch, grid, order)


def unpatchify_backward(grad, patch, order):
    """Gradient of the tokens from that of the image."""
    return patchify_forward(dense_last(grad), patch, order)
