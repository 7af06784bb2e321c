"""How data becomes noise: x_t = alpha * x0 + sigma * noise, with alpha and sigma in float64.

VP    variance preserving on num_steps discrete times (DDPM, Ho et al. 2020, arXiv:2006.11239; the cosine schedule of
      Nichol & Dhariwal 2021, arXiv:2102.09672). t is an integer in [0, num_steps), alpha^2 + sigma^2 = 1.
Flow  the straight path (rectified flow, Liu et al. 2022, arXiv:2209.03003). t is in [0, 1] and t = 1 is noise,
      alpha = 1 - t, sigma = t, velocity dx/dt = noise - x0.
"""
import math

import torch


def linear_betas(num_steps):
    """beta from 1e-4 to 0.02, scaled by 1000 / num_steps so that the last step is noise for any num_steps."""
    if num_steps <= 20:
        raise ValueError(f"VP: the linear schedule needs num_steps > 20, got {num_steps}: its last beta, "
                         "20 / num_steps, must stay below 1. Take more steps, or schedule='cosine'")
    return torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64) * (1000 / num_steps)


def cosine_betas(num_steps):
    """alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi/2), beta at most 0.999."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = ((u + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}


class VP:
    """Variance preserving process on num_steps discrete times, schedule "linear" or "cosine"."""

    name = "vp"

    def __init__(self, schedule="linear", num_steps=1000):
        if schedule not in SCHEDULES:
            raise ValueError(f"VP: schedule {schedule!r} is unknown; expected one of {', '.join(SCHEDULES)}")
        if not isinstance(num_steps, int) or num_steps < 1:
            raise ValueError(f"VP: num_steps is {num_steps!r}; expected an integer >= 1")
        self.schedule, self.num_steps = schedule, num_steps
        alpha_bar = (1 - SCHEDULES[schedule](num_steps)).cumprod(0)
        self.alpha, self.sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()  # [T] float64

    @property
    def config(self):
        """What `process_from_config` needs, ready for JSON."""
        return {"name": self.name, "schedule": self.schedule, "num_steps": self.num_steps}

    def alpha_sigma(self, t):
        """(alpha, sigma) at integer t in [0, num_steps): float64, shaped like t.

        Raises TypeError for a float t, ValueError for t out of range (looked for on CPU only).
        """
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"VP: t has dtype {t.dtype}; expected an integer dtype; float times belong to Flow")
        _check_range(self, t, 0, self.num_steps - 1)
        t = t.long()
        return self.alpha.to(t.device)[t], self.sigma.to(t.device)[t]

    def model_time(self, t):
        """What the network is given for t: t itself."""
        return t


class Flow:
    """The straight path from data (t = 0) to noise (t = 1)."""

    name = "flow"

    @property
    def config(self):
        """What `process_from_config` needs, ready for JSON."""
        return {"name": self.name}

    def alpha_sigma(self, t):
        """(1 - t, t) at float t in [0, 1]: float64, shaped like t. Raises TypeError for an integer t, else as VP."""
        if not t.is_floating_point():
            raise TypeError(f"Flow: t has dtype {t.dtype}; expected a floating dtype; integer times belong to VP")
        _check_range(self, t, 0, 1)
        t = t.double()
        return 1 - t, t

    def model_time(self, t):
        """What the network is given for t: 1000 * t in float32, so that its sinusoids span what they do under VP."""
        return (1000 * t).float()


def process_from_config(config):
    """The process that a `config` dict describes. Raises ValueError for an unknown name or unknown settings."""
    settings = dict(config)
    name = settings.pop("name", None)
    kinds = {"vp": (VP, {"schedule", "num_steps"}), "flow": (Flow, set())}
    if name not in kinds:
        raise ValueError(f"process: name {name!r} is unknown; expected one of {', '.join(kinds)}")
    kind, known = kinds[name]
    if not settings.keys() <= known:
        raise ValueError(f"process {name!r}: unknown settings {sorted(settings.keys() - known)}; "
                         f"expected {sorted(known) or 'none'}")
    return kind(**settings)


def _check_range(process, t, low, high):
    if t.device.type != "cpu" or t.numel() == 0:  # reading values would make a GPU wait
        return
    if not (t.min() >= low and t.max() <= high):  # written so that NaN fails too
        raise ValueError(f"{type(process).__name__}: t goes from {t.min().item()} to {t.max().item()}; "
                         f"expected {low} to {high}")
