"""A DiT block in one call: the bits of its parts, the budget of its arithmetic, scratch that is kept, refusals."""
import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import Workspace, attention_packed, dit_block, native, pack_linear, packed_linear, use_backend
from difuse_kernels.linear.linear import PRECISIONS
from difuse_kernels.testing.numerics import compare

BACKENDS = ["reference", "auto"] if native.ext is not None else ["reference"]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_precision = pytest.mark.parametrize("precision", PRECISIONS)
needs_native = pytest.mark.skipif(native.ext is None, reason="the native module is not built")
SHAPES = [(2, 5, 48, 2, 96), (1, 300, 144, 2, 40), (3, 1, 16, 2, 64), (0, 4, 16, 1, 64), (2, 0, 16, 1, 64)]  # B S D H F
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float() * scale


def inputs(B, S, D, F):
    """x, modulation, and the four plain products: different modulation for each sample, rows of different size."""
    x = draw(B, S, D) * draw(B, S, 1, seed=1).exp()
    products = [(draw(n, k, seed=10 + i, scale=k**-0.5), draw(n, seed=20 + i))
                for i, (n, k) in enumerate(((3 * D, D), (D, D), (F, D), (D, F)))]
    return x, draw(B, 6 * D, seed=2), products


def packed(products, precision):
    return [(pack_linear(weight, precision), bias) for weight, bias in products]


def plain(x, modulation, products, heads):
    """The paper's formulas in x's dtype."""
    products = [(w.to(x.dtype), b.to(x.dtype)) for w, b in products]
    shift1, scale1, gate1, shift2, scale2, gate2 = (m[:, None] for m in modulation.to(x.dtype).chunk(6, 1))
    h = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1, *products[0])
    q, k, v = h.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    x = x + gate1 * F.linear(attended, *products[1])
    h = F.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2, *products[2])
    return x + gate2 * F.linear(F.gelu(h, approximate="tanh"), *products[3])


@each_backend
@each_shape
def test_float32_within_the_error_budget(shape, backend):
    B, S, D, heads, width = shape
    x, modulation, products = inputs(B, S, D, width)
    with use_backend(backend):
        found = dit_block(x, modulation, *packed(products, "fp32"), heads=heads)
    line = compare("out", found, plain(x, modulation, products, heads),
                   plain(x.double(), modulation, products, heads))
    assert line.ok, line


@each_backend
@each_shape
def test_bfloat16_errs_no_more_than_eagers(shape, backend):
    B, S, D, heads, width = shape
    x, modulation, products = inputs(B, S, D, width)
    with use_backend(backend):
        found = dit_block(x, modulation, *packed(products, "bf16"), heads=heads, dtype=torch.bfloat16)
    half = plain(x.bfloat16(), modulation, products, heads).float()
    line = compare("out", found, half, plain(x.double(), modulation, products, heads))
    assert found.dtype == torch.float32 and line.ok, line


