"""What is special to attention: masks as identities, hidden garbage, few heads on many threads, refusals."""
import importlib
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import attention, attention_packed, triton_launch
from difuse_kernels.attention.attention import ATTENTION
from difuse_kernels.testing.cases import cases
from difuse_kernels.testing.numerics import backends_here, check_case

BACKENDS = backends_here("attention")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_interpreter = pytest.mark.skipif("triton" not in BACKENDS or not triton_launch.INTERPRETED,
                                       reason="hands CPU tensors to triton")
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the native module is not built")


def draw(*shape, seed=0, dtype=torch.float32, grad=False):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype).requires_grad_(grad)


def inputs(B=2, Sq=9, Sk=37, H=4, Hkv=2, D=24, **options):
    return draw(B, Sq, H, D, **options), draw(B, Sk, Hkv, D, seed=1, **options), draw(B, Sk, Hkv, D, seed=2, **options)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32)


@every_backend
@pytest.mark.parametrize("B,Sq,Sk,H,D", [(2, 65, 129, 3, 72), (1, 7, 300, 2, 40), (2, 1, 63, 1, 256), (1, 99, 1, 2, 8)])
def test_equals_scaled_dot_product_attention(backend, B, Sq, Sk, H, D):
    q, k, v = inputs(B, Sq, Sk, H, H, D)
    ours = attention(q, k, v, backend=backend)
    truth = F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    assert ours.is_contiguous() and ours.dtype == q.dtype
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=2e-6)


@needs_cpu
@pytest.mark.parametrize("case", [case for case in cases() if case.op.startswith("attention")], ids=str)
def test_bfloat16_without_gradients(case):
    """The kernel then multiplies bfloat16 where the CPU can; the contract suite asks for gradients."""
    with torch.no_grad():
        lines = check_case(case, torch.bfloat16, "cpu", grads=False)
    assert lines and all(line.ok for line in lines), lines


@every_backend
def test_kv_lengths_is_the_same_as_fewer_keys(backend):
    q, k, v = inputs(grad=True)
    n = (37, 16)
    out = attention(q, k, v, kv_lengths=lengths(*n), backend=backend)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    for b in range(2):
        one = [t[b : b + 1].detach() for t in (q, k[:, : n[b]], v[:, : n[b]])]
        one = [t.requires_grad_() for t in one]
        alone = attention(*one, backend=backend)
        torch.testing.assert_close(out[b : b + 1], alone, rtol=1e-5, atol=1e-6)
        alone_grads = torch.autograd.grad(alone.square().sum(), one)
        torch.testing.assert_close(grads[0][b : b + 1], alone_grads[0], rtol=1e-4, atol=1e-5)
        for whole, part in zip(grads[1:], alone_grads[1:], strict=True):
            torch.testing.assert_close(whole[b : b + 1, : n[b]], part, rtol=1e-4, atol=1e-5)
            assert (whole[b, n[b] :] == 0).all()


@every_backend
@pytest.mark.parametrize("garbage", [float("nan"), float("inf")])
def test_hidden_keys_may_hold_anything(backend, garbage):
    q, k, v = inputs()
    bias = draw(2, 37, seed=3)
    clean = attention(q, k, v, kv_lengths=lengths(20, 5), key_bias=bias, backend=backend)
    for b, n in enumerate((20, 5)):
        k[b, n:], v[b, n:], bias[b, n:] = garbage, garbage, garbage
    leaves = [t.requires_grad_() for t in (q, k, v, bias)]
    out = attention(q, k, v, kv_lengths=lengths(20, 5), key_bias=bias, backend=backend)
    assert torch.equal(out, clean)
    grads = torch.autograd.grad(out.square().sum(), leaves)
    assert all(torch.isfinite(g).all() for g in grads)


@every_backend
@pytest.mark.parametrize("mask", ["length", "infinite bias"])
def test_no_visible_key_gives_zeros(backend, mask):
    q, k, v = inputs(grad=True)
    bias = torch.zeros(2, 37)
    bias[1] = -torch.inf
    kwargs = {"kv_lengths": lengths(37, 0)} if mask == "length" else {"key_bias": bias}
    out = attention(q, k, v, backend=backend, **kwargs)
    grads = torch.autograd.grad(out, (q, k, v), draw(*out.shape, seed=9))
    for tensor in (out, *grads):
        assert (tensor[1] == 0).all() and (tensor[0] != 0).any() and torch.isfinite(tensor).all()


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_lengths_that_cannot_be_read_are_clamped(backend):
    """Lengths on a GPU are not looked at before the kernel: it must not run off the keys."""
    q, k, v = inputs()
    kernel = ATTENTION.implementation(backend)
    whole, stats = kernel.forward(q, k, v, None, None, 0.2, True)
    out, stats = kernel.forward(q, k, v, lengths(1000, -3), None, 0.2, True)
    assert torch.equal(out[0], whole[0]) and (out[1] == 0).all()
    grads = kernel.backward(whole, q, k, v, lengths(1000, -3), None, out, stats, 0.2, (True, True, True, False))
    assert all((g[1] == 0).all() and torch.isfinite(g).all() for g in grads[:3])


