"""Every sampler on a Gaussian mixture, whose score is known: orders, distributions, guidance, control."""
import copy
import functools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from difuse.diffusion import (
    APG,
    EDM,
    SAMPLERS,
    VESDE,
    VP,
    VPSDE,
    Flow,
    Guidance,
    Previews,
    SubVPSDE,
    coefficients,
    invert,
    path,
    probability_flow,
    skip_layers,
    slerp,
)
from difuse.diffusion.method import record
from difuse.diffusion.program import Map, Run
from difuse.diffusion.samplers import _ANY
from difuse.models import DiT
from difuse_kernels import use_backend

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[-1.0, 0.4], [0.7, -0.6], [0.2, 1.1]], dtype=torch.float64)
STDS = torch.tensor([0.5, 0.35, 0.6], dtype=torch.float64)


def log_density(x, alpha, sigma, weights=WEIGHTS):
    """ln p_t(x) [B*H*W] of alpha * (mixture) + sigma * (noise), x [B,2,H,W], up to a constant."""
    variance = alpha**2 * STDS**2 + sigma**2  # [3]
    points = x.movedim(1, -1).reshape(-1, 2)  # [B*H*W,2], each of its own
    distance = ((points[:, None] - alpha * MEANS) ** 2).sum(-1)  # [B*H*W,3]
    return torch.logsumexp(weights.log() - variance.log() - distance / (2 * variance), 1)


def score(x, node, weights=WEIGHTS):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(log_density(x, node.alpha, node.sigma, weights).sum(), x)[0]


def prediction_of(kind, x, node, weights=WEIGHTS):
    """What an exact network says: the score in another form."""
    c_x, c_m = coefficients("score", kind, node.alpha, node.sigma)
    return c_x * x + c_m * score(x, node, weights)


def nodes_between(process, k_first, k_last, h):
    """Steps of h in ln(k), the first and last ever smaller: what starts with low order does so in tiny steps."""
    small = [h**2 * 2**i for i in range(12) if h**2 * 2**i < h]
    span = math.log(k_first / k_last) - 2 * sum(small)
    count = round(span / h)
    steps = [*small, *([span / count] * count), *small[::-1]]
    return [process.at(k_first * math.exp(-at)) for at in np.concatenate([[0], np.cumsum(steps)])]


def trajectory(name, nodes, process, noise, prediction="eps", guidance=1.0, weights=(WEIGHTS,), generator=None,
               **options):
    """The end of a sampler's path over these nodes, in float64; also how many calls it made."""
    sampler = SAMPLERS[name]
    if sampler._asks_process:
        options["process"] = process
    guidance = guidance if isinstance(guidance, Guidance) else Guidance(guidance)
    program = record(functools.partial(sampler._method, **options), nodes, prediction, guidance)
    run = Run(program, (noise,), lambda: torch.randn(noise.shape, generator=generator, dtype=noise.dtype))
    with use_backend("reference"):  # which takes float64
        while (asked := run.advance()) is not None:
            call, given = asked
            x = given / call.node.scale
            answers = [prediction_of(prediction, x, call.node, w) for w, _ in zip(weights, call.sources, strict=False)]
            run.give((*answers, answers[0]))
    return run.x, len(program.calls)


def solution(process, k_first, k_last, x):
    """The probability-flow ODE by scipy, to 1e-12: d(x/alpha) = eps dk."""
    def slope(u, y):
        node = process.at(math.exp(u))
        eps = prediction_of("eps", torch.from_numpy(node.alpha * y).reshape(x.shape), node)
        return node.k * eps.numpy().reshape(-1)

    found = solve_ivp(slope, (math.log(k_first), math.log(k_last)), (x / process.at(k_first).alpha).numpy().reshape(-1),
                      method="DOP853", rtol=1e-12, atol=1e-12)
    return process.at(k_last).alpha * torch.from_numpy(found.y[:, -1]).reshape(x.shape)


