"""A diffusers scheduler on its own: copies of it, its step whatever it is called with, and the times of its steps."""
import contextlib
import copy
import inspect
from dataclasses import fields

import torch


def twin_from(scheduler, cls):
    """An own copy of the scheduler, of its class, on the CPU."""
    twin = cls.__new__(cls)
    for key, value in vars(scheduler).items():
        if key not in ("_trajectory", "_plans"):
            vars(twin)[key] = value.cpu() if isinstance(value, torch.Tensor) else copy.deepcopy(value)
    return twin


def times_from(twin, timestep):
    """The times of the steps of `twin` from this one on, and its place in the schedule, None if it is not in it."""
    timestep = torch.as_tensor(timestep).cpu()
    schedule = torch.as_tensor(twin.timesteps)
    if hasattr(twin, "step_index"):
        if twin.step_index is None and hasattr(twin, "_init_step_index"):
            with contextlib.suppress(IndexError):  # no such time: its step says so
                twin._init_step_index(timestep)
        first = twin.step_index if twin.step_index is not None else getattr(twin, "begin_index", None)
    elif hasattr(twin, "counter"):
        first = twin.counter
    else:
        first = None
    if first is None:
        found = (schedule == timestep).nonzero().flatten().tolist()
        first = found[0] if found else None
    times = [] if first is None else list(schedule[first:])
    return (times, first) if times else ([timestep], None)


def stepper(cls, name):
    """The original's step as a function of (scheduler, model_output, timestep, sample, **options)."""
    step = getattr(cls, name)
    if time_is_last(step):
        return lambda scheduler, model_output, timestep, sample, **options: step(
            scheduler, model_output, sample, timestep, **options)
    return step


def time_is_last(step):
    """Whether it takes the time after the sample: ScoreSdeVpScheduler.step_pred(score, x, t) does."""
    return list(inspect.signature(step).parameters)[3] in ("t", "timestep")


def named(output):
    """{name: value} of what a step returned, a dataclass or a tuple."""
    if isinstance(output, tuple):
        return {str(i): value for i, value in enumerate(output)}
    return {f.name: getattr(output, f.name) for f in fields(output)}
