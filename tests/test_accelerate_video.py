"""What is special to Wan, LTX-Video and HiDream under difuse.accelerate: timesteps per token, image tokens, masks."""
import copy

import pytest
import torch

import difuse

pytest.importorskip("diffusers")
from benchmarks.families import hidream, load, ltx, wan  # noqa: E402
from benchmarks.families.family import Draw, randomise  # noqa: E402
from benchmarks.families.proofs import distance, forward_and_gradients, truth  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(model, inputs, dtype, names=("hidden_states", "encoder_hidden_states")):
    """Within the error budget, forward and all gradients, with the fused ops and nothing else."""
    true = truth(model, (), inputs, names)
    ours = copy.deepcopy(model)
    report = difuse.accelerate(ours, strict=True)
    difuse.explain_reset()
    found = forward_and_gradients(ours, (), inputs, names)
    ran = difuse.explain()
    assert report.blocks[0] and "gate_residual_norm_modulate" in ran and "attention" in ran, ran
    eager = forward_and_gradients(model, (), inputs, names)
    result = distance(found, eager, true, dtype)
    assert result.ok, result
    return ours


@pytest.fixture
def own_forwards(monkeypatch):
    """Calls of the classes' own forwards of blocks and attentions while a test runs: names of classes."""
    from diffusers.models.transformers import transformer_hidream_image, transformer_ltx, transformer_wan
    calls = []
    for module in (transformer_wan, transformer_ltx, transformer_hidream_image):
        for name, cls in vars(module).items():
            if isinstance(cls, type) and name.endswith(("TransformerBlock", "Attention")):
                def own(self, *args, _forward=cls.forward, _name=name, **kwargs):
                    calls.append(_name)
                    return _forward(self, *args, **kwargs)
                monkeypatch.setattr(cls, "forward", own)
    return calls


def run(model, inputs):
    """The output, without gradients."""
    with torch.no_grad():
        return model(**inputs)[0]


def near(ours, eager):
    """Whether two float32 results differ by rounding alone."""
    return (ours - eager).abs().max() <= 2e-5 * eager.abs().max()


@every_dtype
def test_wan_with_a_timestep_per_token(dtype):
    inputs = load("wan").inputs(dtype)
    inputs["timestep"] = torch.linspace(20, 950, 2 * 45).view(2, 45)  # 3 x 3 x 5 patches
    check(wan.build().to(dtype), inputs, dtype)


