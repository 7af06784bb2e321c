"""Every op x available backend x named case against the five numerics promises (difuse_kernels/testing/numerics.py)."""
import os
from contextlib import nullcontext

import pytest
import torch

import difuse_kernels
from difuse_kernels import native_cuda, triton_launch
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Maker
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.interpreter import programs_backwards
from difuse_kernels.testing.numerics import backends_here, check_case, device_of, run
from difuse_kernels.triton_launch import INTERPRETED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FENCE = 64  # elements on either side of every output
SENTINEL = 12345.0

every_case = pytest.mark.parametrize("case", cases(), ids=str)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def kernels(case):
    """The kernel backends of the case's op on this machine; with none, one placeholder that skips in sight."""
    here = [name for name in backends_here(case.op) if name != "reference" and name not in case.refused_by]
    return here or ["none built here"]


each_kernel = pytest.mark.parametrize(
    "case, backend", [pytest.param(c, b, id=f"{c}-{b}") for c in cases() for b in kernels(c)])


def each_kernel_in(*names, interpreted):
    """Case x kernel x dtype; in the interpreter, a thousand times slower, what no dtype changes is asked in one."""
    return pytest.mark.parametrize("case, backend, dtype", [
        pytest.param(c, b, DTYPES[name], id=f"{c}-{b}-{name}") for c in cases() for b in kernels(c)
        for name in ((interpreted,) if b == "triton" and INTERPRETED else names)])


def same_bits(a, b):
    """Bitwise equality: also of nans and signed zeros."""
    integers = {4: torch.int32, 2: torch.int16, 8: torch.int64}[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(integers), b.contiguous().view(integers))


def require(backend):
    if backend == "none built here":
        pytest.skip("the native module is not built")


@every_dtype
@each_kernel
def test_error_budget(case, backend, dtype):
    require(backend)
    lines = check_case(case, dtype, backend)
    assert lines
    for line in lines:
        assert line.ok, f"{line}: beyond 1.5 x eager's error"
    for line in lines:  # comparing zeros would prove nothing
        assert line.largest > 0 or line.size == 0 or not line.name.startswith("out") or case.name.endswith("zeros")


@each_kernel_in(*DTYPES, interpreted="fp32")
def test_bit_determinism(case, backend, dtype):
    require(backend)
    op, device = getattr(difuse_kernels, case.op), device_of(backend)
    outputs, grads = run(op, case, dtype, device=device, backend=backend)

    def same_again():
        again, grads_again = run(op, case, dtype, device=device, backend=backend)
        assert all(map(same_bits, outputs, again))
        assert all(same_bits(grads[name], grads_again[name]) for name in grads)

    if backend == "triton" and INTERPRETED:  # programs run one after another: any other order must do
        with programs_backwards():
            same_again()
        return
    if backend == "cuda" and native_cuda.ext.emulated:  # so do blocks, and threads as far as they wait for each other
        native_cuda.ext.reverse(True)
        try:
            same_again()
        finally:
            native_cuda.ext.reverse(os.environ.get("DIFUSE_EMULATED_REVERSE") == "1")
    threads = torch.get_num_threads()
    try:
        for count in (threads, 1, 3):  # the same bits again, and on any number of threads
            torch.set_num_threads(count)
            same_again()
    finally:
        torch.set_num_threads(threads)


@each_kernel_in("fp32", "bf16", interpreted="fp32")
def test_batch_invariance(case, backend, dtype):
    require(backend)
    op, device = getattr(difuse_kernels, case.op), device_of(backend)
    outputs, grads = run(op, case, dtype, device=device, backend=backend)
    make = Maker(dtype)
    case.build(make)
    for b in range(outputs[0].shape[0]):
        alone, grads_alone = run(op, case, dtype, only=b, device=device, backend=backend)
        assert all(same_bits(whole[b : b + 1], single) for whole, single in zip(outputs, alone, strict=True))
        for name in grads:
            if name not in make.shared:
                assert same_bits(grads[name][b : b + 1], grads_alone[name]), f"gradient of {name}, sample {b}"


