"""The hardware suite without hardware: its deadline and shares, its worker, its tables, its command line."""
import json
import sys
import time
import types

import pytest
import torch

import difuse_kernels
from benchmarks import (
    gpu,
    gpu_ceilings,
    gpu_device,
    gpu_graphs,
    gpu_model,
    gpu_ops,
    gpu_plan,
    gpu_pytest,
    gpu_report,
    gpu_tests,
    gpu_worker,
    timing,
)
from benchmarks.bench_ops import FORWARD, ONE_ROW, OVERHEAD

DRY = gpu_device.DryRun()
NORM = next(case for case in ONE_ROW if case.op == "norm_modulate")
here = pytest.mark.skipif(torch.cuda.is_available() or not gpu_ceilings.kernel_backends("norm_modulate"),
                          reason="needs interpreted or emulated kernels")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(timing, "RUNS", 2)
    monkeypatch.setattr(gpu_device.DryRun, "install", lambda self: None)
    monkeypatch.setattr(gpu_device.DryRun, "prepare", lambda self: None)
    gpu_ops.gates.cache_clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine they wait for each other
    yield
    torch.set_num_threads(threads)


# deadline and shares

class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def job(name, group="ops", **options):
    return gpu_plan.Job(group, name, lambda: (), group, **options)


def dealt(jobs, seconds, total=108.0):
    """Names in the order they were dealt, with the time each may take, where each takes `seconds` (or as named)."""
    clock = Clock()
    plan, found = gpu_plan.Plan(jobs, gpu_plan.Deadline(clock.now, total, clock)), []
    for one, may_take in plan:
        found.append((one.name, round(may_take)))
        clock.now += min(seconds.get(one.name, 1) if isinstance(seconds, dict) else seconds, may_take)
    return found, [one.name for one, _ in plan.left_out]


def test_everything_runs_in_order_where_there_is_time():
    assert dealt([job("a"), job("b", "model"), job("c")], 1) == ([("a", 60), ("b", 60), ("c", 60)], [])


def test_a_group_beyond_its_share_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(gpu_plan, "SHARES", {"ops": 0.3, "model": 0.7})
    found, left_out = dealt([*(job(f"o{i}") for i in range(4)), job("m", "model")], 15)
    assert [name for name, _ in found] == ["o0", "o1", "m", "o2", "o3"] and not left_out  # 30 of 100 s, then the rest


def test_no_job_begins_that_cannot_end_and_none_passes_the_deadline(monkeypatch):
    found, left_out = dealt([job("a"), job("b", least=50.0), job("c", least=20.0)], {"a": 55, "c": 99})
    assert found == [("a", 60), ("c", 45)] and left_out == ["b"]
    assert dealt([job("a"), job("b")], 1, total=5.0) == ([], ["a", "b"])


def test_every_group_has_a_share_and_a_place():
    groups = {one.group for device in (DRY, gpu_device.Gpu()) for one in gpu.all_jobs(device)}
    assert groups == set(gpu.ORDER) == set(gpu_plan.SHARES)
    assert sum(gpu_plan.SHARES.values()) == pytest.approx(1.0)
    names = [one.name for one in gpu.all_jobs(gpu_device.Gpu())]
    assert len(names) == len(set(names))


def test_a_part_alone_gets_all_the_time_and_brings_the_ceilings():
    jobs = gpu.chosen(DRY, ["ops"])
    assert jobs[0].name == "ceilings" and {one.part for one in jobs} == {"ceilings", "ops"}
    assert {one.part for one in gpu.chosen(DRY, ["graphs"])} == {"graphs"}
    plan = gpu_plan.Plan(jobs[1:], gpu_plan.Deadline(0.0, 108.0, lambda: 0.0))
    assert sum(plan.shares.values()) == pytest.approx(100.0)


# the measuring process

