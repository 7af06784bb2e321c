"""What `clip` of a sampler makes of each predicted x0: bounds that the data is known to keep, for models of pixels."""
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Clamp:
    """x0 from -bound to bound (Ho et al. 2020), and eps what then remains of x.

    diffusers' `clip_sample`; its DDIMScheduler keeps the eps of before, unless asked to `use_clipped_model_output`.
    """

    bound: float = 1.0

    def __post_init__(self):
        _check("Clamp: bound", self.bound, math.inf)

    def __call__(self, x0):
        return _wide(x0).clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding, Saharia et al. 2022 (arXiv:2205.11487): x0 clamped to [-s, s] and divided by s.

    s is the `ratio` quantile of a sample's |x0|, at least 1 and at most `most`.
    """

    ratio: float = 0.995
    most: float = 1.0

    def __post_init__(self):
        _check("Threshold: ratio", self.ratio, 1.0)
        _check("Threshold: most", self.most, math.inf)
        if self.most < 1:
            raise ValueError(f"Threshold: most is {self.most}; expected 1 or more")

    def __call__(self, x0):
        x0 = _wide(x0)
        sizes, _ = x0.abs().flatten(1).sort(1)  # torch.quantile takes 16 million numbers at most
        place = self.ratio * (sizes.shape[1] - 1)
        below = int(place)
        pair = sizes[:, below : below + 2]
        s = torch.lerp(pair[:, 0], pair[:, -1], place - below).clamp(1, self.most)  # [B]
        s = s.reshape(-1, *(1,) * (x0.dim() - 1))
        return torch.minimum(torch.maximum(x0, -s), s) / s


def clipping(clip):
    """The function that `clip` stands for: None, a bound, `Clamp` or `Threshold`."""
    if clip is None or isinstance(clip, (Clamp, Threshold)):
        return clip
    return Clamp(clip)


def _wide(x0):
    """x0 in float32 at least: a network's own prediction of it has the network's dtype."""
    return x0.to(torch.promote_types(x0.dtype, torch.float32))


def _check(name, value, most):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most or math.isinf(value):
        raise ValueError(f"{name} is {value!r}; expected a number above 0" + (f", at most {most}" * (most < math.inf)))
