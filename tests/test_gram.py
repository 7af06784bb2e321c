"""What is special to gram: exact sums, symmetry to the bit, any strides, what norms and projections follow from it."""
import pytest
import torch

from difuse_kernels import gram
from difuse_kernels.testing.numerics import backends_here

BACKENDS = backends_here("gram")
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(*shape, seed=0, dtype=torch.float32, mean=0.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean).to(dtype)


@every_backend
def test_what_the_entries_are(backend):
    x, y = draw(3, 4, 5, 7), draw(3, 4, 5, 7, seed=1)
    G = gram((x, y), backend=backend)
    assert G.dtype == torch.float64 and G.shape == (3, 3, 3)
    over, (a, b) = (1, 2, 3), (x.double(), y.double())
    torch.testing.assert_close(G[:, 0], torch.stack([torch.full((3,), 140.0, dtype=torch.float64), a.sum(over),
                                                     b.sum(over)], 1), rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(G[:, 1, 2], (a * b).sum(over), rtol=0, atol=1e-12)
    torch.testing.assert_close(G[:, 2, 2].sqrt(), y.double().flatten(1).norm(dim=1), rtol=1e-14, atol=0)
    N, s, q = G[:, 0, 0], G[:, 0, 1], G[:, 1, 1]
    torch.testing.assert_close(((q - s * s / N) / (N - 1)).sqrt(), a.std(over), rtol=1e-13, atol=0)


@every_backend
def test_sums_are_float64(backend):
    """A deviation a ten-thousandth of the mean: float32 sums would leave nothing of it."""
    x = draw(2, 30_000, mean=1e4)
    G = gram([x], backend=backend)
    variance = (G[:, 1, 1] - G[:, 0, 1] ** 2 / G[:, 0, 0]) / (G[:, 0, 0] - 1)
    torch.testing.assert_close(variance, x.double().var(1), rtol=1e-6, atol=0)


@every_backend
@pytest.mark.parametrize("seed", range(20))
def test_any_strides_shapes_and_dtypes(seed, backend):
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    shape = [pick(1, 9) for _ in range(pick(1, 5))]
    inputs = []
    for _ in range(pick(1, 4)):
        order = torch.randperm(len(shape), generator=generator).tolist()
        x = torch.randn([shape[axis] + pick(0, 2) for axis in order], generator=generator)
        x = x.to([torch.float32, torch.bfloat16, torch.float16][pick(0, 2)])
        x = x.permute([order.index(axis) for axis in range(len(shape))])
        for axis, n in enumerate(shape):
            x = x.narrow(axis, x.shape[axis] - n, n)
        inputs.append(x[:1].expand(shape) if pick(0, 3) == 0 else x)
    kept = [x.clone() for x in inputs]
    G = gram(inputs, backend=backend)
    assert all(torch.equal(x, before) for x, before in zip(inputs, kept, strict=True))
    assert torch.equal(G, G.mT) or backend == "reference"
    torch.testing.assert_close(G, gram([x.double() for x in inputs], backend="reference"), rtol=1e-13, atol=1e-12)


@every_backend
def test_numbers_that_are_not_finite_reach_their_entries_alone(backend):
    x, y = draw(2, 40), draw(2, 40, seed=1)
    y[1, 39] = float("nan")
    G = gram((x, y), backend=backend)
    bad = torch.zeros(2, 3, 3, dtype=torch.bool)
    bad[1, 2], bad[1, :, 2] = True, True
    assert torch.equal(G.isnan(), bad)


@every_backend
def test_samples_without_elements_sum_to_zero(backend):
    assert torch.equal(gram([torch.zeros(2, 0, 3)], backend=backend), torch.zeros(2, 2, 2, dtype=torch.float64))
    assert gram([torch.zeros(0, 3)], backend=backend).shape == (0, 2, 2)


@pytest.mark.parametrize("inputs, error, message", [
    ([], ValueError, "inputs is 0; expected a tuple or list of 1 to 4 tensors"),
    ([torch.ones(1, 2)] * 5, ValueError, "inputs is 5"),
    (torch.ones(1, 2), ValueError, "inputs is Tensor"),
    ([torch.ones(1, 2, dtype=torch.int64)], TypeError, "an input is torch.int64; expected floating tensors"),
    ([torch.ones(1, 2), None], TypeError, "an input is NoneType"),
    ([torch.ones(1, 2), torch.ones(2, 2)], ValueError, r"shapes \(1, 2\) and \(2, 2\); expected one shape \[B,...\]"),
    ([torch.ones(())], ValueError, "expected one shape"),
    ([torch.ones(1, 2), torch.ones(1, 2, device="meta")], ValueError, "inputs are on cpu and meta"),
])
def test_bad_inputs(inputs, error, message):
    with pytest.raises(error, match=f"gram: .*{message}"):
        gram(inputs)
