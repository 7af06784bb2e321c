"""What is special to sampler_step: textbook updates, plain arithmetic, any strides, gradients of the coefficients."""
import math
import warnings

import pytest
import torch

from difuse_kernels import dispatch, sampler_step
from difuse_kernels.sampler_step.sampler_step_reference import normals, philox
from difuse_kernels.testing.numerics import backends_here

BACKENDS = backends_here("sampler_step")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def truth(inputs, coefficients):
    """The sum in float64: [I,B,...]."""
    c = coefficients.double().expand(inputs[0].shape[0], -1, -1) if coefficients.dim() == 2 else coefficients.double()
    return torch.einsum("bij,jb...->ib...", c, torch.stack([x.double() for x in inputs]))


@every_backend
def test_ddim_with_guidance_is_the_textbook_update(backend):
    x, out = draw(3, 4, 6, 6), draw(6, 8, 6, 6, seed=1, dtype=torch.bfloat16)
    cond, uncond = out[:3, :4], out[3:, :4]
    alpha, sigma, alpha_s, sigma_s, w = 0.8, 0.6, 0.9, 0.435889894, 4.0
    eps = uncond.double() + w * (cond.double() - uncond.double())
    x0 = (x.double() - sigma * eps) / alpha
    expected = alpha_s * x0 + sigma_s * eps
    on_eps = sigma_s - alpha_s * sigma / alpha
    c = torch.tensor([[alpha_s / alpha, w * on_eps, (1 - w) * on_eps]])
    (result,) = sampler_step((x, cond, uncond), c, backend=backend)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@every_backend
def test_two_outputs_and_their_dtypes(backend):
    x, m, noise = (draw(2, 3, 5, seed=s) for s in range(3))
    c = draw(2, 3, seed=9)
    for dtypes in ((torch.float32, torch.bfloat16), [torch.float16, torch.float32]):
        outputs = sampler_step([x, m, noise], c, out_dtypes=dtypes, backend=backend)
        assert isinstance(outputs, tuple) and [out.dtype for out in outputs] == list(dtypes)
        for out, expected in zip(outputs, truth([x, m, noise], c), strict=True):
            rounding = 2 * torch.finfo(out.dtype).eps
            torch.testing.assert_close(out.double(), expected, rtol=rounding, atol=rounding)
    assert sampler_step([m.half(), x], c[:1, :2], backend=backend)[0].dtype == torch.float16


@every_backend
def test_per_sample_coefficients_are_one_step_per_sample(backend):
    inputs = [draw(4, 3, 700, seed=s) for s in range(3)]
    c = draw(4, 2, 3, seed=5)
    together = sampler_step(inputs, c, backend=backend)
    for b in range(4):
        alone = sampler_step([x[b : b + 1] for x in inputs], c[b], backend=backend)
        for whole, single in zip(together, alone, strict=True):
            assert torch.equal(whole[b : b + 1], single)


