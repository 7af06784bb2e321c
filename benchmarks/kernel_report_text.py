"""The kernel report as text: a line per kernel and target for the terminal, and a Markdown file grouped by op."""
import json
import math

from difuse.files import write_atomically

COLUMNS = ("kernel", "first used by", "target", "regs", "shared", "spills", "matrix", "ld128", "st128", "loops",
           "blocks", "programs", "at best", "bound")
PASS_COLUMNS = ("case", "dtype", "pass", "MB", "GFLOP", "at best", "bound")
READING = (
    "- regs: registers per thread (a: of which accumulation registers). shared: bytes per block. spills: what went to "
    "memory.",
    "- matrix: tensor-core instructions in the code. ld128, st128: 128-bit global loads and stores, of all of them; "
    "bulk copies count as 128-bit.",
    "- loops: instructions / matrix instructions / exponentials and the like, in each innermost loop with matrix "
    "instructions or else in the longest one.",
    "- blocks: how many fit on one multiprocessor. programs: the grid at the first use.",
    "- at best: the time of the whole pass (all its kernels) on an H200, from bytes at {bandwidth:.1f} TB/s or FLOPs "
    "at {rate:.0f} TFLOP/s (16 bit), whichever is longer: a prediction, not a measurement. bound: which one it is.",
)


def spills(row):
    """Registers that went to memory, as text; empty where none did."""
    parts = [f"{row['stack']} B stack"] if row["stack"] else []
    parts += [f"{count} {name}" for name, count in row["local"].items()]
    parts += [f"{row['vgpr_spills']} VGPR"] if row.get("vgpr_spills") else []
    return ", ".join(parts)


def cells(row, passes):
    """One kernel on one target, as the texts of COLUMNS."""
    first = passes[row["used_by"][0]["pass"]]
    more = len(row["used_by"]) - 1
    head = [row["kernel"].removesuffix("_kernel"),
            f"{first['case']} {first['dtype']} {first['pass']}" + (f" +{more}" if more else ""), row["target"]]
    tail = [str(math.prod(row["used_by"][0]["grid"])), seconds(first["predicted_seconds"]), first["bound"]]
    if "failed" in row:
        return [*head, "does not compile", *["-"] * 7, *tail]
    registers = f"{row['registers']}" + (f" ({row['agpr']}a)" if row.get("agpr") else "")
    loops = " ".join("/".join(map(str, loop.values())) for loop in row["loops"])
    return [*head, registers, str(row["shared"]), spills(row) or "-",
            " ".join(f"{count} {name}" for name, count in row["matrix"].items()) or "-", wide(row["loads"]),
            wide(row["stores"]), loops or "-", str(row["blocks_per_sm"]), *tail]


def wide(accesses):
    """How many of the accesses are 128 bits wide or more, of how many."""
    return f"{sum(n for bits, n in accesses.items() if bits in ('128', '256', 'bulk'))}/{sum(accesses.values())}"


def pass_cells(found):
    """One pass, as the texts of PASS_COLUMNS."""
    return [found["case"], found["dtype"], found["pass"], f"{found['bytes'] / 1e6:.1f}", f"{found['flops'] / 1e9:.3g}",
            seconds(found["predicted_seconds"]), found["bound"]]


def seconds(value):
    """A time with three digits."""
    scale, unit = (1e3, "ms") if value >= 1e-3 else (1e6, "us")
    return f"{value * scale:.3g} {unit}"


def aligned(rows, markdown=False):
    """Lines of a table whose first row is its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return ["  ".join(row).rstrip() for row in padded]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    return [lines[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *lines[1:]]


def terminal(report):
    """The report for a terminal."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in report["kernels"]):
        rows = [cells(row, report["passes"]) for row in report["kernels"] if row["op"] == op]
        lines += [op, *aligned([COLUMNS, *rows]), ""]
    return "\n".join([*lines, summary(report)])


def summary(report):
    """How much was compiled, in a sentence or two."""
    rows, missing = report["kernels"], report["not_written"]
    return (f"{len(rows)} kernels for {len({row['target'] for row in rows})} targets, from {len(report['passes'])} "
            f"passes, in {report['cpu_seconds']} CPU seconds; triton {report['environment']['triton']}."
            + (f" Without Triton kernels yet: {', '.join(missing)}." if missing else ""))


def markdown(report):
    """The report as a Markdown file."""
    env, ceilings = report["environment"], report["ceilings"]
    lines = [
        "# Kernel report: what Triton's compiler makes of the kernels", "",
        f"- versions: triton {env['triton']}, torch {env['torch']}, difuse {env['difuse']} at {env['commit']}",
        f"- command: `{env['command']}`", f"- {summary(report)}",
        *(line.format(bandwidth=ceilings["bytes_per_second"] / 1e12,
                      rate=ceilings["flops_per_second"]["bf16"] / 1e12) for line in READING), "",
        "## Offenders", "", *(f"- {text}" for text in report["offenders"] or ["none"])]
    for op in dict.fromkeys(row["op"] for row in report["kernels"]):
        passes = [found for found in report["passes"].values() if found["op"] == op]
        rows = [cells(row, report["passes"]) for row in report["kernels"] if row["op"] == op]
        lines += ["", f"## {op}", "", *aligned([PASS_COLUMNS, *map(pass_cells, passes)], markdown=True), "",
                  *aligned([COLUMNS, *rows], markdown=True)]
    return "\n".join(lines) + "\n"


def write(out, report):
    """kernel-report.json and .md in the folder `out`, each written whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    head = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items()
                      if key not in ("passes", "kernels"))
    passes = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in report["passes"].items())
    kernels = ",\n".join(json.dumps(row, default=str) for row in report["kernels"])  # a line each: diffs can be read
    text = f'{{{head},\n"passes": {{\n{passes}\n}},\n"kernels": [\n{kernels}\n]}}\n'
    for name, content in (("kernel-report.json", text), ("kernel-report.md", markdown(report))):
        write_atomically(out / name, content.encode())
        print(f"written: {out / name}")
