"""Image sets held in memory as uint8 tensors, and reading one from a file or a folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor

from fedfmd.data.augmentation import Augmentation, read_augmentation
from fedfmd.data.files import read_npz

FOLDER_IMAGE_SIZE = 64
MAX_PIXELS = 64_000_000  # of an image file: a tiny one can claim any number


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images: `images` uint8 N x 3 x H x W, `labels` int64 N."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[-1]

    def subset(self, indices: np.ndarray | Tensor) -> ImageSet:
        """Return a copy of the images at `indices` (int64), in that order."""
        chosen = torch.as_tensor(indices)
        return ImageSet(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True)
class ImageFormat:
    """What images must be like to be those of a model: all that somebody needs who has none of a run's own.

    Attributes:
        class_names: the classes by label.
        image_size: height and width in pixels.
        mean, std: per channel, of pixel values scaled to 0..1, by which images are normalised.
        augment: how training images are varied at random.
    """

    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation

    @classmethod
    def from_lists(cls, values: Mapping[str, Any]) -> ImageFormat:
        """Return the format whose tuples came back as lists, from JSON or from a message.

        Raises:
            ValueError: an augmentation that is not known.
        """
        tuples: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**tuples | {"augment": read_augmentation(values["augment"])})


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set over the same classes, with images of one square size.

    `mean` and `std` are the training set's, per channel, of pixel values scaled to 0..1.
    `augment` says how training images are varied at random.
    `validation` are images that were held out of the training set (see `hold_out`), None if there are none.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation
    validation: ImageSet | None = None

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.train.size

    @property
    def format(self) -> ImageFormat:
        """What other images must be like to go with these."""
        return ImageFormat(self.class_names, self.image_size, self.mean, self.std, self.augment)

    @cached_property
    def fingerprint(self) -> str:
        """Short hex digest of all images and labels: the same content has the same fingerprint."""
        digest = hashlib.blake2b(digest_size=8)
        for part in filter(None, (self.train, self.test, self.validation)):
            for tensor in (part.images, part.labels):
                digest.update(repr(tuple(tensor.shape)).encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


def hold_out(dataset: Dataset, amount: float, seed: int) -> Dataset:
    """Move training images into `validation`; `mean` and `std` become those of the images that stay.

    Each class gives its share, rounded so that the total is right, and keeps at least one image. Images stay
    in their order. The same arguments hold out the same images.

    Args:
        dataset: without validation images; it stays as it is.
        amount: a share of the training images below 1, or how many.
        seed: of the draw.

    Raises:
        ValueError: none would be held out, or too few stay; one line that names the setting `data.validation`.
    """
    labels = dataset.train.labels.numpy()
    counts = np.bincount(labels, minlength=dataset.classes)
    number = round(amount * len(labels)) if amount < 1 else int(amount)
    most = len(labels) - np.count_nonzero(counts)
    if not 1 <= number <= most:
        raise ValueError(
            f"data.validation = {amount:g}: would hold out {number:,} of {len(labels):,} training images, and each "
            f"class keeps at least one: hold out 1 to {most:,}, as a number or as a share below 1"
        )
    wanted = number * counts / len(labels)
    given = wanted.astype(int)
    while given.sum() < number:
        given[np.argmax(np.where(given < counts - 1, wanted - given, -np.inf))] += 1
    order = np.random.default_rng(seed).permutation(len(labels))
    held = np.zeros(len(labels), bool)
    for label, count in enumerate(given):
        held[order[labels[order] == label][:count]] = True
    train, validation = (dataset.train.subset(np.flatnonzero(chosen)) for chosen in (~held, held))
    mean, std = channel_statistics(train.images)
    return replace(dataset, train=train, mean=mean, std=std, validation=validation)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images N x C x H x W, scaled to 0..1.

    Computed from exact histograms, so that the result does not depend on the number of threads.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    share /= share.sum(1, keepdim=True)
    mean = (share * levels).sum(1)
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    # a constant channel has no spread to divide by; one grey level stands in for it
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(1 / 255).tolist())


def fit(images: Tensor, size: int, interpolation: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """Resize the short side and cut the centre: uint8 N x C x H x W to N x C x size x size."""
    from torchvision.transforms import InterpolationMode, functional

    mode = InterpolationMode(interpolation)
    # in chunks, because resizing may pass through float32
    resized = (functional.resize(chunk, [size], mode) for chunk in images.split(1024))
    return torch.cat([functional.center_crop(chunk, [size]) for chunk in resized])


def read_image(path: Path, size: int) -> Tensor:
    """Decode a file in RGB and `fit` it: uint8 3 x size x size.

    Raises:
        ValueError: one line that starts with the path.
    """
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    try:
        with Image.open(path) as file:
            pixels = math.prod(file.size)
            image = file.convert("RGB") if pixels <= MAX_PIXELS else None
    except Image.DecompressionBombError:
        image = None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all of them
        raise ValueError(f"{path}: not a readable image ({error}); replace or remove it") from None
    if image is None:
        raise ValueError(
            f"{path}: has more than {MAX_PIXELS / 1e6:.0f} million pixels, and would need gigabytes; shrink or "
            "remove it"
        )
    return fit(pil_to_tensor(image)[None], size)[0]


def load_image_set(
    path: Path, image_size: int | None = None, class_names: Sequence[str] | None = None
) -> ImageSet:
    """Read an npz file or a folder with one sub-folder of images per class.

    An npz file holds `images` uint8 N x H x W x 3 and `labels` integers N. Its images keep their size unless
    `image_size` is given. A folder's images are decoded once, into memory; the short side is resized and the
    centre cut to `image_size` (64 unless given).

    Args:
        path: the file or the folder.
        image_size: height and width of the result in pixels.
        class_names: the classes by label. A folder may hold some of them only, as one client's own data may;
            without the names, its sorted sub-folders are the classes.

    Raises:
        ValueError: one line that starts with the path and says what is wrong with the data.
    """
    if path.is_dir():
        return _read_folder(path, image_size or FOLDER_IMAGE_SIZE, class_names)
    if path.is_file():
        return _read_npz(path, image_size, class_names)
    raise ValueError(f"{path}: no such file or folder; give an npz file or a folder of class folders")


def _read_npz(path: Path, image_size: int | None, class_names: Sequence[str] | None) -> ImageSet:
    pixels, labels = read_npz(path, "images", "labels")
    return image_set(pixels, labels, str(path), image_size, class_names)


def image_set(
    pixels: np.ndarray,
    labels: np.ndarray,
    source: str,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
) -> ImageSet:
    """Check pixels uint8 N x H x W x 3 and labels integers N, and return them, resized to `image_size` where given.

    Raises:
        ValueError: one line that starts with their `source` and says what is wrong with them.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(
            f"{source}: 'images' must be uint8 N x H x W x 3, not {pixels.dtype} {_shape(pixels)}"
        )
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"{source}: 'labels' must be integers of shape N, not {labels.dtype} {_shape(labels)}"
        )
    if len(pixels) != len(labels):
        raise ValueError(
            f"{source}: {len(pixels)} images but {len(labels)} labels; each image needs one label"
        )
    if not pixels.size:
        raise ValueError(f"{source}: holds no images ({_shape(pixels)})")
    if labels.min() < 0:
        raise ValueError(f"{source}: label {labels.min()} is negative; classes count from 0")
    if class_names is not None and labels.max() >= len(class_names):
        raise ValueError(
            f"{source}: label {labels.max()} is outside the classes 0..{len(class_names) - 1}; "
            "relabel or remove those images"
        )
    if image_size is None and pixels.shape[1] != pixels.shape[2]:
        raise ValueError(
            f"{source}: images of {_shape(pixels[0])} are not square; set data.image-size to cut them"
        )
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    if image_size is not None and images.shape[2:] != (image_size, image_size):
        images = fit(images, image_size)
    return ImageSet(images, torch.from_numpy(labels.astype(np.int64)))


