"""Data sets: the order training meets them in, the digits, arrays, and image folders good and bad."""
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import tiny_data

from difuse.training import ImageDataset, load_dataset


def stream(data, batch_size, batches, seed=3, start=0):
    """Indices of the images met, found again by their pixels."""
    images = torch.cat([data.batch(start + i * batch_size, batch_size, seed)[0] for i in range(batches)])
    return [int((data.images == image).flatten(1).all(1).nonzero()) for image in images]


def test_every_epoch_meets_every_image_once():
    data = tiny_data(20)
    order = stream(data, 8, 10)  # four epochs in batches that straddle them
    epochs = [order[i : i + 20] for i in range(0, 80, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream(data, 8, 10, seed=4) != order


def test_a_batch_depends_on_its_position_alone():
    order = stream(tiny_data(20), 8, 10)
    fresh = tiny_data(20)
    assert stream(fresh, 8, 2, start=48) == order[48:64]
    assert stream(fresh, 8, 1, start=16) == order[16:24]  # going back as well
    assert stream(fresh, 40, 2) == order  # and not on the batch size


def test_labels_travel_with_their_images():
    data = tiny_data(20)
    images, labels = data.batch(13, 30, seed=0)
    assert images.shape == (30, 1, 4, 4) and labels.dtype == torch.int64
    for image, label in zip(images, labels, strict=True):
        assert label == (data.images == image).flatten(1).all(1).nonzero().item() % 3


def test_digits_split_is_fixed_and_disjoint():
    train, held_out = ImageDataset.digits("train"), ImageDataset.digits("held_out")
    assert train.images.shape == (1500, 1, 8, 8) and held_out.images.shape == (297, 1, 8, 8)
    assert train.images.dtype == torch.float32 and train.images.min() == -1 and train.images.max() == 1
    assert train.num_classes == held_out.num_classes == 10
    assert set(train.labels.tolist()) == set(held_out.labels.tolist()) == set(range(10))
    # all 1,797 images are there, none twice: compare sorted rows of (pixels, label) with the source
    from sklearn.datasets import load_digits
    source = load_digits()
    ours = torch.cat([torch.cat(((d.images.flatten(1) + 1) * 8, d.labels[:, None]), 1) for d in (train, held_out)])
    theirs = np.concatenate((source.data, source.target[:, None]), 1)
    assert np.array_equal(np.unique(ours.numpy(), axis=0), np.unique(theirs, axis=0)) and len(ours) == len(theirs)
    assert train.labels[:8].tolist() == ImageDataset.digits().labels[:8].tolist()
    with pytest.raises(ValueError, match="split 'test' is unknown; expected 'train' or 'held_out'"):
        ImageDataset.digits("test")
    with pytest.raises(ValueError, match="digits are 8x8; image_size 16 has no effect"):
        load_dataset("digits", 16)


def test_uint8_spans_minus_one_to_one():
    data = ImageDataset.from_arrays(np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8))
    images, labels = data.batch(0, 4, 0)
    assert images.dtype == torch.float32 and images.min() == -1 and images.max() == 1 and labels.tolist() == [0] * 4
    expected = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    assert (images.flatten().sort().values - expected).abs().max() <= 2**-23  # two roundings of values up to 2


def test_fingerprint_sees_one_pixel_and_one_label():
    prints = [tiny_data().describe()["fingerprint"] for _ in range(2)]
    other, relabelled = tiny_data(), tiny_data()
    other.images[7, 0, 1, 2] += 1e-3
    relabelled.labels[3] = 2
    assert prints[0] == prints[1]
    assert len({prints[0], other.describe()["fingerprint"], relabelled.describe()["fingerprint"]}) == 3


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((4, 8, 8), np.uint8), None, r"images have shape \(4, 8, 8\); expected \[N,C,H,W\]"),
    (np.zeros((0, 1, 8, 8), np.uint8), None, "at least one image"),
    (np.zeros((4, 1, 8, 8)), None, "dtype torch.float64; expected uint8"),
    (np.full((4, 1, 8, 8), np.nan, np.float32), None, "4 images hold NaN or infinity, the first at index 0"),
    (np.zeros((4, 1, 8, 8), np.uint8), [0, 1], r"labels have shape \(2,\); expected one per image, \(4,\)"),
    (np.zeros((4, 1, 8, 8), np.uint8), [0.0, 1, 0, 1], "labels have dtype torch.float32; expected integers"),
    (np.zeros((4, 1, 8, 8), np.uint8), [0, 1, 2, 0], "labels run from 0 to 2; expected 0 to 1 for 2 classes"),
    (np.zeros((4, 1, 8, 8), np.uint8), [0, -1, 1, 0], "labels run from -1 to 1"),
])
def test_bad_arrays_are_refused(images, labels, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ImageDataset.from_arrays(images, labels, None if labels is None else ["a", "b"])


def pixels(height, width, channels=3, seed=0):
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def put(folder, name, array):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(folder / name)
    return folder / name


def test_folder_with_a_class_per_subfolder(tmp_path):
    arrays = {("cat", "b.png"): 1, ("cat", "a.png"): 2, ("ant", "z.png"): 3}
    for (label, name), seed in arrays.items():
        put(tmp_path / label, name, pixels(6, 6, seed=seed))
    (tmp_path / ".hidden").write_text("passed over")
    (tmp_path / "cat" / ".DS_Store").write_text("passed over")
    data = load_dataset(str(tmp_path))
    assert data.class_names == ("ant", "cat") and data.labels.tolist() == [0, 1, 1]
    for image, seed in zip(data.images, (3, 2, 1), strict=True):  # in order of class, then of name
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(6, 6, seed=seed))


