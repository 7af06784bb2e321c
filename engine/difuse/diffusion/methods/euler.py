"""Euler's and Heun's methods: on the noise level of Karras et al. 2022 (arXiv:2206.00364), and on the straight path.

In units where the signal has weight 1, x / alpha = x0 + k * noise, the ODE is d(x/alpha) = eps dk.
"""
from dataclasses import replace
from math import inf, sqrt

from difuse.diffusion.method import NOISE, Predict, steps_of


def towards(x, x0, t, s):
    """From node t to node s with x0 held: Euler's step in k, DDIM's, DPM-Solver++ of order 1. No division by alpha."""
    return s.sigma / t.sigma * x + (s.alpha - s.sigma * t.alpha / t.sigma) * x0


def transfer(x, eps, t, s):
    """From node t to node s with eps held: DDIM's step, DPM-Solver's of order 1, equation 11 of PNDM."""
    return s.alpha / t.alpha * x + (s.sigma - s.alpha * t.sigma / t.alpha) * eps


def _churned(x, t, path, process, s_churn, s_tmin, s_tmax, s_noise):
    """Noise added to go back to k * (1 + gamma), lines 4 to 6 of algorithm 2: the state and the node there."""
    gamma = min(s_churn / (len(path) - 1), sqrt(2) - 1)
    if gamma <= 0 or t.k == inf or not s_tmin <= t.k <= s_tmax:
        return x, t
    back = process.at(t.k * (1 + gamma))
    z = yield NOISE
    return back.alpha * (x / t.alpha + s_noise * sqrt(back.k**2 - t.k**2) * z), back


def euler(x, path, *, process, s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0):
    """Euler's method in k; s_churn > 0 adds noise before each step between k = s_tmin and s_tmax (algorithm 2)."""
    for t, s in steps_of(path):
        x, t = yield from _churned(x, t, path, process, s_churn, s_tmin, s_tmax, s_noise)
        m = yield Predict(x, t)
        x = towards(x, m.x0, t, s)
        yield x


def euler_ancestral(x, path, *, eta=1.0, s_noise=1.0):
    """Euler's method to below s, then noise up to it, as k-diffusion has it; eta = 0 is euler."""
    if not 0 <= eta <= 1:
        raise ValueError(f"euler_ancestral: eta is {eta}; expected 0 (deterministic) to 1")
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        up = min(s.k, eta * s.k * sqrt(max(1 - (s.k / t.k) ** 2, 0.0)))
        x = towards(x, m.x0, t, replace(s, sigma=s.alpha * sqrt(s.k**2 - up**2)))
        if up > 0:
            x = x + s.alpha * up * s_noise * (yield NOISE)
        yield x


def heun(x, path, *, process, s_churn=0.0, s_tmin=0.0, s_tmax=inf, s_noise=1.0):
    """Heun's method in k, two calls a step and one in the last: algorithm 2 of Karras et al. 2022, with its churn."""
    for t, s in steps_of(path):
        x, t = yield from _churned(x, t, path, process, s_churn, s_tmin, s_tmax, s_noise)
        m = yield Predict(x, t)
        ahead = towards(x, m.x0, t, s)
        if s.sigma > 0:
            slope, rest = m.eps, x / t.alpha
            m = yield Predict(ahead, s)
            ahead = s.alpha * (rest + (s.k - t.k) / 2 * (slope + m.eps))
        x = ahead
        yield x


def flow_euler(x, path):
    """Euler's method on dx/dt = noise - x0 from t = 1 to t = 0 (rectified flow, arXiv:2209.03003)."""
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        x = x + (s.sigma - t.sigma) * m.flow
        yield x


def flow_heun(x, path):
    """Heun's method on dx/dt = noise - x0, two calls a step and one in the last."""
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        ahead = x + (s.sigma - t.sigma) * m.flow
        if s.sigma > 0:
            slope = m.flow
            m = yield Predict(ahead, s)
            ahead = x + (s.sigma - t.sigma) / 2 * (slope + m.flow)
        x = ahead
        yield x


def flow_stochastic(x, path):
    """The data predicted and noised again at each step: for networks distilled to few steps of the straight path."""
    for t, s in steps_of(path):
        m = yield Predict(x, t)
        x = s.alpha * m.x0
        if s.sigma > 0:
            x = x + s.sigma * (yield NOISE)
        yield x