ORDERS = [("ddim", {}, 1), ("euler", {}, 1), ("heun", {}, 2), ("dpm_solver_2", {}, 2), ("dpm_solver_3", {}, 3),
          ("dpm_solver_pp_2m", {}, 2), ("dpm_solver_pp_3m", {}, 3), ("unipc", {"order": 1}, 2),
          ("unipc", {"order": 2}, 3), ("unipc", {"order": 3}, 4), ("unipc", {"order": 2, "variant": "bh1"}, 3),
          ("unipc", {"order": 3, "variant": "bh1"}, 4), ("pndm", {}, 2), ("deis", {"order": 1}, 1),
          ("deis", {"order": 2}, 2), ("deis", {"order": 3}, 3), ("deis", {"order": 4}, 4),
          ("euler_ancestral", {"eta": 0.0}, 1), ("dpm_solver_pp_sde", {"eta": 0.0}, 2)]


def slope(name, process, options, prediction, widths):
    noise = torch.randn(24, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, last = 8.0, 0.15
    start = process.at(first).alpha * first * noise
    exact = solution(process, first, last, start)
    errors = [(trajectory(name, nodes_between(process, first, last, h), process, start, prediction, **options)[0]
               - exact).square().mean().sqrt().item() for h in widths]
    return np.polyfit(np.log(widths), np.log(errors), 1)[0], errors


@pytest.mark.parametrize("process", [VPSDE(), Flow(), EDM()], ids=lambda process: process.name)
@pytest.mark.parametrize("name, options, order", ORDERS, ids=[f"{name}-{options}" for name, options, _ in ORDERS])
def test_errors_fall_with_the_order_of_the_method(name, options, order, process):
    if not SAMPLERS[name].takes(process):
        pytest.skip("not a method for this process")
    finest = {1: 128, 2: 64, 3: 32, 4: 128}[order]
    widths = 4 / finest, 2 / finest, 1 / finest
    found, errors = slope(name, process, options, "eps", widths)
    assert abs(found - order) < 0.15, (found, errors)


@pytest.mark.parametrize("name, order", [("flow_euler", 1), ("flow_heun", 2)])
def test_methods_of_the_straight_path_fall_with_their_order(name, order):
    found, errors = slope(name, Flow(), {}, "flow", (1 / 32, 1 / 64, 1 / 128))
    assert abs(found - order) < 0.15, (found, errors)


STOCHASTIC = [("ddpm", VPSDE(), {}), ("ddpm", VP("cosine"), {"variance": "large"}), ("ddim", VPSDE(), {"eta": 1.0}),
              ("ddim", SubVPSDE(), {"eta": 0.6}), ("euler", EDM(), {"s_churn": 40.0}), ("euler_ancestral", EDM(), {}),
              ("euler_ancestral", VPSDE(), {}), ("heun", EDM(), {"s_churn": 40.0}),
              ("dpm_solver_pp_2m_sde", VPSDE(), {}),
              ("dpm_solver_pp_2m_sde", Flow(), {}), ("dpm_solver_pp_sde", EDM(), {}), ("ancestral_ve", VESDE(), {}),
              ("reverse_diffusion", VESDE(), {}), ("reverse_diffusion", VPSDE(), {}),
              ("predictor_corrector", VESDE(), {"snr": 0.1}), ("predictor_corrector", VPSDE(), {"snr": 0.05})]


def moments(x):
    x = x.movedim(1, -1).reshape(-1, 2)
    return x.mean(0), torch.cov(x.T)


def exact_moments():
    mean = (WEIGHTS[:, None] * MEANS).sum(0)
    spread = (MEANS - mean)
    return mean, torch.einsum("i,ij,ik->jk", WEIGHTS, spread, spread) + (WEIGHTS * STDS**2).sum() * torch.eye(2)


@pytest.mark.parametrize("name, process, options", STOCHASTIC, ids=[f"{n}-{p.name}-{o}" for n, p, o in STOCHASTIC])
def test_stochastic_samplers_reach_the_data_s_mean_and_covariance(name, process, options):
    """Within five standard errors of 4,000 samples."""
    generator = torch.Generator().manual_seed(3)
    nodes = path(process, 200, "log_snr")
    # many points a sample, as an image has: a Langevin step's length is a sample's, and one point's would bias it
    noise = torch.randn(4, 2, 40, 25, generator=generator, dtype=torch.float64)
    # the prior of a process is not quite what its data becomes: start from that
    pick = torch.multinomial(WEIGHTS, 4000, replacement=True, generator=generator)
    data = (MEANS[pick] + STDS[pick, None] * torch.randn(4000, 2, generator=generator, dtype=torch.float64))
    start = nodes[0].alpha * data.reshape(4, 40, 25, 2).movedim(-1, 1) + nodes[0].sigma * noise
    prediction = "flow" if isinstance(process, Flow) else "eps"
    x, _ = trajectory(name, nodes, process, start, prediction, generator=generator, **options)
    (mean, covariance), (true_mean, true_covariance) = moments(x), exact_moments()
    error = (true_covariance.diag() / 4000).sqrt()
    assert ((mean - true_mean).abs() < 5 * error).all(), (mean, true_mean)
    products = true_covariance.diag().outer(true_covariance.diag())
    error = ((products + true_covariance**2) / 4000).sqrt()
    assert ((covariance - true_covariance).abs() < 5 * error).all(), (covariance, true_covariance)


NULL = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64) / 3


