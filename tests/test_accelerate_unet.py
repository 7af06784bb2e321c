"""difuse.accelerate on UNets and autoencoders: what is special to them. What all families share: test_accelerate.py."""
import copy

import pytest
import torch
from torch import nn

import difuse
from benchmarks.families import load
from benchmarks.families.family import Draw, randomise
from benchmarks.families.proofs import forward_and_gradients, tensors

diffusers = pytest.importorskip("diffusers")
from diffusers.models.resnet import ResnetBlock2D  # noqa: E402

DRAW = Draw(torch.float32)
LAST = torch.channels_last


def near(ours, eager):
    """Whether two float32 results differ by rounding alone, and lie in memory alike."""
    return ours.stride() == eager.stride() and (ours - eager).abs().max() <= 2e-5 * eager.abs().max()


def same(ours, eager):
    """Whether two results of forward_and_gradients in float32 differ by rounding alone."""
    return ours.keys() == eager.keys() and all(
        (ours[key] - eager[key]).abs().max() <= 2e-5 * eager[key].abs().max() for key in eager)


def fused(module):
    """A copy with our forwards."""
    ours = copy.deepcopy(module)
    difuse.accelerate(ours)
    return ours


def inputs(block, size=(6, 4), batch=2, last=False):
    """What a block takes: as keywords."""
    x = DRAW(batch, block.in_channels, *size)
    temb = None if block.time_emb_proj is None else DRAW(batch, block.time_emb_proj.in_features)
    return {"input_tensor": x.to(memory_format=LAST) if last else x, "temb": temb}


RESNETS = {
    "plain": {},
    "without a timestep": {"temb_channels": None, "eps": 1e-6},
    "wider, more groups later": {"out_channels": 24, "groups_out": 8},
    "shortcut without bias": {"use_in_shortcut": True, "conv_shortcut_bias": False},
    "scale and shift": {"time_embedding_norm": "scale_shift"},
    "timestep not activated": {"skip_time_act": True},
    "output scaled": {"output_scale_factor": 2**0.5},
    "up": {"up": True},
    "up, fir": {"up": True, "kernel": "fir"},
    "up, sde_vp": {"up": True, "kernel": "sde_vp", "out_channels": 8},
    "down": {"down": True, "time_embedding_norm": "scale_shift", "skip_time_act": True},
    "down, fir": {"down": True, "kernel": "fir"},
}


def resnet(**options):
    """A small ResnetBlock2D."""
    return randomise(ResnetBlock2D(**{"in_channels": 16, "temb_channels": 20, "groups": 4, **options}))


