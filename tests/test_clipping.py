"""`clip`: the predicted data within bounds, as the formulas say and as diffusers' schedulers do it."""
import math

import pytest
import torch

import difuse
from difuse.diffusion import SAMPLERS, VP, VPSDE, Clamp, Flow, Guidance, Threshold
from difuse.models import DiT
from tests.mixture import smooth

NOISE = torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(0))


def clipped(x0, clip):
    if isinstance(clip, Threshold):
        s = torch.quantile(x0.abs().flatten(1), clip.ratio, dim=1).clamp(1, clip.most).reshape(-1, 1, 1, 1)
        return x0.clamp(-s, s) / s
    return x0.clamp(-clip, clip)


@pytest.mark.parametrize("clip", [0.5, Threshold(0.8, 1.5), Threshold(1.0, 3.0)], ids=str)
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_ddim_by_hand(clip, prediction):
    """x0 within bounds, eps what then remains of x."""
    process, x = VP(), 2 * NOISE.double()
    nodes = difuse.diffusion.path(process, 4)
    got = SAMPLERS["ddim"](smooth, 2 * NOISE, process=process, steps=4, prediction=prediction, clip=clip)
    bitten = 0
    for t, s in zip(nodes, nodes[1:], strict=False):
        m = smooth(x, torch.full((3,), t.time))
        x0 = {"eps": lambda m=m, t=t, x=x: (x - t.sigma * m) / t.alpha, "x0": lambda m=m: m,
              "v": lambda m=m, t=t, x=x: t.alpha * x - t.sigma * m}[prediction]()
        kept = clipped(x0, clip)
        bitten += (kept != x0).sum().item()
        x = s.alpha * kept + s.sigma * (x - t.alpha * kept) / t.sigma
    assert bitten
    torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config, clip", [
    (dict(clip_sample=True, clip_sample_range=0.7), 0.7),
    (dict(clip_sample=False, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.6),
     Threshold(0.9, 1.6))], ids=["clip_sample", "thresholding"])
def test_as_diffusers_ddim_clips(config, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(**config, timestep_spacing="leading", set_alpha_to_one=True)
    scheduler.set_timesteps(8)
    x = NOISE
    for t in scheduler.timesteps:
        x = scheduler.step(smooth(x, t.expand(3)), t, x, use_clipped_model_output=True).prev_sample
    got = SAMPLERS["ddim"](smooth, NOISE, process=VP(), steps=8, prediction="eps", spacing="leading", clip=clip)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_ends_within_the_bound(name):
    """All but those that move the state off the last prediction: they end near it."""
    sampler = SAMPLERS[name]
    process = next(each for each in (VPSDE(), difuse.diffusion.VESDE(), Flow()) if sampler.takes(each))
    settings = dict(process=process, steps=12, prediction="flow" if isinstance(process, Flow) else "eps", clip=0.4,
                    generators=[torch.Generator().manual_seed(seed) for seed in range(3)])
    if not isinstance(process, Flow):
        settings["spacing"] = "log_snr"
    x = sampler(smooth, NOISE, **settings)
    free = sampler(smooth, NOISE, **settings | dict(clip=None))
    assert x.abs().max() < (0.65 if name in ("reverse_diffusion", "predictor_corrector", "ancestral_ve", "pndm", "lcm",
                                            "deis") else 0.401)
    assert free.abs().max() > x.abs().max()


def test_an_engine_s_requests_and_sample_take_it():
    torch.manual_seed(0)
    model = DiT(input_size=4, patch_size=2, in_channels=3, hidden_size=32, depth=1, num_heads=2, num_classes=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    settings = dict(sampler="ddim", steps=4, guidance=1.5)
    images = difuse.sample(model.eval(), [1], process=VP(), prediction="eps", clip=1.0, **settings)
    with difuse.Engine(model, process=VP(), prediction="eps") as engine:
        image = engine.submit(difuse.Request(1, 0, options={"clip": 1.0}, **settings)).result()
        for options, message in (({"strength": 0.5}, "option 'strength' is unknown; did you mean 'eta'"),
                                 ({"preview": True}, "option 'preview' is unknown; did you mean 'eta'")):
            with pytest.raises(TypeError, match=message):
                engine.submit(difuse.Request(1, 0, options=options, **settings))
        with pytest.raises(ValueError, match="Engine: guidance per_token is 3 and the state has shape"):
            engine.submit(difuse.Request(1, 0, **settings | dict(guidance=Guidance(2.0, per_token=3))))
    torch.testing.assert_close(image, images[0], rtol=1e-5, atol=1e-5)
    assert images.abs().max() <= 1


@pytest.mark.parametrize("clip", [None, 0.3, Threshold(0.9, 2.0)], ids=str)
def test_a_network_in_bfloat16_that_predicts_the_data(clip):
    """What it predicts is clipped, and handed out, in float32."""
    def model(x, t):
        return smooth(x, t).bfloat16()

    x = SAMPLERS["ddim"](model, NOISE, process=VP(), steps=3, prediction="x0", clip=clip)
    same = SAMPLERS["ddim"](lambda x, t: model(x, t).float(), NOISE, process=VP(), steps=3, prediction="x0", clip=clip)
    assert x.dtype == torch.float32 and torch.equal(x, same)
    assert clip != 0.3 or x.abs().max() <= 0.3
    mask = (NOISE > 0).float()
    x = SAMPLERS["ddim"](model, NOISE, process=VP(), steps=3, prediction="x0", clip=clip, image=NOISE, mask=mask)
    assert torch.equal(x[mask == 0], NOISE[mask == 0])


@pytest.mark.parametrize("make, message", [
    (lambda: Clamp(0), "Clamp: bound is 0; expected a number above 0"),
    (lambda: Clamp(math.inf), "Clamp: bound is inf"),
    (lambda: Threshold(1.5), "Threshold: ratio is 1.5; expected a number above 0, at most 1.0"),
    (lambda: Threshold(0.9, 0.5), "Threshold: most is 0.5; expected 1 or more"),
    (lambda: SAMPLERS["ddim"](smooth, NOISE, process=VP(), steps=2, prediction="eps", clip="1"),
     "Clamp: bound is '1'; expected a number above 0")])
def test_bad_bounds(make, message):
    with pytest.raises(ValueError, match=message):
        make()