@needs_native
@each_precision
@each_shape
def test_the_bits_of_its_parts(shape, precision):
    B, S, D, heads, width = shape
    x, modulation, products = inputs(B, S, D, width)
    products, dtype, options = packed(products, precision), DTYPES[precision], {}
    found = dit_block(x, modulation, *products, heads=heads, dtype=dtype)
    qkv, proj, fc1, fc2 = products
    options = {"reader": fc2[0]} if precision == "int8" else {"out_dtype": dtype}
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
    h = packed_linear(x, *qkv, scale=scale1, shift=shift1, out_dtype=dtype).unflatten(-1, (3, heads, D // heads))
    y = packed_linear(attention_packed(h).flatten(2), *proj, gate=gate1, residual=x)
    h = packed_linear(y, *fc1, scale=scale2, shift=shift2, activation="gelu_tanh", **options)
    assert torch.equal(found, packed_linear(h, *fc2, gate=gate2, residual=y))


@each_backend
@each_precision
def test_queries_keys_and_values_apart(precision, backend):
    x, modulation, (qkv, *others) = inputs(2, 9, 48, 96)
    apart = [(pack_linear(w, precision), b) for w, b in zip(qkv[0].chunk(3), qkv[1].chunk(3), strict=True)]
    others = packed(others, precision)
    with use_backend(backend):
        expected = dit_block(x, modulation, *packed([qkv], precision), *others, heads=2)
        assert torch.equal(dit_block(x, modulation, apart, *others, heads=2), expected)


@needs_native
@each_precision
def test_a_sample_depends_on_no_other_and_on_no_number_of_threads(precision):
    x, modulation, products = inputs(3, 70, 48, 96)
    products, threads = packed(products, precision), torch.get_num_threads()
    found = dit_block(x, modulation, *products, heads=2)
    assert torch.equal(dit_block(x[1:2], modulation[1:2], *products, heads=2), found[1:2])
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(dit_block(x, modulation, *products, heads=2), found)
    finally:
        torch.set_num_threads(threads)


@each_backend
@each_precision
@pytest.mark.parametrize("strided", [True, False])
def test_overwriting(strided, precision, backend):
    x, modulation, products = inputs(2, 9, 48, 96)
    products = packed(products, precision)
    if strided:
        x = torch.cat((x, x), 2)[..., :48]
        modulation = torch.cat((modulation, modulation), 1)[:, : 6 * 48]
    before = x.clone()
    with use_backend(backend):
        expected = dit_block(x, modulation, *products, heads=2)
        assert torch.equal(x, before)
        found = dit_block(x, modulation, *products, heads=2, overwrite=True)
    assert found is x and torch.equal(found, expected)


@needs_native
@each_precision
def test_scratch_is_kept_and_holds_nothing_that_matters(precision):
    workspace, products = Workspace(), packed(inputs(1, 1, 48, 96)[2], precision)
    for B, S in ((3, 70), (2, 70), (3, 1)):
        x, modulation, _ = inputs(B, S, 48, 96)
        found = dit_block(x, modulation, *products, heads=2, workspace=workspace)
        assert torch.equal(found, dit_block(x, modulation, *products, heads=2))
        before = {key: buffer.data_ptr() for key, buffer in workspace._buffers.items()}
        for buffer in workspace._buffers.values():
            buffer.fill_(float("nan") if buffer.is_floating_point() else 255)
        assert torch.equal(dit_block(x, modulation, *products, heads=2, workspace=workspace), found)
        assert {key: buffer.data_ptr() for key, buffer in workspace._buffers.items()} == before
    hidden = 1 if precision == "int8" else 4
    assert workspace.nbytes() == 210 * (3 * 48 * 4 + 48 * 4 + 96 * hidden + (4 if precision == "int8" else 0))


X, MODULATION, PRODUCTS = inputs(2, 3, 16, 24)
QKV, PROJ, FC1, FC2 = packed(PRODUCTS, "fp32")
BAD = [
    (lambda: dit_block([1.0], MODULATION, QKV, PROJ, FC1, FC2, heads=2), TypeError, "x is list; expected torch"),
    (lambda: dit_block(X.double(), MODULATION, QKV, PROJ, FC1, FC2, heads=2), TypeError, "x is torch.float64 on cpu"),
    (lambda: dit_block(X[0], MODULATION, QKV, PROJ, FC1, FC2, heads=2), ValueError, r"x has shape \(3, 16\); expected"),
    (lambda: dit_block(X, MODULATION[0], QKV, PROJ, FC1, FC2, heads=2), ValueError, r"modulation has shape \(96,\)"),
    (lambda: dit_block(X, MODULATION[:1], QKV, PROJ, FC1, FC2, heads=2), ValueError, r"expected \(2, 96\)"),
    (lambda: dit_block(X, MODULATION, QKV, PROJ, FC1, FC2, heads=3), ValueError, "3 heads share 16 channels"),
    (lambda: dit_block(X, MODULATION, QKV, PROJ, FC1, FC2, heads=4), ValueError, "expected a multiple of 8"),
    (lambda: dit_block(X, MODULATION, PROJ, PROJ, FC1, FC2, heads=2), ValueError, r"qkv is \(16, 16\); expected a P"),
    (lambda: dit_block(X, MODULATION, [PROJ, QKV, PROJ], PROJ, FC1, FC2, heads=2), ValueError, "k of qkv is"),
    (lambda: dit_block(X, MODULATION, QKV, PROJ, FC1, FC1, heads=2), ValueError, r"fc2 is \(24, 16\); expected"),
    (lambda: dit_block(X, MODULATION, QKV, (PROJ[0], QKV[1]), FC1, FC2, heads=2), ValueError, "the bias of proj is"),
    (lambda: dit_block(X, MODULATION, QKV, PROJ, FC1, FC2, heads=2, activation="relu"), ValueError, "activation is"),
    (lambda: dit_block(X, MODULATION, QKV, PROJ, FC1, FC2, heads=2, dtype=torch.int8), ValueError, "dtype is torch.in"),
    (lambda: dit_block(X.clone().requires_grad_(), MODULATION, QKV, PROJ, FC1, FC2, heads=2), ValueError,
     "it has no gradients"),
]


@pytest.mark.parametrize("call, error, text", BAD, ids=[text[:40] for _, _, text in BAD])
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
