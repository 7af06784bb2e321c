"""What only a GPU shows: production shapes, a hundred repetitions, streams, devices, graphs, the memory checker.

Skipped where there is none. `make gpu` runs it; its dry run sets DIFUSE_GPU_DRY_RUN=1, and a few tiny cases then run
here on emulated kernels, with stand-ins for streams and graphs, so that no line meets the hardware unrun.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import difuse_kernels
from benchmarks.bench_ops import ONE_ROW
from benchmarks.gpu_cases import drawn_once, on_gpus, production
from benchmarks.gpu_ceilings import kernel_backends
from benchmarks.gpu_device import DryRun, Gpu
from difuse_kernels import explain_reset
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Maker, outgoing
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import check_case
from difuse_kernels.triton_launch import INTERPRETED

DRY = os.environ.get("DIFUSE_GPU_DRY_RUN") == "1"
HERE = torch.cuda.is_available() and not INTERPRETED
pytestmark = pytest.mark.skipif(not HERE and not DRY, reason="no GPU here; make gpu-dry runs this file on stand-ins")

DEVICE = DryRun() if DRY else Gpu()
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
REPEATS = 2 if DRY else 100
DRY_OPS = ("norm_modulate", "sampler_step")


def kernels(case):
    """The GPU backends of the case's op here; one placeholder where there is no GPU, so that the skip is seen."""
    return (HERE or DRY) and kernel_backends(case.op) or ["none"]


def each(chosen):
    chosen = [case for case in (on_gpus(ONE_ROW if DRY else chosen)) if not DRY or case.op in DRY_OPS]
    return [pytest.param(case, backend, id=f"{case}-{backend}") for case in chosen for backend in kernels(case)]


def first_speed_cases():
    return [cases(op, speed=True)[0] if cases(op, speed=True) else cases(op)[0] for op in OPS]


class Call:
    """One case on one backend, forward and backward, on inputs that stay where they are."""

    def __init__(self, case, backend, dtype=torch.bfloat16, device=DEVICE.name):
        self.make = Maker(dtype, device=device)
        self.args, self.kwargs = drawn_once(case, device).build(self.make)
        self.op, self.backend = getattr(difuse_kernels, case.op), backend
        self.leaves = [leaf for leaf in self.make.leaves.values() if leaf.requires_grad]
        self.incoming = [outgoing(out, case.grad, seed=100 * (i + 1)) for i, out in enumerate(self.outputs())]

    def outputs(self):
        results = self.op(*self.args, **self.kwargs, backend=self.backend)
        return results if isinstance(results, tuple) else (results,)

    def __call__(self):
        outputs = self.outputs()
        gradients = torch.autograd.grad(outputs, self.leaves, self.incoming, allow_unused=True)
        return [t.detach() for t in (*outputs, *gradients) if t is not None]


def same_bits(a, b):
    integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


@pytest.mark.parametrize("case, backend", each(first_speed_cases()))
def test_the_same_bits_a_hundred_times(case, backend):
    call = Call(case, backend)
    first = call()
    for repeat in range(REPEATS):
        assert all(map(same_bits, first, call())), f"repeat {repeat} differs"


@pytest.mark.parametrize("case, backend", each(first_speed_cases()))
def test_kernels_run_on_the_current_stream(case, backend):
    """Inputs get their values late, on a stream of their own: a kernel on another stream would read zeros."""
    call = Call(case, backend)
    expected, values = call(), [leaf.detach().clone() for leaf in call.leaves]
    with torch.no_grad():
        for leaf in call.leaves:
            leaf.zero_()
    DEVICE.synchronize()
    with DEVICE.side_stream():
        DEVICE.delay(0.02)
        with torch.no_grad():
            for leaf, value in zip(call.leaves, values, strict=True):
                leaf.copy_(value)
        found = call()
    DEVICE.synchronize()
    assert all(map(same_bits, expected, found))


