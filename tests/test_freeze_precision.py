"""Frozen models in bfloat16 and with 8-bit products: as near as their arithmetic allows, and what they refuse."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import difuse
from difuse.diffusion import VP
from difuse.inference import freeze as freeze_module
from difuse.inference import fused_block
from difuse.inference.packed import PackedProduct
from difuse.inference.smoothing import largest_inputs, smoothing
from difuse_kernels import Codes
from difuse_kernels.linear.linear import layout
from tests.test_freeze import CALL, error, out, state, unchanged
from tests.tiny_training import tiny_model

pytest.importorskip("diffusers")
from benchmarks.families import NAMES, load  # noqa: E402  needs diffusers
from benchmarks.families.proofs import Truth, cast, tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:difuse.freeze")
each_precision = pytest.mark.parametrize("precision", ["bf16", "int8"])


@pytest.fixture
def model():
    return tiny_model().eval()


class Integers(nn.Linear):
    """What an 8-bit product computes, in float64: rows of the input and of the weight rounded to equal steps."""

    def forward(self, x):
        x, weight = x.double(), self.weight.double()
        steps = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / steps.clamp_min(1e-30)).round() * steps
        scale = weight.abs().amax(1, keepdim=True) / layout()[2]
        y = rounded @ ((weight / scale).round() * scale).T
        return (y if self.bias is None else y + self.bias.double()).float()


class Halves(nn.Linear):
    """What a bfloat16 product computes."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.double()
        return F.linear(x.bfloat16().double(), self.weight.bfloat16().double(), bias).float()


KINDS = {"bf16": Halves, "int8": Integers}


def imitation(model, frozen):
    """The unmodified model with its products computed in plain PyTorch as the frozen one's precisions say."""
    found = copy.deepcopy(model)
    for path, module in frozen.model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedProduct) and module.precision in KINDS:
            if path.endswith("net.0"):  # a GELU's projection
                path += ".proj"
            found.get_submodule(path).__class__ = KINDS[module.precision]
    return found


@each_precision
@pytest.mark.parametrize("name", NAMES)
def test_every_family_is_as_near_as_its_arithmetic_allows(name, precision):
    """At most 1.5 times the error of the same roundings in plain PyTorch; the model is not changed."""
    family = load(name)
    eager, inputs = family.build().eval(), family.inputs(torch.float32)
    before = state(eager)
    frozen = difuse.freeze(eager, precision)
    with Truth():
        truth = tensors(copy.deepcopy(eager).double()(**cast(inputs, torch.float64, grad=True)))[0].detach()
    found = out(frozen, **inputs)
    allowed = error(out(imitation(eager, frozen), **inputs), truth)
    assert found.dtype == torch.float32 and 1e-4 < allowed < 0.2
    assert error(found, truth) <= 1.5 * allowed
    assert unchanged(eager, before)


def test_integers_are_computed_as_they_are_written(model, monkeypatch):
    """One product after another; what differs is a code that rounds to the other side of a half."""
    monkeypatch.setattr(fused_block, "multiplies_bfloat16", lambda: False)  # attention's bfloat16 would hide it
    frozen = difuse.freeze(model, "int8")
    plain, found = out(imitation(model, frozen), *CALL), out(frozen, *CALL)
    assert error(found, plain) < 0.3 * error(found, out(model, *CALL))


@each_precision
def test_products_of_blocks_are_lower_and_modulations_bfloat16(model, precision):
    frozen = difuse.freeze(model, precision)
    found = {path: module.precision for path, module in frozen.model.named_modules()
             if isinstance(module, PackedProduct)}
    inner = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert found == {f"blocks.0.{name}": precision for name in inner} | {
        "final_layer.linear": "fp32", "blocks.0.adaLN_modulation.1": "bf16",
        "final_layer.adaLN_modulation.1": "bf16"}


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux"])
def test_modulations_and_ends_of_diffusers_models(name):
    frozen = difuse.freeze(load(name).build().eval(), "int8")
    found = {path: module.precision for path, module in frozen.model.named_modules()
             if isinstance(module, PackedProduct)}
    lower = [path for path, precision in found.items() if precision == "int8"]
    assert lower and all(path.split(".")[0].endswith("transformer_blocks") for path in lower)
    assert not any("norm" in path or "emb" in path for path in lower)
    assert all("norm" in path for path, precision in found.items() if precision == "bf16")


