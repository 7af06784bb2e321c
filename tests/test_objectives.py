"""Losses against the papers' formulas in float64, timestep distributions, and the averaged weights."""
import math

import numpy as np
import pytest
import torch
from tiny_training import tiny_config, tiny_model, tiny_trainer
from torch import nn

from difuse.diffusion import VP, Flow
from difuse.training.ema import EMA
from difuse.training.objectives import draw_times, eps_loss, flow_loss, logit_normal, uniform


class Known(nn.Module):
    """A model simple enough to be written down again in numpy: 0.5 x + t / 700 + 0.3 y."""

    def forward(self, x, t, y):
        return 0.5 * x + (t / 700 + 0.3 * y)[:, None, None, None].to(x.dtype)


@pytest.fixture
def sample():
    """x0 [4,2,3,3], noise, y [4], each sample with its own time below."""
    generator = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 4, 2, 3, 3, generator=generator)
    return x0, noise, torch.tensor([0, 3, 1, 2])


def known_model(x, t, y):
    return 0.5 * x + (t / 700 + 0.3 * y)[:, None, None, None]


def test_eps_loss_is_ho_2020(sample):
    x0, noise, y = sample
    t = np.array([0, 17, 500, 999])
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[t][:, None, None, None]
    a, b, c = (v.numpy().astype(np.float64) for v in (x0, noise, y))
    expected = ((b - known_model(np.sqrt(alpha_bar) * a + np.sqrt(1 - alpha_bar) * b, t, c)) ** 2).mean()
    loss = eps_loss(Known(), VP("linear"), x0, y, torch.from_numpy(t), noise)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_flow_loss_is_lipman_2022(sample):
    x0, noise, y = sample
    t = torch.tensor([0.0, 0.125, 0.7, 1.0])
    a, b, c, s = (v.numpy().astype(np.float64) for v in (x0, noise, y, t))
    w = s[:, None, None, None]
    expected = (((b - a) - known_model((1 - w) * a + w * b, 1000 * s, c)) ** 2).mean()
    assert flow_loss(Known(), Flow(), x0, y, t, noise).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", [eps_loss, flow_loss])
def test_loss_is_float32_for_a_bfloat16_model(sample, loss):
    """The square of a bfloat16 difference, averaged in float32: never a bfloat16 mean."""
    class Half(nn.Module):
        def forward(self, x, t, y):
            return x.bfloat16()

    x0, noise, y = sample
    process, t = (VP(), torch.tensor([3, 40, 500, 900])) if loss is eps_loss else (Flow(), torch.rand(4))
    result = loss(Half(), process, x0, y, t, noise)
    alpha, sigma = (c.float()[:, None, None, None] for c in process.alpha_sigma(t))
    target = noise if loss is eps_loss else noise - x0
    expected = ((alpha * x0 + sigma * noise).bfloat16().double() - target.double()).square().mean()
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected.item(), rel=1e-5)


def test_learned_sigma_is_refused(sample):
    x0, noise, y = sample
    with pytest.raises(ValueError, match=r"returned \(4, 4, 3, 3\).*learn_sigma=False"):
        flow_loss(lambda x, t, y: torch.cat((x, x), 1), Flow(), x0, y, torch.rand(4), noise)


def test_uniform_times_cover_every_step():
    generator = torch.Generator().manual_seed(0)
    t = draw_times(tiny_config(objective="eps"), VP("linear"), 200_000, generator)
    counts = torch.bincount(t, minlength=1000)
    assert t.dtype == torch.int64 and len(counts) == 1000
    assert abs(counts - 200).max() < 6 * math.sqrt(200)  # Poisson: six standard deviations
    u = draw_times(tiny_config(), Flow(), 200_000, generator)
    assert u.dtype == torch.float32 and u.min() >= 0 and u.max() <= 1
    assert u.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 200_000))


def test_logit_normal_times_have_the_stated_mean_and_deviation():
    count, mean, std = 200_000, -0.4, 1.3
    u = logit_normal(count, torch.Generator().manual_seed(0), mean, std)
    logits = torch.logit(u)
    assert logits.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(count))
    assert logits.std().item() == pytest.approx(std, abs=5 * std / math.sqrt(2 * count))
    config = tiny_config(timesteps="logit_normal", logit_mean=mean, logit_std=std)
    drawn = draw_times(config, Flow(), count, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, u.float())


def test_times_at_the_ends_stay_in_range():
    """A wide logit-normal saturates to exactly 0 and 1; steps must still be 0 to 999."""
    config = tiny_config(objective="eps", timesteps="logit_normal", logit_std=500.0)
    t = draw_times(config, VP("cosine"), 1000, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999
    assert uniform(0, torch.Generator()).shape == (0,)


def test_ema_follows_its_formula():
    """average_s = d average + (1 - d) w with d = min(decay, (1 + s) / (10 + s)), against float64."""
    model, generator = tiny_model(), torch.Generator().manual_seed(2)
    ema = EMA(model, decay=0.3)
    oracle = {name: p.detach().double() for name, p in model.named_parameters()}
    for step in range(8):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=generator))
        ema.update(step)
        d = min(0.3, (1 + step) / (10 + step))
        oracle = {name: d * oracle[name] + (1 - d) * p.detach().double() for name, p in model.named_parameters()}
    assert (ema.decay_at(0), ema.decay_at(1), ema.decay_at(100)) == (0.1, 2 / 11, 0.3)
    for name, average in ema.averages.items():
        assert average.dtype == torch.float32
        # two roundings a step, each half a unit of the largest value met
        assert (average - oracle[name]).abs().max() <= 8 * 2**-23 * max(10, oracle[name].abs().max())


def test_ema_model_is_a_copy_in_eval_mode():
    trainer = tiny_trainer()
    trainer.train()
    averaged = trainer.ema_model()
    assert not averaged.training and trainer.model.training
    for name, p in averaged.named_parameters():
        assert torch.equal(p, trainer.ema.averages[name])
    assert any(not torch.equal(p, q) for p, q in zip(averaged.parameters(), trainer.model.parameters(), strict=True))
