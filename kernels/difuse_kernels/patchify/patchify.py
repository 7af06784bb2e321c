"""patchify and unpatchify: an image or video to tokens and back, in any element order. Each is the other's backward.

    patchify    [B,C,H,W] -> [B,S,K]   S = (H/p)(W/q), K = C*p*q      [B,C,F,H,W] -> S = (F/t)(H/p)(W/q), K = C*t*p*q
    unpatchify  [B,S,K] -> [B,C,H,W] or [B,C,F,H,W]

Tokens run over the grid in row-major order. `order` names the elements of one token, slowest first: c channel, t frame,
p row and q column inside the patch. DiT's patch convolution is "cpq" and its output layer "pqc"; others write the
column before the row ("cqp"). For videos an order without "t" gets it in front of the first of p and q: "cpq" means
"ctpq", "pqc" means "tpqc". patch_size is (p,q) or (t,p,q), an int is that size along every axis. Dosovitskiy et al.
2021 (arXiv:2010.11929), section 3.1; Peebles & Xie 2023 (arXiv:2212.09748), section 3.2.

Every stride is free except the last dimension's; results are contiguous and keep the dtype (float32, bfloat16, float16;
float64 on the reference).
"""
from itertools import permutations
from math import prod

import torch

from difuse_kernels.checks import apply, check_tensor, needs_grad
from difuse_kernels.dispatch import Op

_STEM = "difuse_kernels.patchify.patchify"
PATCHIFY = Op("patchify", _STEM, "cpu", "cuda", "triton")
UNPATCHIFY = Op("unpatchify", _STEM, "cpu", "cuda", "triton")

_IMAGE_ORDERS = {"".join(letters): "".join(letters) for letters in permutations("cpq")}
_VIDEO_ORDERS = {"".join(letters): "".join(letters) for letters in permutations("ctpq")}
for _order in _IMAGE_ORDERS:
    _at = min(_order.index("p"), _order.index("q"))
    _VIDEO_ORDERS[_order] = f"{_order[:_at]}t{_order[_at:]}"


def _sizes(op, name, value, axes, least):
    """`value` as a tuple of `axes` integers, none below `least`."""
    sizes = (value,) * axes if type(value) is int and name == "patch_size" else value
    if isinstance(sizes, (tuple, list)) and len(sizes) == axes:
        for n in sizes:
            if not isinstance(n, int) or n < least:
                break
        else:
            return tuple(sizes)
    letters = ("H,W", "F,H,W")[axes - 2]
    raise ValueError(f"{op}: {name} is {value!r}; expected {axes} integers >= {least}, one for each of ({letters})")


def _full_order(op, order, axes):
    orders = _IMAGE_ORDERS if axes == 2 else _VIDEO_ORDERS
    full = orders.get(order)
    if full is None:
        raise ValueError(f"{op}: order is {order!r}; expected a permutation of {'cpq' if axes == 2 else 'ctpq or cpq'}")
    return full


class _Patchify(torch.autograd.Function):
    @staticmethod
    def forward(implementation, x, patch, order):
        return implementation.forward(x, patch, order)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, x, ctx.patch, ctx.order = inputs
        ctx.grid = [size // p for size, p in zip(x.shape[2:], ctx.patch, strict=True)]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, ctx.implementation.backward(grad, ctx.patch, ctx.grid, ctx.order), None, None


class _Unpatchify(torch.autograd.Function):
    @staticmethod
    def forward(implementation, tokens, patch, grid, order):
        return implementation.forward(tokens, patch, grid, order)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.implementation, _, ctx.patch, _, ctx.order = inputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return None, ctx.implementation.backward(grad, ctx.patch, ctx.order), None, None, None


def patchify(x, patch_size, *, order="cpq", backend="auto"):
    """x [B,C,H,W] or [B,C,F,H,W] -> tokens [B,S,K]. Meaning of patch_size and order: see the module's docstring.

    Raises TypeError for a dtype, ValueError for a shape, a size that the patch does not divide, or an unknown order;
    RuntimeError where `backend` cannot run.
    """
    check_tensor("patchify", "x", x, "[B,C,H,W] or [B,C,F,H,W]", (4, 5))
    _, _, *sizes = x.shape
    axes = len(sizes)
    patch = _sizes("patchify", "patch_size", patch_size, axes, 1)
    order = _full_order("patchify", order, axes)
    for i, size in enumerate(sizes):
        if size % patch[i]:
            p, rest = patch[i], size % patch[i]
            raise ValueError(f"patchify: {'FHW'[i - axes]} is {size}, which patch size {p} does not divide; pad it to "
                             f"{size + p - rest} or crop it to {size - rest}")
    implementation = PATCHIFY.select(backend, (x,))
    if implementation.backward is not None and needs_grad(x):
        return apply(_Patchify, implementation, x, patch, order)
    return implementation.forward(x, patch, order)


def unpatchify(tokens, patch_size, grid, *, order="pqc", backend="auto"):
    """tokens [B,S,K] -> [B,C,H,W] or [B,C,F,H,W]. `grid` counts tokens per axis: (H/p,W/q) or (F/t,H/p,W/q).

    Raises as `patchify`, and ValueError where S is not the product of `grid` or the patch does not divide K.
    """
    check_tensor("unpatchify", "tokens", tokens, "[B,S,K]", 3)
    axes = len(grid) if isinstance(grid, (tuple, list)) and len(grid) == 3 else 2
    grid = _sizes("unpatchify", "grid", grid, axes, 0)
    patch = _sizes("unpatchify", "patch_size", patch_size, axes, 1)
    order = _full_order("unpatchify", order, axes)
    _, S, K = tokens.shape
    if prod(grid) != S:
        raise ValueError(f"unpatchify: tokens has shape {tuple(tokens.shape)}; expected S = {prod(grid)} for the grid "
                         f"{grid}. Give the tokens per axis, sizes divided by patch_size")
    if K % prod(patch):
        raise ValueError(f"unpatchify: tokens has shape {tuple(tokens.shape)}; expected K to be a multiple of "
                         f"{prod(patch)}, the elements of patch {patch}. Check patch_size and the last layer's width")
    implementation = UNPATCHIFY.select(backend, (tokens,))
    if implementation.backward is not None and needs_grad(tokens):
        return apply(_Unpatchify, implementation, tokens, patch, grid, order)
    return implementation.forward(tokens, patch, grid, order)
