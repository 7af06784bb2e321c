"""DiT: published sizes and names, initialisation, label dropout, dtypes, and what it refuses."""
import json

import pytest
import torch
from torch import nn

from difuse.models import DiT
from difuse.models.dit import NAMES

TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=10)


def tiny(**overrides):
    torch.manual_seed(0)
    return DiT(**{**TINY, **overrides})


def batch(count=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=g)
    return x, torch.randint(1000, (count,), generator=g), torch.randint(10, (count,), generator=g)


def randomize(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * 0.1
    return model


# Peebles & Xie 2023, table 4 (and the published DiT-XL/2 with learned sigma), in millions
@pytest.mark.parametrize("name, published, learn_sigma", [
    ("DiT-S/2", 33, True), ("DiT-S/4", 33, True), ("DiT-S/8", 33, True), ("DiT-B/2", 130, True), ("DiT-B/4", 130, True),
    ("DiT-B/8", 131, True), ("DiT-L/2", 458, True), ("DiT-L/4", 458, True), ("DiT-L/8", 459, True),
    ("DiT-XL/2", 675, True), ("DiT-XL/4", 675, True), ("DiT-XL/8", 676, True), ("DiT-S/2", 33, False),
])
def test_parameter_counts_are_the_published_ones(name, published, learn_sigma):
    with torch.device("meta"):
        model = DiT.from_name(name, learn_sigma=learn_sigma)
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(millions - published) < 0.5, millions


def test_table_holds_every_size_and_patch():
    assert sorted(NAMES) == sorted(f"DiT-{size}/{patch}" for size in ("S", "B", "L", "XL") for patch in (2, 4, 8))
    assert NAMES["DiT-XL/2"] == {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 2}


def facebookresearch_shapes(c, p, d, depth, classes, out, tokens):
    """Names and shapes in a facebookresearch/DiT checkpoint."""
    shapes = {
        "pos_embed": (1, tokens, d), "x_embedder.proj.weight": (d, c, p, p), "x_embedder.proj.bias": (d,),
        "t_embedder.mlp.0.weight": (d, 256), "t_embedder.mlp.0.bias": (d,), "t_embedder.mlp.2.weight": (d, d),
        "t_embedder.mlp.2.bias": (d,), "y_embedder.embedding_table.weight": (classes + 1, d),
        "final_layer.linear.weight": (p * p * out, d), "final_layer.linear.bias": (p * p * out,),
        "final_layer.adaLN_modulation.1.weight": (2 * d, d), "final_layer.adaLN_modulation.1.bias": (2 * d,),
    }
    for i in range(depth):
        for name, rows, columns in (("attn.qkv", 3 * d, d), ("attn.proj", d, d), ("mlp.fc1", 4 * d, d),
                                    ("mlp.fc2", d, 4 * d), ("adaLN_modulation.1", 6 * d, d)):
            shapes[f"blocks.{i}.{name}.weight"] = (rows, columns)
            shapes[f"blocks.{i}.{name}.bias"] = (rows,)
    return shapes


def test_a_facebookresearch_checkpoint_loads():
    g = torch.Generator().manual_seed(0)
    shapes = facebookresearch_shapes(c=3, p=2, d=32, depth=2, classes=10, out=6, tokens=16)
    theirs = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    model = tiny(learn_sigma=True)
    model.load_facebookresearch(theirs)
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name].flatten(), value.flatten()), name
    x = batch()[0]
    patches = nn.functional.conv2d(x, theirs["x_embedder.proj.weight"], theirs["x_embedder.proj.bias"], stride=2)
    torch.testing.assert_close(model.x_embedder(x), patches.flatten(2).transpose(1, 2))


def test_every_block_starts_as_the_identity_and_the_output_as_zero():
    model = tiny().eval()
    x, t, y = batch()
    assert torch.equal(model(x, t, y), torch.zeros_like(x))
    for block in model.blocks:
        assert not block.adaLN_modulation[1].weight.any() and block.attn.qkv.weight.std() > 0.1
    assert 0.015 < model.y_embedder.embedding_table.weight.std() < 0.025
    assert 0.015 < model.t_embedder.mlp[0].weight.std() < 0.025


