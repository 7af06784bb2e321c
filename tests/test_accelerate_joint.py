"""difuse.accelerate on Stable Diffusion 3, Flux.1, Flux.2 and Qwen-Image: what is special to each of them."""
import copy
import functools

import pytest
import torch
from torch import nn

import difuse
from benchmarks.families import load
from benchmarks.families.family import Draw, randomise
from benchmarks.families.proofs import forward_and_gradients, tensors
from difuse.integrations.parts import joined

diffusers = pytest.importorskip("diffusers")
MODELS = ("sd3", "flux", "flux2", "qwenimage")
draw = Draw(torch.float32)


def assert_same(module, kwargs, names=("hidden_states",)):
    """The module's accelerated twin gives its outputs and gradients but for rounding. Returns the report."""
    ours = copy.deepcopy(module)
    report = difuse.accelerate(ours)
    found, wanted = (forward_and_gradients(each, (), kwargs, names) for each in (ours, module))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= 2e-5 * max(value.abs().max(), 1), name
    return report


def output(model, inputs, **more):
    """The model's first output."""
    with torch.no_grad():
        return tensors(model(**{**inputs, **more}))[0]


def near(ours, eager):
    """Whether two results differ by rounding alone."""
    return (ours - eager).abs().max() <= 2e-5 * eager.abs().max()


def attentions(model):
    """The attention modules, which carry processors."""
    return [module for module in model.modules() if hasattr(module, "processor")]


# Stable Diffusion 3

@pytest.mark.parametrize("last", [False, True], ids=["block", "last"])
@pytest.mark.parametrize("dual", [False, True], ids=["one", "dual"])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_joint_block(qk_norm, dual, last):
    from diffusers.models.attention import JointTransformerBlock
    block = randomise(JointTransformerBlock(32, 2, 16, context_pre_only=last, qk_norm=qk_norm, use_dual_attention=dual))
    text, image = block(draw(2, 5, 32), draw(2, 3, 32), draw(2, 32))
    assert (text is None) == last and image.shape == (2, 5, 32)
    report = assert_same(block, {"hidden_states": draw(2, 5, 32), "encoder_hidden_states": draw(2, 3, 32),
                                 "temb": draw(2, 32)}, ("hidden_states", "encoder_hidden_states", "temb"))
    assert report.blocks == (1, 1) and not report.left_alone


def test_block_of_a_controlnet_without_text():
    from diffusers.models.transformers.transformer_sd3 import SD3SingleTransformerBlock
    report = assert_same(randomise(SD3SingleTransformerBlock(32, 2, 16)),
                         {"hidden_states": draw(2, 5, 32), "temb": draw(2, 32)}, ("hidden_states", "temb"))
    assert report.blocks == (1, 1) and not report.left_alone


def test_stable_diffusion_3_without_norms_of_queries():
    from benchmarks.families import sd3
    model = sd3.build(qk_norm=None, dual_attention_layers=())
    assert assert_same(model, sd3.FAMILY.inputs(torch.float32)).blocks == (3, 3)


@pytest.mark.parametrize("qk_norm", ["layer_norm", "l2"])
def test_other_norms_of_queries_are_left_alone(qk_norm):
    from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
    attn = randomise(Attention(query_dim=32, heads=2, dim_head=16, qk_norm=qk_norm, processor=JointAttnProcessor2_0()))
    report = assert_same(nn.ModuleDict({"attn": attn, "gelu": diffusers.models.activations.GEGLU(4, 4)})["attn"],
                         {"hidden_states": draw(2, 5, 32)})
    assert "query and key norms" in report.left_alone[""][1]


def test_chunked_feed_forward_is_honoured():
    from benchmarks.families import sd3
    model, inputs = sd3.build(), sd3.FAMILY.inputs(torch.float32)
    before, calls = output(model, inputs), []
    difuse.accelerate(model)
    model.enable_forward_chunking(1, dim=0)
    model.transformer_blocks[0].ff.register_forward_hook(lambda _module, args, _out: calls.append(args[0].shape[0]))
    assert near(output(model, inputs), before) and calls == [1, 1]


