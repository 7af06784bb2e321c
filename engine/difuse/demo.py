"""`difuse demo`: train on real handwritten digits, draw new ones, and measure quality and speed, all in one run."""
import copy
import json
import os
import platform
import statistics
import sys
import time

import torch
from tqdm import tqdm

from difuse.diffusion import VP
from difuse.diffusion.flow_as_vp import FlowAsVP
from difuse.evaluation import class_share, digit_classifier, frechet_distance, image_grid, plot_loss, save_png
from difuse.files import require_extras, write_atomically
from difuse.inference.sample import sample
from difuse.training import ImageDataset, TrainConfig, Trainer, build_model
from difuse_kernels import explain, explain_reset, native, use_backend
from difuse_kernels.dispatch import OPS

GOALS = {"class_share": 0.98, "frechet": 2.3}
LONGEST = 90.0  # seconds of training
MODEL = {"patch_size": 2, "hidden_size": 128, "depth": 6, "num_heads": 4}
GUIDANCE = 1.5
STEPS = 50
SHOWN = 100  # images in the grid, ten of each digit
JUDGED = 1000  # images behind class_share and frechet: a 64-dimensional Gaussian from 100 would be mostly noise


def run(out, *, seconds=None, quick=False):
    """Train, sample, judge, measure; write pictures, report.json and model.safetensors into the folder `out`.

    seconds of training, at most 90. quick: a few steps of everything, quality measured but not judged.
    Returns 0, or 1 where the digits miss the goals. Raises ValueError for `seconds`, ImportError without the extras.
    """
    seconds = seconds or (5.0 if quick else 85.0)
    if not 0 < seconds <= LONGEST:
        raise ValueError(f"demo: {seconds:g} s of training; expected more than 0 and at most {LONGEST:g}")
    require_extras("difuse demo", "sklearn", "PIL", "matplotlib")
    judged, steps, rounds = (SHOWN, 10, 3) if quick else (JUDGED, STEPS, 7)
    train, held_out = ImageDataset.digits("train"), ImageDataset.digits("held_out")
    judge = digit_classifier(train.images, train.labels)
    out.mkdir(parents=True, exist_ok=True)

    explain_reset()
    trainer, train_seconds = _train(train, seconds)
    model = trainer.ema_model()
    trainer.save_model(out / "model.safetensors")
    plot_loss(out / "loss.png", [r["step"] for r in trainer.history], [r["loss"] for r in trainer.history])

    labels = torch.arange(judged) % 10
    samplers = _samplers(model, trainer.process)
    images, quality = {}, {}
    for name, draw in samplers.items():
        images[name] = draw(labels, steps, progress=True).clamp(-1, 1)
        quality[name] = {"class_share": class_share(judge, images[name], labels),
                         "frechet": frechet_distance(images[name], held_out.images)}
    by_class = labels[:SHOWN].argsort(stable=True)
    _draw(out, {name: value[:SHOWN][by_class] for name, value in images.items()}, samplers, steps)
    where, backends = explain(), _backends()

    step_times = _interleaved(rounds, _step_timer(trainer))
    sample_times = _interleaved(rounds, _sample_timer(samplers["flow_euler"], steps))
    report = {
        **_worst(quality),
        "frechet_real": frechet_distance(train.images, held_out.images),
        "class_share_real": class_share(judge, held_out.images, held_out.labels),
        "samplers": quality, "goals": GOALS, "quality_judged": not quick,
        "images_judged": judged, "images_train": len(train), "images_held_out": len(held_out),
        "train_seconds": train_seconds, "train_steps": trainer.step, "batch_size": trainer.config.batch_size,
        "train_step_seconds": step_times["auto"], "train_step_seconds_reference": step_times["reference"],
        "sample_seconds": sample_times["auto"], "sample_seconds_reference": sample_times["reference"],
        "sample_steps": steps, "guidance": GUIDANCE, "parameters": sum(p.numel() for p in model.parameters()),
        "backends": backends, "machine": _machine(),
    }
    write_atomically(out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return _print(report, where, out)


def _train(dataset, seconds):
    config = TrainConfig(
        model=MODEL, data="digits", objective="flow", batch_size=64, learning_rate=3e-3, betas=(0.9, 0.99),
        warmup_steps=50, ema_decay=0.99, log_every=1, steps=5000, time_limit=seconds)
    trainer = Trainer(build_model(config, dataset), dataset, config)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"training a DiT of {parameters / 1e6:.1f} M parameters on {len(dataset)} digits for {seconds:g} s")
    began = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - began


