"""The Frechet distance between two sets of vectors, each taken as Gaussian (Heusel et al. 2017, arXiv:1706.08500)."""
import torch


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances, computed in float64.

    a [N,...], b [M,...] are samples (tensors or arrays, any real dtype), flattened to [N,D] and [M,D]; N, M >= 2.
    The distance has the unit of the samples squared, and it shrinks with N and M until both are well above D: compare
    only distances measured with the same counts.
    Raises ValueError where the shapes do not fit, there is one sample only, or a value is not finite.
    """
    mean_a, cov_a = _gaussian("a", a)
    mean_b, cov_b = _gaussian("b", b)
    if len(mean_a) != len(mean_b):
        raise ValueError(f"frechet_distance: a has {len(mean_a)} numbers per sample, b has {len(mean_b)}; "
                         "compare samples of one shape")
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), and the right side is symmetric: eigenvalues stay real
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T                             # [D,D]
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(distance.item(), 0.0)  # rounding may leave a few ulps below zero for equal sets


def _gaussian(name, samples):
    samples = torch.as_tensor(samples).detach().to("cpu", torch.float64)
    if samples.ndim < 2 or len(samples) < 2:
        raise ValueError(f"frechet_distance: {name} has shape {tuple(samples.shape)}; expected [N,...] with N >= 2")
    samples = samples.flatten(1)                                                          # [N,D]
    if not samples.isfinite().all():
        raise ValueError(f"frechet_distance: {name} holds NaN or infinity; the samples are broken")
    return samples.mean(0), torch.cov(samples.T).reshape(samples.shape[1], -1)
