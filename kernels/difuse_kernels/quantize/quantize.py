"""quantize, dequantize, requantize: rows of floats as 8-bit codes for a matrix product in integers, and back.

    scale_m = max_k |x_mk smooth_k| / 127        code_mk = round(x_mk smooth_k / scale_m) + 128
    y_mn    = act(scale_m sums_mn + bias_n)      sums_mn = sum_k (code_mk - 128) w_nk

A scale per row: Dettmers et al. 2022 (arXiv:2208.07339), section 2. smooth, float32 [K], is 1 / s of SmoothQuant, Xiao
et al. 2023 (arXiv:2211.10438), equation 3: it moves the range of outlying channels into the weights. requantize is
quantize(dequantize(...)) in one pass over memory. activation: "none", "gelu" (by erf), "gelu_tanh".

x [...,K] float32, bfloat16 or float16, contiguous; codes uint8 [...,K]; scale float32 [...]; sums float32 [...,N]. A
row that holds an infinity or NaN has the scale NaN, so that everything computed from it is NaN. For inference on CPUs:
there are no gradients, no kernels for GPUs, and nothing of it in explain(). Without the C++ extension the reference
runs.
"""
import torch

from difuse_kernels import native
from difuse_kernels.checks import KERNEL_DTYPES, check_one_of, check_shape, needs_grad
from difuse_kernels.dispatch import forced_backend
from difuse_kernels.quantize import quantize_native, quantize_reference

ACTIVATIONS = ("none", "gelu", "gelu_tanh")
ZERO = 128  # the code of 0


def quantize(x, smooth=None):
    """(codes, scale) of x [...,K]. Raises ValueError or TypeError for a wrong shape, dtype or device."""
    _check("quantize", x, KERNEL_DTYPES, smooth=smooth)
    return _backend().quantize(x, None, None, "none", smooth)


def dequantize(sums, scale, bias=None, *, activation="none"):
    """act(scale sums + bias), written over sums [...,N]; scale [...], bias [N]. Raises as quantize does."""
    _check_sums("dequantize", sums, scale, activation, bias=bias)
    return _backend().dequantize(sums, scale, bias, activation)


def requantize(sums, scale, bias=None, *, activation="none", smooth=None):
    """(codes, scale) of act(scale sums + bias). Raises as quantize does."""
    _check_sums("requantize", sums, scale, activation, bias=bias, smooth=smooth)
    return _backend().quantize(sums, scale, bias, activation, smooth)


def _backend():
    if forced_backend() == "cpu" and native.ext is None:
        raise RuntimeError(f"quantize: backend 'cpu' cannot run here: {native.missing()}")
    return quantize_reference if native.ext is None or forced_backend() == "reference" else quantize_native


def _check(op, x, dtypes, wide=True, **rows):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{op}: got {type(x).__name__}; expected a tensor")
    if not x.is_cpu or x.dtype not in dtypes or not x.is_contiguous() or (wide and not (x.dim() and x.shape[-1])):
        raise ValueError(f"{op}: got {tuple(x.shape)} {x.dtype} on {x.device}, "
                         f"{'' if x.is_contiguous() else 'not '}contiguous; expected a contiguous tensor of one of "
                         f"{', '.join(sorted(map(str, dtypes)))} on the CPU")
    if needs_grad(x):
        raise ValueError(f"{op}: codes have no gradient; call it under torch.no_grad()")
    for name, row in rows.items():
        check_shape(op, name, row, x.shape[-1:])
        if row is not None and not (row.dtype == torch.float32 and row.is_contiguous() and row.is_cpu):
            raise ValueError(f"{op}: {name} is {row.dtype} on {row.device}; expected contiguous torch.float32 on the "
                             "CPU")


def _check_sums(op, sums, scale, activation, **rows):
    _check(op, sums, (torch.float32,), **rows)
    _check(op, scale, (torch.float32,), wide=False)
    check_shape(op, "scale", scale, sums.shape[:-1])
    check_one_of(op, "activation", activation, ACTIVATIONS)
