"""sampler_step in Triton: one launch that reads each input once, writes each output once and waits for nothing.

The coefficients, and the seeds of in-kernel noise, are read from device memory by every program: a captured CUDA graph
replays with whatever values they then hold. The inputs' dimensions are merged where they are dense in every input. The
outermost that is left (the samples, where they must stay apart) makes the rows, and a program does one block of a row:
8 elements a thread, in the usual case of one dense inner dimension by 128-bit loads and stores.
"""
import functools
from dataclasses import dataclass
from math import prod

import torch
import triton
import triton.language as tl

from difuse_kernels.checks import any_strides
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


@dataclass(frozen=True)
class Block:
    """Elements a program does."""

    BLOCK: int
    num_warps: int
    num_stages: int = 1  # no loop to pipeline


def block(arch):
    """The same for every shape, so that it does not depend on the batch."""
    if arch == "interpreter":
        return Block(256, num_warps=1)  # small, so that small cases have many blocks and a rest
    if arch.startswith("gfx"):
        return Block(512, num_warps=1)  # 64 lanes of 8 elements
    return Block(512, num_warps=2)  # 8 elements a thread; DiT's 8 latents of 4 x 32 x 32 still make 64 programs


@triton.jit
def _turn(u):
    """cos and sin of 2 pi u, u in [0,1], to 1e-7: Taylor polynomials about the nearest quarter turn. The library's
    functions reduce any argument, by a table in local memory."""
    quarter = tl.floor(4 * u + 0.5)
    x = (u - 0.25 * quarter) * 6.283185307179586  # the difference is exact; |x| <= pi / 4
    y = x * x
    s = x + x * y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y * (1 / 362880))))
    c = 1 + y * (-1 / 2 + y * (1 / 24 + y * (-1 / 720 + y * (1 / 40320 + y * (-1 / 3628800)))))
    q = quarter.to(tl.int32)
    cos, sin = tl.where(q & 1 == 0, c, s), tl.where(q & 1 == 0, s, c)
    return tl.where((q + 1) & 2 == 0, cos, -cos), tl.where(q & 2 == 0, sin, -sin)


@triton.jit
def _pair(r0, r1):
    """Two normals of two random words."""
    u0 = r0.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # 2^-32 and 2^-33
    cos, sin = _turn(r1.to(tl.float32) * 2.3283064365386963e-10)
    radius = tl.sqrt(-2 * tl.log(u0))
    return radius * cos, radius * sin


@triton.jit
def _normals(seed, step, first, COUNT: tl.constexpr):
    """COUNT normals from element `first`, a multiple of 4, on. The stream is defined in sampler_step_reference.py."""
    group = first // 4 + tl.arange(0, COUNT // 4)
    steps = tl.zeros_like(group) + step
    r0, r1, r2, r3 = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), steps.to(tl.uint32),
                               (steps >> 32).to(tl.uint32))
    z0, z1 = _pair(r0, r1)
    z2, z3 = _pair(r2, r3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (COUNT,))


@triton.jit
def _add(totals, x, column, c_out, OUTPUTS: tl.constexpr):
    """totals[i] + c[i] * x for every output; no totals yet: c[i] * x."""
    sums = ()
    for i in tl.static_range(len(OUTPUTS)):
        term = tl.load(column + OUTPUTS[i] * c_out) * x
        sums = sums + ((totals[i] + term) if len(totals) > 0 else term,)
    return sums