def test_guidance_follows_the_tilted_density():
    """w s(x|c) + (1 - w) s(x) is the gradient of ln p_t(x|c)^w p_t(x)^(1-w), in every step's coefficients."""
    process, w = VPSDE(), 2.5
    nodes = [process.at(k) for k in (2.0, 1.2)]
    x = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got, _ = trajectory("euler", nodes, process, x, "eps", w, (WEIGHTS, NULL))
    with torch.enable_grad():
        y = x.clone().requires_grad_()
        t = nodes[0]
        tilted = w * log_density(y, t.alpha, t.sigma) + (1 - w) * log_density(y, t.alpha, t.sigma, NULL)
        gradient = torch.autograd.grad(tilted.sum(), y)[0]
    k_t, k_s = nodes[0].k, nodes[1].k
    expected = nodes[1].alpha * (x / t.alpha + (k_s - k_t) * -t.sigma * gradient)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score"])
def test_a_classifier_s_gradient_is_added_to_the_score(prediction):
    """From the null density to the conditional one: p(x|c) is p(x) p(c|x), whatever the network predicts."""
    process = VPSDE()
    nodes = [process.at(k) for k in (2.0, 1.2, 0.6)]
    x = torch.randn(6, 2, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    by_time = {node.time: node for node in nodes}

    def log_p(x, t, labels):
        node = min(nodes, key=lambda each: abs(each.time - t[0].item()))
        assert abs(node.time - t[0].item()) < 1e-3 and by_time
        return log_density(x, node.alpha, node.sigma) - log_density(x, node.alpha, node.sigma, NULL)

    got, _ = trajectory("euler", nodes, process, x, prediction, Guidance(classifier=log_p), (NULL,))
    expected, _ = trajectory("euler", nodes, process, x, prediction, 1.0, (WEIGHTS,))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def plain(cond, null, w):
    return w * cond + (1 - w) * null


def rescaled(cond, null, w, phi):
    m = plain(cond, null, w)
    std = [value.flatten(1).std(1)[:, None, None, None] for value in (cond, m)]
    return phi * m * std[0] / std[1] + (1 - phi) * m


def zero_star(cond, null, w):
    a = ((cond * null).flatten(1).sum(1) / null.flatten(1).square().sum(1))[:, None, None, None]
    return a * null + w * (cond - a * null)


def per_token(cond, null, w):
    m = plain(cond, null, w)
    return m * cond.norm(dim=1, keepdim=True) / m.norm(dim=1, keepdim=True)


def projected(differences, cond, w, eta, threshold, momentum):
    difference = 0
    for each in differences:
        difference = each + momentum * difference
    length = difference.flatten(1).norm(dim=1)[:, None, None, None]
    if threshold:
        difference = difference * (threshold / length).clamp(max=1)
    unit = cond / cond.flatten(1).norm(dim=1)[:, None, None, None]
    along = (difference * unit).flatten(1).sum(1)[:, None, None, None] * unit
    return cond + (w - 1) * (difference - along + eta * along)


@pytest.mark.parametrize("rule, formula", [
    ({"rescale": 0.7}, lambda c, n, w: rescaled(c[-1], n[-1], w, 0.7)),
    ({"zero_star": True}, lambda c, n, w: zero_star(c[-1], n[-1], w)),
    ({"per_token": True}, lambda c, n, w: per_token(c[-1], n[-1], w)),
    ({"apg": APG(eta=0.2)}, lambda c, n, w: projected([c[-1] - n[-1]], c[-1], w, 0.2, 0, 0)),
    ({"apg": APG(threshold=0.5, momentum=-0.5)}, lambda c, n, w: projected(
        [a - b for a, b in zip(c, n, strict=True)], c[-1], w, 0, 0.5, -0.5))],
    ids=["rescale", "zero_star", "per_token", "apg", "apg with momentum"])
def test_rules_that_need_whole_samples_are_the_papers(rule, formula):
    """Two steps of Euler's, each from the state it started at, against the rule written out."""
    process, w = VPSDE(), 3.0
    nodes = [process.at(k) for k in (3.0, 1.5, 0.7)]
    x = torch.randn(4, 3, 5, 3, generator=torch.Generator().manual_seed(0))
    program = record(functools.partial(SAMPLERS["euler"]._method, process=process), nodes, "eps", Guidance(w, **rule))
    states, conds, nulls = [x], [], []
    run = Run(program, (x,), None, lambda step, x: states.append(x))
    while (asked := run.advance()) is not None:
        _, given = asked
        cond, null = torch.sin(2 * given) + 0.3 * given, torch.cos(given)
        conds.append(cond.double())
        nulls.append(null.double())
        run.give((cond, null, cond))
        if run.advance() is None or len(states) > len(conds):
            t, s = nodes[len(conds) - 1 : len(conds) + 1]
            m = formula(conds, nulls, w)
            expected = s.alpha * (states[-2].double() / t.alpha + (s.k - t.k) * m)
            torch.testing.assert_close(states[-1].double(), expected, rtol=2e-6, atol=2e-6)
    assert len(conds) == 2


def test_a_linear_step_is_one_pass_and_its_width_is_the_method_s():
    """Between two calls: one map; a solver's history is as many tensors as it needs, and nobody's is written twice."""
    outputs = {"ddim": 1, "euler": 1, "dpm_solver_pp_2m": 2, "dpm_solver_pp_3m": 2, "unipc": 3, "deis": 2,
               "flow_euler": 1, "ddpm": 1, "euler_ancestral": 1, "dpm_solver_pp_2m_sde": 2}
    for name, most in outputs.items():
        process, kind = (Flow(), "flow") if name == "flow_euler" else (VP(), "eps")
        program = SAMPLERS[name].program(process, 12, kind, 4.0)
        maps = [each for each in program.instructions if isinstance(each, Map)]
        assert len(maps) == len(program.calls) == 12, name
        assert max(len(each.outputs) for each in maps) == most, name
        assert max(len(each.inputs) for each in maps) <= 8, name


def smooth(x, t, y=None):
    return 0.7 * torch.sin(x + 1e-3 * t.reshape(-1, 1, 1, 1).float()) + 0.2 * x


PROCESSES = [VP(), VP("scaled_linear"), VP("cosine"), VP("sigmoid"), VPSDE(), SubVPSDE(), VESDE(), EDM(), Flow(),
             Flow(3.0), Flow(3.0, terminal=0.1)]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: "-".join(map(str, process.config.values())))
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_runs_on_every_process_it_takes(name, process):
    sampler = SAMPLERS[name]
    prediction = "flow" if isinstance(process, Flow) else "edm" if isinstance(process, EDM) else "eps"
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    steps = []
    arguments = dict(process=process, steps=5, prediction=prediction, generators=generators,
                     callback=lambda step, x: steps.append(step))
    if not sampler.takes(process):
        with pytest.raises(ValueError, match=f"{name}: process is {type(process).__name__}; expected"):
            sampler(smooth, noise, **arguments)
        return
    at_noise = ("heun", "euler_ancestral", "dpm_solver_2", "dpm_solver_3", "pndm", "deis", "dpm_solver_pp_sde")
    if isinstance(process, Flow) and name in at_noise:
        try:
            x = sampler(smooth, noise, **arguments)
        except ValueError as error:
            assert "alpha = 0" in str(error), error  # noqa: PT017
            return
    else:
        x = sampler(smooth, noise, **arguments)
    assert x.shape == noise.shape and x.isfinite().all() and steps == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential", "beta", "log_snr"])
