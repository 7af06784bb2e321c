"""What is special to adaln: partial gradients, refusals, mixed modulation, and errors that help."""
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import difuse_kernels
from difuse_kernels import (
    dispatch,
    explain,
    explain_reset,
    gate_residual,
    gate_residual_norm_modulate,
    norm_modulate,
    norm_modulate_dual,
    triton_launch,
    use_backend,
)
from difuse_kernels.dispatch import OPS
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


ADALN = {"norm_modulate": norm_modulate, "gate_residual": gate_residual,
         "gate_residual_norm_modulate": gate_residual_norm_modulate}
each_table_backend = pytest.mark.parametrize(  # CUDA C++ refuses tables
    "backend", [b for b in backends_here("norm_modulate_dual") if b != "reference"])


def tabled(op, per_token, dtype=torch.float32, B=5, S=70, D=40, device="cpu"):
    """(args, kwargs, leaves) of a call with every table: modulations are strided views of one embedding."""
    x, y = (draw(B, S, D, seed=i).to(device, dtype).requires_grad_() for i in range(2))
    temb = draw(*((B, S) if per_token else (B,)), 6, D, seed=2).to(device, dtype).requires_grad_()
    table = draw(6, D, seed=3).to(device).requires_grad_()
    rows, learned = temb.unbind(-2), table.unbind(0)
    args = {"norm_modulate": (x, rows[1], rows[0]), "gate_residual": (x, y, rows[2]),
            "gate_residual_norm_modulate": (x, y, rows[2], rows[4], rows[3])}[op]
    kwargs = {"norm_modulate": dict(scale_table=learned[1], shift_table=learned[0]),
              "gate_residual": dict(gate_table=learned[2]),
              "gate_residual_norm_modulate": dict(gate_table=learned[2], scale_table=learned[4],
                                                  shift_table=learned[3])}[op]
    return args, kwargs, dict(x=x, y=y, temb=temb, table=table)


@each_table_backend
@pytest.mark.parametrize("per_token", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("op", ADALN)
def test_table_gradients_are_summed_before_rounding(op, per_token, backend):
    """In bfloat16 the float32 table's gradient is float32's: sums of rounded rows would be off by 1e-3."""
    found = []
    for name, work in ((backend, torch.bfloat16), ("reference", torch.float64)):
        args, kwargs, leaves = tabled(op, per_token, torch.bfloat16, device=device_of(backend))
        if work == torch.float64:
            args, kwargs = [a.double() for a in args], {key: table.double() for key, table in kwargs.items()}
        results = ADALN[op](*args, **kwargs, backend=name)
        results = results if isinstance(results, tuple) else (results,)
        # a loss through the last result alone: x' is rounded on the way into the norm, which no table's sum undoes
        incoming = draw(*results[0].shape, seed=7).bfloat16().to(results[0])
        last = results[0] if op == "gate_residual_norm_modulate" else results[-1]
        found.append(torch.autograd.grad(last, leaves["table"], incoming)[0])
    ours, truth = found
    assert ours.dtype == torch.float32
    error = (ours - truth).square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < 2e-6, error


@each_table_backend
@pytest.mark.parametrize("per_token", [False, True], ids=["per_sample", "per_token"])
@pytest.mark.parametrize("frozen", ["temb", "table", "x", "y"])
@pytest.mark.parametrize("op", ADALN)
def test_tables_and_modulations_are_frozen_apart(op, frozen, per_token, backend):
    grads = []
    for name in (backend, "reference"):
        args, kwargs, leaves = tabled(op, per_token, device=device_of(backend))
        if frozen == "temb":
            args = [a if a is leaves["x"] or a is leaves["y"] else a.detach() for a in args]
        elif frozen == "table":
            kwargs = {key: table.detach() for key, table in kwargs.items()}
        else:
            args = [a.detach() if a is leaves[frozen] else a for a in args]
        results = ADALN[op](*args, **kwargs, backend=name)
        results = results if isinstance(results, tuple) else (results,)
        wanted = [leaf for key, leaf in leaves.items() if key != frozen]
        incoming = [draw(*out.shape, seed=7 + i).to(out) for i, out in enumerate(results)]
        grads.append(torch.autograd.grad(results, wanted, incoming, allow_unused=True))
    for ours, expected in zip(*grads, strict=True):
        assert (ours is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-4)


@each_table_backend
@pytest.mark.parametrize("used", [0, 1])
def test_tables_get_zeros_or_sums_from_a_loss_through_one_output(used, backend):
    grads = []
    for name in (backend, "reference"):
        args, kwargs, leaves = tabled("gate_residual_norm_modulate", True, device=device_of(backend))
        out = gate_residual_norm_modulate(*args, **kwargs, backend=name)[used]
        grads.append(torch.autograd.grad(out, list(leaves.values()), draw(*out.shape, seed=9).to(out)))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-4)