def test_config_rebuilds_the_model():
    model = randomize(tiny(learn_sigma=True, mlp_ratio=2.0, class_dropout_prob=0.2)).eval()
    again = DiT(**json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    x, t, y = batch()
    out = model(x, t, y)
    assert out.shape == (4, 6, 8, 8)
    assert torch.equal(again(x, t, y), out)


def test_labels_are_dropped_in_training_only_and_at_the_stated_rate():
    model = tiny(class_dropout_prob=0.3)
    embed = model.y_embedder
    null = embed.embedding_table.weight[10]
    y = torch.arange(10).repeat(2000)
    torch.manual_seed(1)
    dropped = (embed(y) == null).all(1)
    n, p = len(y), 0.3
    assert abs(dropped.sum().item() - n * p) < 5 * (n * p * (1 - p)) ** 0.5  # five standard deviations
    kept = ~dropped
    torch.manual_seed(1)
    assert torch.equal(embed(y)[kept], embed.embedding_table.weight[y[kept]])  # the same draw, the others untouched
    embed.eval()
    assert torch.equal(embed(y), embed.embedding_table.weight[y])
    state = torch.get_rng_state()
    tiny_without = tiny(class_dropout_prob=0.0).train()
    torch.set_rng_state(state)
    tiny_without.y_embedder(y)
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn where nothing can be dropped


def test_the_null_class_is_a_label():
    model = randomize(tiny()).eval()
    x, t, y = batch()
    assert not torch.equal(model(x, t, torch.full_like(y, 10)), model(x, t, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_images_meet_low_precision_weights(dtype):
    model = randomize(tiny()).eval()
    x, t, y = batch()
    out = model.to(dtype)(x, t, y)  # samplers hand over float32 images, whatever the weights are
    assert out.dtype == dtype
    assert torch.equal(out, model(x.to(dtype), t, y))


def test_close_times_stay_apart_under_bfloat16_weights():
    model = randomize(tiny()).eval().bfloat16()
    a, b = model.t_embedder(torch.tensor([998, 999]))
    assert not torch.equal(a, b)


def test_autocast_trains():
    model = randomize(tiny()).train()
    x, t, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        loss = (model(x, t, y).float() - x).square().mean()
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.any(), name


def test_an_empty_batch_gives_an_empty_batch():
    x, t, y = batch()
    assert tiny().eval()(x[:0], t[:0], y[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("change, error, words", [
    (lambda x, t, y: (x[:, :2], t, y), ValueError, ["(4, 2, 8, 8)", "[B,3,8,8]"]),
    (lambda x, t, y: (x[..., :6], t, y), ValueError, ["(4, 3, 8, 6)", "input_size"]),
    (lambda x, t, y: (x[0], t, y), ValueError, ["(3, 8, 8)"]),
    (lambda x, t, y: (x.to(torch.uint8), t, y), TypeError, ["uint8", "floating"]),
    (lambda x, t, y: (x, t[0], y), ValueError, ["t has shape ()", "(4,)"]),
    (lambda x, t, y: (x, t[:, None], y), ValueError, ["t has shape (4, 1)"]),
    (lambda x, t, y: (x, t.bool(), y), TypeError, ["torch.bool"]),
    (lambda x, t, y: (x, t, y[:3]), ValueError, ["y has shape (3,)", "(4,)"]),
    (lambda x, t, y: (x, t, y.float()), TypeError, ["y has dtype torch.float32", "int64"]),
    (lambda x, t, y: (x, t, y + 8), ValueError, ["expected 0 to 9", "10 for the null class"]),
    (lambda x, t, y: (x, t, y - 10), ValueError, ["from -"]),
])
def test_bad_inputs_are_refused(change, error, words):
    x, t, _ = batch()
    with pytest.raises(error) as caught:
        tiny().eval()(*change(x, t, torch.tensor([0, 9, 3, 5])))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("overrides, words", [
    ({"patch_size": 3}, ["input_size 8", "patch_size 3"]),
    ({"num_heads": 3}, ["head_dim"]),
    ({"hidden_size": 24}, ["head_dim of 12", "multiple of 8"]),
    ({"hidden_size": 528}, ["head_dim of 264", "256"]),
    ({"depth": 0}, ["depth is 0"]),
    ({"num_classes": 2.5}, ["num_classes is 2.5"]),
    ({"class_dropout_prob": 1.5}, ["class_dropout_prob is 1.5"]),
])
def test_bad_sizes_are_refused(overrides, words):
    with pytest.raises(ValueError) as caught:
        tiny(**overrides)
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="DiT-XXL/2.*DiT-XL/2"):
        DiT.from_name("DiT-XXL/2")
    with pytest.raises(TypeError, match="colour"):
        DiT.from_name("DiT-S/2", colour=3)
