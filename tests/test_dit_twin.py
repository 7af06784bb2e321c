"""DiT against a twin written from the paper in plain PyTorch: forward and every gradient, within the error budget."""
import math

import pytest
import torch
import torch.nn.functional as F

from difuse.models import DiT
from difuse_kernels import use_backend

CONFIGS = {  # name -> constructor arguments; 25 or 9 tokens, head_dim 16, 24 and 72 (DiT-XL's)
    "patch2": dict(input_size=10, patch_size=2, in_channels=3, hidden_size=48, depth=3, num_heads=3, num_classes=7),
    "patch4_learned_sigma": dict(input_size=12, patch_size=4, in_channels=2, hidden_size=48, depth=2, num_heads=2,
                                 num_classes=4, learn_sigma=True, mlp_ratio=3.0),
    "patch8_head72": dict(input_size=24, patch_size=8, in_channels=1, hidden_size=72, depth=1, num_heads=1,
                          num_classes=3),
}


def position_embedding(grid, dim):
    """Token (row, column): sin and cos of the column, then of the row, dim/4 frequencies each."""
    table = torch.zeros(grid * grid, dim, dtype=torch.float64)
    for row in range(grid):
        for column in range(grid):
            for i in range(dim // 4):
                omega = 1 / 10000 ** (i / (dim / 4))
                for part, (function, at) in enumerate(((math.sin, column), (math.cos, column), (math.sin, row),
                                                       (math.cos, row))):
                    table[row * grid + column, part * (dim // 4) + i] = function(at * omega)
    return table


def twin(w, config, x, t, y):
    """The whole model as one function of its weights `w` (a state_dict), in the weights' dtype."""
    p, heads, dim = config["patch_size"], config["num_heads"], config["hidden_size"]
    channels, grid = config["in_channels"], config["input_size"] // config["patch_size"]
    batch, dtype = len(x), w["pos_embed"].dtype

    def linear(name, value):
        return F.linear(value, w[name + ".weight"], w[name + ".bias"])

    def modulated(value, shift, scale):
        return F.layer_norm(value, (dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    kernel = w["x_embedder.proj.weight"].reshape(dim, channels, p, p)
    x = F.conv2d(x.to(dtype), kernel, w["x_embedder.proj.bias"], stride=p).flatten(2).transpose(1, 2) + w["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(0, 128, dtype=torch.float32) / 128)
    angles = t[:, None].float() * frequencies[None]
    c = linear("t_embedder.mlp.0", torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1).to(dtype))
    c = linear("t_embedder.mlp.2", F.silu(c)) + w["y_embedder.embedding_table.weight"][y]
    for i in range(config["depth"]):
        block = f"blocks.{i}."
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = linear(
            block + "adaLN_modulation.1", F.silu(c)).chunk(6, dim=1)
        qkv = linear(block + "attn.qkv", modulated(x, shift_msa, scale_msa))
        q, k, v = qkv.reshape(batch, grid**2, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, grid**2, dim)
        x = x + gate_msa[:, None] * linear(block + "attn.proj", mixed)
        hidden = F.gelu(linear(block + "mlp.fc1", modulated(x, shift_mlp, scale_mlp)), approximate="tanh")
        x = x + gate_mlp[:, None] * linear(block + "mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", F.silu(c)).chunk(2, dim=1)
    tokens = linear("final_layer.linear", modulated(x, shift, scale)).reshape(batch, grid, grid, p, p, -1)
    return torch.einsum("nhwpqc->nchpwq", tokens).reshape(batch, -1, grid * p, grid * p)


def randomized(config, seed=0):
    """A model whose every weight is random: adaLN-Zero starts with zeros, which would hide any mistake."""
    model = DiT(**config).eval()
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = scale * torch.randn(parameter.shape, generator=g)
    return model


def inputs(config, batch=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config["in_channels"], config["input_size"], config["input_size"], generator=g)
    t = torch.tensor([999.0, 0.0, 321.5])[:batch]
    y = torch.tensor([1, config["num_classes"], 0])[:batch]  # the null class among them
    return x, t, y


def gradients(function, weights, x):
    """Output of function(x) and its gradients for `weights` and x under a fixed random cotangent."""
    x = x.clone().requires_grad_()
    out = function(x)
    g = torch.Generator().manual_seed(2)
    cotangent = torch.randn(out.shape, generator=g).to(out.dtype)
    grads = torch.autograd.grad(out, [x, *weights.values()], cotangent)
    return {"out": out.detach(), "x": grads[0], **dict(zip(weights, grads[1:], strict=True))}


def twin_gradients(model, config, dtype, x, t, y):
    parameters = {name: p.detach().to(dtype).requires_grad_() for name, p in model.named_parameters()}
    w = {**parameters, "pos_embed": position_embedding(model.grid[0], config["hidden_size"])[None].to(dtype)}
    return gradients(lambda image: twin(w, config, image, t, y), parameters, x.to(dtype))


def within_budget(ours, eager, oracle, dtype):
    """Every tensor's rms error is at most 1.5 times eager PyTorch's in the same dtype, plus one rounding."""
    for name, exact in oracle.items():
        size = exact.square().mean().sqrt()
        assert size > 0, f"{name} is all zero: the test proves nothing"
        our_error, eager_error = ((got[name].double() - exact).square().mean().sqrt() for got in (ours, eager))
        budget = 1.5 * eager_error + torch.finfo(dtype).eps * size
        assert our_error <= budget, f"{name}: rms error {our_error:.3e}, eager's {eager_error:.3e}, size {size:.3e}"


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_every_gradient_match_the_twin(name, dtype, backend):
    config = CONFIGS[name]
    model = randomized(config).to(dtype)
    x, t, y = inputs(config)
    x = x.to(dtype)
    eager = twin_gradients(model, config, dtype, x, t, y)
    oracle = twin_gradients(model, config, torch.float64, x, t, y)
    with use_backend(backend):
        ours = gradients(lambda image: model(image, t, y), dict(model.named_parameters()), x)
    assert ours["out"].dtype == dtype
    within_budget(ours, eager, oracle, dtype)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_stays_within_the_budget(name, backend):
    """bfloat16 autocast over float32 weights, ours and the twin's."""
    config = CONFIGS[name]
    model = randomized(config)
    x, t, y = inputs(config)
    oracle = twin_gradients(model, config, torch.float64, x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        eager = twin_gradients(model, config, torch.float32, x, t, y)
        with use_backend(backend):
            ours = gradients(lambda image: model(image, t, y), dict(model.named_parameters()), x)
    assert ours["out"].dtype == torch.bfloat16
    assert all(p.dtype == ours[name].dtype == torch.float32 for name, p in model.named_parameters())
    within_budget(ours, eager, oracle, torch.bfloat16)


def test_float64_equals_the_twin_to_rounding():
    config = CONFIGS["patch2"]
    model = randomized(config).double()
    x, t, y = inputs(config)
    model.pos_embed.copy_(position_embedding(model.grid[0], config["hidden_size"]))
    oracle = twin_gradients(model, config, torch.float64, x, t, y)
    with use_backend("reference"):
        ours = gradients(lambda image: model(image, t, y), dict(model.named_parameters()), x.double())
    for name, exact in oracle.items():
        torch.testing.assert_close(ours[name], exact, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("grid, dim", [(3, 16), (5, 48), (16, 24)])
def test_position_embedding_is_the_papers(grid, dim):
    model = DiT(input_size=grid, patch_size=1, in_channels=1, hidden_size=dim, depth=1, num_heads=1, num_classes=1)
    assert model.pos_embed.dtype == torch.float32
    torch.testing.assert_close(model.pos_embed[0].double(), position_embedding(grid, dim), rtol=0, atol=2**-24)


def test_one_sample_does_not_depend_on_its_batch_mates():
    config = CONFIGS["patch2"]
    model = randomized(config).double()
    x, t, y = inputs(config)
    with use_backend("reference"), torch.no_grad():
        together = model(x.double(), t, y)
        alone = torch.cat([model(x[i : i + 1].double(), t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-12)


def test_compiled_in_one_graph():
    config = CONFIGS["patch2"]
    model = randomized(config)
    x, t, y = inputs(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weights = dict(model.named_parameters())
    ours = gradients(lambda image: compiled(image, t, y), weights, x)
    eager = twin_gradients(model, config, torch.float32, x, t, y)
    within_budget(ours, eager, twin_gradients(model, config, torch.float64, x, t, y), torch.float32)
