"""The datasets that a run can name: `digits`, `cifar10`, `cifar100`, `npz`, `imagefolder`, or a user's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from fedfmd.data.augmentation import AUGMENTATIONS, Augmentation, fit, read_augmentation
from fedfmd.data.images import Dataset, Images, ImageSet, channel_statistics
from fedfmd.data.loading import check_labels, class_folders, image_folder, image_set, load_image_set
from fedfmd.data.streaming import IN_MEMORY, MEMORY_GB, STREAMING, StreamedImages, Streaming, place
from fedfmd.errors import ImageError, need, not_one_of
from fedfmd.own_code import call, find, is_own, running

AUTO = "auto"
AUGMENT_CHOICES = (AUTO, *AUGMENTATIONS)

DIGITS_SIZE = 16
MAX_LISTED = 20  # labels in a message


@dataclass(frozen=True)
class Source:
    """Where a dataset comes from: the settings `data.*`, of which each loader reads those that it needs."""

    dir: Path | None
    train: Path | None
    test: Path | None
    download: bool
    image_size: int | None
    classes: int | None
    streaming: Streaming = IN_MEMORY


FROM_FILES = ("npz", "imagefolder")
"""Data sets whose files `data.train` and `data.test` name."""


def load_dataset(
    name: str,
    *,
    dir: Path | None = None,
    train: Path | None = None,
    test: Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    augment: str = AUTO,
    classes: int | None = None,
    streaming: str = "auto",
    memory_gb: float = MEMORY_GB,
) -> Dataset:
    """Load a dataset of the registry `DATASETS`, into memory unless its images are to be decoded on the way.

    Args:
        name: `digits` (comes with scikit-learn), `cifar10`, `cifar100`, `npz`, `imagefolder`, or ``module:function``
            of a user's own (see `_own`).
        dir: folder of the CIFAR files, or of an image folder's `train/` and `val/` (or `test/`).
        train: npz file or image folder of the training set.
        test: npz file or image folder of the test set.
        download: fetch missing or damaged CIFAR files into `dir`.
        image_size: height and width in pixels; by default digits have 16, image folders 64, others their own.
        augment: how training images are varied at random; `auto`: by `crop` for digits, by `resized-crop+flip` for
            images that are decoded on the way, else by `crop+flip`.
        classes: how many classes the labels of npz files, or of a user's own source, stand for, if some of them have
            no training images.
        streaming: whether images of files, or of a user's own `torch.utils.data.Dataset`, are decoded on the way:
            `always`, `never`, or `auto`, where training and test set need more than `memory_gb` in memory.
        memory_gb: see `streaming`.

    Raises:
        ValueError: one line that names the setting, its value and the fix.
    """
    if name not in DATASETS and not is_own(name):
        raise ValueError(f"data.dataset = '{name}' is unknown: choose one of {', '.join(DATASETS)}")
    if augment not in AUGMENT_CHOICES:
        raise ValueError(f"data.augment = {augment!r}: {not_one_of(augment, AUGMENT_CHOICES)}")
    if classes is not None and name != "npz" and not is_own(name):
        raise ValueError(f"data.classes = {classes} is for data.dataset = 'npz' alone; leave it out")
    for setting, path in (("train", train), ("test", test)):
        if path is not None and name not in FROM_FILES and not is_own(name):
            raise ValueError(
                f"data.{setting} = {path} and data.dataset = '{name}', which has its own images: leave it out, or set "
                f"data.dataset to {' or '.join(FROM_FILES)}"
            )
    if streaming not in STREAMING:
        raise ValueError(f"data.streaming = {streaming!r}: {not_one_of(streaming, STREAMING)}")
    if streaming == "always" and name != "imagefolder" and not is_own(name):
        raise ValueError(
            f"data.streaming = 'always' and data.dataset = '{name}', whose images come in arrays: leave it out"
        )
    source = Source(dir, train, test, download, image_size, classes, Streaming(streaming, memory_gb))
    dataset = _own(name, source) if is_own(name) else DATASETS[name](source)
    return dataset if augment == AUTO else replace(dataset, augment=read_augmentation(augment))


def _digits(source: Source) -> Dataset:
    """1797 handwritten digits of 8 x 8 grey levels 0..16 (scikit-learn's), split 80:20 with a fixed seed.

    Each is enlarged to the canvas, white on black, the same in all three channels. Bicubic interpolation stands
    between smooth and blocky: who learns from it also knows digits that were enlarged in another way. A mirrored
    digit is another sign: they are only shifted.
    """
    need("data.dataset = 'digits'", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    size = source.image_size or DIGITS_SIZE
    digits = load_digits()
    own = digits.images.shape[-1]
    if size < own:
        raise ValueError(f"data.image-size = {size}: digits need at least {own}")
    grey = (torch.from_numpy(digits.images).float()[:, None] * (255 / 16)).round().byte()
    everything = ImageSet(
        fit(grey, size, "bicubic").expand(-1, 3, -1, -1), torch.from_numpy(digits.target).long()
    )
    train, test = train_test_split(
        torch.arange(len(everything)).numpy(), test_size=0.2, stratify=digits.target, random_state=0
    )
    names = [str(digit) for digit in digits.target_names]
    return _dataset("digits", everything.subset(train), everything.subset(test), names, augment="crop")


def _cifar(name: str, source: Source) -> Dataset:
    """CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), read, fetched and verified by torchvision."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    if source.dir is None:
        raise ValueError(
            f"data.dir is not set: data.dataset = '{name}' needs the folder that holds {kind.base_folder}/; "
            "with data.download = true the files are fetched into it"
        )
    if fault := _cifar_fault(kind, source.dir):
        if not source.download:
            raise ValueError(f"data.dir = {source.dir}: {fault}")
        try:
            kind(source.dir, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"data.download = true: fetching {name} failed ({error}); check the network, or put "
                f"{kind.base_folder}/ into data.dir = {source.dir} by other means"
            ) from None
    parts = [kind(source.dir, train=train) for train in (True, False)]
    train, test = (
        ImageSet(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    )
    if source.image_size is not None:
        train, test = (ImageSet(fit(part.images, source.image_size), part.labels) for part in (train, test))
    return _dataset(name, train, test, parts[0].classes, augment="crop+flip")


def _cifar_fault(kind: Any, folder: Path) -> str:
    """Tell what is wrong with the files and how to mend it, or nothing; torchvision reports all faults alike."""
    from torchvision.datasets.utils import check_integrity

    base = kind.base_folder
    for file, checksum in [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]:
        path = folder / base / file
        if not path.is_file():
            return (
                f"has no {base}/{file}; set data.dir to the folder that holds {base}/, or data.download = "
                "true to fetch it"
            )
        if not check_integrity(path, checksum):
            return (
                f"{base}/{file} is damaged (its checksum differs); delete {base}/ and set data.download = "
                "true to fetch it anew"
            )
    return ""


def _npz(source: Source) -> Dataset:
    """Two npz files (see `load_image_set`); unless it is told, the training labels tell how many classes there are."""
    train_path, test_path = _given("data.train", source.train), _given("data.test", source.test)
    train = _load("data.train", train_path, source.image_size, None)
    names = [
        str(label) for label in range(_classes(train.labels, f"data.train = {train_path}", source.classes))
    ]
    test = _load("data.test", test_path, source.image_size, names)
    return _dataset("npz", train, test, names, augment="crop+flip")


def _own(name: str, source: Source) -> Dataset:
    """Call a user's own function, which returns a training and a test set.

    Each is `(images, labels)`, arrays as in npz files, or a `torch.utils.data.Dataset` (see `_OwnPictures`). It gets
    what it has arguments for of the settings `data.*`: dir, train and test (paths, or None) and image_size.
    """
    setting = f"data.dataset = {name!r}"
    offered = {key: getattr(source, key) for key in ("dir", "train", "test", "image_size")}
    made = call("data.dataset", name, offered=offered)
    if isinstance(made, Sequence) and made and all(isinstance(part, data.Dataset) for part in made):
        return _own_pictures(name, source, made)
    if source.streaming.mode == "always":
        raise ValueError(f"data.streaming = 'always' and {setting}, which returns arrays: leave it out")
    try:
        arrays = [tuple(np.asarray(array) for array in pair) for pair in made]
        (pixels, labels), (test_pixels, test_labels) = arrays
    except (TypeError, ValueError):
        raise ValueError(
            f"{setting} must return (images, labels), (test images, test labels), or two datasets of torch's, and "
            f"returned a {type(made).__name__} of another form"
        ) from None
    train = image_set(pixels, labels, f"{setting}, training set", source.image_size)
    classes = _classes(train.labels, f"{setting}, training set", source.classes)
    names = [str(label) for label in range(classes)]
    test = image_set(test_pixels, test_labels, f"{setting}, test set", source.image_size, names)
    return _dataset(name, train, test, names, augment="crop+flip")


@dataclass(frozen=True, eq=False)
class _OwnPictures:
    """A user's own map-style dataset of (uint8 tensor 3 x H x W or PIL image, label), with the labels in `targets`."""

    source: str
    dataset: Any
    function: Any

    def __getitem__(self, index: int) -> Tensor:
        """Return an image, uint8 3 x H x W.

        Raises:
            ImageError: the user's code fails, or returns something else.
        """
        from PIL import Image
        from torchvision.transforms.functional import pil_to_tensor

        with running(f"{self.source}: image {index} fails", ImageError, self.function):
            image, _ = self.dataset[index]
            if isinstance(image, Image.Image):
                image = pil_to_tensor(image.convert("RGB"))
        if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3 and len(image) == 3:
            return image
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ImageError(
            f"{self.source}: image {index} must be a uint8 tensor 3×H×W or a PIL image, and is {what}"
        )

    def check(self) -> None:
        """Look at the first image."""
        self[0]


def _own_pictures(name: str, source: Source, made: Sequence[Any]) -> Dataset:
    setting = f"data.dataset = {name!r}"
    if len(made) != 2:
        raise ValueError(
            f"{setting} must return a training and a test set, and returned {len(made)} datasets"
        )
    function = find("data.dataset", name)
    parts: list[StreamedImages] = []
    names: list[str] | None = None
    for what, part in zip(("training set", "test set"), made, strict=True):
        pictures = _OwnPictures(f"{setting}, {what}", part, function)
        if not hasattr(part, "targets") or not hasattr(part, "__len__"):
            raise ValueError(f"{pictures.source}: needs a length, and the labels of its images in `targets`")
        labels = check_labels(np.asarray(part.targets), len(part), pictures.source, names)
        names = names or [str(label) for label in range(_classes(labels, pictures.source, source.classes))]
        size = source.image_size or _square(pictures)
        parts.append(StreamedImages(pictures, torch.arange(len(part)), labels, size))
    streamed = source.streaming.wanted(*parts)
    train, test = (place(part, streamed) for part in parts)
    assert names is not None
    return _dataset(name, train, test, names, augment=_usual(streamed))


def _square(pictures: _OwnPictures) -> int:
    """Return the size of the first image, which stands for all."""
    height, width = pictures[0].shape[1:]
    if height != width:
        raise ValueError(
            f"{pictures.source}: its first image, of {height}×{width}, is not square; set data.image-size"
        )
    return int(height)


def _usual(streamed: bool) -> Augmentation:
    """Return how images that may be mirrored are varied."""
    return "resized-crop+flip" if streamed else "crop+flip"


def _given(setting: str, path: Path | None) -> Path:
    if path is None:
        raise ValueError(f"{setting} is not set: data.dataset = 'npz' needs data.train and data.test")
    return path


def _classes(labels: Tensor, source: str, wanted: int | None) -> int:
    """How many classes training labels stand for; a wrong label must not make thousands of classes."""
    found = labels.unique()
    classes = wanted or len(found)
    if int(found[-1]) < classes:
        return classes
    if wanted:
        raise ValueError(
            f"{source}: label {int(found[-1])} is outside the classes 0..{classes - 1} of "
            f"data.classes = {classes}; relabel or remove those images"
        )
    listed = ", ".join(map(str, found[:MAX_LISTED].tolist())) + (", …" if len(found) > MAX_LISTED else "")
    missing = next(label for label, known in enumerate(found.tolist()) if label != known)
    raise ValueError(
        f"{source}: labels must be 0, 1, 2, … without gaps, but {missing} has no image and the "
        f"largest is {int(found[-1])} (found {listed}); relabel them, or set data.classes if the others are to come"
    )


def _imagefolder(source: Source) -> Dataset:
    """Folders with one sub-folder of images per class (see `load_image_set`)."""
    train_path = _folder("data.train", source.train, source.dir, ("train",))
    test_path = _folder("data.test", source.test, source.dir, ("val", "test"))
    names, test_names = map(class_folders, (train_path, test_path))
    if names != test_names:
        differing = ", ".join(sorted(set(names) ^ set(test_names)))
        raise ValueError(f"data.test = {test_path}: must have data.train's classes, but {differing} differ")
    paths = {"data.train": train_path, "data.test": test_path}
    parts = {}
    for setting, path in paths.items():
        with _naming(setting):
            parts[setting] = image_folder(path, source.image_size, names)
    streamed = source.streaming.wanted(*parts.values())
    placed = []
    for setting, part in parts.items():
        with _naming(setting):
            placed.append(place(part, streamed))
    train, test = placed
    return _dataset("imagefolder", train, test, names, augment=_usual(streamed))


def _folder(setting: str, path: Path | None, root: Path | None, names: Sequence[str]) -> Path:
    """Return the folder that the setting names, or else the first of the sub-folders that `data.dir` has."""
    if path is not None:
        if not path.is_dir():
            raise ValueError(
                f"{setting} = {path}: no such folder; it needs one sub-folder of images per class"
            )
        return path
    if root is None:
        raise ValueError(
            f"{setting} is not set: data.dataset = 'imagefolder' needs data.dir, or data.train and data.test"
        )
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise ValueError(f"data.dir = {root}: has no folder {' or '.join(names)}; make one, or set {setting}")


def _load(setting: str, path: Path, image_size: int | None, class_names: Sequence[str] | None) -> Images:
    with _naming(setting):
        return load_image_set(path, image_size, class_names)


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Put the setting before errors whose text starts with its value, a path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{setting} = {error}") from None


def _dataset(
    name: str, train: Images, test: Images, names: Sequence[str], *, augment: Augmentation
) -> Dataset:
    sizes = [images.size for images in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"data.train has images of {sizes[0]} pixels but data.test of {sizes[1]}; set data.image-size"
        )
    mean, std = channel_statistics(train.histograms())
    return Dataset(name, train, test, len(names), tuple(names), mean, std, augment)


DATASETS: dict[str, Callable[[Source], Dataset]] = {
    "digits": _digits,
    "cifar10": partial(_cifar, "cifar10"),
    "cifar100": partial(_cifar, "cifar100"),
    "npz": _npz,
    "imagefolder": _imagefolder,
}
