"""What a lower precision costs, measured on trajectories; and the calls of one, to smooth 8-bit products by.

    def draw(model):  # images of one model, always from the same noise
        return difuse.sample(model, [0, 1, 2, 3], process=process, prediction="eps", steps=20)

    calls = difuse.recorded_calls(model, draw)
    frozen = difuse.freeze(model, "int8", calls[::5])
    print(difuse.fidelity(model, frozen, draw))
"""
import inspect
import math
from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map

from difuse.inference.around import Around


@dataclass(frozen=True)
class Fidelity:
    """errors: relative error of each call's result, rms over rms; psnr: of the images, in dB, 2 being their range."""

    errors: tuple[float, ...]
    psnr: float

    def __str__(self):
        worst = max(range(len(self.errors)), key=lambda k: math.inf if math.isnan(self.errors[k]) else self.errors[k])
        mean = sum(self.errors) / len(self.errors)
        return (f"relative error of the model's results over {len(self.errors)} calls: {mean:.2%} on average, "
                f"{self.errors[0]:.2%} in the first, {self.errors[-1]:.2%} in the last, {self.errors[worst]:.2%} "
                f"at most (call {worst + 1}); images: {self.psnr:.1f} dB PSNR")


class Watched(Around):
    """`model`, and after every call of it `after(arguments, result)`, arguments by their names."""

    def __init__(self, model, after):
        super().__init__()
        self.model, self._after = model, after
        self.training = model.training

    def forward(self, *args, **kwargs):
        """The model's own."""
        result = self.model(*args, **kwargs)
        self._after(_named(self.model, args, kwargs), result)
        return result


@torch.no_grad()
def recorded_calls(model, draw):
    """The arguments of every call of `model` in draw(model): a list of dicts, as `freeze` takes example inputs."""
    calls = []
    draw(Watched(model, lambda arguments, _: calls.append(_kept(arguments))))
    return calls


@torch.no_grad()
def fidelity(model, other, draw):
    """How far `other`, e.g. a frozen model, is from `model`: a `Fidelity`.

    draw(model) -> images, a tensor with values in [-1,1], which must be the same for the same model. Errors are of
    single calls, on the states of `model`'s own trajectory; the PSNR is of `other`'s own images.
    It is infinite for equal images, minus infinity for images that are not finite. Raises ValueError where draw does
    not call the model, or gives other images each time or ones that are not finite, and for a forward with *args.
    """
    errors = []

    def compare(arguments, result):
        ours, theirs = (_first_tensor(each).double() for each in (other(**arguments), result))
        off, size = ((values.square().mean().sqrt().item()) for values in (ours - theirs, theirs))
        errors.append(off / size if size else math.inf if off else 0.0)

    expected = draw(Watched(model, compare))
    if not errors:
        raise ValueError("fidelity: draw(model) did not call the model")
    if not expected.isfinite().all():
        raise ValueError("fidelity: draw(model) gave images with nan or infinity")
    if not torch.equal(draw(model), expected):
        raise ValueError("fidelity: draw(model) gave other images the second time; draw from fixed seeds")
    mean_square = (draw(other).double() - expected.double()).square().mean().item()
    if not math.isfinite(mean_square):
        return Fidelity(tuple(errors), -math.inf)
    return Fidelity(tuple(errors), 10 * math.log10(4 / mean_square) if mean_square else math.inf)


def _named(model, args, kwargs):
    """{name: value} of a call's arguments, by the forward of the model's class."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    while isinstance(model, Around):
        model = model.model
    cls = type(model)
    bound = inspect.signature(cls.forward).bind(None, *args, **kwargs)
    named = {}
    for name, value in bound.arguments.items():
        parameter = bound.signature.parameters[name]
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise ValueError(f"recorded_calls, fidelity: {cls.__name__}.forward takes *{name}, which cannot be given "
                             "by name")
        named |= value if parameter.kind is parameter.VAR_KEYWORD else {name: value}
    named.pop(next(iter(bound.signature.parameters)))  # self
    return named


def _kept(arguments):
    """Tensors copied: a sampler may write over them."""
    return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, arguments)


def _first_tensor(result):
    """The result itself, or the first tensor of a tuple or of diffusers' outputs."""
    if isinstance(result, torch.Tensor):
        return result
    return _first_tensor(next(iter(result.values() if isinstance(result, dict) else result)))
