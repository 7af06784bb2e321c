"""Frozen models give the images of the model they were made from, leave it alone, and say what they cannot do."""
import copy
import gc
import os
import pathlib
import pickle
import platform
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import difuse
from difuse.diffusion import VP
from difuse.inference import fused_block
from difuse.inference.packed import PackedProduct
from difuse_kernels import dit_block
from difuse_kernels.linear.linear import layout
from tests.tiny_training import tiny_model

pytest.importorskip("diffusers")
from benchmarks.families import NAMES, load  # noqa: E402  needs diffusers
from benchmarks.families.proofs import Truth, cast, tensors  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
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


def size(model):
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_no_weight_is_shared_and_every_product_over_tokens_is_packed(model):
    frozen, expected = difuse.freeze(model), out(model, *CALL)
    packed = [name for name, module in frozen.model.named_modules() if isinstance(module, PackedProduct)]
    assert packed == ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1",
                      "blocks.0.mlp.fc2", "blocks.0.adaLN_modulation.1", "final_layer.linear",
                      "final_layer.adaLN_modulation.1"]
    for name in packed:
        assert torch.equal(frozen.get_submodule(name).weight, model.get_submodule(name).weight)
    memory, padding = frozen.memory(), -model.final_layer.linear.out_features % layout()[1]  # to whole vectors
    assert memory["packed"] + memory["other"] == size(model) + 4 * 16 * padding
    assert memory["packed"] > 0 and memory["other"] > 0 and memory["buffers"] == 0
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
    assert linear() is None and weight() is None and isinstance(frozen, difuse.inference.frozen.Frozen)


class Mlp(nn.Module):
    """timm's."""

    def __init__(self, approximate):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(48, 96), nn.GELU(approximate), nn.Linear(96, 48)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class GatedMlp(Mlp):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h * self.act(h))


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("kind", [Mlp, GatedMlp])
def test_gelus_of_known_mlps_are_computed_with_the_product_before_them(kind, approximate, monkeypatch):
    monkeypatch.setattr(Mlp, "__module__", "timm.layers.mlp")
    model, inputs = load("facebook_dit").build().eval(), load("facebook_dit").inputs(torch.float32)
    for block in model.blocks:
        block.mlp = kind(approximate).eval()
    frozen = difuse.freeze(model)
    fused = {block.mlp.fc1.gelu for block in frozen.blocks}
    assert fused == ({approximate} if kind is Mlp else {None})
    assert isinstance(frozen.blocks[0].mlp.act, nn.Identity if kind is Mlp else nn.GELU)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


class SpecialLinear(nn.Linear):
    pass


@pytest.mark.parametrize("name, product", [("pixart", "transformer_blocks.0.ff.net.0.proj"),
                                           ("flux", "single_transformer_blocks.0.proj_mlp")])
@pytest.mark.parametrize("how", ["tied", "subclass", "gelu at two places", "other activation"])
def test_a_gelu_stays_where_its_product_is_not_packed_and_goes_where_it_is(name, product, how):
    model, inputs = load(name).build().eval(), load(name).inputs(torch.float32)
    linear, other = model.get_submodule(product), model.get_submodule(product.replace("0", "1", 1))
    if how == "tied":
        other.weight = linear.weight
    elif how == "subclass":
        linear.__class__ = SpecialLinear
    elif how == "gelu at two places" and name == "pixart":
        model.transformer_blocks[1].ff.net[0] = model.transformer_blocks[0].ff.net[0]
    elif name == "flux":
        model.single_transformer_blocks[0].act_mlp = nn.SiLU()
    frozen = difuse.freeze(model)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(48, 4), nn.Linear(4, 288)

    def forward(self, c):
        return self.b(torch.tanh(self.a(c)))


@pytest.mark.parametrize("modulation", [
    lambda: nn.Sequential(nn.GELU(), nn.Linear(48, 288)), lambda: nn.Linear(48, 288), LowRank,
    lambda: nn.Sequential(nn.SiLU(), nn.Linear(48, 4), nn.Linear(4, 288))])