SERVER = """
import os, sys, time, types
from benchmarks import gpu_worker
class Device:
    broken = False
    def synchronize(self):
        if self.broken: raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def release(self): pass
device = Device()
def good(): yield {"n": 1}; yield {"n": 2}
def bad(): yield {"n": 1}; raise ValueError("of no use")
def breaks(): device.broken = True; yield {"n": 1}
def dies(): os._exit(7); yield
def hangs(): yield {"n": 1}; time.sleep(60)
def says(): print("noise"); os.write(1, b"more noise"); yield {"n": 3}
answers = os.fdopen(os.dup(1), "w"); os.dup2(2, 1)
import json
def answer(m): print(json.dumps(m), file=answers, flush=True)
jobs = {f.__name__: types.SimpleNamespace(run=f) for f in (good, bad, breaks, dies, hangs, says)}
sys.exit(gpu_worker.serve(jobs, device, sys.stdin, answer))
"""


@pytest.fixture
def worker():
    worker = gpu_worker.Worker([sys.executable, "-c", SERVER])
    yield worker
    worker.stop()


def test_a_worker_outlives_errors_and_is_replaced_when_broken(worker):
    assert worker.run("good", 30).rows == [{"n": 1}, {"n": 2}]
    process = worker.process
    bad = worker.run("bad", 30)
    assert bad.rows == [{"n": 1}] and bad.failed == "ValueError: of no use" and not bad.timed_out
    assert worker.run("says", 30).rows == [{"n": 3}] and worker.process is process
    broken = worker.run("breaks", 30)
    assert "illegal memory access" in broken.failed and worker.process is None
    assert "status 7" in worker.run("dies", 30).failed
    hangs = worker.run("hangs", 3)
    assert hangs.timed_out and hangs.failed is None
    assert worker.run("good", 30).failed is None


def test_a_hang_is_a_failure_and_a_long_compile_is_not():
    def recorded(may_take, **options):
        report = gpu_report.begin([], True)
        gpu.record(report, job("j", **options), may_take, gpu_worker.Outcome(timed_out=True, seconds=may_take))
        return report["failed"], report["not_measured"]

    failed, left = recorded(60.0)
    assert "hangs" in failed[0]["why"] and not left
    for arguments in ((60.0, {"may_be_cut": True}), (30.0, {})):  # the second: the ten minutes ended first
        failed, left = recorded(arguments[0], **arguments[1])
        assert not failed and "out of time" in left[0]["why"]


# pytest's verdicts

LINES = """
[gw0] [ 25%] PASSED tests/test_x.py::test_a[a b]
[gw1] [ 50%] SKIPPED tests/test_x.py::test_b
[gw1] [ 75%] FAILED tests/test_x.py::test_c[1 - 2]
FAILED tests/test_x.py::test_c[1 - 2] - AssertionError: off
""".splitlines()


def test_verdicts_of_pytest():
    row, why = gpu_tests.verdicts("contract", LINES, 1)
    assert row["counts"] == {"passed": 1, "skipped": 1, "failed": 1} and why == "1 tests failed"
    assert row["failures"] == ["tests/test_x.py::test_c[1 - 2] - AssertionError: off"]
    row, why = gpu_tests.verdicts("contract", LINES[:3], None)
    assert not row["finished"] and why is None
    assert "no test passed" in gpu_tests.verdicts("contract", LINES[2:3], 0)[1]
    assert "status 4" in gpu_tests.verdicts("contract", ["ERROR: file not found"], 4)[1]
    assert gpu_tests.verdicts("contract", LINES[:3], 0)[1] is None


def test_pytest_runs_is_read_and_can_be_cut(tmp_path):
    test = tmp_path / "test_slow.py"
    test.write_text("import time\ndef test_quick(): pass\ndef test_slow(): time.sleep(100)\n")
    began = time.monotonic()
    outcome = gpu_tests.run("contract", 1, [str(test)], 4.0)
    assert outcome.timed_out and outcome.failed is None and time.monotonic() - began < 30
    test.write_text("def test_right(): pass\ndef test_wrong(): assert 1 == 2\n")
    outcome = gpu_tests.run("contract", 1, [str(test)], 120.0)
    assert outcome.failed == "1 tests failed" and outcome.rows[0]["counts"] == {"passed": 1, "failed": 1}


