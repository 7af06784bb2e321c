"""Products of packed weights: errors, bits, fences, codes from one product to the next, refusals; kernel, reference."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import Codes, native, pack_linear, packed_linear, use_backend
from difuse_kernels.linear.linear import ACTIVATIONS, PRECISIONS, ZERO, layout
from difuse_kernels.linear.linear_reference import quantize
from difuse_kernels.testing.numerics import compare

ACT = {"none": lambda y: y, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = ["reference", "auto"] if native.ext is not None else ["reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
needs_native = pytest.mark.skipif(native.ext is None, reason="the native module is not built")
SHAPES = {  # x and N -> the code path
    "whole tiles": ((2, 24, 96), 192), "odd": ((3, 7, 37), 41), "one row": ((1, 19), 5), "one number": ((1, 1), 1),
    "a vector": ((40,), 24), "chains": ((9, 1030), 50), "blocks of rows": ((2, 301, 24), 40),
    "ranges of panels": ((5, 64), 700), "no rows": ((2, 0, 16), 8), "wide rows": ((3, 2, 4608), 70),
}
each_shape = pytest.mark.parametrize("shape, N", SHAPES.values(), ids=SHAPES)


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * scale


def operands(shape, N):
    """x, weight, bias: rows of different size, outputs of different size."""
    x = draw(*shape) * draw(*shape[:-1], 1, seed=1).exp()
    return x, draw(N, shape[-1], seed=2) * draw(N, 1, seed=3).exp(), draw(N, seed=4)


def same_bits(a, b):
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


# packing

@each_precision
@pytest.mark.parametrize("N, K", [(1, 1), (41, 37), (192, 96), (50, 1030), (7, 3)])
def test_a_packed_weight_holds_the_weight(N, K, precision):
    weight = operands((1, K), N)[1]
    packed = pack_linear(weight, precision)
    if precision == "fp32":
        assert torch.equal(packed.dense(), weight)
    elif precision == "bf16":
        assert torch.equal(packed.dense(), weight.bfloat16().float())
    else:
        assert ((packed.dense() - weight).abs() <= packed.scale[:, None] * (0.5 + 1e-4)).all()
        assert (packed.numbers().int().abs().amax(1) == layout()[2]).all()
        assert torch.equal(packed.sums, packed.numbers().int().sum(1) * ZERO)
    dtype, per = PRECISIONS[precision]
    _, vector, _ = layout()
    units = -(-N // vector) * vector * -(-K // per)
    assert packed.data.nbytes == 4 * units  # whole vectors of 32 bits, no more


def test_smoothing_scales_what_is_packed_back():
    weight, smooth = draw(24, 33), draw(33, seed=1).exp()
    packed = pack_linear(weight, "int8", smooth)
    torch.testing.assert_close(packed.dense(), weight, rtol=0, atol=float((smooth * packed.scale.max()).max()))
    assert sum(t.numel() for t in packed.tensors()) == packed.data.numel() + 24 + 24 + 33


# results

@each_backend
@each_shape
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_float32_products_within_the_error_budget(shape, N, activation, dtype, backend):
    """At most 1.5 times the error of F.linear and F.gelu in the dtype of x, and one rounding."""
    x, weight, bias = operands(shape, N)
    x = x.to(dtype)
    with use_backend(backend):
        found = packed_linear(x, pack_linear(weight), bias, activation=activation, out_dtype=dtype)
    eager = ACT[activation](F.linear(x, weight.to(dtype), bias.to(dtype)))
    truth = ACT[activation](F.linear(x.double(), weight.double(), bias.double()))
    line = compare("out", found, eager, truth)
    assert found.dtype == dtype and line.ok, line
    assert line.largest > 0 or not found.numel()


@each_backend
@each_shape
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bfloat16_products_within_the_error_budget(shape, N, dtype, backend):
    """1.5 times that of eager's bfloat16 product; and of the same rounded numbers nothing but float32 sums."""
    x, weight, bias = operands(shape, N)
    with use_backend(backend):
        found = packed_linear(x.to(dtype), pack_linear(weight, "bf16"), bias)
    numbers, rounded = x.to(dtype).bfloat16(), weight.bfloat16()
    line = compare("out", found, F.linear(numbers, rounded, bias.bfloat16()).float(),
                   F.linear(x.to(dtype).double(), weight.double(), bias.double()))
    assert line.ok or found.numel() == 1, line  # eager's one number may be right by luck
    truth = F.linear(numbers.double(), rounded.double(), bias.double())
    assert (found - truth).norm() <= 3e-6 * truth.norm()


