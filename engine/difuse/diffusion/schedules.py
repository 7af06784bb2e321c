"""Noise schedules of discrete processes: beta_t in float64, one per step."""
import math

import torch


def linear_betas(num_steps):
    """beta from 1e-4 to 0.02, scaled by 1000 / num_steps so that the last step is noise for any num_steps."""
    if num_steps <= 20:
        raise ValueError(f"VP: the linear schedule needs num_steps > 20, got {num_steps}: its last beta, "
                         "20 / num_steps, must stay below 1. Take more steps, or schedule='cosine'")
    return torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64) * (1000 / num_steps)


def scaled_linear_betas(num_steps):
    """sqrt(beta) linear from sqrt(0.00085) to sqrt(0.012), scaled like `linear_betas`: latent diffusion's."""
    if num_steps <= 12:
        raise ValueError(f"VP: the scaled_linear schedule needs num_steps > 12, got {num_steps}: its last beta, "
                         "12 / num_steps, must stay below 1. Take more steps, or schedule='cosine'")
    return torch.linspace(0.00085**0.5, 0.012**0.5, num_steps, dtype=torch.float64) ** 2 * (1000 / num_steps)


def cosine_betas(num_steps):
    """alpha_bar(u) = cos^2((u + 0.008) / 1.008 * pi/2), beta at most 0.999 (Nichol & Dhariwal, arXiv:2102.09672)."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    alpha_bar = ((u + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def sigmoid_betas(num_steps):
    """alpha_bar a sigmoid from -3 to 3, turned and scaled to go from 1 to 0 (Jabri et al. 2022, arXiv:2212.11972)."""
    u = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    start, end = (torch.tensor(v, dtype=torch.float64).sigmoid() for v in (-3.0, 3.0))
    alpha_bar = (end - (6 * u - 3).sigmoid()) / (end - start)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


SCHEDULES = {"linear": linear_betas, "scaled_linear": scaled_linear_betas, "cosine": cosine_betas,
             "sigmoid": sigmoid_betas}


def zero_terminal_snr(alpha):
    """(alpha, sigma) [T] shifted and scaled so that the last alpha is 0 and the first stays (arXiv:2305.08891)."""
    alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return alpha, (1 - alpha**2).sqrt()