@pytest.fixture
def fenced(monkeypatch):
    """torch.empty hands out NaN-filled memory between sentinels; returns a function that checks the fences."""
    buffers = []
    empty = torch.empty

    def fenced_empty(*size, dtype=None, **keywords):
        size = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        dtype = dtype or torch.get_default_dtype()
        if not dtype.is_floating_point:
            return empty(size, dtype=dtype, **keywords)
        count = torch.Size(size).numel()
        buffer = torch.full((count + 2 * FENCE,), SENTINEL, dtype=dtype, **keywords)
        buffer[FENCE : FENCE + count] = float("nan")
        buffers.append(buffer)
        return buffer[FENCE : FENCE + count].view(size)

    monkeypatch.setattr(torch, "empty", fenced_empty)
    monkeypatch.setattr(torch, "empty_like", lambda t, dtype=None, memory_format=None: fenced_empty(
        t.shape, dtype=dtype or t.dtype, device=t.device))

    def check():
        assert buffers, "the launcher did not allocate with torch.empty"
        for buffer in buffers:
            assert (buffer[:FENCE] == buffer[0]).all() and (buffer[-FENCE:] == buffer[0]).all()
            assert buffer[0] == torch.tensor(SENTINEL, dtype=buffer.dtype)

    return check


@each_kernel_in("fp32", "bf16", interpreted="bf16")
def test_outputs_written_and_fences_intact(case, backend, dtype, fenced):
    require(backend)
    order = programs_backwards() if backend == "triton" and INTERPRETED else nullcontext()  # in order: the tests above
    with order:
        outputs, grads = run(getattr(difuse_kernels, case.op), case, dtype, device=device_of(backend), backend=backend)
    fenced()
    for name, tensor in [*((f"out{i}", out) for i, out in enumerate(outputs)), *grads.items()]:
        assert torch.isfinite(tensor).all(), f"{name} was not fully written"
    last = case.op == "group_norm_act" and case.name.startswith("channels_last")  # memory formats that are kept
    assert all((out.movedim(1, -1) if last else out).is_contiguous() for out in outputs)
    expected = run(getattr(difuse_kernels, case.op), case, dtype, grads=False, backend="reference")[0]
    assert [out.dtype for out in outputs] == [out.dtype for out in expected]


FURTHER = {"lengths_bias", "bias", "grouped", "per_token", "affine", "wan", "ltx", "qwen", "image_first", "odd",
           "tables_per_token"}


@pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")
@pytest.mark.parametrize("case, architecture", [
    pytest.param(c, name, id=f"{c}-{name}") for c in cases() for name in ("sm_80", "sm_90", "gfx942")
    if "triton" in OPS[c.op].backends and (c is cases(c.op)[0] or (name == "sm_90" and c.name in FURTHER))])
def test_configurations_of_gpus_in_the_interpreter(case, architecture, monkeypatch):
    """The blocks that hardware will run; elsewhere the interpreter has blocks of its own."""
    if "triton" not in backends_here(case.op):
        pytest.skip("triton is not installed")
    monkeypatch.setattr(triton_launch, "interpreted_as", architecture)
    for line in check_case(case, torch.bfloat16, "triton"):
        assert line.ok, f"{line}: beyond 1.5 x eager's error"


EXACT = ("gradcheck", "odd", "per_token", "narrow", "tables", "tables_per_token")


@pytest.mark.parametrize("case", [c for c in cases() if c.name in EXACT], ids=str)
def test_reference_gradcheck(case):
    make = Maker(torch.float64, work=torch.float64)
    args, kwargs = case.build(make)
    leaves = [leaf for leaf in make.leaves.values() if leaf.requires_grad]
    assert leaves

    def call(*values):
        replay = Maker(torch.float64, work=torch.float64)
        values = dict(zip((n for n, leaf in make.leaves.items() if leaf.requires_grad), values, strict=True))

        def take(name, *shape, **options):
            return values[name] if name in values else Maker.__call__(replay, name, *shape, **options)

        take.constant = replay.constant
        args, kwargs = case.build(take)
        return getattr(difuse_kernels, case.op)(*args, **kwargs, backend="reference")

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@every_case
def test_backward_twice_is_refused_not_wrong(case):
    """Kernels have no second derivative: asking for one raises; it never returns a detached zero."""
    if case.grad != "dense" or "cpu" not in backends_here(case.op):
        pytest.skip("one layout is enough" if case.grad != "dense" else "the native module is not built")
    make = Maker(torch.float32)
    args, kwargs = case.build(make)
    outputs = getattr(difuse_kernels, case.op)(*args, **kwargs, backend="cpu")
    output = outputs[-1] if isinstance(outputs, tuple) else outputs
    leaf = next(leaf for leaf in make.leaves.values() if leaf.requires_grad)
    (grad,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate"):
        torch.autograd.grad(grad.square().sum(), leaf)
