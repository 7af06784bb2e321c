"""torch.compile, torch.library, torch.func, forward-mode derivatives and activation checkpointing, over every op."""
import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import difuse_kernels
from difuse_kernels import explain, explain_reset, library, use_backend
from difuse_kernels.dispatch import OPS
from difuse_kernels.testing.case import Maker
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import backends_here, device_of, run

pytestmark = pytest.mark.skipif("cpu" not in backends_here("norm_modulate"), reason="the native module is not built")
every_case = pytest.mark.parametrize("case", cases(), ids=str)
each_op = pytest.mark.parametrize("name", OPS)


def first_case(name, dtype=torch.float32):
    """(function of the leaves, leaves) for the op's first case, results as a tuple."""
    case = cases(name)[0]
    make = Maker(dtype)
    case.build(make)
    leaves = {key: leaf for key, leaf in make.leaves.items() if leaf.requires_grad}

    def function(*values, **keywords):
        replay, given = Maker(dtype), dict(zip(leaves, values, strict=True))

        def take(key, *shape, **options):
            return given[key] if key in given else replay(key, *shape, **options)

        take.constant = replay.constant
        args, kwargs = case.build(take)
        results = getattr(difuse_kernels, name)(*args, **kwargs, **keywords)
        return results if isinstance(results, tuple) else (results,)

    return function, [leaf.detach().requires_grad_() for leaf in leaves.values()]


def gradients(results, leaves):
    for leaf in leaves:
        leaf.grad = None
    sum(result.float().square().sum() for result in results).backward()  # grad() and old checkpoints do not mix
    return [leaf.grad for leaf in leaves]


@every_case
def test_registered_ops_give_the_bits_of_eager_calls(case, monkeypatch):
    op = getattr(difuse_kernels, case.op)
    outputs, grads = run(op, case, torch.float32, backend="cpu")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as while torch.compile traces
    explain_reset()
    registered, registered_grads = run(op, case, torch.float32, backend="cpu")
    assert explain(), "the registered op did not run"
    assert all(torch.equal(a, b) for a, b in zip(outputs, registered, strict=True))
    assert set(grads) == set(registered_grads)
    assert all(torch.equal(grads[name], registered_grads[name]) for name in grads)


