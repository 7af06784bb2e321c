"""The reverse SDE in discrete steps, Song et al. 2021 (arXiv:2011.13456): predictor, and corrector by Langevin."""
from dataclasses import dataclass
from math import sqrt

from difuse.diffusion.method import NOISE, Predict, Weights, steps_of


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
                alpha_ts = t.alpha / s.alpha
                e_score, root_z = yield Weights(_Langevin(snr), m.score, (yield NOISE))
                x = x + alpha_ts**2 * e_score + alpha_ts * root_z
        yield x


@dataclass(frozen=True)
class _Langevin:
    """The weights e and sqrt(2 e) of the score and z, e = 2 (snr |z| / |score|)^2 of each sample."""

    snr: float

    def __call__(self, G):
        score, z = G[:, 1, 1], G[:, 2, 2]
        e = 2 * self.snr**2 * z / (score + (score == 0)) * (score > 0)  # [B]; a score of zeros moves nothing
        return e, (2 * e) ** 0.5
