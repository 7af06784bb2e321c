"""`python -m benchmarks.samplers`: what every sampler makes of the demo's digits in how many calls of the model.

Needs a checkpoint of `difuse demo`. The same noise, labels and guidance for all; the times are evenly spaced in
ln(alpha / sigma), or, for methods of the straight path, in time. Writes docs/samplers.md's table and picture.
"""
import argparse
import pathlib
import sys

import torch
from tqdm import tqdm

import difuse
from benchmarks.run import aligned, commit
from difuse.demo import GUIDANCE
from difuse.diffusion import SAMPLERS, VESDE, VP, Flow, process_from_config
from difuse.diffusion.flow_as_vp import FlowAsVE, FlowAsVP
from difuse.evaluation import class_share, digit_classifier, frechet_distance
from difuse.files import check_folder, write_atomically
from difuse.training import ImageDataset, load_model

CALLS = 5, 10, 20, 50
IMAGES = 500
HIGHEST = 5.0
START, END = "<!-- made by python -m benchmarks.samplers -->", "<!-- end -->"
DISTILLED = "lcm", "consistency", "flow_stochastic"  # for networks distilled to them; on another they only show


def main(argv=None):
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.samplers", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo/model.safetensors", help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs"), metavar="DIR", help="default: docs")
    parser.add_argument("--images", type=int, default=IMAGES, help="to judge by (default: %(default)s)")
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS, help="of the model (default: 5 10 20 50)")
    args = parser.parse_args(argv)
    if args.images < 100 or min(args.calls) < 1:
        parser.error(f"--images is {args.images} and --calls {args.calls}; expected at least 100 and 1")
    if not pathlib.Path(args.checkpoint).is_file():
        parser.error(f"{args.checkpoint} is no file; `difuse demo` writes demo/model.safetensors")
    out = check_folder(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, meta = load_model(args.checkpoint)
    found = measure(difuse.freeze(model.eval()), meta, args.images, args.calls)
    text = table(found, args.calls, args.images)
    print(text)
    page = out / "samplers.md"
    before = page.read_text() if page.is_file() else f"{START}\n{END}\n"
    head, rest = before.split(START)
    write_atomically(page, f"{head}{START}\n{text}\n{END}{rest.split(END)[1]}".encode())
    plot(out / "samplers.png", found)
    print(f"written: {page}, {out / 'samplers.png'}")
    return 0


def measure(model, meta, images, budgets):
    """{sampler: [(calls, class share, Frechet distance)]}."""
    train, held_out = ImageDataset.digits("train"), ImageDataset.digits("held_out")
    judge, labels = digit_classifier(train.images, train.labels), torch.arange(images) % 10
    process, found = process_from_config(meta["process"]), {}
    jobs = [(name, budget) for name in SAMPLERS for budget in budgets]
    for name, budget in (bar := tqdm(jobs, unit="run", mininterval=10 if not sys.stderr.isatty() else 0.1)):
        bar.set_description(f"{name}, {budget} calls")
        settings = setting(SAMPLERS[name], model, process, meta["prediction"], budget)
        if settings is None:
            continue
        network, calls, settings = settings
        drawn = difuse.sample(network, labels, sampler=name, guidance=GUIDANCE, batch_size=100, **settings).clamp(-1, 1)
        found.setdefault(name, []).append((calls, class_share(judge, drawn, labels),
                                           frechet_distance(drawn, held_out.images)))
    return found


def setting(sampler, model, process, prediction, budget):
    """(network, calls, arguments of `difuse.sample`) with at most `budget` calls; None where nothing fits."""
    spacing = "log_snr"
    if isinstance(process, Flow) and not sampler.takes(process):
        seen, process = (FlowAsVP, VP()) if sampler.takes(VP()) else (FlowAsVE, VESDE())
        model, prediction = seen(model, process), "x0"
        spacing = None if sampler.takes(VP()) else "log_snr"
    elif sampler.name.startswith("flow"):
        spacing = None
    for steps in range(budget, 0, -1):
        calls = len(sampler.program(process, steps, prediction, spacing=spacing).calls)
        if calls <= budget:
            return model, calls, dict(process=process, prediction=prediction, steps=steps, spacing=spacing)
    return None


def table(found, budgets, images):
    """Markdown: a row per sampler, a column per budget, the share and the distance."""
    rows = []
    for name, points in found.items():
        cells = {}
        for calls, share, distance in points:
            budget = min(each for each in budgets if each >= calls)
            cells[budget] = f"{share:.3f}, {distance:.2f}" + ("" if calls == budget else f" ({calls})")
        rows.append((name, *(cells.get(budget, "-") for budget in budgets)))
    return (f"{images} digits of the demo's model each, guidance {GUIDANCE}, difuse at {commit()}: the share that is "
            "recognised as its class, the Frechet distance to held-out digits; in brackets the calls that fitted.\n\n"
            + "\n".join(aligned(("sampler", *(f"{budget} calls" for budget in budgets)), rows)))


def plot(path, found):
    """Distance against calls, a line per sampler; what is above HIGHEST leaves the picture."""
    import io

    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(10, 6.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    styles = [(f"C{colour}", line) for line in ("-", "--", ":") for colour in (0, 1, 2, 3, 4, 5, 7, 8)]
    for (name, points), (colour, line) in zip(found.items(), styles, strict=False):
        calls, _, distance = zip(*points, strict=True)
        axes.plot(calls, distance, color=colour, linestyle=line, marker="o", markersize=3,
                  label=name + (" *" if name in DISTILLED else ""))
    axes.set(xscale="log", yscale="log", xlabel="calls of the model", ylabel="Frechet distance to held-out digits",
             title="Digits of the demo's model (* made for distilled networks, which this one is not)")
    lowest = min(distance for points in found.values() for _, _, distance in points)
    axes.set_ylim(0.97 * lowest, HIGHEST)
    for axis, ticks in ((axes.xaxis, CALLS), (axes.yaxis, (2, 2.2, 2.5, 3, 3.5, 4, 5))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    write_atomically(path, written.getvalue())


if __name__ == "__main__":
    sys.exit(main())
