"""What runs CUDA kernels without a GPU: small kernels, right ones and wrong ones, of tests/emulation/probe.cu."""
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from tests.emulation import build

ROOT = build.ROOT
SOURCES = [ROOT / "csrc/common/device_cuda.cu", ROOT / "tests/emulation/probe.cu"]
pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "")
both_orders = pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])


@pytest.fixture(scope="session")
def library():
    return build.Library(build.build("probe", ROOT / "build" / f"{build.FOLDER}_probe", SOURCES))


@pytest.fixture
def probe(library):
    library.reverse(False)
    yield library
    library.reverse(False)


@both_orders
def test_every_thread_runs_once_and_knows_its_place(probe, backwards):
    probe.reverse(backwards)
    out = torch.full((5, 4, 3, 16, 6), -1, dtype=torch.int32)
    probe.numbers(out, 5, 16, 3, 4)
    block, z, y, x = torch.meshgrid(*(torch.arange(n) for n in out.shape[:4]), indexing="ij")
    expected = torch.stack([x, y, z, block, torch.full_like(x, 16), torch.full_like(x, 5)], dim=-1)
    assert torch.equal(out, expected.int())


@both_orders
def test_order_of_threads_and_blocks(probe, backwards):
    probe.reverse(backwards)
    out = torch.full((2,), -1, dtype=torch.int32)
    probe.last_thread(out, 3, 96)
    assert out.tolist() == ([0, 0] if backwards else [2, 95])


@both_orders
@pytest.mark.parametrize("threads", [32, 64, 256, 1024])
def test_barriers_and_shared_memory(probe, threads, backwards):
    probe.reverse(backwards)
    x = torch.randint(-1000, 1000, (7, threads))
    ints, floats = torch.zeros(7, dtype=torch.int32), torch.zeros(7)
    probe.sum_int(x.int(), ints, 7, threads)
    probe.sum(x.float(), floats, 7, threads)
    assert torch.equal(ints, x.sum(1).int()) and torch.equal(floats, x.sum(1).float())


@both_orders
@pytest.mark.parametrize("threads", [1, 7, 33, 1000])
def test_dynamic_shared_memory(probe, threads, backwards):
    probe.reverse(backwards)
    x, out = torch.randn(threads), torch.zeros(threads)
    probe.turn(x, out, threads)
    assert torch.equal(out, x.flip(0))


def source_of(lane, kind, by, width):
    """The lane that a shuffle reads, as CUDA's programming guide has it."""
    begin = lane // width * width
    if kind == "index":
        return begin + by % width
    source = {"up": lane - by, "down": lane + by, "xor": lane ^ by}[kind]
    outside = source < begin if kind == "up" else source >= begin + width
    return lane if outside else source


