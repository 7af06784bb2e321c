"""`difuse sample`: images of a checkpoint in one PNG."""
import difflib
import pathlib

import torch

from difuse.diffusion import SAMPLERS, VP, process_from_config
from difuse.diffusion.flow_as_vp import FlowAsVP
from difuse.evaluation import image_grid, save_png
from difuse.files import check_folder, require_extras
from difuse.inference.fidelity import fidelity, recorded_calls
from difuse.inference.freeze import freeze
from difuse.inference.sample import sample
from difuse.training import load_model

FEW = 8  # images at most that a lower precision is smoothed and judged by


def run(args):
    """Draw, and return the exit code. args: of the command line, see difuse/cli.py."""
    if args.sampler and args.sampler not in SAMPLERS:
        near = difflib.get_close_matches(args.sampler, SAMPLERS, n=1, cutoff=0)[0]
        raise ValueError(f"--sampler {args.sampler!r} is unknown; did you mean {near!r}? "
                         f"Expected one of {', '.join(SAMPLERS)}")
    require_extras("difuse sample", "PIL")
    out = pathlib.Path(args.out)
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out!r} does not end in .png; the images are drawn into one PNG file")
    if out.is_dir():
        raise ValueError(f"--out {args.out!r} is a folder; expected a file")
    check_folder(out.parent)
    model, meta = load_model(args.checkpoint)
    if model.config["in_channels"] not in (1, 3):
        raise ValueError(f"{args.checkpoint}: a model of {model.config['in_channels']} channels (latents?); only grey "
                         "and colour images can be drawn. Use difuse.sample(...) and your own decoder")
    labels = args.labels or list(range(min(model.num_classes, 10)))
    if not all(0 <= label < model.num_classes for label in labels):
        raise ValueError(f"--labels {','.join(map(str, labels))}: the model knows 0 to {model.num_classes - 1}")
    process, prediction = process_from_config(meta["process"]), meta["prediction"]
    sampler = args.sampler or ("flow_euler" if process.name == "flow" else "ddim")
    as_vp = process.name == "flow" and not SAMPLERS[sampler].takes(process)
    if as_vp:
        process, prediction = VP(), "x0"
    drawn = torch.tensor(labels).repeat_interleave(args.n)
    seeds = [args.seed + k for k in range(args.n)] * len(labels)

    def draw(model, images=slice(None), steps=args.steps, seeds=seeds):
        return sample(FlowAsVP(model, process) if as_vp else model, drawn[images], sampler=sampler, steps=steps,
                      guidance=args.guidance, seeds=seeds[images], process=process,
                      prediction=prediction, spacing=args.spacing, batch_size=args.batch_size, progress=True)

    if args.precision:
        few = slice(0, len(drawn), -(-len(drawn) // FEW))
        others = [(seed + 10**6) % 2**63 for seed in seeds]  # smoothed by other images than it is judged by
        model = _frozen(model.eval(), args.precision, lambda m: draw(m, few, 4, others), lambda m: draw(m, few))
    images = draw(model)
    scale = args.scale or max(1, 128 // images.shape[-1])
    out.parent.mkdir(parents=True, exist_ok=True)
    save_png(out, image_grid(images, args.n, scale=scale, gap=scale))
    print(f"{len(images)} images in {out}, a row for each of the labels {', '.join(map(str, labels))}")
    return 0


def _frozen(model, precision, draw_examples, draw_few):
    """The frozen model; below fp32 what that changes, measured on a few images, is printed."""
    if precision == "fp32":
        return freeze(model)
    frozen = freeze(model, precision, recorded_calls(model, draw_examples) if precision == "int8" else None)
    print(f"{precision} beside fp32, {fidelity(model, frozen, lambda m: draw_few(m).clamp(-1, 1))}")
    return frozen
