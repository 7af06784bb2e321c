"""What a training run is told: one frozen dataclass, checked when it is made, readable from TOML."""
import dataclasses
import difflib
import functools
import inspect
import json
import math
import tomllib
import types
import typing
from pathlib import Path

import torch

from difuse.diffusion import VP, Flow
from difuse.models import DiT

CHOICES = {
    "objective": ("eps", "flow"),
    "schedule": (None, "linear", "cosine"),
    "timesteps": ("uniform", "logit_normal"),
    "precision": ("fp32", "bf16"),
}
POSITIVE = ("batch_size", "steps", "learning_rate", "grad_accumulation", "checkpoint_every", "log_every", "time_limit",
            "logit_std", "image_size")
NOT_NEGATIVE = ("weight_decay", "warmup_steps", "grad_clip", "seed")

# what may change between a run and its continuation; `data` may, because the images themselves are compared
FREE_ON_RESUME = ("steps", "checkpoint_every", "log_every", "time_limit", "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one run. A wrong type or value raises TypeError or ValueError naming the key.

    objective fixes what the network predicts and along which path: "eps" is the noise prediction of Ho et al. 2020 on
    the variance-preserving process (schedule "linear", the default, or "cosine"); "flow" is the velocity prediction of
    Lipman et al. 2022 on the straight path. batch_size counts the images of one optimizer step; grad_accumulation
    splits them into that many forward and backward passes.
    """

    model: str | dict | None = None   # a size ("DiT-S/2"), {"name": size, **overrides} or DiT's own arguments
    data: str | None = None           # "digits" or a folder of images
    image_size: int | None = None     # resize and crop the folder's images to this many pixels a side
    objective: str = "flow"
    schedule: str | None = None       # objective "eps" only
    timesteps: str = "uniform"
    logit_mean: float = 0.0           # timesteps "logit_normal" only (Esser et al. 2024, section 3.1)
    logit_std: float = 1.0
    batch_size: int = 64
    steps: int = 10_000
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0             # the learning rate rises linearly over them
    ema_decay: float = 0.9999
    grad_clip: float = 1.0            # largest norm of the whole gradient; 0 turns clipping off
    grad_accumulation: int = 1
    precision: str = "fp32"           # "bf16": autocast; weights, optimizer and EMA stay float32
    seed: int = 0
    checkpoint_every: int = 1000      # steps
    log_every: int = 50               # steps
    time_limit: float | None = None   # seconds; training stops cleanly before the step that would pass it

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, field.type):
                raise TypeError(f"config: {field.name} is {value!r} ({type(value).__name__}); "
                                f"expected {_type_name(field.type)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"config: {field.name} is {value}; expected a finite number")
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(repr(choice) for choice in allowed if choice is not None)
                raise ValueError(f"config: {name} is {getattr(self, name)!r}; expected one of {expected}")
        for name in POSITIVE:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"config: {name} is {getattr(self, name)}; expected more than 0")
        for name in NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"config: {name} is {getattr(self, name)}; expected 0 or more")
        for name, value in (("ema_decay", self.ema_decay), ("betas", self.betas[0]), ("betas", self.betas[1])):
            if not 0 <= value < 1:
                raise ValueError(f"config: {name} is {getattr(self, name)}; expected values from 0 up to below 1")
        if self.batch_size % self.grad_accumulation:
            raise ValueError(f"config: batch_size {self.batch_size} does not split into {self.grad_accumulation} equal "
                             "parts; choose grad_accumulation among its divisors")
        self._refuse_settings_without_effect()
        if isinstance(self.model, dict):
            _check_keys("config: [model]", self.model, ("name", *inspect.signature(DiT).parameters))

    def _refuse_settings_without_effect(self):
        if self.objective == "flow" and self.schedule is not None:
            raise ValueError(f"config: schedule {self.schedule!r} has no effect with objective 'flow', whose path is "
                             "straight; remove it, or choose objective 'eps'")
        if self.timesteps == "uniform" and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("config: logit_mean and logit_std have no effect with timesteps 'uniform'; remove them, "
                             "or choose timesteps 'logit_normal'")

    @property
    def prediction(self):
        """What the network's output means: "eps" or "flow"."""
        return self.objective

    def process(self):
        """The diffusion process the objective trains on."""
        return Flow() if self.objective == "flow" else VP(self.schedule or "linear")

    def as_dict(self):
        """The settings as JSON gives them back (tuples become lists)."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_toml(cls, path):
        """Read a TOML file: the fields above as keys, the model as a string or as a table [model].

        Unknown keys are refused with the nearest valid name. Raises ValueError or TypeError naming the file.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid TOML: {error}") from error
        try:
            _check_keys("config", values, [field.name for field in dataclasses.fields(cls)])
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error


def build_model(config, dataset):
    """The DiT that `config.model` names, its image size, channels and classes taken from `dataset` where not given.

    Weights are drawn from config.seed; the global generator is left as it was.
    """
    if config.model is None:
        raise ValueError("config: no model given; set for example model = \"DiT-S/2\", or a table [model]")
    given = {"name": config.model} if isinstance(config.model, str) else dict(config.model)
    _, channels, height, width = dataset.images.shape
    if height != width and "input_size" not in given:
        raise ValueError(f"data: images are {height}x{width}; DiT takes square ones. Set image_size to crop them")
    arguments = {"input_size": height, "in_channels": channels, "num_classes": dataset.num_classes} | given
    name = arguments.pop("name", None)
    build = DiT if name is None else functools.partial(DiT.from_name, name)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        try:
            return build(**arguments)
        except (TypeError, ValueError) as error:
            raise type(error)(f"config: [model]: {error}") from error


def _check_keys(where, values, valid):
    for key in values:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=1, cutoff=0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}? Valid keys: {', '.join(valid)}")


def _is_a(value, hint):
    """Whether `value` has the annotated type; an int passes for a float, a bool for neither, a list for a tuple."""
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, option) for option in hint.__args__)
    if typing.get_origin(hint) is tuple:
        return (isinstance(value, list | tuple) and len(value) == len(hint.__args__)
                and all(map(_is_a, value, hint.__args__)))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _type_name(hint):
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in hint.__args__ if option is not type(None))
    if typing.get_origin(hint) is tuple:
        return f"{len(hint.__args__)} numbers"
    return {float: "a number", int: "an integer", str: "a string", dict: "a table"}[hint]
