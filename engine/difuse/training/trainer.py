"""The training loop: `Trainer.train_step` is one optimizer step, `Trainer.train` a run that survives being killed."""
import contextlib
import copy
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm

from difuse.training import checkpoint
from difuse.training.config import FREE_ON_RESUME
from difuse.training.ema import EMA
from difuse.training.objectives import LOSSES, draw_times


class Trainer:
    """Trains `model`, any module with forward(x [B,C,H,W], t [B], y [B]) -> [B,C,H,W], on an `ImageDataset`.

    model: float32 parameters, on the device to train on. config: a `TrainConfig`. out_dir: folder for checkpoints and
    metrics.jsonl; with None nothing is written. progress: show a tqdm bar on stderr.
    Raises TypeError or ValueError if model and data cannot be trained together.

    Randomness: times and noise come from a generator of the trainer's own; dropout inside the model draws from torch's
    global generator, which `train` seeds by config.seed and puts back as it was when it ends.
    """

    def __init__(self, model, dataset, config, out_dir=None, progress=True):
        _check_fit(model, dataset)
        self.model, self.dataset, self.config, self.progress = model, dataset, config, progress
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.process = config.process()
        self.step, self.history = 0, []  # optimizer steps done; one dict per line of metrics.jsonl

        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        self.ema = EMA(model, config.ema_decay)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.learning_rate, betas=config.betas,
                                           weight_decay=config.weight_decay, fused=True)
        for p in self.parameters.values():  # what AdamW would make at its first step; here so that saving sees it
            self.optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                       "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        self.noise_generator = torch.Generator(self.device).manual_seed(2 * config.seed)
        self.global_generators = {"cpu": torch.default_generator}
        if self.device.type == "cuda":
            self.global_generators["cuda"] = torch.cuda.default_generators[self.device.index or 0]
        self._global_states = {name: torch.Generator(g.device).manual_seed(2 * config.seed + 1).get_state()
                               for name, g in self.global_generators.items()}

    def train_step(self):
        """One optimizer step on the next batch. Returns (loss, gradient norm before clipping) as floats.

        A loss or gradient that is not finite raises FloatingPointError before it can reach the weights.
        """
        config, parameters = self.config, list(self.parameters.values())
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1, (self.step + 1) / max(1, config.warmup_steps))
        self.optimizer.zero_grad()

        x0, y = self.dataset.batch(self.position, config.batch_size, config.seed)  # [B,C,H,W], [B]
        x0, y = x0.to(self.device), y.to(self.device)
        t = draw_times(config, self.process, len(x0), self.noise_generator)  # [B]
        noise = torch.randn(x0.shape, generator=self.noise_generator, device=self.device)  # [B,C,H,W]
        total = 0
        for part in zip(*(value.chunk(config.grad_accumulation) for value in (x0, y, t, noise)), strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                loss = LOSSES[config.objective](self.model, self.process, *part) / config.grad_accumulation
            loss.backward()
            total += loss.detach()
        grads = [p.grad for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        loss, grad_norm = torch.stack((total, norm)).tolist()  # one read per step: a GPU is waited for here
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._not_finite(loss, grad_norm)
        if config.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, config.grad_clip, norm)
        self.optimizer.step()
        self.ema.update(self.step)
        self.step += 1
        return loss, grad_norm

    def train(self):
        """Train up to config.steps or config.time_limit and return `history`, the logged metrics.

        With an out_dir a run continues from the folder's newest whole checkpoint, bit for bit as if it had never
        stopped (same machine, thread count and versions); it raises CheckpointError if that was made with another
        config, model or data. Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.
        """
        config, started = self.config, time.perf_counter()
        if self.out_dir and self.step == 0:
            self._resume()
        saved = self.step
        bar = tqdm(total=config.steps, initial=self.step, unit="step", disable=not self.progress,
                   mininterval=0.1 if sys.stderr.isatty() else 10)
        with bar, self._training_state(), _interrupt_after_step() as interrupted:
            losses, logged, last_step = [], time.perf_counter(), 0.0
            while self.step < config.steps and not interrupted.is_set():
                began = time.perf_counter()
                if config.time_limit and began - started + last_step > config.time_limit:
                    break
                loss, grad_norm = self.train_step()
                losses.append(loss)
                last_step = time.perf_counter() - began
                if self.step % config.log_every == 0 or self.step == config.steps:
                    now = time.perf_counter()
                    self._log(losses, grad_norm, len(losses) * config.batch_size / (now - logged))
                    losses, logged = [], now
                bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{config.batch_size / last_step:.0f}", refresh=False)
                bar.update()
                if self.out_dir and self.step % config.checkpoint_every == 0:
                    self._save()
                    saved = self.step
            if self.out_dir and saved != self.step:
                self._save()
        if interrupted.is_set():
            where = f"; saved as {self.last_checkpoint()}, train again to continue" if self.out_dir else ""
            print(f"interrupted after step {self.step}{where}", file=sys.stderr)
            raise KeyboardInterrupt
        return self.history

    @property
    def position(self):
        """How many images of the endless stream have been consumed."""
        return self.step * self.config.batch_size

    def ema_model(self):
        """A copy of the model with the averaged weights, in eval mode: the one to sample from."""
        model = copy.deepcopy(self.model)
        self.ema.copy_to(model)
        return model.eval()

    def save_model(self, path):
        """Write weights and averages to one file for `load_model`, without the optimizer's state."""
        tensors = {name: tensor for name, tensor in self._tensors().items() if name.startswith(("model.", "ema."))}
        checkpoint.save_checkpoint(path, tensors, self._meta())

    def last_checkpoint(self):
        """Path of the newest whole checkpoint in out_dir, or None."""
        return checkpoint.latest_checkpoint(self.out_dir) if self.out_dir else None

    def _not_finite(self, loss, grad_norm):
        where = f" and in {self.last_checkpoint()}" if self.last_checkpoint() else ""
        return FloatingPointError(
            f"training: loss {loss}, gradient norm {grad_norm} at step {self.step + 1}. The weights in memory{where} "
            "are from before this step. Look for bad images, lower learning_rate, or add warmup_steps")

    def _log(self, losses, grad_norm, images_per_second):
        record = {"step": self.step, "loss": sum(losses) / len(losses), "grad_norm": grad_norm,
                  "images_per_second": images_per_second, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        self.history.append(record)
        if self.out_dir:
            with (self.out_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    @contextlib.contextmanager
    def _training_state(self):
        """Inside, the model is in train() and torch's global generators draw from this run's streams.

        Outside, mode and generators are the caller's again.
        """
        was_training = self.model.training
        callers = {name: generator.get_state() for name, generator in self.global_generators.items()}
        self.model.train()
        for name, generator in self.global_generators.items():
            generator.set_state(self._global_states[name])
        try:
            yield
        finally:
            self.model.train(was_training)
            for name, generator in self.global_generators.items():
                self._global_states[name] = generator.get_state()
                generator.set_state(callers[name])

    def _tensors(self):
        """Everything a continued run needs, by its name in the checkpoint. Weights and state are the live tensors."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.averages.items()}
        for name, p in self.parameters.items():
            tensors |= {f"optim.{key}.{name}": tensor for key, tensor in self.optimizer.state[p].items()}
        tensors |= {f"rng.{name}": generator.get_state() for name, generator in self.global_generators.items()}
        return tensors | {"rng.noise": self.noise_generator.get_state()}

    def _meta(self):
        return {"model_class": type(self.model).__name__, "model": getattr(self.model, "config", None),
                "process": self.process.config, "prediction": self.config.prediction, "train": self.config.as_dict(),
                "data": self.dataset.describe(), "machine": {"device": self.device.type}, "step": self.step,
                "position": self.position}

    def _save(self):
        checkpoint.save_checkpoint(checkpoint.checkpoint_path(self.out_dir, self.step), self._tensors(), self._meta())

    @torch.no_grad()
    def _resume(self):
        """Take up the newest whole checkpoint of out_dir. Nothing is changed before all of it has been checked."""
        self.out_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_temporary_files(self.out_dir)
        path = self.last_checkpoint()
        if path:
            tensors, meta = checkpoint.load_checkpoint(path)
            live = self._tensors()
            self._check_same_run(path, meta)
            checkpoint.check_tensors(path, tensors, live)
            for name, tensor in live.items():
                if not name.startswith("rng."):
                    tensor.copy_(tensors[name])
            self.noise_generator.set_state(tensors["rng.noise"].clone())
            self._global_states = {name: tensors[f"rng.{name}"].clone() for name in self.global_generators}
            self.step = meta["step"]
        metrics = self.out_dir / "metrics.jsonl"
        self.history = [record for record in read_metrics(metrics) if record["step"] <= self.step]
        temporary = metrics.with_suffix(".tmp")  # lines after the checkpoint will be written again
        temporary.write_text("".join(json.dumps(record) + "\n" for record in self.history), encoding="utf-8")
        os.replace(temporary, metrics)

    def _check_same_run(self, path, meta):
        ours, differing = json.loads(json.dumps(self._meta())), []
        for section in ("model", "train", "data", "machine"):
            saved, here = meta.get(section) or {}, ours[section] or {}
            for key in sorted(saved.keys() | here.keys()):
                named = (section, key) in (("data", "name"), *(("train", free) for free in FREE_ON_RESUME))
                if not named and saved.get(key) != here.get(key):
                    differing.append(f"{section}.{key}: {saved.get(key)!r} there, {here.get(key)!r} here")
        if differing:
            raise checkpoint.CheckpointError(
                f"{path}: belongs to another run ({'; '.join(differing)}). Use the same settings to continue it, or "
                "another out_dir to start anew")


def read_metrics(path):
    """The records of a metrics.jsonl; an empty list if there is none, or if it has only half a line.

    Each is a dict of step, loss (mean since the previous record), grad_norm, images_per_second, learning_rate.
    Raises ValueError for a damaged line before the last.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []
    records = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line end is empty, or was cut off
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error}); remove that line") from error
    return records


def _check_fit(model, dataset):
    wrong = [f"{name} is {p.dtype}" for name, p in model.named_parameters() if p.dtype != torch.float32]
    if wrong:
        raise TypeError(f"training: {wrong[0]} ({len(wrong)} such); expected float32 parameters. Call model.float() "
                        "and set precision='bf16' to compute in bfloat16")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("training: the model has no parameter that requires a gradient")
    classes = (getattr(model, "config", None) or {}).get("num_classes", dataset.num_classes)
    if classes < dataset.num_classes:
        raise ValueError(f"training: the data has {dataset.num_classes} classes, the model {classes}; build it with "
                         f"num_classes={dataset.num_classes}")


@contextlib.contextmanager
def _interrupt_after_step():
    """Yields an event that the first Ctrl-C sets; the second interrupts at once. Other handlers are left in charge."""
    interrupted, previous = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous is not signal.default_int_handler:
        yield interrupted
        return

    def note(signum, frame):
        signal.signal(signal.SIGINT, previous)
        interrupted.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
