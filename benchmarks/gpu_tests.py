"""The contract suite on the GPU: pytest in processes of its own, whose verdicts become one row per group of tests."""
import functools
import os
import pathlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter

from benchmarks.gpu_plan import Job
from benchmarks.gpu_worker import Outcome, end_group

ROOT = pathlib.Path(__file__).parents[1]
OPS = ("adaln", "attention", "gated_activation", "gram", "group_norm_act", "patchify", "qk_norm_rope",
       "sampler_step")
GROUPS = {  # name -> (processes, pytest's arguments): few where a process holds gigabytes
    "offsets beyond 2^31": (2, ["tests/test_large.py"]),
    "production shapes, determinism, devices": (6, ["tests/test_gpu.py"]),
    "contract": (12, ["tests/test_op_contract.py", "tests/test_compile.py", "tests/test_triton.py",
                      "tests/test_cuda.py", "tests/test_graphs.py", "tests/test_recorded.py",
                      *(f"tests/test_{op}.py" for op in OPS)]),
}
DRY_RUN = {"contract": (1, ["tests/test_gpu.py", "tests/test_op_contract.py", "-k",
                            "test_gpu.py or (test_error_budget and gate_residual-odd-cpu-fp32)"])}
DRY_RUN_VARIABLE = "DIFUSE_GPU_DRY_RUN"  # tests/test_gpu.py then runs on stand-ins, tiny, instead of being skipped
VERDICT = re.compile(r"^\[gw\d+\] \[ *\d+%\] ([A-Z]+) (.*)$")
SUMMARY = re.compile(r"^(FAILED|ERROR) (\S.*)$")


def jobs(device):
    """A job per group; `run(seconds)` in the suite's own process, which does not touch the GPU."""
    more = {DRY_RUN_VARIABLE: "1"} if device.dry else {}
    found = []
    for name, arguments in (DRY_RUN if device.dry else GROUPS).items():
        group, cap = ("contract", float("inf")) if name == "contract" else ("tests", 100.0)
        found.append(Job("tests", f"tests {name}", functools.partial(run, name, *arguments, **more), group,
                         least=20.0, cap=cap, may_be_cut=True))
    return found


def run(name, processes, arguments, seconds, **more):
    """The Outcome of pytest after `seconds` at most, `more` in its environment; if cut, what it had found by then."""
    command = [sys.executable, "-m", "pytest", "-v", "-v", "-rfE", "--tb=short", "-p", "no:cacheprovider",
               "-p", "benchmarks.gpu_pytest", "-n", str(min(processes, os.cpu_count())), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1"} | more
    began, lines = time.monotonic(), []
    process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, start_new_session=True)
    try:
        finished = _read(process, lines, began + seconds)
        status = process.wait() if finished else None
    finally:
        end_group(process)
    row, failed = verdicts(name, lines, status)
    if failed:
        print(f"tests {name}: {failed}; the last lines of pytest:", *lines[-60:], sep="\n", file=sys.stderr)
    return Outcome([row], failed, not finished, time.monotonic() - began)


def _read(process, lines, end):
    """Collect the process's lines; whether it had said everything when the time was up."""
    arriving = queue.Queue()

    def read():
        for line in process.stdout:
            arriving.put(line.rstrip("\n"))
        arriving.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arriving.get(timeout=max(end - time.monotonic(), 0))
        except queue.Empty:
            return False
        if line is None:
            return True
        lines.append(line)


def verdicts(name, lines, status):
    """(row, why it failed or None) from pytest's lines; status None: it was ended before it was through."""
    counted = Counter()
    failures = []
    for line in lines:
        if found := VERDICT.match(line):
            counted[found[1].lower()] += 1
            if found[1] in ("FAILED", "ERROR"):
                failures.append(found[2].strip())
        elif found := SUMMARY.match(line):
            failures = [test for test in failures if not found[2].startswith(test)] + [found[2][:300]]
    row = {"group": "tests", "op": name, "counts": dict(counted), "failures": failures, "finished": status is not None}
    if failures or counted["failed"] or counted["error"]:
        return row, f"{counted['failed'] + counted['error']} tests failed"
    if status not in (None, 0):
        return row, f"pytest ended with status {status}: {' '.join(lines[-3:])[:300]}"
    if status == 0 and not counted["passed"]:
        return row, "no test passed"
    return row, None
