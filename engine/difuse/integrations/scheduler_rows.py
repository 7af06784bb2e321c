"""What a diffusers scheduler does to tensors, found by running a copy of it on rows of coefficients.

A `Row` is a float64 tensor [1,C,1,SLOTS] whose last dimension says how much of which tensor it stands for. Sums of rows
and products with numbers are the scheduler's own arithmetic on them. Drawn noise is a unit vector of its own; any other
elementwise operation is recorded to be done on the tensors, and its result is a unit vector too.
"""
import functools
import threading
from dataclasses import dataclass, field
from numbers import Number

import torch
from torch.overrides import TorchFunctionMode

from difuse.diffusion.program import Apply, Combination, Done, Draw, Recorder, number
from difuse.integrations.scheduler_twin import named, stepper, times_from, twin_from

SLOTS = 127  # tensors that one step may know at once: IPNDM keeps every answer it was given
_T = torch.Tensor
_SAME = {_T.to, _T.float, _T.double, _T.cpu, _T.contiguous, _T.detach, _T.type}  # roundings are not taken over
_STRUCTURE = {_T.clone, _T.__getitem__, _T.neg, _T.__neg__, _T.unsqueeze, torch.neg, torch.stack, torch.einsum,
              torch.split, _T.split, torch.chunk, _T.chunk, torch.zeros_like}
_NEW_SUMS = {_T.add, _T.__add__, _T.__radd__, _T.sub, _T.__sub__, _T.__rsub__, torch.add, torch.sub}
_SUMS = {_T.__iadd__, _T.__isub__, _T.add_, _T.sub_} | _NEW_SUMS
_PRODUCTS = {_T.mul, _T.__mul__, _T.__rmul__, _T.div, _T.__truediv__, torch.mul, torch.div}
_ELEMENTWISE = {_T.clamp, _T.clip, torch.clamp, torch.clip, _T.exp, torch.exp, _T.sqrt, torch.sqrt, _T.abs, torch.abs,
                _T.pow, _T.__pow__, torch.pow} | _NEW_SUMS | _PRODUCTS
_ABOUT = {"__get__", "size", "dim", "numel", "is_floating_point", "__len__", "ndimension"}


@dataclass
class Step:
    """One step: the tensors it is given, its instructions, what it returns, and the numbers it changes."""

    given: tuple  # numbers of the sample, the model's output and its learned variance
    instructions: list = ()
    results: dict = field(default_factory=dict)  # {field of the output: number of the tensor}
    output: type = None
    state: dict = field(default_factory=dict)  # attributes of the scheduler after it
    draws: list = field(default_factory=list)  # functions (scheduler, sample, generator, dtype) -> noise
    noise: list = field(default_factory=list)  # the numbers of those


