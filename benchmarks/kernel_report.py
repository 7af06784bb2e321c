"""`python -m benchmarks.kernel_report`: compile every Triton kernel at production shapes, for GPUs that are not here.

Each production call (kernel_report_cases.py) runs its real launcher on tensors without memory; what it would launch is
compiled by Triton itself for every target, each distinct kernel once, and the machine code is read: registers, shared
memory, spills, tensor-core instructions, widths of loads and stores, the inner loop. Prints a line per kernel and
target; writes kernel-report.json and .md. Exit code: 0, or 1 if --check found something.
"""
import argparse
import functools
import os
import pathlib
import sys

from tqdm import tqdm

from benchmarks import kernel_report_text as text
from benchmarks.kernel_report_cases import BACKWARD, CALLS, Recorded, written
from benchmarks.kernel_report_code import TARGETS
from benchmarks.kernel_report_compile import Job, compile_all, specialisation
from difuse.files import check_folder
from difuse_kernels import triton_launch
from difuse_kernels.dispatch import OPS

RESULTS = pathlib.Path(__file__).parent / "results"
SCHEMA = 1
# An H200's: what copies and matrix products reach, not what the data sheet says (4.8 TB/s, 989 TFLOP/s). fp32 runs on
# the vector units and is the data sheet's.
BYTES_PER_SECOND = 4.3e12
FLOPS_PER_SECOND = {"bf16": 780e12, "fp16": 780e12, "fp32": 67e12}
GRID_LIMIT = 65535  # of every axis of the grid but the first, on NVIDIA's GPUs
# Ops made of matrix products: in these dtypes every product must run on tensor cores. In fp32 none does: the dots are
# input_precision="ieee", which no NVIDIA tensor core computes, because TF32's 10 bits would break the error budget.
MATRIX_OPS = {"attention": ("bf16", "fp16"), "attention_packed": ("bf16", "fp16")}
NARROW = {"bf16", "f16"}  # what Triton calls those dtypes


def main(argv=None):
    """Compile, print and write what `argv` chooses; returns the exit code."""
    args = parse(argv)
    if triton_launch.INTERPRETED:
        print("kernel_report: TRITON_INTERPRET is set, so Triton interprets kernels and compiles none; "
              "expected it unset: run env -u TRITON_INTERPRET python -m benchmarks.kernel_report", file=sys.stderr)
        return 2
    out = args.out and check_folder(args.out)
    calls = [call for call in CALLS if call.op in written() and call.op in (args.op or [call.op])
             and (call.quick or not args.quick)]
    rows, passes = record(calls, args.target or list(TARGETS), args.quick)
    compiled = compile_all([row.pop("job") for row in rows], args.jobs, functools.partial(
        tqdm, unit="kernel", desc="compiling", mininterval=0.1 if sys.stderr.isatty() else 10))
    rows = [row | found for row, found in zip(rows, compiled, strict=True)]
    report = {"schema": SCHEMA, "environment": environment(argv),
              "ceilings": {"bytes_per_second": BYTES_PER_SECOND, "flops_per_second": FLOPS_PER_SECOND},
              "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows)),
              "not_written": sorted(set(OPS) - set(written())), "offenders": offenders(rows, passes),
              "passes": passes, "kernels": rows}
    print(text.terminal(report))
    if out:
        text.write(out, report)
    for offender in report["offenders"]:
        print(f"{'FAILED' if args.check else 'note'}: {offender}")
    return int(args.check and bool(report["offenders"]))


