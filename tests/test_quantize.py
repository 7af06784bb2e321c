"""8-bit codes of rows: round trip, the integer product between, special values, refusals; kernel against reference."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import dequantize, native, quantize, requantize, use_backend
from difuse_kernels.quantize.quantize import ACTIVATIONS, ZERO

ACT = {"none": lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
BACKENDS = ["reference", "cpu"] if native.ext is not None else ["reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 40), (7, 37), (1, 1), (19,), (0, 8), (2, 1030)], ids=str)
def test_codes_hold_the_nearest_of_255_values_a_row(shape, dtype, backend):
    x = draw(*shape, scale=3.0).to(dtype)
    with use_backend(backend):
        codes, scale = quantize(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and scale.shape == x.shape[:-1]
    assert scale.dtype == torch.float32
    if not x.numel():
        return
    torch.testing.assert_close(scale, x.float().abs().amax(-1) / 127)
    found = (codes.float() - ZERO) * scale[..., None]
    assert ((found - x.float()).abs() <= scale[..., None] * (0.5 + 1e-4)).all()
    assert (codes.int() - ZERO).abs().amax(-1).eq(127).all()


@each_backend
def test_rows_of_different_size_have_scales_of_their_own(backend):
    x = draw(6, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 1e20])[:, None]
    with use_backend(backend):
        codes, scale = quantize(x)
    assert (((codes.float() - ZERO) * scale[:, None] - x).norm(dim=1) / x.norm(dim=1) < 0.02).all()


@each_backend
def test_smoothing_scales_the_columns(backend):
    x, smooth = draw(4, 33), draw(33, seed=1).exp()
    with use_backend(backend):
        codes, scale = quantize(x, smooth)
        expected = quantize(x * smooth)
    assert torch.equal(scale, expected[1]) and (codes.int() - expected[0].int()).abs().max() <= 1


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_sums_become_floats_where_they_lie(activation, bias, backend):
    sums, scale, bias = draw(2, 5, 41, scale=300.0), draw(2, 5, seed=1).exp() / 100, draw(41, seed=2) if bias else None
    expected = ACT[activation]((sums * scale[..., None] + (0 if bias is None else bias)).double())
    place = sums.data_ptr()
    with use_backend(backend):
        found = dequantize(sums, scale, bias, activation=activation)
    assert found is sums and found.data_ptr() == place
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias, smooth", list(itertools.product([True, False], repeat=2)))
def test_requantize_is_both_in_one_pass(activation, bias, smooth, backend):
    sums, scale = draw(3, 4, 50, scale=300.0), draw(3, 4, seed=1).exp() / 100
    bias, smooth = draw(50, seed=2) if bias else None, draw(50, seed=3).exp() if smooth else None
    before = sums.clone()
    with use_backend(backend):
        codes, found = requantize(sums, scale, bias, activation=activation, smooth=smooth)
        assert torch.equal(sums, before)
        expected, expected_scale = quantize(dequantize(sums, scale, bias, activation=activation), smooth)
    torch.testing.assert_close(found, expected_scale)
    off = (codes.int() - expected.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01


@pytest.mark.skipif(native.ext is None, reason="the native module is not built")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_kernel_writes_the_references_codes(threads):
    x, before = draw(67, 130, scale=5.0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        codes, scale = quantize(x)
    finally:
        torch.set_num_threads(before)
    with use_backend("reference"):
        expected, expected_scale = quantize(x)
    assert torch.equal(scale, expected_scale)
    off = (codes.int() - expected.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 0.01  # x / scale may round across a half


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 8, 36])
def test_a_row_with_something_not_finite_is_nan_and_no_other_row_is(bad, where, backend):
    x = draw(5, 37)
    x[2, where] = bad
    with use_backend(backend):
        codes, scale = quantize(x)
    assert scale.isnan().tolist() == [False, False, True, False, False]
    with use_backend(backend):
        y = dequantize((codes.float() - ZERO), scale)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all()


@each_backend
def test_rows_of_zeros_and_of_next_to_nothing(backend):
    x = torch.stack([torch.zeros(19), torch.full((19,), -0.0), torch.full((19,), 1e-42), torch.full((19,), 3e38)])
    with use_backend(backend):
        codes, scale = quantize(x)
    assert (codes[:3] == ZERO).all() and (scale[:3] == 0).all()
    assert (codes[3] == ZERO + 127).all() and scale[3].isfinite()


@each_backend
def test_zero_rows_go_all_the_way(backend):
    with use_backend(backend):
        codes, scale = quantize(torch.zeros(2, 0, 8))
        assert codes.shape == (2, 0, 8) and dequantize(torch.zeros(2, 0, 5), scale).shape == (2, 0, 5)
        assert requantize(torch.zeros(2, 0, 5), scale)[0].shape == (2, 0, 5)


BAD = [
    (lambda x: quantize([1.0]), TypeError, "quantize: got list; expected a tensor"),
    (lambda x: quantize(x.sum()), ValueError, r"quantize: got \(\)"),
    (lambda x: quantize(x.double()), ValueError, r"quantize: got \(4, 6\) torch.float64 on cpu"),
    (lambda x: quantize(x.t()), ValueError, "not contiguous; expected a contiguous tensor"),
    (lambda x: quantize(x[:, :0].contiguous()), ValueError, r"quantize: got \(4, 0\)"),
    (lambda x: quantize(x.to("meta")), ValueError, "on meta"),
    (lambda x: quantize(x, torch.ones(5)), ValueError, r"smooth has shape \(5,\); expected \(6,\)"),
    (lambda x: quantize(x, torch.ones(6).bfloat16()), ValueError, "smooth is torch.bfloat16"),
    (lambda x: quantize(x.requires_grad_()), ValueError, "codes have no gradient"),
    (lambda x: dequantize(x, torch.ones(3)), ValueError, r"scale has shape \(3,\); expected \(4,\)"),
    (lambda x: dequantize(x, torch.ones(4), activation="relu"), ValueError, "activation is 'relu'; expected one of"),
    (lambda x: requantize(x.bfloat16(), torch.ones(4)), ValueError, "requantize: got .* torch.bfloat16"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call(draw(4, 6))
