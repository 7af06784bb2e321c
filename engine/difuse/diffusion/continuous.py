"""Processes in continuous time, of Song et al. 2021 (arXiv:2011.13456) and Karras et al. 2022 (arXiv:2206.00364)."""
import math

import torch

from difuse.diffusion.node import Process, check_range
from difuse.diffusion.parameterizations import DATA_STD


class VPSDE(Process):
    """dx = -beta(t)/2 x dt + sqrt(beta(t)) dw, beta from beta_min to beta_max; the network is given 999 * t."""

    name, settings = "vpsde", ("beta_min", "beta_max")
    least = 1e-3  # the time below which nothing was trained

    def __init__(self, beta_min=0.1, beta_max=20.0):
        if not 0 < beta_min < beta_max < math.inf:
            raise ValueError(f"{type(self).__name__}: beta goes from {beta_min} to {beta_max}; expected 0 < beta_min < "
                             "beta_max")
        self.beta_min, self.beta_max = beta_min, beta_max

    def _integral(self, t):
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2  # of beta from 0 to t

    def alpha_sigma(self, t):
        """(alpha, sigma) at float t in [0, 1]: float64, shaped like t."""
        if not t.is_floating_point():
            raise TypeError(f"{type(self).__name__}: t has dtype {t.dtype}; expected a floating dtype")
        check_range(self, t, 0, 1)
        B = self._integral(t.double())
        return (-B / 2).exp(), (-torch.expm1(-B)).sqrt()

    def model_time(self, t):
        """What the network is given for t: 999 * t in float32."""
        return (999 * t).float()

    @property
    def levels(self):
        """The least and the greatest k that the network has seen."""
        alpha, sigma = self.alpha_sigma(torch.tensor([self.least, 1.0], dtype=torch.float64))
        return tuple((sigma / alpha).tolist())

    def _B(self, k):
        return math.log1p(k * k)  # alpha^2 = e^-B, sigma^2 = 1 - e^-B

    def time_of(self, k):
        """999 * t where sigma / alpha is k."""
        B, slope = self._B(k), self.beta_max - self.beta_min
        return 999 * 2 * B / (self.beta_min + math.sqrt(self.beta_min**2 + 2 * slope * B))


class SubVPSDE(VPSDE):
    """As VPSDE with less noise: sigma = 1 - alpha^2."""

    name = "subvpsde"

    def alpha_sigma(self, t):
        """(alpha, sigma) at float t in [0, 1]: float64, shaped like t."""
        alpha, sigma = super().alpha_sigma(t)
        return alpha, sigma**2

    def alpha_sigma_of(self, k):
        """(alpha, 1 - alpha^2) where their ratio gives k."""
        alpha = 2 / (k + math.sqrt(k * k + 4))
        return alpha, alpha * k

    def _B(self, k):
        return -2 * math.log(self.alpha_sigma_of(k)[0])


class VESDE(Process):
    """Variance exploding: alpha = 1, sigma from sigma_min to sigma_max in a geometric series; given sigma itself."""

    name, settings = "vesde", ("sigma_min", "sigma_max")

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"{type(self).__name__}: sigma goes from {sigma_min} to {sigma_max}; expected 0 < "
                             "sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.prior = sigma_min, sigma_max, sigma_max
        self.levels = sigma_min, sigma_max

    def alpha_sigma(self, t):
        """(1, sigma) at float t in [0, 1]: float64, shaped like t."""
        if not t.is_floating_point():
            raise TypeError(f"{type(self).__name__}: t has dtype {t.dtype}; expected a floating dtype")
        check_range(self, t, 0, 1)
        return torch.ones_like(t, dtype=torch.float64), self.sigma_min * (self.sigma_max / self.sigma_min) ** t.double()

    def alpha_sigma_of(self, k):
        """(1, k)."""
        return 1.0, k

    def model_time(self, t):
        """What the network is given for t: sigma in float32."""
        return self.alpha_sigma(t)[1].float()

    def time_of(self, k):
        """sigma, which is k."""
        return k


class EDM(Process):
    """alpha = 1, the time is sigma; the network is given x / sqrt(sigma^2 + 0.5^2) and ln(sigma) / 4.

    With prediction="edm" its output F gives x0 = c_skip x + c_out F; see parameterizations.py.
    """

    name, settings, spacing = "edm", ("sigma_min", "sigma_max"), "karras"

    def __init__(self, sigma_min=0.002, sigma_max=80.0):
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"EDM: sigma goes from {sigma_min} to {sigma_max}; expected 0 < sigma_min < sigma_max")
        self.sigma_min, self.sigma_max, self.prior = sigma_min, sigma_max, sigma_max
        self.levels = sigma_min, sigma_max

    def alpha_sigma(self, t):
        """(1, t) at float t > 0: float64, shaped like t."""
        if not t.is_floating_point():
            raise TypeError(f"EDM: t has dtype {t.dtype}; expected a floating dtype")
        check_range(self, t, 0, math.inf)
        return torch.ones_like(t, dtype=torch.float64), t.double()

    def alpha_sigma_of(self, k):
        """(1, k)."""
        return 1.0, k

    def model_time(self, t):
        """What the network is given for sigma = t: ln(t) / 4 in float32."""
        return (t.log() / 4).float()

    def time_of(self, k):
        """ln(sigma) / 4, sigma being k."""
        return math.log(k) / 4

    def scale(self, sigma):
        """What x is multiplied with before the model is given it."""
        return 1 / math.hypot(sigma, DATA_STD)
