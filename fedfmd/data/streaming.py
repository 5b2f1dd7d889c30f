"""Images that are decoded on the way into training, ahead of it by processes of their own: none stays in memory.

Which images a pass has, and how each is varied, is drawn before it begins (see `draw_augmentation`). So nothing depends
on how many processes decode.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils import data

from fedfmd.data.augmentation import Fitted, Variation
from fedfmd.data.images import Dataset, Images, ImageSet, histograms
from fedfmd.errors import ImageError, RunError, one_line
from fedfmd.processes import end_with_parent

STREAMING = ("auto", "always", "never")
MEMORY_GB = 4.0

MEASURED_IMAGES = 4096
"""Whose pixels tell mean and standard deviation of streamed images."""

PREFETCHED = 2
"""Batches that each process decodes ahead."""

BATCH = 256
"""Images decoded together where the caller names no batches."""


class Pictures(Protocol):
    """Where images come from, each as large as it is: files, or a user's own data set."""

    @property
    def source(self) -> str:
        """What to call them in an error."""

    def __getitem__(self, index: int) -> Tensor:
        """Decode an image, uint8 3 x H x W.

        Raises:
            ImageError: it can't be read; the text names it.
        """

    def check(self) -> None:
        """Look at all that can be told quickly without decoding.

        Raises:
            ImageError: an image can't be read; the text names it.
        """


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Labelled images, `labels` int64 N, that are the `pictures` at `indices` (int64 N), brought to `size` pixels.

    They are decoded by `workers` processes; with 0 by the process that asks for them, on its PyTorch's threads.
    """

    pictures: Pictures
    indices: Tensor
    labels: Tensor
    size: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        """Where the labels lie."""
        return self.labels.device

    @property
    def decoded_bytes(self) -> int:
        """The memory that all of them would need."""
        return 3 * len(self) * self.size**2

    def subset(self, indices: np.ndarray | Tensor) -> StreamedImages:
        """Return the images at `indices` (int64), in that order."""
        chosen = torch.as_tensor(indices)
        return replace(self, indices=self.indices[chosen], labels=self.labels[chosen])

    def passed(
        self, places: Iterable[Tensor], vary: Variation, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield varied batches, of which some are decoded ahead.

        Raises:
            ImageError: an image can't be read; the text names it.
            RunError: a process that decodes has died.
        """
        batches = list(places)
        loaded = iter(self._loader([chosen.tolist() for chosen in batches], vary, torch.device(device)))
        for chosen in batches:
            try:
                pixels = next(loaded)
            except RuntimeError as error:  # of the loader: a process was killed, or found no shared memory
                raise RunError(
                    f"{self.pictures.source}: decoding images failed ({one_line(error)}): give the same command again, "
                    "with fewer data.workers if memory was short"
                ) from error
            if isinstance(pixels, ImageError):
                raise pixels
            yield pixels.to(device, non_blocking=True), self.labels[chosen].to(device)

    def histograms(self) -> Tensor:
        """Count the pixels of up to `MEASURED_IMAGES` images, spread evenly: int64 3 x 256."""
        measured = torch.linspace(
            0, len(self) - 1, min(len(self), MEASURED_IMAGES), dtype=torch.float64
        ).long()
        counts = torch.zeros(3, 256, dtype=torch.int64)
        for pixels, _ in self.passed(measured.split(BATCH), Fitted(self.size)):
            counts += histograms(pixels)
        return counts

    def in_memory(self) -> ImageSet:
        """Decode all images.

        Raises:
            ImageError: an image can't be read; the text names it.
            ValueError: the memory is too small for them.
        """
        free = psutil.virtual_memory().available
        if self.decoded_bytes > free:
            raise ValueError(
                f"{self.pictures.source}: {len(self):,} images of {self.size} pixels need "
                f"{self.decoded_bytes / 1e9:,.1f} GB of memory, and {free / 1e9:,.1f} GB are free: set "
                "data.streaming=always, a smaller data.image-size, or take fewer images"
            )
        images = torch.empty(len(self), 3, self.size, self.size, dtype=torch.uint8)
        everything = torch.arange(len(self)).split(BATCH)
        for places, (pixels, _) in zip(everything, self.passed(everything, Fitted(self.size)), strict=True):
            images[places] = pixels
        return ImageSet(images, self.labels)

    def content(self) -> Iterator[bytes | memoryview]:
        """Yield size and labels."""
        yield repr(self.size).encode()
        yield self.labels.numpy().data

    def _loader(
        self, batches: Sequence[list[int]], vary: Variation, device: torch.device
    ) -> data.DataLoader[Tensor | ImageError]:
        # daemonic processes can have no children, and only on Linux does a process start as a cheap copy of this one
        able = sys.platform == "linux" and not multiprocessing.current_process().daemon
        workers = self.workers if able else 0
        how: dict[str, Any] = {}
        if workers:
            how = {
                "num_workers": min(workers, len(batches)),
                "prefetch_factor": PREFETCHED,
                "multiprocessing_context": "fork",
                "worker_init_fn": _end_with_parent,
            }
        return data.DataLoader(
            _Varied(self.pictures, self.indices, vary),
            batch_sampler=batches,
            collate_fn=_unchanged,
            generator=torch.Generator(),  # what it draws is of no use here, and PyTorch's own draws must not move
            pin_memory=device.type == "cuda",
            **how,
        )


@dataclass(frozen=True)
class Streaming:
    """Which images are decoded on the way: with mode `auto`, those that need more than `memory_gb` in memory."""

    mode: str = "auto"
    memory_gb: float = MEMORY_GB

    def wanted(self, *parts: StreamedImages) -> bool:
        """Whether the parts of a data set are streamed; this depends on nothing else, as results do on it."""
        if self.mode == "auto":
            return sum(part.decoded_bytes for part in parts) > self.memory_gb * 1e9
        return self.mode == "always"


IN_MEMORY = Streaming("never")


def place(images: StreamedImages, streamed: bool) -> Images:
    """Return the images as they are, once it is clear that they can be opened, or with all pixels in memory.

    Raises:
        ValueError: an image can't be read, or the memory is too small.
    """
    if not streamed:
        return images.in_memory()
    images.pictures.check()
    return images


def decoded_by(dataset: Dataset, workers: int) -> Dataset:
    """Return the data set with its streamed images decoded by so many processes."""
    parts = {"train": dataset.train, "test": dataset.test, "validation": dataset.validation}
    streamed = {
        name: replace(part, workers=workers)
        for name, part in parts.items()
        if isinstance(part, StreamedImages)
    }
    return replace(dataset, **streamed)  # type: ignore[arg-type]  # names of fields


@dataclass(frozen=True, eq=False)
class _Varied(data.Dataset[Tensor]):
    """The batches of a pass, by the places of their images."""

    pictures: Pictures
    indices: Tensor
    vary: Variation

    def __getitems__(self, places: list[int]) -> Tensor | ImageError:
        """Return images uint8 B x 3 x S x S; an error as a value, since the loader changes those that are raised."""
        threads = torch.get_num_threads()
        try:
            if threads == 1 or len(places) == 1:
                return torch.stack([self._image(place) for place in places])
            with ThreadPoolExecutor(threads) as pool:  # decoding lets go of Python's lock
                return torch.stack(list(pool.map(self._image, places)))
        except ImageError as error:
            return error

    def _image(self, place: int) -> Tensor:
        return self.vary.image(self.pictures[int(self.indices[place])], place)


def _unchanged(batch: Any) -> Any:
    return batch


def _end_with_parent(_worker: int) -> None:
    """Have this process killed when its parent is: it would hold the run's folder for some seconds more."""
    end_with_parent()
