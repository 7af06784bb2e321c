"""Processes and parameterizations, in float64 against the papers' formulas."""
import doctest
import json
import math

import pytest
import torch

from difuse.diffusion import (
    EDM,
    PREDICTIONS,
    VESDE,
    VP,
    VPSDE,
    Flow,
    SubVPSDE,
    coefficients,
    convert,
    diffuse,
    parameterizations,
    process_from_config,
    target,
)

PROCESSES = [VP("linear"), VP("cosine"), VP("linear", 100), VP("cosine", 7), Flow(), VP("scaled_linear"),
             VP("sigmoid", 50), VPSDE(), SubVPSDE(), VESDE(), EDM()]


def some_times(process):
    """Times inside the process: alpha and sigma both positive."""
    if process.name != "vp":
        return torch.tensor([0.999, 0.5, 0.01, 0.25, 0.75], dtype=torch.float64)
    return torch.tensor([process.num_steps - 1, process.num_steps // 2, 0, 1, process.num_steps // 3])


def identify(process):
    return "-".join(map(str, process.config.values()))


def test_linear_schedule_is_ddpms():
    alpha, sigma = VP("linear", 1000).alpha_sigma(torch.arange(1000))
    alpha_bar = 1.0
    for i in range(1000):
        alpha_bar *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert alpha[i].item() ** 2 == pytest.approx(alpha_bar, rel=1e-12)
        assert sigma[i].item() ** 2 == pytest.approx(1 - alpha_bar, rel=1e-11)


@pytest.mark.parametrize("steps", [4, 50, 1000])
def test_cosine_schedule_is_nichol_and_dhariwals(steps):
    def f(t):
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    alpha, _ = VP("cosine", steps).alpha_sigma(torch.arange(steps))
    alpha_bar = 1.0
    for i in range(steps):
        alpha_bar *= 1 - min(1 - f(i + 1) / f(i), 0.999)
        assert alpha[i].item() ** 2 == pytest.approx(alpha_bar, rel=1e-11)


def test_a_short_linear_schedule_still_ends_in_noise():
    for steps in (50, 100, 4000):
        alpha, _ = VP("linear", steps).alpha_sigma(torch.tensor([steps - 1]))
        assert alpha.item() < 0.01


@pytest.mark.parametrize("process", PROCESSES, ids=identify)
def test_alpha_sigma(process):
    t = some_times(process)
    alpha, sigma = process.alpha_sigma(t[:4].reshape(2, 2))
    assert alpha.shape == sigma.shape == (2, 2) and alpha.dtype == sigma.dtype == torch.float64
    law = {"flow": alpha + sigma, "vp": alpha**2 + sigma**2, "vpsde": alpha**2 + sigma**2, "subvpsde": alpha**2 + sigma,
           "vesde": alpha, "edm": alpha}[process.name]
    torch.testing.assert_close(law, torch.ones_like(law), rtol=1e-14, atol=0)
    times = torch.arange(process.num_steps) if process.name == "vp" else torch.linspace(0, 1, 50)
    alpha, sigma = process.alpha_sigma(times)
    assert ((sigma / alpha).diff() > 0).all() and (alpha.diff() <= 0).all() and (sigma.diff() > 0).all()


def test_continuous_processes_are_song_s():
    """alpha and sigma of VPSDE from the integral of beta, in arbitrary steps; of VESDE the geometric series."""
    process, t = VPSDE(0.1, 20.0), 0.7
    integral = sum((0.1 + (20.0 - 0.1) * (i + 0.5) / 10000 * t) * t / 10000 for i in range(10000))
    alpha, sigma = (value.item() for value in process.alpha_sigma(torch.tensor(t, dtype=torch.float64)))
    assert alpha == pytest.approx(math.exp(-integral / 2), rel=1e-7)
    assert sigma**2 == pytest.approx(1 - math.exp(-integral), rel=1e-7)
    sub = SubVPSDE(0.1, 20.0).alpha_sigma(torch.tensor(t, dtype=torch.float64))
    assert [value.item() for value in sub] == pytest.approx([alpha, 1 - math.exp(-integral)], rel=1e-7)
    sigma = VESDE(0.01, 50.0).alpha_sigma(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))[1]
    assert sigma.tolist() == pytest.approx([0.01, (0.01 * 50) ** 0.5, 50.0], rel=1e-12)


def test_latent_diffusion_s_schedule_is_linear_in_the_root_of_beta():
    alpha, _ = VP("scaled_linear").alpha_sigma(torch.arange(1000))
    beta = 1 - (alpha[1:] / alpha[:-1]) ** 2
    torch.testing.assert_close(beta.sqrt().diff().diff(), torch.zeros(997, dtype=torch.float64), rtol=0, atol=1e-12)
    assert beta[-1].item() == pytest.approx(0.012, rel=1e-9)


def test_edm_s_preconditioning_is_karras_s():
    """D = c_skip x + c_out F with c_skip = d^2 / (s^2 + d^2), c_out = s d / sqrt(s^2 + d^2), d = 0.5."""
    s = torch.tensor([0.002, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)
    c_skip, c_out = coefficients("edm", "x0", torch.ones_like(s), s)
    torch.testing.assert_close(c_skip, 0.25 / (s**2 + 0.25), rtol=1e-12, atol=0)
    torch.testing.assert_close(c_out, s * 0.5 / (s**2 + 0.25).sqrt(), rtol=1e-12, atol=0)


def test_flow_times_are_shifted_and_stretched():
    t = torch.linspace(1, 0.1, 10, dtype=torch.float64)
    torch.testing.assert_close(Flow(3.0).warp(t), 3 * t / (1 + 2 * t))
    stretched = Flow(3.0, terminal=0.1).warp(t)
    assert stretched[0] == 1 and stretched[-1].item() == pytest.approx(0.1)
    assert Flow.shift_of(256) == pytest.approx(math.exp(0.5)) and Flow.shift_of(4096) == pytest.approx(math.exp(1.15))


def test_the_worked_examples_hold():
    failed, attempted = doctest.testmod(parameterizations)
    assert failed == 0 and attempted >= 4


def test_model_time():
    t = torch.tensor([3, 999])
    assert torch.equal(VP().model_time(t), t)
    assert torch.equal(Flow().model_time(torch.tensor([0.25, 1.0], dtype=torch.float64)), torch.tensor([250.0, 1000.0]))


@pytest.mark.parametrize("process", PROCESSES, ids=identify)
def test_config_rebuilds_the_process(process):
    again = process_from_config(json.loads(json.dumps(process.config)))
    assert type(again) is type(process) and again.config == process.config
    assert process.config["name"] == process.name
    t = some_times(process)
    assert torch.equal(torch.stack(again.alpha_sigma(t)), torch.stack(process.alpha_sigma(t)))


def pair(process):
    g = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, generator=g, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(some_times(process))
    return x0, noise, alpha, sigma


@pytest.mark.parametrize("process", PROCESSES, ids=identify)
def test_targets_are_the_papers(process):
    x0, noise, alpha, sigma = pair(process)
    a, s = alpha[:, None, None, None], sigma[:, None, None, None]
    assert torch.equal(target("eps", x0, noise, alpha, sigma), noise)
    assert torch.equal(target("x0", x0, noise, alpha, sigma), x0)
    torch.testing.assert_close(target("v", x0, noise, alpha, sigma), a * noise - s * x0, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(target("flow", x0, noise, alpha, sigma), noise - x0, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(diffuse(x0, noise, alpha, sigma), a * x0 + s * noise, rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("goal", PREDICTIONS)
@pytest.mark.parametrize("process", PROCESSES, ids=identify)
def test_conversions_are_exact(process, source, goal):
    x0, noise, alpha, sigma = pair(process)
    x_t = diffuse(x0, noise, alpha, sigma)
    value = target(source, x0, noise, alpha, sigma)
    got = convert(value, x_t, alpha, sigma, source=source, target=goal)
    # dividing by a small alpha or sigma enlarges the rounding of x_t: that much error, no more, can be asked for
    loss = 1 / torch.minimum(alpha, sigma).min().item() ** (1 + ("score" in (source, goal)))  # it is eps over sigma
    torch.testing.assert_close(got, target(goal, x0, noise, alpha, sigma), rtol=0, atol=32 * 2**-53 * 8 * loss)
    back = convert(got, x_t, alpha, sigma, source=goal, target=source)
    torch.testing.assert_close(back, value, rtol=0, atol=32 * 2**-53 * 8 * loss**2)


def test_float32_images_keep_their_dtype():
    x0, noise, alpha, sigma = pair(VP())
    x0, noise = x0.float(), noise.float()
    x_t = diffuse(x0, noise, alpha, sigma)
    for source in PREDICTIONS:
        assert target(source, x0, noise, alpha, sigma).dtype == torch.float32
        assert convert(noise, x_t, alpha, sigma, source=source, target="v").dtype == torch.float32
    assert diffuse(x0, noise, 0.6, 0.8).dtype == torch.float32  # numbers do as well as tensors


def test_the_ends_of_the_path():
    x0, noise = torch.randn(2, 3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for source in ("x0", "v", "flow"):  # at pure noise these still say what the data is
        value = target(source, x0, noise, zero, one)
        torch.testing.assert_close(convert(value, noise, zero, one, source=source, target="x0"), x0)
    with pytest.raises(ValueError, match="predicts eps says nothing about x0 where alpha is 0"):
        coefficients("eps", "x0", zero, one)
    with pytest.raises(ValueError, match="predicts x0 says nothing about eps where sigma is 0"):
        coefficients("x0", "eps", one, zero)
    assert [c.item() for c in coefficients("eps", "eps", 0.0, 1.0)] == [0, 1]


@pytest.mark.parametrize("call, error, words", [
    (lambda: VP("quadratic"), ValueError, ["'quadratic'", "linear, cosine"]),
    (lambda: VP("linear", 0), ValueError, ["num_steps is 0"]),
    (lambda: VP("linear", 20), ValueError, ["num_steps > 20", "cosine"]),
    (lambda: VP("linear", 100.0), ValueError, ["100.0"]),
    (lambda: VP().alpha_sigma(torch.tensor([0.5])), TypeError, ["float32", "Flow"]),
    (lambda: VP().alpha_sigma(torch.tensor([3, 1000])), ValueError, ["1000", "999"]),
    (lambda: VP().alpha_sigma(torch.tensor([-1])), ValueError, ["-1"]),
    (lambda: Flow().alpha_sigma(torch.tensor([1])), TypeError, ["int64", "VP"]),
    (lambda: Flow().alpha_sigma(torch.tensor([0.5, 1.01])), ValueError, ["1.0", "expected 0 to 1"]),
    (lambda: Flow().alpha_sigma(torch.tensor([float("nan")])), ValueError, ["nan"]),
    (lambda: process_from_config({"name": "ve"}), ValueError, ["'ve'", "vp, flow, vpsde, subvpsde, vesde, edm"]),
    (lambda: process_from_config({}), ValueError, ["None"]),
    (lambda: process_from_config({"name": "flow", "schedule": "linear"}), ValueError, ["schedule", "shift"]),
    (lambda: target("noise", torch.ones(1), torch.ones(1), 1.0, 0.0), ValueError, ["'noise'", "eps, x0, v, flow"]),
    (lambda: coefficients("eps", "velocity", 1.0, 0.5), ValueError, ["'velocity'"]),
    (lambda: Flow(0.0), ValueError, ["shift is 0.0"]),
    (lambda: Flow(terminal=1.0), ValueError, ["terminal is 1.0"]),
    (lambda: EDM(1.0, 0.5), ValueError, ["sigma goes from 1.0 to 0.5"]),
    (lambda: VESDE(-1.0), ValueError, ["sigma goes from -1.0"]),
    (lambda: VPSDE(0.0), ValueError, ["beta goes from 0.0"]),
    (lambda: VPSDE().alpha_sigma(torch.tensor([3])), TypeError, ["int64"]),
])
def test_bad_input_is_refused(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value