@pytest.mark.parametrize("process", [VP(), VP("cosine", 50), Flow(2.0), EDM(), VESDE(), VPSDE()], ids=lambda p: p.name)
def test_grids_fall_from_noise_to_data(process, spacing):
    if not isinstance(process, VP) and spacing in ("trailing", "leading", "linspace"):
        with pytest.raises(ValueError, match=f"spacing '{spacing}' does not fit {type(process).__name__}"):
            path(process, 10, spacing)
        return
    for steps in (1, 2, 10):
        nodes = path(process, steps, spacing)
        k = [node.k for node in nodes]
        assert len(nodes) == steps + 1 and k[-1] == 0 and all(a > b for a, b in zip(k, k[1:], strict=False))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda process: "-".join(map(str, process.config.values())))
def test_at_finds_the_node_of_a_level(process):
    """time, alpha and sigma of a level are those of the process at that time."""
    for node in path(process, 7)[:-1]:
        if math.isfinite(node.k):
            again = process.at(node.k)
            assert again.alpha == pytest.approx(node.alpha, rel=1e-9)
            assert again.sigma == pytest.approx(node.sigma, rel=1e-9)
            assert again.time == pytest.approx(node.time, rel=1e-6, abs=1e-6)


def test_zero_terminal_snr_ends_in_noise_and_keeps_the_first():
    plain, process = VP("scaled_linear"), VP("scaled_linear", zero_snr=True)
    assert process.alpha[-1] == 0 and process.sigma[-1] == 1
    torch.testing.assert_close(process.alpha[0], plain.alpha[0], rtol=1e-12, atol=0)
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for name in ("ddim", "dpm_solver_pp_2m", "unipc", "euler"):
        x = SAMPLERS[name](smooth, noise, process=process, steps=6, prediction="v")
        assert x.isfinite().all(), name
    with pytest.raises(ValueError, match="predicts eps says nothing about x0 where alpha is 0"):
        SAMPLERS["ddim"](smooth, noise, process=process, steps=6, prediction="eps")


