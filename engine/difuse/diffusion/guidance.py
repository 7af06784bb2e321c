"""Classifier-free guidance, Ho & Salimans 2022 (arXiv:2207.12598), as columns of a linear map.

    m = w * m_cond + (1 - w) * m_null        w = guidance; w = 1 is the conditional model alone

The model runs once on 2B rows, the conditional half first. Its two halves stay views of one tensor, and w and 1 - w go
into the coefficients of the sampler's update, so the mix is never written to memory and only B rows are stepped.
"""
import math

import torch


class GuidedModel:
    """Calls model(x, t, labels), or model(x, t) without labels, on rows for each of `weights`, (1,) or (w, 1 - w)."""

    def __init__(self, sampler, model, labels, guidance, noise):
        self.sampler, self.model, self.channels = sampler, model, noise.shape[1]
        if not math.isfinite(guidance):
            raise ValueError(f"{sampler}: guidance is {guidance}; expected a finite number")
        self.weights = (1.0,) if guidance == 1 else (guidance, 1 - guidance)
        self.labels = None if labels is None else self._check_labels(labels, len(noise)).to(noise.device)  # [B]
        if guidance != 1:
            if labels is None:
                raise ValueError(f"{sampler}: guidance {guidance} needs labels; give labels [B], or guidance=1")
            num_classes = getattr(model, "num_classes", None)
            if num_classes is None:
                raise ValueError(f"{sampler}: guidance {guidance} needs a null class, and {type(model).__name__} has "
                                 "no attribute num_classes to name it; set it, or use guidance=1")
            self.labels = torch.cat((self.labels, torch.full_like(self.labels, num_classes)))  # [2B]

    def _check_labels(self, labels, batch):
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64:
            got = labels.dtype if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise TypeError(f"{self.sampler}: labels are {got}; expected an int64 tensor, e.g. torch.tensor([3, 7])")
        if labels.shape != (batch,):
            raise ValueError(f"{self.sampler}: labels have shape {tuple(labels.shape)}; expected ({batch},), one per "
                             "sample of noise")
        return labels

    def __call__(self, x, t, labels):
        """x [B,C,...], t [], labels as in `self.labels` -> one output per weight, views [B,C,...].

        Channels past C, a learned sigma, stay out.
        """
        rows = x if len(self.weights) == 1 else torch.cat((x, x))  # [B or 2B,C,...]
        t = t.expand(len(rows))
        out = self.model(rows, t) if labels is None else self.model(rows, t, labels)
        expected = [(len(rows), channels, *x.shape[2:]) for channels in (self.channels, 2 * self.channels)]
        if tuple(out.shape) not in expected:
            raise ValueError(f"{self.sampler}: the model returned shape {tuple(out.shape)}; expected {expected[0]}, or "
                             f"{expected[1]} with a learned sigma")
        return out[:, : self.channels].chunk(len(self.weights))  # each [B,C,...]
