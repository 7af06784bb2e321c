"""Guidance: against tilted densities in closed form, and rules that need whole samples against the papers."""
import copy
import functools
import math

import pytest
import torch

from difuse.diffusion import APG, SAMPLERS, VESDE, VP, VPSDE, Flow, Guidance, Previews, skip_layers
from difuse.diffusion.method import record
from difuse.diffusion.methods.sde import _Langevin
from difuse.diffusion.program import Call, Done, Map, Weigh
from difuse.diffusion.run import Run
from difuse.models import DiT
from difuse_kernels import gram
from tests.mixture import WEIGHTS, log_density, smooth, trajectory

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


def per_token(cond, null, w, p=1):
    """Qwen-Image's, which packs p x p places into a token's last dimension."""
    B, C, H, W = cond.shape
    cond, null = (x.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // p**2, C * p**2)
                  for x in (cond, null))
    m = plain(cond, null, w)
    m = m * cond.norm(dim=-1, keepdim=True) / m.norm(dim=-1, keepdim=True)
    return m.reshape(B, H // p, W // p, C, p, p).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)


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
    ({"per_token": 1}, lambda c, n, w: per_token(c[-1], n[-1], w)),
    ({"per_token": 2}, lambda c, n, w: per_token(c[-1], n[-1], w, 2)),
    ({"zero_star": True, "zero_steps": 1}, lambda c, n, w: zero_star(c[-1], n[-1], w) * (len(c) > 1)),
    ({"apg": APG(eta=0.2)}, lambda c, n, w: projected([c[-1] - n[-1]], c[-1], w, 0.2, 0, 0)),
    ({"apg": APG(threshold=0.5, momentum=-0.5)}, lambda c, n, w: projected(
        [a - b for a, b in zip(c, n, strict=True)], c[-1], w, 0, 0.5, -0.5))],
    ids=["rescale", "zero_star", "per_token", "per_token of 2", "zero_steps", "apg", "apg with momentum"])
def test_rules_that_need_whole_samples_are_the_papers(rule, formula):
    """Two steps of Euler's, each from the state it started at, against the rule written out."""
    process, w = VPSDE(), 3.0
    nodes = [process.at(k) for k in (3.0, 1.5, 0.7)]
    x = torch.randn(4, 3, 6, 2, generator=torch.Generator().manual_seed(0))
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


RULES = {"rescale": dict(rescale=0.7), "zero_star": dict(zero_star=True, zero_steps=1), "per_token": dict(per_token=2),
         "apg": dict(apg=APG(0.3, 2.0, -0.5))}


class Mixed:
    """A model without guidance that mixes two answers by a rule itself."""

    def __init__(self, rule, w):
        self.rule, self.w, self.differences, self.steps = rule, w, [], 0

    def __call__(self, x, t):
        cond, null = (each.double() for each in answers(x, t))
        self.differences.append(cond - null)
        return {"rescale": lambda: rescaled(cond, null, self.w, 0.7),
                "zero_star": lambda: zero_star(cond, null, self.w) * (self.steps > 0),
                "per_token": lambda: per_token(cond, null, self.w, 2),
                "apg": lambda: projected(self.differences, cond, self.w, 0.3, 2.0, -0.5)}[self.rule]().float()


def answers(x, t):
    m = smooth(x, t)
    return m, 0.5 * m + 0.1 * torch.cos(x)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_with_every_rule(name, rule):
    """Guided by a rule, and with a model that mixes by it: histories, several calls a step, per-sample coefficients."""
    process = next(each for each in (VPSDE(), VESDE(), Flow()) if SAMPLERS[name].takes(each))
    noise = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mixed = Mixed(rule, 2.5)

    def model(x, t, labels):
        cond, null = answers(x, t)
        return torch.where((labels == 3).reshape(-1, 1, 1, 1), null, cond)

    def count(step, x):
        mixed.steps = step + 1

    model.num_classes = 3
    settings = dict(process=process, steps=5, prediction="flow" if isinstance(process, Flow) else "eps")
    if not isinstance(process, Flow):
        settings["spacing"] = "log_snr"
    if name == "predictor_corrector" and rule == "zero_star":  # a step of no length has no Langevin step
        settings |= dict(steps=1)
    results = []
    for network, more in ((mixed, dict(callback=count)), (model, dict(
            labels=torch.tensor([0, 1, 2]), guidance=Guidance(2.5, **RULES[rule])))):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        results.append(SAMPLERS[name](network, noise, generators=generators, **settings, **more))
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-4 * results[0].abs().max().item())