def test_other_modulations(modulation):
    model, inputs = load("facebook_dit").build().eval(), load("facebook_dit").inputs(torch.float32)
    for block in model.blocks:
        block.adaLN_modulation = modulation().eval()
    assert error(out(difuse.freeze(model), **inputs), out(model, **inputs)) < 1e-5


def test_a_block_at_several_places_is_packed_once():
    model, inputs = load("pixart").build().eval(), load("pixart").inputs(torch.float32)
    model.transformer_blocks = nn.ModuleList([model.transformer_blocks[0]] * 4)
    frozen = difuse.freeze(model)
    memory = frozen.memory()
    assert memory["packed"] + memory["other"] == size(model)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(0.9)
    frozen.refresh()
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


def test_diffusers_dit_still_runs_one_embedder():
    model, inputs = load("dit").build().eval(), load("dit").inputs(torch.float32)
    runs = []
    kind = type(model.transformer_blocks[0].norm1.emb)
    right = kind.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", lambda self, *args, **kwargs: (runs.append(1), right(self, *args, **kwargs))[1])
        out(difuse.freeze(model), **inputs)
    assert len(runs) == 1


def test_an_accelerated_model_keeps_its_backend_and_accelerating_again_is_harmless():
    model, inputs = load("pixart").build().eval(), load("pixart").inputs(torch.float32)
    expected = out(model, **inputs)
    difuse.accelerate(model, backend="reference")
    frozen = difuse.freeze(model)
    assert "reference" in frozen.transformer_blocks[0].forward.args
    assert error(out(frozen, **inputs), expected) < 1e-5
    report = difuse.accelerate(frozen)
    assert report.blocks == (3, 3) and "reference" not in frozen.transformer_blocks[0].forward.args
    assert error(out(frozen, **inputs), expected) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["tiny", "facebook_dit", "sit", "dit"])
@pytest.mark.filterwarnings("ignore:difuse.freeze")
def test_blocks_run_in_one_call_and_part_by_part_where_somebody_watches(name, precision, model, monkeypatch):
    inputs, calls = dict(zip("xty", CALL, strict=True)), []
    if name != "tiny":
        model, inputs = load(name).build().eval(), load(name).inputs(torch.float32)
    if name in ("facebook_dit", "sit"):
        monkeypatch.setattr(Mlp, "__module__", "timm.layers.mlp")
        for block in model.blocks:
            block.mlp = Mlp("tanh").eval()
    monkeypatch.setattr(fused_block, "dit_block", lambda *args, **kwargs: calls.append(1) or dit_block(*args, **kwargs))
    frozen = difuse.freeze(model, precision)
    found = out(frozen, **inputs)
    blocks = len(frozen.transformer_blocks if name == "dit" else frozen.blocks)
    assert len(calls) == blocks and error(found, out(model, **inputs)) < {"fp32": 1e-5}.get(precision, 0.05)
    seen = []
    part = (frozen.transformer_blocks[0].ff if name == "dit" else frozen.blocks[0].mlp)
    part.register_forward_hook(lambda *_: seen.append(1))
    again = out(frozen, **inputs)
    assert len(seen) == 1 and len(calls) == 2 * blocks - 1
    assert error(again, found) < {"fp32": 1e-5}.get(precision, 0.05)


@pytest.mark.parametrize("change", [
    lambda block: setattr(block.mlp, "act", nn.SiLU()), lambda block: setattr(block, "mlp", GatedMlp("tanh").eval()),
    lambda block: setattr(block.attn, "proj", SpecialLinear(48, 48))], ids=["activation", "forward", "product"])
def test_a_block_that_is_not_whole_runs_part_by_part(change, monkeypatch):
    monkeypatch.setattr(Mlp, "__module__", "timm.layers.mlp")
    model, inputs = load("facebook_dit").build().eval(), load("facebook_dit").inputs(torch.float32)
    for block in model.blocks:
        block.mlp = Mlp("tanh").eval()
    change(model.blocks[0])
    frozen = difuse.freeze(model)
    fused = [getattr(vars(block).get("forward"), "func", None) is fused_block._facebook_block
             for block in frozen.blocks]
    assert fused == [False] + [True] * (len(fused) - 1)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


