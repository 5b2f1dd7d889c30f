"""What training and evaluation see of images, those that are held in memory, and data sets of two or three parts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fedfmd.data.augmentation import Augmentation, Variation, read_augmentation


class Images(Protocol):
    """Labelled images of one square size, in memory (`ImageSet`) or decoded on the way (`StreamedImages`)."""

    @property
    def labels(self) -> Tensor:
        """The labels, int64 N, on `device`."""

    @property
    def size(self) -> int:
        """Height and width in pixels."""

    @property
    def device(self) -> torch.device:
        """Where the labels lie, and images that are in memory."""

    def __len__(self) -> int: ...

    def subset(self, indices: np.ndarray | Tensor) -> Images:
        """Return the images at `indices` (int64), in that order."""

    def passed(
        self, places: Iterable[Tensor], vary: Variation, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a batch for each of the `places` (int64 B): images uint8 B x 3 x size x size, varied, and labels B.

        Raises:
            ImageError: an image can't be read; the text names it.
        """

    def histograms(self) -> Tensor:
        """Count the pixels by channel and value: int64 3 x 256; of many streamed images, of a part of them."""

    def in_memory(self) -> ImageSet:
        """Return the images with all pixels in memory."""

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield what tells these images from others."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images in memory: `images` uint8 N x 3 x H x W, `labels` int64 N."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[-1]

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.images.device

    def subset(self, indices: np.ndarray | Tensor) -> ImageSet:
        """Return a copy of the images at `indices` (int64), in that order."""
        chosen = torch.as_tensor(indices)
        return ImageSet(self.images[chosen], self.labels[chosen])

    def passed(
        self, places: Iterable[Tensor], vary: Variation, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield varied batches; a batch at a time is on the device, as the images may need more memory than it has."""
        for chosen in places:
            pixels = self.images[chosen].to(device)
            yield vary.batch(pixels, chosen), self.labels[chosen].to(device)

    def histograms(self) -> Tensor:
        """Count the pixels by channel and value: int64 3 x 256."""
        return histograms(self.images)

    def in_memory(self) -> ImageSet:
        """Return these images."""
        return self

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield shapes and values of images and labels."""
        for tensor in (self.images, self.labels):
            yield repr(tuple(tensor.shape)).encode()
            yield tensor.cpu().contiguous().numpy().data

    def to(self, device: torch.device | str) -> ImageSet:
        """Return these images on the device."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of images and labels."""
        return self.images.nbytes + self.labels.nbytes


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
    train: Images
    test: Images
    classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augmentation
    validation: Images | None = None

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
        """Short hex digest of all images and labels: the same content has the same fingerprint.

        Of streamed images only size and labels count, from which splits follow.
        """
        digest = hashlib.blake2b(digest_size=8)
        for part in filter(None, (self.train, self.test, self.validation)):
            for piece in part.content():
                digest.update(piece)
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
    mean, std = channel_statistics(train.histograms())
    return replace(dataset, train=train, mean=mean, std=std, validation=validation)


def histograms(images: Tensor) -> Tensor:
    """Count the pixels of uint8 images N x C x H x W by channel and value: int64 C x 256."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])


def channel_statistics(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels scaled to 0..1, from their `histograms`.

    These are exact, so that the result depends neither on the number of threads nor on the order of images.
    """
    levels = torch.arange(256, dtype=torch.float64) / 255
    share = counts.double()
    share /= share.sum(1, keepdim=True)
    mean = (share * levels).sum(1)
    variance = (share * (levels - mean[:, None]) ** 2).sum(1)
    # a constant channel has no spread to divide by; one grey level stands in for it
    return tuple(mean.tolist()), tuple(variance.sqrt().clamp_min(1 / 255).tolist())