def _samplers(model, flow):
    """name -> draw(labels, steps, ...): Euler on the model's own path, DDIM on the VP path its velocity also serves."""
    vp = VP("linear")
    settings = {"flow_euler": (model, flow, "flow"), "ddim": (FlowAsVP(model, vp), vp, "x0")}

    def with_sampler(name, network, process, prediction):
        def draw(labels, steps, **options):
            return sample(network, labels, sampler=name, steps=steps, guidance=GUIDANCE, process=process,
                          prediction=prediction, batch_size=100, **options)

        return draw

    return {name: with_sampler(name, *values) for name, values in settings.items()}


def _draw(out, images, samplers, steps):
    """samples.png: DDIM left, flow Euler right, a row per digit. denoising.png: ten digits on their way from noise."""
    ddim, euler = (images[name].reshape(10, 10, 1, 8, 8) for name in ("ddim", "flow_euler"))
    grey_column = torch.zeros(10, 1, 1, 8, 8)
    both = torch.cat((ddim, grey_column, euler), 1)  # [10,21,1,8,8]
    save_png(out / "samples.png", image_grid(both.flatten(0, 1), 21, scale=8, gap=4))
    shown, states = {round(k * (steps - 1) / 9) for k in range(10)}, []

    def keep(step, x):
        if step in shown:
            states.append(x.clone())

    samplers["flow_euler"](torch.arange(10), steps, callback=keep)
    columns = torch.stack(states, 1)  # [10,steps shown,1,8,8]
    save_png(out / "denoising.png", image_grid(columns.flatten(0, 1), len(states), scale=8, gap=4))


def _interleaved(rounds, timed):
    """Median seconds of timed() on the kernels and on the reference, by turns so that both meet the same machine."""
    times = {"auto": [], "reference": []}
    for backend in tqdm([*times] * (rounds + 1), desc="timing", leave=False, disable=not sys.stderr.isatty()):
        with use_backend(backend):
            times[backend].append(timed())
    return {backend: statistics.median(values[1:]) for backend, values in times.items()}  # the first warms up


def _step_timer(trainer):
    trial = Trainer(copy.deepcopy(trainer.model).train(), trainer.dataset, trainer.config)

    def seconds():
        began = time.perf_counter()
        trial.train_step()
        return time.perf_counter() - began

    return seconds


def _sample_timer(draw, steps, count=20):
    def seconds_per_image():
        began = time.perf_counter()
        draw(torch.arange(count) % 10, steps)
        return (time.perf_counter() - began) / count

    return seconds_per_image


def _worst(quality):
    """The goals hold for every sampler, so the worst of each counts."""
    return {"class_share": min(q["class_share"] for q in quality.values()),
            "frechet": max(q["frechet"] for q in quality.values())}


def _backends():
    """op -> backend -> calls so far."""
    counts = {}
    for op in OPS.values():
        for (backend, _), calls in op.chosen.items():
            by_backend = counts.setdefault(op.name, {})
            by_backend[backend] = by_backend.get(backend, 0) + calls
    return counts


def _machine():
    return {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "isa": native.ext.isa() if native.ext else None, "python": platform.python_version(),
            "torch": torch.__version__}


def _print(report, where, out):
    """The report for people; returns the exit code."""
    print(f"\nwhere each hot path ran, training and sampling\n{where}\n")
    print(f"{'median, same run':32} {'kernels':>10} {'reference':>10} {'ratio':>7}")
    for name, key in (("training step, batch " + str(report["batch_size"]), "train_step_seconds"),
                      (f"sampled image, {report['sample_steps']} steps", "sample_seconds")):
        ours, reference = report[key], report[key + "_reference"]
        print(f"{name:32} {ours * 1e3:7.1f} ms {reference * 1e3:7.1f} ms {reference / ours:6.2f}x")
    print(f"\n{report['images_judged']} digits per sampler   recognised as their class   Frechet distance to held-out")
    for name, q in report["samplers"].items():
        print(f"{name:24} {q['class_share']:24.3f} {q['frechet']:27.2f}")
    print(f"{'real digits':24} {report['class_share_real']:24.3f} {report['frechet_real']:27.2f}")
    print(f"\npictures, report.json and model.safetensors are in {out}; "
          f"draw more: difuse sample {out / 'model.safetensors'}")
    if not report["quality_judged"]:
        print("a quick run: quality is not judged")
        return 0
    reached = report["class_share"] >= GOALS["class_share"] and report["frechet"] <= GOALS["frechet"]
    print(f"goals (class share at least {GOALS['class_share']}, Frechet distance at most {GOALS['frechet']}, every "
          f"sampler): {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1