@every_dtype
@pytest.mark.parametrize("image_tokens", [5, 0])
def test_wan_from_an_image(dtype, image_tokens, own_forwards):
    draw = Draw(dtype, seed=2)
    model = wan.build(image_dim=12, added_kv_proj_dim=48).to(dtype)
    inputs = load("wan").inputs(dtype) | {"encoder_hidden_states": draw(2, 512, 20),
                                            "encoder_hidden_states_image": draw(2, image_tokens, 12)}
    if image_tokens:
        check(model, inputs, dtype, ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_image"))
        return
    expected = run(model, inputs)  # an attention to no key gives zeros in both
    difuse.accelerate(model)
    own_forwards.clear()
    found = run(model, inputs)
    assert not own_forwards and (found - expected).abs().max() <= 0.05 * expected.abs().max()


@every_dtype
def test_wan_without_a_norm_before_the_text(dtype):
    check(wan.build(cross_attn_norm=False).to(dtype), load("wan").inputs(dtype), dtype)


@pytest.mark.parametrize("per_token", [False, True])
def test_wan_in_bfloat16_as_diffusers_loads_it(per_token, tmp_path):
    wan.build().save_pretrained(tmp_path)
    model = type(wan.build()).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    block = model.blocks[0]
    assert block.scale_shift_table.dtype == block.norm2.weight.dtype == torch.float32
    assert block.attn1.to_q.weight.dtype == torch.bfloat16
    inputs = load("wan").inputs(torch.bfloat16)
    if per_token:
        inputs["timestep"] = torch.linspace(20, 950, 2 * 45).view(2, 45)
    ours = check(model, inputs, torch.bfloat16)
    assert run(ours, inputs).dtype == torch.bfloat16


@every_dtype
@pytest.mark.parametrize("per_token", [False, True])
def test_wan_keeps_no_sum_of_table_and_timestep(dtype, per_token):
    block = randomise(wan.WanTransformerBlock(48, 72, 3, cross_attn_norm=True)).to(dtype)
    draw, S = Draw(dtype), 64
    tables = wan.WanRotaryPosEmbed(16, (1, 2, 2), 16)(torch.empty(1, 4, 1, 16, 16))
    inputs = draw(2, S, 48), draw(2, 7, 48), draw(2, S, 6, 48) if per_token else draw(2, 6, 48), tables
    difuse.accelerate(block)
    with Sizes() as sizes, torch.no_grad():
        block(*inputs)
    assert sizes.largest <= 2 * S * 72  # the MLP's, where all six modulations would take 2*S*6*48


@every_dtype
def test_ltx_keeps_no_sum_of_table_and_timestep(dtype):
    block = randomise(ltx.LTXVideoTransformerBlock(40, 5, 8, cross_attention_dim=40)).to(dtype)
    draw, S = Draw(dtype), 64
    inputs = draw(2, S, 40), draw(2, 7, 40), draw(2, S, 6 * 40)
    difuse.accelerate(block)
    with Sizes() as sizes, torch.no_grad():
        block(*inputs)
    assert sizes.largest <= 2 * S * 4 * 40  # the MLP's


class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any operation gave a new tensor of."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.largest = max(self.largest, result.numel())
        return result


@every_dtype
def test_ltx_with_a_timestep_per_token(dtype):
    inputs = load("ltx").inputs(dtype)
    inputs["timestep"] = torch.linspace(20, 950, 2 * 30).view(2, 30)
    check(ltx.build().to(dtype), inputs, dtype)


@every_dtype
def test_ltx_with_text_that_is_masked_altogether(dtype):
    inputs = load("ltx").inputs(dtype)
    inputs["encoder_attention_mask"][1] = 0  # -10000 is finite: all its tokens weigh the same
    check(ltx.build().to(dtype), inputs, dtype)


def test_ltx_without_a_mask_and_with_masks_per_query(own_forwards):
    model, inputs = ltx.build(), load("ltx").inputs(torch.float32)
    masks = [None, torch.randn(2, 1, 9), torch.randn(2, 30, 9)]
    expected = [run(model, inputs | {"encoder_attention_mask": mask}) for mask in masks]
    difuse.accelerate(model)
    for mask, before in zip(masks, expected, strict=True):
        own_forwards.clear()
        assert near(run(model, inputs | {"encoder_attention_mask": mask}), before)
        fell_back = mask is not None and mask.shape[1] > 1
        assert own_forwards == (["LTXAttention"] * 2 if fell_back else [])


@every_dtype
def test_ltx_with_weights_in_its_norms_and_one_video_for_all(dtype):
    inputs = load("ltx").inputs(dtype)
    coordinates = torch.rand(1, 3, 30, generator=torch.Generator().manual_seed(3)) * 20
    inputs = {key: value for key, value in inputs.items() if key not in ("num_frames", "height", "width")}
    check(ltx.build(norm_elementwise_affine=True).to(dtype), inputs | {"video_coords": coordinates}, dtype)


HIDREAM = ("hidden_states", "encoder_hidden_states_t5")


@every_dtype
@pytest.mark.parametrize("options", [{"axes_dims_rope": (4, 2, 2)}, {"axes_dims_rope": (4, 6, 6)}],
                         ids=["half of the head turns", "all of it"])
@pytest.mark.parametrize("square", [False, True], ids=["masked", "square"])
def test_hidream_rotations_and_masks(dtype, options, square):
    inputs = load("hidream").inputs(dtype)
    if square:
        inputs["hidden_states"] = Draw(dtype)(2, 4, 6, 6)
    check(hidream.build(**options).to(dtype), inputs, dtype, HIDREAM)


def test_hidream_with_routed_experts(own_forwards):
    model, inputs = hidream.build(num_routed_experts=4), load("hidream").inputs(torch.float32)
    expected = run(model, inputs)
    assert difuse.accelerate(model, strict=True).blocks == (4, 4)
    own_forwards.clear()
    assert near(run(model, inputs), expected) and not own_forwards


def test_hidream_with_routed_experts_in_training():
    model = hidream.build(num_routed_experts=4, force_inference_output=False).train()
    inputs = load("hidream").inputs(torch.float32)
    ours = copy.deepcopy(model)
    difuse.accelerate(ours)
    eager, found = (forward_and_gradients(each, (), inputs, HIDREAM) for each in (model, ours))
    assert eager.keys() == found.keys() and all(near(found[key], eager[key]) for key in eager)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_inputs_that_are_not_fused_reach_the_class(name, own_forwards):
    chosen = load(name)
    model = chosen.build()
    blocks = model.blocks if name == "wan" else model.transformer_blocks
    D = blocks[0].attn1.to_q.in_features
    x, context, mask = torch.randn(2, 6, D), torch.randn(2, 5, D), torch.randn(2, 1, 6, 5)
    calls = {"wan": [(x, context, mask), (x, None, torch.randn(2, 1, 6, 6))], "ltx": [(x, context, mask[:, 0])]}[name]
    with torch.no_grad():
        expected = [blocks[0].attn2(*args) for args in calls]
        difuse.accelerate(model)
        for args, before in zip(calls, expected, strict=True):
            own_forwards.clear()
            assert torch.equal(blocks[0].attn2(*args), before) and own_forwards


def test_what_is_left_alone():
    model = wan.build()
    model.blocks[0].attn1.fuse_projections()
    model.blocks[1].attn2.set_processor(type("Own", (), {"__call__": lambda self, *_: None})())
    report = difuse.accelerate(model)
    assert report.blocks == (2, 2)
    assert {path: why for path, (_, why) in report.left_alone.items()}.keys() == {"blocks.0.attn1", "blocks.1.attn2"}
    model = ltx.build()
    model.transformer_blocks[0].norm1 = torch.nn.LayerNorm(40)
    assert "norms" in difuse.accelerate(model).left_alone["transformer_blocks.0"][1]
