"""Guidance: what the model is asked for at a step, and how its answers make one prediction.

    m = w * m_cond + (1 - w) * m_null        classifier-free, Ho & Salimans 2022 (arXiv:2207.12598); w = 1 is m_cond

Everything that is a weighted sum of answers goes into the coefficients of the sampler's update, so the mix is never
written to memory: the plain rule, an interval of steps, layers left out (skip-layer guidance), a weaker model (auto-
guidance). What needs a norm or an inner product of whole samples first is `Apply`, an operation of its own.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from difuse.diffusion.grids import part_of
from difuse.diffusion.parameterizations import coefficients
from difuse.diffusion.program import Apply
from difuse.models.layers import DiTBlock


@dataclass(frozen=True)
class Guidance:
    """How strongly, and by which rule.

    scale: w above. interval: the part of the steps, from 0 to 1, in which w holds; elsewhere it is 1, and one row
    less is computed (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    rescale: 0 to 1, how far the result gets the conditional answer's standard deviation (arXiv:2305.08891).
    zero_star: the null answer is scaled to lie closest to the conditional one, and the prediction is 0, on the straight
    path no step, in the first `zero_steps` steps (CFG-Zero*, arXiv:2503.18886).
    per_token: the result gets the conditional answer's norm at every place, over channels (Qwen-Image). apg: an `APG`.
    skip, skip_scale: a model without some of its layers, `skip_layers(model, [7, 8])`, and s in
    m + s * (m_cond - m_skip) (SD3.5). weak: a weaker model in the null answer's place (auto-guidance,
    arXiv:2406.02507).
    classifier, classifier_scale: function(x, t, labels) -> log p(labels | x) [B], whose gradient times this scale is
    added to the score (Dhariwal & Nichol 2021, arXiv:2105.05233).
    passes: 1, conditional and null rows in one call of the model, or 2, a call each: half the memory.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    zero_star: bool = False
    zero_steps: int = 0
    per_token: bool = False
    apg: "APG | None" = None
    skip: Callable | None = None
    skip_scale: float = 0.0
    weak: Callable | None = None
    classifier: Callable | None = None
    classifier_scale: float = 1.0
    passes: int = 1

    def __post_init__(self):
        for name in ("scale", "rescale", "skip_scale", "classifier_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"guidance {name} is {value!r}; expected a finite number" if name != "scale" else
                                 f"guidance is {value!r}; expected a finite number")
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"guidance interval is {self.interval}; expected parts of the steps, 0 <= from < to <= 1")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance rescale is {self.rescale}; expected 0 to 1")
        if self.passes not in (1, 2):
            raise ValueError(f"guidance passes is {self.passes!r}; expected 1, both halves in one call, or 2")
        rules = [name for name in ("zero_star", "per_token", "apg") if getattr(self, name)]
        if len(rules) + (self.rescale > 0) > 1:
            raise ValueError(f"guidance has {', '.join([*rules, *(['rescale'] * (self.rescale > 0))])}; expected one "
                             "rule at a time")
        if (rules or self.rescale) and (self.scale == 1 or self.skip or self.weak):
            raise ValueError("guidance rescale, zero_star, per_token and apg change how a conditional and a null "
                             "answer are mixed; expected scale != 1 and neither skip nor weak")
        if self.weak is not None and self.scale == 1:
            raise ValueError("guidance weak is asked for nothing at scale 1; expected a scale above 1")
        if self.zero_steps and not self.zero_star:
            raise ValueError(f"guidance zero_steps is {self.zero_steps} without zero_star; expected both or neither")
        if (self.skip is None) != (self.skip_scale == 0):
            raise ValueError("guidance: skip and skip_scale go together; give skip_layers(model, layers) and a scale")

    @property
    def needs_null(self):
        """Whether the null class is asked for at any step."""
        return self.scale != 1 and self.weak is None

    def sources(self, step, steps):
        """What the model is asked for: of "cond", "null", "skip", "weak"."""
        low, high = self.interval
        if not part_of(low, steps) <= step < part_of(high, steps):
            return ("cond",)
        other = () if self.scale == 1 else ("null",) if self.weak is None else ("weak",)
        return ("cond", *other, *(("skip",) if self.skip else ()))

    def mixed(self, recorder, outputs, x, node, prediction, step, steps, memory):
        """One prediction of the answers `outputs` to `sources(step, steps)`; x is what the model was given.

        memory: a dict of the trajectory's own, with its "labels".
        """
        answers = dict(zip(self.sources(step, steps), outputs, strict=True))
        cond = answers["cond"]
        other = answers.get("null", answers.get("weak"))
        m = cond if other is None else self.scale * cond + (1 - self.scale) * other
        rule = self._rule(step)
        if other is not None and self.apg:
            difference = cond - other
            if self.apg.momentum and "difference" in memory:
                difference = difference + self.apg.momentum * memory["difference"]
            change, = recorder.add(Apply, difference, cond, function=self.apg)
            m, memory["difference"] = cond + (self.scale - 1) * change, difference
        elif other is not None and rule is not None:
            m, = recorder.add(Apply, cond, other, function=rule)
        if "skip" in answers:
            m = m + self.skip_scale * (cond - answers["skip"])
        if self.classifier is not None:
            if node.alpha == 0:
                raise ValueError("a classifier guides only where there is some signal, alpha > 0; expected another "
                                 "spacing, e.g. 'log_snr'")
            gradient, = recorder.add(Apply, x, function=ClassifierGradient(self.classifier, node.time,
                                                                          memory["labels"]))
            c = coefficients("score", prediction, node.alpha, node.sigma)[1]  # of the score, the state being given
            m = m + (self.classifier_scale * node.scale * c) * gradient
        return m

    def _rule(self, step):
        if self.rescale:
            return Rescaled(self.scale, self.rescale)
        if self.zero_star:
            return ZeroStar(0.0 if step < self.zero_steps else 1.0, self.scale)
        return PerToken(self.scale) if self.per_token else None