@each_backend
@each_shape
@pytest.mark.parametrize("smoothed", [True, False])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_integer_products_are_what_the_contract_says(shape, N, dtype, smoothed, backend):
    x, weight, bias = operands(shape, N)
    x, smooth = x.to(dtype), draw(shape[-1], seed=5).exp() if smoothed else None
    packed = pack_linear(weight, "int8", smooth)
    with use_backend(backend):
        found = packed_linear(x, packed, bias)
    if not x.numel():
        assert found.shape == (*shape[:-1], N)
        return
    v = x.float() if smooth is None else x.float() * smooth
    most = v.abs().amax(-1, keepdim=True)
    codes = (v.double() * torch.full_like(most, 127).div(most).double()).round()
    sums = F.linear(codes, packed.numbers().double())  # exact
    expected = sums * packed.scale.double() * (most / 127).double() + bias.double()
    fused = native.ext is None or native.ext.isa() != "v2"  # else a code may round to the other side of a half
    step = (most / 127).double() * packed.numbers().double().abs().amax(1) * packed.scale.double()
    off, rounding = (found.double() - expected).abs(), 1e-6 * (expected.abs() + bias.abs() + step)
    assert (off <= rounding).all() if fused else (off <= 4 * step + rounding).all()
    if not smoothed and x.numel() > 1000:
        exact = F.linear(x.double(), weight.double(), bias.double())
        assert 1e-3 < ((found - exact).norm() / exact.norm()) < 0.03


@each_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias, smooth", list(itertools.product([True, False], repeat=2)))
def test_codes_for_a_reader_are_those_it_would_make(activation, bias, smooth, backend):
    x, weight, b = operands((2, 301, 40), 100)
    packed = pack_linear(weight, "int8")
    reader = pack_linear(draw(30, 100, seed=6), "int8", draw(100, seed=7).exp() if smooth else None)
    with use_backend(backend):
        floats = packed_linear(x, packed, b if bias else None, activation=activation)
        codes = packed_linear(x, packed, b if bias else None, activation=activation, reader=reader)
        assert isinstance(codes, Codes) and codes.codes.dtype == torch.uint8 and codes.codes.shape == floats.shape
        expected, scale = quantize(floats, reader.smooth)
        torch.testing.assert_close(codes.scale, scale)
        off = (codes.codes.int() - expected.int()).abs()
        assert off.max() <= 1 and off.float().mean() < 0.01
        found, again = packed_linear(codes, reader), packed_linear(floats, reader)
    torch.testing.assert_close(found, again, rtol=0.02, atol=0.02 * float(again.abs().max()))
    assert (found - again).norm() < 2e-3 * again.norm()


@needs_native
@pytest.mark.parametrize("N", [39, 40])
def test_codes_whose_rows_do_not_end_on_a_whole_operand(N):
    x, weight, bias = operands((5, 24), N)
    first, reader = pack_linear(weight, "int8"), pack_linear(draw(17, N, seed=6), "int8")
    codes = packed_linear(x, first, bias, reader=reader)
    with use_backend("reference"):
        expected = packed_linear(codes, reader)
    torch.testing.assert_close(packed_linear(codes, reader), expected, rtol=1e-5, atol=1e-5)


@each_backend
def test_rows_of_different_size_have_scales_of_their_own(backend):
    x = draw(6, 64) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6, 1e20])[:, None]
    weight = draw(50, 64, seed=1)
    with use_backend(backend):
        found = packed_linear(x, pack_linear(weight, "int8"))
    expected = F.linear(x.double(), weight.double())
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1) < 0.02).all()