@each_precision
def test_memory(model, precision):
    """2 or 1 bytes a number instead of 4, and two numbers a row with 8 bits; widths here are whole vectors."""
    whole, lower = difuse.freeze(model).memory(), difuse.freeze(model, precision).memory()
    block, packed = model.blocks[0], ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    products = [block.get_submodule(path) for path in packed]
    modulations = [block.adaLN_modulation[1].weight, model.final_layer.adaLN_modulation[1].weight]
    saved = 2 * sum(weight.numel() for weight in modulations)
    saved += sum(2 * p.weight.numel() if precision == "bf16" else 3 * p.weight.numel() - 8 * p.bias.numel()
                 for p in products)
    assert lower == {"other": whole["other"], "packed": whole["packed"] - saved, "buffers": 0}


# 8 bits

def test_codes_go_from_one_product_of_an_mlp_to_the_next(model):
    frozen = difuse.freeze(model, "int8")
    mlp, given = frozen.blocks[0].mlp, []
    mlp.fc2.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    found = out(frozen, *CALL)
    assert isinstance(given[0], Codes) and given[0].codes.dtype == torch.uint8
    mlp.fc1.read_by(None)
    assert error(out(frozen, *CALL), found) < 1e-3


@pytest.mark.parametrize("between", [nn.Identity(), nn.ReLU()])
def test_codes_are_handed_on_only_where_nothing_lies_between(between):
    model = load("pixart").build().eval()
    model.transformer_blocks[0].ff.net[1] = between
    frozen, inputs = difuse.freeze(model, "int8"), load("pixart").inputs(torch.float32)
    reader = frozen.transformer_blocks[0].ff.net[0].reader
    assert (reader is frozen.transformer_blocks[0].ff.net[2]) == isinstance(between, nn.Identity)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 0.1


def outlying(model):
    """The model with a few channels of its normed tokens far larger, and their weights as much smaller."""
    with torch.no_grad():
        for block in model.blocks:
            for shift, product in ((0, block.attn.qkv), (3, block.mlp.fc1)):
                D = product.in_features
                block.adaLN_modulation[1].bias[shift * D : shift * D + 3] += 100
                product.weight[:, :3] *= 0.01
    return model


def test_smoothing_helps_where_channels_outlie(model):
    expected = out(outlying(model), *CALL)
    plain, smooth = (difuse.freeze(model, "int8", calls) for calls in (None, [CALL]))
    assert error(out(smooth, *CALL), expected) < 0.5 * error(out(plain, *CALL), expected)
    assert error(out(smooth, *CALL), expected) < 0.05
    qkv = smooth.blocks[0].attn.qkv
    assert error(qkv.weight, model.blocks[0].attn.qkv.weight) < 0.05
    assert smooth.memory()["packed"] - plain.memory()["packed"] == 4 * sum(
        product.in_features for product in smooth.modules()
        if isinstance(product, PackedProduct) and product.precision == "int8")


def test_smoothing_is_the_papers_with_a_floor():
    largest, weight = torch.tensor([4.0, 9.0, 0.0, 2.0]), torch.tensor([[1.0, -0.25, 3.0, 0.0], [0.5, 0.0, 1.0, 0.0]])
    s = torch.tensor([4.0 / 1.0, 9.0 / 0.25, 0.09 / 3.0, 2.0 / 0.03]).sqrt()
    torch.testing.assert_close(smoothing(largest, weight), 1 / s)
    assert smoothing(0 * largest, weight).tolist() == smoothing(largest, 0 * weight).tolist() == [1.0] * 4


def test_a_channel_that_was_quiet_in_the_examples_may_wake():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(5, 64)
    largest = x.abs().amax(0).index_fill(0, torch.tensor([7, 8]), 1e-7)
    product = PackedProduct(linear, "int8", smoothing(largest, linear.weight.detach()))
    with torch.no_grad():
        assert error(product(x), linear(x)) < 0.1


@each_precision
@pytest.mark.parametrize("shape", [(2, 0, 40), (0, 40), (1, 40), (2, 3, 5, 40)], ids=str)
def test_products_of_any_rank_and_of_no_rows(shape, precision):
    torch.manual_seed(0)
    linear, x = nn.Linear(40, 24), torch.randn(shape)
    with torch.no_grad():
        found, expected = PackedProduct(linear, precision)(x), linear(x)
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert not len(x.flatten()) or error(found, expected) < 0.05


