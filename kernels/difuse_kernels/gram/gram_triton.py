"""gram in Triton: a program makes the matrix of a block of a sample, a second launch adds up each sample's blocks."""
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from difuse_kernels.checks import any_strides
from difuse_kernels.gram.gram import backward_step, dense
from difuse_kernels.sampler_step.sampler_step_triton import sampler_step_backward
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


@dataclass(frozen=True)
class Block:
    """Elements, or matrices, that a program reads at once. No shape changes them: a sample's bits depend on nothing."""

    BLOCK: int
    num_warps: int
    num_stages: int = 1


def blocks(arch):
    """Of the first launch and of the second."""
    if arch == "interpreter":
        return Block(256, 1), Block(2, 1)  # small, so that small cases have many blocks and a rest
    return Block(2048, 4), Block(128, 1)  # 16 elements a thread: Flux's 4096 x 64 make 128 programs a sample


@triton.jit
def _matrices(inputs, strides, found, n, count, BLOCK: tl.constexpr):
    """found[sample, block]: the Gram matrix of BLOCK of the sample's n elements; count: blocks of a sample."""
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // count, program % count * BLOCK
    at = first + tl.arange(0, BLOCK)
    rows = ((at < n).to(tl.float64),)
    for i in tl.static_range(len(inputs)):
        x = tl.load(inputs[i] + sample * strides[i] + at, mask=at < n, other=0.0)
        rows = rows + (x.to(tl.float32).to(tl.float64),)
    found += program * len(rows) * len(rows)
    for i in tl.static_range(len(rows)):
        for j in tl.static_range(i, len(rows)):
            product = tl.sum(rows[i] * rows[j])
            tl.store(found + i * len(rows) + j, product)
            tl.store(found + j * len(rows) + i, product)


@triton.jit
def _total(found, G, count, entries, BLOCK: tl.constexpr):
    """One entry of one sample's G: the sum over its blocks, in their order."""
    program = tl.program_id(0).to(tl.int64)
    found += program // entries * count * entries + program % entries
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(found + at.to(tl.int64) * entries, mask=at < count, other=0.0)
    tl.store(G + program, tl.sum(total))


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None. Samples that are not dense are copied."""
    return why_not_triton(any_strides(inputs))


def gram_forward(inputs):
    """G [B,n+1,n+1], float64."""
    (B, *shape), device, side = inputs[0].shape, inputs[0].device, len(inputs) + 1
    inputs = dense(inputs)
    n = torch.Size(shape).numel()
    config, config_total = blocks(architecture(inputs[0]))
    count = triton.cdiv(n, config.BLOCK)
    found = torch.empty((B, count, side, side), dtype=torch.float64, device=device)
    launch(_matrices, (B * count,), inputs, tuple([x.stride(0) for x in inputs]), found, n, count, config=config)
    G = torch.empty((B, side, side), dtype=torch.float64, device=device)
    launch(_total, (B * side * side,), found, G, count, side * side, config=config_total)
    return G


def gram_backward(grad, inputs, needs):
    """Gradients of the inputs, contiguous; None where not needed: a sampler_step of them and of 1."""
    dtypes = [x.dtype for x in inputs]
    inputs, coefficients = backward_step(grad, inputs)
    # the backward of a step whose outputs were the inputs and 1: it multiplies by the transposed coefficients
    return sampler_step_backward(inputs, coefficients.mT, dtypes, needs)
