"""What every process has: nodes on its path from data to noise, found by time or by noise level."""
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Node:
    """A place on the path, x = alpha * x0 + sigma * noise; `time` is what the model is given there."""

    time: float
    alpha: float
    sigma: float
    scale: float = 1.0  # the model is given scale * x

    @property
    def k(self):
        """Noise per signal, sigma / alpha."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self):
        """lambda = ln(alpha / sigma), half the log signal-to-noise ratio."""
        return -math.log(self.k) if 0 < self.k < math.inf else math.inf if self.k == 0 else -math.inf


DATA = Node(0.0, 1.0, 0.0)  # the end of every path; no model is called there


class Process:
    """What processes share: `nodes(t)` in the process's own times, `at(k)`, `levels`, and how noise is given."""

    prior = 1.0  # the state at the noisy end is prior * (standard normal noise)
    spacing = "uniform"  # of the times, if the user names none
    model_times = torch.float32  # the dtype of what the model is given

    @property
    def config(self):
        """What `process_from_config` needs, ready for JSON."""
        return {"name": self.name, **{name: getattr(self, name) for name in self.settings}}

    def nodes(self, t):
        """The nodes at times t [N]."""
        alpha, sigma = self.alpha_sigma(t)
        times = self.model_time(t)
        return [Node(*values, scale=self.scale(values[2])) for values in zip(
            times.tolist(), alpha.tolist(), sigma.tolist(), strict=True)]

    def scale(self, sigma):
        """What x is multiplied with before the model is given it."""
        return 1.0

    def alpha_sigma_of(self, k):
        """(alpha, sigma) where sigma / alpha is k, on a variance preserving path."""
        return 1 / math.hypot(1, k), k / math.hypot(1, k)

    @property
    def ends(self):
        """(least, greatest) finite k of the path: where grids of levels begin and end."""
        low, high = self.levels
        return low, high if math.isfinite(high) else 1 / low

    def at(self, k):
        """The node where sigma / alpha is k > 0."""
        alpha, sigma = self.alpha_sigma_of(k)
        return Node(self.time_of(k), alpha, sigma, self.scale(sigma))


def check_range(process, t, low, high):
    """Raise ValueError for times t outside of [low, high]; looked for on the CPU only."""
    if t.device.type != "cpu" or t.numel() == 0:  # reading values would make a GPU wait
        return
    if not (t.min() >= low and t.max() <= high):  # written so that NaN fails too
        raise ValueError(f"{type(process).__name__}: t goes from {t.min().item()} to {t.max().item()}; "
                         f"expected {low} to {high}")
