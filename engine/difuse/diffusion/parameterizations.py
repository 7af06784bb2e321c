"""What a network predicts at x_t = alpha * x0 + sigma * noise. Salimans & Ho 2022 (arXiv:2202.00512), appendix D.

Every prediction is a fixed mix p * x0 + q * noise:

    eps    noise                       x0    x0
    v      alpha*noise - sigma*x0      flow  noise - x0, the velocity of the straight path
    score  -noise / sigma, the gradient of ln p(x_t)
    edm    F of Karras et al. 2022 (arXiv:2206.00364), x0 = c_skip x + c_out F, for data of standard deviation 0.5

Two mixes, x_t and the prediction, determine x0 and noise, and with them every other prediction, as long as
alpha*q - sigma*p is not zero. So each conversion is one linear map of (x_t, prediction), exact in real numbers.
"""
import torch

DATA_STD = 0.5  # sigma_data of "edm"


def _edm(alpha, sigma):
    # F = (x0 - c_skip x) / c_out with c_skip = d^2 / (k^2 + d^2), c_out = k d / sqrt(k^2 + d^2), x = x0 + k * noise
    k, d = sigma / alpha, DATA_STD
    norm = (k**2 + d**2).sqrt()
    return k / (d * norm), -d / norm


PREDICTIONS = {  # prediction -> (p, q)
    "eps": lambda alpha, sigma: (torch.zeros_like(alpha), torch.ones_like(alpha)),
    "x0": lambda alpha, sigma: (torch.ones_like(alpha), torch.zeros_like(alpha)),
    "v": lambda alpha, sigma: (-sigma, alpha),
    "flow": lambda alpha, sigma: (-torch.ones_like(alpha), torch.ones_like(alpha)),
    "score": lambda alpha, sigma: (torch.zeros_like(alpha), -1 / sigma),
    "edm": _edm,
}


def _mix(prediction, alpha, sigma):
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction {prediction!r} is unknown; expected one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[prediction](alpha, sigma)


def _like(value, x):
    """value: number, [] or [B] -> x's dtype, shaped to meet x [B,...]."""
    value = torch.as_tensor(value, dtype=torch.float64, device=x.device).to(x.dtype)
    return value.reshape(value.shape + (1,) * (x.dim() - 1)) if value.dim() else value


def coefficients(source, target, alpha, sigma):
    """(c_x, c_m) with target = c_x * x_t + c_m * prediction, for a network that predicts `source`.

    alpha, sigma: numbers or float64 tensors of one shape; so are the results. Raises ValueError for an unknown
    prediction, or where `source` does not determine `target` (eps at alpha = 0, x0 at sigma = 0).
    """
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    p, q = _mix(source, alpha, sigma)
    p_target, q_target = _mix(target, alpha, sigma)
    if source == target:
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    determinant = alpha * q - sigma * p
    if determinant.device.type == "cpu" and (determinant == 0).any():
        raise ValueError(f"a network that predicts {source} says nothing about {target} where "
                         f"{'alpha' if source in ('eps', 'score') else 'sigma'} is 0; use another prediction, or stop "
                         "short of it")
    # x0 = (q*x_t - sigma*m) / determinant, noise = (alpha*m - p*x_t) / determinant
    return (p_target * q - q_target * p) / determinant, (q_target * alpha - p_target * sigma) / determinant


def diffuse(x0, noise, alpha, sigma):
    """x_t = alpha * x0 + sigma * noise. x0, noise [B,...] of one dtype; alpha, sigma numbers or [B].

    One step of DDPM's chain keeps sqrt(1 - beta) of x and adds sqrt(beta) of noise:

    >>> x, beta, eps = torch.tensor(0.8), 0.1, torch.tensor(-0.3)
    >>> round(diffuse(x, eps, (1 - beta) ** 0.5, beta**0.5).item(), 3)
    0.664
    >>> x, beta, eps = torch.tensor(0.5), 0.04, torch.tensor(1.5)
    >>> round(diffuse(x, eps, (1 - beta) ** 0.5, beta**0.5).item(), 3)
    0.79
    """
    return _like(alpha, x0) * x0 + _like(sigma, x0) * noise


def target(prediction, x0, noise, alpha, sigma):
    """What a network that predicts `prediction` should say. x0, noise [B,...]; alpha, sigma numbers or [B]."""
    alpha, sigma = (torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))
    p, q = _mix(prediction, alpha, sigma)
    return _like(p, x0) * x0 + _like(q, x0) * noise


def convert(value, x_t, alpha, sigma, *, source, target):
    """Turn a prediction `value` [B,...] of kind `source` at x_t into one of kind `target`. Errors: `coefficients`."""
    c_x, c_m = coefficients(source, target, alpha, sigma)
    return _like(c_x, x_t) * x_t + _like(c_m, x_t) * value
