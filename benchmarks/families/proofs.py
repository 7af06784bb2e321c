"""How far an accelerated model is from the truth, next to how far the unmodified one is.

truth: the unmodified model in float64 on the values that the dtype under test holds. Its own casts to float32 are left
out, except of what carries no gradient: tables of sines, timesteps.
"""
import copy
import math
import statistics
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

import difuse
from difuse_kernels.testing.numerics import FACTOR, OUTLIER

STEPS, TRAINING_STEPS = 20, 50


class Truth(TorchFunctionMode):
    """Inside, a float64 tensor that carries a gradient is not rounded to float32 by .float() or .to()."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in ("float", "to", "type") and args[0].dtype == torch.float64 and args[0].requires_grad:
            wanted = {*args[1:], *kwargs.values()} if name != "float" else {torch.float32}
            if torch.float32 in {value for value in wanted if isinstance(value, torch.dtype)}:
                return args[0]
        return function(*args, **kwargs)


def cast(values, dtype, grad=False):
    """Floating tensors of nested containers in `dtype`, as leaves; everything else as it is."""
    if isinstance(values, dict):
        return {key: cast(value, dtype, grad) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(cast(value, dtype, grad) for value in values)
    if isinstance(values, torch.Tensor) and values.is_floating_point():
        return values.detach().to(dtype).requires_grad_(grad)
    return values


def tensors(values):
    """The tensors of nested containers and of diffusers' outputs, in order."""
    if isinstance(values, torch.Tensor):
        return [values]
    values = values.values() if isinstance(values, dict) else values if isinstance(values, (list, tuple)) else ()
    return [tensor for value in values for tensor in tensors(value)]


