"""What is special to qk_norm_rope: the formulas told in other ways, joint buffers, absent keys, errors that help."""
import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import Stream, native, qk_norm_rope, qk_norm_rope_joint
from difuse_kernels.testing.numerics import backends_here, device_of
from difuse_kernels.triton_launch import INTERPRETED

each_backend = pytest.mark.parametrize("backend", backends_here("qk_norm_rope"))


def draw(*shape, seed=0, on="reference"):
    """Random normal, on the device where the backend `on` is tested."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device_of(on))


def tables(*shape, seed=9, on="reference"):
    angles = 3 * draw(*shape, seed=seed, on=on)
    return angles.cos(), angles.sin()


def packed(B, S, H, D, seed=0, on="reference"):
    return draw(B, S, 3, H, D, seed=seed, on=on).unbind(2)


def close(ours, expected):
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=2e-6)


@each_backend
def test_interleaved_is_multiplication_by_complex_numbers(backend):
    q, k, _ = packed(2, 5, 3, 16, on=backend)
    weight = draw(16, seed=3, on=backend)
    cos, sin = tables(5, 8, on=backend)
    turn = torch.complex(cos, sin)[None, :, None]

    def expected(x):
        x = F.rms_norm(x, (16,), weight, 1e-6)
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2))) * turn).flatten(-2)

    ours = qk_norm_rope(q, k, q_weight=weight, k_weight=weight, cos=cos, sin=sin, backend=backend)
    close(ours, (expected(q), expected(k)))


@each_backend
@pytest.mark.parametrize("rope", ["interleaved", "half"])
def test_tables_that_hold_every_angle_twice(rope, backend):
    """apply_rotary_emb as diffusers and transformers write it, over tables of the whole head's width."""
    q, k, _ = packed(2, 5, 3, 16, on=backend)
    angles = 3 * draw(5, 8, seed=4, on=backend)
    wide = angles.repeat_interleave(2, 1) if rope == "interleaved" else torch.cat([angles, angles], 1)
    cos, sin = wide.cos(), wide.sin()

    def expected(x):
        if rope == "interleaved":
            real, imaginary = x.reshape(2, 5, 3, 8, 2).unbind(-1)
            rotated = torch.stack([-imaginary, real], -1).flatten(3)
        else:
            rotated = torch.cat([-x[..., 8:], x[..., :8]], -1)
        return x * cos[:, None] + rotated * sin[:, None]

    columns = slice(None, None, 2) if rope == "interleaved" else slice(8)
    ours = qk_norm_rope(q, k, cos=cos[:, columns], sin=sin[:, columns], norm=None, rope=rope, backend=backend)
    close(ours, (expected(q), expected(k)))


@each_backend
def test_full_scope_and_layer_norm_by_torch(backend):
    q, k = draw(2, 5, 3, 16, on=backend), draw(2, 5, 2, 16, seed=1, on=backend)
    weights = dict(q_weight=draw(48, seed=2, on=backend), q_bias=draw(48, seed=3, on=backend),
                   k_weight=draw(32, seed=4, on=backend))
    ours = qk_norm_rope(q, k, norm="layer", norm_scope="full", eps=1e-5, **weights, backend=backend)
    close(ours, (F.layer_norm(q.flatten(2), (48,), weights["q_weight"], weights["q_bias"], 1e-5).view_as(q),
                 F.layer_norm(k.flatten(2), (32,), weights["k_weight"], None, 1e-5).view_as(k)))


@each_backend
@pytest.mark.parametrize("rope", ["interleaved", "half"])
@pytest.mark.parametrize("P", [8, 5])
def test_turning_back(rope, P, backend):
    q, k, _ = packed(2, 9, 3, 16, on=backend)
    cos, sin = tables(2, 9, 3, P, on=backend)
    there = qk_norm_rope(q, k, cos=cos, sin=sin, norm=None, rope=rope, backend=backend)
    close(qk_norm_rope(*there, cos=cos, sin=-sin, norm=None, rope=rope, backend=backend), (q, k))
    assert torch.equal(there[0][..., 2 * P :], q[..., 2 * P :])  # what does not turn is not touched


