"""Samplers against the papers' formulas written out step by step, a data model with a known solution, and bad input."""
import inspect
import math
import subprocess
import sys

import pytest
import torch

import difuse
from difuse.diffusion import SAMPLERS, VESDE, VP, Flow, convert, ddim, ddpm, flow_euler, initial_noise
from difuse_kernels import use_backend

SHAPE = (2, 3, 5)  # one sample: odd on purpose


class Toy:
    """A cheap stand-in for a network: each element depends on itself, its sample's time and its sample's label."""

    num_classes = 4

    def __init__(self, learn_sigma=False):
        self.learn_sigma, self.calls = learn_sigma, []  # calls: (x, t, y, output)

    def __call__(self, x, t, y=None):
        label = torch.zeros(len(x)) if y is None else y
        phase = (label.to(x.dtype) * 0.7 + t.to(x.dtype) * 1e-3)[:, None, None, None]
        out = 0.6 * x + 0.5 * torch.sin(2 * x + phase)
        self.calls.append((x, t.clone(), y, out))
        return torch.cat((out, 100 + out), dim=1) if self.learn_sigma else out


def both(prediction, m, x, alpha, sigma):
    """x0 and eps, by the definition of each prediction."""
    if prediction == "eps":
        return (x - sigma * m) / alpha, m
    if prediction == "x0":
        return m, (x - alpha * m) / sigma
    if prediction == "v":
        return (alpha * x - sigma * m) / (alpha**2 + sigma**2), (alpha * m + sigma * x) / (alpha**2 + sigma**2)
    return (x - sigma * m) / (alpha + sigma), (alpha * m + x) / (alpha + sigma)


# The papers' updates, one step each: (process, i, steps, prediction, x, m, z, eta) -> next x.

