"""diffusers' schedulers with fused steps: same names, options, schedules and results, one pass over memory per step.

    pipe.scheduler = difuse.integrations.schedulers.from_diffusers(pipe.scheduler)

A step of nearly every scheduler is a linear map of the sample, the model's output, kept history and noise, though it is
written as ten to forty operations on whole tensors. What the map is depends on the class and its options, so it is read
off the scheduler itself: a copy of it runs once on unit vectors, rows of coefficients that stand for the tensors, and
its results are the rows of the map (scheduler_rows.py). So every option means what it means in diffusers. What is not
linear (clamping, a learned variance, dynamic thresholding) stays the operation that it is, on tensors, between two
maps. An operation that is not known to treat each element alone is refused by its name.

Deliberate differences: sums are float32 and history is kept so, where diffusers rounds to the model's dtype between
operations. In float32 and float64 results agree to rounding. `from_diffusers(scheduler, rounding="diffusers")` keeps
its roundings too: it is diffusers' own step.
"""
import copy
import functools
import inspect

import numpy as np
import torch

from difuse.diffusion.program import Apply, Draw, Map, Program
from difuse.integrations.scheduler_rows import trace, types_of
from difuse.integrations.scheduler_twin import stepper, time_is_last
from difuse_kernels import sampler_step


def from_diffusers(scheduler, *, rounding="float32"):
    """A copy of a diffusers scheduler whose `step` is fused. Pipelines take it in the scheduler's place.

    It is of a subclass of the scheduler's class; `config`, `set_timesteps`, `scale_model_input`, `add_noise` and the
    rest are inherited. rounding: "float32", or "diffusers" for its own step, which rounds every operation to the
    model's dtype. Raises TypeError for what is no scheduler of diffusers; the first `step` after `set_timesteps` raises
    NotImplementedError where the scheduler does something that is not known here, and names it.
    """
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    step = next((name for name in ("step", "step_pred") if hasattr(scheduler, name)), None)  # step_pred: ScoreSdeVe
    if not isinstance(scheduler, SchedulerMixin) or step is None or not hasattr(scheduler, "set_timesteps"):
        raise TypeError(f"from_diffusers: got {type(scheduler).__name__}; expected a scheduler of diffusers, e.g. "
                        "DDIMScheduler()")
    if rounding not in ("float32", "diffusers"):
        raise ValueError(f"from_diffusers: rounding is {rounding!r}; expected 'float32' or 'diffusers'")
    fused = copy.deepcopy(scheduler)
    if rounding == "float32" and not isinstance(scheduler, Fused):
        fused.__class__ = _fused_class(type(scheduler), step)
    return fused


class Fused:
    """What fused schedulers have in common: where they are in which plan, and the plans they have made."""

    _trajectory = None

    def __deepcopy__(self, memo):
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in self._own().items()})
        if self._trajectory is not None:
            new._trajectory = self._trajectory.copied()
        return new

    def __reduce__(self):
        if self._trajectory is not None and self._trajectory.carries:
            raise RuntimeError(f"{type(self).__name__}: it is in the middle of a trajectory, whose tensors are not "
                               "pickled; call set_timesteps first, or copy it with copy.deepcopy")
        return _restored, (*type(self).fused_from, self._own())

    def _own(self):
        return {name: value for name, value in vars(self).items() if name not in ("_trajectory", "_plans")}


def _restored(cls, name, state):
    """The other end of pickling."""
    fused = _fused_class(cls, name)
    new = fused.__new__(fused)
    vars(new).update(state)
    return new


@functools.cache
def _fused_class(cls, name):
    original = getattr(cls, name)
    parameters = list(inspect.signature(original).parameters)
    swapped = time_is_last(original)

    @functools.wraps(original)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        if swapped:
            timestep, sample = sample, timestep
        options = {**dict(zip(parameters[4:], args, strict=False)), **kwargs}
        generator, return_dict = options.pop("generator", None), options.pop("return_dict", True)
        noise = options.pop("variance_noise", None)
        batched = isinstance(timestep, torch.Tensor) and timestep.numel() > 1
        if batched or any(isinstance(value, torch.Tensor) for value in options.values()):  # e.g. times of each token
            if self._trajectory is not None and self._trajectory.carries:
                raise ValueError(f"{cls.__name__}: a step with times or options of each sample or token does not "
                                 "follow fused ones; call set_timesteps first")
            self._trajectory = None
            return stepper(cls, name)(self, model_output, timestep, sample, *args, **kwargs)
        if noise is not None and generator is not None:
            raise ValueError(f"{cls.__name__}: got both a generator and variance_noise; expected one of them")
        trajectory = self._trajectory
        if trajectory is None or not trajectory.fits(
                self, timestep, options, model_output, sample, noise):
            if trajectory is not None and trajectory.carries:
                raise ValueError(f"{cls.__name__}: this step does not follow the last one (another shape, dtype, "
                                 "option or time), and what that left is of no use here; call set_timesteps first")
            plan = _plan(self, cls, name, timestep, options, model_output, sample, noise)
            trajectory = self._trajectory = _Trajectory(self, plan)
        outputs = trajectory.step(self, model_output, sample, generator, noise)
        if return_dict and trajectory.plan.output is not tuple:
            return trajectory.plan.output(**outputs)
        return tuple(outputs.values())

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        self._trajectory = None
        return cls.set_timesteps(self, *args, **kwargs)

    return type(cls.__name__, (Fused, cls), {
        "__module__": cls.__module__, "__doc__": cls.__doc__, "fused_from": (cls, name), name: step,
        "set_timesteps": set_timesteps})


_KEPT_PLANS = 4


def _plan(scheduler, cls, name, timestep, options, model_output, sample, noise):
    """The plan from this time on: one that was made for the same schedule, options and tensors, or a new one."""
    held, state = [], []
    for name_of, value in vars(scheduler).items():
        if name_of in ("timesteps", "sigmas") and isinstance(value, torch.Tensor):
            value = tuple(value.tolist())
        elif isinstance(value, torch.Tensor):  # tables of the class, made once
            held.append(value)
            value = id(value), value._version
        elif isinstance(value, np.ndarray):
            value = value.tobytes()
        elif name_of in ("_trajectory", "_plans", "_internal_dict"):
            continue
        elif not isinstance(value, (bool, int, float, str)):
            value = repr(value)
        state.append((name_of, value))
    start = None if isinstance(timestep, torch.Tensor) else type(timestep)  # which a step may refuse
    key = (*state, float(timestep), start, repr(sorted(options.items())), _kind(model_output, sample, noise))
    plans = vars(scheduler).setdefault("_plans", {})
    if plans.setdefault("config", scheduler.config) is not scheduler.config:  # registered anew since
        plans.clear()
        plans["config"] = scheduler.config
    if key not in plans:
        while len(plans) > _KEPT_PLANS:
            del plans[next(each for each in plans if each != "config")]
        plans[key] = _Plan(scheduler, cls, name, timestep, options, model_output, sample, noise)
        plans[key].held = held  # so that their ids stay theirs
    return plans[key]


class _Plan:
    """The steps from one time on, as instructions. It does not change."""

    def __init__(self, scheduler, cls, name, timestep, options, model_output, sample, noise):
        self.options = dict(options)
        self.kind = _kind(model_output, sample, noise)
        self.work = torch.float64 if torch.float64 in (sample.dtype, model_output.dtype) else torch.float32
        self.steps, self.times, self.first = trace(scheduler, cls, name, timestep, options, model_output, sample,
                                                   noise is not None)
        self.output = self.steps[0].output
        self.types = None
        if {sample.dtype, model_output.dtype} != {torch.float32}:
            self.types = types_of(scheduler, cls, name, timestep, options, model_output, sample, len(self.steps))
        last = {tensor for step in self.steps for tensor in (*step.results.values(), *step.noise)}
        program = Program([each for step in self.steps for each in step.instructions], last)
        tables = program.tables(sample.device, self.work)
        self.parts, self.later = [[]], []
        for instruction, table in zip(program.instructions, tables, strict=True):
            self.parts[-1].append((instruction, table))
            if instruction is self.steps[len(self.parts) - 1].instructions[-1]:
                self.parts.append([])
        needed = set()
        for part in reversed(self.parts[:-1]):  # what the steps after each one read
            self.later.append(frozenset(needed))
            for instruction, _ in reversed(part):
                needed -= set(instruction.outputs)
                needed |= set(instruction.inputs)
        self.later.reverse()


class _Trajectory:
    """Where a scheduler is in a plan, and the tensors that later steps need."""

    def __init__(self, scheduler, plan):
        self.plan, self.at, self.tensors = plan, 0, {}
        self.counts = hasattr(scheduler, "step_index")  # steps, whatever time it is given
        self.index = None  # its step_index after the last step

    def copied(self):
        """Another one at the same place."""
        new = copy.copy(self)
        new.tensors = {tensor: value.clone() for tensor, value in self.tensors.items()}
        return new

    @property
    def carries(self):
        """Whether the next step needs something of the last."""
        return bool(self.tensors) and self.at < len(self.plan.steps)

    def fits(self, scheduler, timestep, options, model_output, sample, noise):
        """Whether the plan's next step is the one that is asked for."""
        plan = self.plan
        if self.at >= len(plan.steps) or options != plan.options or _kind(model_output, sample, noise) != plan.kind:
            return False
        if self.counts:
            return scheduler.step_index == self.index
        if isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu" and plan.first is not None:
            schedule = scheduler.timesteps  # to read its value on a GPU is to wait for it, where it lies is known
            if timestep.data_ptr() == schedule.data_ptr() + (plan.first + self.at) * schedule.element_size():
                return True
        return float(timestep) == plan.times[self.at]

    def step(self, scheduler, model_output, sample, generator, noise):
        """{field of the original's output: tensor}; what users see of `scheduler` moves on as the original's would."""
        plan, tensors = self.plan, self.tensors
        step, later = plan.steps[self.at], plan.later[self.at]
        types = plan.types[self.at] if plan.types else None
        if len(step.given) == 2:
            tensors[step.given[0]], tensors[step.given[1]] = sample, model_output
        else:  # the output has a learned variance behind it
            tensors.update(zip(step.given, (sample, *model_output.split(sample.shape[1], 1)), strict=True))
        own = {}  # dtypes of results that no later step reads
        if types:
            own = {tensor: types.results[name] for name, tensor in step.results.items() if tensor not in later}
        drawn = 0
        for instruction, table in plan.parts[self.at]:
            inputs = [tensors[tensor] for tensor in instruction.inputs]
            results = ()
            if isinstance(instruction, Map):
                results = sampler_step(inputs, table, out_dtypes=[
                    own.get(tensor, plan.work) for tensor in instruction.outputs])
            elif isinstance(instruction, Draw):
                dtype = types.draws[drawn] if types else plan.work
                z = noise if noise is not None else step.draws[drawn](scheduler, sample, generator, dtype)
                results, drawn = (z.to(plan.work),), drawn + 1
            elif isinstance(instruction, Apply):
                results = (instruction.function(scheduler, *inputs),)
            tensors.update(zip(instruction.outputs, results, strict=True))
        vars(scheduler).update(step.state)
        outputs = {name: tensors[tensor] for name, tensor in step.results.items()}
        if types:
            outputs = {name: tensor.to(types.results[name]) for name, tensor in outputs.items()}
        self.tensors = {tensor: tensors[tensor] for tensor in later if tensor in tensors}
        self.at += 1
        self.index = getattr(scheduler, "step_index", None)
        return outputs


def _kind(model_output, sample, noise):
    return (model_output.shape, model_output.dtype, sample.shape, sample.dtype, sample.device, noise is not None)
