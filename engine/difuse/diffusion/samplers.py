"""From noise to images. One function per method, one signature for all:

    sampler(model, noise, *, process, steps, prediction, labels=None, guidance=1.0, generators=None, callback=None,
            graphs=None)

model       called as model(x [B,C,H,W], t [B], labels [B]), or model(x, t) without labels; returns the prediction
            [B,C,H,W], or [B,2C,H,W] with a learned sigma, which the samplers do not use. A frozen model, whose class
            has for_trajectory(times, labels), is asked once for the model to call
noise       float32 [B,C,H,W], the state at the noisy end, as `initial_noise` draws it; it is not written to
steps       number of model calls
prediction  what the model predicts: "eps", "x0", "v" or "flow"
labels      int64 [B], or None for a model without classes
guidance    classifier-free guidance w; needs labels and `model.num_classes`, the null class
generators  one torch.Generator per sample, for the noise of stochastic samplers: an image does not depend on its
            batch mates. No number is drawn where its coefficient is zero.
callback    callback(step, x) after each step, step counting from 0
graphs      difuse.Graphs: steps are recorded as CUDA graphs and replayed. The same images, less work for the host
Returns x0 [B,C,H,W] float32. Raises ValueError or TypeError before the model is called for what does not fit.

In every method the next state is linear in the state, the model's output and fresh noise. `<name>_steps` writes that
line with the paper's symbols, x_t, x0 and eps standing for pairs (coefficient of the state, of the output), for all
steps at once in float64; `_integrate` then runs the model and one fused update per step.
"""
from dataclasses import dataclass

import torch

from difuse.diffusion.guidance import GuidedModel
from difuse.diffusion.parameterizations import coefficients
from difuse.diffusion.processes import VP, Flow
from difuse_kernels import sampler_step

X_T = torch.tensor([[1.0], [0.0]], dtype=torch.float64)  # the state itself, as a pair of coefficients [2,1]


@dataclass(frozen=True)
class Steps:
    """A method on a process, step by step: x' = mean[0] * x + mean[1] * (guided output) + std * (standard noise)."""

    times: torch.Tensor  # [steps], as the model is given them
    mean: torch.Tensor  # float64 [2,steps]
    std: torch.Tensor  # float64 [steps]

    def table(self, weights):
        """Coefficients of the state, of one output per weight of guidance, and of noise: float32 [steps,J]."""
        columns = [self.mean[0], *(weight * self.mean[1] for weight in weights), self.std]
        return torch.stack(columns, dim=1).float()


def ddpm_steps(process, steps, prediction):
    """The `Steps` of `ddpm`."""
    t, alpha, sigma, alpha_s, sigma_s = _vp_path("ddpm", process, steps)
    x0 = _predicted("x0", prediction, alpha, sigma)
    alpha_ts = alpha / alpha_s  # x_t = alpha_ts * x_s + noise of variance beta
    beta = sigma**2 - (alpha_ts * sigma_s) ** 2
    mean = (alpha_ts * sigma_s**2 * X_T + alpha_s * beta * x0) / sigma**2
    beta_tilde = beta * sigma_s**2 / sigma**2
    return Steps(process.model_time(t), mean, beta_tilde.sqrt())


@torch.no_grad()
def ddpm(model, noise, *, process, steps, prediction, labels=None, guidance=1.0, generators=None, callback=None,
         graphs=None):
    """Ancestral sampling from q(x_s | x_t, x0), Ho et al. 2020 (arXiv:2006.11239), equations 6 and 7, on VP.

    The variance is the posterior's, beta-tilde ("fixed small"); fewer steps than process.num_steps respace the chain
    (Nichol & Dhariwal 2021). Times as in `ddim`. Needs generators. The arguments are the module's.
    """
    return _integrate("ddpm", model, noise, ddpm_steps(process, steps, prediction), labels, guidance, generators,
                      callback, graphs)


def ddim_steps(process, steps, prediction, eta=0.0):
    """The `Steps` of `ddim`."""
    if not 0 <= eta <= 1:
        raise ValueError(f"ddim: eta is {eta}; expected 0 (deterministic) to 1 (as ddpm)")
    t, alpha, sigma, alpha_s, sigma_s = _vp_path("ddim", process, steps)
    x0 = _predicted("x0", prediction, alpha, sigma)
    eps = _predicted("eps", prediction, alpha, sigma)
    sigma_eta = eta * sigma_s / sigma * (1 - (alpha / alpha_s) ** 2).sqrt()
    mean = alpha_s * x0 + (sigma_s**2 - sigma_eta**2).sqrt() * eps
    return Steps(process.model_time(t), mean, sigma_eta)


@torch.no_grad()
def ddim(model, noise, *, process, steps, prediction, labels=None, guidance=1.0, eta=0.0, generators=None,
         callback=None, graphs=None):
    """Song et al. 2021 (arXiv:2010.02502), equations 12 and 16, on VP, in any number of steps up to process.num_steps.

    The times are evenly spaced from the noisiest, num_steps - 1, down, the last of equal steps leading to the data.
    eta = 0 is deterministic and needs no generators, eta = 1 is DDPM. The other arguments are the module's.
    """
    return _integrate("ddim", model, noise, ddim_steps(process, steps, prediction, eta), labels, guidance, generators,
                      callback, graphs)


