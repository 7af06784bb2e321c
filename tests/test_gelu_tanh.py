"""What is special to gelu_tanh: special values, where it is torch's own, the modules that call it, refusals."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import difuse
from difuse_kernels import explain_reset, gelu_tanh, use_backend
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.numerics import backends_here

each_backend = pytest.mark.parametrize("backend", backends_here("gelu_tanh"))
needs_kernel = pytest.mark.skipif("cpu" not in backends_here("gelu_tanh"), reason="the native module is not built")


@each_backend
def test_special_values(backend):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 200.0, -200.0, 1e12, -1e12, math.inf, math.nan])
    x.requires_grad_()
    out = gelu_tanh(x, backend=backend)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out[:11], F.gelu(x, approximate="tanh")[:11], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx[:8], torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0]), rtol=1e-6, atol=1e-6)
    assert out[11].isnan() and dx[11].isnan()


@needs_kernel
@pytest.mark.parametrize("surroundings", ["compiled", "triton", "cuda"])
def test_elsewhere_it_is_torchs(surroundings):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    explain_reset()
    if surroundings == "compiled":
        found = torch.compile(gelu_tanh, fullgraph=True, backend="aot_eager")(x)
    else:
        with use_backend(surroundings):  # every op that has such a kernel runs on it; there is none, and need be none
            found = gelu_tanh(x)
    assert torch.equal(found, F.gelu(x, approximate="tanh")) and not OPS["gelu_tanh"].chosen
    with pytest.raises(RuntimeError, match="'triton' cannot run .* triton: not written for this op yet"):
        gelu_tanh(x, backend="triton")


@needs_kernel
@pytest.mark.parametrize("name, calls", [("facebook_dit", 3), ("dit", 3), ("pixart", 4), ("flux", 6), ("qwenimage", 4)])
def test_accelerated_models_call_it(name, calls):
    pytest.importorskip("diffusers")
    from benchmarks.families import load

    family = load(name)
    model, inputs = family.build().eval(), family.inputs(torch.float32)
    tanhs = [module for module in model.modules() if isinstance(module, nn.GELU) or type(module).__name__ == "GELU"]
    assert len(tanhs) == calls and all(module.approximate == "tanh" for module in tanhs)
    difuse.accelerate(model)
    explain_reset()
    with torch.no_grad():
        model(**inputs)
    assert OPS["gelu_tanh"].chosen == {("cpu", ()): calls}
    difuse.restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_gelu_by_erf_stays_torchs():
    pytest.importorskip("diffusers")
    from benchmarks.families import load

    model = load("facebook_dit").build().eval()
    for block in model.blocks:
        block.mlp.act = nn.GELU()
    difuse.accelerate(model)
    explain_reset()
    with torch.no_grad():
        model(**load("facebook_dit").inputs(torch.float32))
    assert not OPS["gelu_tanh"].chosen and "forward" not in vars(model.blocks[0].mlp.act)


BAD = [
    (lambda x: gelu_tanh([1.0]), TypeError, "x is list; expected a floating tensor"),
    (lambda x: gelu_tanh(x.long()), TypeError, "x is torch.int64; expected a floating tensor"),
    (lambda x: gelu_tanh(x.sum()), ValueError, r"x has no dimension; expected \[...,F\]"),
    (lambda x: gelu_tanh(x, backend="fast"), ValueError, "backend 'fast' is unknown"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(2, 4))


@needs_kernel
def test_what_the_kernel_refuses_is_named():
    with pytest.raises(RuntimeError, match="cpu: the last dimension of input 0 is strided; call .contiguous"):
        gelu_tanh(torch.ones(2, 4).t(), backend="cpu")
    with pytest.raises(RuntimeError, match="cpu: input 0 has dtype torch.float64"):
        gelu_tanh(torch.ones(2, 4).double(), backend="cpu")
