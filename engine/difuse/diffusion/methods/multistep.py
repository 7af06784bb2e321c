"""Linear multistep methods on eps: PNDM and DEIS."""
import numpy as np

from difuse.diffusion.method import Predict, steps_of
from difuse.diffusion.methods.euler import transfer


def pndm(x, path, *, process):
    """Pseudo numerical methods, Liu et al. 2022 (arXiv:2202.09778), algorithm 2.

    Three steps of pseudo Runge-Kutta, four calls each, its middle in k; then the linear multistep method's, one call
    each, of order 2 where the steps are not equal.
    """
    past = []  # eps of the last three steps, the last first
    for t, s in steps_of(path):
        eps = (yield Predict(x, t)).eps
        if s.sigma == 0:
            x = transfer(x, _adams(eps, past), t, s)
        elif len(past) < 3:
            middle = process.at((t.k + s.k) / 2)
            e2 = (yield Predict(transfer(x, eps, t, middle), middle)).eps
            total = eps + 2 * e2
            e3 = (yield Predict(transfer(x, e2, t, middle), middle)).eps
            total = total + 2 * e3
            e4 = (yield Predict(transfer(x, e3, t, s), s)).eps
            x = transfer(x, (total + e4) / 6, t, s)
        else:
            x = transfer(x, _adams(eps, past), t, s)
        past = [eps, *past[:2]]
        yield x


def _adams(eps, past):
    """Adams and Bashforth's sum for equal steps, of as many terms as there are."""
    weights = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]][len(past)]
    total = weights[0] * eps
    for weight, old in zip(weights[1:], past, strict=True):
        total = total + weight * old
    return total


def deis(x, path, *, order=3):
    """DEIS, Zhang & Chen 2023 (arXiv:2204.13902), tAB of order 1 to 4 in ln(k).

    eps is a polynomial of ln(k) through the last `order` values, whose integral over k is exact.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"deis: order is {order!r}; expected 1, 2, 3 or 4")
    known = []  # (node, eps), the last first
    for t, s in steps_of(path):
        known = [(t, (yield Predict(x, t)).eps), *known[: order - 1]]
        used = known if s.sigma > 0 else known[:1]
        weights = _weights([node.k for node, _ in used], t.k, s.k)
        x = s.alpha / t.alpha * x
        for weight, (_, eps) in zip(weights, used, strict=True):
            x = x + s.alpha * weight * eps
        yield x


def _weights(knots, start, end):
    """The integral over k from start to end of each Lagrange polynomial of ln(k) through the knots."""
    if len(knots) == 1:
        return [end - start]
    u = np.log(np.array(knots) / start)  # relative to the start, for small numbers
    width = np.log(end / start)
    nodes, shares = np.polynomial.legendre.leggauss(12)  # exact to rounding: a polynomial times e^u over a short way
    at = width * (nodes + 1) / 2
    dk = start * np.exp(at) * shares * width / 2
    weights = []
    for j in range(len(u)):
        others = [m for m in range(len(u)) if m != j]
        weights.append(float((np.prod([(at - u[m]) / (u[j] - u[m]) for m in others], axis=0) * dk).sum()))
    return weights
