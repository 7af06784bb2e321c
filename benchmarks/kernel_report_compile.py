"""Compiles recorded launches for a target, without a GPU, to what Triton's just-in-time compiler would make of them.

Triton asks its driver for nothing but the target until a kernel is launched, so `Offline` stands in its place, and
Triton's own `warmup` specialises and compiles: the report cannot drift from it.
"""
import contextlib
import importlib
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from benchmarks import kernel_report_code as code


@dataclass(frozen=True)
class Pointer:
    """What Triton's compiler learns of a tensor argument, in a form that another process can be handed."""

    dtype: torch.dtype
    address: int  # allocations themselves are aligned
    storage_bytes: int

    @classmethod
    def to(cls, tensor):
        """The pointer to a tensor's first element."""
        return cls(tensor.dtype, tensor.storage_offset() * tensor.element_size() % 16, tensor.untyped_storage().size())

    def data_ptr(self):
        """The address, as Triton asks for it."""
        return self.address

    def ptr_range(self):
        """Bytes that can be reached through it: AMD's compiler takes buffer instructions below 2 GiB."""
        return self.storage_bytes


@dataclass(frozen=True)
class Job:
    """One kernel to compile for one target: where to find it and what it is called with."""

    target: str
    module: str
    kernel: str
    arguments: tuple
    constants: tuple  # (name, value) pairs

    @classmethod
    def of(cls, launch, target):
        """The job that a recorded Launch is."""
        function = launch.kernel.fn
        return cls(target, function.__module__, function.__qualname__, _pointers(launch.arguments),
                   tuple(launch.constants.items()))

    def warmup(self):
        """The compiled kernel; None where a cache hook of Triton's stops it."""
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver
        limits = code.TARGETS[self.target]
        driver.set_active(Offline(GPUTarget(limits.backend, limits.arch, limits.lanes)))
        kernel = getattr(importlib.import_module(self.module), self.kernel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of changes to come in Triton's defaults
            return kernel.warmup(*self.arguments, grid=(1,), **dict(self.constants))


def _pointers(argument):
    """An argument, or a tuple of them, with its tensors replaced."""
    if isinstance(argument, tuple):
        return tuple(map(_pointers, argument))
    return Pointer.to(argument) if isinstance(argument, torch.Tensor) else argument


class Offline:
    """Stands where Triton's driver is, for a process that compiles and launches nothing."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        """What is compiled for."""
        return self.target

    def get_current_device(self):
        """Triton keeps what it compiled by device: one for each target."""
        return str(self.target)

    def get_current_stream(self, _device):
        """None is needed."""
        return 0


def specialisation(job):
    """The text by which Triton tells compiled versions of a kernel apart: types, alignments, constants, options."""
    from triton import knobs
    keys = []

    def stop(*, key, **_):
        keys.append(key)
        return True

    knobs.runtime.jit_cache_hook = stop
    try:
        job.warmup()
    finally:
        knobs.runtime.jit_cache_hook = None
    return keys[0]


def compile_job(job):
    """What the report records of one compiled kernel, or {"failed": why}; "cpu_seconds" counts the tools it ran too."""
    began = _cpu_seconds()
    with _compiler_output() as output:
        try:
            found = examine(job.warmup(), job.target)
        except Exception as error:  # noqa: BLE001  whatever stops a compilation is the row's content
            output.seek(0)
            said = re.findall(r"Assertion .*|(?:error|Pipeline failed).{,200}", output.read().decode(errors="replace"))
            found = {"failed": " ".join(f"{type(error).__name__}: {error} {'; '.join(said[:3])}".split())[:1000]}
    return found | {"cpu_seconds": round(_cpu_seconds() - began, 2)}


@contextlib.contextmanager
def _compiler_output():
    """A file with what is written to the process's standard error: where LLVM says what is wrong."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(before, 2)
            os.close(before)


def _cpu_seconds():
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def examine(compiled, target):
    """Registers, memory, instruction counts and occupancy of a compiled kernel, as a dict."""
    limits = code.TARGETS[target]
    if limits.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        found = code.parse_gcn_metadata(assembly) | code.summary(code.parse_gcn(assembly))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            found = code.parse_usage(_cuobjdump("-res-usage", file.name))
            found |= code.summary(code.parse_sass(_cuobjdump("-sass", file.name)))
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return found | {
        "shared": shared, "num_warps": num_warps, "tensor_memory_columns": columns,
        "dots": sorted(dot_types(compiled.asm["ttir"])),
        "blocks_per_sm": code.occupancy(target, found["registers"], shared, num_warps, columns),
    }


def dot_types(ttir):
    """The element types of the matrix products that the kernel's source asks for, e.g. {"bf16"}."""
    return set(re.findall(r"\btt\.dot\b.*?: tensor<[\dx]*x([a-z]+\d+)\b", ttir))


def _cuobjdump(option, path):
    import triton
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def compile_all(jobs, workers, progress):
    """[what `compile_job` found, per job], by `workers` processes, with a compiler cache of this run alone.

    A job that takes its process down (LLVM ends it on an internal error) is tried once more, by itself.
    """
    with tempfile.TemporaryDirectory(prefix="difuse-kernels-", ignore_cleanup_errors=True) as folder:
        def pool(size):
            return ProcessPoolExecutor(size, multiprocessing.get_context("spawn"), _prepare, (folder,))

        with pool(workers) as together:
            futures = [together.submit(compile_job, job) for job in jobs]
            for _ in progress(as_completed(futures), total=len(jobs)):
                pass
        return [_alone(pool, job) if isinstance(future.exception(), BrokenProcessPool) else future.result()
                for job, future in zip(jobs, futures, strict=True)]


def _alone(pool, job):
    with pool(1) as single:
        try:
            return single.submit(compile_job, job).result()
        except BrokenProcessPool:
            return {"failed": "the compiler ended its process", "cpu_seconds": 0.0}


def _prepare(cache_folder):
    os.environ["TRITON_CACHE_DIR"] = cache_folder  # read when the first job imports Triton
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """A killed report would leave its workers waiting for jobs for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