def test_image_to_image_starts_from_the_image():
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    image, process, seen = torch.full_like(noise, 0.5), VP(), []

    def model(x, t):
        seen.append((x.clone(), t[0].item()))
        return smooth(x, t)

    x = SAMPLERS["ddim"](model, noise, process=process, steps=10, prediction="eps", image=image, strength=0.4)
    times = [node.time for node in path(process, 10)[6:-1]]
    assert [t for _, t in seen] == times and len(times) == 4
    alpha, sigma = process.alpha_sigma(torch.tensor(int(times[0])))
    torch.testing.assert_close(seen[0][0], (alpha * image + sigma * noise).float(), rtol=1e-6, atol=1e-6)
    assert x.isfinite().all()


@pytest.mark.parametrize("name", ["ddim", "unipc", "euler_ancestral"])
def test_inpainting_keeps_the_image_where_the_mask_is_0(name):
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    image, mask = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)), torch.zeros_like(noise)
    mask[..., :2] = 1
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x = SAMPLERS[name](smooth, noise, process=VP(), steps=6, prediction="eps", image=image, mask=mask,
                       generators=generators)
    assert torch.equal(x[..., 2:], image[..., 2:]) and not torch.equal(x[..., :2], image[..., :2])
    whole = torch.ones_like(mask)
    free = SAMPLERS[name](smooth, noise, process=VP(), steps=6, prediction="eps", generators=[
        torch.Generator().manual_seed(i) for i in range(2)])
    sigma = VP().alpha_sigma(torch.tensor(999))[1].item()
    masked = SAMPLERS[name](smooth, sigma * noise, process=VP(), steps=6, prediction="eps", image=0 * image, mask=whole,
                            generators=[torch.Generator().manual_seed(i) for i in range(2)])
    assert (free - masked).abs().max() < 1e-3 * free.abs().max()  # the same but for where it starts


