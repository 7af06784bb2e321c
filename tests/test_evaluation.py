"""Frechet distance, the digit judge, pictures: each against what is known in closed form."""
import math
import os

import pytest
import torch

from difuse.evaluation import class_share, digit_classifier, frechet_distance, image_grid, plot_loss, save_png
from difuse.files import write_atomically


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whitened(samples):
    """The samples moved and turned so that their own mean is 0 and their own covariance is I."""
    samples = samples - samples.mean(0)
    return samples @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(samples.T)).T)


def test_frechet_distance_is_exact_for_known_gaussians():
    x, y = whitened(normal(0, 300, 6)), whitened(normal(1, 200, 6))
    scales = torch.tensor([0.5, 1.0, 2.0, 3.0, 0.1, 1.5], dtype=torch.float64)
    shift = torch.arange(6, dtype=torch.float64)
    expected = shift.square().sum() + (1 - scales).square().sum()
    assert math.isclose(frechet_distance(x, y * scales + shift), expected.item(), rel_tol=1e-10)


def test_frechet_distance_agrees_with_the_matrix_square_root():
    mix_a, mix_b = normal(2, 8, 8), normal(3, 8, 8)  # covariances that do not commute
    a, b = normal(4, 500, 8) @ mix_a, normal(5, 400, 8) @ mix_b + 0.3
    A, B = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(A @ B).real.sqrt().sum()  # of a product of two positive matrices: real, positive
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * roots
    assert math.isclose(frechet_distance(a, b), expected.item(), rel_tol=1e-9)


def test_frechet_distance_is_symmetric_and_zero_for_itself():
    a, b = normal(6, 50, 1, 3, 3), normal(7, 60, 1, 3, 3) * 2
    assert frechet_distance(a, a) < 1e-9
    assert math.isclose(frechet_distance(a, b), frechet_distance(b, a), rel_tol=1e-9)


def test_frechet_distance_takes_constant_pixels():
    a, b = normal(8, 40, 5), normal(9, 40, 5)
    a[:, 0], b[:, 0] = -1.0, 1.0  # digits have corners without variance
    assert math.isclose(frechet_distance(a, b), frechet_distance(a[:, 1:], b[:, 1:]) + 4.0, rel_tol=1e-6)


@pytest.mark.parametrize("a, b, said", [
    (torch.zeros(5, 3), torch.zeros(5, 4), "a has 3 numbers per sample, b has 4"),
    (torch.zeros(1, 3), torch.zeros(5, 3), r"a has shape \(1, 3\)"),
    (torch.zeros(5), torch.zeros(5, 3), r"a has shape \(5,\)"),
    (torch.zeros(5, 3), torch.full((5, 3), math.nan), "b holds NaN"),
])
def test_frechet_distance_refuses(a, b, said):
    with pytest.raises(ValueError, match=said):
        frechet_distance(a, b)


def test_the_judge_tells_digits_apart_and_notices_wrong_labels():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(digits.images[:, None] / 8 - 1)
    labels = torch.tensor(digits.target)
    judge = digit_classifier(images[:1500], labels[:1500])
    assert class_share(judge, images[1500:], labels[1500:]) > 0.94  # 0.953 measured
    assert class_share(judge, images[1500:], (labels[1500:] + 1) % 10) < 0.03
    assert class_share(judge, torch.zeros(10, 1, 8, 8), torch.arange(10)) <= 0.1
    with pytest.raises(ValueError, match="297 images and 3 labels"):
        class_share(judge, images[1500:], labels[:3])


def test_image_grid_places_every_image_and_clips():
    images = torch.stack([torch.full((1, 2, 3), v) for v in (-1.0, 1.0, -7.0, 7.0, 0.0)])
    sheet = image_grid(images, columns=2, scale=4, gap=1)
    assert sheet.shape == (1 + 3 * (8 + 1), 1 + 2 * (12 + 1), 1) and sheet.dtype == torch.uint8
    for i, value in enumerate((0, 255, 0, 255, 128)):
        top, left = 1 + i // 2 * 9, 1 + i % 2 * 13
        assert (sheet[top : top + 8, left : left + 12] == value).all()
    assert (sheet[0] == 128).all() and (sheet[-9:, 14:] == 128).all()  # the gap, the empty place


@pytest.mark.parametrize("images, options, said", [
    (torch.zeros(2, 4, 8, 8), {}, "expected"),
    (torch.zeros(0, 1, 8, 8), {}, "expected"),
    (torch.full((1, 1, 2, 2), math.nan), {}, "NaN"),
    (torch.zeros(2, 1, 2, 2), {"columns": 0}, "columns 0"),
])
def test_image_grid_refuses(images, options, said):
    with pytest.raises(ValueError, match=said):
        image_grid(images, **options)


@pytest.mark.parametrize("channels", [1, 3])
def test_png_reads_back_exactly(tmp_path, channels):
    Image = pytest.importorskip("PIL.Image")
    sheet = image_grid(normal(10, 4, channels, 5, 7).float(), scale=2)
    save_png(tmp_path / "grid.png", sheet)
    with Image.open(tmp_path / "grid.png") as picture:
        back = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).reshape(sheet.shape)
    assert torch.equal(back, sheet)


def test_loss_plot_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    plot_loss(tmp_path / "loss.png", list(range(200)), [1 / (1 + i) for i in range(200)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="2 steps and 1 losses"):
        plot_loss(tmp_path / "loss.png", [1, 2], [0.5])


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    write_atomically(path, b"first")

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"second, longer")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]