@pytest.mark.parametrize("weights_last,last", [(False, False), (True, True), (False, True)],
                         ids=["contiguous", "channels_last", "only the image in channels_last"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("options", RESNETS.values(), ids=RESNETS)
def test_options_of_resnet_blocks(options, training, weights_last, last):
    block = resnet(**options).train(training)
    if weights_last:
        block = block.to(memory_format=LAST)
    ours, given = fused(block), inputs(block, last=last)
    difuse.explain_reset()
    with torch.no_grad():
        assert near(ours(**given), block(**given))
    assert "group_norm_act" in difuse.explain() and "reference" not in difuse.explain()
    names = [key for key, value in given.items() if value is not None]
    assert same(*(forward_and_gradients(each, (), given, names) for each in (ours, block)))


def test_sixty_four_upsampled_are_contiguous_as_in_eager():
    block = resnet(up=True, kernel="sde_vp").to(memory_format=LAST)  # diffusers' Upsample2D does so itself
    given = inputs(block, (2, 2), 64, last=True)
    with torch.no_grad():
        assert near(fused(block)(**given), block(**given))


@pytest.mark.parametrize("change,reason", [
    (lambda block: setattr(block, "nonlinearity", nn.Mish()), "activation is Mish"),
    (lambda block: setattr(block, "norm2", nn.BatchNorm2d(16)), "norms is BatchNorm2d"),
], ids=["activation", "norm"])
def test_resnet_blocks_left_alone(change, reason):
    model = nn.Sequential(nn.Identity(), resnet())
    change(model[1])
    model.eval()
    report = difuse.accelerate(model)
    assert report.blocks == (0, 1) and reason in str(report)
    given = inputs(model[1])
    ours = model[1](**given)
    difuse.restore(model)
    assert near(ours, model[1](**given))


def test_what_the_fused_block_does_not_take_goes_to_its_own_forward():
    block = resnet(temb_channels=None)
    ours, x, temb = fused(block), DRAW(2, 16, 4, 4), DRAW(2, 16, 1, 1)
    assert near(ours(x, temb), block(x, temb))  # a timestep without a projection is added as it is
    assert not near(ours(x, temb), ours(x, None))
    block = resnet()
    ours, given = fused(block), inputs(block)
    with pytest.warns(FutureWarning, match="scale"):
        assert near(ours(**given, scale=0.5), block(**given))
    with pytest.raises(TypeError):  # of silu, in eager, too
        ours(given["input_tensor"], None)


@pytest.mark.parametrize("name", ["norm1", "norm2", "nonlinearity"])
def test_hooks_on_what_a_resnet_block_bypasses(name):
    block = resnet()
    given, ours = inputs(block), fused(block)
    for each in (block, ours):
        getattr(each, name).register_forward_hook(lambda module, args, out: 2 * out)
    assert near(ours(**given), block(**given))


@pytest.mark.parametrize("name", ["unet", "unet_xl", "vae"])
def test_models_in_channels_last(name):
    subject = load(name)
    model = subject.build().to(memory_format=LAST)
    given = subject.inputs(torch.float32)
    ours, eager = fused(model), model
    with torch.no_grad():
        found, expected = (tensors(each(**given))[0] for each in (ours, eager))
        assert near(found, expected) and expected.is_contiguous(memory_format=LAST)
    assert same(*(forward_and_gradients(each, (), given, ["sample"]) for each in (ours, eager)))


def test_options_of_a_unet_at_run_time():
    subject = load("unet")
    eager, given = subject.build(), subject.inputs(torch.float32)
    ours = fused(eager)
    draw = Draw(torch.float32, seed=4)
    residuals = {"down_block_additional_residuals": tuple(
        draw(2, channels, *size) for channels, size in ((16, (6, 10)), (16, (6, 10)), (16, (3, 5)), (32, (3, 5)))),
        "mid_block_additional_residual": draw(2, 32, 3, 5)}  # of a ControlNet

    def both(**more):
        with torch.no_grad():
            found, expected = (each(**{**given, **more})[0] for each in (ours, eager))
        assert near(found, expected)
        return expected

    plain = both()
    assert not near(both(**residuals), plain)
    both(cross_attention_kwargs={"scale": 1.0})
    for switch, back in ((lambda m: m.enable_freeu(0.9, 0.2, 1.5, 1.6), lambda m: m.disable_freeu()),
                         (lambda m: m.set_attention_slice(1), lambda m: m.set_default_attn_processor()),
                         (lambda m: m.fuse_qkv_projections(), lambda m: m.unfuse_qkv_projections())):
        for each in (ours, eager):
            switch(each)
        both()
        for each in (ours, eager):
            back(each)
    assert near(both(), plain)


def test_an_autoencoder_called_by_halves_sliced_and_tiled():
    subject = load("vae")
    eager = subject.build()
    ours, x = fused(eager), DRAW(2, 3, 24, 16)
    with torch.no_grad():
        for switch in ((lambda m: None), (lambda m: m.enable_slicing()), (lambda m: m.enable_tiling())):
            for each in (ours, eager):
                switch(each)
                each.tile_sample_min_size, each.tile_latent_min_size = 12, 6
            found, z = (each.encode(x).latent_dist.parameters for each in (ours, eager))
            assert near(found, z)
            assert near(*(each.decode(z[:, :4]).sample for each in (ours, eager)))


def test_the_attention_of_an_autoencoder_keeps_its_forward():
    eager = load("vae").build()
    report = difuse.accelerate(eager)
    reasons = {path: why for path, (_, why) in report.left_alone.items()}
    assert list(reasons) == [f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")]
    assert all("group_norm" in why for why in reasons.values())
    assert {f"{path}.group_norm" for path in reasons} < set(report.accelerated)  # but not that of its norm


def test_lora_on_convolutions_and_timesteps():
    peft = pytest.importorskip("peft")
    eager = load("unet").build()
    given = load("unet").inputs(torch.float32)
    with torch.no_grad():
        plain = eager(**given)[0]
    eager = peft.get_peft_model(eager, peft.LoraConfig(
        r=2, target_modules=["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in"], init_lora_weights=False))
    ours = copy.deepcopy(eager)
    assert difuse.accelerate(ours).blocks == (12, 12)
    found, expected = (forward_and_gradients(each, (), given, ["sample"]) for each in (ours, eager))
    assert same(found, expected) and not near(expected["out0"], plain)


# GroupNorm by itself

def test_a_group_norm_makes_no_model_known():
    with pytest.raises(ValueError, match="nothing in Sequential is known"):
        difuse.accelerate(nn.Sequential(nn.Conv2d(4, 8, 1), nn.GroupNorm(2, 8)))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("x", [DRAW(2, 8), DRAW(2, 8, 5), DRAW(2, 8, 3, 5), DRAW(2, 8, 3, 5).to(memory_format=LAST),
                               DRAW(2, 8, 3, 10)[..., ::2], DRAW(2, 3, 8, 5).transpose(1, 2), DRAW(2, 8, 3, 2, 5),
                               DRAW(2, 8, 2, 2, 2, 2), DRAW(2, 5, 8).transpose(1, 2)],
                         ids=lambda x: f"{list(x.shape)} {x.stride()}")
def test_group_norms_keep_shape_and_memory_format(x, affine):
    model = nn.Sequential(resnet(), randomise(nn.GroupNorm(2, 8, eps=1e-3, affine=affine)))
    with torch.no_grad():
        assert near(fused(model)[1](x), model[1](x))


def test_group_norms_return_what_eager_does_under_autocast():
    model = nn.Sequential(resnet(), randomise(nn.GroupNorm(2, 8)))
    ours = fused(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            found, expected = (each[1](DRAW(2, 8, 3, 5, dtype=dtype)) for each in (ours, model))
            assert found.dtype == expected.dtype