def test_flat_grey_folder(tmp_path):
    put(tmp_path, "a.png", pixels(5, 7, 1))
    data = ImageDataset.image_folder(tmp_path)
    assert data.images.shape == (1, 1, 5, 7) and data.images.dtype == torch.uint8 and data.num_classes == 1
    assert np.array_equal(data.images[0, 0].numpy(), pixels(5, 7, 1))


def test_grey_among_colour_becomes_colour(tmp_path):
    put(tmp_path, "a.png", pixels(4, 4, 1))
    put(tmp_path, "b.png", pixels(4, 4, 3))
    images = ImageDataset.image_folder(tmp_path).images
    assert images.shape == (2, 3, 4, 4)
    assert np.array_equal(images[0].numpy(), np.broadcast_to(pixels(4, 4, 1), (3, 4, 4)))


def test_transparency_is_laid_on_white_and_orientation_obeyed(tmp_path):
    array = pixels(4, 4, 4)
    array[..., 3] = [0, 255, 0, 255]
    put(tmp_path / "clear", "a.png", array)
    image = ImageDataset.image_folder(tmp_path / "clear").images[0].permute(1, 2, 0).numpy()
    assert (image[:, 0] == 255).all() and np.array_equal(image[:, 1], array[:, 1, :3])
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: shown rotated by 90 degrees clockwise
    (tmp_path / "turned").mkdir()
    Image.fromarray(pixels(4, 6)).save(tmp_path / "turned" / "a.png", exif=exif)
    turned = ImageDataset.image_folder(tmp_path / "turned").images[0].permute(1, 2, 0).numpy()
    assert np.array_equal(turned, np.rot90(pixels(4, 6), -1))