def test_a_callback_may_replace_the_state_stop_and_see_the_data():
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    run = functools.partial(SAMPLERS["dpm_solver_pp_2m"], smooth, noise, process=VP(), steps=6, prediction="eps")
    steps = []

    def stop(step, x):
        steps.append((step, x))
        return step < 2

    x = run(callback=stop)
    assert [step for step, _ in steps] == [0, 1, 2] and x is steps[-1][1]
    assert run(callback=lambda step, x: torch.zeros_like(x) if step == 5 else None).abs().max() == 0
    previews = []
    x = run(callback=Previews(lambda step, x, x0: previews.append(x0)))
    assert len(previews) == 6 and torch.equal(x, run())
    torch.testing.assert_close(previews[-1], x)
    with pytest.raises(ValueError, match="the callback returned torch.float32 .2, 1, 4.* as the state; expected"):
        run(callback=lambda step, x: x[..., 0])


@pytest.mark.parametrize("step", [0, 3])
def test_numbers_that_are_not_finite_stop_the_run_and_name_the_step(step):
    calls = []

    def model(x, t):
        calls.append(t)
        out = smooth(x, t)
        if len(calls) == step + 1:
            out[0, 0, 0, :3] = float("nan")
        return out

    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(FloatingPointError, match=f"the model returned 3 numbers that are not finite at step {step}"):
        SAMPLERS["ddim"](model, noise, process=VP(), steps=6, prediction="eps")
    assert len(calls) == step + 1


def test_an_interval_of_guidance_saves_rows():
    rows = []

    def model(x, t, y):
        rows.append(len(x))
        return smooth(x, t)

    model.num_classes = 3
    noise, labels = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    SAMPLERS["ddim"](model, noise, process=VP(), steps=10, prediction="eps", labels=labels,
                     guidance=Guidance(3.0, interval=(0.2, 0.7)))
    assert rows == [2, 2, 4, 4, 4, 4, 4, 2, 2, 2]


def test_two_passes_give_what_one_gives():
    def model(x, t, y):
        return smooth(x, t) + 0.1 * y.reshape(-1, 1, 1, 1)

    model.num_classes = 3
    noise, labels = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    one, two = (SAMPLERS["unipc"](model, noise, process=VP(), steps=5, prediction="eps", labels=labels,
                                  guidance=Guidance(3.0, passes=passes)) for passes in (1, 2))
    assert torch.equal(one, two)


def test_other_models_guide():
    """A weaker model takes the null answer's place; a model without layers adds its difference."""
    def model(x, t, y):
        return smooth(x, t)

    def other(x, t, y):
        return 0.5 * x

    noise, labels = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    run = functools.partial(SAMPLERS["ddim"], noise=noise, process=VP(), steps=3, prediction="eps", labels=labels)
    weak = run(model, guidance=Guidance(2.0, weak=other))
    mixed = run(lambda x, t, y: 2 * model(x, t, y) - other(x, t, y))
    torch.testing.assert_close(weak, mixed, rtol=1e-4, atol=1e-4)
    skipped = run(model, guidance=Guidance(skip=other, skip_scale=1.5))
    mixed = run(lambda x, t, y: 2.5 * model(x, t, y) - 1.5 * other(x, t, y))
    torch.testing.assert_close(skipped, mixed, rtol=1e-4, atol=1e-4)


REFUSED = [
    ("euler", {"eta": 0.5}, TypeError, ["euler: option 'eta' is unknown", "did you mean"]),
    ("flow_euler", {"eta": 0.5}, TypeError, ["option 'eta' is unknown", "it has none"]),
    ("flow_euler", {"process": Flow(), "prediction": "v"}, ValueError, ["'v' with Flow", "'flow'"]),
    ("ddim", {"prediction": "edm"}, ValueError, ["'edm' with VP", "EDM"]),
    ("ddim", {"steps": 0}, ValueError, ["steps is 0", "1 to 1000"]),
    ("ddim", {"steps": [0, 500]}, ValueError, ["falling from noise to data"]),
    ("ddim", {"steps": [500, 200], "spacing": "karras"}, ValueError, ["'karras' beside a list"]),
    ("ddim", {"spacing": "kares"}, ValueError, ["'kares'", "did you mean 'karras'"]),
    ("unipc", {"order": 4}, ValueError, ["unipc: order is 4"]),
    ("unipc", {"variant": "bh3"}, ValueError, ["variant is 'bh3'"]),
    ("deis", {"order": 5}, ValueError, ["order is 5"]),
    ("ddpm", {"variance": "tiny"}, ValueError, ["variance is 'tiny'"]),
    ("predictor_corrector", {"snr": 0}, ValueError, ["snr is 0"]),
    ("ddim", {"mask": torch.ones(2, 1, 4, 4)}, ValueError, ["need an image"]),
    ("ddim", {"strength": 0.5}, ValueError, ["need an image"]),
    ("ddim", {"image": torch.ones(2, 1, 4, 4), "strength": 0.0}, ValueError, ["strength is 0.0"]),
    ("ddim", {"image": torch.ones(2, 1, 4, 5)}, ValueError, ["image is torch.float32 (2, 1, 4, 5)", "(2, 1, 4, 4)"]),
    ("ddim", {"image": torch.ones(2, 1, 4, 4), "mask": torch.ones(2, 1, 4, 4, dtype=torch.bool)}, ValueError,
     ["mask is torch.bool"]),
]


