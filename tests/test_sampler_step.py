"""What is special to sampler_step: textbook updates, plain arithmetic, any strides, gradients of the coefficients."""
import warnings

import pytest
import torch

from difuse_kernels import dispatch, sampler_step
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
        with pytest.raises(RuntimeError, match="an input has dtype torch.float64"):
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
    (lambda: sampler_step([X], ONE, backend="triton"), RuntimeError, "backend 'triton' cannot run"),
])
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
