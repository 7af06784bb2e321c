"""What `difuse.Engine` is asked for, checked before it is taken, and where each of its requests is."""
import difflib
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from difuse.diffusion.samplers import STEPS, initial_noise

_MOST_STEPS = 10_000


@dataclass(frozen=True)
class Request:
    """One image. label: a class, None for a model without classes. seed: its noise, as `initial_noise` draws it.

    sampler: "ddpm", "ddim" or "flow_euler"; steps: its number of model calls; eta: ddim's. guidance: classifier-free
    guidance w, 1 for none; others need two rows of the model's batch. callback(step, x [C,H,W]) is called after each
    step, on the engine's thread: every request waits for it, so it must not wait for one.
    """

    label: int | None
    seed: int
    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 1.5
    eta: float = 0.0
    callback: Callable | None = None


class Taken:
    """A request and where it is: its state x [C,H,W] after `step` steps, both None until it starts."""

    def __init__(self, request, method, null):
        self.request, self.future, self.over = request, Future(), False
        self.labels = [request.label] if request.guidance == 1 else [request.label, null]  # of its rows
        self.times, self.std = method.times, method.std.tolist()
        self.table = method.table((request.guidance, 1 - request.guidance))  # [steps,4]
        self.x = self.z = self.step = None

    def start(self, shape, device):
        noise, (self.generator,) = initial_noise(shape, [self.request.seed], device)
        self.x, self.step = noise[0], 0

    def noise(self):
        """This step's z [C,H,W] on the CPU, drawn once even if the step is run again; none where it has no weight."""
        if self.z is None:
            self.z = torch.zeros(self.x.shape, dtype=torch.float32)
            if self.std[self.step] > 0:
                self.z.normal_(generator=self.generator)
        return self.z

    def advance(self, x):
        """One step is done; its result is x."""
        self.x, self.z, self.step = x, None, self.step + 1

    def settle(self, error=None):
        """Give the future its image or this error; if it was cancelled, tell those who wait for it. Once."""
        if self.over:
            return
        self.over = True  # before the future runs somebody's callbacks
        if self.future.set_running_or_notify_cancel():
            if error is None:
                self.future.set_result(self.x)
            else:
                self.future.set_exception(error)

    def is_over(self):
        if self.future.cancelled():
            self.settle()
        return self.over


def take(request, process, prediction, null, max_batch):
    """The request as `Taken`; ValueError or TypeError if it cannot run. null: the null class, None without classes."""
    if not isinstance(request, Request):
        raise TypeError(f"Engine: the request is {type(request).__name__}; expected a difuse.Request")
    if request.sampler not in list(STEPS):
        near = difflib.get_close_matches(str(request.sampler), STEPS, n=1, cutoff=0)[0]
        raise ValueError(f"Engine: sampler {request.sampler!r} is unknown; did you mean {near!r}? Expected one of "
                         f"{', '.join(STEPS)}")
    check_integer("seed", request.seed, -2**63, 2**64 - 1)
    check_integer("steps", request.steps, 1, _MOST_STEPS)
    for name, value in (("guidance", request.guidance), ("eta", request.eta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"Engine: {name} is {value!r}; expected a number")
        if not abs(value) <= 1e30:
            raise ValueError(f"Engine: {name} is {value!r}; expected a finite number that float32 can hold")
    if request.eta and request.sampler != "ddim":
        raise ValueError(f"Engine: eta is {request.eta} with {request.sampler}; only ddim takes one")
    if request.callback is not None and not callable(request.callback):
        raise TypeError(f"Engine: callback is {request.callback!r}; expected a function of (step, x), or None")
    if null is not None:
        check_integer("label", request.label, 0, null)
    elif request.label is not None or request.guidance != 1:
        raise ValueError(f"Engine: label {request.label!r} with guidance {request.guidance}, but the model has no "
                         "classes (num_classes); expected label=None and guidance=1")
    if request.guidance != 1 and max_batch < 2:
        raise ValueError("Engine: guidance needs two rows; expected max_batch >= 2, or guidance=1")
    options = {"eta": request.eta} if request.sampler == "ddim" else {}
    return Taken(request, STEPS[request.sampler](process, request.steps, prediction, **options), null)


def check_integer(name, value, low, high):
    """Raise TypeError or ValueError for anything but an int from low to high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Engine: {name} is {value!r}; expected an integer")
    if not low <= value <= high:
        raise ValueError(f"Engine: {name} is {value}; expected {low} to {high}")