@pytest.mark.parametrize("processor", ["AttnProcessor", "XFormersAttnProcessor"])
def test_a_processor_that_is_changed_later_is_used(processor, model):
    attention = pytest.importorskip("diffusers.models.attention_processor")
    model, inputs, calls = load("dit").build().eval(), load("dit").inputs(torch.float32), []
    frozen = difuse.freeze(model)
    expected = out(frozen, **inputs)

    class Mine(getattr(attention, processor)):
        def __call__(self, attn, x, *args, **kwargs):
            calls.append(1)
            return 0 * x

    frozen.transformer_blocks[1].attn1.processor = Mine()
    assert error(out(frozen, **inputs), expected) > 0.01 and len(calls) == 1


def test_a_backend_that_was_asked_for_is_not_left():
    model, inputs = load("dit").build().eval(), load("dit").inputs(torch.float32)
    difuse.accelerate(model, backend="reference")
    frozen = difuse.freeze(model)
    assert all("reference" in block.forward.args for block in frozen.transformer_blocks)
    difuse.restore(model)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 1e-5


def test_large_activations_stay_in_buffers_of_their_own():
    """Each thread's own, taken once."""
    model = tiny_model(input_size=32, in_channels=4, hidden_size=64, depth=2, num_heads=2).eval()
    frozen, call = difuse.freeze(model), (torch.randn(8, 4, 32, 32), torch.arange(8), torch.zeros(8, dtype=torch.int64))
    out(frozen, *call)
    tokens = 8 * model.grid[0] * model.grid[1]
    assert frozen.memory()["buffers"] == 4 * tokens * 64 * (3 + 1 + 4)
    before = {key: buffer.data_ptr() for key, buffer in frozen._workspaces.here._buffers.items()}
    out(frozen, *call)
    assert {key: buffer.data_ptr() for key, buffer in frozen._workspaces.here._buffers.items()} == before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: frozen.memory()["buffers"]).result() == 0


