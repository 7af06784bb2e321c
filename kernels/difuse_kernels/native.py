"""Loads the C++ extension of the CPU kernels, if this installation has one.

The extension shares torch's OpenMP runtime: its GOMP symbols stay unresolved until load and bind to the one that
torch has already loaded, so torch must be imported first and `torch.set_num_threads` rules.

This module and native_cuda.py offer the same names: `<op>_native.py` launches the kernels of either through them.
"""
import os

import torch  # first, so that its OpenMP runtime is in the process

from difuse_kernels.checks import KERNEL_DTYPES, why_not_dense

ext = None  # the module, or None
_missing = None  # why there is none
try:
    from difuse_kernels import _native as ext
except ImportError as error:
    _missing = f"the C++ extension is not loaded ({error}); reinstall with a C++17 compiler at hand (g++)"
else:
    try:
        ext.choose_isa(os.environ.get("DIFUSE_ISA", ""))
    except RuntimeError as error:
        raise ImportError(f"difuse_kernels: {error}") from None


def missing():
    """Why the native module cannot be used here, or None."""
    return _missing


def unsupported(inputs):
    """What the CPU kernels refuse in any op: another device, another dtype, a strided last dimension."""
    for tensor in inputs:  # once, and in line: every microsecond here is one of every call
        if tensor is not None and not (tensor.dtype in KERNEL_DTYPES and tensor.is_cpu
                                       and (tensor.is_contiguous() or tensor.stride()[-1] == 1)):
            return _why_not(inputs)
    return None


def _why_not(inputs):
    for position, tensor in enumerate(inputs):
        if tensor is not None and not tensor.is_cpu:
            return f"input {position} is on {tensor.device.type}"
    return why_not_dense(inputs)


HUGE_BYTES = 4 << 20  # from here on a fresh output's page faults cost more than the kernel that fills it


def empty(shape, dtype, _like):
    """torch.empty on the CPU, in large pages where the tensor is large."""
    tensor = torch.empty(*shape, dtype=dtype)  # a tuple is parsed 0.7 us more slowly
    if tensor.nbytes >= HUGE_BYTES:
        ext.prefer_huge_pages(tensor, tensor.nbytes)
    return tensor


def empty_like(tensor):
    """A contiguous torch.empty of the same shape and dtype; 4 us cheaper than passing the shape through Python."""
    out = torch.empty_like(tensor)
    if not out.is_contiguous():
        out = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    if out.nbytes >= HUGE_BYTES:
        ext.prefer_huge_pages(out, out.nbytes)
    return out
