"""A hoisted model is the frozen one for the times and labels that it knows, and says so for others."""
import pytest
import torch

import difuse
from difuse.diffusion import VP
from difuse.inference.hoist import Hoisted
from difuse.models import DiT
from tests.tiny_training import tiny_model

pytest.importorskip("diffusers")
from benchmarks.families import load  # noqa: E402  needs diffusers
from benchmarks.families.proofs import tensors  # noqa: E402

TIMES, LABELS = [900, 500, 100, 0], [0, 2, 3]
X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3))
CALL = X, torch.tensor([500, 900, 0]), torch.tensor([2, 0, 3])


@pytest.fixture
def frozen():
    frozen = difuse.freeze(model := tiny_model(depth=2).eval())
    frozen.__dict__["kept"] = model  # alive for refresh()
    return frozen


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def spoil_modulations(model):
    """Results that read one of these weights are nan from now on."""
    with torch.no_grad():
        for path in model._modulations.products:
            product = model.model.get_submodule(path)
            (product.bias if product.bias is not None else product.weight).fill_(torch.nan)


@pytest.mark.parametrize("name", ["tiny", "facebook_dit", "sit", "dit"])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_results_are_the_frozen_models_and_no_modulation_is_computed(name, precision):
    model = tiny_model(depth=2).eval() if name == "tiny" else load(name).build().eval()
    inputs = dict(zip("xty", CALL, strict=True)) if name == "tiny" else load(name).inputs(torch.float32)
    t, y = ("timestep", "class_labels") if name == "dit" else ("t", "y")
    frozen = difuse.freeze(model, precision)
    times, labels = inputs[t].unique(), inputs[y].unique()
    assert len(times) > 1 and len(labels) > 1, "rows must differ"
    hoisted, expected = frozen.hoist(times.flip(0), labels), tensors(frozen(**inputs))[0]
    spoil_modulations(frozen)
    close(tensors(hoisted(**inputs))[0], expected)
    close(tensors(hoisted(*inputs.values()))[0], expected)
    assert tensors(frozen(**inputs))[0].isnan().all(), "outside of it the weights are read"


def test_every_pair_has_its_own_row(frozen):
    hoisted = frozen.hoist(TIMES, LABELS)
    for t in TIMES:
        for y in LABELS:
            call = X[:1], torch.tensor([t]), torch.tensor([y])
            close(hoisted(*call), frozen(*call))
    assert hoisted.memory()["hoisted"] == 12 * 4 * (16 + 2 * 96 + 32)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_samplers_hoist(frozen, guidance, monkeypatch):
    made, real = [], Hoisted.__init__
    monkeypatch.setattr(Hoisted, "__init__", lambda self, *args: (made.append(args[2:]), real(self, *args))[1])
    settings = dict(process=VP("linear"), prediction="v", steps=5, guidance=guidance)
    images = difuse.sample(frozen, [0, 2, 0], **settings)
    (times, labels), = made
    assert len(times) == 5 and labels.tolist() == ([0, 2] if guidance == 1 else [0, 2, 3])
    torch.testing.assert_close(images, difuse.sample(frozen.kept, [0, 2, 0], **settings), rtol=1e-4, atol=1e-4)
    difuse.sample(frozen, [0, 2, 0], **settings | {"steps": 17})  # more pairs than c has channels
    assert len(made) == 1


def test_a_model_around_it_sees_every_call(frozen):
    calls = difuse.recorded_calls(frozen, lambda model: difuse.sample(
        model, [0, 1], process=VP("linear"), prediction="v", steps=3))
    assert len(calls) == 3


@pytest.mark.parametrize(("call", "message"), [
    ((X, torch.tensor([500, 501, 0]), CALL[2]), "time 501 is none of the 4"),
    ((X, torch.tensor([float("nan"), 500, 0]), CALL[2]), "time nan"),
    ((*CALL[:2], torch.tensor([2, 1, 0])), "label 1 is none of the 3")])
def test_what_was_not_hoisted(frozen, call, message):
    hoisted = frozen.hoist(TIMES, LABELS)
    with pytest.raises(ValueError, match=message):
        hoisted(*call)
    close(hoisted(*CALL), frozen(*CALL))


@pytest.mark.parametrize(("times", "labels", "message"), [
    (TIMES, [0, 4], "no embedding"), (TIMES, [-1], "no embedding"), ([], LABELS, r"times have shape \(0,\)"),
    (TIMES, 3, r"labels have shape \(\)"), (range(6), LABELS, "6 times and 3 labels.*at most 16 pairs")])
