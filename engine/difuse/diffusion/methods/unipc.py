"""UniPC (Zhao et al. 2023, arXiv:2302.04867), predicting the data: a predictor and a corrector of one call a step."""
from math import expm1, factorial, isfinite

import numpy as np

from difuse.diffusion.method import Predict, steps_of


def unipc(x, path, *, order=2, variant="bh2"):
    """UniPC of order 1 to 3 with B(h) = h ("bh1") or e^h - 1 ("bh2"); the first and last steps are of lower order.

    Each call's prediction also corrects the step that led there (algorithm 1), so that the order is one more.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"unipc: order is {order!r}; expected 1, 2 or 3")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: variant is {variant!r}; expected 'bh1' or 'bh2'")
    known = []  # (node, x0), the last first
    correct = None  # what to correct with: (state before the step, its nodes, p)
    for i, (t, s) in enumerate(steps_of(path)):
        x0 = (yield Predict(x, t)).x0
        if correct is not None:
            x = _step(*correct[:2], t, known[: correct[2]], variant, x0)
        known = [(t, x0), *known[: order - 1]]
        p = min(order, len(known), len(path) - 1 - i)
        while p > 1 and not isfinite(known[p - 1][0].lam):
            p -= 1
        correct = (x, t, p) if isfinite(s.lam - t.lam) else None
        x = _step(x, t, s, known[:p], variant)
        yield x


def _step(x, t, s, known, variant, ahead=None):
    """From t to s with the x0 of `known`, the last first; with the x0 at s, `ahead`, too: the corrector."""
    x0 = known[0][1]
    result = s.sigma / t.sigma * x + (s.alpha - s.sigma * t.alpha / t.sigma) * x0
    if len(known) == 1 and ahead is None:
        return result
    h = s.lam - t.lam
    r = [(node.lam - t.lam) / h for node, _ in known[1:]] + ([1.0] if ahead is not None else [])
    D = [(other - x0) / r_k for (_, other), r_k in zip(known[1:], r, strict=False)]
    if ahead is not None:
        D.append(ahead - x0)
    B = -h if variant == "bh1" else expm1(-h)
    if len(r) == 1:  # the paper's choice, which makes nothing to solve
        rho = [0.5]
    else:
        rho = np.linalg.solve([[r_k**k for r_k in r] for k in range(len(r))],
                              [_phi(k + 1, -h) * factorial(k + 1) / B for k in range(len(r))])
    for rho_k, D_k in zip(rho, D, strict=True):
        result = result - s.alpha * B * rho_k * D_k
    return result


def _phi(k, z):
    """h phi_{k+1}: phi_1 z = e^z - 1, phi_{k+1} = (phi_k - 1/k!) / z, times z."""
    value = expm1(z)
    for j in range(1, k + 1):
        value = value / z - 1 / factorial(j)
    return value