def class_folders(path: Path) -> list[str]:
    """Return the names of a folder's sub-folders, sorted; not hidden ones, such as .ipynb_checkpoints."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_folder(path: Path, image_size: int, class_names: Sequence[str] | None) -> ImageSet:
    from torchvision.datasets.folder import make_dataset

    found = class_folders(path)
    names = found if class_names is None else list(class_names)
    if not found:
        raise ValueError(f"{path}: has no class folders")
    if unknown := sorted(set(found) - set(names)):
        raise ValueError(
            f"{path}: class folders {', '.join(unknown)} are not among {', '.join(names)}; rename or remove them"
        )
    labels = {name: names.index(name) for name in found}
    try:
        samples = make_dataset(path, labels, is_valid_file=_is_shown)
    except FileNotFoundError as error:  # a class folder without images
        raise ValueError(f"{path}: {error}") from None
    needed, free = 3 * len(samples) * image_size**2, psutil.virtual_memory().available
    if needed > free:
        raise ValueError(
            f"{path}: {len(samples):,} images of {image_size} pixels need {needed / 1e9:,.1f} GB of memory, and "
            f"{free / 1e9:,.1f} GB are free: set a smaller data.image-size, or take fewer images"
        )
    images = torch.empty(len(samples), 3, image_size, image_size, dtype=torch.uint8)
    files = [Path(file) for file, _ in samples]
    with ThreadPoolExecutor() as pool:  # decoding lets go of Python's lock
        for index, image in enumerate(pool.map(partial(read_image, size=image_size), files)):
            images[index] = image
    return ImageSet(images, torch.tensor([label for _, label in samples]))


def _is_shown(file: str) -> bool:
    """Whether it is an image, and not hidden as macOS's ._x.png is."""
    from torchvision.datasets.folder import is_image_file

    return not Path(file).name.startswith(".") and bool(is_image_file(file))


def _shape(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape)) or "scalar"