@each_table_backend
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("rows", ["per_sample", "per_token", "mixed"])
def test_dual_loss_through_one_output_only(rows, used, backend):
    grads = []
    for name in (backend, "reference"):
        shapes = [(3, 9, 24) if rows == "per_token" or (rows == "mixed" and i % 2) else (3, 24) for i in range(4)]
        inputs = [draw(3, 9, 24), *(draw(*shape, seed=1 + i) for i, shape in enumerate(shapes))]
        inputs = [leaf.to(device_of(backend)).requires_grad_() for leaf in inputs]
        out = norm_modulate_dual(*inputs, backend=name)[used]
        (out * draw(3, 9, 24, seed=9).to(out)).sum().backward()
        grads.append([leaf.grad for leaf in inputs])
    for ours, expected in zip(*grads, strict=True):
        if expected is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


@each_table_backend
@pytest.mark.parametrize("frozen", range(5))
def test_dual_frozen_input_gets_no_gradient_and_the_others_do(frozen, backend):
    inputs = [draw(2, 35, 40, seed=i) if i == 0 else draw(2, 40, seed=i) for i in range(5)]
    inputs = [leaf.to(device_of(backend)).requires_grad_(i != frozen) for i, leaf in enumerate(inputs)]
    h, h2 = norm_modulate_dual(*inputs, backend=backend)
    (h.square().sum() + h2.square().sum()).backward()
    for i, leaf in enumerate(inputs):
        assert (leaf.grad is None) == (i == frozen), i


@each_table_backend
def test_dual_is_two_modulations_of_one_norm(backend):
    x, *rows = (draw(*shape, seed=i).to(device_of(backend)) for i, shape in enumerate([(2, 35, 40)] + [(2, 40)] * 4))
    h, h2 = norm_modulate_dual(x, *rows, norm="rms", eps=1e-3, backend=backend)
    assert torch.equal(h, norm_modulate(x, *rows[:2], norm="rms", eps=1e-3, backend=backend))
    assert torch.equal(h2, norm_modulate(x, *rows[2:], norm="rms", eps=1e-3, backend=backend))