def test_default_dtype_and_inference_mode(model):
    expected = out(model, *CALL)
    torch.set_default_dtype(torch.float64)
    try:
        frozen = difuse.freeze(model)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(out(frozen, *CALL), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        inside = difuse.freeze(model)
        torch.testing.assert_close(inside(*CALL), expected, rtol=1e-5, atol=1e-5)
    inside.refresh()
    with torch.inference_mode():
        inside.refresh()
        images = difuse.sample(inside, [0, 1], process=VP("linear"), prediction="v", steps=3)
    torch.testing.assert_close(images, difuse.sample(model, [0, 1], process=VP("linear"), prediction="v", steps=3),
                               rtol=1e-4, atol=1e-4)


def test_a_dropout_left_on_is_off():
    model, inputs = load("pixart").build().eval(), load("pixart").inputs(torch.float32)
    expected = out(model, **inputs)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
            module.train()
    assert error(out(difuse.freeze(model), **inputs), expected) < 1e-5


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


# memory

FAULTS = """
import resource
import torch
import difuse
from tests.tiny_training import tiny_model
model = difuse.freeze(tiny_model(input_size=32, in_channels=4, hidden_size=384, depth=2, num_heads=6).eval())
call = torch.randn(8, 4, 32, 32), torch.arange(8), torch.zeros(8, dtype=torch.int64)
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    model(*call)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="another allocator")
def test_later_calls_fetch_no_fresh_memory():
    """Their products' results are 57 MB, 14,000 pages; a process of its own, since any other test may free much."""
    ran = subprocess.run([sys.executable, "-c", FAULTS], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 1000


LET_GO = """
import re
import torch
import difuse
from difuse.models import DiT

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

call = torch.randn(1, 4, 16, 16), torch.arange(1), torch.zeros(1, dtype=torch.int64)
torch.empty((32 << 20) - 8192, dtype=torch.uint8)  # as loading a checkpoint may do
model = DiT(16, 2, 4, hidden_size=1024, depth=8, num_heads=16, num_classes=10).eval()
frozen = difuse.freeze(model, "int8")
frozen(*call)
both = resident()
size = sum(weight.nbytes for weight in model.parameters()) / 2**20
del model
frozen(*call)
print(size, both - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="another allocator")
def test_a_model_that_is_let_go_gives_its_memory_back():
    """600 MB of weights of 24 MB and less, which glibc keeps by itself."""
    ran = subprocess.run([sys.executable, "-c", LET_GO], cwd=ROOT, capture_output=True, text=True, check=True)
    size, returned = map(float, ran.stdout.split())
    assert returned > 0.8 * size


PEAK = """
import gc, re, sys
import torch
import difuse
from difuse.models import DiT

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

torch.set_grad_enabled(False)
call = torch.randn(2, 4, 16, 16), torch.arange(2), torch.zeros(2, dtype=torch.int64)
size = dict(patch_size=2, in_channels=4, num_classes=10)
difuse.freeze(DiT(16, hidden_size=64, depth=1, num_heads=2, **size).eval(), sys.argv[1])(*call)  # threads, code
before = status("VmRSS")
model = DiT(16, hidden_size=1024, depth=6, num_heads=16, **size).eval()
frozen = difuse.freeze(model, sys.argv[1])
del model
gc.collect()
frozen(*call)
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
frozen(*call)
print((status("VmHWM") - before) / sum(frozen.memory().values()))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ, reason="another allocator")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not reset peaks here")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_call_needs_its_weights_and_a_block_of_activations(precision):
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", PEAK, precision], cwd=ROOT, capture_output=True,
                         text=True, check=True)
    assert 0.9 < float(ran.stdout) < 1.1


# refreshed

@pytest.mark.filterwarnings("ignore:difuse.freeze")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", ["tiny", "facebook_dit", "dit", "pixart", "flux"])
def test_refresh_reads_all_weights_again(name, precision, model):
    inputs = dict(zip("xty", CALL, strict=True))
    if name != "tiny":
        model, inputs = load(name).build().eval(), load(name).inputs(torch.float32)
    frozen = difuse.freeze(model, precision)
    before = out(frozen, **inputs)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(0.9)
    assert torch.equal(out(frozen, **inputs), before)
    frozen.refresh()
    assert torch.equal(out(frozen, **inputs), out(difuse.freeze(model, precision), **inputs))
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


def change(what, model):
    if what == "lora":
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    elif what == "block":
        model.transformer_blocks.append(copy.deepcopy(model.transformer_blocks[0]))
    elif what == "activation":
        model.single_transformer_blocks[0].act_mlp = nn.SiLU()
    elif what == "shape":
        model.proj_out = nn.Linear(model.proj_out.in_features, 2 * model.proj_out.out_features)
    elif what == "bias":
        model.proj_out.bias = None
    else:
        model.double()


@pytest.mark.parametrize("what", ["lora", "block", "activation", "shape", "bias", "dtype"])
def test_refresh_of_a_model_that_is_built_otherwise_by_now(what):
    model, inputs = load("flux").build().eval(), load("flux").inputs(torch.float32)
    frozen = difuse.freeze(model)
    before = out(frozen, **inputs)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(0.9)
    change(what, model)
    with pytest.raises(RuntimeError, match="other modules, shapes or dtypes by now; freeze it anew"):
        frozen.refresh()
    assert torch.equal(out(frozen, **inputs), before)


def test_refresh_while_the_model_is_trained(model):
    frozen = difuse.freeze(model)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(*CALL).square().mean().backward()
    optimizer.step()
    frozen.refresh()
    assert torch.equal(out(frozen, *CALL), out(difuse.freeze(model.eval()), *CALL))


