"""`python -m benchmarks.gpu` or `make gpu`: everything a machine with an NVIDIA GPU can tell, in ten minutes.

Parts, measured in one run against ceilings of that run:

    tests      the contract suite on the GPU; production shapes, determinism, memory checker
    ceilings   copy bandwidth, matrix products, what a call costs the host
    graphs     CUDA graphs of whole sampling loops, replayed with other numbers
    ops        every op beside eager PyTorch, torch.compile and other packages
    model      DiT-XL/2: forward, training step, guided sampling

Results go to benchmarks/results/<gpu>-<date>.json and .md after every part; what there was no time for is named there.
--dry-run runs all of this code on a CPU, with tiny cases and stand-ins for the GPU, and proves nothing about speed.
Exit code: 0; 1 if a test, a gate or a job failed; 2 for wrong arguments or where there is no GPU. No clock, power
limit or mode of the GPU is ever set.
"""
import argparse
import functools
import os
import pathlib
import signal
import sys
import tempfile
import time

import torch

from benchmarks import gpu_ceilings, gpu_device, gpu_graphs, gpu_model, gpu_ops, gpu_report, gpu_tests
from benchmarks.gpu_plan import Deadline, Plan
from benchmarks.gpu_worker import Worker
from benchmarks.run import RESULTS, compiler_cache
from difuse.files import check_folder

PARTS = {"tests": gpu_tests, "ceilings": gpu_ceilings, "graphs": gpu_graphs, "ops": gpu_ops, "model": gpu_model}
# tests of production shapes come first, and fill Triton's cache; the contract suite gets all the time that is left
ORDER = ("tests", "ceilings", "graphs", "ops", "model", "compiled models", "compiled ops", "contract")


def main(argv=None):
    """Run the parts that `argv` chooses, print and write the tables; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    if args.readme:
        print(gpu_report.readme(args.readme))
        return 0
    if not args.dry_run and not torch.cuda.is_available():
        print("benchmarks.gpu: torch sees no GPU; --dry-run runs the same code on the CPU", file=sys.stderr)
        return 2
    device = device_of(args.dry_run)
    device.prepare()
    deadline = Deadline(args.since or time.time())
    plan = Plan(chosen(device, args.part), deadline)
    report = gpu_report.begin(argv, args.dry_run)
    worker = Worker([sys.executable, "-m", "benchmarks.gpu_worker", *(["--dry-run"] if args.dry_run else [])],
                    environment(args.dry_run))
    part = None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`, which ends what was started
    try:
        with compiler_cache():
            worker.environment["TORCHINDUCTOR_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"]
            for job, seconds in plan:
                if part not in (None, job.part):
                    gpu_report.write(args.out, report)
                part = job.part
                print(f"{deadline.left():5.0f} s left: {job.name}", file=sys.stderr, flush=True)
                run = job.run if job.part == "tests" else functools.partial(worker.run, job.name)
                record(report, job, seconds, run(seconds))
        report["complete"] = True
    finally:  # an interrupted run keeps what it has measured
        signal.signal(signal.SIGTERM, before)
        worker.stop()
        report["not_measured"] += [{"job": job.name, "why": why} for job, why in plan.left_out]
        report["machine"]["driver_at_the_end"] = gpu_device.driver()
        print(gpu_report.table(report))
        for path in gpu_report.write(args.out, report):
            print(f"written: {path}")
    for failure in (failures := gpu_report.failures(report)):
        print(f"FAILED: {failure}")
    return int(bool(failures))


def parse(argv):
    """The arguments; unknown parts and folders that cannot be written to end the program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; repeatable (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with stand-ins: checks the suite itself")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR",
                        help="default: benchmarks/results; of a dry run a temporary folder")
    parser.add_argument("--since", type=float, metavar="SECONDS", help="when the ten minutes began, as `date +%%s`")
    parser.add_argument("--readme", type=pathlib.Path, metavar="FILE", help="print the README's table of a result, end")
    args = parser.parse_args(argv)
    if args.out is None:
        args.out = tempfile.mkdtemp(prefix="difuse-gpu-dry-run-") if args.dry_run else RESULTS
    try:
        args.out = check_folder(args.out)
    except OSError as error:
        parser.error(str(error))
    return args


def device_of(dry_run):
    """The GPU, or its stand-in."""
    return gpu_device.DryRun() if dry_run else gpu_device.Gpu()


def all_jobs(device):
    """Every job of every part, most important first."""
    jobs = [job for part in PARTS.values() for job in part.jobs(device)]
    return sorted(jobs, key=lambda job: ORDER.index(job.group))


def chosen(device, parts):
    """The jobs of `parts`, or all; the ceilings belong to every run that times something."""
    parts = set(parts or PARTS)
    return [job for job in all_jobs(device)
            if job.part in parts or (job.name == "ceilings" and parts & {"ops", "model"})]


def environment(dry_run):
    """The environment of the measuring process: Triton interprets in a dry run, and never else."""
    found = os.environ | {"PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "1"}
    if not dry_run:
        del found["TRITON_INTERPRET"]
    return found


def record(report, job, seconds, outcome):
    """Put a job's outcome into the report. A job that hangs has failed; one that ran out of time is named."""
    report["jobs"].append({"job": job.name, "seconds": round(outcome.seconds, 1)})
    gpu_report.add(report, outcome.rows)
    why = outcome.failed
    if outcome.timed_out and why is None:
        if job.may_be_cut or seconds < job.cap:
            report["not_measured"].append({"job": job.name, "why": f"out of time, cut after {outcome.seconds:.0f} s"})
        else:
            why = f"no answer after {outcome.seconds:.0f} s; it hangs"
    if why is not None:
        report["failed"].append({"job": job.name, "why": why})
        print(f"FAILED: {job.name}: {why}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
