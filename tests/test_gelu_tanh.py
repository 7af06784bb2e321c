"""What is special to gelu_tanh: special values, where it is torch's own, the modules that call it, refusals."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import difuse
from difuse_kernels import explain_reset, gelu_tanh, use_backend
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.numerics import backends_here, device_of

each_backend = pytest.mark.parametrize("backend", backends_here("gelu_tanh"))
needs_kernel = pytest.mark.skipif("cpu" not in backends_here("gelu_tanh"), reason="the native module is not built")


@each_backend
def test_special_values(backend):
    x = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 20.0, -20.0, 200.0, -200.0, 1e12, -1e12, math.inf, math.nan])
    x.requires_grad_()
    out = gelu_tanh(x, backend=backend)
    (dx,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(out[:11], F.gelu(x, approximate="tanh")[:11], rtol=1e-6, atol=0)
    assert out[:2].signbit().tolist() == [False, True]
    torch.testing.assert_close(dx[:8], torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0, 0.0, 1.0, 0.0]), rtol=1e-6, atol=1e-6)
    assert out[11].isnan() and dx[11].isnan()


class Subclass(torch.Tensor):
    """Somebody's, whose memory need not be what it seems."""


ELSEWHERE = {
    "float64": lambda x: gelu_tanh(x.double()).float(),
    "a scalar": lambda x: torch.stack([gelu_tanh(value) for value in x.flatten()]).view_as(x),
    "strided": lambda x: gelu_tanh(x.t()).t(),
    "a subclass": lambda x: gelu_tanh(x.as_subclass(Subclass)).as_subclass(torch.Tensor),
    "compiled": torch.compile(gelu_tanh, fullgraph=True, backend="aot_eager"),
    "meta": lambda x: gelu_tanh(x) if gelu_tanh(x.to("meta")).is_meta else None,
}


@needs_kernel
@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_it_is_torchs_without_a_word(where, recwarn):
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    explain_reset()
    found = ELSEWHERE[where](x)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-7)
    assert sum(OPS["gelu_tanh"].chosen.values()) == (where == "meta")
    assert not [warning for warning in recwarn if "difuse" in str(warning.message)]


@needs_kernel
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_model_forced_onto_a_gpus_backend_has_torchs(backend):
    """Every op that has such a kernel runs on it; of GELU there is none, and need be none."""
    x = torch.randn(3, 5)
    explain_reset()
    with use_backend(backend):
        assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    assert not OPS["gelu_tanh"].chosen
    with pytest.raises(RuntimeError, match=f"'{backend}' cannot run .* {backend}: not written for this op yet"):
        gelu_tanh(x, backend=backend)


@needs_kernel
def test_forced_backends_are_heeded():
    x = torch.randn(3, 5)
    for backend in ("reference", "cpu"):
        explain_reset()
        with use_backend(backend):
            gelu_tanh(x)
        assert OPS["gelu_tanh"].chosen == {(backend, ()): 1}
    with use_backend("cpu"), pytest.raises(RuntimeError, match="cpu: the kernel takes contiguous tensors"):
        gelu_tanh(x.t())


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


def test_a_backend_of_gpus_can_be_asked_for():
    """Models with a GELU have always taken it; where it runs is another question."""
    pytest.importorskip("diffusers")
    from benchmarks.families import load

    if "triton" in backends_here("gated_activation"):
        model = load("facebook_dit").build().eval().to(device_of("triton"))
        assert difuse.accelerate(model, backend="triton").blocks == (3, 3)


def test_an_option_changed_afterwards_is_heeded():
    pytest.importorskip("diffusers")
    from benchmarks.families import load

    model, inputs = load("facebook_dit").build().eval(), load("facebook_dit").inputs(torch.float32)
    difuse.accelerate(model)
    for block in model.blocks:
        block.mlp.act.approximate = "none"
    difuse.accelerate(model)
    with torch.no_grad():
        found = model(**inputs)
        difuse.restore(model)
        torch.testing.assert_close(found, model(**inputs), rtol=1e-5, atol=1e-5)


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
    (lambda x: gelu_tanh(x, backend="fast"), ValueError, "backend 'fast' is unknown"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(torch.ones(2, 4))


@needs_kernel
def test_what_the_kernel_refuses_is_named():
    with pytest.raises(RuntimeError, match="cpu: the kernel takes contiguous tensors of 1 to 8 dimensions"):
        gelu_tanh(torch.ones(2, 4).t(), backend="cpu")
    with pytest.raises(RuntimeError, match="cpu: input 0 has dtype torch.float64"):
        gelu_tanh(torch.ones(2, 4).double(), backend="cpu")