def flow_euler_steps(process, steps, prediction):
    """The `Steps` of `flow_euler`."""
    _check_steps("flow_euler", process, Flow, steps)
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    velocity = _predicted("flow", prediction, alpha[:-1], sigma[:-1])
    mean = X_T + (t[1:] - t[:-1]) * velocity
    return Steps(process.model_time(t[:-1]), mean, torch.zeros_like(t[1:]))


@torch.no_grad()
def flow_euler(model, noise, *, process, steps, prediction, labels=None, guidance=1.0, generators=None, callback=None,
               graphs=None):
    """Euler's method on dx/dt = noise - x0 from t = 1 to t = 0 in equal steps, on Flow (arXiv:2209.03003).

    Deterministic: generators are not used. The arguments are the module's.
    """
    return _integrate("flow_euler", model, noise, flow_euler_steps(process, steps, prediction), labels, guidance,
                      generators, callback, graphs)


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "flow_euler": flow_euler}
STEPS = {"ddpm": ddpm_steps, "ddim": ddim_steps, "flow_euler": flow_euler_steps}


def initial_noise(shape, seeds, device="cpu"):
    """Standard normal noise [B,*shape] and its generators, one per seed; `shape` is that of one sample, (C,H,W).

    Sample i comes from a CPU generator seeded seeds[i], whatever the device and the batch. Hand the generators on to
    the sampler: they continue each sample's own stream.
    """
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    if not generators:
        raise ValueError("initial_noise: seeds is empty; expected one integer per sample")
    return _draw(shape, generators, device), generators


def _draw(shape, generators, device):
    z = torch.stack([torch.randn(shape, generator=g, device=g.device, dtype=torch.float32) for g in generators])
    if z.is_cpu and torch.device(device).type == "cuda":
        return z.pin_memory().to(device, non_blocking=True)  # from pageable memory the copy would wait for the GPU
    return z.to(device)


def _check_steps(sampler, process, kind, steps):
    if not isinstance(process, kind):
        raise ValueError(f"{sampler}: process is {type(process).__name__}; expected {kind.__name__}. Use "
                         f"{'flow_euler' if isinstance(process, Flow) else 'ddim or ddpm'} with it")
    limit = process.num_steps if kind is VP else float("inf")
    if not isinstance(steps, int) or not 1 <= steps <= limit:
        raise ValueError(f"{sampler}: steps is {steps!r}; expected an integer from 1 to {limit}")


def _vp_path(sampler, process, steps):
    """t and (alpha, sigma) at each step's start t and end s, each [steps]; the last end is the data, (1, 0)."""
    _check_steps(sampler, process, VP, steps)
    t = process.num_steps - 1 - torch.arange(steps) * process.num_steps // steps  # int64, distinct
    alpha, sigma = process.alpha_sigma(t)
    return t, alpha, sigma, torch.cat((alpha[1:], torch.ones(1))), torch.cat((sigma[1:], torch.zeros(1)))


def _predicted(target, prediction, alpha, sigma):
    return torch.stack(coefficients(prediction, target, alpha, sigma))  # [2,steps]


def _integrate(sampler, model, noise, method, labels, guidance, generators, callback, graphs):
    """From `noise` through all steps of `method`."""
    if not isinstance(noise, torch.Tensor) or noise.dtype != torch.float32:
        got = noise.dtype if isinstance(noise, torch.Tensor) else type(noise).__name__
        raise TypeError(f"{sampler}: noise is {got}; expected a float32 tensor [B,C,H,W], see initial_noise")
    if noise.dim() < 3:
        raise ValueError(f"{sampler}: noise has shape {tuple(noise.shape)}; expected [B,C,H,W]")
    if method.std.any() and (generators is None or len(generators) != len(noise)):
        raise ValueError(f"{sampler}: got {'no' if generators is None else len(generators)} generators for "
                         f"{len(noise)} samples, and each step draws noise; give one torch.Generator per sample")
    predict = GuidedModel(sampler, model, labels, guidance, noise)
    if labels is not None and hasattr(type(model), "for_trajectory"):  # a frozen model: some work is done once
        predict.model = model.for_trajectory(method.times, predict.labels.unique())
    table = method.table(predict.weights).to(noise.device)[:, None]  # [steps,1,J]
    times = method.times.to(noise.device)

    def advance(x, t, coefficients, labels, z):
        inputs = (x, *predict(x, t, labels)) + (() if z is None else (z,))
        return sampler_step(inputs, coefficients[:, : len(inputs)], out_dtypes=(torch.float32,))[0]  # [B,C,H,W]

    if graphs is not None:
        advance = graphs.bind(advance, model, len(predict.weights))
    x = noise
    for step, noise_scale in enumerate(method.std.tolist()):
        z = _draw(x.shape[1:], generators, x.device) if noise_scale > 0 else None
        x = advance(x, times[step], table[step], predict.labels, z)
        if callback is not None:
            callback(step, x if graphs is None else x.clone())
    return x if graphs is None else x.clone()
