"""Every sampler on a Gaussian mixture, whose score is known: orders of convergence, distributions, grids."""
import functools
import math

import numpy as np
import pytest
import torch

from difuse.diffusion import EDM, SAMPLERS, VESDE, VP, VPSDE, Flow, Guidance, SubVPSDE, path
from difuse.diffusion.method import record
from difuse.diffusion.program import Done, Map, Program, Recorder, Weigh, number
from difuse.diffusion.run import Run
from difuse.diffusion.samplers import _ANY
from difuse_kernels import use_backend
from tests.mixture import MEANS, STDS, WEIGHTS, nodes_between, smooth, solution, trajectory

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


def test_a_langevin_step_is_the_paper_s():
    """Song et al. 2021, algorithm 5: x + e s + sqrt(2 e) z, e = 2 alpha_ts^2 (snr |z| / |s|)^2; few and large steps."""
    process, snr, noises = VPSDE(), 0.3, []
    nodes = path(process, 3, "log_snr")
    x = torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    program = record(functools.partial(SAMPLERS["predictor_corrector"]._method, snr=snr), nodes, "score", Guidance(1.0))

    def draw():
        noises.append(torch.randn(x.shape, generator=torch.Generator().manual_seed(len(noises)), dtype=x.dtype))
        return noises[-1]

    run = Run(program, (x,), draw)
    with use_backend("reference"):
        while (asked := run.advance()) is not None:
            run.give((asked[1].sin(), asked[1]))
    for k, (t, s) in enumerate(zip(nodes, nodes[1:], strict=False)):
        alpha_ts = t.alpha / s.alpha
        beta = t.sigma**2 - (alpha_ts * s.sigma) ** 2
        x = (2 - alpha_ts) * x + beta * x.sin()
        if s.sigma > 0:
            x = x + math.sqrt(beta) * noises[2 * k]
            z, score = noises[2 * k + 1], x.sin()
            norms = [value.flatten(1).norm(dim=1) for value in (z, score)]
            e = (2 * alpha_ts**2 * (snr * norms[0] / norms[1]) ** 2).reshape(-1, 1, 1, 1)
            x = x + e * score + (2 * e).sqrt() * z
    torch.testing.assert_close(run.x, x, rtol=1e-12, atol=1e-12)


def test_a_weighted_tensor_that_is_asked_for_alone_is_written():
    recorder = Recorder()
    x = recorder.tensor()
    weighted, = recorder.add(Weigh, x, function=lambda G: (G[:, 1, 1],))
    recorder.add(Done, weighted, results=0, step=0)
    run = Run(Program(recorder.instructions, [number(weighted)]), (torch.full((2, 3), 2.0),), None)
    assert run.advance() is None
    assert torch.equal(run.x, torch.full((2, 3), 24.0))


def test_a_linear_step_is_one_pass_and_its_width_is_the_method_s():
    """Between two calls: one map; a solver's history is as many tensors as it needs, and nobody's is written twice."""
    outputs = {"ddim": 1, "euler": 1, "dpm_solver_pp_2m": 2, "dpm_solver_pp_3m": 2, "unipc": 2, "deis": 2,
               "flow_euler": 1, "ddpm": 1, "euler_ancestral": 1, "dpm_solver_pp_2m_sde": 2}
    for name, most in outputs.items():
        process, kind = (Flow(), "flow") if name == "flow_euler" else (VP(), "eps")
        program = SAMPLERS[name].program(process, 12, kind, 4.0)
        maps = [each for each in program.instructions if isinstance(each, Map)]
        assert len(maps) == len(program.calls) == 12, name
        assert max(len(each.outputs) for each in maps) == most, name
        assert max(len(each.inputs) for each in maps) <= 8, name


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


def test_every_process_has_a_sampler():
    assert all(any(sampler.takes(process) for sampler in SAMPLERS.values()) for process in PROCESSES)
    assert len(_ANY) == 6


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


def test_a_variance_that_was_not_learned_is_missed():
    noise, generators = torch.zeros(1, 1, 2, 2), [torch.Generator()]
    with pytest.raises(ValueError, match="ddpm: the model returned no learned sigma; expected twice the channels"):
        SAMPLERS["ddpm"](smooth, noise, process=VP(), steps=3, prediction="eps", variance="learned",
                         generators=generators)


def test_flow_s_shift_moves_every_grid():
    for spacing in ("log_snr", "karras", "uniform"):
        plain, moved = (path(Flow(shift), 6, spacing) for shift in (1.0, 3.0))
        assert all(a.sigma < b.sigma for a, b in zip(plain[1:-1], moved[1:-1], strict=True))
    assert path(Flow(3.0, terminal=0.1), 1)[0].sigma == 1


def test_times_may_be_a_list_or_a_tensor_and_steps_are_an_integer():
    """What was recorded before for the same numbers does not let another kind of them through."""
    noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    run = functools.partial(SAMPLERS["ddim"], smooth, noise, process=VP(), prediction="eps")
    times = torch.tensor([900, 500, 100])
    first = run(steps=times)
    assert torch.equal(run(steps=[900, 500, 100]), first)
    times[1] = 300
    assert torch.equal(run(steps=times), run(steps=[900, 300, 100])) and not torch.equal(run(steps=times), first)
    run(steps=2)
    for steps in (2.0, True):
        with pytest.raises(ValueError, match=f"steps is {steps}"):
            run(steps=steps)