def test_fused_projections_of_the_generic_attention_are_left_alone():
    from benchmarks.families import sd3
    model, inputs = sd3.build(dual_attention_layers=()), sd3.FAMILY.inputs(torch.float32)
    with torch.no_grad():
        model.fuse_qkv_projections()
    before = output(model, inputs)
    report = difuse.accelerate(model)
    reasons = [why for path, (_, why) in report.left_alone.items() if "attn" in path]
    assert len(reasons) == 3 and all("Fused" in why for why in reasons) and report.blocks == (3, 3)
    assert near(output(model, inputs), before)


# Flux.1

@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_fused_projections_are_honoured(name, when):
    subject = load(name)
    model, inputs = subject.build(), subject.inputs(torch.float32)
    before = output(model, inputs)
    if when == "after":
        difuse.accelerate(model)
    with torch.no_grad():
        model.fuse_qkv_projections()
    for attn in attentions(model):
        if getattr(attn, "fused_projections", False):
            attn.to_q.weight.data.zero_()  # only the fused one counts by now
    report = difuse.accelerate(model)
    assert near(output(model, inputs), before)
    assert report.left_alone and all("projections are fused" in why for _, why in report.left_alone.values())


def test_an_ip_adapters_output_is_added():
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
    subject = load("flux")
    model, inputs = subject.build(), subject.inputs(torch.float32)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(48, 20, num_tokens=(3,), scale=0.7))
    randomise(model)
    before = output(model, inputs, joint_attention_kwargs={"ip_hidden_states": [draw(2, 3, 20)]})
    inputs["joint_attention_kwargs"] = {"ip_hidden_states": [draw(2, 3, 20)]}
    assert not near(output(model, inputs), before)
    report = assert_same(model, inputs)
    assert report.blocks == (4, 4)
    assert set(report.left_alone) == {"transformer_blocks.0.attn", "transformer_blocks.1.attn"}


def test_an_attention_mask_is_honoured():
    subject = load("flux")
    attn = subject.build().transformer_blocks[0].attn
    mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    mask[1, ..., 2] = False
    inputs = {"hidden_states": draw(2, 5, 48), "encoder_hidden_states": draw(2, 3, 48)}
    assert not near(output(attn, inputs, attention_mask=mask), output(attn, inputs))
    assert_same(attn, {**inputs, "attention_mask": mask})


@pytest.mark.parametrize("head_dim", [12, 264])
def test_heads_that_the_kernels_do_not_take_are_left_alone(head_dim):
    from diffusers.models.transformers.transformer_flux import FluxTransformerBlock
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock
    reason = f"its heads have {head_dim} dimensions; the kernels take multiples of 8 up to 256"
    table = draw(5, head_dim), draw(5, head_dim)
    report = assert_same(randomise(FluxTransformerBlock(2 * head_dim, 2, head_dim)),
                         {"hidden_states": draw(2, 3, 2 * head_dim), "encoder_hidden_states": draw(2, 2, 2 * head_dim),
                          "temb": draw(2, 2 * head_dim), "image_rotary_emb": table})
    assert report.blocks == (1, 1) and report.left_alone["attn"][1] == reason
    report = difuse.accelerate(WanTransformerBlock(2 * head_dim, 32, 2))
    assert {name: why for name, (_, why) in report.left_alone.items()} == {"attn1": reason, "attn2": reason}


@pytest.mark.parametrize("controlled", [False, True])
def test_runs_of_tokens_are_joined_without_a_copy_where_they_neighbour(controlled):
    model, inputs = load("flux").build(), load("flux").inputs(torch.float32)
    if controlled:  # a ControlNet adds to the image tokens between the blocks
        inputs["controlnet_single_block_samples"] = [draw(2, 15, 48), draw(2, 15, 48)]
    assert_same(model, inputs)
    x = draw(2, 7, 48)
    first, second = x[:, :3], x[:, 3:]
    assert joined(first, second) is x
    for a, b in ((second, first), (first, second + 1), (first, x[:, 4:]), (x[:, 1:4], second),
                 (first[..., :24], second[..., :24])):
        assert torch.equal(joined(a, b), torch.cat((a, b), dim=1)) and joined(a, b) is not x


# Flux.2