def vp_bars(process, i, steps):
    """DDPM's alpha_bar at both ends of step i of an evenly spaced path; the data has alpha_bar 1."""
    t, s = (process.num_steps - 1 - k * process.num_steps // steps for k in (i, i + 1))
    return tuple(process.alpha_sigma(torch.tensor(k))[0].item() ** 2 if k >= 0 else 1.0 for k in (t, s))


def ddim_step(process, i, steps, prediction, x, m, z, eta):
    bar_t, bar_s = vp_bars(process, i, steps)
    x0, eps = both(prediction, m, x, math.sqrt(bar_t), math.sqrt(1 - bar_t))
    sigma = eta * math.sqrt((1 - bar_s) / (1 - bar_t)) * math.sqrt(1 - bar_t / bar_s)
    return math.sqrt(bar_s) * x0 + math.sqrt(1 - bar_s - sigma**2) * eps + sigma * z


def ddpm_step(process, i, steps, prediction, x, m, z, eta):
    bar_t, bar_s = vp_bars(process, i, steps)
    x0, _ = both(prediction, m, x, math.sqrt(bar_t), math.sqrt(1 - bar_t))
    alpha_t = bar_t / bar_s  # alpha_t and beta_t of the respaced chain
    beta_t = 1 - alpha_t
    mean = math.sqrt(bar_s) * beta_t / (1 - bar_t) * x0 + math.sqrt(alpha_t) * (1 - bar_s) / (1 - bar_t) * x
    return mean + math.sqrt((1 - bar_s) / (1 - bar_t) * beta_t) * z


def flow_euler_step(process, i, steps, prediction, x, m, z, eta):
    t, s = 1 - i / steps, 1 - (i + 1) / steps
    x0, eps = both(prediction, m, x, 1 - t, t)
    return x - (t - s) * (eps - x0)


TEXTBOOK = {"ddim": ddim_step, "ddpm": ddpm_step, "flow_euler": flow_euler_step}
CASES = [(name, process, prediction, eta) for name, process, etas in (
    ("ddim", VP("linear"), (0.0, 0.6, 1.0)), ("ddim", VP("cosine", 200), (0.0,)), ("ddpm", VP("linear"), (0.0,)),
    ("ddpm", VP("cosine", 12), (0.0,)), ("flow_euler", Flow(), (0.0,)))
    for eta in etas for prediction in (("x0", "flow") if name == "flow_euler" else ("eps", "x0", "v", "flow"))]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("w, learn_sigma", [(1.0, False), (2.5, True), (0.3, False)])
@pytest.mark.parametrize("steps", [1, 2, 12])
@pytest.mark.parametrize("name, process, prediction, eta", CASES)
def test_every_step_is_the_textbooks(name, process, prediction, eta, steps, w, learn_sigma, backend):
    """Each step, from the state it started at, is within float32 rounding of the paper's formula in float64.

    The bound is the textbook one for a sum of J products: each coefficient, product and addition rounds once.
    """
    labels, null = torch.tensor([0, 3, 2]), torch.full((3,), 4)
    noise, generators = initial_noise(SHAPE, [5, 6, 7])
    _, streams = initial_noise(SHAPE, [5, 6, 7])
    model, states = Toy(learn_sigma), [noise.clone()]
    with use_backend(backend):
        result = SAMPLERS[name](model, noise, process=process, steps=steps, prediction=prediction, labels=labels,
                                guidance=w, generators=generators, callback=lambda i, x: states.append(x.clone()),
                                **({"eta": eta} if name == "ddim" else {}))
    assert torch.equal(noise, states[0]) and torch.equal(result, states[-1]) and len(model.calls) == steps
    for i, (x_in, t, y, out) in enumerate(model.calls):
        x = states[i]
        assert torch.equal(x_in, x if w == 1 else torch.cat((x, x)))
        assert torch.equal(y, labels if w == 1 else torch.cat((labels, null)))
        time = 1000 * (1 - i / steps)
        if name != "flow_euler":
            time = process.num_steps - 1 - i * process.num_steps // steps
        torch.testing.assert_close(t, torch.full_like(t, time), rtol=2**-23, atol=0)
        stochastic = i < steps - 1 and (name == "ddpm" or eta > 0)
        z = torch.stack([torch.randn(SHAPE, generator=g) for g in streams]) if stochastic else torch.zeros_like(x)

        def step(x, cond, uncond, z, i=i):
            return TEXTBOOK[name](process, i, steps, prediction, x, w * cond + (1 - w) * uncond, z, eta)

        parts = [value.double() for value in (x, out[:3], out[3:] if w != 1 else torch.zeros_like(x), z)]
        exact = step(*parts)
        size = sum(step(*(part if k == j else 0 * part for k, part in enumerate(parts))).abs() for j in range(4))
        assert ((states[i + 1].double() - exact).abs() <= (len(parts) + 1) * 2**-24 * size + 1e-30).all(), i


def gaussian_model(process, prediction, mean=0.3, std=0.5):
    """The exact network for data of independent normal elements."""

    def model(x, t):
        t = t[:1] if process.name == "vp" else t[:1].double() / 1000
        alpha, sigma = process.alpha_sigma(t)
        x = x.double()
        x0 = mean + alpha * std**2 * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        eps = sigma * (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        m = eps if prediction == "eps" else convert(x0, x, *(value[0] for value in (alpha, sigma)), source="x0",
                                                    target=prediction)
        return m.to(torch.float32)

    return model


@pytest.mark.parametrize("name, process, prediction", [
    ("ddim", VP("linear", 4000), "eps"), ("ddim", VP("linear", 4000), "v"), ("ddim", VP("cosine", 4000), "v"),
    ("flow_euler", Flow(), "flow"), ("flow_euler", Flow(), "x0")])
def test_deterministic_samplers_converge_to_the_known_solution_with_order_one(name, process, prediction):
    """The probability-flow ODE keeps (x - alpha * mean) / std_t constant; twice the steps, half the error."""
    noise, _ = initial_noise((1, 8, 8), range(2))
    alpha, sigma = process.alpha_sigma(torch.tensor(1.0 if name == "flow_euler" else process.num_steps - 1))
    exact = 0.3 + 0.5 * (noise - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2).sqrt()
    model = gaussian_model(process, prediction)
    errors = [(SAMPLERS[name](model, noise, process=process, steps=steps, prediction=prediction) - exact).abs().max()
              for steps in (50, 100, 200, 400)]
    ratios = [coarse / fine for coarse, fine in zip(errors, errors[1:], strict=False)]
    assert all(1.6 < ratio < 2.4 for ratio in ratios), (errors, ratios)


@pytest.mark.parametrize("name, extra", [("ddpm", {}), ("ddim", {"eta": 0.5})])
def test_stochastic_samplers_have_the_predicted_spread(name, extra):
    """On Gaussian data each step is affine in x, so mean and variance of the images follow from the papers' formula."""
    process, steps, model = VP("linear"), 100, gaussian_model(VP("linear"), "eps")
    mean, variance = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def step(i, x, z):
        t = torch.tensor([process.num_steps - 1 - i * process.num_steps // steps])
        return TEXTBOOK[name](process, i, steps, "eps", x, model(x, t).double(), z, extra.get("eta", 0.0))

    for i in range(steps):
        slope = step(i, mean + 1, 0.0) - step(i, mean, 0.0)
        variance = slope**2 * variance + (step(i, mean, 1.0) - step(i, mean, 0.0)) ** 2
        mean = step(i, mean, 0.0)
    noise, generators = initial_noise((1, 64, 64), range(4))
    x = SAMPLERS[name](model, noise, process=process, steps=steps, prediction="eps", generators=generators, **extra)
    assert abs(x.mean() - mean) < 5 * (variance / x.numel()) ** 0.5  # five standard errors
    assert abs(x.var() - variance) < 5 * variance * (2 / x.numel()) ** 0.5


def test_ddim_with_eta_one_is_ddpm():
    """Of the formulas themselves, in float64; each sampler is held to its own above."""
    x, m, z = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(9):
        steps = [step(VP("cosine"), i, 9, "v", x, m, z, 1.0) for step in (ddim_step, ddpm_step)]
        torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("steps, expected", [(1, [9]), (3, [9, 6, 3]), (4, [9, 7, 4, 2]), (10, list(range(9, -1, -1)))])
def test_times_are_evenly_spaced_from_the_noisiest_down(steps, expected):
    noise, _ = initial_noise(SHAPE, range(2))
    model = Toy()
    ddim(model, noise, process=VP("cosine", 10), steps=steps, prediction="eps")
    assert [t.tolist() for _, t, _, _ in model.calls] == [[t, t] for t in expected]
    assert model.calls[0][1].dtype == torch.int64


@pytest.mark.parametrize("guidance, rows", [(1.0, 3), (1.5, 6), (0.0, 6)])
def test_guidance_costs_rows_only_where_it_guides(guidance, rows):
    noise, _ = initial_noise(SHAPE, range(3))
    model = Toy()
    flow_euler(model, noise, process=Flow(), steps=2, prediction="flow", labels=torch.tensor([1, 2, 3]),
               guidance=guidance)
    assert [len(x) for x, _, _, _ in model.calls] == [rows, rows]


OPTIONS = {"ddim": {"eta": 0.7}, "euler": {"s_churn": 2.0}}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_does_not_change_with_its_batch_mates(name):
    class Polynomial(Toy):  # the same bits for an element wherever it stands in memory
        def __call__(self, x, t, y):
            return 0.9 * x - 0.05 * x * x + (0.1 * y + 1e-4 * t)[:, None, None, None]

    process = next(each for each in (VP(), Flow(), VESDE(0.01, 2.0)) if SAMPLERS[name].takes(each))

    def run(seeds, labels):
        noise, generators = initial_noise(SHAPE, seeds)
        return SAMPLERS[name](Polynomial(), noise, process=process, steps=6, prediction="x0",
                              labels=torch.tensor(labels), guidance=1.7, generators=generators, **OPTIONS.get(name, {}))

    together = run([11, 12, 13, 14], [0, 1, 2, 3])
    for i in range(4):
        assert torch.equal(run([11 + i], [i])[0], together[i])
    assert torch.equal(run([14, 12], [3, 1]), together[[3, 1]])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("name, extra, draws", [("ddim", {}, 0), ("flow_euler", {}, 0), ("ddim", {"eta": 0.5}, 4),
                                               ("ddpm", {}, 4)])
def test_noise_is_drawn_only_where_it_counts(name, extra, draws):
    noise, generators = initial_noise(SHAPE, [3])
    _, fresh = initial_noise(SHAPE, [3])
    SAMPLERS[name](Toy(), noise, process=Flow() if name == "flow_euler" else VP(), steps=5, prediction="x0",
                   generators=generators, **extra)
    for _ in range(draws):  # the last of 5 steps lands on the data and needs no noise
        torch.randn(SHAPE, generator=fresh[0])
    assert torch.equal(generators[0].get_state(), fresh[0].get_state())


def test_callback_sees_every_step_and_no_gradient_is_recorded():
    noise, _ = initial_noise(SHAPE, range(2))
    seen = []
    scale = torch.ones((), requires_grad=True)
    x = ddim(lambda x, t: scale * x, noise, process=VP(), steps=4, prediction="eps",
             callback=lambda step, x: seen.append((step, x)))
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][1] is x and not x.requires_grad
    assert not torch.equal(seen[0][1], seen[1][1])


def test_samplers_share_one_signature():
    common = set(inspect.signature(flow_euler).parameters)
    assert set(inspect.signature(ddpm).parameters) == common | {"variance"}
    assert set(inspect.signature(ddim).parameters) == common | {"eta"}
    for sampler in SAMPLERS.values():
        assert set(inspect.signature(sampler).parameters) == common | set(sampler.options) and sampler.__doc__


def test_initial_noise_is_each_seeds_own():
    noise, generators = initial_noise((1, 4, 4), [7, 9])
    assert noise.shape == (2, 1, 4, 4) and len(generators) == 2
    assert torch.equal(noise[1], torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(9)))
    with pytest.raises(ValueError, match="seeds is empty"):
        initial_noise((1, 4, 4), [])


class Unnamed:
    def __call__(self, x, t, y):
        return x


LABELS = torch.tensor([0, 1, 2])


@pytest.mark.parametrize("name, change, error, words", [
    ("ddim", {"steps": 0}, ValueError, ["steps is 0", "1 to 1000"]),
    ("ddim", {"steps": 1001}, ValueError, ["steps is 1001", "1000"]),
    ("ddpm", {"steps": 2.0}, ValueError, ["2.0"]),
    ("flow_euler", {"steps": -3}, ValueError, ["steps is -3"]),
    ("ddim", {"process": Flow()}, ValueError, ["process is Flow", "expected VP", "flow_euler"]),
    ("ddpm", {"process": Flow()}, ValueError, ["process is Flow", "expected VP"]),
    ("flow_euler", {"process": VP()}, ValueError, ["process is VP", "expected Flow", "ddim"]),
    ("ddim", {"prediction": "noise"}, ValueError, ["'noise'", "eps, x0, v, flow, score, edm"]),
    ("flow_euler", {"prediction": "eps"}, ValueError, ["alpha is 0"]),
    ("ddim", {"eta": 1.5}, ValueError, ["eta is 1.5"]),
    ("ddim", {"eta": -0.1}, ValueError, ["eta is -0.1"]),
    ("ddim", {"eta": 0.5, "generators": None}, ValueError, ["no generators", "3 samples"]),
    ("ddpm", {"generators": [torch.Generator()]}, ValueError, ["1 generators", "3 samples"]),
    ("ddim", {"labels": LABELS[:2]}, ValueError, ["(2,)", "(3,)"]),
    ("ddim", {"labels": LABELS.float()}, TypeError, ["float32", "int64"]),
    ("ddim", {"labels": [0, 1, 2]}, TypeError, ["list", "int64"]),
    ("ddim", {"labels": None, "guidance": 2.0}, ValueError, ["guidance 2.0 needs labels"]),
    ("ddim", {"model": Unnamed(), "guidance": 2.0}, ValueError, ["num_classes", "Unnamed"]),
    ("ddim", {"guidance": float("nan")}, ValueError, ["guidance is nan"]),
    ("ddim", {"model": lambda x, t, y: x[:, :1]}, ValueError, ["(3, 1, 3, 5)", "(3, 2, 3, 5)", "(3, 4, 3, 5)"]),
    ("ddim", {"noise": torch.zeros(3, *SHAPE, dtype=torch.float64)}, TypeError, ["float64", "float32"]),
    ("ddim", {"noise": torch.zeros(3)}, ValueError, ["(3,)", "[B,C,H,W]"]),
    ("ddim", {"noise": [0.0]}, TypeError, ["list"]),
])
def test_bad_input_is_refused(name, change, error, words):
    noise, generators = initial_noise(SHAPE, range(3))
    arguments = {"model": Toy(), "noise": noise, "process": Flow() if name == "flow_euler" else VP(), "steps": 3,
                 "prediction": "x0", "labels": LABELS, "generators": generators, **change}
    with pytest.raises(error) as caught:
        SAMPLERS[name](arguments.pop("model"), arguments.pop("noise"), **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


# difuse.sample

def tiny_model():
    model = difuse.models.DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2,
                              num_classes=3)
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.3
    return model


FLOW = {"process": Flow(), "prediction": "flow", "sampler": "flow_euler", "steps": 3}


class Elementwise(torch.nn.Module):
    """Looks like a DiT and computes the same bits for a sample wherever it stands in its batch."""

    config, num_classes = {"in_channels": 1, "input_size": 3}, 3

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.9))

    def forward(self, x, t, y):
        return self.slope * x - 0.05 * x * x + (0.1 * y + 1e-4 * t)[:, None, None, None]


