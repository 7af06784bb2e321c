"""Frozen models give the images of the model they were made from, leave it alone, and say what they cannot do."""
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import difuse
from difuse.diffusion import VP
from difuse.inference.packed import Modulation, PackedLinear
from tests.tiny_training import tiny_model

pytest.importorskip("diffusers")
from benchmarks.families import NAMES, load  # noqa: E402  needs diffusers
from benchmarks.families.proofs import Truth, cast, tensors  # noqa: E402

CALL = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3)), torch.tensor([5, 500, 999]), torch.tensor(
    [0, 2, 3])


@pytest.fixture
def model():
    return tiny_model().eval()


def out(model, *args, **kwargs):
    with torch.no_grad():
        return tensors(model(*args, **kwargs))[0]


def error(found, truth):
    return ((found - truth).double().square().mean() / truth.double().square().mean()).sqrt().item()


def state(model):
    return {name: (t.data_ptr(), t._version, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}


def unchanged(model, before):
    after = state(model)
    return before.keys() == after.keys() and all(
        a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(after.values(), before.values(), strict=True))


# equal

@pytest.mark.parametrize("name", NAMES)
def test_every_family_within_the_error_budget(name):
    """At most 1.5 times eager's error against float64 and one rounding; the model is not changed."""
    family = load(name)
    eager, inputs = family.build().eval(), family.inputs(torch.float32)
    before, classes = state(eager), [type(module) for module in eager.modules()]
    frozen = difuse.freeze(eager)
    with Truth():
        truth = tensors(copy.deepcopy(eager).double()(**cast(inputs, torch.float64, grad=True)))[0].detach()
    found, own = out(frozen, **inputs), out(eager, **inputs)
    assert not found.requires_grad
    assert error(found, truth) <= 1.5 * error(own, truth) + torch.finfo(torch.float32).eps
    assert unchanged(eager, before) and [type(module) for module in eager.modules()] == classes
    assert not any("forward" in vars(module) for module in eager.modules())
    assert torch.equal(own, out(eager, **inputs))


def test_no_weight_is_shared_and_every_product_is_packed(model):
    frozen, expected = difuse.freeze(model), out(model, *CALL)
    plain = [name for name, module in frozen.named_modules() if type(module) is nn.Linear]
    assert all("adaLN_modulation" in name for name in plain)
    assert sum(isinstance(module, PackedLinear) for module in frozen.modules()) == 8
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    memory = frozen.memory()
    assert memory["packed"] + memory["other"] == size and memory["hoisted"] == 0
    with torch.no_grad():
        for weight in (*model.parameters(), *model.buffers()):
            weight.add_(1)
    torch.testing.assert_close(out(frozen, *CALL), expected, rtol=1e-5, atol=1e-5)


def test_weights_of_the_model_are_not_kept_alive():
    model = tiny_model().eval()
    linear = weakref.ref(model.blocks[0].attn.qkv)
    weight = weakref.ref(model.blocks[0].attn.qkv.weight)
    frozen = difuse.freeze(model)
    del model
    gc.collect()
    assert linear() is None and weight() is None and isinstance(frozen, difuse.inference.freeze.Frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_in_another_dtype_is_frozen_in_float32(model, dtype):
    frozen = difuse.freeze(copy.deepcopy(model).to(dtype))
    torch.testing.assert_close(out(frozen, *CALL), out(model, *CALL), rtol=0.05, atol=0.05)
    assert out(frozen, *CALL).dtype == torch.float32


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelus_are_computed_with_the_product_before_them(approximate):
    model = load("facebook_dit").build().eval()
    for block in model.blocks:
        block.mlp.act = nn.GELU(approximate)
    frozen = difuse.freeze(model)
    assert {block.mlp.fc1.activation for block in frozen.blocks} == {("gelu", approximate)}
    inputs = load("facebook_dit").inputs(torch.float32)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


class GatedMlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(48, 144), nn.GELU(), nn.Linear(72, 48)

    def forward(self, x):
        a, b = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(a * self.act(b))


class ResidualMlp(GatedMlp):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(48, 72)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h + self.act(h))


@pytest.mark.parametrize("mlp", [GatedMlp, ResidualMlp])
def test_an_mlp_that_does_more_with_fc1_keeps_its_gelu(mlp):
    model, inputs = load("facebook_dit").build().eval(), load("facebook_dit").inputs(torch.float32)
    for block in model.blocks:
        assert block.mlp.fc1.in_features == 48
        block.mlp = mlp().eval()
    frozen = difuse.freeze(model)
    assert type(frozen.blocks[0].mlp.act) is nn.GELU
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


def test_a_weight_of_two_products_stays_plain(model):
    model.blocks[0].mlp.fc2.weight = nn.Parameter(model.blocks[0].mlp.fc1.weight.detach().T.contiguous())
    model.x_embedder.proj.weight = nn.Parameter(torch.randn(16, 4))
    model.final_layer.linear.weight = nn.Parameter(torch.randn(4, 16))
    model.t_embedder.mlp[2].weight = model.blocks[0].attn.proj.weight
    before = state(model)
    frozen = difuse.freeze(model)
    assert type(frozen.blocks[0].attn.proj) is nn.Linear and unchanged(model, before)
    assert frozen.blocks[0].attn.proj.weight is not model.blocks[0].attn.proj.weight
    torch.testing.assert_close(out(frozen, *CALL), out(model, *CALL), rtol=1e-5, atol=1e-5)


# refreshed

@pytest.mark.parametrize("name", ["tiny", "facebook_dit", "dit", "flux"])
def test_refresh_reads_all_weights_again(name, model):
    inputs = dict(zip("xty", CALL, strict=True))
    if name != "tiny":
        model, inputs = load(name).build().eval(), load(name).inputs(torch.float32)
    frozen = difuse.freeze(model)
    before = out(frozen, **inputs)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(0.9)
    assert torch.equal(out(frozen, **inputs), before)
    frozen.refresh()
    assert torch.equal(out(frozen, **inputs), out(difuse.freeze(model), **inputs))
    assert not torch.equal(out(frozen, **inputs), before)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.zero_()
    assert not torch.equal(out(frozen, **inputs), torch.zeros_like(before))


@pytest.mark.parametrize("name", ["pixart", "unet"])  # keys with and without biases
def test_refresh_is_seen_by_a_cache_of_conditionings(name):
    model, inputs = load(name).build().eval(), load(name).inputs(torch.float32)
    frozen = difuse.freeze(model)
    with difuse.cache_conditioning(frozen) as cache:
        before = out(frozen, **inputs)
        assert torch.equal(out(frozen, **inputs), before) and cache.hits == cache.misses > 0
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.mul_(0.9)
        frozen.refresh()
        frozen.refresh()  # a weight packed now may lie where the first one lay
        assert torch.equal(out(frozen, **inputs), out(difuse.freeze(model), **inputs))


def test_refresh_without_the_model():
    frozen = difuse.freeze(tiny_model().eval())
    gc.collect()
    with pytest.raises(RuntimeError, match="the model that it was made from is gone; freeze the model anew"):
        frozen.refresh()


# hoisted

@pytest.fixture
def computed(monkeypatch):
    """How many rows each computed modulation had."""
    rows, right = [], Modulation.compute
    monkeypatch.setattr(Modulation, "compute", lambda self, c: (rows.append(len(c)), right(self, c))[1])
    return rows


def test_modulations_of_known_times_and_labels_are_computed_once(model, computed):
    frozen, (x, t, y) = difuse.freeze(model), CALL
    expected, computed[:] = out(frozen, x, t, y), []
    frozen.hoist(x[:1], t, y)
    assert computed == [9, 9] and frozen.memory()["hoisted"] == 4 * 9 * 16 * (1 + 6 + 2)
    torch.testing.assert_close(out(frozen, x, t, y), expected, rtol=1e-5, atol=1e-5)
    shuffled = torch.tensor([2, 0, 1])
    torch.testing.assert_close(out(frozen, x, t[shuffled], y), out(model, x, t[shuffled], y), rtol=1e-5, atol=1e-5)
    frozen.hoist(x[:1], t, y.flip(0))  # the same set
    assert computed == [9, 9]
    for times, labels in ((t + 1, y), (t, torch.tensor([1, 0, 2]))):  # a time, a label that is not among them
        torch.testing.assert_close(out(frozen, x, times, labels), out(model, x, times, labels), rtol=1e-5, atol=1e-5)
    assert computed == [9, 9, 3, 3, 3, 3]
    frozen.refresh()
    assert frozen.memory()["hoisted"] == 0
    assert torch.equal(out(frozen, x, t, y), expected)


def test_many_pairs_and_fractional_times(model, computed):
    frozen, x = difuse.freeze(model), CALL[0]
    times = torch.linspace(0, 999, 13)
    frozen.hoist(x[:1], times, torch.arange(4))
    assert computed == [52, 52]
    for t in times:
        torch.testing.assert_close(out(frozen, x, t.expand(3), CALL[2]), out(model, x, t.expand(3), CALL[2]), rtol=1e-5,
                                   atol=1e-5)
    assert computed == [52, 52]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_sampling(model, computed, sampler, guidance):
    frozen = difuse.freeze(model)
    options = dict(process=VP("linear"), prediction="v", sampler=sampler, steps=6, guidance=guidance)
    images = difuse.sample(frozen, [0, 2, 0], **options)
    torch.testing.assert_close(images, difuse.sample(model, [0, 2, 0], **options), rtol=1e-4, atol=1e-4)
    assert computed == [6 * (2 if guidance == 1 else 3)] * 2  # once, before the loop


def test_other_models_have_nothing_to_hoist():
    family = load("sd3")
    frozen = difuse.freeze(family.build().eval())
    frozen.hoist(None, torch.arange(3), torch.arange(3))
    assert frozen.memory()["hoisted"] == 0


# in use

def test_engine(model):
    frozen = difuse.freeze(model)
    request = difuse.Request(1, 0, steps=4)
    with difuse.Engine(frozen, process=VP("linear"), prediction="v") as engine:
        image = engine.submit(request).result(60)
    expected = difuse.sample(model, [1], process=VP("linear"), prediction="v", steps=4)[0]
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)


