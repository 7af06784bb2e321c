"""What the GPU can do at best, in the same run as everything else: copies, matrix products, calls that do nothing."""
import functools

import torch
import torch.nn.functional as F

import difuse_kernels
from benchmarks.bench_ops import ONE_ROW, OVERHEAD, first_shape
from benchmarks.gpu_cases import on_gpus
from benchmarks.gpu_device import QueuedClock, host_clock
from benchmarks.gpu_plan import Job
from benchmarks.timing import interleaved, versus
from difuse_kernels.dispatch import OPS, ORDER
from difuse_kernels.testing.case import Maker
from difuse_kernels.testing.eager import EAGER
from difuse_kernels.testing.numerics import backends_here

BUFFER = 4 << 30  # bytes, 70 times the L2 of an H200
GEMM = 8192
KERNELS = ("triton", "cuda")


def jobs(device):
    """The ceilings, then what one call of each op costs the host."""
    return [Job("ceilings", "ceilings", functools.partial(ceilings, device), "ceilings", cap=90),
            *(Job("ceilings", f"overhead {case.op}", functools.partial(overhead, device, case), "ceilings")
              for case in on_gpus(ONE_ROW))]


def ceilings(device):
    """One row: bytes/s of a copy (read plus written, random data), FLOP/s of a square product per dtype.

    Raises RuntimeError, after that, if a backend that is written for GPUs cannot run: nothing else would say so.
    """
    size, n = (1 << 16, 64) if device.dry else (BUFFER, GEMM)
    options = device.timing(15, 2e-3, QueuedClock(device))
    source = torch.randn(size // 4, device=device.name)
    copy = functools.partial(torch.empty_like(source).copy_, source)
    seconds = interleaved({"copy": copy}, **options)["copy"].seconds
    measured = {"buffer_bytes": size, "gemm_size": n, "copy_bytes_per_second": 2 * size / seconds}
    del copy, source
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):  # fp32 without TF32, as torch's default
        a, b = (torch.randn(n, n, device=device.name).to(dtype) for _ in range(2))
        seconds = interleaved({"gemm": lambda a=a, b=b: F.linear(a, b)}, **options)["gemm"].seconds
        measured[f"gemm_{name}_flops_per_second"] = 2 * n**3 / seconds
    yield {"group": "ceilings", "ceilings": measured}
    reasons = {backend: op.missing(backend) for op in OPS.values() for backend in op.backends if backend in KERNELS}
    if any(reasons.values()):
        raise RuntimeError("; ".join(f"backend {name}: {reason}" for name, reason in reasons.items() if reason))


def kernel_backends(op):
    """The GPU backends of an op that can run here, the one that "auto" takes first."""
    here = backends_here(op)
    return [name for name in ORDER["cuda"] if name in KERNELS and name in here]


def overhead(device, case):
    """One row: host seconds of an asynchronous call on almost no data, each backend beside eager PyTorch."""
    backends = kernel_backends(case.op)
    if not backends:
        return
    args, kwargs = case.build(Maker(torch.bfloat16, device=device.name))
    op, eager = getattr(difuse_kernels, case.op), EAGER[case.op]
    calls = {"difuse" if backend is backends[0] else backend: functools.partial(op, *args, backend=backend, **kwargs)
             for backend in backends} | {"eager": functools.partial(eager, *args, **kwargs)}
    with torch.no_grad():
        times = versus(calls, **device.timing(31, 1e-3, host_clock(device)))
    yield {"group": "overhead", "op": case.op, "case": case.name, "dtype": "bf16", "pass": OVERHEAD,
           "shape": first_shape(case), "backend": backends[0]} | times
