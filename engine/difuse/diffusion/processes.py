"""How data becomes noise: x_t = alpha * x0 + sigma * noise, with alpha and sigma in float64.

VP      variance preserving on num_steps discrete times (DDPM, Ho et al. 2020, arXiv:2006.11239). t is an integer in
        [0, num_steps), alpha^2 + sigma^2 = 1.
Flow    the straight path (rectified flow, Liu et al. 2022, arXiv:2209.03003). t is in [0, 1] and t = 1 is noise,
        alpha = 1 - t, sigma = t, velocity dx/dt = noise - x0.
VPSDE, SubVPSDE, VESDE   the continuous processes of Song et al. 2021 (arXiv:2011.13456), t in [0, 1].
EDM     sigma itself is the time, alpha = 1 (Karras et al. 2022, arXiv:2206.00364).

The noise level k = sigma / alpha grows along every path and says where on it one is; `at(k)` is the node there.
"""
import math

import numpy as np
import torch

from difuse.diffusion.continuous import EDM, VESDE, VPSDE, SubVPSDE
from difuse.diffusion.node import Process, check_range
from difuse.diffusion.schedules import SCHEDULES, zero_terminal_snr


class VP(Process):
    """Variance preserving process on num_steps discrete times.

    schedule: "linear", "scaled_linear" (Stable Diffusion's), "cosine" or "sigmoid". zero_snr: rescaled so that the
    last time is pure noise (Lin et al. 2023, arXiv:2305.08891), where a network that predicts eps says nothing.
    """

    name, settings, spacing = "vp", ("schedule", "num_steps", "zero_snr"), "trailing"
    model_times = torch.int64

    def __init__(self, schedule="linear", num_steps=1000, zero_snr=False):
        if schedule not in SCHEDULES:
            raise ValueError(f"VP: schedule {schedule!r} is unknown; expected one of {', '.join(SCHEDULES)}")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"VP: num_steps is {num_steps!r}; expected an integer >= 1")
        self.schedule, self.num_steps, self.zero_snr = schedule, num_steps, zero_snr
        alpha_bar = (1 - SCHEDULES[schedule](num_steps)).cumprod(0)
        self.alpha, self.sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # [T] float64
        if zero_snr:
            self.alpha, self.sigma = zero_terminal_snr(self.alpha)

    @property
    def config(self):
        """What `process_from_config` needs, ready for JSON."""
        config = super().config
        if not self.zero_snr:  # as it was before there was a choice
            del config["zero_snr"]
        return config

    def alpha_sigma(self, t):
        """(alpha, sigma) at integer t in [0, num_steps): float64, shaped like t.

        Raises TypeError for a float t, ValueError for t out of range (looked for on CPU only).
        """
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"VP: t has dtype {t.dtype}; expected an integer dtype; float times belong to Flow")
        check_range(self, t, 0, self.num_steps - 1)
        t = t.long()
        return self.alpha.to(t.device)[t], self.sigma.to(t.device)[t]

    def model_time(self, t):
        """What the network is given for t: t itself."""
        return t

    @property
    def levels(self):
        """The least and the greatest k that the network has seen; the greatest is finite."""
        k = self.sigma / self.alpha
        return k[0].item(), k[k.isfinite()][-1].item()

    def time_of(self, k):
        """The time, not always an integer, where sigma / alpha is k: ln k is linear between neighbours."""
        known = (self.sigma / self.alpha)[self.alpha > 0].log().numpy()
        return float(np.interp(math.log(k), known, np.arange(len(known))))


class Flow(Process):
    """The straight path from data (t = 0) to noise (t = 1).

    shift: times are moved towards noise, t to shift*t / (1 + (shift-1)*t), as large images want it (SD3,
    arXiv:2403.03206); `Flow.shift_of` gives it for a resolution. terminal: the last time before the data, to which the
    others are stretched (LTX-Video). Both belong to sampling alone.
    """

    name, settings = "flow", ("shift", "terminal")

    def __init__(self, shift=1.0, terminal=None):
        if not (isinstance(shift, (int, float)) and 0 < shift < math.inf):
            raise ValueError(f"Flow: shift is {shift!r}; expected a number > 0, 1 for none")
        if terminal is not None and not 0 < terminal < 1:
            raise ValueError(f"Flow: terminal is {terminal!r}; expected a time between 0 and 1, or None")
        self.shift, self.terminal = shift, terminal

    @property
    def config(self):
        """What `process_from_config` needs, ready for JSON."""
        return {"name": self.name} | ({"shift": self.shift} if self.shift != 1 else {}) | (
            {"terminal": self.terminal} if self.terminal is not None else {})

    @staticmethod
    def shift_of(tokens, *, base=(256, 0.5), most=(4096, 1.15)):
        """The shift for an image of so many tokens: e^mu, mu linear through (tokens, mu) `base` and `most` (Flux)."""
        slope = (most[1] - base[1]) / (most[0] - base[0])
        return math.exp(base[1] + slope * (tokens - base[0]))

    def alpha_sigma(self, t):
        """(1 - t, t) at float t in [0, 1]: float64, shaped like t. Raises TypeError for an integer t, else as VP."""
        if not t.is_floating_point():
            raise TypeError(f"Flow: t has dtype {t.dtype}; expected a floating dtype; integer times belong to VP")
        check_range(self, t, 0, 1)
        t = t.double()
        return 1 - t, t

    def model_time(self, t):
        """What the network is given for t: 1000 * t in float32, so that its sinusoids span what they do under VP."""
        return (1000 * t).float()

    levels = (1 / 999, math.inf)  # t from 0.001 to 1

    def time_of(self, k):
        """1000 * t where t / (1 - t) is k."""
        return 1000 * k / (1 + k)

    def alpha_sigma_of(self, k):
        """(1 - t, t) where t / (1 - t) is k."""
        return 1 / (1 + k), k / (1 + k)

    def warp(self, t):
        """Times t [N], noise first, shifted and stretched."""
        t = self.shift * t / (1 + (self.shift - 1) * t)
        if self.terminal is None or len(t) < 2:  # the first time stays, the last becomes terminal
            return t
        return 1 - (1 - t) * ((1 - self.terminal) / (1 - t[-1]))


PROCESSES = {process.name: process for process in (VP, Flow, VPSDE, SubVPSDE, VESDE, EDM)}


def process_from_config(config):
    """The process that a `config` dict describes. Raises ValueError for an unknown name or unknown settings."""
    settings = dict(config)
    name = settings.pop("name", None)
    if name not in PROCESSES:
        raise ValueError(f"process: name {name!r} is unknown; expected one of {', '.join(PROCESSES)}")
    known = set(PROCESSES[name].settings)
    if not settings.keys() <= known:
        raise ValueError(f"process {name!r}: unknown settings {sorted(settings.keys() - known)}; expected "
                         f"{sorted(known)}")
    return PROCESSES[name](**settings)