def test_autocast_and_gradients_are_left_out(model):
    frozen = difuse.freeze(model)
    expected = frozen(*CALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(*CALL), expected) and not expected.requires_grad


def test_attributes_are_the_models(model):
    frozen = difuse.freeze(model)
    assert frozen.num_classes == 3 and frozen.config == model.config and frozen.blocks[0].attn.num_heads == 2
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        frozen.nothing  # noqa: B018


# refused

@pytest.mark.parametrize(("what", "kind", "message"), [
    (lambda model: "model", TypeError, "got str; expected a module"),
    (lambda model: model.train(), ValueError, "train mode; call model.eval"),
    (lambda model: difuse.freeze(model), ValueError, "frozen already"),
    (lambda model: model.to("meta"), ValueError, "on meta; expected the CPU"),
    (lambda model: nn.Linear(3, 3).eval(), ValueError, "nothing in Linear is known"),
    (lambda model: (model.blocks[0].register_forward_hook(print), model)[1], ValueError, r"blocks.0 has hooks"),
    (lambda model: (setattr(model.blocks[0].mlp, "forward", print), model)[1], ValueError,
     r"the forward of blocks.0.mlp was replaced by somebody"),
])
def test_what_cannot_be_frozen(model, what, kind, message):
    with pytest.raises(kind, match=message):
        difuse.freeze(what(model))


