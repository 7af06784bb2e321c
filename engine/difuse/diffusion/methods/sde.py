"""The reverse SDE in discrete steps, Song et al. 2021 (arXiv:2011.13456): predictor, and corrector by Langevin."""
from math import sqrt

from difuse.diffusion.method import NOISE, Nonlinear, Predict, steps_of


def _reverse(x, score, t, s):
    """The reverse of x_t = alpha_ts x_s + (noise of variance beta), equation 46: the mean, and the noise's std."""
    alpha_ts = t.alpha / s.alpha
    beta = t.sigma**2 - (alpha_ts * s.sigma) ** 2
    return (2 - alpha_ts) * x + beta * score, sqrt(beta)


def reverse_diffusion(x, path):
    """The reverse diffusion sampler, equation 46; the last step adds no noise."""
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        x, std = _reverse(x, m.score, t, s)
        if s.sigma > 0:
            x = x + std * (yield NOISE)
        yield x


def predictor_corrector(x, path, *, snr=0.16, corrections=1):
    """Reverse diffusion and then `corrections` steps of Langevin dynamics at each level (algorithm 1).

    A Langevin step is 2 (snr |z| / |score|)^2 alpha_ts^2 long. The norms are each sample's own, so that an image does
    not depend on its batch mates; score_sde averages them over the batch.
    """
    if not snr > 0 or corrections < 1:
        raise ValueError(f"predictor_corrector: snr is {snr}, corrections {corrections}; expected snr > 0 and at "
                         "least 1 correction")
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        x, std = _reverse(x, m.score, t, s)
        if s.sigma > 0:
            x = x + std * (yield NOISE)
            for _ in range(corrections):
                m = yield Predict(x, s)
                score = m.score
                x = yield Nonlinear(_Langevin(snr, (t.alpha / s.alpha) ** 2), x, score, (yield NOISE))
        yield x


class _Langevin:
    """x + e * score + sqrt(2 e) * z, e = 2 a (snr |z| / |score|)^2 of each sample."""

    def __init__(self, snr, a):
        self.snr, self.a = snr, a

    def __call__(self, x, score, z):
        over = tuple(range(1, x.dim()))
        step = 2 * self.a * (self.snr * z.square().sum(over, keepdim=True).sqrt()
                             / score.square().sum(over, keepdim=True).sqrt()) ** 2  # [B,1,1,1]
        return x + step * score + (2 * step).sqrt() * z
