"""The hardware suite's results: rows put together, targets judged, a JSON file, a Markdown table, the README's."""
import json

from benchmarks import gpu_device, roofline, run
from benchmarks.bench_ops import BOTH, FORWARD, OVERHEAD, Target
from benchmarks.bench_train import STEP
from benchmarks.gpu_model import SAMPLING

SCHEMA = 1
LARGE = 100e6  # bytes; below, a call is so short that launching it shows, and no share of bandwidth is asked for
MEMORY_BOUND = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate", "norm_modulate_dual", "group_norm_act",
                "gated_activation", "gram", "qk_norm_rope", "qk_norm_rope_joint", "patchify", "unpatchify",
                "sampler_step")
XL_512, XL_256 = "DiT-XL/2 512 px", "DiT-XL/2 256 px"
TARGETS = (
    Target(MEMORY_BOUND, FORWARD, "copy", 0.85, ("bf16",)),
    Target(MEMORY_BOUND, BOTH, "copy", 0.85, ("bf16",)),
    Target(MEMORY_BOUND, OVERHEAD, "us", 6.0, ("bf16",)),
    Target((XL_512,), FORWARD, "compile", 1.1, ("bf16",), ((16, None, None, None),)),
    Target((XL_512,), FORWARD, "eager", 1.6, ("bf16",), ((16, None, None, None),)),
    Target((XL_256,), STEP, "compile", 1.15, ("bf16",)),
    Target((XL_256,), STEP, "memory", 1.0, ("bf16",)),
    Target((XL_256,), SAMPLING, "eager", 2.0, ("bf16",)),
)
AIMS = {"us": "under {:g} µs", "copy": "{:.0%} of copy", "memory": "memory under {:g}x compile's"}
COLUMNS = ("op", "case", "pass", "difuse", "triton", "eager", "x eager", "compile", "x compile", "best other",
           "x other", "copy of as many bytes", "ceiling", "reached", "peak memory", "remarks")
OURS = ("difuse", "triton", "cuda", "no graphs")
NOT_RIVALS = (*OURS, "eager", "compile", "copy")


def begin(argv, dry_run, device=None):
    """An empty report: the machine as it is found."""
    device = device or (gpu_device.DryRun() if dry_run else gpu_device.Gpu())
    machine = run.describe_machine(argv, "benchmarks.gpu") | device.describe() | {"driver": gpu_device.driver()}
    return {"schema": SCHEMA, "dry_run": dry_run, "complete": False, "machine": machine, "ceilings": {}, "rows": [],
            "jobs": [], "not_measured": [], "failed": []}


def add(report, rows):
    """Put rows into the report, in place of those that they measure again."""
    for row in rows:
        if row["group"] == "ceilings":
            report["ceilings"] = row["ceilings"] | {"cache_bytes": report["machine"]["cache_bytes"]}
            continue
        if "times" in row and "bytes" in row and report["ceilings"]:
            row |= roofline.against(report["ceilings"], row["dtype"], row["bytes"], row["flops"],
                                    row["times"]["difuse"]["seconds"])
        if "times" in row:
            row["targets"] = [target.judge(row) for target in TARGETS if fits(target, row)]
        key = [row.get(name) for name in ("group", "op", "case", "dtype", "pass")]
        same = [i for i, old in enumerate(report["rows"])
                if [old.get(name) for name in ("group", "op", "case", "dtype", "pass")] == key]
        if same:
            report["rows"][same[0]] = row
        else:
            report["rows"].append(row)


def fits(target, row):
    """Whether the target is set for this row: bandwidth for large calls, launches for the CUDA kernels."""
    return (target.fits({"shape": (), **row}) and (target.metric != "copy" or row["bytes"] >= LARGE)
            and (target.metric != "us" or row["backend"] == "cuda"))


def failures(report):
    """Everything that makes the exit code 1, a sentence each."""
    found = [f"{failed['job']}: {failed['why']}" for failed in report["failed"]]
    return found + [f"{row['op']}, {row['case']}, {row['pass']}: {run.wrong(row['gate'])}" for row in report["rows"]
                    if "gate" in row and not row["gate"]["ok"]]


