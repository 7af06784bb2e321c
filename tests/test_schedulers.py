"""Fused diffusers schedulers against diffusers' own: whole trajectories, drawn options, the same model outputs."""
import contextlib
import copy
import inspect
import os
import pickle
import random
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.overrides import TorchFunctionMode

diffusers = pytest.importorskip("diffusers")

from diffusers.schedulers import deprecated  # noqa: E402

from difuse.integrations.schedulers import Fused, from_diffusers  # noqa: E402
from difuse_kernels import native, use_backend  # noqa: E402
from difuse_kernels.testing.numerics import FACTOR  # noqa: E402

SHAPE = (2, 4, 3, 5)
BETAS = [dict(beta_schedule=name) for name in ("linear", "scaled_linear", "squaredcos_cap_v2")] + [
    dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)]


NO_SIGMAS = dict(use_karras_sigmas=False, use_exponential_sigmas=False, use_beta_sigmas=False)


def pick(rng, **choices):
    """One value for each name; None leaves the default."""
    drawn = {name: rng.choice(values) for name, values in choices.items()}
    return {name: value for name, value in drawn.items() if value is not None}


def betas(rng):
    return rng.choice(BETAS)


def spacing(rng):
    return dict(timestep_spacing=rng.choice(["leading", "trailing", "linspace"]), steps_offset=rng.choice([0, 1]))


