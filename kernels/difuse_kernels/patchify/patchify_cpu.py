"""patchify and unpatchify on the C++ CPU kernel, one for both directions. Kernel: csrc/patchify/patchify_cpu.cpp."""
from math import prod
from operator import mul

from difuse_kernels.checks import dense_last, why_not_cpu
from difuse_kernels.native import empty, ext


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    return why_not_cpu(inputs)


def patchify_forward(x, patch, order):
    """[B,C,(F,)H,W] -> [B,S,K]."""
    B, C, *sizes = x.shape
    cell = prod(patch)
    tokens = empty((B, prod(sizes) // cell, C * cell), x.dtype)
    ext.patchify(x, tokens, *(1, *patch)[-3:], order, False)
    return tokens


def unpatchify_forward(tokens, patch, grid, order):
    """[B,S,K] -> [B,C,(F,)H,W]."""
    B, _, K = tokens.shape
    image = empty((B, K // prod(patch), *map(mul, grid, patch)), tokens.dtype)
    ext.patchify(image, tokens, *(1, *patch)[-3:], order, True)
    return image


def patchify_backward(grad, patch, grid, order):
    """Gradient of x from that of the tokens."""
    return unpatchify_forward(dense_last(grad), patch, grid, order)


def unpatchify_backward(grad, patch, order):
    """Gradient of the tokens from that of the image."""
    return patchify_forward(dense_last(grad), patch, order)