class Row(torch.Tensor):
    """See the module. Every torch function on one comes through here."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SAME:
            return args[0]
        rows = [a for a in args if isinstance(a, Row)]
        others = [a for a in args if not isinstance(a, Row)]
        if (func in _STRUCTURE or (func in _PRODUCTS and len(rows) == 1 and _is_factor(func, args))
                or (func in _SUMS and (len(rows) == 2 or _is_zero(others)))):
            return _as_rows(super().__torch_function__(func, types, args, kwargs))
        if func in _ELEMENTWISE:
            return _here.trace.apply(functools.partial(_elementwise, func, args, kwargs), rows)
        raise NotImplementedError(
            f"{_here.trace.name}: its step uses {name} on whole tensors, which from_diffusers does not know; keep "
            "diffusers' own scheduler, or from_diffusers(scheduler, rounding='diffusers')")


def _is_factor(func, args):
    """A product with a number, not a division by a tensor."""
    first = isinstance(args[0], Row)
    other = args[1] if first else args[0]
    single = isinstance(other, Number) or (isinstance(other, torch.Tensor) and other.numel() == 1)
    return single and (first or func not in (_T.div, _T.__truediv__, torch.div))


def _is_zero(others):
    return all((isinstance(other, Number) or other.numel() == 1) and float(other) == 0 for other in others)


def _as_rows(result):
    if isinstance(result, (tuple, list)):
        return type(result)(map(_as_rows, result))
    return result.double().as_subclass(Row) if not isinstance(result, Row) else result


def _elementwise(func, args, kwargs, _scheduler, *tensors):
    """func on the tensors that the rows among its arguments stand for; 0-dimensional ones keep their value."""
    device, tensors = tensors[0].device, iter(tensors)
    given = [next(tensors) if isinstance(each, Row) else each for each in args]
    return func(*(each.to(device) if isinstance(each, torch.Tensor) else each for each in given), **kwargs)


class _Noise(TorchFunctionMode):
    """Draws of noise become unit vectors of `trace`, or, without one, zeros whose dtype is remembered."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.randn, torch.randn_like):
            return self.draw(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


_here = threading.local()  # .trace: while this thread runs a scheduler on rows


class _Trace:
    """What is recorded of one scheduler's steps."""

    def __init__(self, name):
        self.name, self.recorder = name, Recorder()
        self.numbers = [None] * SLOTS  # of the tensor that each place of a row stands for

    def unit(self, combination, channels):
        """The row of a tensor."""
        if None not in self.numbers:
            raise NotImplementedError(f"{self.name}: a step knows more than {SLOTS} tensors")
        place = self.numbers.index(None)
        self.numbers[place] = number(combination)
        row = torch.zeros(1, channels, 1, SLOTS, dtype=torch.float64)
        row[..., place] = 1
        return row.as_subclass(Row)

    def combination(self, row):
        """What a row stands for."""
        values = row.as_subclass(torch.Tensor)
        one = values[0, 0, 0]
        if values.shape[0] != 1 or not (values == one).all():
            raise NotImplementedError(f"{self.name}: its step does not treat all channels alike")
        return Combination({self.numbers[i]: one[i].item() for i in one.nonzero().flatten().tolist()})

    def apply(self, function, rows):
        result, = self.recorder.add(Apply, *map(self.combination, rows), function=function)
        return self.unit(result, rows[0].shape[1])


def trace(scheduler, cls, name, timestep, options, model_output, sample, noise_given):
    """([Step], [time], where the first is in the schedule) from this time on to the end."""
    twin = twin_from(scheduler, cls)
    times, first = times_from(twin, timestep)
    channels = sample.shape[1] if model_output.shape != sample.shape else 1
    trace, steps = _Trace(cls.__name__), []
    step = None

    def drawn(how):
        z, = trace.recorder.add(Draw)
        step.draws.append(how)
        step.noise.append(number(z))
        return trace.unit(z, channels)

    def draw(func, args, kwargs):
        return drawn(_randn)

    if hasattr(twin, "noise_sampler"):  # DPMSolverSDEScheduler's, noise of an interval of one Brownian path
        twin.noise_sampler = lambda sigma, sigma_next: drawn(functools.partial(_brownian, sigma, sigma_next))
    if hasattr(twin, "_threshold_sample"):
        twin._threshold_sample = lambda row: trace.apply(cls._threshold_sample, [row])
    _here.trace, before = trace, getattr(_here, "trace", None)
    try:
        with _Noise(draw):
            for k, time in enumerate(times):
                inputs = [trace.recorder.tensor() for _ in range(1 + model_output.shape[1] // sample.shape[1])]
                x, *m = [trace.unit(each, channels) for each in inputs]
                step = Step(tuple(map(number, inputs)))
                steps.append(step)
                if noise_given:
                    options = {**options, "variance_noise": draw(None, (), {})}
                seen = dict(vars(twin))
                m = torch.cat([each.as_subclass(torch.Tensor) for each in m], 1).as_subclass(Row)
                output = stepper(cls, name)(twin, m, timestep if k == 0 else time, x, **options)
                _finish(trace, twin, step, output, seen)
    finally:
        _here.trace = before
    return steps, [float(time) for time in times], first


def _finish(trace, twin, step, output, seen):
    """Write what the step returns and what the scheduler keeps, in one map, and let the rest go."""
    results = {name: trace.combination(row) for name, row in named(output).items() if isinstance(row, Row)}
    kept = {}  # id of a row -> the row, so that ids stay theirs, and what it stands for
    _replace(vars(twin), lambda row: kept.setdefault(id(row), (row, trace.combination(row)))[0])
    trace.recorder.write([*results.values(), *(combination for _, combination in kept.values())])
    trace.recorder.add(Done, results=0, step=0)
    step.instructions, trace.recorder.instructions = trace.recorder.instructions, []
    step.results, step.output = {name: number(value) for name, value in results.items()}, type(output)
    trace.numbers = [None] * SLOTS
    new = {key: trace.unit(combination, row.shape[1]) for key, (row, combination) in kept.items()}
    step.state = {name: _without_rows(value) for name, value in vars(twin).items() if seen.get(name, seen) is not value}
    _replace(vars(twin), lambda row: new[id(row)])


def _replace(container, function):
    """Put function(row) in the place of every row in these attributes, lists and dicts."""
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        if isinstance(value, Row):
            container[key] = function(value)
        elif isinstance(value, (dict, list)):
            _replace(value, function)


class _Kept:
    """Stands in a fused scheduler's attributes for a tensor that its plan keeps."""

    def __repr__(self):
        return "<kept by the fused step>"


KEPT = _Kept()


def _without_rows(value):
    if isinstance(value, Row):
        return KEPT
    if isinstance(value, list):
        return [_without_rows(each) for each in value]
    return value


def _randn(scheduler, sample, generator, dtype):
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)


def _brownian(sigma, sigma_next, scheduler, sample, generator, dtype):
    if scheduler.noise_sampler is None:
        from diffusers.schedulers.scheduling_dpmsolver_sde import BrownianTreeNoiseSampler

        sigmas = scheduler.sigmas
        scheduler.noise_sampler = BrownianTreeNoiseSampler(
            sample, sigmas[sigmas > 0].min().item(), sigmas.max().item(), scheduler.noise_sampler_seed)
    return scheduler.noise_sampler(sigma, sigma_next)


@dataclass
class Types:
    """Of one step: the dtypes of what it draws and returns."""

    draws: list
    results: dict


def types_of(scheduler, cls, name, timestep, options, model_output, sample, count):
    """[Types] of the original's steps for these dtypes, found on tensors of one element a channel."""
    twin = twin_from(scheduler, cls)
    times, _ = times_from(twin, timestep)
    x, m = (torch.zeros(1, each.shape[1], 1, 1, dtype=each.dtype) for each in (sample, model_output))
    steps, draws = [], []

    def draw(func, args, kwargs):
        dtype = kwargs.get("dtype") or (args[0].dtype if func is torch.randn_like else torch.get_default_dtype())
        draws.append(dtype)
        return torch.zeros(x.shape, dtype=dtype)

    if hasattr(twin, "noise_sampler"):
        twin.noise_sampler = lambda *_: draw(torch.randn_like, (x,), {})
    with _Noise(draw):
        for k, time in enumerate(times[:count]):
            output = stepper(cls, name)(twin, m, timestep if k == 0 else time, x, **options)
            steps.append(Types(list(draws), {key: value.dtype for key, value in named(output).items()
                                             if isinstance(value, torch.Tensor)}))
            draws.clear()
    return steps
