"""DPM-Solver (Lu et al. 2022a, arXiv:2206.00927) and DPM-Solver++ (2022b, arXiv:2211.01095).

h is the step in lambda = ln(alpha / sigma). The papers' steps of order 1, with sigma_s (e^h - 1) eps and
alpha_s (1 - e^-h) x0, are `transfer` and `towards`, without logarithms, so that steps from pure noise (lambda = -inf)
and to the data (inf) are like any other.
"""
from dataclasses import replace
from math import exp, expm1, isfinite, sqrt

from difuse.diffusion.method import NOISE, Predict, steps_of
from difuse.diffusion.methods.euler import towards, transfer


def _between(process, t, s, r):
    """The node where a part r of the step in lambda is done."""
    return process.at(t.k * exp(-r * (s.lam - t.lam)))


def dpm_solver_2(x, path, *, process):
    """DPM-Solver-2, algorithm 1: the midpoint in lambda, two calls a step; order 1 from pure noise and to the data."""
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        if not isfinite(s.lam - t.lam):
            x = towards(x, m.x0, t, s)
        else:
            middle = _between(process, t, s, 1 / 2)
            u = transfer(x, m.eps, t, middle)
            m = yield Predict(u, middle)
            x = transfer(x, m.eps, t, s)
        yield x


def dpm_solver_3(x, path, *, process):
    """DPM-Solver-3, algorithm 2, r1 = 1/3 and r2 = 2/3: three calls a step; order 1 from pure noise and to the data."""
    r1, r2 = 1 / 3, 2 / 3
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        h = s.lam - t.lam
        if not isfinite(h):
            x = towards(x, m.x0, t, s)
        else:
            eps = m.eps
            s1, s2 = _between(process, t, s, r1), _between(process, t, s, r2)
            u1 = transfer(x, eps, t, s1)
            D1 = (yield Predict(u1, s1)).eps - eps
            u2 = transfer(x, eps, t, s2) - s2.sigma * r2 / r1 * (expm1(r2 * h) / (r2 * h) - 1) * D1
            D2 = (yield Predict(u2, s2)).eps - eps
            x = transfer(x, eps, t, s) - s.sigma / r2 * (expm1(h) / h - 1) * D2
        yield x


def dpm_solver_pp_2m(x, path, *, stochastic=False):
    """DPM-Solver++(2M), algorithm 2; the first step and the one to the data are of order 1.

    stochastic: SDE-DPM-Solver++(2M), of the same paper's appendix: noise in every step but the last.
    """
    before = None  # the node and the x0 of the step before
    for t, s in steps_of(path):
        x0 = (yield Predict(x, t)).x0
        h = s.lam - t.lam
        D = x0
        if before is not None and isfinite(h):
            r = (t.lam - before[0].lam) / h
            D = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before[1]
        if stochastic and s.sigma > 0:
            decay = s.sigma * t.alpha / (s.alpha * t.sigma)  # e^-h
            x = (s.sigma / t.sigma * decay * x + s.alpha * (1 - decay**2) * D
                 + s.sigma * sqrt(1 - decay**2) * (yield NOISE))
        else:
            x = towards(x, D, t, s)
        before = t, x0
        yield x


def dpm_solver_pp_2m_sde(x, path):
    """SDE-DPM-Solver++(2M): `dpm_solver_pp_2m` on the reverse SDE."""
    return dpm_solver_pp_2m(x, path, stochastic=True)


def dpm_solver_pp_3m(x, path):
    """The multistep DPM-Solver++ of order 3: two steps back, of lower order until there are any and to the data.

    With x0 = m + D1 u + D2 u^2, u from 0 to 1 along the step. The authors' code and diffusers weigh D2 half as much,
    which leaves a method of order 2.
    """
    before = []  # (node, x0) of the two steps before, the last first
    for t, s in steps_of(path):
        x0 = (yield Predict(x, t)).x0
        h = s.lam - t.lam
        x = towards(x, x0, t, s)
        if before and isfinite(h):
            h0 = t.lam - before[0][0].lam
            r0 = h0 / h
            slope = (x0 - before[0][1]) / r0  # D1_0
            if len(before) == 1 or not isfinite(before[0][0].lam - before[1][0].lam):
                x = x - s.alpha * expm1(-h) / 2 * slope
            else:
                r1 = (before[0][0].lam - before[1][0].lam) / h
                behind = (before[0][1] - before[1][1]) / r1  # D1_1
                D1 = slope + r0 / (r0 + r1) * (slope - behind)
                D2 = (slope - behind) / (r0 + r1)
                x = x + s.alpha * (expm1(-h) / h + 1) * D1 + s.alpha * (1 - 2 * (expm1(-h) + h) / h**2) * D2
        before = [(t, x0), *before[:1]]
        yield x


def dpm_solver_pp_sde(x, path, *, process, eta=1.0, s_noise=1.0):
    """DPM-Solver++ on the reverse SDE with a midpoint in lambda, two calls a step, as k-diffusion has it.

    The noise of the whole step contains that of its first half, as on one Brownian path over k.
    """
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        if not isfinite(s.lam - t.lam):
            x = towards(x, m.x0, t, s)
        else:
            middle = _between(process, t, s, 1 / 2)
            half = yield NOISE
            down, up = _ancestral(t, middle, eta)
            u = towards(x, m.x0, t, down) + middle.alpha * up * s_noise * half
            x0 = (yield Predict(u, middle)).x0
            share = (t.k - middle.k) / (t.k - s.k)
            z = sqrt(share) * half + sqrt(1 - share) * (yield NOISE)
            down, up = _ancestral(t, s, eta)
            x = towards(x, x0, t, down) + s.alpha * up * s_noise * z
        yield x


def _ancestral(t, s, eta):
    """A node below s, and how much noise, in units of the signal, leads from it up to s."""
    up = min(s.k, eta * s.k * sqrt(1 - (s.k / t.k) ** 2))
    return replace(s, sigma=s.alpha * sqrt(s.k**2 - up**2)), up