class Large(TorchDispatchMode):
    """Collects the tensors of `least` elements and more that operations return."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.seen += isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= self.least
        return result


@each_table_backend
@pytest.mark.parametrize("op", ADALN)
def test_nothing_large_is_allocated_beside_the_outputs(op, backend):
    args, kwargs, _ = tabled(op, per_token=True, device=device_of(backend))
    interpreted = backend == "triton" and triton_launch.INTERPRETED  # the interpreter copies what it reads: not run
    launches = triton_launch.recording("sm_90") if interpreted else nullcontext()
    with torch.no_grad(), launches, Large(args[0].nbytes) as large:
        results = ADALN[op](*args, **kwargs, backend=backend)
    assert large.seen == (2 if isinstance(results, tuple) else 1)


def test_cuda_kernels_refuse_what_they_have_not():
    if "cuda" not in OPS["norm_modulate"].backends or OPS["norm_modulate"].missing("cuda") is not None:
        pytest.skip("no CUDA C++ kernels here")
    device = device_of("cuda")
    for op in ADALN:
        args, kwargs, _ = tabled(op, per_token=False, device=device)
        with pytest.raises(RuntimeError, match="cuda: the CUDA C\\+\\+ kernels add no table to a modulation"):
            ADALN[op](*args, **kwargs, backend="cuda")
        for name in kwargs:  # each of them alone, too
            if op != "gate_residual":
                with pytest.raises(RuntimeError, match="add no table"):
                    ADALN[op](*args, **{name: kwargs[name]}, backend="cuda")
    with pytest.raises(RuntimeError, match="cuda: not written for this op yet"):
        norm_modulate_dual(*(draw(*s).to(device) for s in [(2, 3, 8)] + [(2, 8)] * 4), backend="cuda")


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
        dispatch._warned.clear()
        with pytest.warns(UserWarning, match="norm_modulate runs on 'reference', not on 'cpu': the last dimension"):
            out = norm_modulate(strided)
    else:
        out = norm_modulate(strided)
    torch.testing.assert_close(out, EAGER["norm_modulate"](strided))
    assert "reference" in explain()


@pytest.mark.skipif(not {"cuda", "triton"} <= set(backends_here("norm_modulate")), reason="needs both GPU backends")
@pytest.mark.parametrize("missing", [None, "no such module"])
def test_another_kernel_is_a_fallback_only_from_one_that_is_missing(missing, monkeypatch, recwarn):
    """CUDA C++ refuses tables and Triton takes them: as designed. Of a backend that is not there at all one is told."""
    monkeypatch.delenv("DIFUSE_FAIL_ON_FALLBACK", raising=False)
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("cuda", "triton", "reference"))
    monkeypatch.setitem(dispatch.MISSING, "cuda", lambda: missing)
    monkeypatch.setattr(OPS["norm_modulate"], "_implementations", {})
    explain_reset()
    x, scale, table = (draw(*shape).to(device_of("triton")) for shape in ((2, 4, 8), (2, 8), (8,)))
    norm_modulate(x, scale, scale_table=table)
    (backend, ((refused, reason),)), = OPS["norm_modulate"].chosen
    assert (backend, refused) == ("triton", "cuda") and (missing or "table") in reason
    assert [str(each.message) for each in recwarn] == (
        [f"difuse: norm_modulate runs on 'triton', not on 'cuda': {missing}"] if missing else [])


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
    (lambda x: norm_modulate(x, scale_table=x[0, 0]), ValueError,
     "norm_modulate: scale_table is given but scale is None; pass the scale that the table is added to"),
    (lambda x: norm_modulate(x, x, shift_table=x[0, 0]), ValueError, "shift_table is given but shift is None"),
    (lambda x: norm_modulate(x, x, x, scale_table=x[0]), ValueError, r"scale_table has shape \(4, 8\); expected"),
    (lambda x: norm_modulate(x, x, x, shift_table=x[0, 0].long()), TypeError, "shift_table has dtype torch.int64"),
    (lambda x: gate_residual(x, x, gate_table=x[0, 0]), ValueError, "gate_table is given but gate is None"),
    (lambda x: gate_residual_norm_modulate(x, x, x, gate_table=2.0), TypeError, "gate_table is float"),
    (lambda x: gate_residual_norm_modulate(x, x, scale=x, shift_table=x[0, 0]), ValueError, "shift is None"),
    (lambda x: norm_modulate(x, x, scale_table=x[0, 0].to("meta")), ValueError, "inputs are on cpu and meta"),
    (lambda x: norm_modulate_dual(x, x, x, x, None), TypeError, r"shift2 is NoneType; expected a tensor \[B,D\] or"),
    (lambda x: norm_modulate_dual(x, x, x, x[:, 0, :3], x), ValueError, r"scale2 has shape \(2, 3\)"),
    (lambda x: norm_modulate_dual(x, x, x, x, x, norm="batch"), ValueError, "norm is 'batch'"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(draw(2, 4, 8))


def test_no_argument_is_dropped():
    with pytest.raises(TypeError, match="dropout"):
        norm_modulate(draw(2, 4, 8), dropout=0.1)
