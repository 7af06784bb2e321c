"""What is special to adaln: partial gradients, refusals, mixed modulation, and errors that help."""
import pytest
import torch

import difuse_kernels
from difuse_kernels import (
    explain,
    explain_reset,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
    use_backend,
)
from difuse_kernels.testing.eager import EAGER
from difuse_kernels.testing.numerics import backends_here, device_of

each_backend = pytest.mark.parametrize("backend", [b for b in backends_here("norm_modulate") if b != "reference"])


def draw(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **options)


def leaves(B=2, S=35, D=40, backend="cpu"):
    names = dict(x=(B, S, D), y=(B, S, D), gate=(B, D), scale=(B, D), shift=(B, D))
    return {name: draw(*shape, seed=i).to(device_of(backend)).requires_grad_()
            for i, (name, shape) in enumerate(names.items())}


@each_backend
@pytest.mark.parametrize("used", ["x_new", "h"])
def test_loss_through_one_output_only(used, backend):
    grads = []
    for name in (backend, "reference"):
        inputs = leaves(backend=backend)
        x_new, h = gate_residual_norm_modulate(*inputs.values(), backend=name)
        ((x_new if used == "x_new" else h) * draw(2, 35, 40, seed=9).to(h.device)).sum().backward()
        grads.append({name: leaf.grad for name, leaf in inputs.items()})
    for name, expected in grads[1].items():
        ours = grads[0][name]
        if expected is None:
            assert ours is None or not ours.any(), name
        else:
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5, msg=name)


@each_backend
@pytest.mark.parametrize("frozen", ["x", "y", "gate", "scale", "shift"])
def test_frozen_input_gets_no_gradient_and_the_others_do(frozen, backend):
    inputs = leaves(backend=backend)
    inputs[frozen].requires_grad_(False)
    x_new, h = gate_residual_norm_modulate(*inputs.values(), backend=backend)
    (x_new.square().sum() + h.square().sum()).backward()
    for name, leaf in inputs.items():
        assert (leaf.grad is None) == (name == frozen), name


@each_backend
@pytest.mark.parametrize("D", [40, 41, 1288])
def test_the_rounded_sum_is_what_is_normalised(D, backend):
    """In bfloat16 the next op sees x' rounded, so its norm must be of that; the error budget cannot tell."""
    x, y = (draw(2, 9, D, seed=i).bfloat16().to(device_of(backend)) for i in range(2))
    x_new, h = gate_residual_norm_modulate(x, y, backend=backend)
    assert torch.equal(h, norm_modulate(x_new, backend=backend))


def test_residual_stream_stays_float32_under_bfloat16_branches():
    x, y = draw(2, 8, 16), draw(2, 8, 16, seed=1).bfloat16()
    x_new, h = gate_residual_norm_modulate(x, y, draw(2, 16, seed=2).bfloat16())
    assert x_new.dtype == h.dtype == torch.float32
    torch.testing.assert_close(x_new, EAGER["gate_residual"](x, y.float(), draw(2, 16, seed=2).bfloat16().float()))


def test_inputs_are_left_alone():
    inputs = leaves()
    before = {name: leaf.detach().clone() for name, leaf in inputs.items()}
    x_new, h = gate_residual_norm_modulate(*inputs.values())
    grad = draw(2, 35, 40, seed=5)
    kept = grad.clone()
    torch.autograd.backward([x_new, h], [grad, grad])
    assert torch.equal(grad, kept)
    assert all(torch.equal(leaf.detach(), before[name]) for name, leaf in inputs.items())


def test_tensor_subclasses_are_read_like_tensors():
    """Parameters reach the kernel through their Python attributes, plain tensors through DLPack's table."""
    x, mod = draw(2, 9, 24), draw(2, 48, seed=1)
    scale, shift = (torch.nn.Parameter(m) for m in mod.chunk(2, dim=1))  # strided views
    assert torch.equal(norm_modulate(torch.nn.Parameter(x), scale, shift), norm_modulate(x, *mod.chunk(2, dim=1)))