@both_orders
@pytest.mark.parametrize("width", [1, 2, 8, 32])
@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
def test_shuffles(probe, kind, width, backwards):
    probe.reverse(backwards)
    number = ["index", "up", "down", "xor"].index(kind)
    for by in (0, 1, 3, 16, 31):
        expected = [t // 32 * 32 + source_of(t % 32, kind, by, width) for t in range(96)]
        for dtype, function in ((torch.float32, probe.shuffle), (torch.int64, probe.shuffle_long)):
            x = torch.arange(96, dtype=dtype) * (1 << 40 if dtype == torch.int64 else 1)
            out = torch.zeros_like(x)
            function(x, out, 96, number, by, width)
            assert torch.equal(out, x[expected])


@both_orders
def test_votes_and_masks(probe, backwards):
    probe.reverse(backwards)
    yes = torch.zeros(96, dtype=torch.int32)
    yes[[3, 31]], yes[64:] = 5, 1
    out = torch.zeros(2, 96, dtype=torch.int32)
    probe.votes(yes, out, 96)
    ballots = torch.tensor([(1 << 31) + (1 << 3), 0, (1 << 32) - 1], dtype=torch.int64)
    assert torch.equal(out[0].long() & 0xffffffff, ballots.repeat_interleave(32))
    assert torch.equal(out[1], torch.tensor([2, 0, 3]).repeat_interleave(32).int())

    x = torch.randn(64)
    halves = torch.zeros(64)
    probe.halves(x, halves, 64)
    x = x.view(2, 2, 16)
    torch.testing.assert_close(halves.view(2, 2, 16)[:, 0], x[:, 0].sum(1, keepdim=True).expand(2, 16))
    assert torch.equal(halves.view(2, 2, 16)[:, 1], x[:, 1].amax(1, keepdim=True).expand(2, 16))


def test_reductions_do_not_depend_on_the_order(probe):
    x, forwards, backwards = torch.randn(1024), torch.zeros(1024), torch.zeros(1024)
    probe.sums(x, forwards, 1024)
    probe.reverse(True)
    probe.sums(x, backwards, 1024)
    assert torch.equal(forwards, backwards)
    torch.testing.assert_close(forwards.view(32, 32), x.view(32, 32).sum(1, keepdim=True).expand(32, 32))


# --- conversions -----------------------------------------------------------------------------------------------------
def every_value(dtype):
    return torch.arange(-2**15, 2**15).to(torch.int16).view(dtype)


def bits(tensor):
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


each_short = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@each_short
def test_widening(probe, dtype):
    x = every_value(dtype)
    out = torch.zeros(2**16)
    getattr(probe, f"from_{str(dtype)[6:]}")(x, out, 256)
    number = ~x.isnan()
    assert torch.equal(bits(out)[number], bits(x.float())[number]) and out[~number].isnan().all()


@each_short
def test_rounding(probe, dtype):
    """Every value, the middle to its neighbour, a unit of float32 to either side of that, and anything at all."""
    values = every_value(dtype).float()
    values = values[values.isfinite()].double().unique()
    largest = values[-1:] + (values[-1:] - values[-2:-1])  # where infinity would be
    ties = (torch.cat([values, largest])[1:] + values).div(2).float()
    infinity = torch.tensor(float("inf"))
    random = torch.randint(-2**31, 2**31, (2**18,), generator=torch.Generator().manual_seed(0))
    random = random.int().view(torch.float32)
    x = torch.cat([values.float(), ties, ties.nextafter(infinity), ties.nextafter(-infinity), random,
                   torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])])
    x = torch.cat([x, -x])
    x = torch.cat([x, x.new_zeros(-len(x) % 256)])
    out = torch.zeros(len(x), dtype=dtype)
    getattr(probe, f"to_{str(dtype)[6:]}")(x, out, len(x) // 256)
    number = ~x.isnan()
    assert torch.equal(bits(out)[number], bits(x.to(dtype))[number])
    assert (bits(out)[~number] == 0x7fff).all()  # as on GPUs


# --- faults ----------------------------------------------------------------------------------------------------------
FAULTS = {  # what -> (call, what is said)
    "returned before a barrier": (lambda p, out: p.early_return(64, 40), r"early_return, block 0: thread 0 waits at "
                                  r"__syncthreads \(probe.cu:\d+\) for all threads, but thread 40 has returned"),
    "a whole warp returned": (lambda p, out: p.early_return(64, 32), "but thread 32 has returned"),
    "two barriers": (lambda p, out: p.two_barriers(32), "thread 0 waits at __syncthreads .* but thread 32 waits at "
                     "__syncthreads"),
    "two barriers in a warp": (lambda p, out: p.two_barriers(5), "but thread 5 waits at __syncthreads"),
    "barrier or shuffle": (lambda p, out: p.barrier_or_shuffle(), r"thread 16 waits at __shfl_xor_sync \(cuda.h:\d+\) "
                           r"for all lanes, but thread 0 waits at __syncthreads \(probe.cu:\d+\)"),
    "returned before a shuffle": (lambda p, out: p.gone_lanes(out), "for all lanes, but thread 7 has returned"),
    "part of a warp": (lambda p, out: p.short_warp(out), "thread 32 waits .* but lane 16 of its warp does not exist"),
    "a lane outside the mask": (lambda p, out: p.outside_mask(out), "reads lane 20, which its mask does not name"),
    "not in its own mask": (lambda p, out: p.not_in_mask(out), "thread 16 is not in its own mask"),
    "a width of 12": (lambda p, out: p.odd_width(out), "for width 12"),
    "an exception": (lambda p, out: p.throwing(40), "thrown by the kernel"),
    "a global store to dynamic shared memory": (lambda p, out: p.store_to_dynamic(),
                                                "thread 0 stores to shared memory by an instruction for global"),
    "too many threads": (lambda p, out: p.turn(out, out, 1025), "turn, block 0: could not be launched with 1025 "
                         "threads"),
    "too much shared memory": (lambda p, out: p.beyond_shared(48 * 1024 + 1, 0), "and 49153 bytes of shared memory"),
}


@pytest.mark.skipif(build.SANITIZED, reason="static memory is then anywhere")
def test_a_global_store_to_static_shared_memory_is_found(probe):
    with pytest.raises(RuntimeError, match="thread 0 stores to shared memory by an instruction for global memory"):
        probe.store_to_shared()


@pytest.mark.parametrize("error, device, stream, words", [
    (9, 0, 0, "probe could not be launched on cuda:0: cudaErrorInvalidConfiguration, invalid configuration argument$"),
    (209, 0, 0, "This build holds emulated; reinstall with an nvcc that knows the GPU"),
    (400, 1, 64, "on cuda:1.*The stream belongs to cuda:0, the tensors do not; use a stream of their device"),
    (400, 0, 64, "on cuda:0: cudaError, an emulated error$")])
def test_a_failed_launch_says_why(probe, error, device, stream, words):
    with pytest.raises(RuntimeError, match=words):
        probe.refusal(error, device, stream)


@pytest.mark.parametrize("what", FAULTS)
def test_faults_are_found_and_survived(probe, what):
    call, message = FAULTS[what]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            call(probe, torch.zeros(64))
        x, out = torch.ones(3, 256), torch.zeros(3)
        probe.sum(x, out, 3, 256)
        assert out.tolist() == [256] * 3


@pytest.mark.skipif(build.SANITIZED, reason="ends the process")
def test_writing_beyond_dynamic_shared_memory(probe):
    probe.beyond_shared(16, 15)
    with pytest.raises(RuntimeError, match="wrote beyond its 16 bytes of dynamic shared memory"):
        probe.beyond_shared(16, 16)


@pytest.mark.parametrize("kind", [pytest.param("static", marks=pytest.mark.skipif(
    build.SANITIZED, reason="static memory then lies between red zones")), "dynamic"])
def test_shared_memory_is_nan_at_first_in_every_block(probe, kind):
    out = torch.zeros(64)
    probe.unwritten(out, kind == "dynamic")  # by the second of two blocks; the first has written
    assert out.isnan().all()


@pytest.mark.skipif(build.SANITIZED, reason="static memory then lies between red zones")
@pytest.mark.parametrize("towards", [1, -1, 32, -32])
def test_a_missing_barrier_shows_in_one_order_or_the_other(probe, towards):
    """Between lanes and between warps, whichever reads the other's."""
    found = []
    for backwards in (False, True):
        probe.reverse(backwards)
        out = torch.zeros(128)
        probe.missing_barrier(out, 128, towards)
        found.append(int(out.isnan().sum()))
    assert max(found) > 64


def test_overwriting_what_another_warp_has_not_read_shows(probe):
    out = torch.zeros(2, 64)
    probe.missing_second_barrier(out)
    assert not torch.equal(out, torch.tensor([[0.0], [1.0]]).expand(2, 64))


def test_launches_from_several_threads(probe):
    x = torch.randn(4, 50, 256)
    out = torch.zeros(4, 50)

    def work(i):
        for _ in range(20):
            probe.sum(x[i], out[i], 50, 256)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(out, x.sum(-1))


# --- make sanitize ---------------------------------------------------------------------------------------------------
SANITIZED_CALLS = {  # call -> what the sanitizers say, or "" for nothing
    "p.sum(torch.ones(3, 256), torch.zeros(3), 3, 256)": "",
    "survives(lambda: p.early_return(64, 40))": "",
    "p.outside(torch.zeros(100), 99, 0)": "",
    "p.outside(torch.zeros(100), 100, 0)": "heap-buffer-overflow",
    "p.outside(torch.zeros(100), 0, 100)": "heap-buffer-overflow",
    "p.beyond_shared(20, 20)": "use-after-poison",
    "p.copy(torch.zeros(512).bfloat16(), torch.zeros(256).bfloat16(), 32, 0)": "",
    "p.copy(torch.zeros(512).bfloat16(), torch.zeros(256).bfloat16(), 32, 4)": "misaligned address",
}


@pytest.mark.slow
@pytest.mark.skipif(build.SANITIZED, reason="runs in the other build")
def test_sanitizers_find_what_is_out_of_bounds_or_misaligned():
    """One element beyond a tensor, read or written, and a 16-byte access that is off by 8.

    Each in a process of its own, since the first finding ends it.
    """
    code = f"""
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.emulation import build
sources = [Path(s) for s in {[str(s) for s in SOURCES]!r}]
p = build.Library(build.build("probe", build.ROOT / "build" / "sanitized_probe", sources))

def survives(fault):
    try:
        fault()
    except RuntimeError:
        p.sum(torch.ones(3, 256), torch.zeros(3), 3, 256)
    else:
        raise AssertionError("no fault was found")

for i, call in enumerate({list(SANITIZED_CALLS)!r}):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{{sys.argv[1]}}/{{i}}", os.O_WRONLY | os.O_CREAT), 2)
        eval(call)
        os._exit(0)
    print(os.waitpid(child, 0)[1])
"""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code, folder], env={**os.environ, **build.sanitizer_environment()},
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = [Path(folder, str(i)).read_text() for i in range(len(SANITIZED_CALLS))]
    for (call, message), status, text in zip(SANITIZED_CALLS.items(), done.stdout.split(), said, strict=True):
        assert (status == "0") == (message == "") and message in text, f"{call}: {text}"
