"""packed_linear: residual + gate * act(h W^T + b), h = LayerNorm(x) (1 + scale) + shift, for frozen models on CPUs.

Norm and gate may be absent: h = x, and what is returned is act(h W^T + b). W was packed once, in one of three ways:

    fp32    y = h W^T
    bf16    the same of h and W rounded to bfloat16, products and sums in float32
    int8    scale_m = max_k |h_mk smooth_k| / 127      code_mk = round(h_mk smooth_k / scale_m) + 128
            scale_n = max_k |w_nk / smooth_k| / L      c_nk = round(w_nk / smooth_k / scale_n)
            y_mn = scale_m scale_n sum_k (code_mk - 128) c_nk

The sums of integers are exact; L is 127, or 64 where the CPU's instruction adds two products in 16 bits. A scale per
row of h: Dettmers et al. 2022 (arXiv:2208.07339), section 2. smooth, float32 [K], is 1 / s of SmoothQuant, Xiao et al.
2023 (arXiv:2211.10438), equation 3: it moves the range of outlying channels into the weights.

x [...,K] float32, bfloat16 or float16, or the `Codes` that another product left; the result [...,N] float32, bfloat16
or float16, or, for the `reader` that alone takes it, its Codes: no float of it ever reaches memory. A row of x that
holds an infinity or NaN gives NaN with int8. A library's product would need passes over memory before and after it for
all that, and is no faster: see docs/freeze.md. For inference on CPUs: there are no gradients, no kernels for GPUs, and
nothing of it in explain(). Without the C++ extension the reference runs.
"""
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F

from difuse_kernels import native
from difuse_kernels.checks import KERNEL_DTYPES, check_one_of, check_shape, needs_grad
from difuse_kernels.dispatch import forced_backend
from difuse_kernels.linear import linear_native, linear_reference

PRECISIONS = {"fp32": (torch.float32, 1), "bf16": (torch.bfloat16, 2), "int8": (torch.int8, 4)}  # numbers in 32 bits
ACTIVATIONS = ("none", "gelu", "gelu_tanh")
ZERO = 128  # the code of 0
MOST_INT8 = 1 << 16  # numbers in a sum: what 32 bits hold


class Codes(NamedTuple):
    """Rows as 8-bit numbers: scale (codes - 128)."""

    codes: torch.Tensor  # uint8 [...,K]
    scale: torch.Tensor  # float32 [...]


