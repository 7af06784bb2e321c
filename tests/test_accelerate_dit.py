"""difuse.accelerate on DiT and PixArt: what is special to them. What all families share: test_accelerate.py."""
import copy

import pytest
import torch
from torch import nn

import difuse
from benchmarks.families import facebook_dit
from benchmarks.families.facebook_dit import Attention, DiTBlock, FinalLayer, modulate
from benchmarks.families.family import Draw, randomise

DRAW = Draw(torch.float32)


def near(ours, eager):
    """Whether two float32 results differ by rounding alone."""
    return (ours - eager).abs().max() <= 2e-5 * eager.abs().max()


def why(model):
    """{path: why it was left alone} after accelerate."""
    return {path: reason for path, (_, reason) in difuse.accelerate(model).left_alone.items()}


# facebookresearch: recognised by parts, tried out

class OnesWithout(DiTBlock):
    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(self.norm1(x) * scale1.unsqueeze(1) + shift1.unsqueeze(1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class OtherOrder(DiTBlock):
    def forward(self, x, c):
        scale1, shift1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Parallel(DiTBlock):
    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        y = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        return y + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class Windowed(DiTBlock):
    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift1, scale1)
        x = x + gate1.unsqueeze(1) * torch.cat((self.attn(h[:, :2]), self.attn(h[:, 2:])), dim=1)
        return x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))


class SkipsInTraining(DiTBlock):
    def forward(self, x, c):
        return x if self.training and torch.rand(()) < 2 else super().forward(x, c)


class TakesMore(DiTBlock):
    def forward(self, x, c, rope):
        return super().forward(x, c)


class Upcasts(DiTBlock):
    def forward(self, x, c):
        return super().forward(x, c).float()


@pytest.mark.parametrize("cls", [OnesWithout, OtherOrder, Parallel, Windowed, SkipsInTraining, TakesMore, Upcasts])
def test_a_block_that_computes_something_else_is_left_alone(cls):
    block = nn.ModuleList([cls(48, 3)])  # its gates are no zeros here, but that must not matter
    nn.init.zeros_(block[0].adaLN_modulation[1].weight)
    nn.init.zeros_(block[0].adaLN_modulation[1].bias)
    found = why(block)
    assert list(found) == ["0"] and "its forward computes something else" in found["0"], found


