"""Products and convolutions widened to float32 on CPUs that emulate bfloat16 and float16; forced on any CPU here."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from difuse.integrations import products

SLOW = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def an_emulating_cpu(monkeypatch):
    monkeypatch.setattr(products, "_EMULATED", set(SLOW))
    monkeypatch.setattr(products, "_PIECE", 200)  # several pieces of every weight


def modules(bias=True):
    """(module, replaced forward, input) of every kind, with odd sizes, strides and groups."""
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(13, 41, bias=bias), products.linear, torch.randn(2, 19, 13)),
        "linear of rows": (nn.Linear(13, 41, bias=bias), products.linear, torch.randn(19, 26)[:, ::2]),
        "conv2d": (nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3, bias=bias), products.convolution,
                   torch.randn(2, 6, 7, 8)),
        "conv2d channels last": (nn.Conv2d(6, 9, 3, dilation=2, bias=bias), products.convolution,
                                 torch.randn(2, 6, 7, 8).to(memory_format=torch.channels_last)),
        "conv3d": (nn.Conv3d(3, 4, (1, 2, 2), stride=(1, 2, 2), bias=bias), products.convolution,
                   torch.randn(2, 3, 2, 4, 6)),
    }


def results(module, forward, x, grad=None):
    """Output and gradients of the input, weight and bias."""
    x = x.detach().requires_grad_()
    y = forward(module, x)
    grad = torch.ones_like(y) if grad is None else grad
    wanted = [x, *module.parameters()]
    return [y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", SLOW, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", modules())
def test_forward_and_gradients_are_rounded_once(kind, bias, dtype):
    module, forward, x = modules(bias)[kind]
    module, x = module.to(dtype), x.to(dtype)
    grad = torch.randn(type(module).forward(module, x).shape)
    ours = results(module, forward, x, grad.to(dtype))
    truth = results(module.double(), type(module).forward, x.double(), grad.to(dtype).double())
    for found, value in zip(ours, truth, strict=True):
        assert found.dtype == dtype and found.shape == value.shape
        assert torch.equal(found, value.to(dtype)) or torch.allclose(found.double(), value, rtol=torch.finfo(dtype).eps,
                                                                     atol=torch.finfo(dtype).eps * 0.05)


def test_an_expanded_gradient():
    module, forward, x = modules()["linear"]
    module, x = module.bfloat16(), x.bfloat16().requires_grad_()
    forward(module, x).sum().backward()
    assert torch.allclose(x.grad[0, 0].float(), module.weight.float().sum(0), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("kind", modules())
def test_only_what_is_asked_for_gets_a_gradient(kind):
    module, forward, x = modules()[kind]
    module = module.bfloat16()
    for wanted in ("weight", "bias"):
        for name, p in module.named_parameters():
            p.requires_grad_(name == wanted)
            p.grad = None
        forward(module, x.bfloat16()).sum().backward()
        assert [name for name, p in module.named_parameters() if p.grad is not None] == [wanted]


@pytest.mark.parametrize("kind", modules())
def test_autocast_multiplies_what_eager_multiplies(kind):
    module, forward, x = modules()[kind]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, eager = results(module, forward, x), results(module, type(module).forward, x)
    for found, value in zip(ours, eager, strict=True):
        assert found.dtype == value.dtype and torch.allclose(found.float(), value.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", modules())
def test_other_dtypes_and_transforms_go_their_own_way(kind):
    module, forward, x = modules()[kind]
    assert torch.equal(forward(module, x), module(x))  # float32
    half, x16 = module.bfloat16(), x.bfloat16()
    _, tangent = torch.func.jvp(lambda t: forward(half, t), (x16,), (x16,))
    assert torch.allclose(tangent, forward(half, x16) - forward(half, x16 * 0), rtol=0.05, atol=0.05)
    compiled = torch.compile(lambda t: forward(half, t), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x16), forward(half, x16), rtol=0.02, atol=0.02)


def test_mixed_dtypes_raise_as_in_eager():
    module = nn.Linear(16, 16).bfloat16()
    with pytest.raises(RuntimeError):
        products.linear(module, torch.randn(32, 16, dtype=torch.float16))


def test_few_rows_and_no_rows():
    module = nn.Linear(13, 41).bfloat16()
    for rows in (0, 1, 15, 16):
        x = torch.randn(rows, 13).bfloat16()
        found = products.linear(module, x)
        assert found.shape == (rows, 41) and torch.allclose(found.float(), F.linear(
            x.float(), module.weight.float(), module.bias.float()), rtol=0.01, atol=0.01)