@every_backend
@pytest.mark.parametrize("seed", range(40))
def test_any_strides_shapes_and_dtypes(seed, backend):
    """Random shapes and views: permuted, sliced, expanded, of size one; float64 sums are the truth."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    shape = [pick(1, 4) if seed % 2 else pick(1, 40) for _ in range(pick(1, 5) if seed % 2 else 2)]
    inputs = []
    for _ in range(pick(1, 8)):
        order = torch.randperm(len(shape), generator=generator).tolist()
        stored = [shape[axis] + pick(0, 2) for axis in order]
        x = torch.randn(stored, generator=generator).to([torch.float32, torch.bfloat16, torch.float16][pick(0, 2)])
        x = x.permute([order.index(axis) for axis in range(len(shape))])
        for axis, n in enumerate(shape):
            x = x.narrow(axis, x.shape[axis] - n, n)
        inputs.append(x[:1].expand(shape) if pick(0, 3) == 0 else x)
    I = pick(1, 4)  # noqa: E741
    c_shape = (I, len(inputs)) if pick(0, 1) else (shape[0], I, len(inputs))
    c = torch.randn(c_shape, generator=generator)
    kept = [x.clone() for x in inputs]
    outputs = sampler_step(inputs, c, out_dtypes=[torch.float32] * I, backend=backend)
    assert all(torch.equal(x, before) for x, before in zip(inputs, kept, strict=True))
    magnitude = truth([x.abs() for x in inputs], c.abs())
    for out, expected, size in zip(outputs, truth(inputs, c), magnitude, strict=True):
        assert out.is_contiguous() and out.shape == torch.Size(shape)
        assert ((out.double() - expected).abs() <= len(inputs) * 2**-23 * size).all()


@every_backend
@pytest.mark.parametrize("start, strides", [(1, (32, 8, 1)), (0, (33, 8, 1)), (0, (36, 9, 1)), (0, (40, 9, 1))])
def test_rows_of_whole_vectors_that_start_anywhere(start, strides, backend):
    """Sizes that suit 16-byte accesses, addresses that do not."""
    c = draw(2, 1, 2, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        x, y = draw(100, dtype=dtype).as_strided((2, 4, 8), strides, start), draw(2, 4, 8, seed=1, dtype=dtype)
        for coefficients in (c, c[0]):
            (out,) = sampler_step((x, y), coefficients, out_dtypes=(torch.float32,), backend=backend)
            torch.testing.assert_close(out.double(), truth((x, y), coefficients)[0], rtol=1e-5, atol=1e-5)


@every_backend
def test_zero_is_no_switch(backend):
    x = draw(2, 20)
    bad = x.clone()
    bad[0, 3], bad[1, 19] = float("inf"), float("nan")
    (out,) = sampler_step((x, bad), torch.tensor([[1.0, 0.0]]), backend=backend)
    assert out.isnan().nonzero().tolist() == [[0, 3], [1, 19]]
    (out,) = sampler_step((x, bad), torch.tensor([[1.0, 2.0]]), backend=backend)
    assert out[0, 3] == float("inf") and out[1, 19].isnan()


@every_backend
def test_gradients_of_some_inputs_through_some_outputs(backend):
    inputs = [draw(3, 2, 7, seed=s) for s in range(4)]
    c, grad = draw(3, 3, 4, seed=8), draw(3, 2, 7, seed=9)
    inputs[1].requires_grad_()
    inputs[3].requires_grad_()
    outputs = sampler_step(inputs, c, backend=backend)
    outputs[1].backward(grad)  # outputs 0 and 2 get no gradient, inputs 0 and 2 want none
    assert inputs[0].grad is None and inputs[2].grad is None
    for j in (1, 3):
        torch.testing.assert_close(inputs[j].grad, c[:, 1, j].view(3, 1, 1) * grad, rtol=1e-6, atol=0)


def test_gradient_of_the_coefficients_comes_from_the_reference(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    inputs = [draw(3, 5, seed=s) for s in range(2)]
    c, grad = draw(3, 1, 2, seed=3).requires_grad_(), draw(3, 5, seed=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (out,) = sampler_step(inputs, c)
        sampler_step(inputs, c)
    (found,) = torch.autograd.grad(out, c, grad)
    torch.testing.assert_close(found[:, 0], torch.stack([(grad * x).sum(1) for x in inputs], 1))
    if "cpu" in BACKENDS:
        assert [str(w.message) for w in caught] == [
            "difuse: sampler_step runs on 'reference', not on 'cpu': the coefficients need a gradient; .detach() them "
            "unless it is wanted"]
        with pytest.raises(RuntimeError, match="coefficients need a gradient"):
            sampler_step(inputs, c, backend="cpu")
        with torch.no_grad():
            sampler_step(inputs, c, backend="cpu")


def test_float64_is_summed_in_float64():
    x = draw(2, 9).double()
    (out,) = sampler_step((x, draw(2, 9, seed=1)), torch.tensor([[1.0, 2.0**-30]]), backend="reference")
    assert out.dtype == torch.float64 and (out != x).all()
    if "cpu" in BACKENDS:
        with pytest.raises(RuntimeError, match="input 0 has dtype torch.float64"):
            sampler_step((x,), torch.ones(1, 1), backend="cpu")


@every_backend
def test_many_dimensions(backend):
    inputs = [draw(2, 1, 3, 1, 2, 1, 1, 2, seed=s).transpose(2, 4) for s in range(2)]
    c = draw(2, 1, 2, seed=7)
    (out,) = sampler_step(inputs, c, backend=backend)
    torch.testing.assert_close(out.double(), truth(inputs, c)[0])
    if backend == "cpu":
        with pytest.raises(RuntimeError, match="more than 8 dimensions"):
            sampler_step([x.unsqueeze(0) for x in inputs], torch.ones(1, 2), backend=backend)


def seeds(*pairs):
    return torch.tensor(pairs, dtype=torch.int64)


def noise_of(backend, shape, noise, dtype=torch.float32):
    """The noise alone."""
    c = torch.tensor([[0.0, 1.0]])
    return sampler_step([torch.zeros(shape)], c, noise=noise, out_dtypes=[dtype], backend=backend)[0]


@pytest.mark.parametrize("counter, key, words", [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
])
def test_philox_gives_the_published_words(counter, key, words):
    """Random123's kat_vectors for philox4x32-10."""
    def read(text):
        return [torch.tensor([int(word, 16)]) for word in text.split()]

    assert [int(word) for word in philox(read(counter), read(key))] == [int(word, 16) for word in words.split()]


