"""What the hardware suite asks of a GPU, and stand-ins with which all of it runs on a CPU machine first."""
import contextlib
import subprocess
import time

import torch

from benchmarks import timing
from difuse.inference import graphs

NATIVE = "difuse_kernels._native_cuda"


class Gpu:
    """The current CUDA device."""

    name, dry = "cuda", False
    cycles_per_second = 2e9  # for delays, where a third more or less does not matter
    compile_ops = {"mode": "max-autotune-no-cudagraphs"}
    compile_models = {}  # the default mode
    sets_bytes = 256 << 20  # that rotating inputs span at least: four times an H200's L2

    def timing(self, runs, least, seconds):
        """Options of timing.interleaved."""
        return {"runs": runs, "least": least, "seconds": seconds}

    def prepare(self):
        """Once, before the time runs: what a run needs and may take long to build."""

    def install(self):
        """In the process that measures, before its first job."""

    def describe(self):
        """Name, memory, L2 and versions, for the report."""
        found = torch.cuda.get_device_properties(0)
        return {"gpu": found.name, "gpus": torch.cuda.device_count(), "memory_bytes": found.total_memory,
                "cache_bytes": found.L2_cache_size, "multiprocessors": found.multi_processor_count,
                "capability": f"sm_{found.major}{found.minor}", "cuda": torch.version.cuda}

    def synchronize(self):
        torch.cuda.synchronize()

    def delay(self, seconds):
        """Queue a kernel that waits."""
        torch.cuda._sleep(int(seconds * self.cycles_per_second))

    def side_stream(self):
        """A context in which another stream than the default one is current."""
        return torch.cuda.stream(torch.cuda.Stream())

    def elapsed(self, run, delay):
        """(device seconds, host seconds) of run(), between two events behind a kernel that waits `delay` seconds."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if delay:
            self.delay(delay)
        start.record()
        began = time.perf_counter()
        run()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3, host

    def capture(self, function):
        """(replay, results): one CUDA graph of function(), whose results every replay() writes anew."""
        results = []

        def run():
            results[:] = function()

        return graphs.record(run, torch.device(self.name, torch.cuda.current_device())), results

    def peak_bytes(self, function):
        """Most memory that function() holds at once beyond what is held before it."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def release(self):
        """Hand cached memory back, so that one job's peak is not another's shortage."""
        torch.cuda.empty_cache()


class DryRun(Gpu):
    """A CPU in the GPU's place: the host's clock for events, the function itself for a graph, no memory counted."""

    name, dry = "cpu", True
    compile_ops = compile_models = {"backend": "eager"}  # Dynamo without Inductor
    sets_bytes = 1

    def timing(self, runs, least, seconds):
        """As few runs as there can be a median of: Triton's interpreter takes a tenth of a second per call."""
        return {"runs": timing.RUNS, "least": 0, "seconds": seconds}

    def prepare(self):
        """The emulated CUDA kernels, which the tests run too."""
        from tests.emulation import build

        if build.missing() is None:
            build.load(NATIVE)

    def install(self):
        """Kernels emulated, difuse.Graphs calling the step again, one thread: on a busy machine they wait in turn."""
        self.prepare()
        torch.set_num_threads(1)
        timing.RUNS = 2

        def record(function, _device):
            function()
            return function

        graphs.record = record

    def describe(self):
        return {"gpu": "dry run", "gpus": 0, "memory_bytes": 0, "cache_bytes": 1 << 12, "multiprocessors": 0,
                "capability": "none", "cuda": None}

    def synchronize(self):
        pass

    def delay(self, seconds):
        pass

    def side_stream(self):
        return contextlib.nullcontext()

    def elapsed(self, run, delay):
        began = time.perf_counter()
        run()
        seconds = time.perf_counter() - began
        return seconds, seconds

    def capture(self, function):
        results = function()

        def replay():
            for old, new in zip(results, function(), strict=True):
                old.copy_(new)

        return replay, results

    def peak_bytes(self, function):
        function()
        return 0

    def release(self):
        pass


class QueuedClock:
    """Seconds of one call on the device alone: the calls are queued while it waits, so the host costs nothing.

    For timing.interleaved. Without `ahead` the device waits for the host wherever a user's would.
    """

    def __init__(self, device, ahead=True):
        self.device, self.ahead = device, ahead
        self.host = {}  # function -> least host seconds of one call

    def __call__(self, function, inner):
        known = self.host.get(function)
        delay = min(1.5 * known * inner + 2e-5, 0.05) if self.ahead and known is not None else 0

        def run():
            for _ in range(inner):
                function()

        seconds, host = self.device.elapsed(run, delay)
        self.host[function] = min(host / inner, known or float("inf"))  # a full queue makes the host wait: the least
        return seconds / inner


def host_clock(device):
    """A clock for timing.interleaved: what one asynchronous call costs the host."""
    def seconds(function, inner):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(inner):
            function()
        host = time.perf_counter() - began
        device.synchronize()
        return host / inner

    return seconds


def driver():
    """Driver, clocks, power, temperature as nvidia-smi reads them, {query: text}; {} where it cannot. Sets nothing."""
    queries = ("driver_version", "pstate", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit",
               "temperature.gpu")
    try:
        done = subprocess.run(["nvidia-smi", "--id=0", f"--query-gpu={','.join(queries)}", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.strip().splitlines()[0].split(",")]
    return dict(zip(queries, values, strict=True)) if len(values) == len(queries) else {}
