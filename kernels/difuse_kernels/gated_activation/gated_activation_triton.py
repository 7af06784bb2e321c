"""gated_activation in Triton: an elementwise kernel each way, tiles of rows by columns."""
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from difuse_kernels.checks import dense_last
from difuse_kernels.triton_launch import architecture, launch, why_not_triton


@dataclass(frozen=True)
class Tile:
    """ROWS rows by WIDTH columns of each half."""

    ROWS: int
    WIDTH: int
    num_warps: int
    num_stages: int = 1


def configuration(F, architecture):
    """Bytes to move, bf16: 6 an element of the result forward, 10 backward; at 4.3 TB/s [2,1024,9216] 26 and 44 us.

    2048 elements and 4 warps a program: 16 elements a thread, four 16-byte loads under way forward and six backward, a
    dozen programs a multiprocessor. WIDTH divides F where it can, so that no lane idles: 1024 for 9216, 512 for 4608.
    An element takes 24 instructions (silu), 27 (gelu_tanh) or 40 (gelu): to issue gelu's takes as long as the bytes do.
    """
    if architecture == "interpreter":
        return Tile(8, 32, num_warps=4)
    widths = 2048, 1024, 512, 256, 128
    width = next((w for w in widths if F % w == 0), min(triton.next_power_of_2(max(F, 16)), 1024))
    return Tile(2048 // width, width, num_warps=4)


@triton.jit
def _sigmoid(x):
    """1 / (1 + e^-x) and one minus it, without overflow or cancellation."""
    e = tl.exp(-tl.abs(x))
    large, small = 1.0 / (1.0 + e), e / (1.0 + e)
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _activation(z, KIND: tl.constexpr):
    """act(z) and act'(z); what is not used is not compiled."""
    if KIND == "silu":
        s, rest = _sigmoid(z)
        return z * s, s * (1.0 + z * rest)
    elif KIND == "gelu":
        cdf = 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)
        return z * cdf, cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:  # (1 + tanh u) / 2 = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        s, rest = _sigmoid(z * (1.5957691216057308 + 0.07135481627159817 * z * z))
        return z * s, s + z * s * rest * (1.5957691216057308 + 0.2140644488147945 * z * z)


@triton.jit
def _place(rows, F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """(row numbers, columns, mask) of this program's tile; columns run fastest."""
    blocks: tl.constexpr = (F + WIDTH - 1) // WIDTH
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = (tl.program_id(0) % blocks) * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = row[:, None] < rows
    return row, d, (mask & (d < F) if F % WIDTH else mask & tl.full([1, WIDTH], True, tl.int1))


@triton.jit
def _offset(row, n1, n2, n3, s0, s1, s2, s3, DIMS: tl.constexpr):
    """Where a row begins, of leading dimensions [n0,n1,n2,n3] the last DIMS of which are there."""
    if DIMS == 1:
        return row * s3
    elif DIMS == 2:
        return row // n3 * s2 + row % n3 * s3
    else:
        outer = row // n3 // n2
        return outer // n1 * s0 + outer % n1 * s1 + row // n3 % n2 * s2 + row % n3 * s3


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(H, OUT, rows, n1, n2, n3, h0, h1, h2, h3, F: tl.constexpr, KIND: tl.constexpr,
                   FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """One tile of OUT [rows,F] of H's two halves."""
    row, d, mask = _place(rows, F, ROWS, WIDTH)
    h = H + _offset(row, n1, n2, n3, h0, h1, h2, h3, DIMS)[:, None] + d
    a, b = tl.load(h, mask=mask, other=0.0).to(tl.float32), tl.load(h + F, mask=mask, other=0.0).to(tl.float32)
    value, _slope = _activation(a if FIRST else b, KIND)
    out = (b if FIRST else a) * value
    tl.store(OUT + row[:, None] * F + d, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(DOUT, H, DH, rows, n1, n2, n3, g0, g1, g2, g3, h0, h1, h2, h3, F: tl.constexpr,
                    KIND: tl.constexpr, FIRST: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr,
                    WIDTH: tl.constexpr):
    """One tile of each half of DH [rows,2F]."""
    row, d, mask = _place(rows, F, ROWS, WIDTH)
    h = H + _offset(row, n1, n2, n3, h0, h1, h2, h3, DIMS)[:, None] + d
    a, b = tl.load(h, mask=mask, other=0.0).to(tl.float32), tl.load(h + F, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(DOUT + _offset(row, n1, n2, n3, g0, g1, g2, g3, DIMS)[:, None] + d, mask=mask, other=0.0)
    g = g.to(tl.float32)
    value, slope = _activation(a if FIRST else b, KIND)
    linear, gate = g * value, g * (b if FIRST else a) * slope
    dh = DH + row[:, None] * (2 * F) + d
    tl.store(dh, (gate if FIRST else linear).to(DH.dtype.element_ty), mask=mask)
    tl.store(dh + F, (linear if FIRST else gate).to(DH.dtype.element_ty), mask=mask)


def _leading(*tensors):
    """The leading dimensions all tensors share, merged where every one of them allows it: (sizes, strides of each)."""
    sizes, strides = [], [[] for _ in tensors]
    for d, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        if sizes and all(s[-1] == t.stride(d) * size for s, t in zip(strides, tensors, strict=True)):
            sizes[-1] *= size
            for s, t in zip(strides, tensors, strict=True):
                s[-1] = t.stride(d)
        else:
            sizes.append(size)
            for s, t in zip(strides, tensors, strict=True):
                s.append(t.stride(d))
    return sizes or [1], [s or [0] for s in strides]


def _launch(kernel, tensors, strided, h, activation, act_on):
    F = h.shape[-1] // 2
    sizes, strides = _leading(*strided)
    rows, dims = math.prod(h.shape[:-1]), len(sizes)
    config = configuration(F, architecture(h))
    grid = triton.cdiv(rows, config.ROWS) * triton.cdiv(F, config.WIDTH)
    launch(kernel, (grid,), *tensors, rows, *([1] * (4 - dims) + sizes)[1:],
           *(stride for s in strides for stride in [0] * (4 - dims) + s), config=config, F=F, KIND=activation,
           FIRST=act_on == "first", DIMS=dims)


def unsupported(_op, inputs):
    """Why these inputs cannot run here, or None."""
    h, = inputs
    return why_not_triton(inputs) or (
        "the leading dimensions do not merge into four; call .contiguous() on it" if len(_leading(h)[0]) > 4 else None)


def gated_activation_forward(h, activation, act_on):
    """act(a) * b or a * act(b), contiguous."""
    out = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype, device=h.device)
    _launch(forward_kernel, (h, out), (h,), h, activation, act_on)
    return out


def gated_activation_backward(grad, h, activation, act_on):
    """The gradient of h, contiguous."""
    grad = dense_last(grad)
    if len(_leading(grad, h)[0]) > 4:
        grad = grad.contiguous()
    dh = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    _launch(backward_kernel, (grad, h, dh), (grad, h), h, activation, act_on)
    return dh