@each_backend
def test_identity_rows_leave_the_norm_alone(backend):
    q, k, _ = packed(2, 9, 3, 16, on=backend)
    cos, sin = tables(9, 8, on=backend)
    cos[:4], sin[:4] = 1, 0
    turned, plain = (qk_norm_rope(q, k, **angles, backend=backend) for angles in (dict(cos=cos, sin=sin), {}))
    assert all(torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a, b) for a, b in zip(turned, plain, strict=True))


@each_backend
def test_without_keys(backend):
    """q' and its gradients have the same bits with k and without."""
    found = []
    for with_key in (True, False):
        q, weight = draw(2, 9, 3, 16, on=backend).requires_grad_(), draw(48, seed=2, on=backend).requires_grad_()
        k = draw(2, 9, 3, 16, seed=1, on=backend).requires_grad_() if with_key else None
        cos, sin = tables(9, 8, on=backend)
        out, k_out = qk_norm_rope(q, k, q_weight=weight, cos=cos, sin=sin, norm_scope="full", backend=backend)
        assert (k_out is None) == (k is None)
        grad = draw(2, 9, 3, 16, seed=5, on=backend)
        results, grads = ((out, k_out), (grad, grad)) if with_key else ((out,), (grad,))
        found.append([out.detach(), *torch.autograd.grad(results, (q, weight), grads)])
    assert all(map(torch.equal, *found))


@each_backend
@pytest.mark.parametrize("norm", ["rms", None])
def test_loss_through_one_output_only(norm, backend):
    q, k = draw(2, 5, 3, 8, on=backend).requires_grad_(), draw(2, 7, 1, 8, seed=1, on=backend).requires_grad_()
    q_out, k_out = qk_norm_rope(q, k, norm=norm, backend=backend)
    unused, used = torch.autograd.grad(k_out.square().sum(), (q, k), retain_graph=True, allow_unused=True)
    assert unused is None and used.any()
    unused, used = torch.autograd.grad(q_out.square().sum(), (k, q), allow_unused=True)
    assert unused is None and used.any()


def streams(text_first=True, on="reference"):
    q, k, v = packed(2, 4, 3, 16, on=on)
    text = Stream(q, k, v, draw(16, seed=5, on=on), draw(16, seed=6, on=on))
    q, k, v = packed(2, 9, 3, 16, seed=1, on=on)
    image = Stream(q, k, v, draw(16, seed=7, on=on), None, cos=tables(9, 8, on=on)[0], sin=tables(9, 8, on=on)[1])
    return [text, image] if text_first else [image, text]


@each_backend
@pytest.mark.parametrize("text_first", [True, False])
def test_joint_is_the_concatenation(text_first, backend):
    parts = streams(text_first, on=backend)
    ours = qk_norm_rope_joint(parts, backend=backend)
    apart = [(*qk_norm_rope(*s[:2], **dict(zip(Stream._fields[3:], s[3:], strict=True)), backend=backend), s.v)
             for s in parts]
    for joined, pieces in zip(ours, zip(*apart, strict=True), strict=True):
        assert joined.is_contiguous() and torch.equal(joined, torch.cat(pieces, 1))


@each_backend
def test_joint_gradients_are_those_of_the_concatenation(backend):
    found = []
    for joint in (True, False):
        parts = [Stream(*(t.clone().requires_grad_() if t is not None and i < 7 else t for i, t in enumerate(s)))
                 for s in streams(on=backend)]
        if joint:
            outputs = qk_norm_rope_joint(parts, backend=backend)
        else:
            apart = [(*qk_norm_rope(*s[:2], **dict(zip(Stream._fields[3:], s[3:], strict=True)), backend=backend), s.v)
                     for s in parts]
            outputs = [torch.cat(pieces, 1) for pieces in zip(*apart, strict=True)]
        leaves = [t for s in parts for t in s[:7] if t is not None]
        incoming = [draw(2, 13, 3, 16, seed=20 + i, on=backend) for i in range(3)]
        found.append(torch.autograd.grad(outputs, leaves, incoming))
    assert all(map(torch.equal, *found))