def parse(argv):
    """The arguments; unknown names end the program with the valid ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--op", action="append", choices=written(), metavar="NAME", help="only this op; repeatable")
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="only this target; repeatable")
    parser.add_argument("--quick", action="store_true", help="the fewest calls that still launch every kernel")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: cores")
    parser.add_argument("--check", action="store_true", help="exit 1 where a kernel spills, lost its tensor cores, "
                        "does not fit or does not compile")
    parser.add_argument("--out", type=pathlib.Path, metavar="DIR", help="where kernel-report.json and .md go; default: "
                        "benchmarks/results for the whole report; a part of it is only printed")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; expected 1 or more")
    if args.out is None and not (args.op or args.target or args.quick):
        args.out = RESULTS
    return args


def record(calls, targets, quick=False):
    """(rows, passes): a row per distinct kernel and target, still with its "job"; a pass per call and direction."""
    rows, passes = {}, {}
    for target in targets:
        for call in calls:
            recorded = Recorded(call, target, quick)
            for which, launches in recorded.launches.items():
                name = f"{call.op}, {call.name}, {call.dtype}, {which}"
                passes[name] = passes.get(name) or prediction(call, recorded, which)
                for launch in launches:
                    job = Job.of(launch, target)
                    row = rows.setdefault((job.target, job.module, job.kernel, specialisation(job)), {
                        "op": call.op, "kernel": job.kernel, "target": target, "constants": dict(job.constants),
                        "used_by": [], "job": job})
                    use = {"pass": name, "grid": list(launch.grid)}
                    if use not in row["used_by"]:
                        row["used_by"].append(use)
    order = {target: n for n, target in enumerate(targets)}
    groups = list(dict.fromkeys((row["op"], row["kernel"], row["used_by"][0]["pass"]) for row in rows.values()))
    return sorted(rows.values(), key=lambda row: (
        groups.index((row["op"], row["kernel"], row["used_by"][0]["pass"])), order[row["target"]])), passes


def prediction(call, recorded, which):
    """Bytes and FLOPs of one pass, and the least time that an H200 needs for them."""
    total_bytes, flops = recorded.work(False)
    if which == BACKWARD:
        total_bytes, flops = (both - forward for both, forward in zip(recorded.work(True), (total_bytes, flops),
                                                                      strict=True))
    by_bytes, by_flops = total_bytes / BYTES_PER_SECOND, flops / FLOPS_PER_SECOND[call.dtype]
    return {"op": call.op, "case": call.name, "dtype": call.dtype, "pass": which, "bytes": total_bytes, "flops": flops,
            "predicted_seconds": max(by_bytes, by_flops), "bound": "bytes" if by_bytes >= by_flops else "flops"}


def offenders(rows, passes):
    """What --check ends with exit code 1 for, a sentence each."""
    found, excused = [], set()  # excused: (target, pass) that has its matrix kernel, or one that was named already
    for row in rows:
        label = f"{row['kernel']} on {row['target']} ({row['used_by'][0]['pass']})"
        if "failed" in row:
            found.append(f"{label} does not compile: {row['failed']}")
            excused |= {(row["target"], use["pass"]) for use in row["used_by"]}
            continue
        if spilled := text.spills(row):
            found.append(f"{label} spills: {spilled}")
        limit = TARGETS[row["target"]].shared_per_block
        if row["shared"] > limit:
            found.append(f"{label} needs {row['shared']} bytes of shared memory; a block gets {limit} at most")
        elif row["blocks_per_sm"] == 0:
            found.append(f"{label} does not fit: {row['registers']} registers in {row['num_warps']} warps, "
                         f"{row['tensor_memory_columns']} columns of tensor memory")
        for use in row["used_by"]:
            if max(use["grid"][1:], default=0) > GRID_LIMIT:
                found.append(f"{label} cannot be launched: grid {use['grid']} for ({use['pass']})")
        narrow = [use["pass"] for use in row["used_by"] if _on_tensor_cores(passes[use["pass"]])]
        if narrow and row["dots"]:
            excused |= {(row["target"], name) for name in narrow}
            if not row["matrix"] or not NARROW.issuperset(row["dots"]):
                found.append(f"{label} lost its tensor cores: products of {', '.join(row['dots'])}, "
                             f"{sum(row['matrix'].values())} matrix instructions, in a 16-bit call")
    return found + [
        f"no kernel of ({name}) uses tensor cores on {target}" for target in dict.fromkeys(r["target"] for r in rows)
        for name, one in passes.items() if _on_tensor_cores(one) and (target, name) not in excused]


def _on_tensor_cores(one_pass):
    return one_pass["dtype"] in MATRIX_OPS.get(one_pass["op"], ())


def environment(argv):
    """What the numbers depend on: versions, commit, command."""
    import torch
    import triton

    import difuse
    from benchmarks.run import commit
    return {"triton": triton.__version__, "torch": torch.__version__, "difuse": difuse.__version__, "commit": commit(),
            "command": " ".join(["python -m benchmarks.kernel_report", *(sys.argv[1:] if argv is None else argv)])}


if __name__ == "__main__":
    sys.exit(main())