@pytest.mark.parametrize("how", ["shared", "tied", "subclass"])
@each_precision
def test_products_that_others_share(how, precision):
    """One product before two others, a weight of two layers, somebody's Linear: nothing is taken for granted."""
    model, inputs = load("pixart").build().eval(), load("pixart").inputs(torch.float32)
    first, second = (block.ff for block in model.transformer_blocks[:2])
    if how == "shared":
        second.net[0] = first.net[0]
    elif how == "tied":
        second.net[2].weight = first.net[2].weight
    else:
        first.net[2].__class__ = type("Somebodys", (nn.Linear,), {})
    calls = [inputs] if precision == "int8" else None
    assert error(out(difuse.freeze(model, precision, calls), **inputs), out(model, **inputs)) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_what_passes_between_blocks_is_float32(name):
    model, seen = load(name).build().eval(), set()
    frozen = difuse.freeze(model, "bf16")
    for module in frozen.model.modules():
        if not isinstance(module, (PackedProduct, nn.Identity, nn.Dropout)):  # the latter lie within an MLP
            module.register_forward_hook(lambda _, inputs, result: seen.update(
                t.dtype for t in (*tensors(inputs), *tensors(result)) if t.is_floating_point()))
    out(frozen, **load(name).inputs(torch.float32))
    assert seen == {torch.float32}
    lower = [path for path, module in frozen.model.named_modules()
             if isinstance(module, PackedProduct) and module.precision == "bf16"]
    assert lower and not any(word in path for path in lower for word in ("emb", "caption"))


@pytest.mark.parametrize("name", ["tiny", "facebook_dit", "dit"])
def test_bfloat16_is_handed_on_where_the_reader_would_round(name, model):
    """What the reader of an MLP's first product would round is rounded before it; attention computes on it."""
    inputs = dict(zip("xty", CALL, strict=True))
    if name != "tiny":
        model, inputs = load(name).build().eval(), load(name).inputs(torch.float32)
    frozen = difuse.freeze(model, "bf16")
    handing = {path: module for path, module in frozen.model.named_modules()
               if isinstance(module, PackedProduct) and module.out_dtype == torch.bfloat16}
    blocks = sum(path.count(".") == 1 for path, _ in frozen.model.named_modules() if "blocks" in path)
    assert len(handing) == blocks * (2 if name == "tiny" else 1)  # an MLP, an attention, or both
    fused, dtypes = out(frozen, **inputs), set()
    for module in handing.values():  # from now on blocks run part by part
        module.register_forward_hook(lambda module, inputs, result: dtypes.add(result.dtype))
    found = out(frozen, **inputs)
    assert dtypes == {torch.bfloat16} and found.dtype == fused.dtype == torch.float32
    assert error(found, fused) < 0.01
    for path, module in handing.items():
        if not path.endswith("qkv"):
            module.out_dtype = torch.float32
    assert error(out(frozen, **inputs), found) < 2e-3  # of a GELU that is rounded next
    for module in handing.values():
        module.out_dtype = torch.float32
    assert error(out(frozen, **inputs), found) < 0.01


@pytest.mark.parametrize("multiplies", [True, False])
def test_before_attention_8_bit_products_hand_on_bfloat16_where_the_cpu_multiplies_it(multiplies, model, monkeypatch):
    monkeypatch.setattr(freeze_module, "multiplies_bfloat16", lambda: multiplies)
    frozen = difuse.freeze(model, "int8")
    assert frozen.blocks[0].attn.qkv.out_dtype == (torch.bfloat16 if multiplies else torch.float32)
    assert error(out(frozen, *CALL), out(model, *CALL)) < 0.05


