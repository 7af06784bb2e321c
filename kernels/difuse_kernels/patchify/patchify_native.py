"""patchify and unpatchify on the C++ kernels, for the CPU and for CUDA; one kernel serves both directions.

Kernels: csrc/patchify/patchify_cpu.cpp, patchify_cuda.cu.
"""
from math import prod
from operator import mul

from difuse_kernels.checks import dense_last


class Launchers:
    """The functions of one backend; `machine` is native.py or native_cuda.py."""

    def __init__(self, machine):
        self.ext, self.machine = machine.ext, machine

    def unsupported(self, _op, inputs):
        """Why these inputs cannot run here, or None."""
        return self.machine.unsupported(inputs)

    def patchify_forward(self, x, patch, order):
        """[B,C,(F,)H,W] -> [B,S,K]."""
        B, C, *sizes = x.shape
        cell = prod(patch)
        tokens = self.machine.empty((B, prod(sizes) // cell, C * cell), x.dtype, x)
        self.ext.patchify(x, tokens, *(1, *patch)[-3:], order, False)
        return tokens

    def unpatchify_forward(self, tokens, patch, grid, order):
        """[B,S,K] -> [B,C,(F,)H,W]."""
        B, _, K = tokens.shape
        image = self.machine.empty((B, K // prod(patch), *map(mul, grid, patch)), tokens.dtype, tokens)
        self.ext.patchify(image, tokens, *(1, *patch)[-3:], order, True)
        return image

    def patchify_backward(self, grad, patch, grid, order):
        """Gradient of x from that of the tokens."""
        return self.unpatchify_forward(dense_last(grad), patch, grid, order)

    def unpatchify_backward(self, grad, patch, order):
        """Gradient of the tokens from that of the image."""
        return self.patchify_forward(dense_last(grad), patch, order)