@needs_interpreter
@pytest.mark.parametrize("change, reason", [
    (dict(D=20), "not a multiple of 8"), (dict(D=264), "up to 256"), (dict(dtype=torch.float64), "float64")])
def test_triton_refuses(change, reason):
    with pytest.raises(RuntimeError, match=f"triton: [^;]*{reason}"):
        attention(*inputs(**change), backend="triton")


@needs_interpreter
def test_triton_refuses_a_strided_last_dimension_and_foreign_devices(monkeypatch):
    q, k, v = inputs(D=48)
    with pytest.raises(RuntimeError, match="the last dimension of input 1 is strided"):
        attention(q[..., :24], k[..., ::2], v[..., :24], backend="triton")
    with pytest.raises(RuntimeError, match="the last dimension of input 3 is strided"):
        attention(q, k, v, key_bias=torch.zeros(37, 2).t(), backend="triton")
    unsupported = ATTENTION.implementation("triton").unsupported
    assert "kv_lengths is on another device" in unsupported("attention", (q, k, v, lengths(1, 1).to("meta"), None))
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    assert unsupported("attention", (q, k, v, None, None)) == "input 0 is on cpu"


@needs_interpreter
def test_triton_takes_strides_of_any_size(monkeypatch):
    """Offsets inside a block leave 32 bits from some stride on: the same results in 64."""
    qkv = draw(2, 35, 3, 2, 24, grad=True)
    narrow = attention_packed(qkv, backend="triton")
    (grad,) = torch.autograd.grad(narrow.square().sum(), qkv)
    monkeypatch.setattr(importlib.import_module("difuse_kernels.attention.attention_triton"), "WIDE", 1)
    wide = attention_packed(qkv, backend="triton")
    assert torch.equal(wide, narrow) and torch.equal(torch.autograd.grad(wide.square().sum(), qkv)[0], grad)


@every_backend
def test_packed_is_attention_on_the_three(backend):
    qkv, bias = draw(2, 19, 3, 2, 24, grad=True), draw(2, 19, seed=4, grad=True)
    options = dict(kv_lengths=lengths(19, 7), key_bias=bias, scale=0.3, backend=backend)
    packed, three = attention_packed(qkv, **options), attention(*qkv.unbind(2), **options)
    assert torch.equal(packed, three)
    for ours, theirs in zip(torch.autograd.grad(packed.square().sum(), (qkv, bias)),
                            torch.autograd.grad(three.square().sum(), (qkv, bias)), strict=True):
        assert torch.equal(ours, theirs)
    assert attention_packed(qkv, **options | {"key_bias": None}).requires_grad
    (alone,) = torch.autograd.grad(attention_packed(qkv.detach(), **options).square().sum(), bias)
    assert torch.isfinite(alone).all()


@every_backend
def test_scale_zero_averages_and_a_nan_stays_in_its_row(backend):
    q, k, v = inputs(H=2)
    mean = attention(q, k, v, scale=0, backend=backend)
    torch.testing.assert_close(mean, v.mean(1, keepdim=True).expand_as(mean), rtol=1e-5, atol=1e-6)
    q[1, 3, 0, 0] = float("nan")
    out = attention(q, k, v, backend=backend)
    assert out[1, 3, 0].isnan().all()
    out[1, 3, 0] = 0
    assert torch.isfinite(out).all()