class TimmMlp(nn.Module):
    """timm's, with all its parts."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(48, 96), nn.GELU(approximate="tanh"), nn.Dropout(0.1)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(96, 48), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


def test_an_older_mlp_with_fewer_parts():
    cls = type("Mlp", (TimmMlp,), {"__module__": "timm.layers.mlp", "forward": lambda self, x: self.fc2(
        self.act(self.fc1(x)))})
    torch.manual_seed(0)
    model, inputs = load("facebook_dit").build(), load("facebook_dit").inputs(torch.float32)
    for block in model.blocks:
        block.mlp = cls()
        del block.mlp.norm, block.mlp.drop1
    frozen = difuse.freeze(model.eval(), "int8")
    assert frozen.blocks[0].mlp.fc1.reader is frozen.blocks[0].mlp.fc2
    assert error(out(frozen, **inputs), out(model, **inputs)) < 0.05


@pytest.mark.parametrize("norm", [nn.Identity(), nn.LayerNorm(96)])
def test_timms_mlp(norm):
    cls = type("Mlp", (TimmMlp,), {"__module__": "timm.layers.mlp"})
    torch.manual_seed(0)
    model, inputs = load("facebook_dit").build(), load("facebook_dit").inputs(torch.float32)
    for block in model.blocks:
        block.mlp = cls()
        block.mlp.norm = norm
    frozen = difuse.freeze(model.eval(), "int8")
    assert (frozen.blocks[0].mlp.fc1.reader is frozen.blocks[0].mlp.fc2) == isinstance(norm, nn.Identity)
    assert error(out(frozen, **inputs), out(model, **inputs)) < 0.05


@pytest.mark.parametrize("calls", [[CALL], [dict(zip("xty", CALL, strict=True))], [CALL, CALL]])
def test_example_inputs_are_calls(model, calls):
    before = state(model)
    found = out(difuse.freeze(model, "int8", calls), *CALL)
    frozen = difuse.freeze(model, "int8", [CALL])
    assert torch.equal(found, out(frozen, *CALL)) and unchanged(model, before)


@pytest.mark.parametrize("calls", [[CALL], [CALL, CALL[:2]]])
def test_examples_leave_no_hooks(model, calls):
    linears = {"blocks.0.attn.qkv": model.blocks[0].attn.qkv}
    try:
        assert set(largest_inputs(model, linears, calls)) == set(linears)
    except ValueError:
        assert len(calls) == 2
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("calls, message", [
    ([CALL, (CALL[0][:, :, :2], *CALL[1:])], r"example_inputs\[1\] is no call of this model: DiT: x has shape"),
    ([CALL[:2]], r"example_inputs\[0\] is no call of this model: .*missing 1 required positional argument"),
    ([{"z": 1}], r"example_inputs\[0\] is no call of this model"),
    ([CALL[0]], r"example_inputs\[0\] is a Tensor; expected a tuple of arguments or a dict"),
    (CALL[0], "example_inputs is a Tensor; expected a list of calls"),
    ([], "example_inputs is empty"),
    ([(3, *CALL[1:])], r"example_inputs\[0\] is no call of this model"),
    ([(CALL[0] * float("nan"), *CALL[1:])], r"example_inputs: blocks.0.attn.qkv was given nan"),
])
def test_example_inputs_that_are_none(model, calls, message):
    before = state(model)
    with pytest.raises(ValueError, match=message):
        difuse.freeze(model, "int8", calls)
    assert unchanged(model, before)


def test_example_inputs_are_for_8_bits(model):
    with pytest.raises(ValueError, match="example_inputs are what 'int8' is smoothed by; precision is None"):
        difuse.freeze(model, example_inputs=[CALL])


# in use

def test_refresh_keeps_the_smoothing(model):
    frozen = difuse.freeze(model, "int8", [CALL])
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.mul_(0.9)
    frozen.refresh()
    assert error(out(frozen, *CALL), out(model, *CALL)) < 0.05


@each_precision
def test_sampling(model, precision):
    options = dict(process=VP("linear"), prediction="v", sampler="ddim", steps=6, guidance=2.0)
    images, expected = (difuse.sample(each, [0, 2, 0], **options) for each in (difuse.freeze(model, precision), model))
    assert 1e-5 < error(images, expected) < 0.05


def test_a_row_of_nans_stays_alone(model):
    frozen = difuse.freeze(model, "int8")
    x = CALL[0].clone()
    x[1, 0, 0, 0] = float("nan")
    found = out(frozen, x, *CALL[1:])
    assert found[1].isnan().any() and torch.equal(found[[0, 2]], out(frozen, *CALL)[[0, 2]])


def test_a_cpu_that_emulates_bfloat16_is_told(model, monkeypatch):
    monkeypatch.setattr(freeze_module, "multiplies_bfloat16", lambda: False)
    with pytest.warns(UserWarning, match="no bfloat16 products.*no faster than in float32; 'int8' is") as told:
        difuse.freeze(model, "bf16")
    assert told[0].filename == __file__
    monkeypatch.setattr(freeze_module, "multiplies_bfloat16", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difuse.freeze(model, "bf16")
