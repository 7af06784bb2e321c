"""The training loop: each step against a plain one, metrics, stopping, and resuming bit for bit after SIGKILL."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny_training import CLASSES, tiny_config, tiny_data, tiny_model, tiny_trainer
from torch import nn

from difuse.diffusion import VP, Flow
from difuse.training import CheckpointError, ImageDataset, Trainer, load_checkpoint, read_metrics
from difuse.training.objectives import flow_loss
from difuse_kernels import use_backend


def states_differ(a, b):
    """Names of the tensors of two dicts that are not equal to the bit."""
    return [name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])]


def everything(trainer):
    """What must be equal for two runs to be at the same point, read from where it lives, by name."""
    state = {**trainer.model.state_dict(), "noise": trainer.noise_generator.get_state()}
    state |= {f"ema.{name}": average for name, average in trainer.ema.averages.items()}
    for index, slots in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optim.{index}.{key}": tensor for key, tensor in slots.items()}
    return state | {f"global.{name}": tensor for name, tensor in trainer._global_states.items()}


def test_steps_equal_a_loop_written_out_plainly():
    """Same draws, same losses and same weights, to the bit: warm-up, clipping, AdamW and EMA are what they seem."""
    trainer = tiny_trainer(weight_decay=0.1, betas=(0.8, 0.95), grad_clip=0.5)
    trainer.train()

    model, data = tiny_model(), tiny_data()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, betas=(0.8, 0.95), fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    draws = torch.Generator().manual_seed(2 * 5)
    losses, norms = [], []
    with torch.random.fork_rng():
        torch.manual_seed(2 * 5 + 1)
        for step in range(6):
            x0, y = data.batch(8 * step, 8, 5)
            t = torch.rand(8, dtype=torch.float64, generator=draws).float()
            noise = torch.randn(x0.shape, generator=draws)
            loss = flow_loss(model, Flow(), x0, y, t, noise)
            optimizer.zero_grad()
            loss.backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 3)
            optimizer.step()
            d = min(0.9, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - d)
            losses.append(loss.item())
    assert [record["loss"] for record in trainer.history] == losses
    assert [record["grad_norm"] for record in trainer.history] == norms
    assert [record["learning_rate"] for record in trainer.history] == [1e-3 * f for f in (1 / 3, 2 / 3, 1, 1, 1, 1)]
    assert max(norms) > 0.5  # something was clipped
    assert all(map(torch.equal, trainer.model.parameters(), model.parameters()))
    assert all(map(torch.equal, trainer.ema.averages.values(), average))


@pytest.mark.parametrize("limit", [0.01, 1e9, 0.0])
def test_clipping_bounds_the_whole_gradient(limit):
    trainer = tiny_trainer(grad_clip=limit)
    _, norm = trainer.train_step()
    left = math.sqrt(sum(p.grad.double().square().sum().item() for p in trainer.model.parameters()))
    assert norm > 0.01
    assert left == pytest.approx(0.01 if limit == 0.01 else norm, rel=1e-4)  # clip_grads_with_norm_ adds 1e-6 to norm


def test_accumulation_equals_one_large_batch():
    """Same images, times and noise in four parts: the gradient differs by the rounding of other sums only."""
    grads, losses = [], []
    for parts in (1, 4):
        trainer = Trainer(tiny_model(dropout=0.0), tiny_data(), tiny_config(grad_accumulation=parts, grad_clip=0),
                          progress=False)
        losses.append(trainer.train_step()[0])
        grads.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))
    assert not torch.equal(*grads)  # the sums were taken in another order
    # 8 samples of 4 tokens: at most 32 terms a sum, each rounded once
    assert (grads[0] - grads[1]).norm() <= 32 * 2**-24 * grads[0].norm()
    assert losses[0] == pytest.approx(losses[1], rel=32 * 2**-24)


@pytest.fixture
def one_thread():
    """Hundreds of steps on tiny tensors take longest waiting for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("objective, known", [("eps", VP().alpha.square().mean().item()), ("flow", math.pi / 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_eight_images_are_learnt(one_thread, objective, known, precision):
    """The loss falls below `known`, the least that is possible knowing only that pixels are independent unit normals.

    Given x_t that error is alpha^2 for eps and 1 / ((1 - t)^2 + t^2) for flow; `known` is its mean over t. Less than
    that takes having learnt the eight images.
    """
    data = ImageDataset.from_arrays(torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    config = tiny_config(objective=objective, precision=precision, batch_size=32, steps=300, learning_rate=1e-2,
                         log_every=50)
    model = tiny_model(dropout=0.0, hidden_size=32, num_classes=1)
    history = Trainer(model, data, config, progress=False).train()
    assert history[-1]["loss"] < 0.85 * known < history[0]["loss"]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_bf16_computes_in_bfloat16_and_keeps_float32_state():
    trainer = tiny_trainer(precision="bf16")
    seen = set()
    trainer.model.blocks[0].mlp.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {t.dtype for name, t in trainer._tensors().items() if not name.startswith("rng.")} == {torch.float32}
    full = tiny_trainer()
    full.train()
    assert trainer.history[0]["loss"] == pytest.approx(full.history[0]["loss"], rel=2**-6)
    assert trainer.history[0]["loss"] != full.history[0]["loss"]


def test_loss_curve_on_kernels_equals_the_reference():
    """20 steps; the yardstick is how far the reference curve moves when each weight is changed by one rounding."""
    def curve(backend, nudge=0.0):
        model = tiny_model()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + nudge * (torch.randint(0, 2, p.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1))
        with use_backend(backend):
            history = Trainer(model, tiny_data(), tiny_config(steps=20), progress=False).train()
        return torch.tensor([record["loss"] for record in history], dtype=torch.float64)

    reference = curve("reference")
    spread = (curve("reference", nudge=2**-23) - reference).abs().max()
    # one such nudge for each of the 20 steps, since kernels may round differently in every one
    assert (curve("auto") - reference).abs().max() <= 20 * spread + 2**-23 * reference.max()


def test_the_callers_random_stream_and_mode_are_left_alone():
    trainer = tiny_trainer()
    trainer.model.eval()
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(torch.get_rng_state(), before) and not trainer.model.training
    torch.manual_seed(99)  # and the run does not depend on the caller's stream
    again = tiny_trainer()
    again.train()
    assert [r["loss"] for r in again.history] == [r["loss"] for r in trainer.history]


def test_metrics_are_json_lines(tmp_path):
    trainer = tiny_trainer(tmp_path, log_every=4)
    history = trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == history == read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 6]
    assert all(line.keys() == {"step", "loss", "grad_norm", "images_per_second", "learning_rate"} for line in lines)
    every = tiny_trainer().train()
    assert lines[0]["loss"] == pytest.approx(sum(r["loss"] for r in every[:4]) / 4)


def test_torn_and_damaged_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1}\n{"ste')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"step": 1}\n{"ste\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)


def test_progress_shows_loss_and_speed(capsys):
    Trainer(tiny_model(), tiny_data(), tiny_config()).train()
    shown = capsys.readouterr().err
    assert "6/6" in shown and "loss=" in shown and "images_per_s=" in shown


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_raises_before_it_does_harm(tmp_path, poison):
    class Poisoned(nn.Module):
        """Goes wrong in the fifth call, in the forward or only in the backward pass."""

        def __init__(self):
            super().__init__()
            self.weight, self.calls = nn.Parameter(torch.ones(())), 0

        def forward(self, x, t, y):
            self.calls += 1
            if self.calls < 5:
                return x * self.weight
            if poison == "loss":
                return x * self.weight * math.nan
            return x * self.weight + (self.weight - self.weight.detach()).clamp(min=0).sqrt()  # d sqrt at 0 is inf

    trainer = Trainer(Poisoned(), tiny_data(), tiny_config(), tmp_path, progress=False)
    with pytest.raises(FloatingPointError, match="at step 5.*step-000004.safetensors are from before.*learning_rate"):
        trainer.train()
    saved, meta = load_checkpoint(trainer.last_checkpoint())
    assert meta["step"] == 4 == trainer.step and meta["model_class"] == "Poisoned" and meta["model"] is None
    assert torch.equal(saved["model.weight"], trainer.model.weight)


def test_time_limit_stops_before_the_step_that_would_pass_it(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("difuse.training.trainer.time.perf_counter", lambda: clock[0])
    trainer = tiny_trainer(tmp_path, steps=1000, time_limit=35)
    step = trainer.train_step

    def ten_seconds():
        clock[0] += 10
        return step()

    trainer.train_step = ten_seconds
    trainer.train()
    assert trainer.step == 3 and trainer.last_checkpoint().name == "step-000003.safetensors"
    trainer.train()  # another 35 seconds
    assert trainer.step == 6


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, capsys):
    data = tiny_data()
    batch = data.batch

    def interrupted_batch(position, batch_size, seed):
        if position == 3 * 8:
            signal.raise_signal(signal.SIGINT)
        return batch(position, batch_size, seed)

    data.batch = interrupted_batch
    trainer = Trainer(tiny_model(), data, tiny_config(), tmp_path, progress=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 4 and trainer.last_checkpoint().name == "step-000004.safetensors"
    assert "interrupted after step 4; saved as" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_continues_as_if_never_stopped(tmp_path)


@pytest.mark.parametrize("change, message", [
    (lambda m: m.half(), r"is torch.float16 \(\d+ such\); expected float32 parameters"),
    (lambda m: m.requires_grad_(False), "no parameter that requires a gradient"),
])
def test_models_that_cannot_be_trained_are_refused(change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Trainer(change(tiny_model()), tiny_data(), tiny_config())


def test_too_few_classes_are_refused():
    with pytest.raises(ValueError, match=f"the data has {CLASSES} classes, the model 2; build it with num_classes=3"):
        Trainer(tiny_model(num_classes=2), tiny_data(), tiny_config())


# ---- killed and resumed -------------------------------------------------------------------------------------------

VICTIM = """
import os, signal, sys
import torch
sys.path.insert(0, sys.argv[3])
from tiny_training import tiny_trainer
from difuse.training import checkpoint
moment, out_dir = sys.argv[1:3]
if moment != "from outside":
    torch.set_num_threads(1)
trainer = tiny_trainer(out_dir, steps=10**6 if moment == "from outside" else 6)

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def at_step(step, function, before=die, after=None):  # what to do around `function` once `step` steps are done
    def wrapped(*args, **kwargs):
        if trainer.step >= step and before:
            before(*args, **kwargs)
        result = function(*args, **kwargs)
        if trainer.step >= step and after:
            after(*args, **kwargs)
        return result
    return wrapped

def tear(tensors, path, metadata):  # the disk has half of the file when the process dies
    save_file(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()

save_file = checkpoint.save_file
if moment == "mid write":
    checkpoint.save_file = at_step(4, save_file, before=tear)
elif moment == "before flush":
    os.fsync = at_step(4, os.fsync)
elif moment == "before rename":
    os.replace = at_step(4, os.replace)
elif moment == "after rename":
    os.replace = at_step(4, os.replace, before=None, after=die)
elif moment == "before first save ends":
    os.replace = at_step(2, os.replace)
elif moment == "between weights and average":
    trainer.optimizer.step = at_step(4, trainer.optimizer.step, before=None, after=die)
elif moment == "in backward":
    trainer.model.blocks[0].attn.qkv.weight.register_hook(lambda grad: die() if trainer.step == 5 else None)
trainer.train()
"""


def start_victim(moment, out_dir):
    command = [sys.executable, "-c", VICTIM, moment, str(out_dir), str(Path(__file__).parent)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def assert_continues_as_if_never_stopped(out_dir, steps=6, **changes):
    """Resume in out_dir up to `steps` and compare weights, averages, optimizer and generators with a whole run."""
    resumed, whole = tiny_trainer(out_dir, steps=steps, **changes), tiny_trainer(steps=steps, **changes)
    resumed.train()
    whole.train()
    assert resumed.step == whole.step == steps
    assert states_differ(everything(resumed), everything(whole)) == []
    assert [(r["step"], r["loss"]) for r in resumed.history] == [(r["step"], r["loss"]) for r in whole.history]
    assert read_metrics(Path(out_dir) / "metrics.jsonl") == resumed.history
    return resumed


@pytest.mark.parametrize("moment, resumes_at", [
    ("before first save ends", 0),
    ("mid write", 2),
    ("before flush", 2),
    ("before rename", 2),
    ("after rename", 4),
    ("between weights and average", 4),
    ("in backward", 4),
])
def test_killed_and_resumed_is_bit_equal(tmp_path, one_thread, moment, resumes_at):
    victim = start_victim(moment, tmp_path)
    _, stderr = victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL, stderr
    for path in tmp_path.glob("step-*"):
        load_checkpoint(path)  # whatever bears a checkpoint's name is whole
    assert max([load_checkpoint(p)[1]["step"] for p in tmp_path.glob("step-*")], default=0) == resumes_at
    trainer = assert_continues_as_if_never_stopped(tmp_path)
    saved, meta = load_checkpoint(trainer.last_checkpoint())
    assert meta["step"] == 6
    assert all(torch.equal(saved[f"model.{name}"], tensor) for name, tensor in trainer.model.state_dict().items())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "step-000004.safetensors",
                                                          "step-000006.safetensors"]


def test_killed_from_outside_at_any_moment(tmp_path):
    """Nothing in the process helps: it is killed while it trains, on every thread, and saves as fast as it can."""
    victim = start_victim("from outside", tmp_path)
    metrics, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 120
    while len(read_metrics(metrics)) < 15 and victim.poll() is None and time.monotonic() < deadline:
        time.sleep(0.003)
    os.kill(victim.pid, signal.SIGKILL)
    _, stderr = victim.communicate(timeout=60)
    assert victim.returncode == -signal.SIGKILL, stderr
    reached = max(load_checkpoint(path)[1]["step"] for path in tmp_path.glob("step-*"))
    assert reached >= 12
    assert_continues_as_if_never_stopped(tmp_path, steps=reached + 3)


@pytest.mark.parametrize("changes", [
    {"precision": "bf16"},
    {"objective": "eps", "timesteps": "logit_normal", "grad_accumulation": 2},
])
def test_stopping_and_continuing_is_bit_equal(tmp_path, changes):
    """Steps, checkpoint_every, log_every and time_limit may differ between a run and its continuation."""
    tiny_trainer(tmp_path, steps=3, checkpoint_every=50, time_limit=1000.0, **changes).train()
    assert_continues_as_if_never_stopped(tmp_path, steps=7, **changes)


def test_a_run_that_is_done_stays_as_it_is(tmp_path):
    tiny_trainer(tmp_path).train()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = tiny_trainer(tmp_path)
    assert len(again.train()) == 6 and again.step == 6
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_module_without_config_trains_and_resumes(tmp_path):
    def trainer(steps, width=3):
        class Conv(nn.Conv2d):
            def forward(self, x, t, y):
                return super().forward(x)

        torch.manual_seed(0)
        return Trainer(Conv(1, 1, width, padding=width // 2), tiny_data(), tiny_config(steps=steps), tmp_path,
                       progress=False)

    trainer(3).train()
    resumed = trainer(6)
    resumed.train()
    assert resumed.step == 6
    with pytest.raises(CheckpointError, match=r"model.weight is \(1, 1, 3, 3\) .*, expected \(1, 1, 5, 5\)"):
        trainer(9, width=5).train()
