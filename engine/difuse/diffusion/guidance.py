"""Guidance: what the model is asked for at a step, and how its answers make one prediction.

    m = w * m_cond + (1 - w) * m_null        classifier-free, Ho & Salimans 2022 (arXiv:2207.12598); w = 1 is m_cond

Everything that is a weighted sum of answers goes into the coefficients of the sampler's update, so the mix is never
written to memory: the plain rule, an interval of steps, layers left out (skip-layer guidance), a weaker model (auto-
guidance). So are the rules that weigh answers by norms and inner products of whole samples, `Weigh`: these are found in
one pass over the answers, and the update's coefficients are each sample's own. A norm at every place is `Apply`, an
operation that is not linear, and so is a classifier's gradient.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from difuse.diffusion.grids import part_of
from difuse.diffusion.parameterizations import coefficients
from difuse.diffusion.program import Apply, Combination, Weigh
from difuse.models.layers import DiTBlock
from difuse_kernels import gram, patchify, sampler_step, unpatchify


@dataclass(frozen=True)
class Guidance:
    """How strongly, and by which rule.

    scale: w above. interval: the part of the steps, from 0 to 1, in which w holds; elsewhere it is 1, and one row
    less is computed (Kynkäänniemi et al. 2024, arXiv:2404.07724).
    rescale: 0 to 1, how far the result gets the conditional answer's standard deviation (arXiv:2305.08891).
    zero_star: the null answer is scaled to lie closest to the conditional one, and the prediction is 0, on the straight
    path no step, in the first `zero_steps` steps (CFG-Zero*, arXiv:2503.18886).
    per_token: p, each token of p x p places gets the conditional answer's norm (Qwen-Image: 2); 1 also for states that
    are tokens, [B,S,D]. apg: an `APG`.
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
    per_token: int = 0
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
        if not isinstance(self.per_token, int) or self.per_token < 0:
            raise ValueError(f"guidance per_token is {self.per_token!r}; expected the side of a token, an integer "
                             "above 0, or 0 for none")
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

    def check_shape(self, name, shape):
        """Raise ValueError where a state of this shape [B,...] does not fall into tokens of `per_token`."""
        p = self.per_token
        if p and (any(size % p for size in shape[-2:]) if 3 < len(shape) < 6 else len(shape) != 3 or p != 1):
            raise ValueError(f"{name}: guidance per_token is {p} and the state has shape {tuple(shape)}; expected "
                             "[B,C,H,W] or [B,C,F,H,W] with sides that tokens of that side divide, or 1 with [B,S,D]")

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
        if other is not None and self.apg:
            before = [memory["difference"]] if "difference" in memory else []
            m = _weighed(recorder, _Projected(self.scale, self.apg), cond, other, *before)
            if self.apg.momentum:
                memory["difference"] = sum((self.apg.momentum * each for each in before), cond - other)
        elif other is not None and self.rescale:
            m = _weighed(recorder, _Rescaled(self.scale, self.rescale), cond, other)
        elif other is not None and self.zero_star:
            m = 0 * m if step < self.zero_steps else _weighed(recorder, _ZeroStar(self.scale), cond, other)
        elif other is not None and self.per_token:
            m, = recorder.add(Apply, cond, other, function=_PerToken(self.scale, self.per_token))
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


def _weighed(recorder, function, *answers):
    """The sum of these answers with the weights that function(G) returns, see `Weigh`; G is of 1, c, n, .."""
    return sum(recorder.add(Weigh, *answers, results=len(answers), function=function), Combination({}))


_TINY = 1e-30  # answers of nothing but zeros: no division by it


def _floor(w, c_c, n_n):
    """What |w c + (1 - w) n|^2 may be by rounding alone: where it is no more, nothing is enlarged by its inverse."""
    return 1e-14 * (w**2 * c_c + (1 - w) ** 2 * n_n) + _TINY


