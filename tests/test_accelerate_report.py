"""What accelerate says and refuses: unknown models and options, backends that cannot run, wrappers, one's own block."""
import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import difuse
from difuse.integrations import registry
from tests.test_imports import report

ROOT = Path(__file__).parent.parent


def flux():
    pytest.importorskip("diffusers")
    from benchmarks.families import load
    return load("flux").build(), load("flux").inputs(torch.float32)


def first(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def test_an_unknown_model_raises_and_names_what_is_known():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU())
    with pytest.raises(ValueError, match=r"nothing in Sequential is known; it has .*GELU.*FluxTransformerB.*register"):
        difuse.accelerate(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_difuses_own_models_are_fused_already():
    model = difuse.models.DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=1,
                              num_classes=2)
    with pytest.raises(ValueError, match="nothing in DiT is known"):
        difuse.accelerate(model)


@pytest.mark.parametrize("thing", [None, "flux", torch.ones(1)])
def test_what_is_no_module(thing):
    with pytest.raises(TypeError, match="expected a module. Of a pipeline pass"):
        difuse.accelerate(thing)


def test_an_option_nobody_knows_leaves_the_block_alone_and_strict_raises():
    model, inputs = flux()
    before = first(model, inputs)
    model.transformer_blocks[1].norm2 = nn.LayerNorm(48)  # with weights
    with pytest.raises(ValueError, match=r"strict=True and 1 modules would be left alone(.|\n)*transformer_blocks.1 "):
        difuse.accelerate(model, strict=True)
    assert not any("forward" in vars(module) for module in model.modules())
    found = difuse.accelerate(model)
    assert found.blocks == (3, 4) and set(found.left_alone) == {"transformer_blocks.1"}
    assert "left alone: transformer_blocks.1 (FluxTransformerBlock): norm2 is LayerNorm" in str(found)
    assert "its own forward: norm2 is LayerNorm" in difuse.explain(model)
    assert torch.allclose(first(model, inputs), before, atol=1e-5)


