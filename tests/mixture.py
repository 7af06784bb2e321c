"""A Gaussian mixture in two dimensions, whose score is known on every path, and samplers on it in float64."""
import functools
import math

import numpy as np
import torch
from scipy.integrate import solve_ivp

from difuse.diffusion import SAMPLERS, Guidance, coefficients
from difuse.diffusion.method import record
from difuse.diffusion.run import Run
from difuse_kernels import use_backend

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.4], [0.7, -0.6], [0.2, 1.1]], dtype=torch.float64)
STDS = torch.tensor([0.5, 0.35, 0.6], dtype=torch.float64)


def log_density(x, alpha, sigma, weights=WEIGHTS):
    """ln p_t(x) [B*H*W] of alpha * (mixture) + sigma * (noise), x [B,2,H,W], up to a constant."""
    variance = alpha**2 * STDS**2 + sigma**2  # [3]
    points = x.movedim(1, -1).reshape(-1, 2)  # [B*H*W,2], each of its own
    distance = ((points[:, None] - alpha * MEANS) ** 2).sum(-1)  # [B*H*W,3]
    return torch.logsumexp(weights.log() - variance.log() - distance / (2 * variance), 1)


def score(x, node, weights=WEIGHTS):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_density(x, node.alpha, node.sigma, weights).sum(), x)[0]


def prediction_of(kind, x, node, weights=WEIGHTS):
    """What an exact network says: the score in another form."""
    c_x, c_m = coefficients("score", kind, node.alpha, node.sigma)
    return c_x * x + c_m * score(x, node, weights)


def nodes_between(process, k_first, k_last, h):
    """Steps of h in ln(k), the first and last ever smaller: what starts with low order does so in tiny steps."""
    small = [h**2 * 2**i for i in range(12) if h**2 * 2**i < h]
    span = math.log(k_first / k_last) - 2 * sum(small)
    count = round(span / h)
    steps = [*small, *([span / count] * count), *small[::-1]]
    return [process.at(k_first * math.exp(-at)) for at in np.concatenate([[0], np.cumsum(steps)])]


def trajectory(name, nodes, process, noise, prediction="eps", guidance=1.0, weights=(WEIGHTS,), generator=None,
               **options):
    """The end of a sampler's path over these nodes, in float64; also how many calls it made."""
    sampler = SAMPLERS[name]
    if sampler._asks_process:
        options["process"] = process
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    program = record(functools.partial(sampler._method, **options), nodes, prediction, guidance)
    run = Run(program, (noise,), lambda: torch.randn(noise.shape, generator=generator, dtype=noise.dtype))
    with use_backend("reference"):  # which takes float64
        while (asked := run.advance()) is not None:
            call, given = asked
            x = given / call.node.scale
            answers = [prediction_of(prediction, x, call.node, w) for w, _ in zip(weights, call.sources, strict=False)]
            run.give((*answers, answers[0]))
    return run.x, len(program.calls)


def solution(process, k_first, k_last, x):
    """The probability-flow ODE by scipy, to 1e-12: d(x/alpha) = eps dk."""
    def slope(u, y):
        node = process.at(math.exp(u))
        eps = prediction_of("eps", torch.from_numpy(node.alpha * y).reshape(x.shape), node)
        return node.k * eps.numpy().reshape(-1)

    found = solve_ivp(slope, (math.log(k_first), math.log(k_last)), (x / process.at(k_first).alpha).numpy().reshape(-1),
                      method="DOP853", rtol=1e-12, atol=1e-12)
    return process.at(k_last).alpha * torch.from_numpy(found.y[:, -1]).reshape(x.shape)


def smooth(x, t, y=None):
    """A cheap stand-in for a network."""
    return 0.7 * torch.sin(x + 1e-3 * t.reshape(-1, 1, 1, 1).float()) + 0.2 * x
