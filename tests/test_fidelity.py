"""What recorded_calls keeps and fidelity measures: against models whose difference is known."""
import math

import pytest
import torch
from torch import nn

import difuse
from difuse.diffusion import VP, Flow
from difuse.diffusion.flow_as_vp import FlowAsVP
from difuse.inference.fidelity import Fidelity
from tests.tiny_training import tiny_model

OPTIONS = dict(process=Flow(), prediction="flow", sampler="flow_euler", guidance=2.0)


@pytest.fixture
def model():
    return tiny_model().eval()


def draw(model, steps=5):
    return difuse.sample(model, [0, 2, 1], steps=steps, **OPTIONS)


class Scaled(nn.Module):
    """A model whose results are one percent too large."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.num_classes = model, model.config, model.num_classes
        self.eval()

    def forward(self, x, t, y):
        return 1.01 * self.model(x, t, y)


def test_errors_are_of_single_calls_and_the_psnr_of_images(model):
    found = difuse.fidelity(model, Scaled(model), draw)
    assert found.errors == pytest.approx([0.01] * 5, rel=1e-4)
    mean_square = (draw(Scaled(model)) - draw(model)).double().square().mean().item()
    assert found.psnr == pytest.approx(10 * math.log10(4 / mean_square)) and 10 < found.psnr < 80


def test_nothing_differs_from_itself(model):
    assert difuse.fidelity(model, model, draw) == Fidelity((0.0,) * 5, math.inf)


def test_it_is_said_in_a_line():
    text = str(Fidelity((0.01, 0.03, 0.02), 41.26))
    assert text == ("relative error of the model's results over 3 calls: 2.00% on average, 1.00% in the first, 2.00% "
                    "in the last, 3.00% at most (call 2); images: 41.3 dB PSNR")


def test_recorded_calls_are_calls(model):
    calls = difuse.recorded_calls(model, draw)
    assert len(calls) == 5 and all(set(call) == {"x", "t", "y"} for call in calls)
    assert [call["t"][0].item() for call in calls] == pytest.approx([1000, 800, 600, 400, 200])
    assert all(len(call["x"]) == 6 for call in calls) and not torch.equal(calls[0]["x"], calls[1]["x"])
    frozen = difuse.freeze(model, "int8", calls)
    assert max(difuse.fidelity(model, frozen, draw).errors) < 0.05


def test_arguments_are_kept_by_name_and_as_they_were():
    class Model(nn.Module):
        def forward(self, x, *, scale=2.0, extra=None):
            return (scale * x,)

    def draw(model):
        x = torch.ones(2)
        y, = model(x, scale=3.0)
        x.zero_()
        return y / 10

    call, = difuse.recorded_calls(Model(), draw)
    assert set(call) == {"x", "scale"} and call["scale"] == 3.0 and torch.equal(call["x"], torch.ones(2))
    assert difuse.fidelity(Model(), Model(), draw).errors == (0.0,)


def test_other_attributes_are_the_models_and_its_mode_stays(model):
    modes = []

    def draw_and_look(watched):
        modes.append((watched.training, watched.num_classes, watched.config is model.config))
        return draw(watched)

    difuse.recorded_calls(model, draw_and_look)
    assert modes == [(False, 3, True)] and not model.training
    assert not FlowAsVP(model, VP()).training and FlowAsVP(tiny_model().train(), VP()).training
    model.train().y_embedder.eval()
    difuse.fidelity(model, model, lambda m: m(torch.zeros(1, 1, 4, 4), torch.ones(1), torch.zeros(1, dtype=torch.long)))
    FlowAsVP(model, VP())
    assert model.training and not model.y_embedder.training


def test_frozen_and_accelerated_models_are_recorded_by_the_models_own_names(model):
    frozen = difuse.freeze(model)
    assert set(difuse.recorded_calls(frozen, draw)[0]) == {"x", "t", "y"}
    assert difuse.fidelity(frozen, model, draw).psnr > 100


def test_arguments_of_any_kind():
    class Open(nn.Module):
        def forward(self, x, scale=1.0, **more):
            return x * scale * more.get("factor", 1.0)

    class Positional(nn.Module):
        def forward(self, x, *others):
            return x

    call, = difuse.recorded_calls(Open(), lambda m: m(torch.ones(2), factor=3.0))
    assert set(call) == {"x", "factor"} and call["factor"] == 3.0
    with pytest.raises(ValueError, match=r"Positional.forward takes \*others, which cannot be given by name"):
        difuse.recorded_calls(Positional(), lambda m: m(torch.ones(2), 3))


def test_bad_draws_are_named(model):
    with pytest.raises(ValueError, match="gave images with nan or infinity"):
        difuse.fidelity(model, model, lambda m: draw(m) * float("nan"))
    wrong = Scaled(model)
    wrong.forward = lambda x, t, y: model(x, t, y) * float("nan")
    with pytest.raises(FloatingPointError, match="not finite at step 0"):
        difuse.fidelity(model, wrong, draw)

    def by_hand(m):
        return draw(model) + m(torch.zeros(1, 1, 4, 4), torch.tensor([3]), torch.tensor([1])).mean()

    assert difuse.fidelity(model, wrong, by_hand).psnr == -math.inf
    with pytest.raises(ValueError, match="did not call the model"):
        difuse.fidelity(model, model, lambda _: torch.zeros(3))
    with pytest.raises(ValueError, match="other images the second time; draw from fixed seeds"):
        difuse.fidelity(model, model, lambda m: draw(m) + torch.rand(()))