def test_explicit_backend_is_honoured_or_raises():
    x = draw(2, 4, 8)
    strided = draw(2, 8, 4).transpose(1, 2)
    with pytest.raises(RuntimeError, match=r"backend 'cuda' cannot run.*\(2, 4, 8\) torch.float64.*reference: ready"):
        norm_modulate(x.double(), backend="cuda")
    if difuse_kernels.native.missing() is None:
        with pytest.raises(RuntimeError, match="last dimension of input 0 is strided"):
            norm_modulate(strided, backend="cpu")
        with pytest.raises(RuntimeError, match="float64"):
            norm_modulate(x.double(), backend="cpu")


def test_auto_falls_back_in_sight():
    explain_reset()
    strided = draw(2, 8, 4).transpose(1, 2)
    if difuse_kernels.native.missing() is None:
        difuse_kernels.dispatch._warned.clear()
        with pytest.warns(UserWarning, match="norm_modulate runs on 'reference', not on 'cpu': the last dimension"):
            out = norm_modulate(strided)
    else:
        out = norm_modulate(strided)
    torch.testing.assert_close(out, EAGER["norm_modulate"](strided))
    assert "reference" in explain()


def test_use_backend_switches_a_block_and_nests():
    explain_reset()
    x = draw(2, 4, 8)
    with use_backend("reference"):
        norm_modulate(x)
        with use_backend("auto"):
            norm_modulate(x)
    chosen = [backend for backend, _ in difuse_kernels.dispatch.OPS["norm_modulate"].chosen]
    assert chosen[0] == "reference"
    assert len(chosen) == (2 if difuse_kernels.native.missing() is None else 1)
    with pytest.raises(ValueError, match="'gpu' is unknown"), use_backend("gpu"):
        pass


def test_torch_func_transforms_run_on_the_reference():
    x, mod = draw(3, 2, 5, 16), draw(2, 32, seed=1)
    scale, shift = mod.chunk(2, dim=1)

    def loss(x):
        return norm_modulate(x, scale, shift).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(x)
    for one, gradient in zip(x, mapped, strict=True):
        leaf = one.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(gradient, expected)
    _, tangent = torch.func.jvp(loss, (x[0],), (x[1],))
    torch.testing.assert_close(tangent, (mapped[0] * x[1]).sum(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="'cpu' cannot run under torch.func transforms"):
        torch.func.grad(lambda x: norm_modulate(x, backend="cpu").sum())(x[0])


BAD = [
    (lambda x: norm_modulate(x[0]), ValueError, r"x has shape \(4, 8\); expected \[B,S,D\]"),
    (lambda x: norm_modulate([1.0]), TypeError, "x is list; expected a tensor"),
    (lambda x: norm_modulate(x.long()), TypeError, "x has dtype torch.int64; expected a floating dtype"),
    (lambda x: norm_modulate(x, x[:1, 0]), ValueError, r"scale has shape \(1, 8\); expected \(2, 8\) or \(2, 4, 8\)"),
    (lambda x: norm_modulate(x, None, x[..., :5]), ValueError, r"shift has shape \(2, 4, 5\)"),
    (lambda x: norm_modulate(x, 1.0), TypeError, "scale is float; expected a tensor or None"),
    (lambda x: norm_modulate(x, norm="batch"), ValueError, "norm is 'batch'; expected one of 'layer', 'rms'"),
    (lambda x: norm_modulate(x, weight=x[0, :, 0]), ValueError, r"weight has shape \(4,\); expected \(8,\)"),
    (lambda x: norm_modulate(x, backend="fast"), ValueError, "backend 'fast' is unknown"),
    (lambda x: norm_modulate(x, x[:, 0].to("meta")), ValueError, "inputs are on cpu and meta; move them"),
    (lambda x: gate_residual(x, None), TypeError, "y is NoneType; expected a tensor"),
    (lambda x: gate_residual(x, x[:, :3]), ValueError, r"y has shape \(2, 3, 8\); expected \(2, 4, 8\)"),
    (lambda x: gate_residual(x, x, x[0, 0]), ValueError, r"gate has shape \(8,\)"),
    (lambda x: gate_residual_norm_modulate(x, x, x[:, 0].int()), TypeError, "gate has dtype torch.int32"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(draw(2, 4, 8))


def test_no_argument_is_dropped():
    with pytest.raises(TypeError, match="dropout"):
        norm_modulate(draw(2, 4, 8), dropout=0.1)
