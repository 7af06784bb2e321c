"""The one door to every Triton kernel: why Triton cannot run here, on which architecture it does, and the launch.

Importing this costs nothing: Triton itself is imported by the `<op>_triton.py` files, when their backend is first used.
With TRITON_INTERPRET=1 the kernels run in Triton's interpreter, slowly, on CPU tensors too: that is how they are tested
where there is no GPU.
"""
import contextlib
import functools
import importlib.util
import os
import shutil
import threading
from typing import NamedTuple

import torch

from difuse_kernels.checks import KERNEL_DTYPES

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
OLDEST = (3, 6)
interpreted_as = "interpreter"  # the architecture whose configurations interpreted kernels take
_LOCK = threading.RLock()  # Triton's just-in-time compiler keeps state on the kernel object
_recorded = None  # the launches seen by `recording`, instead of run
_recorded_architecture = None


class Launch(NamedTuple):
    """What `launch` was asked for: `constants` holds the config's fields too."""

    kernel: object
    grid: tuple
    arguments: tuple
    constants: dict


@functools.cache
def missing():
    """Why Triton can run nothing here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton (Linux only)"
    if not INTERPRETED and not torch.cuda.is_available():
        return "torch sees no GPU (TRITON_INTERPRET=1 runs the Triton kernels, slowly, on CPU tensors)"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"triton {triton.__version__} is too old; the kernels are tested from 3.6 on. Update torch and triton"
    if INTERPRETED:
        from difuse_kernels.testing.interpreter import mend
        mend()
        return None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler and finds none; install gcc or clang, or set CC"
    try:
        from triton.runtime import driver
        driver.active.get_current_target()  # builds and loads Triton's driver module: whatever is lacking shows here
    except Exception as error:  # noqa: BLE001  the reason is handed to the user, as the refusal
        return f"Triton does not start: {type(error).__name__}: {error}"
    return None


@functools.cache
def _device_architecture(index):
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]  # "gfx942"
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(tensor):
    """What configurations are chosen by: "sm_80", "sm_90", "gfx942"... of the tensor's device, or "interpreter"."""
    if _recorded is not None:
        return _recorded_architecture
    return interpreted_as if INTERPRETED else _device_architecture(tensor.device.index)


def why_not_triton(inputs):
    """What the Triton kernels refuse in any op: dtype, device, an old GPU, a strided last dimension."""
    first = inputs[0]
    for position, tensor in enumerate(inputs):
        if tensor is None:
            continue
        if tensor.dtype not in KERNEL_DTYPES:
            return f"input {position} has dtype {tensor.dtype}; the kernels take float32, bfloat16 and float16"
        if not (tensor.is_cuda or (INTERPRETED and tensor.is_cpu) or (_recorded is not None and tensor.is_meta)):
            return f"input {position} is on {tensor.device.type}"
        if tensor.device != first.device:
            return f"input {position} is on another device than input 0"
        if not tensor.is_contiguous() and tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last dimension of input {position} is strided; call .contiguous() on it"
    return _why_not_device(first.device.index) if first.is_cuda else None


_refusals = {}  # of devices; a dict, since torch.compile warns of functools.cache


def _why_not_device(index):
    if index not in _refusals:
        old = not torch.version.hip and torch.cuda.get_device_capability(index) < (8, 0)
        _refusals[index] = (f"the GPU is {_device_architecture(index)}; the Triton kernels need sm_80 or newer" if old
                            else None)
    return _refusals[index]


def launch(kernel, grid, *arguments, config, **constants):
    """kernel[grid](*arguments, **constants, **config's fields) on the device of the first tensor, under a lock.

    `config` is a frozen dataclass whose fields are the kernel's constexpr parameters beside num_warps and num_stages.
    Nothing is launched where the grid is empty.
    """
    if 0 in grid:
        return
    constants.update(vars(config))
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants))
        return
    with _LOCK:
        if INTERPRETED:
            kernel[grid](*arguments, **constants)
            return
        device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
        if device.index == torch.cuda.current_device():
            kernel[grid](*arguments, **constants)
        else:
            with torch.cuda.device(device):
                kernel[grid](*arguments, **constants)


@contextlib.contextmanager
def recording(for_architecture):
    """Inside the block launches are collected in the list it yields, not run: the kernel report reads them.

    Launchers called inside it take tensors on the "meta" device, which have shapes and strides but no memory.
    """
    global _recorded, _recorded_architecture
    _recorded, _recorded_architecture = [], for_architecture
    try:
        yield _recorded
    finally:
        _recorded = _recorded_architecture = None