@needs_cpu
@pytest.mark.parametrize("B,Sq,Sk,H,Hkv", [(1, 200, 300, 3, 1), (1, 50, 129, 2, 2), (3, 97, 260, 1, 1)])
def test_few_heads_on_many_threads_give_the_same_bits(B, Sq, Sk, H, Hkv):
    """Whole pairs per thread on one side, blocks of queries and of keys over the threads on the other."""
    q, k, v = inputs(B, Sq, Sk, H, Hkv, 40, grad=True)
    bias = draw(B, Sk, seed=5, grad=True)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            out = attention(q, k, v, key_bias=bias, backend="cpu")
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, bias))))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_only_the_wanted_gradients(backend):
    for wanted in range(1, 15):
        leaves = [*inputs(1, 3, 5, 2, 1, 8), draw(1, 5, seed=4)]
        chosen = [t.requires_grad_() for i, t in enumerate(leaves) if wanted >> i & 1]
        ours = torch.autograd.grad(attention(*leaves[:3], key_bias=leaves[3], backend=backend).square().sum(), chosen)
        truth = torch.autograd.grad(
            attention(*leaves[:3], key_bias=leaves[3], backend="reference").square().sum(), chosen)
        for got, expected in zip(ours, truth, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@needs_cpu
def test_scratch_grows_with_the_keys_not_with_their_square():
    """16384 x 16384 scores would be a gigabyte; measured in a fresh process, whose peak is its own."""
    program = """if True:
        import resource, torch
        from difuse_kernels import attention
        q, k, v = (torch.randn(1, 16384, 1, 8, requires_grad=True) for _ in range(3))
        attention(*(t[:, :64] for t in (q, k, v)), backend="cpu").sum().backward()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        attention(q, k, v, backend="cpu").sum().backward()
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 100, f"{run.stdout} MiB"


@needs_cpu
@pytest.mark.parametrize("change, reason", [
    (dict(D=20), "multiple of 8"), (dict(D=264), "up to 256"), (dict(dtype=torch.float64), "float64")])
def test_auto_falls_back_and_cpu_refuses(change, reason, recwarn, monkeypatch):
    monkeypatch.delenv("DIFUSE_FAIL_ON_FALLBACK", raising=False)
    q, k, v = inputs(**change)
    with pytest.raises(RuntimeError, match=reason):
        attention(q, k, v, backend="cpu")
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="reference"))


def _strided_last(t):
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


@needs_cpu
def test_a_strided_last_dimension_is_refused():
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="contiguous"):
        attention(q, _strided_last(k), v, backend="cpu")


BAD = {
    "q_not_a_tensor": (lambda q, k, v: attention([1.0], k, v), TypeError, "q is list"),
    "integers": (lambda q, k, v: attention(q.long(), k, v), TypeError, "q has dtype torch.int64"),
    "three_dims": (lambda q, k, v: attention(q, k[0], v), ValueError, r"k has shape .* expected \[B,Sk,Hkv,Dh\]"),
    "mixed_dtypes": (lambda q, k, v: attention(q, k.half(), v), TypeError, "float32, torch.float16, torch.float32"),
    "batch": (lambda q, k, v: attention(q[:1], k, v), ValueError, r"expected \(1, Sk, Hkv, 24\)"),
    "head_dim": (lambda q, k, v: attention(q, k[..., :8], v), ValueError, r"expected \(2, Sk, Hkv, 24\)"),
    "values": (lambda q, k, v: attention(q, k, v[:, :5]), ValueError, "v has shape"),
    "heads": (lambda q, k, v: attention(q[:, :, :3], k, v), ValueError, "3 heads, k and v have 2"),
    "no_heads": (lambda q, k, v: attention(q, k[:, :, :0], v[:, :, :0]), ValueError, "have 0"),
    "scale": (lambda q, k, v: attention(q, k, v, scale=q), TypeError, "scale is Tensor"),
    "lengths_dtype": (lambda q, k, v: attention(q, k, v, kv_lengths=torch.tensor([1, 2])), TypeError, "int32"),
    "lengths_list": (lambda q, k, v: attention(q, k, v, kv_lengths=[1, 2]), TypeError, "kv_lengths is list"),
    "lengths_shape": (lambda q, k, v: attention(q, k, v, kv_lengths=lengths(1)), ValueError, r"expected \(2,\)"),
    "lengths_above": (lambda q, k, v: attention(q, k, v, kv_lengths=lengths(37, 38)), ValueError,
                      r"kv_lengths\[1\] is 38; expected 0 to 37"),
    "lengths_below": (lambda q, k, v: attention(q, k, v, kv_lengths=lengths(-1, 3)), ValueError, r"\[0\] is -1"),
    "packed_shape": (lambda q, k, v: attention_packed(q), ValueError, r"expected \[B,S,3,H,Dh\]"),
    "packed_three": (lambda q, k, v: attention_packed(q[None]), ValueError, r"expected \[B,S,3,H,Dh\]"),
    "bias_shape": (lambda q, k, v: attention(q, k, v, key_bias=torch.zeros(2, 9)), ValueError, r"expected \(2, 37\)"),
    "bias_bool": (lambda q, k, v: attention(q, k, v, key_bias=torch.ones(2, 37).bool()), TypeError, "torch.bool"),
    "device": (lambda q, k, v: attention(q, k.to("meta"), v), ValueError, "cpu and meta"),
    "backend": (lambda q, k, v: attention(q, k, v, backend="gpu"), ValueError, "'gpu' is unknown"),
}


@pytest.mark.parametrize("call, error, message", BAD.values(), ids=BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(*inputs())
    assert str(caught.value).startswith(("attention: ", "attention_packed: "))
