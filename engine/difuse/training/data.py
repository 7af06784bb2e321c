"""Images in memory and the order in which training meets them."""
import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch

MAX_BYTES = 4 * 2**30  # an image folder is held in memory as uint8; larger ones are refused
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
_GREY, _COLOUR = ("1", "L", "LA"), ("RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB")


class ImageDataset:
    """Images [N,C,H,W], uint8 (0..255 stands for -1..1) or float32 (used as they are), and int64 labels [N].

    Construct one with `from_arrays`, `digits` or `image_folder`.
    """

    def __init__(self, images, labels, class_names, name):
        self.images, self.labels, self.class_names, self.name = images, labels, tuple(class_names), name
        self._epoch, self._order, self._fingerprint = None, None, None

    def __len__(self):
        return len(self.images)

    @property
    def num_classes(self):
        """How many classes the labels tell apart."""
        return len(self.class_names)

    def batch(self, position, batch_size, seed):
        """Images [B,C,H,W] float32 and labels [B] at `position` (in images) of an endless shuffled stream.

        Epoch e is a permutation that depends on (seed, e) alone, so a run continues from nothing but its position.
        Batches run across the ends of epochs: every image is met once per epoch.
        """
        count, picked = len(self), []
        while batch_size > 0:
            epoch, start = divmod(position, count)
            if self._epoch != (seed, epoch):
                self._epoch = (seed, epoch)
                self._order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
            picked.append(self._order[start : start + batch_size])
            position, batch_size = position + len(picked[-1]), batch_size - len(picked[-1])
        indices = torch.cat(picked)  # [B]
        images = self.images[indices]  # [B,C,H,W]
        if images.dtype == torch.uint8:
            images = images.float().div_(127.5).sub_(1)
        return images, self.labels[indices]

    def describe(self):
        """JSON-able facts that identify the data, a hash of every pixel and label among them."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(digest_size=16)
            digest.update(self.images.numpy())
            digest.update(self.labels.numpy())
            self._fingerprint = digest.hexdigest()
        return {"name": self.name, "shape": list(self.images.shape), "dtype": str(self.images.dtype),
                "class_names": list(self.class_names), "fingerprint": self._fingerprint}

    @classmethod
    def from_arrays(cls, images, labels=None, class_names=None, name="arrays"):
        """From arrays or tensors: images [N,C,H,W] uint8 or float32, integer labels [N] (None: one class).

        Raises TypeError or ValueError naming the argument, what was got and what was expected.
        """
        images = torch.as_tensor(images).contiguous()
        if images.dim() != 4 or images.numel() == 0:
            raise ValueError(f"data: images have shape {tuple(images.shape)}; expected [N,C,H,W] with at least one "
                             "image. Add the missing axes, for example images[:, None] for grey ones")
        if images.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"data: images have dtype {images.dtype}; expected uint8 (0..255) or float32 (-1..1). "
                            "Scale and convert them first")
        if images.dtype == torch.float32 and not images.isfinite().all():
            bad = (~images.isfinite().flatten(1).all(1)).nonzero().flatten()
            raise ValueError(f"data: {len(bad)} images hold NaN or infinity, the first at index {bad[0].item()}; "
                             "remove or mend them")
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else torch.as_tensor(labels)
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise TypeError(f"data: labels have dtype {labels.dtype}; expected integers 0, 1, ... Convert with .long()")
        labels = labels.to(torch.int64).contiguous()
        if labels.shape != images.shape[:1]:
            raise ValueError(f"data: labels have shape {tuple(labels.shape)}; expected one per image, "
                             f"({len(images)},)")
        if class_names is None:
            class_names = [str(i) for i in range(int(labels.max()) + 1)]
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(f"data: labels run from {labels.min().item()} to {labels.max().item()}; expected 0 to "
                             f"{len(class_names) - 1} for {len(class_names)} classes")
        return cls(images, labels, class_names, name)

    @classmethod
    def digits(cls, split="train"):
        """The 1,797 handwritten digits of scikit-learn, [N,1,8,8] float32 in [-1,1], 10 classes.

        split "train" has the first 1,500, "held_out" the last 297, in the order of the source. Those lie farther from
        the training digits than a random fifth would: Frechet distance 1.35 against 0.46.
        """
        if split not in ("train", "held_out"):
            raise ValueError(f"data: split {split!r} is unknown; expected 'train' or 'held_out'")
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ImportError("data: the digits ship with scikit-learn; pip install 'difuse[demo]'") from error
        source = load_digits()
        index = slice(1500, None) if split == "held_out" else slice(1500)
        images = (source.images[index, None] / 8 - 1).astype(np.float32)  # 0..16 -> -1..1
        return cls.from_arrays(images, source.target[index], [str(d) for d in range(10)], f"digits/{split}")

    @classmethod
    def image_folder(cls, path, size=None, max_bytes=MAX_BYTES):
        """Every image below `path`: one class per subfolder in order of name, or one class if there are none.

        Kept as uint8 [N,C,H,W]; C is 1 if all images are grey, else 3; transparency is laid on white; cameras'
        orientation marks are obeyed. Without `size` all images must have one size; with it the shorter side is resized
        to `size` and the centre cropped. Hidden files are passed over; anything else that is not a readable
        8-bit still image raises ValueError listing the files, as do empty folders and more than `max_bytes`.
        """
        if size is not None and size < 1:
            raise ValueError(f"data: size is {size}; expected the pixels of one side, at least 1, or None")
        files, class_names = _find_files(Path(path))
        sizes, modes = _read_sizes(files)
        if size is None and len(set(sizes)) > 1:
            (width, height), _ = Counter(sizes).most_common(1)[0]
            rare = [f"{file}: {w}x{h}" for (file, _), (w, h) in zip(files, sizes, strict=True)
                    if (w, h) != (width, height)]
            raise _listing(f"{path}: images of {len(set(sizes))} sizes, most often {width}x{height} (width x height). "
                           "Set image_size (size=) to resize and crop them all. Others", rare)
        width, height = sizes[0] if size is None else (size, size)
        channels = 1 if set(modes) <= set(_GREY) else 3
        total = len(files) * channels * height * width
        if total > max_bytes:
            raise ValueError(f"{path}: {len(files)} images of {channels}x{height}x{width} take {total} bytes in "
                             f"memory, the limit is {max_bytes}. Use a smaller image_size (size=), or raise max_bytes")
        images = torch.empty(len(files), channels, height, width, dtype=torch.uint8)
        _decode(files, size, images)
        return cls(images, torch.tensor([label for _, label in files]), class_names, str(path))


def load_dataset(name, image_size=None):
    """The training data a config or the command line names: "digits", or a folder of images."""
    if name == "digits":
        if image_size not in (None, 8):
            raise ValueError(f"data: the digits are 8x8; image_size {image_size} has no effect on them. Remove it")
        return ImageDataset.digits("train")
    return ImageDataset.image_folder(name, image_size)


def _listing(message, problems):
    """A ValueError with the first few of `problems` and their number."""
    more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
    return ValueError(f"{message} ({len(problems)}):\n  " + "\n  ".join(problems[:8]) + more)


def _visible(folder):
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _find_files(path):
    """([(file, label)], class names) of an image folder."""
    if not path.is_dir():
        raise ValueError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; expected a folder of "
                         "images, or of one subfolder per class")
    entries = _visible(path)
    folders = [entry for entry in entries if entry.is_dir()]
    stray = [str(entry) for entry in entries if not entry.is_dir()]
    if folders and stray:
        raise _listing(f"{path}: files beside class folders; move each into the folder of its class", stray)
    classes = folders or [path]
    files = [(file, label) for label, folder in enumerate(classes) for file in _visible(folder)]
    nested = [str(file) for file, _ in files if file.is_dir()]
    if nested:
        raise _listing(f"{path}: folders inside class folders; expected images there", nested)
    labels = {label for _, label in files}
    empty = [str(folder) for label, folder in enumerate(classes) if label not in labels]
    if empty:
        raise _listing(f"{path}: folders without images; add images, or remove the folders", empty)
    return files, [folder.name for folder in folders] or ["0"]


def _pillow():
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("data: image folders are read with pillow; pip install 'difuse[demo]'") from error
    return Image, ImageOps


def _each_image(files, visit):
    """Call visit(index, image) for every file; afterwards raise one ValueError that lists all that failed."""
    Image, _ = _pillow()
    problems = []
    for index, (file, _) in enumerate(files):
        try:
            with Image.open(file) as image:
                visit(index, image)
        except Exception as error:  # pillow's decoders raise anything on damaged files; all are reported below
            empty = file.is_file() and file.stat().st_size == 0
            problems.append(f"{file}: {'empty file' if empty else str(error).replace(str(file), 'the file')}")
    if problems:
        raise _listing("files that are not readable images; mend them, or move them out of the folder", problems)


def _read_sizes(files):
    """[(width, height)] and [mode] of every file, from the headers alone."""
    sizes, modes = [], []

    def visit(_, image):
        if getattr(image, "n_frames", 1) > 1:
            raise ValueError(f"has {image.n_frames} frames; expected a still image")
        if image.mode not in _GREY + _COLOUR:
            raise ValueError(f"has pixel mode {image.mode!r}; expected 8 bits per channel")
        turned = image.getexif().get(0x0112) in _TURNED
        sizes.append(image.size[::-1] if turned else image.size)
        modes.append(image.mode)

    _each_image(files, visit)
    return sizes, modes


def _decode(files, size, images):
    """Fill images [N,C,H,W] uint8."""
    Image, ImageOps = _pillow()

    def visit(index, image):
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if images.shape[1] == 1 else "RGB")
        if size is not None:
            image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image))  # [H,W] or [H,W,3]
        images[index] = pixels if pixels.dim() == 2 else pixels.permute(2, 0, 1)

    _each_image(files, visit)