def sigmas(rng):
    name = rng.choice([None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
    return {name: True} if name else {}


def ddpm(rng):
    return dict(**betas(rng), **spacing(rng), **pick(
        rng, prediction_type=["epsilon", "sample", "v_prediction"], clip_sample=[True, False],
        clip_sample_range=[1.0, 0.7], thresholding=[False, False, True],
        variance_type=["fixed_small", "fixed_small_log", "fixed_large", "learned_range"])), {}


def ddim(rng):
    config = dict(**betas(rng), **spacing(rng), **pick(
        rng, prediction_type=["epsilon", "sample", "v_prediction"], clip_sample=[True, False],
        set_alpha_to_one=[True, False], thresholding=[False, False, True], rescale_betas_zero_snr=[False, False, True]))
    if config["rescale_betas_zero_snr"] and config["prediction_type"] == "epsilon":
        config["prediction_type"] = "v_prediction"  # else it divides by 0
    return config, pick(rng, eta=[None, 0.0, 0.5, 1.0], use_clipped_model_output=[None, True])


def euler(rng):
    config = dict(**betas(rng), **spacing(rng), **sigmas(rng), **pick(
        rng, prediction_type=["epsilon", "v_prediction", "sample"], final_sigmas_type=["zero", "sigma_min"],
        interpolation_type=["linear", "log_linear"], timestep_type=["discrete", "continuous"]))
    return config, rng.choice([{}, dict(s_churn=8.0, s_noise=1.01), dict(s_churn=3.0, s_tmin=0.1, s_tmax=5.0)])


def euler_ancestral(rng):
    return dict(**betas(rng), **spacing(rng), **pick(rng, prediction_type=["epsilon", "v_prediction"])), {}


def heun(rng):
    return dict(**betas(rng), **spacing(rng), **sigmas(rng), **pick(
        rng, prediction_type=["epsilon", "v_prediction", "sample"], clip_sample=[False, True])), {}


def flow_euler(rng):
    config = pick(rng, shift=[1.0, 3.0, 0.5], stochastic_sampling=[False, True], invert_sigmas=[False, False, True],
                  shift_terminal=[None, 0.1], time_shift_type=["exponential", "linear"])
    config.update(sigmas(rng))
    if rng.random() < 0.4:
        config.update(use_dynamic_shifting=True)
        return config, dict(set_timesteps=dict(mu=rng.choice([0.5, 1.15])))
    return config, {}


def flow_heun(rng):
    return pick(rng, shift=[1.0, 3.0, 0.5]), {}


def dpm(rng):
    config = dict(**betas(rng), **spacing(rng), **pick(
        rng, solver_order=[1, 2, 3], prediction_type=["epsilon", "sample", "v_prediction"],
        algorithm_type=["dpmsolver++", "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"],
        solver_type=["midpoint", "heun"], lower_order_final=[True, False], euler_at_final=[True, False],
        final_sigmas_type=["zero", "sigma_min"], thresholding=[False, False, True]))
    config.update(rng.choice([sigmas(rng), dict(use_lu_lambdas=True)]))
    if config["algorithm_type"] in ("dpmsolver", "sde-dpmsolver"):
        config["final_sigmas_type"] = "sigma_min"
        config["solver_order"] = min(config["solver_order"], 2 if config["algorithm_type"].startswith("sde") else 3)
    elif rng.random() < 0.3:
        config.update(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=rng.choice([1.0, 3.0]),
                      use_lu_lambdas=False, **NO_SIGMAS)
    return config, {}


def unipc(rng):
    config = dict(**betas(rng), **spacing(rng), **sigmas(rng), **pick(
        rng, solver_order=[1, 2, 3], prediction_type=["epsilon", "sample", "v_prediction"],
        predict_x0=[True, True, False], solver_type=["bh1", "bh2"], lower_order_final=[True, False],
        disable_corrector=[[], [0], [0, 1, 4]], final_sigmas_type=["zero", "sigma_min"],
        thresholding=[False, False, True]))
    if not config["predict_x0"]:
        config["final_sigmas_type"] = "sigma_min"
    elif rng.random() < 0.3:
        config.update(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=rng.choice([1.0, 3.0]),
                      **NO_SIGMAS)
    return config, {}


def edm(rng):
    return pick(rng, sigma_min=[0.002, 0.01], sigma_max=[80.0, 10.0], sigma_schedule=["karras", "exponential"],
                prediction_type=["epsilon", "v_prediction"], final_sigmas_type=["zero", "sigma_min"]), {}


def edm_dpm(rng):
    config, _ = edm(rng)
    return config | pick(
        rng, solver_order=[1, 2, 3], algorithm_type=["dpmsolver++", "sde-dpmsolver++"],
        solver_type=["midpoint", "heun"], lower_order_final=[True, False], euler_at_final=[True, False],
        thresholding=[False, True]), {}


def lcm(rng):
    return dict(**betas(rng), **pick(
        rng, prediction_type=["epsilon", "sample", "v_prediction"], clip_sample=[False, True],
        set_alpha_to_one=[True, False], thresholding=[False, False, True], timestep_scaling=[10.0, 1.0])), {}


def consistency(rng):
    return pick(rng, clip_denoised=[True, False], sigma_min=[0.002, 0.01], s_noise=[1.0, 1.01]), {}


def sde_ve(rng):
    return pick(rng, sigma_min=[0.01, 0.1], sigma_max=[1348.0, 50.0], snr=[0.15]), {}


def sde_vp(rng):
    return pick(rng, beta_min=[0.1, 0.2], beta_max=[20, 12], sampling_eps=[1e-3, 1e-2]), {}


def pndm(rng):
    return dict(**betas(rng), **spacing(rng), **pick(
        rng, prediction_type=["epsilon", "v_prediction"], skip_prk_steps=[True, False],
        set_alpha_to_one=[True, False])), {}


def dpm_sde(rng):
    return dict(**betas(rng), **spacing(rng), **sigmas(rng), **pick(
        rng, prediction_type=["epsilon", "v_prediction"], noise_sampler_seed=[0, 3])), {}


def deis(rng):
    return dict(**betas(rng), **spacing(rng), **sigmas(rng), **pick(
        rng, solver_order=[1, 2, 3], prediction_type=["epsilon", "sample", "v_prediction"],
        lower_order_final=[True, False], thresholding=[False, False, True])), {}


CASES = {"DDPMScheduler": ddpm, "DDIMScheduler": ddim, "EulerDiscreteScheduler": euler,
         "EulerAncestralDiscreteScheduler": euler_ancestral, "HeunDiscreteScheduler": heun,
         "FlowMatchEulerDiscreteScheduler": flow_euler, "FlowMatchHeunDiscreteScheduler": flow_heun,
         "DPMSolverMultistepScheduler": dpm, "UniPCMultistepScheduler": unipc, "EDMEulerScheduler": edm,
         "EDMDPMSolverMultistepScheduler": edm_dpm, "LCMScheduler": lcm, "CMStochasticIterativeScheduler": consistency,
         "DPMSolverSDEScheduler": dpm_sde, "ScoreSdeVeScheduler": sde_ve, "ScoreSdeVpScheduler": sde_vp,
         "PNDMScheduler": pndm, "DEISMultistepScheduler": deis}


def class_of(name):
    return getattr(diffusers, name, None) or getattr(deprecated, name)


DRAWN = int(os.environ.get("DIFUSE_SCHEDULERS", 12))  # configurations of each class; `make schedulers`: 200



def model(sample, k, channels):
    """An output of the size of a network's, whatever the sample's."""
    out = torch.sin(1.3 * sample + k) + 0.3 * torch.cos(2.1 * sample - k)
    return torch.cat((out, torch.sin(3 * sample)), 1) if channels == 2 else out


def trajectory(scheduler, steps, dtype, options, channels, outputs=None):
    """(what every step returns, the model's outputs): `outputs` are given, or the model's on these samples."""
    options = dict(options)
    scheduler.set_timesteps(steps, **options.pop("set_timesteps", {}))
    if isinstance(scheduler, diffusers.ScoreSdeVeScheduler):
        scheduler.set_sigmas(steps)
    step = getattr(scheduler, "step", None) or scheduler.step_pred
    generator = torch.Generator().manual_seed(7)
    sample = torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype)
    noise = {"generator": generator} if "generator" in inspect.signature(step).parameters else {}
    seen, given = [], []
    for k, t in enumerate(scheduler.timesteps):
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, t)
        given.append(model(sample, k, channels).to(dtype) if outputs is None else outputs[k])
        if isinstance(scheduler, deprecated.ScoreSdeVpScheduler):
            sample, mean = step(given[-1], sample, t, **noise)
            seen.append({"prev_sample": sample, "mean": mean})
            continue
        result = step(given[-1], t, sample, **noise, **options)
        sample = result.prev_sample
        seen.append({name: value for name, value in dict(result).items() if value is not None})
    return seen, given


