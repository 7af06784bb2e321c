"""Control of a trajectory: where it starts, what stays, who watches, what stops it, and the way back."""
import functools

import pytest
import torch

from difuse.diffusion import (
    EDM,
    SAMPLERS,
    VESDE,
    VP,
    VPSDE,
    Flow,
    Guidance,
    Previews,
    coefficients,
    invert,
    path,
    probability_flow,
    slerp,
)
from tests.mixture import prediction_of, score, smooth, solution


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


@pytest.mark.parametrize("strength, steps, run", [(0.9, 10, 9), (0.8, 5, 4), (0.8, 50, 40), (1.0, 7, 7), (0.01, 10, 1)])
def test_strength_is_the_part_of_the_steps_that_run(strength, steps, run):
    noise, seen = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(0)), []
    SAMPLERS["ddim"](smooth, noise, process=VP(), steps=steps, prediction="eps", image=0 * noise, strength=strength,
                     callback=lambda step, x: seen.append(step))
    assert len(seen) == run


@pytest.mark.parametrize("name", ["unipc", "dpm_solver_pp_2m", "ddim", "euler"])
def test_a_state_that_is_replaced_is_what_counts(name):
    """With eps = 0 x / alpha stays as it is from there on; where steps before count too, most of it."""
    def run(seed, value):
        noise = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(seed))
        return SAMPLERS[name](lambda x, t: 0 * x, noise, process=VP(), steps=6, prediction="eps",
                              callback=lambda step, x: torch.full_like(x, value) if step == 3 else None)

    alpha = path(VP(), 6)[4].alpha
    if name in ("ddim", "euler"):
        torch.testing.assert_close(run(0, 1.0), torch.full((1, 1, 2, 2), 1 / alpha), rtol=1e-5, atol=1e-5)
        assert torch.equal(run(0, 1.0), run(1, 1.0))
    moved = (run(0, 101.0) - run(0, 1.0)) * alpha / 100
    assert ((moved - 1).abs() < 0.5).all(), moved


def test_a_path_of_the_users_own_times_starts_at_its_own_level():
    """Variance exploding: the state is as large as the first sigma, whatever sigma_max is."""
    noise, seen = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)), []

    def model(x, t):
        seen.append(x)
        return 0 * x

    for process, steps, sigma in ((EDM(), [10.0, 1.0], 10.0), (VESDE(0.01, 348.0), 5, 348.0),
                                  (EDM(0.02, 80.0), 5, 80.0)):
        seen.clear()
        SAMPLERS["euler"](model, noise, process=process, steps=steps, prediction="x0", spacing=None)
        scale = process.scale(sigma)
        torch.testing.assert_close(seen[0], scale * sigma * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [Guidance(2.0, interval=(0, 0.5)), Guidance(2.0, rescale=0.5),
                                      Guidance(2.0, zero_star=True)], ids=["interval", "rescale", "zero_star"])
def test_the_ways_back_refuse_guidance_that_is_more_than_a_sum(guidance):
    x = torch.zeros(1, 1, 2, 2)
    for call in (lambda: invert(smooth, x, process=VP(), steps=3, prediction="eps", guidance=guidance),
                 lambda: probability_flow(smooth, x, process=VP(), prediction="eps", guidance=guidance)):
        with pytest.raises(ValueError, match="guidance has (interval|rescale|zero_star); expected a scale"):
            call()