def test_tests_of_a_gpus_backend_make_their_tensors_there():
    with gpu_pytest.Made("meta"):
        drawn = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
        assert drawn.is_meta and drawn.is_leaf and drawn.requires_grad and torch.tensor([1, 2]).is_meta
        assert torch.zeros(2, device="cpu").is_cpu and torch.zeros_like(torch.ones(1, device="cpu")).is_cpu
    assert torch.ones(1).is_cpu


# the report

CEILINGS = {"copy_bytes_per_second": 4e12, "gemm_bf16_flops_per_second": 8e14, "gemm_fp32_flops_per_second": 5e13,
            "buffer_bytes": 1 << 30, "gemm_size": 8192}


def timed(seconds):
    return {"seconds": seconds, "spread": 0.01, "runs": 15, "inner": 4}


def a_row(**changes):
    row = {"group": "ops", "op": "norm_modulate", "case": "big", "dtype": "bf16", "pass": FORWARD, "shape": [1, 1, 1],
           "backend": "cuda", "gate": {"ok": True}, "bytes": int(2e8), "flops": 10, "ratios": {"eager": 3.0},
           "times": {"difuse": timed(1e-4), "eager": timed(3e-4)}} | changes
    return json.loads(json.dumps(row))


def reported(*rows):
    report = gpu_report.begin([], True)
    gpu_report.add(report, [{"group": "ceilings", "ceilings": CEILINGS}, *rows])
    return report


def targets(row):
    return {(target["metric"], target["reached"]) for target in reported(row)["rows"][0]["targets"]}


def test_targets():
    assert targets(a_row()) == {("copy", False)}  # 50 of 100 microseconds
    assert targets(a_row(times={"difuse": timed(5.8e-5), "eager": timed(3e-4)})) == {("copy", True)}
    assert targets(a_row(bytes=int(9e7))) == set()  # too small to judge
    assert targets(a_row(op="attention")) == set()
    overhead = a_row(**{"group": "overhead", "pass": OVERHEAD, "times": {"difuse": timed(5e-6), "eager": timed(1e-5)}})
    del overhead["bytes"]
    assert targets(overhead) == {("us", True)} and targets(overhead | {"backend": "triton"}) == set()
    model = a_row(op=gpu_report.XL_512, shape=[16, 4, 64, 64], ratios={"eager": 1.7, "compile": 1.0})
    assert targets(model) == {("eager", True), ("compile", False)}
    assert targets(model | {"shape": [1, 4, 64, 64]}) == set()
    step = a_row(**{"op": gpu_report.XL_256, "pass": gpu_report.STEP, "ratios": {"eager": 1.5},
                    "memory": {"difuse": 5, "compile": 4}})
    assert targets(step) == {("compile", None), ("memory", False)}
    assert targets(step | {"memory": {"difuse": 3}}) == {("compile", None), ("memory", None)}
    sampling = a_row(**{"op": gpu_report.XL_256, "pass": gpu_report.SAMPLING, "ratios": {"eager": 2.5}})
    assert targets(sampling) == {("eager", True)}


def test_every_target_is_for_something_measured():
    models = {one.run.func.__name__: one.run.args for one in gpu_model.jobs(gpu_device.Gpu())}
    assert models.keys() == {"forward_rows", "training_rows", "sampling_rows"}
    heads = {(gpu_model.head(side, batch, "")["op"], name) for one in gpu_model.jobs(gpu_device.Gpu())
             for _, side, batch in [one.run.args] for name in [
                 {"forward_rows": FORWARD, "training_rows": gpu_report.STEP,
                  "sampling_rows": gpu_report.SAMPLING}[one.run.func.__name__]]}
    for target in gpu_report.TARGETS:
        assert set(target.ops) <= {case.op for case in ONE_ROW} or {(op, target.passes) for op in target.ops} <= heads