def draw(name, seed):
    """A configuration, options of the steps, their number, and channels of the model's output per one of the sample."""
    rng = random.Random(f"{name} {seed}")
    config, options = CASES[name](rng)
    steps = rng.randint(1, {"LCMScheduler": 50, "CMStochasticIterativeScheduler": 39}.get(name, 100))
    return config, options, steps, 2 if config.get("variance_type") == "learned_range" else 1


class InFloat64(TorchFunctionMode):
    """diffusers without its roundings: samples stay in float64, noise is what float32 draws."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like):
            return func(*args, **{**kwargs, "dtype": torch.float32}).double()
        if func is torch.Tensor.to and args[0].dim() == 4 and torch.float32 in (*args[1:], *kwargs.values()):
            return args[0]
        return func(*args, **kwargs)


def compare(name, seed, dtype):
    """The largest error, relative to the largest number; None where diffusers itself refuses or fails.

    float64: from diffusers' formulas in float64. float32: from diffusers' results; where its own roundings are larger
    than that, nothing is counted that is within the error budget of every kernel, 1.5 times theirs.
    """
    config, options, steps, channels = draw(name, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers' own, about its options
        try:
            original = class_of(name)(**config)
            theirs, outputs = trajectory(copy.deepcopy(original), steps, torch.float32, options, channels)
        except (ValueError, IndexError, AssertionError, UnboundLocalError, RuntimeError):
            return None
        if not all(value.isfinite().all() for step in theirs for value in step.values()):
            return None
        exactly = [output.double() for output in outputs]
        with InFloat64():
            exact, _ = trajectory(copy.deepcopy(original), steps, torch.float64, options, channels, exactly)
        with (use_backend("reference" if dtype == torch.float64 else "auto"),  # the kernels take no float64
              InFloat64() if dtype == torch.float64 else contextlib.nullcontext()):
            ours, _ = trajectory(from_diffusers(original), steps, dtype, options, channels,
                                 exactly if dtype == torch.float64 else outputs)
    worst = 0.0
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == dtype and one[key].shape == other[key].shape
            size = truth[key].abs().max().clamp(min=1e-30)
            difference, error, their_error = (((a[key] - b[key]).abs().max() / size).item() for a, b in (
                (one, other), (one, truth), (other, truth)))
            if dtype == torch.float32:
                error = 0.0 if error <= FACTOR * their_error else difference
            worst = max(worst, error)
    return worst


@pytest.mark.parametrize("dtype, budget", [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_diffusers_own(name, dtype, budget):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde")
    compared = 0
    for seed in range(DRAWN):
        worst = compare(name, seed, dtype)
        if worst is not None:
            compared += 1
            assert worst <= budget, (seed, draw(name, seed), worst)
    assert compared >= DRAWN // 2


@pytest.mark.parametrize("name", [
    "CogVideoXDDIMScheduler", "DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler",
    "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler", "FlowMatchLCMScheduler", "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler", "SASolverScheduler", "TCDScheduler", "UnCLIPScheduler"])
def test_so_are_those_of_other_classes(name, monkeypatch):
    """Nobody wrote a line for them."""
    if not hasattr(diffusers, name):
        pytest.skip("this diffusers has none")
    monkeypatch.setitem(CASES, name, lambda rng: ({}, {}))
    found = [compare(name, seed, torch.float64) for seed in range(3)]
    assert all(worst is None or worst <= 1e-10 for worst in found) and found.count(None) < 3, found


def test_a_step_that_takes_its_time_last_is_fused_too():
    scheduler = fused(deprecated.ScoreSdeVpScheduler())
    x, m = tensors()
    x, mean = scheduler.step_pred(m, x, scheduler.timesteps[0], generator=torch.Generator().manual_seed(0))
    assert scheduler._trajectory.at == 1 and x.shape == mean.shape and not torch.equal(x, mean)


@pytest.mark.parametrize("name", ["BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"])
def test_schedulers_of_tokens_are_refused_by_name(name):
    if not hasattr(diffusers, name):
        pytest.skip("this diffusers has none")
    scheduler = fused(getattr(diffusers, name)())
    with pytest.raises(NotImplementedError, match=f"{name}: its step uses .* keep diffusers' own scheduler"):
        scheduler.step(torch.randn(2, 6, 9), scheduler.timesteps[0], torch.zeros(2, 6, dtype=torch.int64))


def fused(scheduler, steps=4, **changes):
    scheduler = from_diffusers(scheduler, **changes)
    scheduler.set_timesteps(steps)
    return scheduler


def tensors(dtype=torch.float32, shape=SHAPE, count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
                                  "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_a_step_is_one_pass_over_memory(name, monkeypatch):
    """One sampler_step per step; nothing else touches a whole tensor."""
    from difuse.integrations import schedulers

    calls, right = [], schedulers.sampler_step
    scheduler = fused(class_of(name)(**({"clip_sample": False} if name == "DDIMScheduler" else {})))

    def counted(*args, **kwargs):
        calls.append(args)
        return right(*args, **kwargs)

    monkeypatch.setattr(schedulers, "sampler_step", counted)
    x, m = tensors()
    for t in scheduler.timesteps:
        x = scheduler.step(m, t, x, return_dict=False)[0]
    assert len(calls) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "FlowMatchEulerDiscreteScheduler",
                                  "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler", "LCMScheduler"])
def test_in_half_precision_dtypes_are_diffusers_and_the_error_is_smaller(name, dtype):
    """Same dtypes and noise; no further from float64 than diffusers' roundings, and with rounding="diffusers" those."""
    config = {"clip_sample": False} if name in ("DDIMScheduler", "LCMScheduler") else {}
    original = class_of(name)(**config)
    theirs, outputs = trajectory(copy.deepcopy(original), 10, dtype, {}, 1)
    exact, _ = trajectory(copy.deepcopy(original), 10, torch.float64, {}, 1, [output.double() for output in outputs])
    ours, same = (trajectory(each, 10, dtype, {}, 1, outputs)[0] for each in (
        from_diffusers(original), from_diffusers(original, rounding="diffusers")))
    for one, other, third in zip(ours, theirs, same, strict=True):
        assert {key: value.dtype for key, value in one.items()} == {key: value.dtype for key, value in other.items()}
        assert all(torch.equal(third[key], other[key]) for key in other)
    if name not in ("EulerAncestralDiscreteScheduler", "LCMScheduler"):  # whose noise another dtype draws otherwise
        off = [(run[-1]["prev_sample"].double() - exact[-1]["prev_sample"]).abs().mean() for run in (ours, theirs)]
        assert off[0] <= 1.1 * off[1] + torch.finfo(dtype).eps


