"""What is special to gated_activation: which half, the models' own formulas, special values, refusals."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from difuse_kernels import gated_activation
from difuse_kernels.testing.numerics import backends_here, device_of
from difuse_kernels.triton_launch import INTERPRETED

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
each_backend = pytest.mark.parametrize("backend", backends_here("gated_activation"))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@each_backend
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_which_half_is_activated(name, backend):
    a, b = draw(2, 5, 24).to(device_of(backend)), draw(2, 5, 24, seed=1).to(device_of(backend))
    h, act = torch.cat([a, b], -1), ACTIVATIONS[name]
    first = gated_activation(h, activation=name, act_on="first", backend=backend)
    second = gated_activation(h, activation=name, act_on="second", backend=backend)
    torch.testing.assert_close(first, act(a) * b, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(second, a * act(b), rtol=2e-6, atol=2e-6)


def test_formulas_of_diffusers():
    x = draw(2, 5, 16)
    hidden, gate = x.chunk(2, dim=-1)  # GEGLU.forward and SwiGLU.forward
    torch.testing.assert_close(gated_activation(x), hidden * F.gelu(gate))
    torch.testing.assert_close(gated_activation(x, activation="silu"), hidden * F.silu(gate))
    x1, x2 = x.chunk(2, dim=-1)  # Flux2SwiGLU.forward
    torch.testing.assert_close(gated_activation(x, activation="silu", act_on="first"), F.silu(x1) * x2)


def test_diffusers_own_modules():
    activations = pytest.importorskip("diffusers.models.activations")
    x = draw(2, 5, 16)
    for module, name in ((activations.GEGLU(16, 24), "gelu"), (activations.SwiGLU(16, 24), "silu")):
        torch.testing.assert_close(gated_activation(module.proj(x), activation=name), module(x))


@each_backend
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_special_values(name, backend):
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 200.0, -200.0, 3e38, -3e38, math.inf, math.nan])
    z = z.to(device_of(backend))
    h = torch.stack([torch.ones_like(z), z], -1).requires_grad_()
    out = gated_activation(h, activation=name, backend=backend)
    (dh,) = torch.autograd.grad(out.sum(), h)
    exact = ACTIVATIONS[name](z.double()).float()  # torch's own GELU of 3e38 and infinity is NaN with AVX-512
    torch.testing.assert_close(out[:, 0], exact, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.isfinite(out[:10]).all() and torch.isnan(out[11]).all()
    expected = torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0], device=z.device)
    torch.testing.assert_close(dh[:8, 1], expected, rtol=1e-6, atol=1e-6)
    assert torch.isnan(dh[11]).all()


class Operations(TorchDispatchMode):
    """What torch itself is asked to compute meanwhile."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


@each_backend
def test_slice_of_a_projection_and_of_a_gradient_are_read_in_place(backend):
    packed, grad = draw(2, 7, 5, 96).to(device_of(backend)), draw(2, 9, 3, 48, seed=1).to(device_of(backend))
    h, grad = packed[:, :, 1:4, 32:], grad[:, 2:, :, 8:40]  # leading strides of their own
    dense = h.contiguous().requires_grad_()
    h = h.detach().requires_grad_()
    with Operations() as asked:
        out = gated_activation(h, backend=backend)
        (dh,) = torch.autograd.grad(out, h, grad)
    expected = gated_activation(dense, backend=backend)
    assert torch.equal(out, expected) and torch.equal(dh, torch.autograd.grad(expected, dense, grad.contiguous())[0])
    if backend != "reference" and not (backend == "triton" and INTERPRETED):  # the interpreter copies for itself
        assert asked.names <= {"empty", "empty_like", "detach", "alias"}, asked.names


BAD = [
    (lambda h: gated_activation(h[..., :7]), ValueError, r"h has shape \(2, 4, 7\); expected \[...,2F\]"),
    (lambda h: gated_activation(h[0, 0]), ValueError, r"h has shape \(8,\); expected .* leading dimension"),
    (lambda h: gated_activation([1.0]), TypeError, "h is list; expected a tensor"),
    (lambda h: gated_activation(h.long()), TypeError, r"h has dtype torch.int64; expected a floating dtype"),
    (lambda h: gated_activation(h, activation="relu"), ValueError, "activation is 'relu'; expected one of 'silu'"),
    (lambda h: gated_activation(h, act_on="both"), ValueError, "act_on is 'both'; expected one of 'first', 'second'"),
    (lambda h: gated_activation(h, backend="fast"), ValueError, "backend 'fast' is unknown"),
    (lambda h: gated_activation(h, dropout=0.1), TypeError, "dropout"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(draw(2, 4, 8))


@pytest.mark.parametrize("backend", [name for name in backends_here("gated_activation") if name != "reference"])
def test_what_kernels_refuse_is_named(backend):
    h = draw(2, 4, 8).to(device_of(backend))
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot run .* {backend}: input 0 has dtype torch.float64"):
        gated_activation(h.double(), backend=backend)
    with pytest.raises(RuntimeError, match=f"{backend}: the last dimension of input 0 is strided; call .contiguous"):
        gated_activation(h.transpose(1, 2), backend=backend)
