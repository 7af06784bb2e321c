"""docs/equivalence.md: how close accelerated models stay to the truth, next to eager, and how much faster they are.

    python -m benchmarks.equivalence [--family flux ...] [--only errors | speed] [--compile] [--out docs/equivalence.md]

All of it is about an hour of two cores. Rows are kept in a .json file beside the document, which is written anew after
every family: a run of one family, or an interrupted one, leaves the other families' rows as they were.
"""
import argparse
import copy
import functools
import json
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch
from tqdm import tqdm

import difuse
from benchmarks.families import NAMES, load
from benchmarks.families.proofs import (
    Truth,
    cast,
    differentiable,
    judge,
    psnr,
    tensors,
    training_losses,
    trajectory,
)
from benchmarks.timing import RUNS, interleaved
from difuse.files import write_atomically
from difuse.integrations.products import emulates_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = 4  # seconds of a call of eager in bfloat16, emulated mostly, beyond which nothing is repeated
EMULATED = 1  # seconds of eager's forward in an emulated bfloat16; its backward takes 25 to 50 times as long
TARGETS = {("forward", "float32"): 1.15, ("forward", "bfloat16"): 1.35, ("training", "float32"): 1.15,
           ("training", "bfloat16"): 1.3}


def proof(family):
    """One row of the table of errors."""
    row = [family.title]
    for dtype in DTYPES.values():
        found = judge(family, dtype)
        row += [f"{found.forward:.1e}", f"{found.eager_forward:.1e}", f"{found.worst:.1e}",
                f"{found.eager_worst:.1e}{'' if found.ok else ' OUT OF BUDGET'}"]
    model = family.build()
    ours = copy.deepcopy(model)
    difuse.accelerate(ours)
    if family.time is None:
        row.append("-")
    else:
        row.append(f"{psnr(trajectory(family, ours), trajectory(family, model)):.0f} dB")
    with Truth():
        true = training_losses(family, copy.deepcopy(model).double(), torch.float64)
    errors = [((training_losses(family, each) - true).abs().max() / true.max()).item() for each in (ours, model)]
    return [*row, *(f"{error:.1e}" for error in errors)]


def calls(module, args, kwargs):
    """{"forward": function, "training": function} of one block; training: forward and the gradients of all it takes."""
    names = differentiable(kwargs)
    inputs = {key: cast(value, value.dtype, grad=True) if key in names else value for key, value in kwargs.items()}
    leaves = [*module.parameters(), *(inputs[key] for key in names)]
    with torch.no_grad():
        grads = [torch.ones_like(out) for out in tensors(module(*args, **kwargs))]

    def forward():
        with torch.no_grad():
            module(*args, **kwargs)

    def training():
        torch.autograd.grad(tensors(module(*args, **inputs)), leaves, grads, allow_unused=True)

    return {"forward": forward, "training": training}


def seconds(function):
    """Seconds of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def speed(family, compiles):
    """Rows of the table of speeds: one per block, dtype and pass."""
    rows = []
    for name, make in family.wide.items():
        for dtype_name, dtype in DTYPES.items():
            block, args, kwargs = make(dtype)
            ours = copy.deepcopy(block)
            difuse.accelerate(ours)
            with torch.no_grad():
                error = max((a - b).abs().max().item() / b.abs().max().item() for a, b in zip(
                    tensors(ours(*args, **kwargs)), tensors(block(*args, **kwargs)), strict=True))
            if error > 20 * torch.finfo(dtype).eps:
                raise AssertionError(f"{family.name}, {name}, {dtype_name}: differs by {error:.1e}; no speed")
            contenders = {"difuse": ours, "eager": block}
            if compiles and dtype_name == "float32":
                torch._dynamo.reset()
                contenders["compile"] = torch.compile(copy.deepcopy(block))
            contenders = {label: calls(module, args, kwargs) for label, module in contenders.items()}
            once = {}
            for kind in ("forward", "training"):
                functions = {label: each[kind] for label, each in contenders.items()}
                seconds(functions["difuse"])
                if kind == "training" and dtype_name == "bfloat16" and once["eager"] > EMULATED:
                    rows.append([family.title, name, dtype_name, kind, _ms(seconds(functions["difuse"])), *"----",
                                 "not compared: eager takes minutes"])
                    continue
                once = {label: seconds(functions[label]) for label in ("difuse", "eager")}
                if dtype_name == "bfloat16" and once["eager"] > SLOW:
                    times, spread = once, "one call"
                else:
                    timings = interleaved(functions)
                    times = {label: timing.seconds for label, timing in timings.items()}
                    spread = f"{max(timing.spread for timing in timings.values()):.0%}"
                ratio, aim = times["eager"] / times["difuse"], TARGETS[kind, dtype_name]
                rows.append([family.title, name, dtype_name, kind, _ms(times["difuse"]), _ms(times["eager"]),
                             f"{ratio:.2f}", f"{times['compile'] / times['difuse']:.2f}" if "compile" in times else "-",
                             spread, "yes" if ratio >= aim else f"no, {aim}"])
    return rows


def _ms(seconds):
    return f"{seconds * 1e3:.3g}"


def table(head, rows):
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows])


@functools.cache
def commit():
    """The commit of this checkout; asked for before the report itself is changed."""
    return subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()


def machine():
    """Where and with what this ran."""
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                if line.startswith("model name")), platform.processor())
    versions = ", ".join(f"{name} {sys.modules[name].__version__}" for name in ("torch", "diffusers")
                         if name in sys.modules)
    return (f"{cpu}, {torch.get_num_threads()} threads, bfloat16 instructions: "
            f"{'no' if emulates_bfloat16() else 'yes'}; {versions}; commit {commit() or '-'}")


def places(found, part):
    """Where a table's rows were measured, a sentence each."""
    return "\n".join(f"On {place}." for place in sorted({entry[f"{part}_on"] for entry in found if part in entry}))


