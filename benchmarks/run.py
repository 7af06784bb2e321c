"""`python -m benchmarks.run [ops|linear|model|frozen|train|engine|update|all]`: difuse against eager and torch.compile.

A speed is printed only after the correctness gate of the same case and dtype has passed. Rivals take turns in one
process; times are medians of at least 7 runs with their spread (inter-quartile range). Writes one JSON file and one
Markdown table under benchmarks/results/. Exit code: 0, or 1 if a gate failed.
"""
import argparse
import contextlib
import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile

import torch
from tqdm import tqdm

import difuse
from benchmarks import (
    bench_engine,
    bench_frozen,
    bench_linear,
    bench_model,
    bench_ops,
    bench_train,
    bench_update,
    rivals,
    roofline,
)
from difuse.files import check_folder, write_atomically
from difuse_kernels import native
from difuse_kernels.dispatch import OPS

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = {"ops": bench_ops, "linear": bench_linear, "model": bench_model, "frozen": bench_frozen, "train": bench_train,
          "engine": bench_engine, "update": bench_update}
SCHEMA = 1
NOISY = 0.2  # a spread above this is named beside the row's ratios
COLUMNS = ("op", "case", "dtype", "pass", "backend", "difuse", "eager", "x eager", "compile", "x compile", "ceiling",
           "reached", "remarks")


def main(argv=None):
    """Run the benchmarks that `argv` chooses, print and write the table; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parse(argv)
    out = check_folder(args.out)
    machine = describe_machine(argv)
    with compiler_cache():
        dtypes = {name: bench_ops.DTYPES[name] for name in dict.fromkeys(("fp32", "bf16", *(args.dtype or ())))}
        ceilings = roofline.ceilings(dtypes)
        if not (args.no_compile or args.quick):
            rivals.first_call(lambda: rivals.compiled(torch.neg)(torch.ones(8)))  # imports, headers: nobody's case
        groups = list(GROUPS) if args.group == "all" and args.op is None else [args.group.replace("all", "ops")]
        jobs = [job for group in groups for job in GROUPS[group].jobs(args, ceilings)]
        if not jobs:
            names = bench_model.FAMILIES
            if "ops" in groups:
                names = [case.name for case in bench_ops.cases(args.op, speed=True)]
            raise SystemExit(f"benchmarks: no case of {', '.join(groups)} fits --case {args.case!r} and --dtype; "
                             f"expected part of one of {', '.join(dict.fromkeys(names))}")
        report = {"schema": SCHEMA, "complete": False, "machine": machine, "ceilings": ceilings, "rows": []}
        try:
            for label, job in (bar := tqdm(jobs, unit="case", mininterval=0.1 if sys.stderr.isatty() else 10)):
                bar.set_description(label)
                report["rows"] += job()
            report["complete"] = True
        finally:  # an interrupted run keeps what it has measured
            text = table(report)
            print(text)
            write(out, report, text)
    return int(any(not row["gate"]["ok"] for row in report["rows"] if "gate" in row))


def parse(argv):
    """The arguments; unknown names end the program with the valid ones."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", nargs="?", default="all", choices=[*GROUPS, "all"], help="default: all")
    parser.add_argument("--op", choices=list(OPS), metavar="NAME", help=f"one op only: {', '.join(OPS)}")
    parser.add_argument("--case", default="", metavar="SUBSTR", help="cases whose name holds this")
    parser.add_argument("--dtype", type=_dtypes, metavar="fp32,bf16",
                        help="also fp16, for ops (default: fp32,bf16; models in bf16 where the CPU can)")
    parser.add_argument("--quick", action="store_true", help="one small case per op, tiny models, nothing compiled")
    parser.add_argument("--no-compile", action="store_true", help="leave the rival torch.compile out")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS, metavar="DIR", help="default: benchmarks/results")
    args = parser.parse_args(argv)
    if args.op and args.group not in ("ops", "all"):
        parser.error(f"--op {args.op} belongs to the group ops, not {args.group}")
    return args