@each_backend
def test_one_stream_and_the_inputs_are_left_alone(backend):
    parts = streams(on=backend)[1:]
    before = [t.clone() for t in parts[0] if t is not None]
    q, k, v = qk_norm_rope_joint(parts, backend=backend)
    assert torch.equal(v, parts[0].v) and v.data_ptr() != parts[0].v.data_ptr()
    q.add_(1)
    assert all(map(torch.equal, before, (t for t in parts[0] if t is not None)))


def test_rotation_alone_keeps_no_activation():
    q, k = draw(2, 5, 3, 8).requires_grad_(), draw(2, 5, 3, 8, seed=1).requires_grad_()
    cos, sin = tables(5, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        qk_norm_rope(q, k, cos=cos, sin=sin, norm=None)
    if native.missing() is None:
        assert kept == [cos.shape, sin.shape]


C, S = tables(5, 4)
TWO = (draw(2, 5, 3, 8), draw(2, 5, 3, 8, seed=1))
W, W_FULL = draw(8), draw(24)
BAD = [
    (lambda q, k: qk_norm_rope(q[0], k), ValueError, r"q has shape \(5, 3, 8\); expected \[B,S,H,Dh\]"),
    (lambda q, k: qk_norm_rope(q, k[:1]), ValueError, r"k has shape \(1, 5, 3, 8\); expected \(2, 5, 3, 8\)"),
    (lambda q, k: qk_norm_rope(q, k.half()), TypeError, "k has dtype torch.float16, q torch.float32"),
    (lambda q, k: qk_norm_rope(q, k, norm="batch"), ValueError, "norm is 'batch'"),
    (lambda q, k: qk_norm_rope(q, k, norm_scope="token"), ValueError, "norm_scope is 'token'"),
    (lambda q, k: qk_norm_rope(q, k, rope="neox"), ValueError, "rope is 'neox'"),
    (lambda q, k: qk_norm_rope(q, k, q_bias=W), ValueError, "q_bias is given, .* bias with norm='layer'"),
    (lambda q, k: qk_norm_rope(q, k, k_weight=W, norm=None), ValueError, "k_weight or k_bias is given, .* norm None"),
    (lambda q, k: qk_norm_rope(q, None, k_weight=W), ValueError, "k_weight or k_bias is given, k is None"),
    (lambda q, k: qk_norm_rope(q, k, q_weight=W_FULL), ValueError, r"q_weight has shape \(24,\); expected \(8,\)"),
    (lambda q, k: qk_norm_rope(q, k, k_weight=W, norm_scope="full"), ValueError, r"k_weight has .* expected \(24,\)"),
    (lambda q, k: qk_norm_rope(q, k, cos=C), ValueError, "cos is given alone"),
    (lambda q, k: qk_norm_rope(q, k, sin=C), ValueError, "sin is given alone"),
    (lambda q, k: qk_norm_rope(q, k, cos=1.0, sin=S), TypeError, "cos is float"),
    (lambda q, k: qk_norm_rope(q, k, cos=C[:4], sin=S[:4]), ValueError, r"cos has shape \(4, 4\); expected \(5, 4\)"),
    (lambda q, k: qk_norm_rope(q, k, cos=C, sin=S[:, :2]), ValueError, r"sin has shape \(5, 2\); expected \(5, 4\)"),
    (lambda q, k: qk_norm_rope(q, k, cos=C.repeat(1, 2), sin=S.repeat(1, 2)), ValueError, "8 pairs for heads of 8"),
    (lambda q, k: qk_norm_rope(q[..., :7], k[..., :7], cos=C[:, :2], sin=S[:, :2]), ValueError, "Dh even"),
    (lambda q, k: qk_norm_rope(q, k[:, :4], cos=C, sin=S), ValueError, "as many tokens"),
    (lambda q, k: qk_norm_rope(q, k[:, :, :1], cos=q[..., :4], sin=q[..., 4:]), ValueError, "as many heads"),
    (lambda q, k: qk_norm_rope(q, k, cos=C.clone().requires_grad_(), sin=S), ValueError, "cos and sin get no gradient"),
    (lambda q, k: qk_norm_rope_joint([]), ValueError, "got 0 streams; expected 1 to 4"),
    (lambda q, k: qk_norm_rope_joint([Stream(q, k, k)] * 5), ValueError, "got 5 streams"),
    (lambda q, k: qk_norm_rope_joint([Stream(q, k, None)]), TypeError, "stream 0: v is NoneType"),
    (lambda q, k: qk_norm_rope_joint([Stream(q, k, k), Stream(q, k, k[:, :3])]), ValueError, "stream 1: v has"),
    (lambda q, k: qk_norm_rope_joint([Stream(q, k, k), Stream(q[:, :, :2], k, k)]), ValueError, "stream 1: q has"),
    (lambda q, k: qk_norm_rope_joint([Stream(q, k, k.half())]), TypeError, "stream 0: v has dtype torch.float16"),
    (lambda q, k: qk_norm_rope_joint([Stream(q, k, k, q_bias=W)]), ValueError, "stream 0: q_weight or q_bias is given"),
    (lambda q, k: qk_norm_rope(q, k, q_weight=W.to("meta")), ValueError, "inputs are on cpu and meta; move them"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(*TWO)


@pytest.mark.skipif(native.missing() is not None, reason="the native module is not built")
def test_a_strided_last_dimension_is_refused_but_not_of_the_tables():
    q, k = TWO
    with pytest.raises(RuntimeError, match="the last dimension of input 1 is strided"):
        qk_norm_rope(q, k.transpose(2, 3).contiguous().transpose(2, 3), backend="cpu")
    twice = (C.repeat_interleave(2, 1)[:, ::2], S.t().contiguous().t())
    ours = qk_norm_rope(q, k, cos=twice[0], sin=twice[1], backend="cpu")
    assert all(map(torch.equal, ours, qk_norm_rope(q, k, cos=C, sin=S, backend="cpu")))


def test_torch_func_transforms_run_on_the_reference():
    q, k = draw(3, 2, 5, 3, 8), draw(3, 2, 5, 3, 8, seed=1)

    def loss(q, k):
        return sum(out.square().sum() for out in qk_norm_rope(q, k, q_weight=W, cos=C, sin=S))

    mapped = torch.func.vmap(torch.func.grad(loss))(q, k)
    for one, other, gradient in zip(q, k, mapped, strict=True):
        leaf = one.clone().requires_grad_()
        torch.testing.assert_close(gradient, torch.autograd.grad(loss(leaf, other), leaf)[0])


@pytest.mark.parametrize("backend", [b for b in backends_here("qk_norm_rope") if b != "triton" or not INTERPRETED])
@pytest.mark.parametrize("shape, scope", [((1, 171, 13, 256), "head"), ((1, 150, 2, 16), "full")])
def test_many_tokens(shape, scope, backend):
    """Many blocks of GPU kernels, which begin amid the heads of a token, and take several steps through a chunk."""
    row = shape[3] if scope == "head" else shape[2] * shape[3]
    found = []
    for dtype, chosen in ((torch.float32, backend), (torch.float64, "reference")):
        q, weight, bias, grad = (draw(*sizes, seed=seed, on=backend).to(dtype).requires_grad_()
                                 for seed, sizes in enumerate((shape, (row,), (row,), shape)))
        out, _ = qk_norm_rope(q, None, q_weight=weight, q_bias=bias, norm="layer", norm_scope=scope, backend=chosen)
        found.append((out, *torch.autograd.grad(out, (q, weight, bias), grad.detach())))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@each_backend
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("scope", ["head", "full"])
def test_without_eps_padding_stays_out_of_the_weights(norm, scope, backend):
    """Three tokens fill no block: the rows beyond have a variance of 0."""
    grads = []
    for chosen in (backend, "reference"):
        q = draw(1, 3, 3, 8, on=backend).requires_grad_()
        weight = draw(8 if scope == "head" else 24, seed=2, on=backend).requires_grad_()
        out, _ = qk_norm_rope(q, None, q_weight=weight, norm=norm, norm_scope=scope, eps=0.0, backend=chosen)
        grads.append(torch.autograd.grad(out, (q, weight), draw(1, 3, 3, 8, seed=5, on=backend)))
    for ours, expected in zip(*grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