def write(out, report):
    """The paths of <gpu>-<date>.json and .md, each written whole or not at all."""
    machine = report["machine"]
    return run.write_files(out, f"{run.slug(machine['gpu'])}-{run.stamp(machine)}", report, table(report))


def table(report):
    """The whole report as Markdown."""
    def of(group):
        return [row for row in report["rows"] if row["group"] == group]

    lines = header(report)
    if of("tests"):
        lines += ["", *run.aligned(("tests on the GPU", "passed", "failed", "skipped", "finished"),
                                   map(test_cells, of("tests")))]
    if of("graphs"):
        lines += ["", *run.aligned(("CUDA graphs", "case", "dtype", "replays", "same bits as eager", "verdict"),
                                   map(graph_cells, of("graphs")))]
    for group in ("ops", "model"):
        if of(group):
            lines += ["", *run.aligned(COLUMNS, map(cells, of(group)))]
    if of("overhead"):
        lines += ["", *run.aligned(("host time of a call", "auto", "difuse", "triton", "eager", "remarks"),
                                   map(overhead_cells, of("overhead")))]
    return "\n".join([*lines, "", *footer(report)])


def header(report):
    """Machine, versions, command, ceilings."""
    m, c = report["machine"], report["ceilings"]
    lines = [f"# Benchmarks: {m['gpu']}, {m['date']}", ""]
    if report["dry_run"]:
        lines += ["**Dry run**: tiny cases on a CPU with stand-ins for the GPU. It shows that the suite runs; no "
                  "number below means anything.", ""]
    lines += [
        f"- GPU: {m['gpu']}, {m['capability']}, {m['multiprocessors']} multiprocessors, {m['memory_bytes'] >> 30} GiB, "
        f"L2 {m['cache_bytes'] >> 20} MiB; host: {m['cpu']}, {m['cores']} cores",
        "- state at the start: " + (", ".join(f"{name} {value}" for name, value in m["driver"].items()) or "not read"),
        f"- versions: difuse {m['difuse']} at {m['commit']}, torch {m['torch']}, CUDA {m['cuda']}, "
        f"python {m['python']}",
        f"- command: `{m['command']}`"]
    if c:
        lines.append(f"- ceilings, measured: copy {c['copy_bytes_per_second'] / 1e12:.2f} TB/s (read + written, "
                     f"{c['buffer_bytes'] >> 20} MiB of random data), {c['gemm_size']}³ product "
                     + ", ".join(f"{c[f'gemm_{name}_flops_per_second'] / 1e12:.0f} TFLOP/s {name}"
                                 for name in ("bf16", "fp32")))
    return lines


READING = (
    "- Medians of interleaved runs, ± the inter-quartile range. x: how many times faster difuse is; below 1 it is",
    "  slower.",
    "- Ops: device time, calls queued ahead, inputs and results rotating through memory beyond the L2. Models: as",
    "  users wait for them. difuse: the backend that auto takes, in brackets; triton: the other one, if there are two.",
    "- ceiling: the time that the bytes need at the copy bandwidth above, or the FLOPs at the product's rate, if that",
    "  is longer; tensors count once. reached: ceiling over difuse's time.",
    "- compile: torch.compile, max-autotune-no-cudagraphs for ops and the default mode for models; in brackets its",
    "  first call. best other: the fastest of the rest, by name. -: not run.",
)


def footer(report):
    """How to read the tables; targets, what was not measured, what failed."""
    judged = [target for row in report["rows"] for target in row.get("targets", ()) if target["reached"] is not None]
    lines = [*READING, "", f"Targets reached: {sum(target['reached'] for target in judged)} of {len(judged)}. "
             f"Failures: {len(failures(report))}.{'' if report['complete'] else ' The run is not complete.'}"]
    if report["not_measured"]:
        lines += ["", "Not measured:", "", *(f"- {one['job']}: {run.one_line(one['why'])}"
                                             for one in report["not_measured"])]
    if failures(report):
        lines += ["", "Failed:", "", *(f"- {run.one_line(failure)}" for failure in failures(report))]
    return lines


