"""What `difuse.Engine` is asked for, checked before it is taken, and where each of its requests is."""
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from difuse.diffusion.guidance import Guidance
from difuse.diffusion.model_calls import Finite, call_times
from difuse.diffusion.run import Run
from difuse.diffusion.samplers import Previews, find_sampler, initial_noise

_MOST_STEPS = 10_000


@dataclass(frozen=True)
class Request:
    """One image. label: a class, None for a model without classes. seed: its noise, as `initial_noise` draws it.

    sampler, steps, spacing, options, clip among them: as for `difuse.sample`; eta: ddim's. guidance: classifier-free
    guidance w, 1 for none, or a `Guidance` that asks for conditional and null answers alone; two rows of the model's
    batch. callback(step, x [C,H,W]) is called after each step, on the engine's thread: every request waits for it, so
    it must not wait for one.
    """

    label: int | None
    seed: int
    sampler: str = "ddim"
    steps: int = 50
    guidance: float | Guidance = 1.5
    eta: float = 0.0
    callback: Callable | None = None
    spacing: str | None = None
    options: dict = field(default_factory=dict, hash=False)


class Taken:
    """A request and where it is: its `run`, None until it starts, and its state x [C,H,W]."""

    def __init__(self, request, program, times, null):
        self.request, self.future, self.over = request, Future(), False
        self.labels = [request.label, null][: max(len(call.sources) for call in program.calls)]  # of its rows
        self.program, self.times, self.called = program, times, 0
        self.run, self.x, self.finite = None, None, Finite(f"Engine, {request.sampler}")

    def start(self, shape, device):
        noise, generators = initial_noise(shape, [self.request.seed], device)

        def draw():
            z = torch.randn(shape, generator=generators[0], dtype=torch.float32)[None]
            return z if device.type == "cpu" else z.pin_memory().to(device, non_blocking=True)

        self.x, self.run = noise[0], Run(self.program, (noise,), draw, self._done)

    def _done(self, step, x):
        self.x = x[0]
        if self.request.callback is not None and not self.future.cancelled():
            self.request.callback(step, self.x.clone())

    def advance(self, answers):
        """One model call is done, with these answers [1,C,H,W]; whether it was the last."""
        self.finite.check(self.program.calls[self.called].step, answers[:-1])
        self.called += 1
        self.run.give(answers)
        if self.run.advance() is not None:
            return False
        self.finite.finish()
        self.x = self.x.clone()  # no view of a batch of one
        return True

    def settle(self, error=None):
        """Give the future its image or this error; if it was cancelled, tell those who wait for it. Once."""
        if self.over:
            return
        self.over, self.run = True, None  # before the future runs somebody's callbacks; the run holds this object
        if self.future.set_running_or_notify_cancel():
            if error is None:
                self.future.set_result(self.x)
            else:
                self.future.set_exception(error)

    def is_over(self):
        if self.future.cancelled():
            self.settle()
        return self.over


def take(request, process, prediction, null, max_batch, device, shape):
    """The request as `Taken`; ValueError or TypeError if it cannot run.

    null: the null class, None without classes. shape: an image's.
    """
    if not isinstance(request, Request):
        raise TypeError(f"Engine: the request is {type(request).__name__}; expected a difuse.Request")
    try:
        sampler = find_sampler(request.sampler)
    except ValueError as error:
        raise ValueError(f"Engine: {error}") from None
    guidance = request.guidance
    check_integer("seed", request.seed, -2**63, 2**64 - 1)
    check_integer("steps", request.steps, 1, _MOST_STEPS)
    for name, value in (("guidance", guidance), ("eta", request.eta)):
        if isinstance(value, Guidance):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"Engine: {name} is {value!r}; expected a number")
        if not abs(value) <= 1e30:
            raise ValueError(f"Engine: {name} is {value!r}; expected a finite number that float32 can hold")
    if not isinstance(guidance, Guidance):
        guidance = Guidance(guidance)
    guidance.check_shape("Engine", (1, *shape))
    if guidance.skip or guidance.weak:
        raise ValueError("Engine: guidance with skip or weak asks other models than the engine's; use difuse.sample")
    if request.eta and request.sampler != "ddim":
        raise ValueError(f"Engine: eta is {request.eta} with {request.sampler}; only ddim takes one")
    if isinstance(request.callback, Previews):
        raise ValueError("Engine: the callback is Previews; expected a function of (step, x): states alone are kept")
    if request.callback is not None and not callable(request.callback):
        raise TypeError(f"Engine: callback is {request.callback!r}; expected a function of (step, x), or None")
    if null is not None:
        check_integer("label", request.label, 0, null)
    elif request.label is not None or guidance.needs_null:
        raise ValueError(f"Engine: label {request.label!r} with guidance {guidance.scale}, but the model has no "
                         "classes (num_classes); expected label=None and guidance=1")
    if guidance.needs_null and max_batch < 2:
        raise ValueError("Engine: guidance needs two rows; expected max_batch >= 2, or guidance=1")
    sampler.check_options(name for name in request.options if name != "clip")
    options = {**({"eta": request.eta} if request.sampler == "ddim" else {}), **request.options}
    labels = None if request.label is None else torch.tensor([request.label], device=device)
    program = sampler.program(process, request.steps, prediction, guidance, spacing=request.spacing, labels=labels,
                              **options)
    return Taken(request, program, call_times(program), null)


def check_integer(name, value, low, high):
    """Raise TypeError or ValueError for anything but an int from low to high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"Engine: {name} is {value!r}; expected an integer")
    if not low <= value <= high:
        raise ValueError(f"Engine: {name} is {value}; expected {low} to {high}")