def test_it_is_the_scheduler_to_everyone_else(tmp_path):
    original = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    scheduler = fused(original)
    assert isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) and isinstance(scheduler, Fused)
    assert scheduler.config == original.config and type(scheduler).__name__ == type(original).__name__
    assert not isinstance(original, Fused) and original.num_inference_steps is None
    x, m = tensors()
    scheduler.step(m, scheduler.timesteps[0], x)
    for again in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(from_diffusers(original)))):
        again.set_timesteps(3)
        assert again.step(m, again.timesteps[0], x).prev_sample.shape == x.shape
    assert scheduler.step_index == 1
    scheduler.save_pretrained(tmp_path)
    loaded = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert loaded.config.use_karras_sigmas and not isinstance(loaded, Fused)
    assert from_diffusers(scheduler).__class__ is scheduler.__class__


def test_image_to_image_begins_in_the_middle():
    for name in ("DPMSolverMultistepScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
        results = []
        for make in (copy.deepcopy, from_diffusers):
            scheduler = make(class_of(name)())
            scheduler.set_timesteps(10)
            if name != "DDIMScheduler":
                scheduler.set_begin_index(6)
            x, m = tensors()
            for t in scheduler.timesteps[6:]:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(m, t, x).prev_sample
            results.append(x)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_noise_that_is_given_is_used():
    x, m, z = tensors(count=3)
    for name, options in (("DDIMScheduler", {"eta": 1.0}), ("DPMSolverMultistepScheduler", {})):
        config = {"algorithm_type": "sde-dpmsolver++"} if name.startswith("DPM") else {}
        results = []
        for make in (copy.deepcopy, from_diffusers):
            scheduler = make(class_of(name)(**config))
            scheduler.set_timesteps(4)
            results.append(scheduler.step(m, scheduler.timesteps[0], x, variance_noise=z, **options).prev_sample)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_another_order_of_steps():
    """DDIM keeps nothing from step to step and takes any time; a multistep solver says that it cannot."""
    x, m = tensors()
    ours, theirs = fused(diffusers.DDIMScheduler(), 10), diffusers.DDIMScheduler()
    theirs.set_timesteps(10)
    for i in (3, 3, 1, 7):
        t = ours.timesteps[i]
        for given in (t, int(t)):
            torch.testing.assert_close(ours.step(m, given, x).prev_sample, theirs.step(m, given, x).prev_sample,
                                       rtol=1e-5, atol=1e-5)
    solver = fused(diffusers.DPMSolverMultistepScheduler(), 10)
    solver.step(m, solver.timesteps[0], x)
    with pytest.raises(ValueError, match="does not follow the last one .*call set_timesteps first"):
        solver.step(m[:1], solver.timesteps[1], x[:1])
    solver.set_timesteps(10)
    solver.step(m[:1], solver.timesteps[0], x[:1])


def test_rewound_copied_and_changed_schedulers():
    """A step_index set back, a copy in the middle, tables replaced: what diffusers does, or a clear error."""
    x, m = tensors()
    results = []
    for make in (copy.deepcopy, from_diffusers):
        scheduler = make(diffusers.EulerDiscreteScheduler())
        scheduler.set_timesteps(5)
        sample = x
        for t in scheduler.timesteps[:3]:
            scheduler.scale_model_input(sample, t)
            scheduler.step(m, t, sample)
            scheduler._step_index -= 1  # as pipelines do that look ahead
            sample = scheduler.step(m, t, sample).prev_sample
        results.append(sample)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler", "DEISMultistepScheduler",
                 "HeunDiscreteScheduler", "LMSDiscreteScheduler"):
        scheduler = fused(class_of(name)(), 8)
        sample = x
        for t in scheduler.timesteps[:4]:
            scheduler.scale_model_input(sample, t)
            sample = scheduler.step(m, t, sample).prev_sample
        if not name.startswith("Heun"):  # which keeps nothing between its pairs of steps
            with pytest.raises(RuntimeError, match="in the middle of a trajectory"):
                pickle.dumps(scheduler)
        twin, other = copy.deepcopy(scheduler), sample
        for t in scheduler.timesteps[4:7]:
            sample = scheduler.step(m, t, sample).prev_sample
        for t in twin.timesteps[4:7]:
            other = twin.step(m, t, other).prev_sample
        assert torch.equal(sample, other), name
    ours, theirs = fused(diffusers.DDIMScheduler(clip_sample=False)), diffusers.DDIMScheduler(clip_sample=False)
    for tables in (ours.alphas_cumprod, ours.alphas_cumprod**1.3):
        for scheduler in (ours, theirs):
            scheduler.alphas_cumprod = tables
            scheduler.set_timesteps(4)
        t = ours.timesteps[1]
        got, expected = (each.step(m, t, x).prev_sample for each in (ours, theirs))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    ours, theirs = fused(diffusers.DDPMWuerstchenScheduler()), diffusers.DDPMWuerstchenScheduler()
    theirs.set_timesteps(4)
    t = ours.timesteps[0].expand(2)  # a time for each sample: diffusers' own step
    results = [each.step(m, t, x, generator=torch.Generator().manual_seed(0)).prev_sample for each in (ours, theirs)]
    assert torch.equal(*results)