class PackedWeight(NamedTuple):
    """A weight [N,K] as the kernel reads it: see csrc/linear/linear_cpu.cpp. Made by `pack_linear`, for this CPU."""

    precision: str
    shape: tuple  # (N, K)
    data: torch.Tensor  # flat; 8-bit numbers, which are signed, as uint8
    scale: torch.Tensor | None = None  # of int8: float32 [N]
    sums: torch.Tensor | None = None  # of int8: int32 [N], ZERO times the sum of an output's numbers
    smooth: torch.Tensor | None = None  # of int8: float32 [K]

    def tensors(self):
        """All that it holds."""
        return [tensor for tensor in self if isinstance(tensor, torch.Tensor)]

    def numbers(self):
        """[N,K] as they are multiplied: float32, bfloat16 or int8."""
        (N, K), (dtype, per) = self.shape, PRECISIONS[self.precision]
        units, whole, width = -(-K // per), *_edges(N)
        data = self.data.view(dtype)
        parts = [part.view(-1, units, outputs, per).transpose(1, 2).reshape(-1, units * per) for part, outputs in (
            (data[: whole * units * per], layout()[0]), (data[whole * units * per :], width)) if outputs]
        return torch.cat(parts)[:N, :K]

    def dense(self):
        """[N,K] float32, with its rounding: unpacked anew at every call."""
        weight = self.numbers().float()
        if self.scale is not None:
            weight *= self.scale[:, None]
        return weight if self.smooth is None else weight * self.smooth


@functools.cache
def layout():
    """(outputs in a panel, outputs in a vector, L) of the kernels in use."""
    if native.ext is None:
        return 1, 1, 127
    found = torch.empty(3, dtype=torch.int32, device="cpu")
    native.ext.linear_layout(found)
    return tuple(found.tolist())


def _edges(N):
    """(outputs in whole panels, those of the narrower last one in whole vectors)."""
    panel, vector, _ = layout()
    whole = N // panel * panel
    return whole, -(-(N - whole) // vector) * vector


def pack_linear(weight, precision="fp32", smooth=None):
    """The PackedWeight of `weight` [N,K], a floating tensor on the CPU; smooth [K] only with "int8".

    Raises ValueError or TypeError for another shape, dtype, device or precision.
    """
    check_one_of("pack_linear", "precision", precision, tuple(PRECISIONS))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or not weight.numel() or not weight.is_cpu:
        got = f"{tuple(weight.shape)} on {weight.device}" if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise ValueError(f"pack_linear: weight is {got}; expected [N,K] on the CPU")
    check_shape("pack_linear", "weight", weight, weight.shape)
    if smooth is not None and precision != "int8":
        raise ValueError(f"pack_linear: smooth is for 'int8'; precision is {precision!r}")
    check_shape("pack_linear", "smooth", smooth, weight.shape[1:])
    weight, scale, sums = weight.detach().float(), None, None
    if precision == "int8":
        if weight.shape[1] > MOST_INT8:
            raise ValueError(f"pack_linear: weight has shape {tuple(weight.shape)}; with 'int8' K is at most "
                             f"{MOST_INT8}")
        if smooth is not None:
            smooth = smooth.detach().float().contiguous()
            weight = weight / smooth
        scale = weight.abs().amax(1).clamp_min(1e-30) / layout()[2]  # [N]
        weight = (weight / scale[:, None]).round()
        sums = (weight.sum(1) * ZERO).to(torch.int32)  # [N]
    (N, K), (dtype, per) = weight.shape, PRECISIONS[precision]
    whole, width = _edges(N)
    weight = F.pad(weight.to(dtype), (0, -K % per, 0, whole + width - N))  # [whole+width,units*per]
    parts = [part.view(-1, outputs, part.shape[1] // per, per).transpose(1, 2).reshape(-1) for part, outputs in (
        (weight[:whole], layout()[0]), (weight[whole:], width)) if len(part)]
    data = torch.cat(parts)
    return PackedWeight(precision, (N, K), data.view(torch.uint8) if precision == "int8" else data, scale, sums, smooth)


def packed_linear(x, weight, bias=None, *, scale=None, shift=None, eps=1e-6, activation="none", gate=None,
                  residual=None, overwrite=False, out_dtype=torch.float32, reader=None):
    """residual + gate * act(h W^T + bias): [...,N] in `out_dtype`, or Codes where `reader`, an int8 weight, takes it.

    bias [N]. scale, shift [B,K], both or none: x [B,...,K] is normed and modulated first. gate [B,N] and residual
    [B,...,N], both or none; overwrite: the result is written over residual. All float32. Raises ValueError or TypeError
    for a wrong shape, dtype or device.
    """
    if not isinstance(weight, PackedWeight):
        raise TypeError(f"packed_linear: weight is {type(weight).__name__}; expected what pack_linear returns")
    N, K = weight.shape
    codes, x_scale = x if isinstance(x, Codes) else (x, None)
    if x_scale is not None and (weight.precision != "int8" or scale is not None):
        raise ValueError("packed_linear: x are codes, which are for 'int8' and cannot be normed; the weight is "
                         f"{weight.precision!r}")
    _check("x", codes, KERNEL_DTYPES if x_scale is None else (torch.uint8,), (..., K))
    if x_scale is not None:
        _check("the scale of x", x_scale, (torch.float32,), codes.shape[:-1])
    if needs_grad(codes):
        raise ValueError("packed_linear: it has no gradients; call it under torch.no_grad()")
    if bias is not None:
        _check("bias", bias, (torch.float32,), (N,))
    for a, b, pair in ((scale, shift, "scale and shift"), (gate, residual, "gate and residual")):
        if (a is None) != (b is None):
            raise ValueError(f"packed_linear: got one of {pair}; expected both or none")
    if scale is not None:
        _check("scale", scale, (torch.float32,), (codes.shape[0], K))
        _check("shift", shift, (torch.float32,), (codes.shape[0], K))
    if gate is not None:
        _check("gate", gate, (torch.float32,), (codes.shape[0], N))
        _check("residual", residual, (torch.float32,), (*codes.shape[:-1], N))
    if overwrite and (residual is None or out_dtype != torch.float32 or reader is not None):
        raise ValueError("packed_linear: overwrite is for a float32 result over a residual")
    check_one_of("packed_linear", "activation", activation, ACTIVATIONS)
    check_one_of("packed_linear", "out_dtype", out_dtype, KERNEL_DTYPES)
    if reader is not None and (reader.precision, reader.shape[1]) != ("int8", N):
        raise ValueError(f"packed_linear: reader is {reader.precision!r} of {reader.shape[1]} inputs; expected 'int8' "
                         f"of {N}")
    backend = linear_reference if native.ext is None or forced_backend() == "reference" else linear_native
    found = backend.packed_linear(codes, x_scale, scale, shift, eps, weight, bias, activation, gate, residual,
                                  overwrite, out_dtype, reader)
    return found if reader is None else Codes(*found)


def _check(name, value, dtypes, shape):
    """`value` is a tensor on the CPU of one of `dtypes`, whose shape is `shape` or, after an ellipsis, ends like it."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"packed_linear: {name} is {type(value).__name__}; expected a tensor")
    if value.dtype not in dtypes or not value.is_cpu:
        raise TypeError(f"packed_linear: {name} is {value.dtype} on {value.device}; expected "
                        f"{' or '.join(sorted(map(str, dtypes)))} on the CPU")
    if value.shape != shape and not (shape[0] is ... and value.shape[-1:] == shape[1:]):
        raise ValueError(f"packed_linear: {name} has shape {tuple(value.shape)}; expected "
                         f"[{','.join('...' if n is ... else str(n) for n in shape)}]")