def test_what_cannot_be_hoisted(frozen, times, labels, message):
    with pytest.raises(ValueError, match=message):
        frozen.hoist(times, labels)


def test_models_of_other_conditionings():
    frozen = difuse.freeze(load("sd3").build().eval())
    with pytest.raises(ValueError, match="SD3Transformer2DModel is not known"):
        frozen.hoist([1.0], [0])


def test_a_descendant_with_another_conditioning_is_noticed():
    class Other(type(load("facebook_dit").build())):
        def forward(self, x, t, y):
            return super().forward(x, t // 2, y)

    model, inputs = load("facebook_dit").build().eval(), load("facebook_dit").inputs(torch.float32)
    model.__class__ = Other
    hoisted = difuse.freeze(model).hoist(inputs["t"].unique(), inputs["y"].unique())
    with pytest.raises(RuntimeError, match="depend on more than t and y"):
        hoisted(**inputs)


def test_after_a_refresh(frozen):
    hoisted = frozen.hoist(TIMES, LABELS)
    with torch.no_grad():
        frozen.kept.blocks[0].adaLN_modulation[1].weight.mul_(2)
    frozen.refresh()
    with pytest.raises(RuntimeError, match="hoist anew"):
        hoisted(*CALL)
    close(frozen.hoist(TIMES, LABELS)(*CALL), frozen(*CALL))


def test_inference_mode_and_autocast(frozen):
    expected = frozen(*CALL)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        hoisted = frozen.hoist(TIMES, LABELS)
        close(hoisted(*CALL), expected)
    close(hoisted(*CALL), expected)


def test_a_failing_call_leaves_nothing_behind(frozen):
    hoisted, expected = frozen.hoist(TIMES, LABELS), frozen(*CALL)
    with pytest.raises(ValueError, match="x has shape"):
        hoisted(X[:, :, 1:], torch.tensor([100, 0, 100]), CALL[2])
    assert torch.equal(frozen(*CALL), expected)


class Slower(DiT):
    """A descendant with times and argument names of its own."""

    def forward(self, x, times, labels):
        return super().forward(x, times // 2, labels)


def test_samplers_leave_descendants_alone():
    model = tiny_model(depth=2).eval()
    model.__class__ = Slower
    settings = dict(process=VP("linear"), prediction="v", steps=3)
    found = difuse.sample(difuse.freeze(model), [0, 2], **settings)
    torch.testing.assert_close(found, difuse.sample(model, [0, 2], **settings), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="the call has no tensor t and no y"):
        difuse.freeze(model).hoist(TIMES, LABELS)(*CALL)


def test_samplers_leave_wrong_labels_to_the_model(frozen):
    with pytest.raises(ValueError, match="y holds labels from 5 to 5"):
        difuse.sample(frozen, [5], process=VP("linear"), prediction="v", steps=2, guidance=1.0)


def test_tables_do_not_follow_the_callers_tensors():
    times, labels = torch.linspace(0, 1, 11, dtype=torch.float64), torch.tensor(LABELS)
    frozen = difuse.freeze(tiny_model(depth=2).eval())
    hoisted = frozen.hoist(times[1:4], labels)
    call = X, times[1:4].float(), labels.clone()
    times += 1
    labels += 1
    torch.testing.assert_close(hoisted(*call), frozen(*call), rtol=1e-5, atol=1e-5)


def test_no_rows_and_a_call_within_a_call(frozen):
    hoisted, other = frozen.hoist(TIMES, LABELS), difuse.freeze(tiny_model(1, depth=2).eval())
    assert hoisted(X[:0], CALL[1][:0], CALL[2][:0]).shape == (0, 1, 4, 4)
    expected, inner = frozen(*CALL), other(*CALL)
    frozen.blocks[0].attn.register_forward_hook(lambda *_: close(other(*CALL), inner))
    close(hoisted(*CALL), expected)


def test_wrong_shapes_are_refused_by_the_model(frozen):
    with pytest.raises(ValueError, match=r"t has shape \(\); expected \(3,\)"):
        frozen.hoist(TIMES, LABELS)(X, torch.tensor(500), CALL[2])


def test_its_calls_are_recorded_by_the_models_names(frozen):
    hoisted = frozen.hoist(TIMES, LABELS)
    (arguments,) = difuse.recorded_calls(hoisted, lambda model: model(*CALL))
    assert list(arguments) == ["x", "t", "y"]