@pytest.mark.parametrize("case", [c for c in cases() if c.grad == "transposed" or c is cases(c.op)[0]], ids=str)
def test_opcheck(case, monkeypatch):
    calls = []

    def record(self, *arguments):
        calls.append((self._op, self.arguments(*arguments)))
        return forward(self, *arguments)

    forward = library.Compiled.forward
    monkeypatch.setattr(library.Compiled, "forward", record)
    with monkeypatch.context() as compiling:
        compiling.setattr(torch.compiler, "is_compiling", lambda: True)
        make = Maker(torch.float32)
        args, kwargs = case.build(make)
        getattr(difuse_kernels, case.op)(*args, **kwargs, backend="cpu")
    (op, arguments), = calls
    assert set(opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("name, backend", [(name, b) for name in OPS for b in backends_here(name) if b != "reference"])
def test_compiled_in_one_graph_and_equal(name, backend):
    torch._dynamo.reset()
    op, case, device = getattr(difuse_kernels, name), cases(name)[0], device_of(backend)
    outputs, grads = run(op, case, torch.float32, device=device, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found, found_grads = run(compiled, case, torch.float32, device=device, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(outputs, found, strict=True))
    assert set(grads) == set(found_grads) and all(torch.equal(grads[name], found_grads[name]) for name in grads)


def test_use_backend_is_heeded_by_compiled_code_and_recompiles():
    torch._dynamo.reset()
    norm_modulate = difuse_kernels.norm_modulate
    compiled = torch.compile(norm_modulate, fullgraph=True, backend="aot_eager")
    x, scale = torch.randn(2, 5, 24), torch.randn(2, 24)
    explain_reset()
    fused = compiled(x, scale)
    assert "cpu" in explain()
    explain_reset()
    with use_backend("reference"):
        plain = compiled(x, scale)
    assert "cpu" not in explain()
    assert torch.equal(plain, norm_modulate(x, scale, backend="reference"))
    assert torch.equal(fused, compiled(x, scale)) and torch.equal(fused, norm_modulate(x, scale))


def test_a_compiled_explicit_backend_is_honoured_or_raises():
    torch._dynamo.reset()
    compiled = torch.compile(difuse_kernels.norm_modulate, backend="aot_eager")
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    with pytest.raises(Exception, match="float64"):
        compiled(x, backend="cpu")
    assert torch.equal(compiled(x), difuse_kernels.norm_modulate(x, backend="reference"))


def test_dynamic_shapes_need_one_graph():
    torch._dynamo.reset()
    graphs = []

    def count(module, inputs):
        graphs.append(module)
        return module

    def function(x, scale):
        return difuse_kernels.norm_modulate(x, scale)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for S in (5, 9, 33):
        x, scale = torch.randn(2, S, 24), torch.randn(2, 24)
        assert torch.equal(compiled(x, scale), function(x, scale))
    assert len(graphs) == 1


@each_op
def test_forward_mode_derivative(name):
    """The directional derivative, forward and by the double-backward trick on the reference."""
    function, leaves = first_case(name, torch.float64)
    generator = torch.Generator().manual_seed(5)
    tangents = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    with forward_ad.dual_level():
        results = function(*(forward_ad.make_dual(leaf.detach(), t) for leaf, t in zip(leaves, tangents, strict=True)))
        forward = [forward_ad.unpack_dual(result).tangent for result in results]
    _, by_func = torch.func.jvp(function, tuple(leaf.detach() for leaf in leaves), tuple(tangents))
    results = function(*leaves, backend="reference")
    weights = [torch.randn(result.shape, generator=generator, dtype=result.dtype) for result in results]
    grads = torch.autograd.grad(results, leaves, weights)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    for tangent in (forward, by_func):
        torch.testing.assert_close(sum((w * t).sum() for w, t in zip(weights, tangent, strict=True)), expected)


@each_op
def test_func_grad_and_vmap(name):
    function, leaves = first_case(name)
    values = tuple(leaf.detach() for leaf in leaves)

    def loss(*values):
        return sum(r.float().square().sum() for r in function(*values))

    grads = torch.func.grad(loss, tuple(range(len(values))))(*values)
    expected = gradients(function(*leaves, backend="reference"), leaves)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    several = tuple(torch.stack([value, -0.5 * value]) for value in values)
    batched = torch.func.vmap(function, randomness="same")(*several)
    for i in range(2):
        alone = function(*(value[i] for value in several), backend="reference")
        assert all(torch.allclose(b[i], a, rtol=1e-5, atol=1e-6) for b, a in zip(batched, alone, strict=True))


@each_op
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint_recomputes_on_the_same_path(name, backend, reentrant):
    function, leaves = first_case(name)
    with use_backend(backend):
        expected = gradients(function(*leaves), leaves)
        explain_reset()
        results = checkpoint(function, *leaves, use_reentrant=reentrant)
        found = gradients(results, leaves)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ran = {chosen for chosen, _ in OPS[name].chosen}
    assert len(ran) == 1 and (backend == "auto" or ran == {"reference"})
    saves_nothing = name in ("patchify", "unpatchify") and not reentrant
    assert sum(OPS[name].chosen.values()) == (1 if saves_nothing else 2)  # forward, and recomputation where asked for


def test_checkpoint_that_leaves_use_backend_is_caught():
    """A recomputation on another path saves other tensors: torch says so, nothing wrong is returned."""
    function, leaves = first_case("norm_modulate")
    with use_backend("reference"):
        results = checkpoint(function, *leaves, use_reentrant=False)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        gradients(results, leaves)