def test_threads_with_schedulers_of_their_own():
    def run(seed):
        scheduler = from_diffusers(diffusers.DDPMScheduler())
        return trajectory(scheduler, 12, torch.float32, {}, 1)[0][-1]["prev_sample"]

    alone = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(each, alone) for each in pool.map(run, range(8)))


def test_what_cannot_be_fused_is_refused_by_name():
    with pytest.raises(TypeError, match="got str; expected a scheduler of diffusers"):
        from_diffusers("ddim")
    with pytest.raises(ValueError, match="rounding is 'bf16'; expected 'float32' or 'diffusers'"):
        from_diffusers(diffusers.DDIMScheduler(), rounding="bf16")

    class Softened(diffusers.DDIMScheduler):
        def step(self, model_output, timestep, sample, eta=0.0, generator=None, return_dict=True):
            return super().step(model_output.softmax(-1), timestep, sample)

    scheduler = fused(Softened())
    x, m = tensors()
    with pytest.raises(NotImplementedError, match="Softened: its step uses softmax on whole tensors"):
        scheduler.step(m, scheduler.timesteps[0], x)
    with pytest.raises(ValueError, match="both a generator and variance_noise"):
        fused(diffusers.DDIMScheduler()).step(m, scheduler.timesteps[0], x, eta=1.0, variance_noise=x,
                                              generator=torch.Generator())
    euler = fused(diffusers.EulerDiscreteScheduler())
    with pytest.raises(ValueError, match="integer indices"):
        euler.step(m, 3, x)
    with pytest.raises(ValueError, match="run 'set_timesteps'"):
        from_diffusers(diffusers.DPMSolverMultistepScheduler()).step(m, 3, x)


@pytest.mark.skipif(native.ext is None, reason="no native module")
def test_a_pipeline_takes_it():
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8,
                                        num_layers=2, sample_size=8, num_embeds_ada_norm=1000)
    vae = AutoencoderKL(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",),
                        up_block_types=("UpDecoderBlock2D",))
    pipe = DiTPipeline(transformer.eval(), vae.eval(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    images = []
    for scheduler in (pipe.scheduler, from_diffusers(pipe.scheduler)):
        pipe.scheduler = scheduler
        images.append(pipe([1, 2], num_inference_steps=4, generator=torch.Generator().manual_seed(0),
                           output_type="np").images)
    assert abs(images[0] - images[1]).max() < 1e-4