def test_refresh_without_the_model():
    frozen = difuse.freeze(tiny_model().eval())
    gc.collect()
    with pytest.raises(RuntimeError, match="the model that it was made from is gone; freeze the model anew"):
        frozen.refresh()


# in use

@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_sampling(model, guidance):
    options = dict(process=VP("linear"), prediction="v", sampler="ddpm", steps=6, guidance=guidance)
    images = difuse.sample(difuse.freeze(model), [0, 2, 0], **options)
    torch.testing.assert_close(images, difuse.sample(model, [0, 2, 0], **options), rtol=1e-4, atol=1e-4)


def test_threads(model):
    frozen = difuse.freeze(model)
    expected = out(frozen, *CALL)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(found, expected) for found in pool.map(lambda _: out(frozen, *CALL), range(40)))


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
    frozen.num_classes = 2
    assert frozen.model.num_classes == frozen.num_classes == 2 and model.num_classes == 3


def test_other_methods_than_forward():
    """They run in the caller's gradient mode and autocast, which packed products refuse where they matter."""
    model = load("vae").build().eval()
    frozen, z = difuse.freeze(model), torch.randn(1, model.config.latent_channels, 4, 4)
    assert error(out(frozen.decode, z), out(model.decode, z)) < 1e-5
    with pytest.raises(RuntimeError, match="a frozen model has no gradients"):
        frozen.decode(z.requires_grad_())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="outside of torch.a"):
        frozen.decode(z)


# refused

@pytest.mark.parametrize(("what", "kind", "message"), [
    (lambda model: "model", TypeError, "got str; expected a module"),
    (lambda model: model.train(), ValueError, "train mode; call model.eval"),
    (lambda model: difuse.freeze(model), ValueError, "frozen already"),
    (lambda model: model.to("meta"), ValueError, "on meta; expected the CPU or one GPU"),
    (lambda model: nn.Linear(3, 3).eval(), ValueError, "nothing in Linear is known"),
    (lambda model: model.bfloat16(), ValueError, "weights are torch.bfloat16; expected torch.float32 alone"),
    (lambda model: (model.final_layer.double(), model)[1], ValueError,
     "weights are torch.float32, torch.float64; expected"),
    (lambda model: (nn.utils.parametrizations.weight_norm(model.blocks[0].attn.qkv), model)[1], ValueError,
     "blocks.0.attn.qkv has parametrized weights"),
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
    with pytest.raises(ValueError, match="precision is 'int4'; expected one of 'fp32', 'bf16', 'int8'"):
        difuse.freeze(model, precision="int4")


@pytest.mark.parametrize(("what", "kind", "message"), [
    (lambda frozen: frozen.train(), RuntimeError, "cannot be trained"),
    (lambda frozen: frozen.half(), RuntimeError, "stays torch.float32 on cpu"),
    (lambda frozen: frozen.to("meta"), RuntimeError, "meta"),
    (lambda frozen: frozen.state_dict(), RuntimeError, "save the model it was made from"),
    (lambda frozen: frozen.model.state_dict(), RuntimeError, "save the model it was made from"),
    (lambda frozen: frozen.load_state_dict(tiny_model(1).state_dict()), RuntimeError, "loads no weights"),
    (lambda frozen: frozen.load_facebookresearch(tiny_model(1).state_dict()), RuntimeError, "loads no weights"),
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


def test_inputs_in_another_dtype():
    with pytest.raises(TypeError, match="a frozen model's product got torch.float64; expected torch.float32"):
        difuse.freeze(load("sit").build().eval()).blocks[0].attn.qkv(torch.zeros(1, 48, dtype=torch.float64))


def test_nothing_is_saved(tmp_path):
    frozen = difuse.freeze(load("flux").build().eval())
    with pytest.raises(RuntimeError, match="save the model it was made from"):
        frozen.save_pretrained(tmp_path)


def test_errors_of_the_model_are_the_models(model):
    frozen = difuse.freeze(model)
    with pytest.raises(ValueError, match="DiT: y has shape"):
        frozen(CALL[0], CALL[1], CALL[2][:1])