def test_a_row_measured_again_takes_the_place_of_the_old_one():
    report = reported(a_row(), a_row(case="other"), a_row(times={"difuse": timed(2e-4), "eager": timed(3e-4)}))
    assert [row["case"] for row in report["rows"]] == ["big", "other"]
    assert report["rows"][0]["times"]["difuse"]["seconds"] == 2e-4


def test_tables_hold_every_row_and_what_is_missing(tmp_path):
    memory = {"difuse": 1 << 30, "eager": 1 << 31}
    report = reported(
        a_row(memory=memory, compile_seconds=30.0, times={
            "difuse": timed(1e-4), "triton": timed(2e-4), "eager": timed(3e-4), "compile": timed(2e-4),
            "sdpa cudnn": timed(9e-5), "copy": timed(8e-5)}, ratios={"eager": 3.0, "compile": 2.0, "sdpa cudnn": 0.9}),
        a_row(case="skipped", skipped="no | kernels"), gpu_tests.verdicts("contract", LINES, None)[0],
        gpu_graphs.row("whole", "c", "fp32", torch.float32, [(torch.ones(2), torch.ones(2))]))
    report["not_measured"].append({"job": "ops x", "why": "out of time"})
    report["failed"].append({"job": "ops y", "why": "it hangs"})
    paths = gpu_report.write(tmp_path / "new", report)
    text = paths[1].read_text()
    assert json.loads(paths[0].read_text()) == json.loads(json.dumps(report)) and paths[0].name.startswith("dry-run-")
    for expected in ("Dry run", "4.00 TB/s", "90 µs ±1 % sdpa cudnn", "| 0.90", "difuse 1.00 GiB", "200 µs ±1 % (30 s)",
                     "- ops x: out of time", "- ops y: it hangs", "not finished", "not complete", "85% of copy: NO"):
        assert expected in text, expected
    for block in text.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1


def test_the_readme_shows_what_a_gpu_measured_and_nothing_else(tmp_path, capsys):
    report = reported(a_row(), a_row(case="small", bytes=10))
    path = tmp_path / "result.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ValueError, match="a dry run"):
        gpu_report.readme(path)
    path.write_text(json.dumps(report | {"dry_run": False}))
    assert gpu.main(["--readme", str(path)]) == 0
    out = capsys.readouterr().out
    assert "big" in out and "small" not in out and "50 %" in out and "result.json" in out
    path.write_text("{}")
    with pytest.raises(ValueError, match="make gpu"):
        gpu_report.readme(path)


# the command

def spoil(monkeypatch, name, how):
    right = getattr(difuse_kernels, name)

    def op(*args, backend="auto", **kwargs):
        out = right(*args, backend=backend, **kwargs)
        return out if backend == "reference" else how(out)

    monkeypatch.setattr(difuse_kernels, name, op)


@pytest.mark.parametrize("argv, message", [
    (["--part", "opps"], "ceilings"), (["--out", "/proc/nowhere"], "cannot write"), (["--since", "now"], "float")])