class QuantLinear(nn.Module):
    """Stands in for a quantised layer of some package."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("codes", (linear.weight.detach() * 100).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes.to(x.dtype) / 100, self.bias)


def test_a_quantised_linear_leaves_its_block_alone():
    model, inputs = flux()
    block = model.single_transformer_blocks[0]
    block.proj_mlp = QuantLinear(block.proj_mlp)
    before = first(model, inputs)
    found = difuse.accelerate(model)
    assert set(found.left_alone) == {"single_transformer_blocks.0"}
    assert "proj_mlp is a QuantLinear, whose arithmetic difuse does not know" in str(found)
    assert torch.allclose(first(model, inputs), before, atol=1e-5)


def test_a_quantised_weight_leaves_its_block_alone():
    model, _ = flux()
    block = model.single_transformer_blocks[0]
    block.proj_mlp.weight = nn.Parameter(block.proj_mlp.weight.detach().to(torch.int8), requires_grad=False)
    assert "proj_mlp.weight is a Tensor of torch.int8" in str(difuse.accelerate(model))


@pytest.mark.parametrize("backend, error, text", [
    ("tritno", ValueError, "backend 'tritno' is unknown; expected 'auto' or one of"),
    ("triton", RuntimeError, r"backend 'triton' cannot run a model of torch.float64 on cpu. attention: "),
    ("cpu", RuntimeError, r"cannot run a model of torch.float64 on cpu. .*norm_modulate: input 0 has dtype"),
])
def test_an_explicit_backend_that_cannot_run_raises_at_once(backend, error, text):
    model, _ = flux()
    with pytest.raises(error, match=text):
        difuse.accelerate(model.double(), backend=backend)
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_explicit_backend_of_a_model_is_not_changed_by_another():
    model, inputs = flux()
    other = copy.deepcopy(model)
    difuse.accelerate(model, backend="reference")
    difuse.accelerate(other)
    difuse.explain_reset()
    first(other, inputs)
    first(model, inputs)
    first(other, inputs)
    ran = difuse.explain()
    calls = {line.split()[1]: int(re.search(r"(\d+) calls", line)[1]) for line in ran.splitlines()
             if line.startswith("norm_modulate")}
    assert calls["cpu"] == 2 * calls["reference"]
    assert "norm_modulate on reference" in difuse.explain(model)


def test_a_forward_that_somebody_replaced_stays():
    model, inputs = flux()
    block = model.transformer_blocks[0]
    before = first(model, inputs)
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        return type(block).forward(block, *args, **kwargs)

    block.forward = wrapped
    found = difuse.accelerate(model)
    assert "its forward was replaced by something else already" in found.left_alone["transformer_blocks.0"][1]
    assert torch.allclose(first(model, inputs), before, atol=1e-5) and calls == [1]
    difuse.restore(model)
    assert block.forward is wrapped


def test_hooks_of_the_accelerate_package():
    hooks = pytest.importorskip("accelerate.hooks")
    model, inputs = flux()
    before = first(model, inputs)
    difuse.accelerate(model)
    block = model.transformer_blocks[0]
    hooks.add_hook_to_module(block, hooks.ModelHook())
    assert torch.allclose(first(model, inputs), before, atol=1e-5)
    with pytest.raises(RuntimeError, match="forward of transformer_blocks.0 was wrapped after accelerate"):
        difuse.restore(model)
    assert difuse.explain(model).count("under somebody's hook") == 1
    hooks.remove_hook_from_module(block)
    difuse.restore(model)
    assert torch.equal(first(model, inputs), before)


def test_a_subclass_is_not_its_parent():
    model, _ = flux()

    class Changed(type(model.transformer_blocks[0])):
        def forward(self, hidden_states, encoder_hidden_states, *args, **kwargs):
            return encoder_hidden_states, hidden_states

    model.transformer_blocks[0].__class__ = Changed
    found = difuse.accelerate(model)
    assert found.blocks == (3, 3) and "transformer_blocks.0" not in found.accelerated


def test_a_newer_diffusers_is_warned_of(monkeypatch):
    model, _ = flux()
    monkeypatch.setattr("diffusers.__version__", "0.99.0")
    with pytest.warns(UserWarning, match="written for diffusers 0.42, this is 0.99.0"):
        difuse.accelerate(model)


def test_the_worked_example_of_the_documents(monkeypatch):
    """docs/accelerate.md's block of one's own: under 30 lines, and the same results."""
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    code, = re.findall(r"```python\n(# a block of your own.*?)```", (ROOT / "docs/accelerate.md").read_text(), re.S)
    assert len(code.split("# what difuse needs to know")[1].splitlines()) < 30
    names = {}
    exec(code, names)
    torch.manual_seed(0)
    model = nn.ModuleList([names["MyBlock"](24) for _ in range(2)])
    x, c = torch.randn(2, 5, 24), torch.randn(2, 24)
    before = [block(x, c) for block in model]
    found = difuse.accelerate(model)
    assert found.blocks == (2, 2)
    assert all(torch.allclose(block(x, c), value, atol=1e-5) for block, value in zip(model, before, strict=True))
    model[0].norm = nn.LayerNorm(24)
    difuse.restore(model)
    assert difuse.accelerate(model).blocks == (1, 2)


def test_register_refuses_what_it_cannot_use():
    with pytest.raises(TypeError, match="target is 3; expected a class or its full name"):
        difuse.integrations.register(3)
    with pytest.raises(ValueError, match=r"ops \['attn'\] are unknown; expected some of"):
        difuse.integrations.register("some.Block", ops=("attn",))
    with pytest.raises(ValueError, match="kind is 'blok'"):
        difuse.integrations.register("some.Block", kind="blok")


def test_restore_of_a_model_that_was_never_accelerated():
    assert difuse.restore(nn.Linear(2, 2)) == 0


def test_accelerating_changes_nothing_outside_of_the_instance():
    pytest.importorskip("diffusers")
    changed, same = report("""
import json, sys, torch, diffusers, transformers
from benchmarks.families import NAMES, load
import difuse_kernels.library_ops
families = [load(name) for name in NAMES]
models = [each.build() for each in families]
with torch.no_grad():
    [model(**each.inputs(torch.float32)) for model, each in zip(models, families)]  # torch fills caches of its own
def snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "diffusers", "transformers") and module is not None:
            for key, value in list(vars(module).items()):
                found[name, key] = id(value)
                if isinstance(value, type):
                    found.update({(name, key, k): id(v) for k, v in list(vars(value).items())})
    return found
before = snapshot()
import difuse
from difuse import integrations
for model, each in zip(models, families):
    difuse.accelerate(model)
    with torch.no_grad():
        model(**each.inputs(torch.float32))
after = snapshot()
changed = [list(key) for key in before.keys() | after.keys() if after.get(key) != before.get(key)]
print(json.dumps([changed, len(before) > 10000]))
""")
    noise = {"_sparsity", "__warningregistry__"}
    assert [key for key in changed if not noise & set(key)] == [] and same


def test_a_partial_in_the_way_is_not_taken_for_ours():
    model, _ = flux()
    model.forward = functools.partial(type(model).forward, model)
    difuse.accelerate(model)
    assert model.forward.func is type(model).forward
    difuse.restore(model)
    assert "forward" in vars(model)