@pytest.mark.parametrize("shape", ["[B,kD]", "[B,1,kD]", "[1,1,kD]", "[B,S,kD]"])
def test_modulation_per_sample_for_all_and_per_token(shape):
    from diffusers.models.transformers.transformer_flux2 import Flux2SingleTransformerBlock, Flux2TransformerBlock

    def mod(tokens, count):
        leading = {"[B,kD]": (2,), "[B,1,kD]": (2, 1), "[1,1,kD]": (1, 1), "[B,S,kD]": (2, tokens)}
        return draw(*leading[shape], count * 32)

    assert_same(randomise(Flux2TransformerBlock(32, 2, 16)),
                {"hidden_states": draw(2, 5, 32), "encoder_hidden_states": draw(2, 3, 32), "temb_mod_img": mod(5, 6),
                 "temb_mod_txt": mod(3, 6)}, ("hidden_states", "encoder_hidden_states", "temb_mod_img", "temb_mod_txt"))
    block = randomise(Flux2SingleTransformerBlock(32, 2, 16))
    assert_same(block, {"hidden_states": draw(2, 8, 32), "encoder_hidden_states": None, "temb_mod": mod(8, 3)},
                ("hidden_states", "temb_mod"))
    assert_same(block, {"hidden_states": draw(2, 5, 32), "encoder_hidden_states": draw(2, 3, 32), "temb_mod": mod(8, 3),
                        "split_hidden_states": True}, ("hidden_states", "encoder_hidden_states", "temb_mod"))


@pytest.mark.parametrize("caching", [False, True], ids=["default processors", "caching processors"])
def test_reference_images_with_a_time_of_their_own_and_cached_keys(caching):
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
    subject = load("flux2")
    model, inputs = subject.build(), subject.inputs(torch.float32)
    if caching:
        for block in model.transformer_blocks:
            block.attn.set_processor(Flux2KVAttnProcessor())
        for block in model.single_transformer_blocks:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    ours = copy.deepcopy(model)
    assert difuse.accelerate(ours).blocks == (4, 4)
    found = []
    with torch.no_grad():
        for each in (model, ours):
            image, cache = each(**inputs, kv_cache_mode="extract", num_ref_tokens=4)
            later = {**inputs, "hidden_states": inputs["hidden_states"][:, 4:], "img_ids": inputs["img_ids"][4:]}
            found.append((image, each(**later, kv_cache_mode="cached", kv_cache=cache)[0]))
    assert all(near(a, b) for a, b in zip(*found, strict=True)) and found[0][0].shape[1] == 11


def test_another_activation_is_left_alone():
    from diffusers.models.transformers.transformer_flux2 import Flux2FeedForward
    feed_forward = randomise(Flux2FeedForward(32))
    feed_forward.act_fn.gate_fn = nn.Mish()
    assert "Mish" in assert_same(feed_forward, {"x": draw(2, 5, 32)}, ("x",)).left_alone["act_fn"][1]


# Qwen-Image

@pytest.mark.parametrize("mask", ["none", "short", "holes", "nothing"])
def test_text_masks(mask):
    subject = load("qwenimage")
    model, inputs = subject.build(), subject.inputs(torch.float32)
    inputs["encoder_hidden_states_mask"] = {
        "none": None, "short": torch.arange(7) < torch.tensor([[7], [1]]),
        "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 0, 1, 1, 0]]),
        "nothing": torch.tensor([[0], [1]]).expand(2, 7)}[mask]
    if mask != "none":
        assert not near(output(model, inputs), output(model, inputs, encoder_hidden_states_mask=None))
    assert_same(model, inputs, ("hidden_states", "encoder_hidden_states"))


def test_a_mask_of_another_dtype_takes_the_own_forward():
    attn = load("qwenimage").build().transformer_blocks[0].attn
    inputs = {"hidden_states": draw(2, 5, 48), "encoder_hidden_states": draw(2, 3, 48)}
    assert_same(attn, {**inputs, "encoder_hidden_states_mask": draw(2, 3)})


