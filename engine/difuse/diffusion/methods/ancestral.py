"""Chains: DDPM and DDIM, and few-step samplers of distilled models, which predict the data and add noise again."""
from math import exp, log, sqrt

from difuse.diffusion.method import NOISE, Nonlinear, Predict, steps_of


def ddpm(x, path, *, variance="small"):
    """Ancestral sampling from q(x_s | x_t, x0), Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7.

    variance: "small", the posterior's; "large", the forward step's; "learned", between the two per element as the
    network says (Nichol & Dhariwal 2021, arXiv:2102.09672, equation 15). The last step to the data draws none.
    Fewer steps than the process has respace the chain.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"ddpm: variance is {variance!r}; expected 'small', 'large' or 'learned'")
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        alpha_ts = t.alpha / s.alpha  # x_t = alpha_ts * x_s + noise of variance beta
        beta = t.sigma**2 - (alpha_ts * s.sigma) ** 2
        beta_tilde = beta * s.sigma**2 / t.sigma**2
        x = (alpha_ts * s.sigma**2 * x + s.alpha * beta * m.x0) / t.sigma**2
        if beta_tilde > 0:
            z = yield NOISE
            if variance == "learned":
                low, high = log(beta_tilde), log(beta)  # ln std = f/2 high + (1 - f)/2 low, f = (v + 1) / 2
                x = x + exp((high + low) / 4) * (yield Nonlinear(_times_exp, z, (high - low) / 4 * m.variance))
            else:
                x = x + sqrt(beta if variance == "large" else beta_tilde) * z
        yield x


def _times_exp(z, v):
    return z * v.exp()


def ddim(x, path, *, eta=0.0):
    """Song et al. 2021 (arXiv:2010.02502), equations 12 and 16. eta = 0 is deterministic, eta = 1 is DDPM."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta is {eta}; expected 0 (deterministic) to 1 (as ddpm)")
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        beta = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2  # 1 - (alpha_t / alpha_s)^2 where variance is preserved
        sigma_eta = eta * s.sigma / t.sigma * sqrt(beta)
        x = s.alpha * m.x0 + sqrt(s.sigma**2 - sigma_eta**2) * m.eps
        if sigma_eta > 0:
            x = x + sigma_eta * (yield NOISE)
        yield x


def ancestral_ve(x, path):
    """Ancestral sampling of the variance exploding process, Song et al. 2021 (arXiv:2011.13456), equation 47."""
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        beta = t.sigma**2 - s.sigma**2
        x = x + beta * m.score
        if s.sigma > 0:
            x = x + s.sigma * sqrt(beta) / t.sigma * (yield NOISE)
        yield x


def lcm(x, path):
    """Latent consistency models, Luo et al. 2023 (arXiv:2310.04378), algorithm 3, for networks distilled to it.

    c_skip and c_out are the paper's, of ten times the time and a data std of 0.5.
    """
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        time, data_std = 10 * t.time, 0.5
        c_skip, c_out = data_std**2 / (time**2 + data_std**2), time / sqrt(time**2 + data_std**2)
        x = s.alpha * (c_skip * x + c_out * m.x0)
        if s.sigma > 0:
            x = x + s.sigma * (yield NOISE)
        yield x


def consistency(x, path, *, sigma_min=0.002):
    """Multistep consistency sampling, Song et al. 2023 (arXiv:2303.01469), algorithm 1, for consistency models.

    What the network predicts is taken as it is: its skip connection, which is the identity at sigma_min, is its own.
    """
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        x = m.x0
        if s.sigma > sigma_min:
            x = x + sqrt(s.sigma**2 - sigma_min**2) * (yield NOISE)
        yield x