def test_cells(row):
    """One group of tests."""
    counts = row["counts"]
    return [row["op"], *(str(counts.get(name, 0)) for name in ("passed", "failed", "skipped")),
            "yes" if row["finished"] else "not finished: out of time"]


def graph_cells(row):
    """One recording."""
    return [row["op"], row["case"], row["dtype"], row["pass"], "yes" if row["same_bits"] else "no",
            "right" if row["gate"]["ok"] else run.wrong(row["gate"])]


def overhead_cells(row):
    """What one call costs the host."""
    times = row["times"]
    return [row["op"], row["backend"], *(run.time_text(times.get(name)) for name in ("difuse", "triton", "eager")),
            remarks(row)]


def cells(row):
    """One pass of an op or a model."""
    head = [row["op"], row["case"], row["pass"]]
    if "skipped" in row or not row["gate"]["ok"]:
        why = f"not measured: {run.one_line(row['skipped'])}" if "skipped" in row else run.wrong(row["gate"])
        return [*head, *["-"] * (len(COLUMNS) - 4), why]
    times, ratios = row["times"], row["ratios"]
    compiled = run.time_text(times.get("compile"))
    if "compile_seconds" in row:
        compiled += f" ({row['compile_seconds']:.0f} s)"
    others = {name: timing["seconds"] for name, timing in times.items() if name not in NOT_RIVALS}
    best = min(others, key=others.get, default=None)
    ceiling = f"{run.seconds_text(row['predicted_seconds'])} {row['bound']}" if "share" in row else "-"
    memory = ", ".join(f"{name} {value / 2**30:.2f} GiB" for name, value in row.get("memory", {}).items()) or "-"
    return [*head, f"{run.time_text(times['difuse'])} ({row['backend']})", run.time_text(times.get("triton")),
            run.time_text(times["eager"]), run.ratio_text(ratios, "eager"), compiled, run.ratio_text(ratios, "compile"),
            "-" if best is None else f"{run.time_text(times[best])} {best}", run.ratio_text(ratios, best),
            run.time_text(times.get("copy")), ceiling, f"{100 * row['share']:.0f} %" if "share" in row else "-", memory,
            remarks(row)]


def remarks(row):
    """Targets, noise, rivals that refused."""
    found = []
    for target in row["targets"]:
        got = "not run" if target["got"] is None else "yes" if target["reached"] else "NO"
        aim = AIMS.get(target["metric"], "{:g}x " + target["metric"])
        found.append(f"{aim.format(target['value'])}: {got}")
    if max(timing["spread"] for timing in row["times"].values()) > run.NOISY:
        found.append("noisy")
    if "no graphs" in row["times"]:
        found.append(f"without graphs {run.time_text(row['times']['no graphs'])}")
    found += [f"{name} refused: {run.one_line(why)[:80]}" for name, why in row.get("refused", {}).items()]
    return "; ".join(found)


def readme(path):
    """The README's table of a committed result: whole models, and the large calls of each op.

    Raises ValueError for a dry run: nothing is claimed that no GPU has shown.
    """
    report = json.loads(path.read_text())
    if report.get("schema") != SCHEMA or report["dry_run"]:
        raise ValueError(f"{path}: {'a dry run' if report.get('dry_run') else 'not a result of make gpu'}; the README "
                         "shows what a GPU has measured")
    m, rows = report["machine"], []
    for row in report["rows"]:
        large = row["group"] == "model" or (row["group"] == "ops" and row.get("bytes", 0) >= LARGE)
        if large and "times" in row:
            rows.append([row["op"], row["case"], row["pass"], run.seconds_text(row["times"]["difuse"]["seconds"]),
                         run.ratio_text(row["ratios"], "eager"), run.ratio_text(row["ratios"], "compile"),
                         f"{100 * row['share']:.0f} %" if "share" in row else "-"])
    columns = ("op or model", "case", "pass", "time", "x eager", "x torch.compile", "of the ceiling")
    return "\n".join([f"{m['gpu']}, torch {m['torch']}, bf16, difuse at {m['commit']} (`{path.name}`, which also holds "
                      "spreads, rivals and losses):", "", *run.aligned(columns, rows)])
