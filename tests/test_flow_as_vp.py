"""A flow model on the VP path, against the posterior mean of a Gaussian, known in closed form on both paths."""
import pytest
import torch
from torch import nn

from difuse.diffusion import VESDE, VP, Flow, ddim, diffuse
from difuse.diffusion.flow_as_vp import FlowAsVE, FlowAsVP

MEAN, STD = 0.3, 0.7


def posterior_mean(x_t, alpha, sigma):
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2) and x_t = alpha*x0 + sigma*noise."""
    gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
    return MEAN + gain * (x_t - alpha * MEAN)


class PerfectVelocity(nn.Module):
    """E[noise - x0 | x_t] on the straight path, given 1000 * t as networks are; labels move the mean."""

    num_classes = 5
    config = {"in_channels": 1, "input_size": 3}

    def forward(self, x, t, y):
        t = (t.double() / 1000).reshape(-1, 1, 1, 1)
        y = y.reshape(-1, 1, 1, 1)
        centred = x.double() - (1 - t) * y
        return ((centred - posterior_mean(centred, 1 - t, t)) / t - y).to(x.dtype)  # (x_t - x0) / t


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_it_predicts_the_posterior_mean_of_the_vp_path(schedule):
    process = VP(schedule)
    t, y = torch.tensor([0, 3, 250, 700, 999]), torch.tensor([0, 1, 2, 3, 4])
    alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in process.alpha_sigma(t))
    x_t = torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = posterior_mean(x_t - alpha * y.reshape(-1, 1, 1, 1), alpha, sigma) + y.reshape(-1, 1, 1, 1)
    got = FlowAsVP(PerfectVelocity(), process)(x_t, t, y)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_it_predicts_the_posterior_mean_of_the_ve_path():
    sigma, y = torch.tensor([0.01, 0.3, 1.0, 7.0, 50.0]), torch.tensor([0, 1, 2, 3, 4])
    at, mean = sigma.double().reshape(-1, 1, 1, 1), y.reshape(-1, 1, 1, 1)
    x_t = at * torch.randn(5, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = FlowAsVE(PerfectVelocity(), VESDE())(x_t, sigma, y)
    torch.testing.assert_close(got, posterior_mean(x_t - mean, 1, at) + mean, rtol=1e-10, atol=1e-10)


def test_ddim_through_it_follows_the_probability_flow():
    """For Gaussian data the flow keeps (x_t - alpha * mean) / std_t; ddim's error must fall like 1 / steps."""
    process, errors = VP("linear"), []
    noise = torch.randn(6, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 3, 4, 2])
    mean = MEAN + labels.reshape(-1, 1, 1, 1)
    alpha, sigma = process.alpha_sigma(torch.tensor(999))
    exact = mean + STD * (noise - alpha * mean) / ((alpha * STD) ** 2 + sigma**2).sqrt()
    for steps in (50, 200):
        x0 = ddim(FlowAsVP(PerfectVelocity(), process), noise, process=process, steps=steps, prediction="x0",
                  labels=labels)
        errors.append((x0 - exact).abs().max().item())
    assert errors[0] < 0.15 and 3 < errors[0] / errors[1] < 5, errors


def test_flow_path_itself_agrees():
    """The same oracle on its own path: guards the oracle, not the wrapper."""
    process, t = Flow(), torch.tensor([0.2, 0.9], dtype=torch.float64)
    x0, noise = torch.full((2, 1, 3, 3), MEAN, dtype=torch.float64), torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    x_t = diffuse(x0, noise, *process.alpha_sigma(t))
    velocity = PerfectVelocity()(x_t, process.model_time(t), torch.zeros(2))
    torch.testing.assert_close(x_t - t.reshape(-1, 1, 1, 1) * velocity, x0, rtol=1e-4, atol=1e-4)