def document(found):
    """docs/equivalence.md, of {family: {"errors": row, "errors_on": where, "speed": rows, "speed_on": where}}."""
    found = [found[name] for name in NAMES if name in found]
    proofs = [entry["errors"] for entry in found if "errors" in entry]
    speeds = [row for entry in found for row in entry.get("speed", ())]
    return f"""# Accelerated models next to the unmodified ones

Made by `make equivalence` (`python -m benchmarks.equivalence`).

## Errors

Small models of every family (`benchmarks/families`), random weights. Relative error against the unmodified model in
float64 on the same values, rms over rms: of the output, and of the parameter or input whose gradient is worst;
eager's own beside it. Budget: 1.5 times eager's and one rounding, over all gradients, and no single one far worse.
Trajectory: twenty Euler steps in float32, difuse against eager. Training: the largest error of fifty AdamW steps'
losses against the same training in float64, over the largest loss.

{places(found, "errors")}

{table(["family", "float32 forward", "eager", "worst gradient", "eager", "bfloat16 forward", "eager",
        "worst gradient", "eager",
        "trajectory", "training", "eager"], proofs)}

## Speed

Single blocks of published widths, in milliseconds, medians of {RUNS} interleaved runs; x: how many times faster than
eager, and than torch.compile of the unmodified block; spread: the largest inter-quartile range over its median, or
"one call" where one of eager in bfloat16 takes more than {SLOW} seconds and nothing was repeated.
Training is a forward and a backward pass. A speed is measured only after the outputs agreed. On a CPU without bfloat16
instructions eager's products in bfloat16 are emulated, which explains ratios above 2.

{places(found, "speed")}

{table(["family", "block", "dtype", "pass", "difuse", "eager", "x eager", "x compile", "spread", "target"], speeds)}
"""


def main(argv=None):
    """Write the report; returns 1 if an error is out of budget."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equivalence", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=NAMES, default=NAMES, help="only these")
    parser.add_argument("--only", choices=("errors", "speed"), help="one of the two tables")
    parser.add_argument("--compile", action="store_true", help="torch.compile beside eager, float32")
    parser.add_argument("--out", type=Path, default=Path("docs/equivalence.md"))
    args = parser.parse_args(argv)
    commit()
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
    state = args.out.with_suffix(".json")
    found = json.loads(state.read_text()) if state.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(args.family, desc="families", disable=None):
        family, entry = load(name), found.setdefault(name, {})
        if args.only != "speed":
            entry |= {"errors": proof(family), "errors_on": machine()}
        if args.only != "errors":
            entry |= {"speed": speed(family, args.compile), "speed_on": machine()}
        write_atomically(state, json.dumps(found, indent=1).encode())
        write_atomically(args.out, document(found).encode())
    print(f"wrote {args.out}")
    return int(any("OUT" in cell for name in args.family for cell in found[name].get("errors", ())))


if __name__ == "__main__":
    sys.exit(main())