def by_hand(seed, step, at):
    """One normal value, from the definition, in float64."""
    counter = [at // 4 & 0xFFFFFFFF, at // 4 >> 32, step & 0xFFFFFFFF, step >> 32 & 0xFFFFFFFF]
    words = philox([torch.tensor([word]) for word in counter],
                   [torch.tensor([seed & 0xFFFFFFFF]), torch.tensor([seed >> 32 & 0xFFFFFFFF])])
    r = [float(word.float()) * 2.0**-32 for word in words]
    u, v = r[at % 4 // 2 * 2] + 2.0**-33, r[at % 4 // 2 * 2 + 1]
    return math.sqrt(-2 * math.log(u)) * (math.sin, math.cos)[at % 2 == 0](2 * math.pi * v)


@every_backend
def test_noise_is_what_the_definition_says(backend):
    pairs = [[0, 0], [2**63 - 1, 2**40 + 5], [-1, -1]]
    z = noise_of(backend, (3, 2, 5, 31), seeds(*pairs)).flatten(1).double()
    expected = torch.tensor([[by_hand(*pair, at) for at in range(310)] for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=1e-6)


@every_backend
def test_noise_depends_on_seed_step_and_place_alone(backend):
    noise = seeds([1, 0], [2, 0], [1, 1], [1, 0])
    z = noise_of(backend, (4, 3, 104), noise)  # whole groups, and whole vectors; below, neither
    assert torch.equal(z[0], z[3]) and not any(torch.equal(z[0], other) for other in (z[1], z[2]))
    for b in range(4):  # batch mates, shape, strides and how much follows do not matter
        assert torch.equal(noise_of(backend, (1, 24, 13), noise[b : b + 1]).flatten(), z[b].flatten())
        assert torch.equal(noise_of(backend, (1, 37), noise[b : b + 1]).flatten(), z[b].flatten()[:37])
    x = torch.zeros(3, 4, 104).transpose(0, 1)
    assert torch.equal(sampler_step([x], torch.tensor([[1.0, 1.0]]), noise=noise, backend=backend)[0], z)


@every_backend
def test_noise_updated_in_place_is_the_next_steps(backend):
    noise, c = seeds([5, 0], [6, 0]), torch.tensor([[1.0, 0.5]])
    x = draw(2, 3, 9)
    first = sampler_step([x], c, noise=noise, backend=backend)[0]
    noise[:, 1] += 1
    second = sampler_step([x], c, noise=noise, backend=backend)[0]
    assert not torch.equal(first, second)
    assert torch.equal(second, sampler_step([x], c, noise=seeds([5, 1], [6, 1]), backend=backend)[0])


@every_backend
def test_noise_is_a_constant_to_autograd(backend):
    x = draw(3, 2, 7).requires_grad_()
    c, grad = draw(3, 2, 2, seed=1), draw(3, 2, 7, seed=2)
    out = sampler_step([x], c, noise=seeds([1, 2], [3, 4], [5, 6]), backend=backend)
    torch.autograd.backward(out, (grad, grad))
    torch.testing.assert_close(x.grad, (c[:, 0, 0] + c[:, 1, 0]).view(3, 1, 1) * grad, rtol=1e-6, atol=1e-6)


def test_noise_is_standard_normal_and_its_streams_independent():
    """Each statistic within 5 standard deviations of its expectation over n values."""
    n = 1 << 18
    noise = seeds([0, 0], [1, 0], [0, 1], [2**32, 0], [0, 2**32], [123456789, 42])
    z = normals(noise, torch.Size((6, n)), torch.float32).double()
    within = 5 / n**0.5
    assert z.mean(1).abs().max() < within
    assert (z.square().mean(1) - 1).abs().max() < within * 2**0.5
    assert z.pow(3).mean(1).abs().max() < within * 15**0.5
    assert (z.pow(4).mean(1) - 3).abs().max() < within * 96**0.5
    for lag in (1, 2, 3, 4, 5, 64, 4096):
        assert (z[:, lag:] * z[:, :-lag]).mean(1).abs().max() < within * 1.01
        squares = z.square() - 1  # cos and sin share a radius and a turn: dependence would show here
        assert (squares[:, lag:] * squares[:, :-lag]).mean(1).abs().max() < within * 2 * 1.01
    between = z @ z.T / n - torch.eye(6, dtype=torch.float64)
    assert between.abs().max() < within * 2**0.5
    bins = torch.histc(torch.special.ndtr(z), 64, 0, 1)  # chi-square over 63 degrees of freedom: 63 +- 11.2
    assert 63 - 56 < ((bins - 6 * n / 64) ** 2 / (6 * n / 64)).sum() < 63 + 56
    assert z.abs().max() > 4.5 and torch.isfinite(z).all()


X, ONE = torch.zeros(2, 3, 4), torch.ones(1, 1)


@pytest.mark.parametrize("call, error, message", [
    (lambda: sampler_step(X, ONE), ValueError, "inputs is Tensor; expected a tuple or list of 1 to 8 tensors"),
    (lambda: sampler_step([], ONE), ValueError, "inputs is 0; expected"),
    (lambda: sampler_step([X] * 9, torch.ones(1, 9)), ValueError, "inputs is 9; expected"),
    (lambda: sampler_step([X, 1.0], torch.ones(1, 2)), TypeError, "an input is float; expected floating tensors"),
    (lambda: sampler_step([X, X.int()], torch.ones(1, 2)), TypeError, "an input is torch.int32"),
    (lambda: sampler_step([X, X[:1]], torch.ones(1, 2)), ValueError, r"shapes \(2, 3, 4\) and \(1, 3, 4\)"),
    (lambda: sampler_step([X[0, 0, 0]], ONE), ValueError, r"expected one shape \[B,...\]"),
    (lambda: sampler_step([X], 1.0), TypeError, "coefficients is float; expected a tensor"),
    (lambda: sampler_step([X], ONE.double()), TypeError, r"torch.float64; expected torch.float32.*\.float\(\)"),
    (lambda: sampler_step([X], ONE[0]), ValueError, r"coefficients has shape \(1,\)"),
    (lambda: sampler_step([X], torch.ones(1, 2)), ValueError, r"shape \(1, 2\); expected \[I,1\] or \[B,I,1\]"),
    (lambda: sampler_step([X], torch.ones(5, 1)), ValueError, "with I from 1 to 4"),
    (lambda: sampler_step([X], torch.ones(3, 1, 1)), ValueError, r"\(3, 1, 1\).*for 1 inputs of shape \(2, 3, 4\)"),
    (lambda: sampler_step([X], ONE, out_dtypes=(torch.int8,)), ValueError, "expected 1 floating dtypes"),
    (lambda: sampler_step([X], ONE, out_dtypes=(X.dtype,) * 2), ValueError, "expected 1 floating dtypes"),
    (lambda: sampler_step([X], ONE, out_dtypes=X.dtype), ValueError, "out_dtypes is torch.float32; expected 1"),
    (lambda: sampler_step([X.double()], ONE, backend="cpu"), RuntimeError, "backend 'cpu' cannot run"),
    (lambda: sampler_step([X], ONE, noise=torch.ones(2, 2)), ValueError, r"noise is torch.float32 \(2, 2\); expected "
                                                                         r"torch.int64 \(2, 2\)"),
    (lambda: sampler_step([X], ONE, noise=torch.ones(1, 2).long()), ValueError, r"\(1, 2\); expected torch.int64"),
    (lambda: sampler_step([X], ONE, noise=7), ValueError, "noise is int"),
    (lambda: sampler_step([X], ONE, noise=torch.ones(2, 2).long()), ValueError, r"expected \[I,2\].*and the noise"),
    (lambda: sampler_step([X], ONE, noise=torch.ones(2, 2).long().to("meta")), ValueError, "on cpu and meta"),
])
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
