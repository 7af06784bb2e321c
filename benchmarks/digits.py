"""`python -m benchmarks.digits`: what the precisions of `difuse.freeze` do to the demo's digits, and to its speed.

Needs a checkpoint of `difuse demo`. The same noise for every precision; 8 bits are smoothed by other images. Prints a
table and writes it with a picture, a row of digits per precision: precision.md, precision.png.
"""
import argparse
import pathlib
import sys

import torch

import difuse
from benchmarks.run import aligned, commit
from benchmarks.timing import versus
from difuse.demo import GUIDANCE, JUDGED, STEPS
from difuse.diffusion import process_from_config
from difuse.evaluation import class_share, digit_classifier, frechet_distance, image_grid, save_png
from difuse.files import check_folder, write_atomically
from difuse.training import ImageDataset, load_model

COLUMNS = ("precision", "recognised as their class", "Frechet distance", "PSNR", "error of a call, mean", "at most",
           "seconds per image", "times faster")
PLAIN = "not frozen"
FEW = 20  # images that are shown and timed


def main(argv=None):
    """Measure, print and write; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.digits", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="demo/model.safetensors", help="default: %(default)s")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo"), metavar="DIR", help="default: demo")
    parser.add_argument("--images", type=int, default=JUDGED, help="to judge by (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.images < FEW or args.steps < 1:
        parser.error(f"--images is {args.images} and --steps {args.steps}; expected at least {FEW} and 1")
    if not pathlib.Path(args.checkpoint).is_file():
        parser.error(f"{args.checkpoint} is no file; `difuse demo` writes demo/model.safetensors")
    out = check_folder(args.out)
    out.mkdir(parents=True, exist_ok=True)
    model, meta = load_model(args.checkpoint)
    rows, shown = measure(model.eval(), meta, args.images, args.steps)
    text = "\n".join(aligned(COLUMNS, rows))
    print(text)
    save_png(out / "precision.png", image_grid(shown, FEW, scale=8, gap=4))
    write_atomically(out / "precision.md", f"difuse at {commit()}, {args.images} images of {args.steps} steps\n\n"
                                           f"{text}\n".encode())
    print(f"written: {out / 'precision.md'}, {out / 'precision.png'}")
    return 0


def measure(model, meta, images, steps):
    """(rows of the table, digits [4*FEW,1,8,8], FEW of each precision)."""
    train, held_out = ImageDataset.digits("train"), ImageDataset.digits("held_out")
    judge, labels = digit_classifier(train.images, train.labels), torch.arange(images) % 10

    def draw(network, few=slice(None), first_seed=0, progress=False):
        seeds = range(first_seed, first_seed + images)[few]
        return difuse.sample(
            network, labels[few], process=process_from_config(meta["process"]), prediction=meta["prediction"],
            sampler="flow_euler", steps=steps, guidance=GUIDANCE, seeds=seeds, batch_size=100,
            progress=progress).clamp(-1, 1)

    def draw_few(network):
        return draw(network, slice(FEW))

    calls = difuse.recorded_calls(model, lambda network: draw(network, slice(FEW), 10**6))
    networks = {PLAIN: model} | {precision: difuse.freeze(
        model, precision, calls[::steps // 5 or 1] if precision == "int8" else None)
        for precision in ("fp32", "bf16", "int8")}
    speed = versus({name: lambda network=network: draw_few(network) for name, network in networks.items()}, ours=PLAIN)
    rows, shown = [], []
    for name, network in networks.items():
        drawn, found = draw(network, progress=True), difuse.fidelity(model, network, draw_few)
        shown.append(drawn[:FEW])
        seconds, share = speed["times"][name]["seconds"], class_share(judge, drawn, labels)
        rows.append((name, f"{share:.3f}", f"{frechet_distance(drawn, held_out.images):.2f}",
                     f"{found.psnr:.1f} dB", f"{sum(found.errors) / len(found.errors):.1e}", f"{max(found.errors):.1e}",
                     f"{seconds / FEW:.4f}", f"{speed['times'][PLAIN]['seconds'] / seconds:.2f}"))
    return rows, torch.cat(shown)


if __name__ == "__main__":
    sys.exit(main())
