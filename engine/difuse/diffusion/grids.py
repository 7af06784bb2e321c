"""Where on its path a sampler calls the model: `path` gives the nodes, noise first, then the data.

    uniform      equal steps of the process's own time                     continuous processes
    trailing     equal steps from the noisiest time down, the last to the data        VP
    leading      equal steps from time 0 up, the noisiest time is left out            VP (DDIM's code)
    linspace     from the noisiest to the cleanest time, both                         VP
    karras       equal steps of level^(1/7) (Karras et al. 2022, arXiv:2206.00364, equation 5)
    exponential  equal steps of ln(level)
    beta         levels at quantiles of the Beta(0.6, 0.6) distribution (Lee et al. 2024, arXiv:2407.12173)
    log_snr      equal steps of lambda = ln(alpha / sigma) (Lu et al. 2022, arXiv:2206.00927)

A level is sigma / alpha, on Flow the time itself.
"""
import difflib
import math
from collections.abc import Sequence

import torch

from difuse.diffusion.node import DATA
from difuse.diffusion.processes import VP, VPSDE, Flow

_RHO = 7.0
_BETA = 0.6


def _karras(low, high, steps):
    a, b = high ** (1 / _RHO), low ** (1 / _RHO)
    return [(a + i / max(steps - 1, 1) * (b - a)) ** _RHO for i in range(steps)]


def _exponential(low, high, steps):
    return [high * (low / high) ** (i / max(steps - 1, 1)) for i in range(steps)]


def _beta(low, high, steps):
    from scipy.stats import beta  # quantiles: the one thing here that needs scipy

    quantiles = beta.ppf([1 - i / max(steps - 1, 1) for i in range(steps)], _BETA, _BETA)
    return (low + quantiles * (high - low)).tolist()


_LEVELS = {"karras": _karras, "exponential": _exponential, "beta": _beta}
_TIMES = {  # of VP: num_steps, steps -> integers
    "trailing": lambda T, n: T - 1 - torch.arange(n) * T // n,
    "leading": lambda T, n: (T // n) * torch.arange(n - 1, -1, -1),
    "linspace": lambda T, n: torch.linspace(T - 1, 0, n, dtype=torch.float64).round().long(),
}
SPACINGS = ("uniform", *_TIMES, *_LEVELS, "log_snr")


def path(process, steps, spacing=None):
    """The nodes of a trajectory of so many steps, and DATA.

    steps: their number, or the times themselves, in the process's own unit, noise first. spacing: None for the
    process's own. Raises ValueError or TypeError for what does not fit.
    """
    if isinstance(steps, (Sequence, torch.Tensor)) and not isinstance(steps, str):
        return _given(process, steps, spacing)
    limit = process.num_steps if isinstance(process, VP) else 100_000
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= limit:
        raise ValueError(f"steps is {steps!r}; expected an integer from 1 to {limit}, or a list of times")
    spacing = process.spacing if spacing is None else spacing
    if spacing not in SPACINGS:
        near = difflib.get_close_matches(str(spacing), SPACINGS, n=1, cutoff=0)[0]
        raise ValueError(f"spacing {spacing!r} is unknown; did you mean {near!r}? Expected one of "
                         f"{', '.join(SPACINGS)}")
    if spacing in _TIMES or (spacing == "uniform" and isinstance(process, VP)):
        if spacing == "uniform" or not isinstance(process, VP):
            raise ValueError(f"spacing {spacing!r} does not fit {type(process).__name__}; expected "
                             f"{process.spacing!r} or one of {', '.join((*_LEVELS, 'log_snr'))}")
        return [*process.nodes(_TIMES[spacing](process.num_steps, steps)), DATA]
    if spacing == "uniform":
        return [*process.nodes(_uniform(process, steps)), DATA]
    low, high = process.ends
    if isinstance(process, Flow):
        if spacing == "log_snr":
            t = [k / (1 + k) for k in _exponential(low, high, steps)]
        else:
            t = _LEVELS[spacing](low / (1 + low), 1.0, steps)
        return [*process.nodes(process.warp(torch.tensor(t, dtype=torch.float64))), DATA]
    return [*(process.at(k) for k in _LEVELS.get(spacing, _exponential)(low, high, steps)), DATA]


def part_of(part, steps):
    """How many of so many steps a part from 0 to 1 of them is, rounded down; 0.9 of 10 is 9, whatever floats say."""
    return int(part * steps + 1e-9)


def _uniform(process, steps):
    if isinstance(process, Flow):
        return process.warp(torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1])
    least = process.least if isinstance(process, VPSDE) else 0.0
    return torch.linspace(1, least, steps, dtype=torch.float64)


def _given(process, times, spacing):
    if spacing is not None:
        raise ValueError(f"spacing is {spacing!r} beside a list of times; give one of them")
    times = torch.as_tensor(times)
    if times.dim() != 1 or len(times) == 0 or (len(times) > 1 and not (times[1:] < times[:-1]).all()):
        raise ValueError(f"the times are {times.tolist()}; expected at least one, falling from noise to data")
    nodes = process.nodes(times if isinstance(process, VP) else times.double())
    if nodes[-1].sigma <= 0 or not math.isfinite(nodes[0].sigma):
        raise ValueError(f"the times are {times.tolist()}; the data's own time is added and is none of them")
    return [*nodes, DATA]