def test_bad_arguments(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--dry-run", *argv])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err and not list(tmp_path.iterdir())


class InProcess:
    """In the worker's place."""

    def __init__(self, command, environment):
        self.environment = environment

    def run(self, name, seconds):
        outcome = gpu_worker.Outcome()
        jobs = {one.name: one for one in gpu.all_jobs(DRY)}

        def answer(message):
            if "row" in message:
                outcome.rows.append(message["row"])
            else:
                outcome.failed = message["failed"]

        gpu_worker.serve(jobs, DRY, [name], answer)
        return outcome

    def stop(self):
        pass


@here
def test_a_run_writes_after_every_part_and_its_exit_code_tells(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "Worker", InProcess)
    monkeypatch.setattr(gpu_ops, "ONE_ROW", [NORM])
    monkeypatch.setattr(gpu_ceilings, "ONE_ROW", [NORM])
    monkeypatch.setattr(gpu_graphs, "jobs", lambda device: [])
    written, write = [], gpu_report.write
    monkeypatch.setattr(gpu_report, "write", lambda *args: written.append(1) or write(*args))
    argv = ["--dry-run", "--part", "ops", "--part", "ceilings", "--out", str(tmp_path)]
    assert gpu.main(argv) == 0, capsys.readouterr()
    assert len(written) == 2 and "Failures: 0" in capsys.readouterr().out
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert report["complete"] and report["dry_run"]
    assert report["machine"]["command"] == " ".join(["python -m benchmarks.gpu", *argv])

    spoil(monkeypatch, "norm_modulate", lambda out: out + 1)
    gpu_ops.gates.cache_clear()
    assert gpu.main(argv) == 1
    assert "FAILED: norm_modulate, one_row, forward: WRONG" in capsys.readouterr().out
    spoil(monkeypatch, "norm_modulate", lambda out: 1 / 0)
    gpu_ops.gates.cache_clear()
    assert gpu.main(argv) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out


def test_out_of_time_is_named_and_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "Worker", InProcess)
    assert gpu.main(["--dry-run", "--part", "ops", "--since", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "- ceilings: out of time" in out and "- ops norm_modulate-one_row: out of time" in out


def test_nvidia_smi_is_only_read(monkeypatch):
    asked = []

    def run(command, **options):
        asked.append(command)
        return types.SimpleNamespace(stdout=", ".join("abcdefgh") + "\n")

    monkeypatch.setattr(gpu_device.subprocess, "run", run)
    assert gpu_device.driver()["driver_version"] == "a"
    (command,) = asked
    assert all(part == "nvidia-smi" or part.startswith(("--id=", "--query-gpu=", "--format=")) for part in command)
    monkeypatch.setattr(gpu_device.subprocess, "run", lambda *args, **options: (_ for _ in ()).throw(OSError()))
    assert gpu_device.driver() == {}


def test_what_is_asked_of_torch_cuda(monkeypatch):
    """Gpu against a torch.cuda that writes down what it is asked."""
    asked, now = [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(now)
            asked.append("record")

        def synchronize(self):
            asked.append("wait")

        def elapsed_time(self, end):
            return 1000.0 * (end.at - self.at)

    fakes = {"Event": Event, "synchronize": lambda: asked.append("synchronize"),
             "_sleep": lambda cycles: asked.append(cycles), "current_device": lambda: 0,
             "memory_allocated": lambda: 5, "max_memory_allocated": lambda: 12,
             "reset_peak_memory_stats": lambda: asked.append("reset"), "empty_cache": lambda: asked.append("empty"),
             "device_count": lambda: 1, "get_device_properties": lambda index: types.SimpleNamespace(
                 name="NVIDIA H200", total_memory=1 << 37, L2_cache_size=60 << 20, multi_processor_count=132, major=9,
                 minor=0)}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    device = gpu_device.Gpu()
    seconds, host = device.elapsed(lambda: asked.append("run"), 1e-3)
    assert seconds == 1.0 and host < 1 and asked == ["synchronize", 2000000, "record", "run", "record", "wait"]
    assert device.peak_bytes(lambda: None) == 7 and "reset" in asked
    assert device.describe()["capability"] == "sm_90"
    device.release()
    monkeypatch.setattr(gpu_device.graphs, "record", lambda function, device: (function(), function)[1])
    seen = []
    replay, results = device.capture(lambda: seen.append(1) or [torch.full((2,), len(seen))])
    replay()
    assert len(seen) == 2 and results[0].tolist() == [2, 2]
    report = gpu_report.begin([], False)
    assert report["machine"]["gpu"] == "NVIDIA H200" and not report["dry_run"]


def test_the_queued_clock_hides_the_host():
    class Device:
        delays = []

        def elapsed(self, run, delay):
            run()
            self.delays.append(delay)
            return 3e-3, 2e-3

    clock, calls = gpu_device.QueuedClock(Device()), []
    function = lambda: calls.append(1)  # noqa: E731
    assert clock(function, 3) == pytest.approx(1e-3) and clock(function, 3) == pytest.approx(1e-3)
    assert len(calls) == 6 and Device.delays[0] == 0 and Device.delays[1] == pytest.approx(3e-3 + 2e-5)