@each_backend
@pytest.mark.parametrize("to_codes", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 8, 36])
def test_a_row_with_something_not_finite_is_nan_and_no_other_row_is(bad, where, to_codes, backend):
    x, weight, bias = operands((5, 37), 20)
    x[2, where] = bad
    packed, reader = pack_linear(weight, "int8"), pack_linear(draw(8, 20), "int8")
    with use_backend(backend):
        found = packed_linear(x, packed, bias, reader=reader if to_codes else None)
        if to_codes:
            assert found.scale.isnan().tolist() == [False, False, True, False, False]
            found = packed_linear(found, reader)
    assert found[2].isnan().all() and found[[0, 1, 3, 4]].isfinite().all()


@each_backend
def test_rows_of_zeros_and_of_next_to_nothing(backend):
    x = torch.stack([torch.zeros(19), torch.full((19,), -0.0), torch.full((19,), 1e-42), torch.full((19,), 3e38)])
    with use_backend(backend):
        found = packed_linear(x, pack_linear(torch.full((4, 19), 1e-3), "int8"))
    assert (found[:3] == 0).all() and ((found[3] / (19 * 3e35) - 1).abs() < 0.01).all()


@needs_native
def test_the_largest_numbers_give_exact_sums():
    """Whatever the instruction: L is the largest number that it adds without saturating."""
    K, largest = 4608, layout()[2]
    for code, sign in ((255, 1), (255, -1), (1, 1), (0, 1)):
        weight = pack_linear(torch.full((32, K), float(sign * largest)), "int8")
        assert (weight.scale == 1).all() and (weight.numbers() == sign * largest).all()
        codes = Codes(torch.full((11, K), code, dtype=torch.uint8), torch.ones(11))
        assert (packed_linear(codes, weight) == (code - ZERO) * sign * largest * K).all()


# before and after

@each_backend
@each_precision
@pytest.mark.parametrize("shape, N", [((3, 7, 37), 41), ((2, 301, 24), 40), ((4, 64), 700), ((2, 3, 5, 16), 8),
                                      ((0, 4, 8), 8)])
def test_norm_before_and_gate_after(shape, N, precision, backend):
    """What the separate steps give, by the rounding of one."""
    x, weight, bias = operands(shape, N)
    x, packed = x + 3, pack_linear(weight, precision)
    wide = draw(shape[0], 2 * shape[-1] + N, seed=8)  # rows of a projection, in place
    shift, scale, gate = wide.split([shape[-1], shape[-1], N], 1)
    residual, ones = draw(*shape[:-1], N, seed=9), [1] * (len(shape) - 2)
    with use_backend(backend):
        found = packed_linear(x, packed, bias, scale=scale, shift=shift, activation="gelu", gate=gate,
                              residual=residual)
        h = F.layer_norm(x.double(), shape[-1:], eps=1e-6)
        h = (h * (1 + scale.reshape(shape[0], *ones, shape[-1])) + shift.reshape(shape[0], *ones, shape[-1])).float()
        y = packed_linear(h, packed, bias, activation="gelu")
        expected = residual + gate.reshape(shape[0], *ones, N) * y
        close = {"fp32": 1e-5, "bf16": 3e-2, "int8": 5e-2}[precision]  # a code or bfloat16 may round to the other side
        assert not x.numel() or (found - expected).abs().max() <= close * y.abs().max()
        assert (found - expected).norm() <= close / 5 * y.norm() + 1e-6 * expected.norm()
        kept = residual.clone()
        over = packed_linear(x, packed, bias, scale=scale, shift=shift, activation="gelu", gate=gate, residual=kept,
                             overwrite=True)
    assert over is kept and same_bits(over, found)


@needs_native
def test_norm_before_codes_and_half_precision():
    x, weight, bias = operands((2, 9, 40), 24)
    scale, shift = draw(2, 40, seed=5), draw(2, 40, seed=6)
    for precision, options in itertools.product(PRECISIONS, ({"reader": pack_linear(draw(8, 24), "int8")},
                                                             {"out_dtype": torch.bfloat16})):
        packed = pack_linear(weight, precision)
        found = packed_linear(x, packed, bias, scale=scale, shift=shift, **options)
        floats = packed_linear(x, packed, bias, scale=scale, shift=shift)
        if "reader" in options:
            assert torch.equal(found.codes, quantize(floats)[0]) and same_bits(found.scale, quantize(floats)[1])
        else:
            assert torch.equal(found, floats.bfloat16())