def _inner(a, b):
    """The inner product of each sample [B,1,...], in float64."""
    over = tuple(range(1, a.dim()))
    return (a.double() * b.double()).sum(over, keepdim=True)


@dataclass(frozen=True)
class Rescaled:
    """m * (phi * std(cond) / std(m) + 1 - phi), m being the plain mix; standard deviations of whole samples."""

    w: float
    phi: float

    def __call__(self, cond, null):
        m = torch.lerp(null.float(), cond.float(), self.w)
        over = tuple(range(1, m.dim()))
        ratio = cond.float().std(over, keepdim=True) / m.std(over, keepdim=True)
        return m * (self.phi * ratio + 1 - self.phi)


@dataclass(frozen=True)
class ZeroStar:
    """(1 - w) * a * null + w * cond, a = <cond, null> / |null|^2; times `on`, 0 in the first steps."""

    on: float
    w: float

    def __call__(self, cond, null):
        a = (_inner(cond, null) / (_inner(null, null) + 1e-8)).float()
        return self.on * ((1 - self.w) * a * null.float() + self.w * cond.float())


@dataclass(frozen=True)
class PerToken:
    """The plain mix with the conditional answer's norm over channels at every place."""

    w: float

    def __call__(self, cond, null):
        m = torch.lerp(null.float(), cond.float(), self.w)
        return m * (cond.float().norm(dim=1, keepdim=True) / m.norm(dim=1, keepdim=True))


@dataclass(frozen=True)
class APG:
    """Adaptive projected guidance, Sadat et al. 2024 (arXiv:2410.02416).

    The difference of the answers, no longer than `threshold` (0: any length), loses the part along the conditional
    answer but for `eta` of it. `momentum` adds that times the running difference of the steps before; it is kept per
    trajectory.
    """

    eta: float = 0.0
    threshold: float = 0.0
    momentum: float = 0.0

    def __call__(self, difference, cond):
        """What is left of the difference of the answers."""
        if self.threshold > 0:
            length = _inner(difference, difference).sqrt()
            difference = difference * (self.threshold / length).clamp(max=1).float()
        along = (_inner(difference, cond) / _inner(cond, cond)).float() * cond.float()
        return difference - (1 - self.eta) * along


@dataclass(frozen=True)
class ClassifierGradient:
    """The gradient of a classifier's log p(labels | x) with respect to x."""

    classifier: Callable
    time: float
    labels: torch.Tensor | None

    def __call__(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            t = torch.full((len(x),), self.time, dtype=torch.float32, device=x.device)
            return torch.autograd.grad(self.classifier(x, t, self.labels).sum(), x)[0]


def _same(x, *args, **kwargs):
    return x


def _same_stream(x, branch, gate, c):
    return x, branch, gate  # of difuse's block, which leaves its last branch to the next


class skip_layers(nn.Module):  # called like a function
    """`model` without some of its `blocks`: the same weights, for `Guidance(skip=...)`.

    For models whose blocks, `blocks` or `transformer_blocks`, turn one stream of tokens into another: difuse's and
    facebookresearch's DiT, diffusers' DiT and PixArt. Raises ValueError for others and for layers that are not there.
    """

    def __init__(self, model, layers):
        super().__init__()
        blocks = getattr(model, "blocks", None) or getattr(model, "transformer_blocks", None)
        if blocks is None or any("encoder" in name for block in blocks for name in vars(block)):
            raise ValueError(f"skip_layers: {type(model).__name__} has no blocks of one stream of tokens")
        layers = sorted(set(layers))
        if not layers or not 0 <= layers[0] <= layers[-1] < len(blocks):
            raise ValueError(f"skip_layers: layers are {layers}; expected some of 0 to {len(blocks) - 1}")
        self._model, self._skipped = [model], [blocks[layer] for layer in layers]  # in lists: not its own modules

    def forward(self, *args, **kwargs):
        """The model's own, the skipped blocks returning what they are given."""
        before = [vars(block).get("forward") for block in self._skipped]
        try:
            for block in self._skipped:
                block.forward = _same_stream if isinstance(block, DiTBlock) else _same
            return self._model[0](*args, **kwargs)
        finally:
            for block, forward in zip(self._skipped, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