def forward_and_gradients(module, args, kwargs, names, seed=3):
    """{name: tensor}: outputs "out0", ..., the gradients of all parameters and of the keywords in `names`.

    Gradients are of a random scalar product with the outputs, the same in every dtype.
    """
    module.zero_grad(set_to_none=True)
    kwargs = {key: cast(value, value.dtype, grad=True) if key in names else value for key, value in kwargs.items()}
    outputs = tensors(module(*args, **kwargs))
    generator = torch.Generator().manual_seed(seed)
    loss = sum((out * torch.randn(out.shape, generator=generator).to(out.dtype)).sum() for out in outputs)
    loss.backward()
    found = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"grad {name}": p.grad for name, p in module.named_parameters() if p.grad is not None}
    found |= {f"grad of {key}": kwargs[key].grad for key in names if kwargs[key].grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def differentiable(kwargs):
    """The names of a module's inputs that carry a gradient: floats, but timesteps, masks and rotary tables."""
    return [key for key, value in kwargs.items() if isinstance(value, torch.Tensor) and value.is_floating_point()
            and value.dim() > 1 and "mask" not in key and "rotary" not in key]


def truth(module, args, kwargs, names):
    """forward_and_gradients of an unmodified module in float64."""
    module = copy.deepcopy(module).double()
    with Truth():
        return forward_and_gradients(module, cast(args, torch.float64),
                                     {key: value if key.startswith("image_rotary") else cast(value, torch.float64)
                                      for key, value in kwargs.items()}, names)


@dataclass(frozen=True)
class Distance:
    """Relative errors (rms over rms of the truth) of ours and of eager's, forward and backward.

    forward, backward: over all outputs, over all gradients, each tensor weighing the same. worst: of a single gradient.
    `beyond`: tensors that are much worse than eager's, with both errors.
    """

    forward: float
    eager_forward: float
    backward: float
    eager_backward: float
    worst: float
    eager_worst: float
    beyond: tuple
    unit: float

    @property
    def ok(self):
        """Within the error budget: 1.5 times eager's error and one rounding, no tensor far off."""
        return (not self.beyond and self.forward <= FACTOR * self.eager_forward + self.unit
                and self.backward <= FACTOR * self.eager_backward + self.unit)


def _rms(values):
    return math.sqrt(sum(value**2 for value in values) / max(1, len(values)))


def distance(ours, eager, true, dtype):
    """The `Distance` of two results of forward_and_gradients from a third. Raises AssertionError where they differ in
    names, or ours is not finite."""
    if not set(ours) == set(eager) == set(true):
        raise AssertionError(f"other tensors than the truth's: {set(ours) ^ set(true)}, {set(eager) ^ set(true)}")
    unit = torch.finfo(dtype).eps / 2
    errors, sizes = {}, {name: value.double().square().mean().sqrt().item() for name, value in true.items()}
    usual = statistics.median(size for name, size in sizes.items() if name.startswith("grad"))
    for name, value in true.items():
        if not all(torch.isfinite(found[name]).all() for found in (ours, eager)):
            raise AssertionError(f"{name}: a result is not finite")
        if sizes[name] == 0:  # e.g. the last block's text queries, whose result nobody reads
            if ours[name].any():
                raise AssertionError(f"{name}: the truth is all zeros, ours is not")
            continue
        if name.startswith("grad") and sizes[name] < 1e-6 * usual:
            # zero but for rounding, e.g. of a key's bias, which a softmax ignores: it has no relative error
            size, eager_size = (found[name].double().square().mean().sqrt().item() for found in (ours, eager))
            if size > OUTLIER * eager_size + unit * usual:
                raise AssertionError(f"{name}: {size:.1e}; the truth is zero, eager has {eager_size:.1e}")
            continue
        errors[name] = [(found[name].double() - value.double()).square().mean().sqrt().item() / sizes[name]
                        for found in (ours, eager)]
    sides = [[name for name in errors if name.startswith("out") == forward] for forward in (True, False)]
    worst, eager_worst = (max(errors[name][i] for name in sides[1]) for i in (0, 1))
    (forward, eager_forward), (backward, eager_backward) = (
        [_rms([errors[name][i] for name in side]) for i in (0, 1)] for side in sides)
    beyond = tuple((name, *errors[name]) for side, usual in zip(sides, (eager_forward, eager_backward), strict=True)
                   for name in side if errors[name][0] > OUTLIER * max(errors[name][1], usual) + unit)
    return Distance(forward, eager_forward, backward, eager_backward, worst, eager_worst, beyond, unit)


def judge(family, dtype, *, model=None, autocast=False, **options):
    """The `Distance` of the family's small model, accelerated with `options`, in `dtype` or under autocast to it."""
    model = (model or family.build()).to(torch.float32 if autocast else dtype)
    inputs = family.inputs(torch.float32 if autocast else dtype)
    names = [key for key in differentiable(inputs) if key in (family.sample, "encoder_hidden_states")]
    true = truth(model, (), inputs, names)
    accelerated = copy.deepcopy(model)
    difuse.accelerate(accelerated, **options)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        ours, eager = (forward_and_gradients(each, (), inputs, names) for each in (accelerated, model))
    return distance(ours, eager, true, dtype)


@torch.no_grad()
def trajectory(family, model, dtype=torch.float32):
    """Twenty Euler steps with `model`: the final sample."""
    inputs = family.inputs(dtype)
    time, x = inputs[family.time], inputs[family.sample]
    begin, end = family.times
    for step in range(STEPS):
        now = torch.full_like(time, begin + (end - begin) * step / STEPS)
        update = tensors(model(**{**inputs, family.sample: x, family.time: now}))[0]
        if family.channels is not None:
            update = update[:, : family.channels] if x.dim() > 3 else update[..., : family.channels]
        x = x - update / STEPS
    return x


def psnr(ours, eager):
    """Peak signal-to-noise ratio in dB, of eager's range; infinite where the two are equal."""
    error = (ours.double() - eager.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10((eager.max() - eager.min()).item() ** 2 / error)


def training_losses(family, model, dtype=torch.float32):
    """The losses of fifty AdamW steps towards a fixed random target, on noise drawn anew at every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    inputs, losses = cast(family.inputs(dtype), dtype), []
    generator = torch.Generator().manual_seed(5)
    target = None
    for _ in range(TRAINING_STEPS):
        noise = torch.randn(inputs[family.sample].shape, generator=generator).to(dtype)
        x = noise.requires_grad_(dtype == torch.float64)  # so that `Truth` knows what depends on it
        out = tensors(model(**{**inputs, family.sample: x}))[0]
        if target is None:
            target = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
        loss = (out - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)