def test_sample_batches_without_changing_images():
    model, steps = Elementwise(), []
    whole = difuse.sample(model, [0, 1, 2, 0, 1], **FLOW)
    parts = difuse.sample(model, torch.tensor([0, 1, 2, 0, 1]), batch_size=2, callback=lambda i, x: steps.append(i),
                          **FLOW)
    assert whole.shape == (5, 1, 3, 3) and whole.dtype == torch.float32 and not whole.requires_grad
    assert torch.equal(parts, whole)
    assert steps == [0, 1, 2] * 3
    assert torch.equal(difuse.sample(model, [2, 1], seeds=[2, 4], **FLOW), whole[[2, 4]])
    assert not torch.equal(whole[0], whole[3])  # one class, two seeds


@pytest.mark.parametrize("name, process", [("ddpm", VP()), ("ddim", VP("cosine")), ("flow_euler", Flow())])
def test_sample_runs_a_dit(name, process):
    images = difuse.sample(tiny_model(), [0, 1, 2], sampler=name, process=process, prediction="x0", steps=3)
    assert images.shape == (3, 1, 4, 4) and images.isfinite().all()


def test_sample_runs_in_eval_mode_and_gives_the_mode_back():
    model = tiny_model().train()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    difuse.sample(model, [0], **FLOW)
    assert modes == [False] * 3 and model.training
    with pytest.raises(ZeroDivisionError):
        difuse.sample(model, [0], callback=lambda i, x: 1 / 0, **FLOW)
    assert model.training
    difuse.sample(model.eval(), [0], **FLOW)
    assert not model.training


