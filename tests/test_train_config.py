"""TrainConfig: what it accepts, and how it refuses the rest."""
import pytest
import torch
from tiny_training import tiny_data

from difuse.diffusion import VP, Flow
from difuse.training import TrainConfig, build_model

TOML = """
objective = "eps"
schedule = "cosine"
timesteps = "logit_normal"
logit_std = 2            # an integer where a number is meant
betas = [0.9, 0.95]
steps = 20
time_limit = 90

[model]
patch_size = 2
hidden_size = 16
depth = 1
num_heads = 2
"""


def write(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_toml_is_read(tmp_path):
    config = TrainConfig.from_toml(write(tmp_path, TOML))
    assert (config.betas, config.steps, config.time_limit) == ((0.9, 0.95), 20, 90)
    assert config.prediction == "eps" and config.process().config == VP("cosine").config
    model = build_model(config, tiny_data())
    assert model.config["input_size"] == 4 and model.config["num_classes"] == 3 and model.config["in_channels"] == 1
    assert TrainConfig().process().config == Flow().config
    assert TrainConfig(objective="eps").process().config == VP("linear").config


def test_model_by_name_with_overrides():
    config = TrainConfig(model={"name": "DiT-S/2", "depth": 1, "hidden_size": 32, "num_heads": 2})
    model = build_model(config, tiny_data())
    assert model.config["depth"] == 1 and model.config["input_size"] == 4 and model.config["patch_size"] == 2
    assert build_model(TrainConfig(model="DiT-S/4"), tiny_data()).config["hidden_size"] == 384


def test_built_weights_depend_on_the_seed_alone():
    settings = {"patch_size": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    before = torch.get_rng_state()
    first, again, other = (build_model(TrainConfig(model=settings, seed=s), tiny_data()) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    name = "blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize("text, message", [
    ("learning_rat = 1", r"run.toml: config: unknown key 'learning_rat'; did you mean 'learning_rate'\?"),
    ("[model]\nhiden_size = 3", r"\[model\]: unknown key 'hiden_size'; did you mean 'hidden_size'\?"),
    ("steps = \"many\"", r"steps is 'many' \(str\); expected an integer"),
    ("steps = 1.5", r"steps is 1.5 \(float\); expected an integer"),
    ("steps = true", r"steps is True \(bool\); expected an integer"),
    ("learning_rate = \"1e-4\"", r"learning_rate is '1e-4' \(str\); expected a number"),
    ("learning_rate = nan", "learning_rate is nan; expected a finite number"),
    ("learning_rate = 0", "learning_rate is 0; expected more than 0"),
    ("betas = [0.9]", r"betas is \[0.9\] \(list\); expected 2 numbers"),
    ("betas = [0.9, 1.0]", r"betas is \(0.9, 1.0\); expected values from 0 up to below 1"),
    ("model = 3", r"model is 3 \(int\); expected a string or a table"),
    ("objective = \"v\"", "objective is 'v'; expected one of 'eps', 'flow'"),
    ("objective = \"eps\"\nschedule = \"cosin\"", "schedule is 'cosin'; expected one of 'linear', 'cosine'"),
    ("schedule = \"cosine\"", "schedule 'cosine' has no effect with objective 'flow'"),
    ("logit_std = 0.5", "have no effect with timesteps 'uniform'"),
    ("precision = \"fp16\"", "precision is 'fp16'; expected one of 'fp32', 'bf16'"),
    ("batch_size = 10\ngrad_accumulation = 4", "batch_size 10 does not split into 4 equal parts"),
    ("time_limit = 0", "time_limit is 0; expected more than 0"),
    ("grad_clip = -1", "grad_clip is -1; expected 0 or more"),
    ("ema_decay = 1", "ema_decay is 1; expected values from 0 up to below 1"),
    ("steps = ", "run.toml: not valid TOML"),
])
def test_bad_toml_is_refused(tmp_path, text, message):
    with pytest.raises((ValueError, TypeError), match=message):
        TrainConfig.from_toml(write(tmp_path, text))


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.toml"):
        TrainConfig.from_toml(tmp_path / "none.toml")


@pytest.mark.parametrize("model, message", [
    (None, 'set for example model = "DiT-S/2"'),
    ("DiT-Q/2", "'DiT-Q/2' is unknown; expected one of DiT-S/2"),
    ({"patch_size": 3, "hidden_size": 16, "depth": 1, "num_heads": 2}, "input_size 4 is not a multiple of patch_size"),
    ({"patch_size": 2}, r"\[model\].*missing .*hidden_size"),
])
def test_unbuildable_models_are_refused(model, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build_model(TrainConfig(model=model), tiny_data())