@triton.jit(do_not_specialize=["blocks", "c_row", "c_out", "c_in", "noise_row", "noise_column"])
def _step(inputs, outputs, coefficients, noise, n, blocks, sizes, strides, c_row, c_out, c_in, noise_row, noise_column,
          INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, NOISE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """One of a row's `blocks` blocks; a row has n elements.

    INPUTS and OUTPUTS are the coefficients' columns and rows that are there, NOISE is the column of the noise or None.
    sizes: of the row's dimensions, innermost first, the outermost left out. strides: for each input that of the row,
    then its dimensions', innermost first.
    """
    row = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    element = first + tl.arange(0, BLOCK)
    mask = element < n
    coefficients += row * c_row
    rest = element if WIDE or len(sizes) == 0 else element.to(tl.int32)  # 64-bit divisions are slow
    index = ()
    for d in tl.static_range(len(sizes)):
        index = index + ((rest % sizes[d]).to(tl.int64),)
        rest = rest // sizes[d]
    index = index + (rest.to(tl.int64),)

    totals = ()
    for j in tl.static_range(len(INPUTS)):
        at = inputs[j] + row * strides[j * (len(sizes) + 2)]
        for d in tl.static_range(len(sizes) + 1):
            at += index[d] * strides[j * (len(sizes) + 2) + 1 + d]
        x = tl.load(at, mask=mask).to(tl.float32)
        totals = _add(totals, x, coefficients + INPUTS[j] * c_in, c_out, OUTPUTS)
    if NOISE is not None:
        seed = noise + row * noise_row
        z = _normals(tl.load(seed), tl.load(seed + noise_column), first, BLOCK)
        totals = _add(totals, z, coefficients + NOISE * c_in, c_out, OUTPUTS)
    for i in tl.static_range(len(OUTPUTS)):
        tl.store(outputs[i] + row * n + element, totals[i], mask=mask)


@functools.lru_cache(maxsize=1024)
def _rows(shape, strides, samples):
    """(rows, n, sizes, strides) as `_step` takes them; `samples`: the first dimension makes the rows."""
    dims = []
    for d, size in enumerate(shape):
        steps = [stride[d] for stride in strides]
        if samples and d == 0:
            dims.append((size, steps))
        elif size != 1:
            if len(dims) > samples and all(o == size * s for o, s in zip(dims[-1][1], steps, strict=True)):
                size *= dims.pop()[0]
            dims.append((size, steps))
    one = (1, [0] * len(strides))  # 0 keeps the addresses aligned
    (rows, row_steps), *inner = [one] * (len(dims) < 2 and not samples) + dims
    inner = inner[::-1] or [one]
    flat = [step for j in range(len(strides)) for step in (row_steps[j], *(steps[j] for _, steps in inner))]
    return rows, prod(size for size, _ in inner), tuple([size for size, _ in inner[:-1]]), tuple(flat)


def _launch(inputs, coefficients, outputs, noise=None):
    """outputs[i] = sum_j coefficients[..., i, j] * inputs[j]; None stands for an input of zeros, an output unwanted."""
    columns = tuple([j for j, x in enumerate(inputs) if x is not None])
    wanted = tuple([i for i, out in enumerate(outputs) if out is not None])
    present = tuple([inputs[j] for j in columns])
    per_sample = coefficients.dim() == 3
    rows, n, sizes, strides = _rows(present[0].shape, tuple([x.stride() for x in present]),
                                    per_sample or noise is not None)
    config = block(architecture(coefficients))
    blocks = triton.cdiv(n, config.BLOCK)
    c_row = coefficients.stride(0) if per_sample else 0
    launch(_step, (rows * blocks,), present, tuple([outputs[i] for i in wanted]), coefficients, noise, n, blocks, sizes,
           strides, c_row, *coefficients.stride()[-2:], *(noise.stride() if noise is not None else (0, 0)),
           config=config, INPUTS=columns, OUTPUTS=wanted, NOISE=None if noise is None else len(inputs),
           WIDE=n > 2**31 - 1 - config.BLOCK)


def unsupported(_op, inputs):
    """Why these inputs (the step's, then the coefficients and the noise) cannot run here, or None."""
    *tensors, _ = inputs
    if tensors[-1].requires_grad and torch.is_grad_enabled():
        return "the coefficients need a gradient; .detach() them unless it is wanted"
    return why_not_triton(any_strides(tensors))


def sampler_step_forward(inputs, coefficients, noise, out_dtypes):
    """A tuple of outputs, one per row of the coefficients."""
    shape, device = inputs[0].shape, inputs[0].device
    outputs = tuple([torch.empty(shape, dtype=dtype, device=device) for dtype in out_dtypes])
    _launch(inputs, coefficients, outputs, noise)
    return outputs


def sampler_step_backward(grads, coefficients, dtypes, needs):
    """Gradients of the inputs: the same kernel with the transposed coefficients. Absent gradients are left out."""
    like = next((grad for grad in grads if grad is not None), None)
    if like is None or not any(needs):
        return (None,) * len(needs)
    outputs = tuple([torch.empty(like.shape, dtype=dtype, device=like.device) if need else None
                     for dtype, need in zip(dtypes, needs, strict=True)])
    _launch(grads, coefficients.transpose(-1, -2), outputs)
    return outputs