def test_sample_shows_progress_only_when_asked(capfd):
    difuse.sample(tiny_model(), [0, 1], **FLOW)
    assert capfd.readouterr().err == ""
    difuse.sample(tiny_model(), [0, 1], progress=True, **FLOW)
    assert "flow_euler" in capfd.readouterr().err


@pytest.mark.parametrize("change, words", [
    ({"sampler": "unip"}, ["'unip'", "did you mean 'unipc'", "ddpm, ddim, euler"]),
    ({"labels": []}, ["(0,)"]),
    ({"labels": [[0, 1]]}, ["(1, 2)"]),
    ({"seeds": [1]}, ["1 seeds for 2 labels"]),
    ({"batch_size": 0}, ["batch_size is 0"]),
    ({"labels": [0, 7]}, ["7", "0 to 2"]),
])
def test_sample_refuses_bad_input(change, words):
    arguments = {"labels": [0, 1], **FLOW, **change}
    with pytest.raises(ValueError) as caught:
        difuse.sample(tiny_model(), arguments.pop("labels"), **arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def test_import_is_lean():
    code = ("import sys, torch; before = set(sys.modules); import difuse; new = set(sys.modules) - before; "
            "assert new <= {'difuse'}, new; assert difuse.__version__ and 'sample' in dir(difuse); "
            "difuse.use_backend; assert not {'tqdm', 'triton', 'difuse.models'} & (set(sys.modules) - before); "
            "assert difuse.models.DiT")
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'sampel'.*sample"):
        _ = difuse.sampel
