"""Loads the extension of the CUDA C++ kernels, at first need: what native.py is for the CPU.

No compiler is needed at run time. The extension holds machine code for several GPU architectures and PTX for newer
ones; it loads where there is no driver, and `missing` then says so. The test suite loads one in its place that runs the
same kernels, slowly, on CPU tensors.
"""
import torch

from difuse_kernels.checks import KERNEL_DTYPES, why_not_dense

OLDEST = (8, 0)  # the compute capability that the build starts at
ext = None  # the module, or None
_missing = "not asked yet"
_refusals = {}  # of devices; a dict, since torch.compile warns of functools.cache


def _load():
    global ext
    if torch.version.hip:
        return "torch is built for AMD GPUs, the CUDA C++ kernels are for NVIDIA's"
    try:
        from difuse_kernels import _native_cuda as ext
    except ImportError as error:
        return f"the CUDA C++ extension is not loaded ({error}); reinstall with CUDA's compiler at hand (nvcc)"
    if ext.emulated:
        return None
    if not torch.cuda.is_available():
        return ext.missing() or "torch sees no NVIDIA GPU; install a torch that is built with CUDA"
    return ext.missing() or None


def missing():
    """Why the CUDA C++ kernels can run nothing here, or None."""
    global _missing
    if _missing == "not asked yet":
        _missing = _load()
    return _missing


def _why_not_device(index):
    if index not in _refusals:
        major, minor = torch.cuda.get_device_capability(index)
        _refusals[index] = None if (major, minor) >= OLDEST else (
            f"the GPU is sm_{major}{minor}; the CUDA C++ kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer")
    return _refusals[index]


def _why_not(inputs, index):
    for position, tensor in enumerate(inputs):
        if tensor is None or (tensor.get_device() == index and (tensor.is_cuda or (tensor.is_cpu and ext.emulated))):
            continue
        if tensor.get_device() != index:
            return f"input {position} is on another device than input 0"
        return f"input {position} is on {tensor.device.type}"
    return why_not_dense(inputs)


def unsupported(inputs):
    """What the CUDA kernels refuse in any op: dtype, device, an old GPU, a strided last dimension."""
    index = inputs[0].get_device()  # compared faster than devices are; -1 where there are no numbers
    fits = gpu = inputs[0].is_cuda
    for tensor in inputs:  # once, and in line: every microsecond here is one of every call
        if tensor is not None and not (tensor.dtype in KERNEL_DTYPES and tensor.get_device() == index
                                       and (tensor.is_contiguous() or tensor.stride()[-1] == 1)):
            fits = False
    reason = None if fits else _why_not(inputs, index)
    return reason or (_why_not_device(index) if gpu else None)


def empty(shape, dtype, like):
    """torch.empty on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_like(tensor):
    """A contiguous torch.empty of the same shape and dtype."""
    out = torch.empty_like(tensor)
    return out if out.is_contiguous() else torch.empty_like(tensor, memory_format=torch.contiguous_format)