def test_a_rule_of_norms_is_one_pass_over_the_answers_and_one_update():
    for rule in ({"rescale": 0.5}, {"zero_star": True}, {"apg": APG(threshold=1.0, momentum=-0.5)}):
        for name, outputs in (("ddim", 1), ("dpm_solver_pp_2m", 2), ("unipc", 2)):
            program = SAMPLERS[name].program(VP(), 8, "eps", Guidance(3.0, **rule))
            kinds = [type(each) for each in program.instructions]
            assert kinds == [Call, Weigh, Map, Done] * 8, (rule, name)
            maps = [each for each in program.instructions if isinstance(each, Map)]
            assert max(len(each.outputs) for each in maps) == outputs + ("apg" in rule), (rule, name)


def test_answers_of_nothing_but_zeros_are_no_division():
    """A model that has just been made."""
    def model(x, t, labels):
        return torch.zeros_like(x)

    model.num_classes = 3
    noise, labels = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    plain = SAMPLERS["ddim"](model, noise, process=VP(), steps=3, prediction="eps", labels=labels)
    for rule in RULES.values():
        x = SAMPLERS["ddim"](model, noise, process=VP(), steps=3, prediction="eps", labels=labels,
                             guidance=Guidance(3.0, **rule))
        torch.testing.assert_close(x, plain)


@pytest.mark.parametrize("more", [dict(callback=Previews(lambda step, x, x0: None)), dict(clip=1.0)],
                         ids=["previews", "clip"])
def test_a_prediction_of_zero_can_be_seen_and_clipped(more):
    """CFG-Zero*'s first steps, of a network that predicts x0."""
    def model(x, t, labels):
        return smooth(x, t) * (1 + (labels == 3).reshape(-1, 1, 1, 1))

    model.num_classes = 3
    noise, labels = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    for name in ("ddim", "euler", "unipc"):
        x = SAMPLERS[name](model, noise, process=VP(), steps=4, prediction="x0", labels=labels,
                           guidance=Guidance(3.0, zero_star=True, zero_steps=1), **more)
        assert x.isfinite().all() and x.abs().max() > 0


@pytest.mark.parametrize("rule", [dict(rescale=1.0), dict(per_token=1)], ids=str)
def test_answers_that_cancel_are_not_blown_up(rule):
    """At w = 2 and n = 2 c nothing is left of the mix but rounding."""
    def model(x, t, labels):
        return (x.sin() * (1 + (labels == 3).reshape(-1, 1, 1, 1))).bfloat16()

    model.num_classes = 3
    noise, labels = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    x = SAMPLERS["euler"](model, noise, process=VPSDE(), steps=2, prediction="eps", labels=labels, spacing="log_snr",
                          guidance=Guidance(2.0, **rule))
    plain = SAMPLERS["euler"](model, noise, process=VPSDE(), steps=2, prediction="eps", labels=labels,
                              spacing="log_snr", guidance=Guidance(2.0))
    assert x.abs().max() < 100 * plain.abs().max()


def test_a_score_of_zeros_takes_no_langevin_step():
    noise = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    x = SAMPLERS["predictor_corrector"](lambda x, t: torch.zeros_like(x), noise, process=VESDE(), steps=3,
                                        prediction="score", generators=generators)
    assert x.isfinite().all()
    z, scores = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.0], [2.0]]).expand(2, 5)
    e, root = (torch.as_tensor(weight) for weight in _Langevin(0.2)(gram((scores, z)).numpy()))
    expected = 2 * (0.2 * z[1].double().norm() / 20**0.5) ** 2
    torch.testing.assert_close(e, torch.stack((0 * expected, expected)))
    torch.testing.assert_close(root, (2 * e).sqrt())


def test_tokens_must_fit():
    for shape in ((1, 1, 4, 3), (1, 4, 4), (1, 1, 1, 2, 4, 4)):
        with pytest.raises(ValueError, match="ddim: guidance per_token is 2 and the state has shape"):
            SAMPLERS["ddim"](smooth, torch.zeros(shape), process=VP(), steps=3, prediction="eps",
                             labels=torch.tensor([0]), guidance=Guidance(3.0, per_token=2))
    for bad in (-1, 0.5, 2.0, "2"):
        with pytest.raises(ValueError, match="guidance per_token is .*expected the side of a token"):
            Guidance(3.0, per_token=bad)


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


@pytest.mark.parametrize("change, words", [
    ({"scale": "2"}, "guidance is '2'"), ({"scale": math.nan}, "guidance is nan"),
    ({"scale": 2.0, "interval": (0.7, 0.2)}, "interval is"), ({"scale": 2.0, "rescale": 1.5}, "rescale is 1.5"),
    ({"scale": 2.0, "rescale": 0.5, "zero_star": True}, "one rule at a time"), ({"rescale": 0.5}, "scale != 1"),
    ({"weak": smooth}, "weak is asked for nothing at scale 1"), ({"zero_steps": 2}, "zero_steps is 2 without"),
    ({"skip_scale": 2.0}, "go together"), ({"scale": 2.0, "passes": 3}, "passes is 3")],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "")
def test_guidance_that_contradicts_itself_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Guidance(**change)


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
