"""Checkpoint files: round trip, atomic writing, and the refusal of every kind of wrong file."""
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import tiny_data, tiny_model, tiny_trainer
from torch import nn

from difuse.training import CheckpointError, Trainer, load_checkpoint, load_model, read_meta, save_checkpoint
from difuse.training import checkpoint as checkpoint_module
from difuse.training.checkpoint import latest_checkpoint, list_checkpoints, remove_temporary_files

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.fixture
def trained(tmp_path):
    """A trainer that has trained its six steps, and its last checkpoint."""
    trainer = tiny_trainer(tmp_path)
    trainer.train()
    return trainer, trainer.last_checkpoint()


def rewrite(path, change_meta=None, change_tensors=None):
    """Save the checkpoint again with its JSON or tensors changed."""
    tensors, meta = load_checkpoint(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    for target, change in ((meta, change_meta), (tensors, change_tensors)):
        if change:
            change(target)
    save_file(tensors, path, metadata={"difuse": json.dumps(meta)})


def test_round_trip_of_every_dtype(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {f"model.{d}": (torch.randn(3, 5, generator=generator) * 3).to(d) for d in DTYPES}
    tensors |= {"model.scalar": torch.tensor(7.5), "model.strided": torch.randn(4, 6, generator=generator).t()[1:],
                "optim.empty": torch.zeros(0, 3)}
    path = tmp_path / "step-000001.safetensors"
    save_checkpoint(path, tensors, {"step": 1, "text": "grün"})
    loaded, meta = load_checkpoint(path)
    assert meta == {"format_version": 1, "step": 1, "text": "grün"} == read_meta(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert load_checkpoint(path, "optim.", "model.s")[0].keys() == {"optim.empty", "model.scalar", "model.strided"}


def test_tied_weights_are_saved_twice(tmp_path):
    layer = nn.Linear(3, 3, bias=False)
    tied = nn.Sequential(layer, layer)
    path = tmp_path / "step-000001.safetensors"
    save_checkpoint(path, tied.state_dict(), {})
    loaded, _ = load_checkpoint(path)
    assert torch.equal(loaded["0.weight"], layer.weight) and torch.equal(loaded["1.weight"], layer.weight)


def test_the_newest_two_are_kept_and_others_left_alone(tmp_path):
    (tmp_path / "step-best.safetensors").write_text("the user's")
    for step in (1, 20, 3000000):
        save_checkpoint(tmp_path / f"step-{step:06d}.safetensors", {"a": torch.ones(1)}, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000020.safetensors", "step-3000000.safetensors", "step-best.safetensors"]
    assert latest_checkpoint(tmp_path).name == "step-3000000.safetensors"  # by number, not by letter
    assert latest_checkpoint(tmp_path / "none") is None


def test_permissions_follow_the_folder(tmp_path):
    tmp_path.chmod(0o750)
    path = tmp_path / "step-000001.safetensors"
    save_checkpoint(path, {"a": torch.ones(1)}, {})
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("failing", ["save_file", "fsync", "replace"])
def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch, failing):
    first = tmp_path / "step-000001.safetensors"
    save_checkpoint(first, {"a": torch.ones(3)}, {"step": 1})
    before = first.read_bytes()

    def fail(*args, **kwargs):
        raise checkpoint_module.SafetensorError("No space left") if failing == "save_file" else OSError(28, "full")

    monkeypatch.setattr(checkpoint_module if failing == "save_file" else os, failing, fail)
    for path in (first, tmp_path / "step-000002.safetensors"):
        with pytest.raises(OSError):
            save_checkpoint(path, {"a": torch.zeros(3)}, {"step": 2})
        assert [p.name for p in tmp_path.iterdir()] == [first.name] and first.read_bytes() == before
    if failing == "save_file":
        with pytest.raises(OSError, match="step-000002.*could not be written: No space left.*Earlier checkpoints are"):
            save_checkpoint(tmp_path / "step-000002.safetensors", {"a": torch.zeros(3)}, {"step": 2})


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    (tmp_path / ".saving-abc").mkdir()
    (tmp_path / ".saving-abc" / "step-000004.safetensors").write_bytes(b"half")
    (tmp_path / "keep.txt").touch()
    assert list_checkpoints(tmp_path) == []
    remove_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_load_model_gives_averaged_or_last_weights(trained):
    trainer, path = trained
    averaged, meta = load_model(path)
    last, _ = load_model(path, ema=False)
    assert not averaged.training and not last.training
    assert meta["step"] == 6 and meta["position"] == 48 and meta["prediction"] == "flow"
    assert meta["process"] == {"name": "flow"} and meta["data"]["class_names"] == ["a", "b", "c"]
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(last.get_parameter(name), parameter)
        assert torch.equal(averaged.get_parameter(name), trainer.ema.averages[name])
        assert not torch.equal(averaged.get_parameter(name), parameter)


def test_truncation_anywhere_is_noticed(trained, tmp_path):
    whole = trained[1].read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in (0, 3, 8, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut off"):
            load_checkpoint(cut)
    cut.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=f"{len(whole) + 1} bytes long, expected {len(whole)}"):
        load_model(cut)


class Exploding:
    """Unpickling this would be noticed."""

    def __reduce__(self):
        return (pytest.fail, ("a checkpoint was unpickled",))


def foreign_files(folder):
    torch.save({"model": torch.ones(3)}, folder / "weights.pt")
    (folder / "plain.pkl").write_bytes(pickle.dumps(Exploding()))
    (folder / "text.safetensors").write_text("not a checkpoint at all, but long enough to be read as one")
    (folder / "json.safetensors").write_bytes((20).to_bytes(8, "little") + b'{"a": [1, 2, 3]}    ')
    (folder / "list.safetensors").write_bytes((6).to_bytes(8, "little") + b"[1, 2]")
    (folder / "bytes.safetensors").write_bytes((6).to_bytes(8, "little") + b"\xff\xfe\x00\x01zz")
    save_file({"a": torch.ones(3)}, folder / "other.safetensors")
    save_file({"a": torch.ones(3)}, folder / "damaged.safetensors", metadata={"difuse": "{"})
    return sorted(folder.iterdir())


def test_foreign_files_are_refused(tmp_path):
    files = foreign_files(tmp_path)
    assert len(files) == 8
    for path in files:
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a difuse checkpoint"):
        load_checkpoint(tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="pickled files .* are never opened"):
        load_model(tmp_path / "weights.pt")
    for missing in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match="no such file"):
            load_checkpoint(missing)


def test_newer_format_is_refused(trained):
    rewrite(trained[1], lambda meta: meta.update(format_version=2))
    with pytest.raises(CheckpointError, match="checkpoint format 2, this version of difuse reads format 1. Upgrade"):
        load_model(trained[1])


@pytest.mark.parametrize("change_meta, change_tensors, message", [
    (lambda m: m.update(model_class="Other"), None, "holds a Other; load_model builds DiT"),
    (lambda m: m["model"].update(hidden_size="wide"), None, "does not describe a model.*hidden_size is 'wide'"),
    (lambda m: m.pop("model"), None, "does not describe a model"),
    (lambda m: m["model"].update(depth=2), None, r"ema.blocks.1.*is missing.*and \d+ more"),
    (lambda m: m["model"].update(num_classes=7), None, r"table.weight is \(4, 16\) torch.float32, expected \(8, 16\)"),
    (None, lambda t: t.pop("model.x_embedder.proj.bias"), "model.x_embedder.proj.bias is missing"),
    (None, lambda t: t.update({"ema.extra": torch.ones(2)}), "ema.extra is not expected"),
    (None, lambda t: t.update({"model.x_embedder.proj.bias": torch.ones(16).half()}), "torch.float16, expected"),
])
def test_load_model_refuses_what_does_not_fit(trained, change_meta, change_tensors, message):
    rewrite(trained[1], change_meta, change_tensors)
    with pytest.raises(CheckpointError, match=message):
        load_model(trained[1])


def state_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer._tensors().items()}


@pytest.mark.parametrize("change_tensors, message", [
    (lambda t: t.pop("ema.blocks.0.attn.qkv.weight"), "ema.blocks.0.attn.qkv.weight is missing"),
    (lambda t: t.pop("rng.cpu"), "rng.cpu is missing"),
    (lambda t: t.update({"optim.exp_avg.final_layer.linear.bias": torch.ones(5)}), r"is \(5,\) .*, expected \(4,\)"),
    (lambda t: t.update({"optim.other": torch.ones(5)}), "optim.other is not expected"),
])
def test_a_bad_checkpoint_changes_nothing_in_the_trainer(trained, tmp_path, change_tensors, message):
    rewrite(trained[1], change_tensors=change_tensors)
    fresh = tiny_trainer(tmp_path)
    before = state_of(fresh)
    with pytest.raises(CheckpointError, match=message):
        fresh.train()
    assert fresh.step == 0 and all(torch.equal(t, before[name]) for name, t in fresh._tensors().items())


@pytest.mark.parametrize("changes, message", [
    ({"learning_rate": 2e-3, "seed": 6}, "train.learning_rate: 0.001 there, 0.002 here; train.seed: 5 there, 6 here"),
    ({"objective": "eps"}, "train.objective: 'flow' there, 'eps' here"),
])
def test_another_config_is_refused(trained, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=f"belongs to another run.*{message}"):
        tiny_trainer(tmp_path, **changes).train()


def test_other_data_and_other_models_are_refused(trained, tmp_path):
    config = trained[0].config
    with pytest.raises(CheckpointError, match="data.fingerprint"):
        Trainer(tiny_model(), tiny_data(seed=9), config, tmp_path, progress=False).train()
    with pytest.raises(CheckpointError, match="model.class_dropout_prob: 0.5 there, 0.1 here"):
        Trainer(tiny_model(dropout=0.1), tiny_data(), config, tmp_path, progress=False).train()
    with pytest.raises(CheckpointError, match="model.depth: 1 there, 2 here"):
        Trainer(tiny_model(depth=2), tiny_data(), config, tmp_path, progress=False).train()


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(trained, tmp_path):
    trainer, path = trained
    path.write_bytes(path.read_bytes()[:-7])
    again = tiny_trainer(tmp_path)
    with pytest.warns(UserWarning, match="step-000006.safetensors: .* cut off .* Looking for an older checkpoint"):
        again.train()
    saved, meta = load_checkpoint(path)  # steps 5 and 6 were taken again, to the same bits
    assert meta["step"] == 6
    assert all(torch.equal(saved[name], tensor) for name, tensor in trainer._tensors().items() if "rng" not in name)


def test_the_file_is_plain_safetensors(trained):
    tensors = load_file(trained[1])
    kinds = {name.split(".")[0] for name in tensors}
    assert kinds == {"model", "ema", "optim", "rng"}