def _dtypes(text):
    names = text.split(",")
    unknown = [name for name in names if name not in bench_ops.DTYPES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is unknown; expected some of {','.join(bench_ops.DTYPES)}")
    return tuple(names)


@contextlib.contextmanager
def compiler_cache():
    """A cache of Inductor's own for this run, so that every compile time is a cold one."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="difuse-bench-", ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["TORCHINDUCTOR_CACHE_DIR"]
            else:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def describe_machine(argv, program="benchmarks.run"):
    """What a number depends on: CPU, instruction set, threads, versions, commit, command, date, load."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^flags\s*:\s*(.*)$", text, re.MULTILINE)
    forced = f"DIFUSE_ISA={os.environ['DIFUSE_ISA']} " if os.environ.get("DIFUSE_ISA") else ""
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "avx512": "avx512f" in flags[1].split() if flags else None,
        "isa": native.ext.isa() if native.ext else None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(), "last_level_cache_bytes": roofline.last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "difuse": difuse.__version__, "commit": commit(),
        "command": " ".join([f"{forced}python -m {program}", *argv]),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def commit():
    """The checkout's commit, with "+changes" where files differ from it, or "unknown" outside a git checkout."""
    def git(*arguments):
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", ".", ":!benchmarks/results").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(out, report, text):
    """<machine>-<date>.json and .md in the folder `out`, each written whole or not at all."""
    machine = report["machine"]
    for path in write_files(out, f"{slug(machine['cpu'])}-{machine['cores']}c-{stamp(machine)}", report, text):
        print(f"written: {path}")


def slug(name):
    """The name of a machine as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def stamp(machine):
    """The run's date as part of a file's name."""
    return datetime.datetime.fromisoformat(machine["date"]).strftime("%Y%m%d-%H%M%S")


def write_files(out, stem, report, text):
    """The paths of <stem>.json and <stem>.md in the folder `out`, each written whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    contents = {".json": json.dumps(report, indent=1, allow_nan=False) + "\n", ".md": text + "\n"}
    for suffix, content in contents.items():
        write_atomically(out / f"{stem}{suffix}", content.encode())
    return [out / f"{stem}{suffix}" for suffix in contents]


def table(report):
    """The report as Markdown: header, ceilings, one line per row, and how many targets were reached."""
    return "\n".join([*header(report), "", *aligned(COLUMNS, map(cells, report["rows"])), "", *footer(report)])