def test_size_resizes_the_shorter_side_and_crops_the_centre(tmp_path):
    array = np.zeros((8, 24, 3), np.uint8)
    array[:, :6], array[:, 6:12], array[:, 12:18] = 255, 100, 200  # the crop keeps columns 8 to 15
    put(tmp_path, "wide.png", array)
    put(tmp_path, "square.png", pixels(4, 4))
    images = ImageDataset.image_folder(tmp_path, size=4).images
    assert images.shape == (2, 3, 4, 4)
    assert np.array_equal(images[0].permute(1, 2, 0).numpy(), pixels(4, 4))  # of that size already: untouched
    # the filter reaches over the edge between the halves, never to the black and white ends as a squeeze would
    assert (images[1][..., 0] - 100.0).abs().max() < 15 and (images[1][..., 3] - 200.0).abs().max() < 15
    with pytest.raises(ValueError, match="size is 0; expected the pixels of one side"):
        ImageDataset.image_folder(tmp_path, size=0)


def test_mixed_sizes_are_listed(tmp_path):
    for i in range(3):
        put(tmp_path, f"{i}.png", pixels(4, 4))
    put(tmp_path, "odd.png", pixels(5, 4))
    with pytest.raises(ValueError, match=r"2 sizes, most often 4x4 .*image_size.*\(1\):\n  .*odd.png: 4x5"):
        ImageDataset.image_folder(tmp_path)


def test_every_unreadable_file_is_listed(tmp_path):
    put(tmp_path, "good.png", pixels(32, 32))
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("not an image")
    with pytest.raises(ValueError) as error:
        ImageDataset.image_folder(tmp_path)
    text = str(error.value)
    assert "not readable images" in text and "(2)" in text and "good.png" not in text
    assert "empty.png: empty file" in text and "notes.txt: cannot identify" in text


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_truncated_files_are_listed(tmp_path, ending):
    put(tmp_path, f"a.{ending}", pixels(32, 32))
    whole = put(tmp_path, f"b.{ending}", pixels(32, 32, seed=1)).read_bytes()
    (tmp_path / f"b.{ending}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"not readable images.*\(1\):\n  .*b.{ending}: .*[Tt]runcated"):
        ImageDataset.image_folder(tmp_path)


def test_a_long_list_is_cut_with_its_count(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(i))
    with pytest.raises(ValueError, match=r"\(20\):(\n  .*){8}\n  and 12 more"):
        ImageDataset.image_folder(tmp_path)


def test_deep_pixels_and_animations_are_refused(tmp_path):
    put(tmp_path, "deep.png", np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000)
    frames = [Image.fromarray(pixels(4, 4, seed=s)) for s in range(3)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"deep.png: has pixel mode 'I;16'.*\n.*moving.gif: has 3 frames"):
        ImageDataset.image_folder(tmp_path)


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        ImageDataset.image_folder(tmp_path / "none")
    file = put(tmp_path / "data" / "cat", "a.png", pixels(4, 4))
    with pytest.raises(ValueError, match="not a folder"):
        ImageDataset.image_folder(file)
    (tmp_path / "data" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"without images.*\(1\):\n  .*dog"):
        ImageDataset.image_folder(tmp_path / "data")
    with pytest.raises(ValueError, match=r"without images.*\n  .*dog"):
        ImageDataset.image_folder(tmp_path / "data" / "dog")
    put(tmp_path / "data", "stray.png", pixels(4, 4))
    with pytest.raises(ValueError, match=r"files beside class folders.*\n  .*stray.png"):
        ImageDataset.image_folder(tmp_path / "data")
    put(tmp_path / "deep" / "cat" / "black", "a.png", pixels(4, 4))
    with pytest.raises(ValueError, match=r"folders inside class folders.*\n  .*black"):
        ImageDataset.image_folder(tmp_path / "deep")


def test_too_large_a_folder_is_refused_before_it_is_read(tmp_path):
    for i in range(3):
        put(tmp_path, f"{i}.png", pixels(10, 10))
    with pytest.raises(ValueError, match="3 images of 3x10x10 take 900 bytes in memory, the limit is 899"):
        ImageDataset.image_folder(tmp_path, max_bytes=899)
    assert len(ImageDataset.image_folder(tmp_path, max_bytes=900)) == 3