@dataclass(frozen=True)
class _Rescaled:
    """m * (phi * std(c) / std(m) + 1 - phi), m = w c + (1 - w) n; standard deviations of whole samples."""

    w: float
    phi: float

    def __call__(self, G):
        N, c, n = G[:, 0, 0], G[:, 1], G[:, 2]
        m = self.w * c + (1 - self.w) * n  # [B,3]: <m, 1>, <m, c>, <m, n>
        m_m = self.w * m[:, 1] + (1 - self.w) * m[:, 2]
        var_c, var_m = abs(c[:, 1] - c[:, 0] ** 2 / N), abs(m_m - m[:, 0] ** 2 / N)  # abs: a rounding may be below 0
        factor = self.phi * (var_c / (var_m + _floor(self.w, c[:, 1], n[:, 2]))) ** 0.5 + (1 - self.phi)  # [B]
        return self.w * factor, (1 - self.w) * factor


@dataclass(frozen=True)
class _ZeroStar:
    """w c + (1 - w) a n, a = <c, n> / |n|^2."""

    w: float

    def __call__(self, G):
        a = G[:, 1, 2] / (G[:, 2, 2] + 1e-8)  # [B]
        return float(self.w), (1 - self.w) * a


@dataclass(frozen=True)
class _Projected:
    """c + (w - 1) k (d - (1 - eta) <d, c> / |c|^2 c), d = c - n + momentum * (d before), k shortens it."""

    w: float
    apg: APG

    def __call__(self, G):
        momentum = self.apg.momentum
        d = G[:, 1] - G[:, 2]  # [B,n+1]: <d, 1>, <d, c>, <d, n>, ..
        d_d = d[:, 1] - d[:, 2]
        if G.shape[1] == 4:
            d = d + momentum * G[:, 3]
            d_d = d[:, 1] - d[:, 2] + momentum * d[:, 3]
        along = (1 - self.apg.eta) * d[:, 1] / (G[:, 1, 1] + _TINY)  # [B]
        s = float(self.w - 1)
        if self.apg.threshold > 0:
            s = s * (self.apg.threshold / (abs(d_d) + _TINY) ** 0.5).clip(max=1)  # [B]
        return (1 + s - s * along, -s, momentum * s)[: G.shape[1] - 1]


@dataclass(frozen=True)
class _PerToken:
    """The plain mix with the conditional answer's norm in every token of p x p places, or of a state of tokens."""

    w: float
    p: int

    def __call__(self, cond, null):
        patch = (1,) * (cond.dim() - 4) + (self.p, self.p)
        cond, null = (x if x.stride(-1) == 1 else x.contiguous() for x in (cond, null))
        c, n = (x if x.dim() == 3 else patchify(x, patch) for x in (cond, null))  # [B,S,D]
        G = gram((c.flatten(0, 1), n.flatten(0, 1)))  # [B*S,3,3]
        m = torch.lerp(G[:, 2], G[:, 1], self.w)
        m_m = torch.lerp(m[:, 2], m[:, 1], self.w)
        c_c, n_n = G[:, 1, 1], G[:, 2, 2]
        ratio = (c_c / (abs(m_m) + _floor(self.w, c_c, n_n))).sqrt()  # [B*S]
        weights = torch.stack((self.w * ratio, (1 - self.w) * ratio), 1)[:, None]
        work = torch.promote_types(c.dtype, torch.float32)
        m, = sampler_step((c.flatten(0, 1), n.flatten(0, 1)), weights.to(work), out_dtypes=(work,))
        m = m.view(c.shape)
        if cond.dim() == 3:
            return m
        grid = [size // side for size, side in zip(cond.shape[2:], patch, strict=True)]
        return unpatchify(m, patch, grid, order="cpq")  # [B,C,H,W]


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
        self.layers = tuple(layers)

    @property
    def model(self):
        """The model whose layers are skipped."""
        return self._model[0]

    def forward(self, *args, **kwargs):
        """The model's own, the skipped blocks returning what they are given."""
        before = [vars(block).get("forward") for block in self._skipped]
        try:
            for block in self._skipped:
                block.forward = _same_stream if isinstance(block, DiTBlock) else _same
            return self.model(*args, **kwargs)
        finally:
            for block, forward in zip(self._skipped, before, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward
