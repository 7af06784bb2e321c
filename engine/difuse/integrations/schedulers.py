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
from dataclasses import fields

import torch

from difuse.diffusion.program import Apply, Draw, Map, Program
from difuse.integrations.scheduler_rows import trace, types_of
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
    """What fused schedulers have in common: the plan of the trajectory that they are in."""

    _plan = None

    def __deepcopy__(self, memo):
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        vars(new).update({name: copy.deepcopy(value, memo) for name, value in vars(self).items() if name != "_plan"})
        return new

    def __reduce__(self):
        state = {name: value for name, value in vars(self).items() if name != "_plan"}
        return _restored, (*type(self).fused_from, state)


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

    @functools.wraps(original)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        options = {**dict(zip(parameters[4:], args, strict=False)), **kwargs}
        generator, return_dict = options.pop("generator", None), options.pop("return_dict", True)
        noise = options.pop("variance_noise", None)
        if any(isinstance(value, torch.Tensor) for value in options.values()):  # e.g. times of each token
            return original(self, model_output, timestep, sample, **options, generator=generator,
                            return_dict=return_dict)
        if noise is not None and generator is not None:
            raise ValueError(f"{cls.__name__}: got both a generator and variance_noise; expected one of them")
        plan = self._plan
        if plan is None or not plan.fits(timestep, options, model_output, sample, noise):
            if plan is not None and plan.carries:
                raise ValueError(f"{cls.__name__}: this step does not follow the last one (another shape, dtype, "
                                 "option or time), and what that left is of no use here; call set_timesteps first")
            plan = self._plan = _Plan(self, cls, name, timestep, options, model_output, sample, noise)
        outputs = plan.step(self, model_output, sample, generator, noise)
        return outputs if return_dict else tuple(
            value for field in fields(outputs) if (value := getattr(outputs, field.name)) is not None)

    @functools.wraps(cls.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        self._plan = None
        return cls.set_timesteps(self, *args, **kwargs)

    return type(cls.__name__, (Fused, cls), {
        "__module__": cls.__module__, "__doc__": cls.__doc__, "fused_from": (cls, name), name: step,
        "set_timesteps": set_timesteps})


class _Plan:
    """The steps from one time on, as instructions, and where the trajectory is in them."""

    def __init__(self, scheduler, cls, name, timestep, options, model_output, sample, noise):
        self.options, self.at = dict(options), 0
        self.kind = _kind(model_output, sample, noise)
        self.work = torch.float64 if torch.float64 in (sample.dtype, model_output.dtype) else torch.float32
        self.steps, self.times = trace(scheduler, cls, name, timestep, options, model_output, sample, noise is not None)
        self.counts = hasattr(scheduler, "step_index")  # steps, whatever time it is given
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
        self.tensors = {}

    @property
    def carries(self):
        """Whether the next step needs something of the last."""
        return bool(self.tensors) and self.at < len(self.steps)

    def fits(self, timestep, options, model_output, sample, noise):
        """Whether the plan's next step is the one that is asked for."""
        if self.at >= len(self.steps) or options != self.options or _kind(model_output, sample, noise) != self.kind:
            return False
        if self.counts or (isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"):
            return True  # to look on a GPU would be to wait for it: the next one is meant
        return float(timestep) == self.times[self.at]

    def step(self, scheduler, model_output, sample, generator, noise):
        """The original's output; what users see of `scheduler` moves on as the original's would."""
        step, tensors = self.steps[self.at], self.tensors
        types = self.types[self.at] if self.types else None
        for tensor, value in zip(step.given, (sample, *model_output.split(sample.shape[1], 1)), strict=False):
            tensors[tensor] = value
        later = self.later[self.at]
        own = {}  # dtypes of results that no later step reads
        if types:
            own = {tensor: types.results[name] for name, tensor in step.results.items() if tensor not in later}
        drawn = 0
        for instruction, table in self.parts[self.at]:
            inputs = [tensors[tensor] for tensor in instruction.inputs]
            results = ()
            if isinstance(instruction, Map):
                results = sampler_step(inputs, table, out_dtypes=[
                    own.get(tensor, self.work) for tensor in instruction.outputs])
            elif isinstance(instruction, Draw):
                dtype = types.draws[drawn] if types else self.work
                z = noise if noise is not None else step.draws[drawn](scheduler, sample, generator, dtype)
                results, drawn = (z.to(self.work),), drawn + 1
            elif isinstance(instruction, Apply):
                results = (instruction.function(*inputs),)
            tensors.update(zip(instruction.outputs, results, strict=True))
        vars(scheduler).update(step.state)
        outputs = {name: tensors[tensor] for name, tensor in step.results.items()}
        if types:
            outputs = {name: tensor.to(types.results[name]) for name, tensor in outputs.items()}
        self.tensors = {tensor: tensors[tensor] for tensor in later if tensor in tensors}
        self.at += 1
        return step.output(**outputs)


def _kind(model_output, sample, noise):
    return (model_output.shape, model_output.dtype, sample.shape, sample.dtype, sample.device, noise is not None)