def test_lora_has_to_be_merged_first():
    peft = pytest.importorskip("peft")
    family = load("dit")
    model = family.build().eval()
    config = peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    with pytest.raises(ValueError, match="of peft; merge it into its layer first"):
        difuse.freeze(adapted.base_model.model.eval())
    merged, inputs = adapted.merge_and_unload().eval(), family.inputs(torch.float32)
    found = out(difuse.freeze(merged), **inputs)
    assert error(found, out(merged, **inputs)) < 1e-5 < error(found, out(model, **inputs))


def test_other_precisions(model):
    with pytest.raises(ValueError, match="precision is 'int4'; expected 'fp32'"):
        difuse.freeze(model, precision="int4")


@pytest.mark.parametrize(("what", "kind", "message"), [
    (lambda frozen: frozen.train(), RuntimeError, "cannot be trained"),
    (lambda frozen: frozen.half(), RuntimeError, "stays float32 on the CPU"),
    (lambda frozen: frozen.to("meta"), RuntimeError, "on meta"),
    (lambda frozen: frozen.state_dict(), RuntimeError, "save the model it was made from"),
    (pickle.dumps, TypeError, "copy or pickle the model it was made from"),
    (copy.deepcopy, TypeError, "copy or pickle the model it was made from"),
])
def test_what_a_frozen_model_cannot_do(model, what, kind, message):
    frozen = difuse.freeze(model)
    expected = frozen(*CALL)
    with pytest.raises(kind, match=message):
        what(frozen)
    assert torch.equal(frozen(*CALL), expected)
    assert frozen.eval() is frozen and frozen.float() is frozen and frozen.train(False) is frozen


def test_errors_of_the_model_are_the_models(model):
    frozen = difuse.freeze(model)
    with pytest.raises(ValueError, match="DiT: y has shape"):
        frozen(CALL[0], CALL[1], CALL[2][:1])
