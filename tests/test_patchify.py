"""What is special to patchify: the models' own permutes, every order, each the other's gradient, errors that help."""
from itertools import permutations
from math import prod

import pytest
import torch
import torch.nn.functional as F

from difuse_kernels import patchify, unpatchify, use_backend
from difuse_kernels.testing.numerics import backends_here

BACKENDS = backends_here("patchify")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@every_backend
def test_cpq_is_what_a_patch_convolution_sees(backend):
    x, weight = draw(2, 5, 12, 6), draw(7, 5, 3, 2, seed=1)
    tokens = patchify(x, (3, 2), order="cpq", backend=backend)
    assert torch.equal(tokens, F.unfold(x, (3, 2), stride=(3, 2)).transpose(1, 2))
    expected = F.conv2d(x.double(), weight.double(), stride=(3, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens.double() @ weight.double().flatten(1).T, expected)


@every_backend
def test_permutes_of_published_models(backend):
    """The lines as their authors wrote them, each against the order that names it."""
    x, p = draw(2, 8, 6, 10), 2
    B, C, H, W = x.shape
    view = x.view(B, C, H // p, p, W // p, p)
    flux = view.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * p * p)
    assert torch.equal(patchify(x, 2, order="cpq", backend=backend), flux)
    hidream = view.permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)
    assert torch.equal(patchify(x, 2, order="pqc", backend=backend), hidream)
    dit = torch.einsum("nhwpqc->nchpwq", hidream.reshape(B, H // p, W // p, p, p, C)).reshape(B, C, H, W)
    assert torch.equal(unpatchify(hidream, 2, (H // p, W // p), backend=backend), dit)

    video, t = draw(2, 3, 8, 6, 10), 4
    B, C, frames, H, W = video.shape
    wan = video.view(B, C, frames, H // p, p, W // p, p).permute(0, 1, 6, 4, 2, 3, 5)
    wan = wan.reshape(B, C * p * p, -1).transpose(1, 2)
    assert torch.equal(patchify(video, (1, 2, 2), order="cqp", backend=backend), wan)
    ltx = video.reshape(B, C, frames // t, t, H // p, p, W // p, p).permute(0, 1, 3, 7, 5, 2, 4, 6)
    ltx = ltx.flatten(1, 4).flatten(2).transpose(1, 2)
    assert torch.equal(patchify(video, (4, 2, 2), order="ctqp", backend=backend), ltx)


def by_hand(x, patch, order):
    """Element by element, from the definition."""
    B, C, *sizes = x.shape
    grid = [size // p for size, p in zip(sizes, patch, strict=True)]
    extent = {"c": C, **dict(zip("tpq"[-len(patch):], patch, strict=True))}
    tokens = torch.empty(B, prod(grid), C * prod(patch), dtype=x.dtype)
    for s in range(prod(grid)):
        for k in range(tokens.shape[2]):
            inside, rest = {}, k
            for letter in reversed(order):
                inside[letter], rest = rest % extent[letter], rest // extent[letter]
            at, rest = [], s
            for axis in reversed(range(len(grid))):
                at.insert(0, rest % grid[axis] * patch[axis] + inside["tpq"[axis - len(grid)]])
                rest //= grid[axis]
            tokens[:, s, k] = x[(slice(None), inside["c"], *at)]
    return tokens


@every_backend
@pytest.mark.parametrize("order", ["".join(o) for letters in ("cpq", "ctpq") for o in permutations(letters)])
def test_every_order_against_the_definition(order, backend):
    patch = (2, 1, 3)[-len(order) + 1 :] if "t" in order else (3, 2)
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(2, 3, *(2 * p for p in patch), dtype=dtype)
        tokens = patchify(x, patch, order=order, backend=backend)
        assert torch.equal(tokens, by_hand(x, patch, order))
        assert torch.equal(unpatchify(tokens, patch, (2,) * len(patch), order=order, backend=backend), x)


# channels and widths below, at and above a vector
@every_backend
@pytest.mark.parametrize("C", [1, 3, 4, 7, 8, 9, 16, 20, 33])
@pytest.mark.parametrize("q", [1, 2, 3, 4, 8])
def test_widths_and_channels(C, q, backend):
    orders, widths, dtypes = ("cpq", "pqc", "pcq", "qpc"), (1, 2, 5, 16, 19), (torch.float32, torch.float16)
    if backend == "triton":  # slow, interpreted and compiled, 3324 kernels in all: one of all
        orders, widths, dtypes = (orders[(C + q) % 4],), (widths[C % 5],), (dtypes[q % 2],)
    for order in orders:
        for cells in widths:
            for dtype in dtypes:
                x = draw(2, C + 2, 4, cells * q + 3, dtype=dtype)[:, 1:-1, :, 2 : cells * q + 2]
                tokens = patchify(x, (2, q), order=order, backend=backend)
                assert torch.equal(tokens, patchify(x, (2, q), order=order, backend="reference"))
                wide = F.pad(tokens, (1, 2))[..., 1:-2]  # the same tokens in a wider buffer, misaligned
                assert torch.equal(unpatchify(wide, (2, q), (2, cells), order=order, backend=backend), x)


LARGE = {  # each of several blocks' work on a GPU, for one row of patches
    "across": ((2, 2), "cpq", (32, 2, 144)),
    "channels_in_runs": ((2, 2), "pqc", (136, 2, 32)),
    "channels": ((2, 2), "cqp", (140, 2, 24)),
    "odd_channels": ((2, 2), "qcp", (141, 2, 22)),
    "patch": ((1, 8200), "cpq", (3, 2, 16400)),
    "patch_in_runs": ((2, 8200), "qpc", (3, 2, 16400)),
    "video_patch": ((2, 1, 8200), "ctpq", (3, 4, 2, 8200)),
}


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # slow, and has none of these
@pytest.mark.parametrize("case", LARGE)
def test_large_rows_of_patches(case, backend):
    patch, order, shape = LARGE[case]
    grid = tuple(size // p for size, p in zip(shape[1:], patch, strict=True))
    for dtype in (torch.float32, torch.float16):
        x = draw(2, *shape, dtype=dtype)
        tokens = patchify(x, patch, order=order, backend=backend)
        assert torch.equal(tokens, patchify(x, patch, order=order, backend="reference"))
        assert torch.equal(unpatchify(tokens, patch, grid, order=order, backend=backend), x)


@every_backend
@pytest.mark.parametrize("start, strides", [(1, (96, 32, 16, 1)), (0, (100, 32, 16, 1)), (0, (99, 33, 16, 1)),
                                            (0, (102, 34, 17, 1))])
def test_lines_of_whole_vectors_that_start_anywhere(start, strides, backend):
    """Sizes that suit 16-byte accesses, addresses that do not."""
    for dtype in (torch.float32, torch.bfloat16):
        x = draw(400, dtype=dtype).as_strided((2, 3, 2, 16), strides, start)
        tokens = patchify(x, 2, backend=backend)
        assert torch.equal(tokens, patchify(x, 2, backend="reference"))
        tokens = draw(400, dtype=dtype).as_strided((2, 6, 16), (strides[0], strides[2], 1), start)
        image = unpatchify(tokens, 2, (3, 2), backend=backend)
        assert torch.equal(image, unpatchify(tokens, 2, (3, 2), backend="reference"))


@every_backend
def test_short_orders_put_t_before_the_patch(backend):
    video = draw(2, 3, 4, 6, 4)
    for short, full in (("cpq", "ctpq"), ("pqc", "tpqc"), ("cqp", "ctqp"), ("pcq", "tpcq"), ("qcp", "tqcp")):
        tokens = patchify(video, (2, 3, 2), order=short, backend=backend)
        assert torch.equal(tokens, patchify(video, (2, 3, 2), order=full, backend=backend))
        assert torch.equal(unpatchify(tokens, (2, 3, 2), (2, 2, 2), order=short, backend=backend), video)


@every_backend
def test_an_int_patch_is_that_size_along_every_axis(backend):
    image, video = draw(2, 3, 6, 4), draw(2, 3, 4, 6, 2)
    assert torch.equal(patchify(image, 2, backend=backend), patchify(image, (2, 2), backend=backend))
    tokens = patchify(video, 2, order="pqc", backend=backend)
    assert torch.equal(tokens, patchify(video, (2, 2, 2), order="pqc", backend=backend))
    assert torch.equal(unpatchify(tokens, 2, (2, 3, 1), backend=backend), video)


@every_backend
def test_each_is_the_others_gradient(backend):
    x = draw(2, 3, 6, 8).requires_grad_()
    grad = draw(2, 12, 12, seed=1)
    patchify(x, 2, order="cqp", backend=backend).backward(grad)
    assert torch.equal(x.grad, unpatchify(grad, 2, (3, 4), order="cqp", backend=backend))
    tokens = draw(2, 12, 12, seed=2).requires_grad_()
    grad = draw(2, 3, 6, 8, seed=3).transpose(2, 3).contiguous().transpose(2, 3)
    unpatchify(tokens, 2, (3, 4), order="cqp", backend=backend).backward(grad)
    assert torch.equal(tokens.grad, patchify(grad.contiguous(), 2, order="cqp", backend=backend))


@every_backend
def test_special_values_keep_their_bits(backend):
    bits = torch.tensor([0x7FC1, 0xFF81, 0x8000, 0x7F80, 0xFF80, 0x0001, 0x8001, 0x3F80], dtype=torch.int32)
    x = bits.to(torch.int16).view(torch.bfloat16).reshape(1, 1, 2, 4).expand(1, 3, 2, 4)
    tokens = patchify(x, 2, order="pqc", backend=backend)
    back = unpatchify(tokens, 2, (1, 2), order="pqc", backend=backend)
    assert torch.equal(back.view(torch.int16), x.contiguous().view(torch.int16))


def test_results_are_contiguous_even_where_a_view_would_do():
    x = draw(2, 3, 4, 1)
    for backend in ("auto", *BACKENDS):
        tokens = patchify(x, 1, order="pqc", backend=backend)
        assert tokens.is_contiguous() and unpatchify(tokens, 1, (4, 1), backend=backend).is_contiguous()


def test_the_reference_takes_what_the_kernel_refuses():
    channels_last = draw(2, 3, 4, 6).to(memory_format=torch.channels_last)
    with use_backend("reference"):
        assert torch.equal(patchify(channels_last, 2), patchify(channels_last.contiguous(), 2))
        assert patchify(draw(2, 3, 4, 6).double(), 2).dtype == torch.float64
    if "cpu" in BACKENDS:
        with pytest.raises(RuntimeError, match="last dimension of input 0 is strided"):
            patchify(channels_last, 2, backend="cpu")
        with pytest.raises(RuntimeError, match="float64"):
            unpatchify(draw(2, 4, 12).double(), 2, (2, 2), backend="cpu")


IMAGE, VIDEO, TOKENS = torch.zeros(2, 3, 6, 8), torch.zeros(2, 3, 4, 6, 8), torch.zeros(2, 12, 12)


@pytest.mark.parametrize("call, error, message", [
    (lambda: patchify([1.0], 2), TypeError, "patchify: x is list; expected a tensor"),
    (lambda: patchify(IMAGE.int(), 2), TypeError, "dtype torch.int32; expected a floating dtype"),
    (lambda: patchify(IMAGE[0], 2), ValueError, r"x has shape \(3, 6, 8\); expected \[B,C,H,W\]"),
    (lambda: patchify(IMAGE, 4), ValueError, "H is 6, which patch size 4 does not divide; pad it to 8 or crop it to 4"),
    (lambda: patchify(IMAGE, (2, 3)), ValueError, "W is 8, .* pad it to 9 or crop it to 6"),
    (lambda: patchify(VIDEO, (3, 2, 2)), ValueError, "F is 4, which patch size 3"),
    (lambda: patchify(IMAGE, 0), ValueError, "patch_size is 0; expected 2 integers >= 1"),
    (lambda: patchify(IMAGE, (2, 2, 2)), ValueError, r"patch_size is \(2, 2, 2\); expected 2 integers"),
    (lambda: patchify(VIDEO, (2, 2)), ValueError, r"expected 3 integers >= 1, one for each of \(F,H,W\)"),
    (lambda: patchify(IMAGE, 2.0), ValueError, "patch_size is 2.0"),
    (lambda: patchify(IMAGE, 2, order="ctpq"), ValueError, "order is 'ctpq'; expected a permutation of cpq"),
    (lambda: patchify(VIDEO, 2, order="cpp"), ValueError, "order is 'cpp'; expected a permutation of ctpq or cpq"),
    (lambda: patchify(IMAGE, 2, backend="gpu"), ValueError, "backend 'gpu' is unknown"),
    (lambda: unpatchify(IMAGE, 2, (3, 4)), ValueError, r"tokens has shape .* expected \[B,S,K\]"),
    (lambda: unpatchify(TOKENS, 2, (6, 8)), ValueError, r"expected S = 48 for the grid \(6, 8\)"),
    (lambda: unpatchify(TOKENS, 2, 12), ValueError, "grid is 12; expected 2 integers >= 0"),
    (lambda: unpatchify(TOKENS, 2, (3, -4)), ValueError, r"grid is \(3, -4\)"),
    (lambda: unpatchify(TOKENS, 5, (3, 4)), ValueError, r"expected K to be a multiple of 25"),
    (lambda: unpatchify(TOKENS, (1, 2), (3, 4, 1)), ValueError, r"patch_size is \(1, 2\); expected 3"),
])
def test_errors_say_what_to_do(call, error, message):
    with pytest.raises(error, match=message):
        call()