# promises

@needs_native
@each_precision
@each_shape
def test_bits_depend_on_nothing_but_the_row(shape, N, precision):
    """The same on every call, on any number of threads, alone and in company."""
    x, weight, bias = operands(shape, N)
    packed, threads = pack_linear(weight, precision), torch.get_num_threads()
    found = packed_linear(x, packed, bias, activation="gelu_tanh")
    try:
        for count in (threads, 1, 3, 7):
            torch.set_num_threads(count)
            assert same_bits(packed_linear(x, packed, bias, activation="gelu_tanh"), found)
    finally:
        torch.set_num_threads(threads)
    rows, flat = x.reshape(-1, shape[-1]), found.reshape(-1, N)
    for m in range(0, len(rows), max(1, len(rows) // 5)):
        assert same_bits(packed_linear(rows[m : m + 1], packed, bias, activation="gelu_tanh"), flat[m : m + 1])


@needs_native
@each_precision
@pytest.mark.parametrize("layout_of_x", ["rows apart", "transposed", "expanded", "unaligned"])
def test_strided_inputs(layout_of_x, precision):
    x, weight, bias = operands((6, 40), 30)
    given = {"rows apart": torch.cat((x, x + 1), 1)[:, :40], "transposed": x.t().contiguous().t(),
             "expanded": x[:1].expand(6, 40), "unaligned": torch.cat((x.new_zeros(1), x.flatten()))[1:].view(6, 40)}
    given, packed = given[layout_of_x], pack_linear(weight, precision)
    for dtype in DTYPES.values():
        expected = packed_linear(given.to(dtype).contiguous(), packed, bias)
        wide = given.to(dtype)  # keeps the strides of all but the cut ones
        if layout_of_x in ("rows apart", "unaligned"):
            wide = torch.zeros(6, 83, dtype=dtype)[:, 3:43]
            wide.copy_(given)
        assert same_bits(packed_linear(wide, packed, bias), expected)


@needs_native
@each_precision
@pytest.mark.parametrize("to", ["floats", "codes"])
@pytest.mark.parametrize("shape, N", [((3, 7, 37), 41), ((2, 301, 24), 40), ((5, 64), 700)])
def test_outputs_are_written_and_nothing_beside_them(shape, N, to, precision, monkeypatch):
    buffers, empty = [], torch.empty

    def fenced(*size, dtype=None, device=None):
        size = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        count, fill = torch.Size(size).numel(), 77 if dtype == torch.uint8 else 12345.0
        buffer = torch.full((count + 128,), fill, dtype=dtype)
        buffer[64 : 64 + count] = 99 if dtype == torch.uint8 else float("nan")
        buffers.append(buffer)
        return buffer[64 : 64 + count].view(size)

    x, weight, bias = operands(shape, N)
    packed, reader = pack_linear(weight, precision), pack_linear(draw(8, N), "int8") if to == "codes" else None
    expected = packed_linear(x, packed, bias, reader=reader)
    monkeypatch.setattr(torch, "empty", fenced)
    found = packed_linear(x, packed, bias, reader=reader)
    monkeypatch.setattr(torch, "empty", empty)
    assert len(buffers) == (2 if reader else 1)
    for buffer in buffers:
        assert (buffer[:64] == buffer[0]).all() and (buffer[-64:] == buffer[0]).all()
    if reader is None:
        assert same_bits(found, expected)
    else:
        assert torch.equal(found.codes, expected.codes) and same_bits(found.scale, expected.scale)


# refused

X, W = torch.zeros(4, 6), pack_linear(torch.ones(5, 6))
INT8, READER = pack_linear(torch.ones(5, 6), "int8"), pack_linear(torch.ones(3, 5), "int8")
CODES = Codes(torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(4))
BAD = [
    (lambda: pack_linear([1.0]), ValueError, "weight is list; expected"),
    (lambda: pack_linear(torch.zeros(3)), ValueError, r"weight is \(3,\) on cpu; expected \[N,K\]"),
    (lambda: pack_linear(torch.zeros(3, 0)), ValueError, r"weight is \(3, 0\) on cpu; expected \[N,K\]"),
    (lambda: pack_linear(torch.zeros(3, 2, device="meta")), ValueError, "on meta; expected"),
    (lambda: pack_linear(torch.zeros(3, 2, dtype=torch.int8)), TypeError, "weight has dtype torch.int8"),
    (lambda: pack_linear(torch.zeros(3, 2), "int4"), ValueError, "precision is 'int4'; expected one of 'fp32'"),
    (lambda: pack_linear(torch.zeros(3, 2), "bf16", torch.ones(2)), ValueError, "smooth is for 'int8'"),
    (lambda: pack_linear(torch.zeros(3, 2), "int8", torch.ones(3)), ValueError, r"smooth has shape \(3,\)"),
    (lambda: pack_linear(torch.zeros(1, 65537), "int8"), ValueError, "K is at most 65536"),
    (lambda: packed_linear(X, torch.ones(5, 6)), TypeError, "weight is Tensor; expected what pack_linear returns"),
    (lambda: packed_linear([1.0], W), TypeError, "x is list; expected a tensor"),
    (lambda: packed_linear(X.double(), W), TypeError, "x is torch.float64 on cpu; expected torch.bfloat16 or"),
    (lambda: packed_linear(X.to("meta"), W), TypeError, "x is torch.float32 on meta"),
    (lambda: packed_linear(X[:, :5], W), ValueError, r"x has shape \(4, 5\); expected \[...,6\]"),
    (lambda: packed_linear(X.sum(), W), ValueError, r"x has shape \(\); expected \[...,6\]"),
    (lambda: packed_linear(X.clone().requires_grad_(), W), ValueError, "it has no gradients"),
    (lambda: packed_linear(X, W, torch.zeros(6)), ValueError, r"bias has shape \(6,\); expected \[5\]"),
    (lambda: packed_linear(X, W, torch.zeros(5).half()), TypeError, "bias is torch.float16"),
    (lambda: packed_linear(X, W, activation="relu"), ValueError, "activation is 'relu'; expected one of 'none'"),
    (lambda: packed_linear(X, W, out_dtype=torch.int32), ValueError, "out_dtype is torch.int32; expected one of"),
    (lambda: packed_linear(CODES, W), ValueError, "x are codes, which are for 'int8' and cannot be normed; .* 'fp32'"),
    (lambda: packed_linear(Codes(X, CODES.scale), INT8), TypeError, "x is torch.float32 on cpu; expected torch.uint8"),
    (lambda: packed_linear(Codes(CODES.codes, torch.zeros(3)), INT8), ValueError, r"the scale of x has shape \(3,\)"),
    (lambda: packed_linear(X, W, scale=X[:1]), ValueError, "got one of scale and shift; expected both or none"),
    (lambda: packed_linear(X, W, gate=X[:, :5]), ValueError, "got one of gate and residual"),
    (lambda: packed_linear(X, W, scale=X[:1], shift=X), ValueError, r"scale has shape \(1, 6\); expected \[4,6\]"),
    (lambda: packed_linear(X, W, scale=X, shift=X.half()), TypeError, "shift is torch.float16"),
    (lambda: packed_linear(X, W, gate=X, residual=X), ValueError, r"gate has shape \(4, 6\); expected \[4,5\]"),
    (lambda: packed_linear(X, W, gate=X[:, :5], residual=X), ValueError, r"residual has shape \(4, 6\)"),
    (lambda: packed_linear(X, W, overwrite=True), ValueError, "overwrite is for a float32 result over a residual"),
    (lambda: packed_linear(CODES, INT8, scale=X, shift=X), ValueError, "cannot be normed"),
    (lambda: packed_linear(X, W, reader=INT8), ValueError, "reader is 'int8' of 6 inputs; expected 'int8' of 5"),
    (lambda: packed_linear(X, W, reader=pack_linear(torch.ones(2, 5))), ValueError, "reader is 'fp32' of 5 inputs"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