@pytest.mark.parametrize("case, backend", each(first_speed_cases()))
def test_a_captured_graph_reads_new_values(case, backend):
    call = Call(case, backend)
    with torch.no_grad():
        replay, results = DEVICE.capture(lambda: list(call.outputs()))
        for seed in (1, 2):
            generator = torch.Generator(DEVICE.name).manual_seed(seed)
            for leaf in call.leaves:
                leaf.copy_(torch.randn(leaf.shape, generator=generator, device=DEVICE.name))
            replay()
            assert all(map(same_bits, results, call.outputs()))


@pytest.mark.parametrize("case, backend", each(first_speed_cases()))
def test_tensors_on_a_device_that_is_not_current(case, backend):
    if DRY or torch.cuda.device_count() < 2:
        pytest.skip("one GPU, or none: no other device to be on")
    expected = Call(case, backend, device="cuda:0")()
    other = Call(case, backend, device="cuda:1")
    with torch.no_grad():
        for mine, theirs in zip(other.leaves, Call(case, backend, device="cuda:0").leaves, strict=True):
            mine.copy_(theirs)
    assert torch.cuda.current_device() == 0
    assert all(same_bits(a, b.to("cuda:0")) for a, b in zip(expected, other(), strict=True))


@pytest.mark.parametrize("case", [case for case in on_gpus(ONE_ROW) if not DRY])
def test_auto_takes_the_gpus_kernels(case):
    """CUDA C++ where there is one, else Triton; never the reference."""
    explain_reset()
    Call(case, "auto")()
    assert {backend for backend, _ in OPS[case.op].chosen} == {kernel_backends(case.op)[0]}


CHECKED = """
import sys, torch
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import backends_here, device_of, run
import difuse_kernels
ran = 0
for case in cases():
    if case.name in sys.argv[1:] and "cuda" in backends_here(case.op):
        for dtype in (torch.float32, torch.bfloat16):
            run(getattr(difuse_kernels, case.op), case, dtype, device=device_of("cuda"), backend="cuda")
            ran += 1
if torch.cuda.is_available():
    torch.cuda.synchronize()
print("ran", ran)
"""


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"][: 1 if DRY else 2])
def test_compute_sanitizer_finds_nothing(tool):
    """Odd and strided cases of the CUDA C++ kernels, every tensor an allocation of its own."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if not program and not DRY:
        pytest.skip("compute-sanitizer is not installed")
    checker = [program, "--tool", tool, "--error-exitcode", "9"] if not DRY else []
    if checker and tool == "memcheck":  # torch asks for things that may fail, and goes on
        checker += ["--report-api-errors", "no"]
    code = "from tests import conftest\n" + CHECKED if DRY else CHECKED
    names = ["gradcheck"] if DRY else ["odd", "strided", "narrow", "gradcheck", "noise"]
    try:
        done = subprocess.run([*checker, sys.executable, "-c", code, *names], cwd=Path(__file__).parents[1],
                              env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
                              timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} is not through after 60 s")
    said = done.stdout + done.stderr
    ran = re.search(r"^ran [1-9]", done.stdout, re.MULTILINE)
    if "not supported" in said and not ran:
        pytest.skip(f"compute-sanitizer does not work on this machine: {said.strip().splitlines()[-1]}")
    assert done.returncode == 0, said[-4000:]
    assert ran, "no CUDA kernel ran"


# the longest come last: a run that is cut has seen the rest
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case, backend", each(cases(speed=True)))
def test_error_budget_of_speed_cases(case, backend, dtype):
    for line in check_case(drawn_once(case, DEVICE.name), dtype, backend):
        assert line.ok and (line.largest > 0 or line.size == 0), f"{line}: beyond 1.5 x eager's error"


@pytest.mark.parametrize("case, backend", each([c for c in production() if not c.op.startswith("attention")]))
def test_error_budget_of_production_calls(case, backend):
    """Attention's are left to the benchmarks: in float64 each takes tens of gigabytes."""
    for line in check_case(drawn_once(case, DEVICE.name), torch.bfloat16, backend):
        assert line.ok and line.largest > 0, f"{line}: beyond 1.5 x eager's error"
