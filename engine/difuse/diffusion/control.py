"""Around a trajectory: the way back from an image to its noise, mixtures of noise, and an adaptive solver."""
import math
from dataclasses import fields

import torch

from difuse.diffusion.grids import path
from difuse.diffusion.guidance import Guidance
from difuse.diffusion.methods.euler import towards
from difuse.diffusion.model_calls import ModelCalls
from difuse.diffusion.parameterizations import coefficients
from difuse.diffusion.program import Call, Program
from difuse_kernels import sampler_step


@torch.no_grad()
def invert(model, image, *, process, steps, prediction, labels=None, guidance=1.0, spacing=None, iterations=50,
           tolerance=1e-6):
    """The noise [B,C,H,W] from which `euler` (on VP `ddim`), with these arguments, gives `image` [B,C,H,W] again.

    Every step x_s = a x_t + b m(x_t) is solved for x_t by iterating x_t = (x_s - b m(x_t)) / a from x_s on, until the
    largest change is below `tolerance` of the largest value: exact, where one evaluation at x_s, the usual "DDIM
    inversion", is not. Raises ValueError for a network that predicts x0, whose last step keeps nothing of x_t, and
    RuntimeError where `iterations` do not reach the tolerance: more steps, or less guidance, make it easier.
    """
    if prediction == "x0":
        raise ValueError("invert: the last step to a predicted x0 cannot be turned back; expected another prediction")
    nodes = path(process, steps, spacing)
    guidance = _plain("invert", guidance)
    backwards = list(zip(nodes[1:], nodes[:-1], strict=True))[::-1]  # (from s, up to t)
    sources = guidance.sources(0, 1)
    calls = [Call((), (), node, step, sources) for step, (_, node) in enumerate(backwards)]
    program = Program(calls)
    program.integer_times = process.model_times == torch.int64
    ask = ModelCalls("invert", model, labels, guidance, image, program)
    x = image
    for call, time, (s, t) in zip(calls, ask.times.to(image.device), backwards, strict=True):
        a, b = _step(prediction, t, s)
        weights = (1.0,) if len(sources) == 1 else (guidance.scale, 1 - guidance.scale)
        table = torch.tensor([[1 / a, *(-b / a * weight for weight in weights)]], dtype=torch.float32, device=x.device)
        guess, change = x, math.inf
        for _ in range(iterations):
            scaled = guess if t.scale == 1 else t.scale * guess
            answers = ask.answers(call, scaled, time, ask.labels, ask.null)[:-1]
            better, = sampler_step((x, *answers), table, out_dtypes=(torch.float32,))  # [B,C,H,W]
            change, guess = (better - guess).abs().max().item(), better
            if change <= tolerance * max(1.0, guess.abs().max().item()):
                break
        else:
            raise RuntimeError(f"invert: step {call.step} still changes by {change:.2e} after {iterations} iterations; "
                               "expected less than the tolerance. Take more steps, less guidance or more iterations")
        x = guess
    return x if process.prior == 1 else x / nodes[0].sigma


def _plain(name, guidance):
    """A `Guidance` that is one weighted sum of two answers at every step; ValueError for one that is more."""
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    more = [field.name for field in fields(Guidance) if field.name not in ("scale", "weak", "passes") and
            getattr(guidance, field.name) != field.default]
    if more:
        raise ValueError(f"{name}: guidance has {', '.join(more)}; expected a scale, and a weak model at most")
    return guidance


def _step(prediction, t, s):
    """(a, b) of x_s = a x_t + b m in Euler's step from t to s."""
    c_x, c_m = (c.item() for c in coefficients(prediction, "x0", t.alpha, t.sigma))
    a, b = towards(1.0, 0.0, t, s), towards(0.0, 1.0, t, s)  # of x, of x0
    return a + b * c_x, b * c_m


def slerp(a, b, part):
    """Between two noises [B,...] on the sphere, part 0 to 1: a mixture that is normal noise as they are."""
    flat_a, flat_b = a.flatten(1).double(), b.flatten(1).double()
    cosine = (flat_a * flat_b).sum(1) / (flat_a.norm(dim=1) * flat_b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos()[:, None]  # [B,1]
    straight = angle < 1e-6  # parallel: the sphere is a line there
    sine = torch.where(straight, torch.ones_like(angle), angle.sin())
    weight_a = torch.where(straight, torch.full_like(angle, 1 - part), ((1 - part) * angle).sin() / sine)
    weight_b = torch.where(straight, torch.full_like(angle, part), (part * angle).sin() / sine)
    return (weight_a * flat_a + weight_b * flat_b).to(a.dtype).reshape(a.shape)


@torch.no_grad()
def probability_flow(model, noise, *, process, prediction, labels=None, guidance=1.0, rtol=1e-5, atol=1e-5,
                     method="RK45"):
    """x0 [B,C,H,W] by an adaptive solver of scipy's on the probability-flow ODE, and the number of model calls.

    The ODE is d(x/alpha) / dk = eps, solved in ln(k) from the noisiest level to the cleanest (Song et al. 2021,
    arXiv:2011.13456, appendix D); the last step to the data is Euler's. The whole batch shares its step sizes: an image
    depends on its batch mates within the tolerances. Raises ImportError without scipy, RuntimeError where it gives up.
    """
    from scipy.integrate import solve_ivp

    last, first = map(process.at, process.ends)
    guidance = _plain("probability_flow", guidance)
    sources, count = guidance.sources(0, 1), 0
    weights = (1.0,) if len(sources) == 1 else (guidance.scale, 1 - guidance.scale)
    program = Program([Call((), (), first, 0, sources)])
    program.integer_times = False
    ask = ModelCalls("probability_flow", model, labels, guidance, noise, program)

    def predicted(y, node, form):
        nonlocal count
        x = torch.as_tensor(node.alpha * y, dtype=torch.float32, device=noise.device).reshape(noise.shape)
        call = Call((), (), node, count, sources)
        time = torch.tensor(node.time, dtype=torch.float32, device=noise.device)
        answers = ask.answers(call, node.scale * x, time, ask.labels, ask.null)[:-1]
        ask.finite.check(count, answers)
        count += 1
        m = sum(weight * answer for weight, answer in zip(weights, answers, strict=True))
        c_x, c_m = (c.item() for c in coefficients(prediction, form, node.alpha, node.sigma))
        return c_x * x + c_m * m, x

    def slope(u, y):
        node = process.at(math.exp(u))
        eps, _ = predicted(y, node, "eps")
        return node.k * eps.double().cpu().numpy().reshape(-1)

    start = ((1.0 if process.prior == 1 else first.sigma) * noise / first.alpha).double().cpu().numpy().reshape(-1)
    found = solve_ivp(slope, (math.log(first.k), math.log(last.k)), start, method=method, rtol=rtol, atol=atol)
    if not found.success:
        raise RuntimeError(f"probability_flow: {method} gave up ({found.message}); loosen rtol and atol")
    x0, _ = predicted(found.y[:, -1], last, "x0")
    return x0, count
