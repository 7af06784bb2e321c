"""Triton as a backend: why it cannot run, what is refused, the launch, the mended interpreter."""
import importlib.util
import os
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest
import torch

import difuse_kernels
from difuse_kernels import triton_launch
from difuse_kernels.dispatch import MISSING, OPS
from difuse_kernels.testing.case import Maker
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.interpreter import programs_backwards

triton_launch.missing()  # mends the interpreter, where it is used
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
interpreted = pytest.mark.skipif(not triton_launch.INTERPRETED or importlib.util.find_spec("triton") is None,
                                 reason="for the interpreter")
each_op = pytest.mark.parametrize("name", [name for name, op in OPS.items() if "triton" in op.backends])


def call(name, backend="triton", dtype=torch.float32):
    case = cases(name)[0]
    args, kwargs = case.build(Maker(dtype))
    return getattr(difuse_kernels, name)(*args, **kwargs, backend=backend)


def python(code, **environment):
    """stdout of a fresh interpreter, where Triton is not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_but_gelu_tanh_has_a_triton_backend():
    assert {name for name, op in OPS.items() if "triton" not in op.backends} == {"gelu_tanh"}


@each_op
def test_cpu_tensors_are_refused_with_the_reason(name, monkeypatch):
    """What an explicit backend="triton" says where there is no GPU and where the tensors are not on it."""
    missing = python(f"""
import torch
torch.cuda.is_available = lambda: False
from difuse_kernels.dispatch import OPS
print(OPS[{name!r}].missing("triton"))""")
    assert "torch sees no GPU" in missing or "triton is not installed" in missing
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    with pytest.raises(RuntimeError, match=f"{name}: backend 'triton' cannot run .*on cpu"):
        call(name)


def test_without_a_gpu_auto_never_loads_triton():
    out = python("""
import sys, torch, difuse_kernels
difuse_kernels.norm_modulate(torch.ones(1, 2, 8))
difuse_kernels.sampler_step([torch.ones(1, 2)], torch.ones(1, 1))
print("triton" in sys.modules)""")
    assert out.strip() == "False"


def test_no_triton_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(MISSING, "triton", triton_launch.missing.__wrapped__)
    monkeypatch.setattr(OPS["norm_modulate"], "_implementations", {})
    with pytest.raises(RuntimeError, match="triton: triton is not installed; pip install triton"):
        call("norm_modulate")
    assert call("norm_modulate", "auto").shape == (2, 65, 384)


@needs_triton
def test_an_old_triton_is_a_reason_not_an_error(monkeypatch):
    import triton
    monkeypatch.setattr(triton, "__version__", "3.2.0+git1")
    monkeypatch.setattr(triton_launch, "INTERPRETED", True)
    assert "triton 3.2.0+git1 is too old; the kernels are tested from 3.6 on" in triton_launch.missing.__wrapped__()


@needs_triton
def test_no_c_compiler_is_a_reason_not_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert "needs a C compiler and finds none; install gcc or clang, or set CC" in triton_launch.missing.__wrapped__()


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="here Triton does start")
def test_a_triton_that_does_not_start_is_a_reason_not_an_error(monkeypatch):
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_launch.missing.__wrapped__().startswith("Triton does not start: ")


@each_op
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_mixed_devices_are_named(name, device):
    case = cases(name)[0]
    make = Maker(torch.float32)
    args, kwargs = case.build(make)
    moved = [name for name in make.leaves][-1]
    if len(make.leaves) < 2 or device == "cpu":
        pytest.skip("one tensor, or nothing to move")
    replay = Maker(torch.float32)

    def take(key, *shape, **options):
        leaf = replay(key, *shape, **options)
        return leaf.to(device) if key == moved else leaf

    take.constant = replay.constant
    args, kwargs = case.build(take)
    with pytest.raises((ValueError, RuntimeError), match="inputs are on|is on meta|on another device"):
        getattr(difuse_kernels, name)(*args, **kwargs, backend="triton")


@dataclass(frozen=True)
class Config:
    BLOCK: int = 16
    num_warps: int = 4
    num_stages: int = 2


class Kernel:
    """Stands in for a Triton kernel: records how it was launched."""

    def __init__(self):
        self.calls, self.inside, self.most = [], 0, 0

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.inside += 1
            self.most = max(self.most, self.inside)
            threading.Event().wait(0.002)
            self.calls.append((grid, arguments, constants))
            self.inside -= 1
        return run


@interpreted
def test_launch_passes_config_and_skips_empty_grids():
    kernel, x = Kernel(), torch.ones(3)
    triton_launch.launch(kernel, (0, 4), x, 3, config=Config(), FLAG=True)
    triton_launch.launch(kernel, (2, 4), x, 3, config=Config(), FLAG=True)
    assert kernel.calls == [((2, 4), (x, 3), {"FLAG": True, "BLOCK": 16, "num_warps": 4, "num_stages": 2})]


@interpreted
def test_launches_of_many_threads_take_turns():
    kernel = Kernel()
    threads = [threading.Thread(target=triton_launch.launch, args=(kernel, (1,), torch.ones(1)),
                                kwargs={"config": Config()}) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernel.calls) == 8 and kernel.most == 1


def test_recording_runs_nothing_and_ends():
    kernel = Kernel()
    with triton_launch.recording("sm_90") as launches:
        assert triton_launch.architecture(torch.ones(1, device="meta")) == "sm_90"
        triton_launch.launch(kernel, (5,), torch.ones(1, device="meta"), config=Config())
    assert not kernel.calls
    assert launches[0].grid == (5,) and launches[0].constants["num_warps"] == 4
    with triton_launch.recording("gfx942") as again:
        assert again == []


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_interpreter_rounds_and_multiplies_as_a_gpu_does(dtype):
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(a, b, product, narrow, wide, N: tl.constexpr):
        at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        dot = tl.dot(tl.load(a + at), tl.load(b + at))
        tl.store(product + at, dot)
        tl.store(narrow + at, dot.to(narrow.dtype.element_ty))
        tl.store(wide + at, tl.load(narrow + at).to(tl.float32))

    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    a[0, 0] = float("nan")
    a[1, 1] = float("inf")
    product, wide, narrow = torch.empty(32, 32), torch.empty(32, 32), torch.empty(32, 32, dtype=dtype)
    kernel[(1,)](a, b, product, narrow, wide, 32)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(narrow, product.to(dtype), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)


@interpreted
def test_programs_backwards_visits_every_program_once():
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(out, count):
        seen = tl.load(count)
        tl.store(out + tl.program_id(0) * 3 + tl.program_id(1), seen)
        tl.store(count, seen + 1)

    out, count = torch.zeros(2, 3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with programs_backwards():
        kernel[(2, 3)](out, count)
    assert out.flatten().tolist() == [5, 4, 3, 2, 1, 0]