def test_two_conditions_of_one_sample_chosen_by_token():
    from benchmarks.families import qwenimage
    model, inputs = qwenimage.build(zero_cond_t=True), qwenimage.FAMILY.inputs(torch.float32)
    inputs["img_shapes"] = [[(1, 3, 3), (1, 2, 3)]] * 2
    assert assert_same(model, inputs, ("hidden_states", "encoder_hidden_states")).blocks == (2, 2)
    block = model.transformer_blocks[0]
    index = torch.randint(0, 2, (2, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int)
    assert 0 < index.sum() < 10
    assert_same(block, {"hidden_states": draw(2, 5, 48), "encoder_hidden_states": draw(2, 3, 48),
                        "encoder_hidden_states_mask": None, "temb": draw(4, 48), "modulate_index": index},
                ("hidden_states", "encoder_hidden_states", "temb"))


# all of them

@pytest.mark.parametrize("name", ["flux", "flux2", "qwenimage"])
def test_float16_that_overflows_is_clipped(name):
    subject = load(name)
    model = subject.build()
    for path, module in model.named_modules():
        if path.endswith(("proj_out", "ff_context.linear_out", "ff_context.net.2", "txt_mlp.net.2", "img_mlp.net.2",
                          "attn.to_out")) and isinstance(module, nn.Linear):
            module.weight.data *= 3e5
    model.half()
    found = []
    for module in (model.transformer_blocks[0], *getattr(model, "single_transformer_blocks", ())[:1]):
        module.register_forward_hook(lambda _module, _args, out: found.extend(tensors(out)))
    output(model, subject.inputs(torch.float16))
    wanted, found[:] = list(found), []
    assert difuse.accelerate(model).blocks == (subject.blocks, subject.blocks)
    output(model, subject.inputs(torch.float16))
    clipped = [eager.abs() == 65504 for eager in wanted]
    assert any(full.any() and not full.all() for full in clipped) and len(found) == len(wanted)
    for ours, eager, full in zip(found, wanted, clipped, strict=True):
        assert (full != (ours.abs() == 65504)).float().mean() < 0.02
        assert (torch.isfinite(ours) != torch.isfinite(eager)).float().mean() < 0.02


def counting(processor, calls):
    """A user's processor, derived from diffusers' own."""
    own = type(processor).__call__

    @functools.wraps(own)
    def call(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)
    return type("Counting", (type(processor),), {"__call__": call})()


@pytest.mark.parametrize("name", MODELS)
def test_a_processor_set_later_is_honoured(name):
    subject = load(name)
    model, inputs = subject.build(), subject.inputs(torch.float32)
    before = output(model, inputs)
    difuse.accelerate(model)
    calls = []
    for attn in attentions(model):
        attn.set_processor(counting(attn.processor, calls))
    assert near(output(model, inputs), before)
    assert len(calls) == len(set(calls)) == len(attentions(model)) >= subject.blocks
    assert "Counting" in difuse.explain(model)


@pytest.mark.parametrize("name", ["flux", "flux2", "qwenimage"])
def test_an_attention_backend_set_later_is_honoured(name, monkeypatch):
    from diffusers.models import attention_dispatch
    registry, names = attention_dispatch._AttentionBackendRegistry, attention_dispatch.AttentionBackendName
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)  # the setter changes it for good
    subject = load(name)
    model, inputs = subject.build(), subject.inputs(torch.float32)
    difuse.accelerate(model)
    before, calls, math = output(model, inputs), [], registry._backends[names._NATIVE_MATH]

    @functools.wraps(math)
    def spy(*args, **kwargs):
        calls.append(1)
        return math(*args, **kwargs)

    monkeypatch.setitem(registry._backends, names._NATIVE_MATH, spy)
    model.set_attention_backend("_native_math")
    assert near(output(model, inputs), before) and len(calls) == len(attentions(model))
    assert "by now refused" in difuse.explain(model)


@pytest.mark.parametrize("name", MODELS)
def test_unknown_arguments_reach_the_own_attention(name):
    model = load(name).build()
    attn = model.transformer_blocks[0].attn
    inputs = {"hidden_states": draw(2, 5, 48), "encoder_hidden_states": draw(2, 3, 48)}
    before = attn(**inputs)
    difuse.accelerate(model)
    assert all(near(a, b) for a, b in zip(attn(**inputs, unheard_of=1), before, strict=True))