class Rotary(Attention):
    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        q, k = (each * angle.cos() + each.roll(1, -1) * angle.sin() for each in qkv[:2])
        out = nn.functional.scaled_dot_product_attention(q, k, qkv[2])
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class Causal(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class HeadsFirst(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (self.num_heads, 3, self.head_dim)).permute(3, 0, 2, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("cls", [Rotary, Causal, HeadsFirst])
def test_an_attention_that_computes_something_else_is_left_alone_and_its_block_is_not(cls):
    block = randomise(DiTBlock(48, 3))
    block.attn = randomise(cls(48, 3))
    x, c = DRAW(2, 5, 48), DRAW(2, 48)
    before = block(x, c)
    found = why(block)
    assert list(found) == ["attn"] and "its forward computes something else" in found["attn"], found
    assert near(block(x, c), before)


@pytest.mark.parametrize(("change", "reason"), [
    (lambda block: setattr(block.attn, "q_norm", nn.LayerNorm(16)), "q_norm is LayerNorm"),
    (lambda block: setattr(block.attn, "scale", 0.1), "its scale is 0.1"),
    (lambda block: setattr(block, "norm2", nn.LayerNorm(48)), "norm2 is LayerNorm"),
    (lambda block: setattr(block, "norm1", nn.RMSNorm(48, elementwise_affine=False)), "norm1 is RMSNorm"),
])
def test_an_option_that_is_not_fused_is_named(change, reason):
    block = randomise(DiTBlock(48, 3))
    change(block)
    assert any(reason in text for text in why(block).values())


def test_other_parts_are_not_recognised():
    block = DiTBlock(48, 3)
    block.cross_attn = nn.Linear(48, 48)
    del block.attn
    with pytest.raises(ValueError, match="nothing in DiTBlock is known"):
        difuse.accelerate(block)


def test_own_blocks_are_not_touched():
    model = difuse.models.DiT(4, 2, 4, 48, 2, 3, num_classes=10)
    with pytest.raises(ValueError, match="nothing in DiT is known"):
        difuse.accelerate(model)


def test_the_trial_leaves_no_trace():
    model = facebook_dit.build().train()
    calls = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    difuse.explain_reset()
    difuse.accelerate(model)
    assert not calls and torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert difuse.explain() == "no op has run yet"


def test_attention_dropout_in_train_mode():
    block = randomise(DiTBlock(48, 3, attn_drop=0.5)).train()
    ours = copy.deepcopy(block)
    difuse.accelerate(ours)
    x, c = DRAW(2, 5, 48), DRAW(2, 48)
    torch.manual_seed(0)
    eager = block(x, c)
    torch.manual_seed(0)
    assert near(ours(x, c), eager)


@pytest.mark.parametrize("parts", [("q_norm", "k_norm"), ("attn_drop", "proj_drop")])
def test_attentions_of_other_versions(parts):
    class Other(Attention):
        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
            return self.proj((weights @ v).transpose(1, 2).flatten(2))

    attn = randomise(Other(48, 3))
    for name in parts:
        delattr(attn, name)
    ours = copy.deepcopy(attn)
    assert difuse.accelerate(ours).left_alone == {}
    x = DRAW(2, 5, 48)
    assert near(ours(x), attn(x))


def test_final_layer():
    layer = randomise(FinalLayer(48, 2, 4))
    ours = copy.deepcopy(layer)
    assert "" in difuse.accelerate(ours).accelerated
    x, c = DRAW(2, 5, 48), DRAW(2, 48)
    assert near(ours(x, c), layer(x, c))


# diffusers: one embedding for all blocks

@pytest.fixture
def dit():
    """(an unmodified model, an accelerated copy, inputs)"""
    pytest.importorskip("diffusers")
    from benchmarks.families import dit

    model = dit.FAMILY.build()
    ours = copy.deepcopy(model)
    difuse.accelerate(ours)
    return model, ours, dit.FAMILY.inputs(torch.float32)


def runs(model, inputs, grad=False):
    """(output, how often an embedder ran), counted where no hook is seen."""
    count = 0
    emb = type(model.transformer_blocks[0].norm1.emb)
    forward = emb.forward

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        return forward(self, *args, **kwargs)

    emb.forward = counted
    try:
        with torch.set_grad_enabled(grad):
            return model(**inputs)[0], count
    finally:
        emb.forward = forward


def unshared(model, inputs):
    """The output of an accelerated model in eval mode whose blocks all run their own embedder."""
    return runs(model, inputs, grad=True)[0].detach()


def test_equal_embedders_run_once_and_give_the_same_bits(dit):
    model, ours, inputs = dit
    eager, count = runs(model, inputs)
    assert count == 4
    for _ in range(2):
        found, count = runs(ours, inputs)
        assert count == 1 and torch.equal(found, unshared(ours, inputs)) and near(found, eager)


def test_with_gradients_every_copy_runs_and_gets_its_gradient(dit):
    model, ours, inputs = dit
    out, count = runs(ours, inputs, grad=True)
    assert count == 4
    out.sum().backward()
    assert all(p.grad is not None for block in ours.transformer_blocks for p in block.norm1.emb.parameters())


def test_train_mode_drops_labels_in_every_copy(dit):
    model, ours, inputs = dit
    inputs = {**inputs, "hidden_states": DRAW(64, 4, 6, 6), "timestep": torch.arange(64.0),
              "class_labels": torch.arange(64) % 10}
    torch.manual_seed(0)
    eager, _ = runs(model.train(), inputs)
    torch.manual_seed(0)
    found, count = runs(ours.train(), inputs)
    assert count == 4 and near(found, eager)
    ours.eval().transformer_blocks[1].norm1.emb.class_embedder.train()  # only here
    model.eval().transformer_blocks[1].norm1.emb.class_embedder.train()
    torch.manual_seed(0)
    eager, _ = runs(model, inputs)
    torch.manual_seed(0)
    found, count = runs(ours, inputs)
    assert count == 2 and near(found, eager)


def _edit(weight, in_data):
    with torch.no_grad():
        (weight.data if in_data else weight).add_(0.1)


@pytest.mark.parametrize("in_data", [False, True])
@pytest.mark.parametrize("name", ["timestep_embedder.linear_1.weight", "timestep_embedder.linear_2.bias",
                                  "class_embedder.embedding_table.weight"])
def test_copies_that_become_unequal_run_again(dit, name, in_data):
    model, ours, inputs = dit
    assert runs(ours, inputs)[1] == 1
    for each in (model, ours):
        _edit(each.transformer_blocks[2].norm1.emb.get_parameter(name), in_data)
    found, count = runs(ours, inputs)
    assert count == 4 and near(found, runs(model, inputs)[0])
    for each in (model, ours):  # equal again, as an EMA's weights would be
        for block in each.transformer_blocks[:2]:
            _edit(block.norm1.emb.get_parameter(name), in_data)
    found, count = runs(ours, inputs)
    assert count == 1 and near(found, runs(model, inputs)[0])


def test_one_element_that_was_edited_is_seen(dit):
    _, ours, inputs = dit
    assert runs(ours, inputs)[1] == 1
    with torch.no_grad():
        ours.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight[5, 5] += 1
    assert runs(ours, inputs)[1] == 4


def test_an_option_that_differs_is_seen(dit):
    model, ours, inputs = dit
    for each in (model, ours):
        each.transformer_blocks[1].norm1.emb.time_proj.downscale_freq_shift = 0
    found, count = runs(ours, inputs)
    assert count == 4 and near(found, runs(model, inputs)[0])


@pytest.mark.parametrize("path", ["", ".norm1", ".norm1.emb", ".norm1.emb.timestep_embedder.linear_2"])
def test_hooks_see_what_they_saw(dit, path):
    model, ours, inputs = dit
    seen = {}
    for key, each in (("eager", model), ("ours", ours)):
        each.get_submodule("transformer_blocks.1" + path).register_forward_pre_hook(
            lambda _module, args, kwargs, key=key: seen.setdefault(key, []).append((args, kwargs)), with_kwargs=True)
    found, count = runs(ours, inputs)
    eager, _ = runs(model, inputs)
    assert count == 2 and near(found, eager) and len(seen["ours"]) == len(seen["eager"]) == 1
    (args, kwargs), (eager_args, eager_kwargs) = seen["ours"][0], seen["eager"][0]
    assert kwargs.keys() == eager_kwargs.keys()
    for mine, theirs in zip([*args, *kwargs.values()], [*eager_args, *eager_kwargs.values()], strict=True):
        assert type(mine) is type(theirs) and (not isinstance(mine, torch.Tensor) or near(mine, theirs))


@pytest.mark.parametrize("path", ["", ".norm1", ".norm1.emb"])
def test_a_block_that_is_wrapped_gets_the_timestep(dit, path):
    model, ours, inputs = dit
    difuse.restore(ours)
    wrapped = ours.get_submodule("transformer_blocks.0" + path)
    own = wrapped.forward
    wrapped.forward = lambda *args, **kwargs: own(*args, **kwargs)
    report = difuse.accelerate(ours)
    assert path == ".norm1.emb" or "transformer_blocks.0" + path in report.left_alone
    found, count = runs(ours, inputs)
    assert count == (1 if path == ".norm1.emb" else 3)  # the others' once, its own twice, where that is counted
    assert near(found, runs(model, inputs)[0])


def test_under_autocast_and_in_bfloat16(dit):
    model, ours, inputs = dit
    difuse.restore(ours)
    difuse.accelerate(ours, backend="reference")  # kernels may multiply bfloat16 only where there are no gradients
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, count = runs(ours, inputs)
        assert count == 1 and torch.equal(found, unshared(ours, inputs))
    ours.to(torch.bfloat16)
    inputs["hidden_states"] = inputs["hidden_states"].bfloat16()
    found, count = runs(ours, inputs)
    assert count == 1 and torch.equal(found, unshared(ours, inputs))


# diffusers: BasicTransformerBlock and Attention

def block_of(norm_type, **options):
    """A small BasicTransformerBlock of a norm type."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention import BasicTransformerBlock

    return randomise(BasicTransformerBlock(48, 3, 16, norm_type=norm_type, **options))


def inputs_of(block, **more):
    """Inputs for it, with text if it has cross-attention."""
    inputs = {"hidden_states": DRAW(2, 5, 48)}
    if block.norm_type == "ada_norm_zero":
        inputs |= {"timestep": torch.tensor([5.0, 700.0]), "class_labels": torch.tensor([1, 2])}
    if block.norm_type == "ada_norm_single":
        inputs["timestep"] = DRAW(2, 6 * 48)
    if block.attn2 is not None and block.attn2.cross_attention_dim != 48:
        inputs["encoder_hidden_states"] = DRAW(2, 7, 24)
    return inputs | more


KINDS = {
    "DiT": ("ada_norm_zero", {"num_embeds_ada_norm": 10, "norm_elementwise_affine": False}),
    "DiT with norms that have weights": ("ada_norm_zero", {"num_embeds_ada_norm": 10, "norm_eps": 0.5}),
    "DiT with cross-attention": ("ada_norm_zero", {"num_embeds_ada_norm": 10, "cross_attention_dim": 24}),
    "PixArt": ("ada_norm_single", {"cross_attention_dim": 24, "norm_elementwise_affine": False}),
    "PixArt with norms that have weights": ("ada_norm_single", {"cross_attention_dim": 24, "norm_eps": 0.5}),
    "Latte": ("ada_norm_single", {"norm_elementwise_affine": False}),
    "UNet": ("layer_norm", {"cross_attention_dim": 24}),
    "UNet without text": ("layer_norm", {}),
    "UNet, two self-attentions": ("layer_norm", {"double_self_attention": True}),
    "UNet, text in both": ("layer_norm", {"cross_attention_dim": 24, "only_cross_attention": True}),
    "other MLP": ("layer_norm", {"activation_fn": "geglu-approximate", "final_dropout": True, "ff_bias": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_all_kinds(kind):
    norm_type, options = KINDS[kind]
    block = block_of(norm_type, **options)
    ours = copy.deepcopy(block)
    assert difuse.accelerate(ours).left_alone == {}
    inputs = inputs_of(block)
    results = []
    for each in (block, ours):
        x = inputs["hidden_states"].transpose(1, 2).clone().transpose(1, 2).requires_grad_()  # strided channels
        out = each(**{**inputs, "hidden_states": x})
        out.square().sum().backward()
        results.append([out.detach(), x.grad])
    assert all(map(near, *results))


@pytest.mark.parametrize(("norm_type", "options", "reason"), [
    ("ada_norm", {"num_embeds_ada_norm": 10}, "norm_type is ada_norm;"),
    ("layer_norm_i2vgen", {}, "norm_type is layer_norm_i2vgen;"),
    ("layer_norm", {"positional_embeddings": "sinusoidal", "num_positional_embeddings": 9}, "pos_embed is Sinusoidal"),
])
def test_a_block_of_another_kind_is_named(norm_type, options, reason):
    assert reason in why(block_of(norm_type, **options))[""]


@pytest.mark.parametrize("more", [
    {"cross_attention_kwargs": {"scale": 0.5}},
    {"attention_mask": torch.zeros(2, 1, 5)},
    {"encoder_attention_mask": torch.tensor([[0.0] * 7, [0.0] * 4 + [-10000.0] * 3])[:, None]},
    {"encoder_attention_mask": torch.tensor([[-10000.0] * 7, [0.0] * 4 + [-10000.0] * 3])[:, None]},
    {"encoder_attention_mask": DRAW(2, 7)},
    {"encoder_attention_mask": DRAW(2, 5, 7)},
    {"encoder_attention_mask": torch.tensor([[True] * 7, [True] * 4 + [False] * 3])[:, None]},
], ids=["kwargs", "self mask", "padding", "all hidden", "bias per key", "bias per query and key", "bool"])
def test_masks_and_arguments_are_honoured(more):
    block = block_of("ada_norm_single", cross_attention_dim=24, norm_elementwise_affine=False)
    ours = copy.deepcopy(block)
    difuse.accelerate(ours)
    inputs = inputs_of(block, **more)
    if "encoder_attention_mask" in more:
        assert not near(block(**inputs), block(**{**inputs, "encoder_attention_mask": None}))
    found, eager = ours(**inputs), block(**inputs)
    hidden = (inputs.get("encoder_attention_mask", torch.zeros(1)) == -10000).any()
    # beside -1e4 a logit of 1 keeps four digits after the point: eager's own, in float32
    assert (found - eager).abs().max() <= (2e-3 if hidden else 2e-5) * eager.abs().max()


def test_a_fully_hidden_row_is_within_the_error_budget():
    from benchmarks.families.proofs import distance, forward_and_gradients, truth

    block = block_of("ada_norm_single", cross_attention_dim=24, norm_elementwise_affine=False)
    ours = copy.deepcopy(block)
    difuse.accelerate(ours)
    mask = torch.full((2, 1, 7), -10000.0)
    mask[1, 0, :4] = 0
    inputs = inputs_of(block, encoder_attention_mask=mask)
    results = [forward_and_gradients(each, (), inputs, ()) for each in (ours, block)]
    true = truth(block, (), inputs, ())
    keep = [key for key in true if "to_k.bias" not in key]  # whose gradients are zero: softmax ignores a shift
    assert distance(*({key: found[key] for key in keep} for found in (*results, true)), torch.float32).ok


def test_chunked_feed_forward_and_hooks_on_bypassed_norms():
    block = block_of("layer_norm", cross_attention_dim=24)
    inputs = inputs_of(block)
    ours = copy.deepcopy(block)
    difuse.accelerate(ours)
    eager = block(**inputs)
    ours.set_chunk_feed_forward(1, dim=1)
    calls = []
    hook = ours.ff.register_forward_hook(lambda *_: calls.append(1))
    assert near(ours(**inputs), eager) and len(calls) == 5
    hook.remove()
    ours.set_chunk_feed_forward(None)
    calls.clear()
    ours.norm3.register_forward_hook(lambda *_: calls.append(1))
    assert near(ours(**inputs), eager) and calls == [1]


@pytest.mark.parametrize(("options", "reason"), [
    ({"qk_norm": "rms_norm"}, "norm_q is RMSNorm"),
    ({"norm_num_groups": 4}, "group_norm is GroupNorm"),
    ({"cross_attention_norm": "layer_norm"}, "norm_cross is LayerNorm"),
    ({"residual_connection": True}, "adds its input or rescales"),
    ({"rescale_output_factor": 2.0}, "adds its input or rescales"),
    ({"dim_head": 12, "heads": 4}, "its heads have 12 dimensions; the kernels take multiples of 8"),
    ({"scale_qk": False}, "its processor is AttnProcessor,"),
])
def test_an_attention_with_an_option_that_is_not_fused_is_named(options, reason):
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    attn = DiffusersAttention(**{"query_dim": 48, "heads": 3, "dim_head": 16, **options})
    assert reason in why(attn)[""]


def test_upcast_flags_are_not_read_by_the_processor():
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    attn = randomise(DiffusersAttention(48, heads=3, dim_head=16, upcast_attention=True, upcast_softmax=True))
    ours = copy.deepcopy(attn)
    assert difuse.accelerate(ours).left_alone == {}
    x = DRAW(2, 5, 48)
    assert near(ours(x), attn(x))


def test_another_processor_after_accelerate_is_used():
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention as DiffusersAttention

    class Zero:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
            return torch.zeros_like(hidden_states)

    attn = randomise(DiffusersAttention(48, heads=3, dim_head=16))
    difuse.accelerate(attn)
    x = DRAW(2, 5, 48)
    before = attn(x)
    attn.set_attention_slice(1)
    assert near(attn(x), before)
    attn.set_processor(Zero())
    assert not attn(x).any() and "its processor is Zero" in difuse.explain(attn)


def test_keys_and_values_of_a_prompt_are_kept_when_asked():
    block = block_of("ada_norm_single", cross_attention_dim=24, norm_elementwise_affine=False)
    difuse.accelerate(block)
    inputs = inputs_of(block)
    with torch.no_grad():
        before = block(**inputs)
        with difuse.integrations.conditioning.cache_conditioning(block) as cache:
            assert torch.equal(block(**inputs), before) and torch.equal(block(**inputs), before)
    assert (cache.hits, cache.misses) == (1, 1)