@pytest.mark.parametrize("name, change, error, words", REFUSED, ids=[f"{case[0]}-{list(case[1])}" for case in REFUSED])
def test_what_does_not_fit_is_refused_before_the_model_is_called(name, change, error, words):
    def model(x, t):
        raise AssertionError("called")

    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    arguments = {"process": Flow() if name.startswith("flow") else VP(), "steps": 4,
                 "prediction": "flow" if name.startswith("flow") else "eps", **change}
    with pytest.raises(error) as caught:
        SAMPLERS[name](model, noise, **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("change, words", [
    ({"scale": "2"}, "guidance is '2'"), ({"scale": math.nan}, "guidance is nan"),
    ({"scale": 2.0, "interval": (0.7, 0.2)}, "interval is"), ({"scale": 2.0, "rescale": 1.5}, "rescale is 1.5"),
    ({"scale": 2.0, "rescale": 0.5, "zero_star": True}, "one rule at a time"), ({"rescale": 0.5}, "scale != 1"),
    ({"skip_scale": 2.0}, "go together"), ({"scale": 2.0, "passes": 3}, "passes is 3")], ids=str)
def test_guidance_that_contradicts_itself_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Guidance(**change)


def test_every_process_has_a_sampler():
    assert all(any(sampler.takes(process) for sampler in SAMPLERS.values()) for process in PROCESSES)
    assert len(_ANY) == 6


@pytest.mark.parametrize("process, prediction", [(VP(), "eps"), (VP(), "v"), (Flow(), "flow"), (EDM(), "edm")],
                         ids=lambda value: getattr(value, "name", value))
def test_inversion_finds_the_noise_again(process, prediction):
    """Noise to image to noise to image: the same within rounding, guided too."""
    def model(x, t, y):
        return 0.3 * torch.sin(x + 1e-3 * t.reshape(-1, 1, 1, 1).float()) + 0.02 * y.reshape(-1, 1, 1, 1)

    model.num_classes = 3
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    name = "flow_euler" if prediction == "flow" else "euler"
    arguments = dict(process=process, steps=20, prediction=prediction, labels=torch.tensor([0, 2]), guidance=1.5)
    image = SAMPLERS[name](model, noise, **arguments)
    found = invert(model, image, **arguments)
    assert (SAMPLERS[name](model, found, **arguments) - image).abs().max() < 1e-4 * image.abs().max()
    with pytest.raises(RuntimeError, match="still changes by .* after 1 iterations"):
        invert(model, image, iterations=1, tolerance=1e-9, **arguments)
    with pytest.raises(ValueError, match="cannot be turned back"):
        invert(model, image, **{**arguments, "prediction": "x0"})


def test_slerp_stays_on_the_sphere():
    a, b = torch.randn(2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    assert (middle.std() - 1).abs() < 0.1
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_the_adaptive_solver_finds_the_solution():
    """On the mixture, against many steps of DPM-Solver-3 between the same levels."""
    process = VPSDE()
    low, high = process.levels
    noise = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    ends = [process.at(high), process.at(low)]
    exact = solution(process, high, low, noise.double())
    c_x, c_m = coefficients("score", "x0", ends[1].alpha, ends[1].sigma)
    exact = c_x * exact + c_m * score(exact, ends[1])

    def model(x, t):
        node = process.nodes((t[:1].double() / 999).clamp(0, 1))[0]
        return prediction_of("eps", x.double(), node).float()

    x0, calls = probability_flow(model, noise, process=process, prediction="eps")
    assert (x0 - exact).abs().max() < 2e-3 and 20 < calls < 2000
    rough, fewer = probability_flow(model, noise, process=process, prediction="eps", rtol=1e-2, atol=1e-2)
    assert fewer < calls and (rough - exact).abs().max() > (x0 - exact).abs().max()


def one_step(name, process, nodes, prediction, x, m, z, learned=None, **options):
    """One step of a sampler whose model says m, and `learned` of its variance, and whose noise is z."""
    if SAMPLERS[name]._asks_process:
        options["process"] = process
    program = record(functools.partial(SAMPLERS[name]._method, **options), nodes, prediction, Guidance())
    run = Run(program, (x,), lambda: z)
    with use_backend("reference"):
        while run.advance() is not None:
            run.give((m, m if learned is None else learned))
    return run.x


def test_few_step_and_learned_steps_are_the_papers():
    """Written out: LCM, consistency, the stochastic flow, and DDPM's three variances."""
    x, m, z, v = torch.randn(4, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vp, flow, edm = VP("scaled_linear"), Flow(), EDM()
    t, s = vp.nodes(torch.tensor([500, 300]))
    x0 = (x - t.sigma * m) / t.alpha
    c_skip, c_out = 0.25 / ((10 * 500) ** 2 + 0.25), 10 * 500 / math.sqrt((10 * 500) ** 2 + 0.25)
    expected = s.alpha * (c_skip * x + c_out * x0) + s.sigma * z
    torch.testing.assert_close(one_step("lcm", vp, [t, s], "eps", x, m, z), expected)

    bar_t, bar_s = t.alpha**2, s.alpha**2
    beta = 1 - bar_t / bar_s
    mean = (math.sqrt(bar_s) * beta * x0 + math.sqrt(bar_t / bar_s) * (1 - bar_s) * x) / (1 - bar_t)
    tilde = beta * (1 - bar_s) / (1 - bar_t)
    part = (v + 1) / 2
    learned = (0.5 * (part * math.log(beta) + (1 - part) * math.log(tilde))).exp()
    for variance, std in (("small", math.sqrt(tilde)), ("large", math.sqrt(beta)), ("learned", learned)):
        got = one_step("ddpm", vp, [t, s], "eps", x, m, z, v, variance=variance)
        torch.testing.assert_close(got, mean + std * z)

    t, s = flow.nodes(torch.tensor([0.7, 0.4], dtype=torch.float64))
    torch.testing.assert_close(one_step("flow_stochastic", flow, [t, s], "flow", x, m, z),
                               0.6 * (x - 0.7 * m) + 0.4 * z)
    t, s = edm.nodes(torch.tensor([5.0, 0.8], dtype=torch.float64))
    torch.testing.assert_close(one_step("consistency", edm, [t, s], "x0", x, m, z),
                               m + math.sqrt(0.8**2 - 0.002**2) * z)


def test_a_model_without_some_layers():
    model = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=3, num_heads=2, num_classes=4).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([3, 4]), torch.tensor([0, 1])
    with torch.no_grad():
        whole = model(x, t, y)
        skipping = skip_layers(model, [1])
        short = copy.deepcopy(model)
        del short.blocks[1]
        assert torch.equal(skipping(x, t, y), short(x, t, y)) and torch.equal(model(x, t, y), whole)
        own = model.blocks[1].forward
        model.blocks[1].forward = lambda *args: own(*args)  # as accelerate sets one on an instance
        assert torch.equal(skipping(x, t, y), short(x, t, y)) and torch.equal(model(x, t, y), whole)
    assert not list(skipping.parameters())
    for bad, words in (([3], "layers are .3."), ([], "layers are"), ([-1], "0 to 2")):
        with pytest.raises(ValueError, match=words):
            skip_layers(model, bad)
    with pytest.raises(ValueError, match="Linear has no blocks"):
        skip_layers(torch.nn.Linear(2, 2), [0])