def aligned(columns, rows):
    """The lines of a Markdown table."""
    rows = [columns, *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return lines


def header(report):
    """Machine, versions, command and ceilings, as a list of lines."""
    m, c = report["machine"], report["ceilings"]
    lines = [
        f"# Benchmarks: {m['cpu']}, {m['date']}", "",
        f"- machine: {m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['system']}; load average at the start "
        f"{m['load_average']}",
        f"- kernels: instruction set {m['isa'] or 'none (the native module is not loaded)'}",
        f"- versions: difuse {m['difuse']} at {m['commit']}, torch {m['torch']}, python {m['python']}",
        f"- command: `{m['command']}`",
        f"- ceilings, measured: copy {c['copy_bytes_per_second'] / 1e9:.1f} GB/s into a buffer that exists (read + "
        f"written, {c['buffer_bytes'] >> 20} MiB), {c['clone_bytes_per_second'] / 1e9:.1f} GB/s into fresh memory; "
        "matrix product " + ", ".join(f"{value / 1e9:.1f} GFLOP/s {name.split('_')[1]}" for name, value in c.items()
                                      if name.startswith("gemm_")),
    ]
    if m["avx512"] is False:
        lines.append("- this CPU has no AVX-512; the targets were set for 2 cores that have it")
    return lines


READING = (
    "- Medians of at least 7 interleaved runs, ± the inter-quartile range. x: how many times faster difuse is; below 1",
    "  it is slower.",
    "- ceiling: the time that the bytes need at the copy bandwidth above (into a buffer that exists), or the FLOPs at",
    "  the matrix product's rate (the better of this dtype's and float32's), whichever is longer; tensors count once.",
    "- reached: ceiling over difuse's time; c: the data fits into the last cache, so more than 100 % is possible.",
    "- compile: torch.compile of the eager code, static shapes; in brackets its cold first call, which is not timed.",
    f"- noisy: a spread above {NOISY:.0%}; the ratios of that row mean little. -: not run.",
)


def footer(report):
    """How to read the table, and what was reached."""
    judged = [target for row in report["rows"] for target in row.get("targets", ()) if target["reached"] is not None]
    wrong = sum(not row["gate"]["ok"] for row in report["rows"] if "gate" in row)
    outcome = (f"Targets reached: {sum(target['reached'] for target in judged)} of {len(judged)}. Correctness gates "
               f"failed: {wrong}.{'' if report['complete'] else ' The run was interrupted; rows are missing.'}")
    return [*READING, "", outcome]


def cells(row):
    """The cells of one row, as text."""
    head = [row["op"], row["case"], row["dtype"], row["pass"]]
    if "skipped" in row:
        return [*head, *["-"] * 8, f"not measured: {row['skipped']}"]
    gate = row["gate"]
    if not gate["ok"]:
        return [*head, *["-"] * 8, wrong(gate)]
    times, ratios = row["times"], row["ratios"]
    compiled = time_text(times.get("compile"))
    remarks = [*map(_target, row["targets"])]
    if max(timing["spread"] for timing in times.values()) > NOISY:
        remarks.append("noisy")
    remarks += [f"{ratios[name]:.2f} x {title}" for name, title in (
        ("openvino", "OpenVINO"), ("onnxruntime", "ONNX Runtime"), ("onednn", "oneDNN"),
        ("from_diffusers", "the scheduler swapped in")) if name in ratios]
    if "errors" in row:
        errors = {name: "-" if error is None else f"{error:.1e}" for name, error in row["errors"].items()}
        remarks.append(f"error {errors.pop('difuse')}; {', '.join(map(' '.join, errors.items()))}")
    if "compile_failed" in row:
        remarks.append(f"compile failed: {one_line(row['compile_failed'])}")
    elif "compile_seconds" in row:
        compiled += f" ({row['compile_seconds']:.1f} s)"
    ceiling = reached = "-"
    if "share" in row:
        ceiling = f"{seconds_text(row['predicted_seconds'])} {row['bound']}"
        reached = f"{100 * row['share']:.0f} %{' c' if row['in_cache'] and row['bound'] == 'bytes' else ''}"
    return [*head, row.get("backend", "auto"), time_text(times["difuse"]), time_text(times["eager"]),
            ratio_text(ratios, "eager"), compiled, ratio_text(ratios, "compile"), ceiling, reached, "; ".join(remarks)]


def wrong(gate):
    """What is said in place of a speed where the correctness gate failed."""
    off = "" if gate["error"] is None else f" is off by {gate['error']:.1e}, budget {gate['budget']:.1e}"
    return f"WRONG, so no speed: {one_line(gate['worst'])}{off}"


def one_line(text):
    """One line of at most 200 characters that ends no Markdown cell."""
    return " ".join(text.replace("|", "/").split())[:200]


def time_text(timing):
    """A median and its spread; a dash for None."""
    return "-" if timing is None else f"{seconds_text(timing['seconds'])} ±{100 * timing['spread']:.0f} %"


def seconds_text(seconds):
    """Seconds in the unit that suits them."""
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale or unit == "µs":
            return f"{seconds / scale:.3g} {unit}"


def ratio_text(ratios, rival):
    """How many times faster difuse is than the rival; a dash where it did not run."""
    return f"{ratios[rival]:.2f}" if rival in ratios else "-"


def _target(target):
    got = "not run" if target["got"] is None else "yes" if target["reached"] else "NO"
    aim = {"us": "under {:g} µs", "copy": "{:.0%} of copy"}.get(target["metric"], "{:g}x " + target["metric"])
    return f"{aim.format(target['value'])}: {got}"


if __name__ == "__main__":
    sys.exit(main())
