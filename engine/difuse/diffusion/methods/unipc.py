"""UniPC (Zhao et al. 2023, arXiv:2302.04867), predicting the data: a predictor and a corrector of one call a step."""
from math import expm1, factorial, isfinite

import numpy as np

from difuse.diffusion.method import Predict, steps_of
from difuse.diffusion.methods.euler import towards


def unipc(x, path, *, order=2, variant="bh2"):
    """UniPC of order 1 to 3 with B(h) = h ("bh1") or e^h - 1 ("bh2"); the first and last steps are of lower order.

    Each call's prediction also corrects the step that led there (algorithm 1), so that the order is one more.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"unipc: order is {order!r}; expected 1, 2 or 3")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: variant is {variant!r}; expected 'bh1' or 'bh2'")
    known = []  # (node, x0), the last first
    correct = 0  # the order of the step before, if it can be corrected
    for i, (t, s) in enumerate(steps_of(path)):
        x0 = (yield Predict(x, t)).x0
        if correct:  # what the corrector's step would have added to the predictor's, so that a changed state stays so
            used, start = known[:correct], known[0][0]
            x = _add(_add(x, start, t, used, variant, x0), start, t, used, variant, sign=-1)
        known = [(t, x0), *known[: order - 1]]
        p = min(order, len(known), len(path) - 1 - i)
        while p > 1 and not isfinite(known[p - 1][0].lam):
            p -= 1
        correct = p if isfinite(s.lam - t.lam) else 0
        x = _add(towards(x, x0, t, s), t, s, known[:p], variant)
        yield x


def _add(result, t, s, known, variant, ahead=None, sign=1):
    """What x0 changes along the step from t to s, by those of `known`, the last first, and the one at s, `ahead`."""
    if len(known) == 1 and ahead is None:
        return result
    x0, h = known[0][1], s.lam - t.lam
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
        result = result - sign * s.alpha * B * rho_k * D_k
    return result


def _phi(k, z):
    """h phi_{k+1}: phi_1 z = e^z - 1, phi_{k+1} = (phi_k - 1/k!) / z, times z."""
    value = expm1(z)
    for j in range(1, k + 1):
        value = value / z - 1 / factorial(j)
    return value
