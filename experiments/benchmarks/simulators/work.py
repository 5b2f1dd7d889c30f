"""The work that all simulators do: the same network, shards, batches and optimiser, on random images."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from femnist_cnn import network as femnist_cnn
from torch import Tensor, nn

CLASSES = 10
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
SGD = partial(torch.optim.SGD, lr=0.001, momentum=0.9, nesterov=True, weight_decay=0.0005, fused=True)
"""As fedfmd trains by default; labels are random, so that only the time counts."""


@dataclass(frozen=True)
class Work:
    """Rounds in which `clients` train for one epoch each, on `workers` cores.

    Attributes:
        arch: network, as ``model.arch``.
        conv: convolution, as ``model.conv``.
        kernels: kernels per bank.
        size: height and width of the images in pixels.
        images: of each client.
        batch: images of a step.
        memory_format: of the images, as ``train.memory-format``: the one with which the network is faster.
        data: npz file with the images of all clients.
    """

    arch: str
    conv: str
    kernels: int
    size: int
    images: int
    batch: int
    memory_format: str = "contiguous"
    clients: int = 0
    rounds: int = 0
    workers: int = 1
    data: str = ""

    @classmethod
    def read(cls, path: str) -> Work:
        return cls(**json.loads(Path(path).read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    def make_data(self, path: Path, clients: int) -> Path:
        """Write random images for so many clients."""
        count = clients * self.images
        images = np.random.default_rng(0).integers(256, size=(count, self.size, self.size, 3), dtype=np.uint8)
        np.savez(path, images=images, labels=np.arange(count) % CLASSES)
        return path

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        if ":" in self.arch:
            return femnist_cnn(CLASSES, self.size)
        from fedfmd.models import make_model

        return make_model(self.arch, self.conv, CLASSES, kernels=self.kernels, norm="group")

    def train(self, model: nn.Module, images: Tensor, labels: Tensor) -> None:
        """One epoch of a client."""
        optimiser = SGD(model.parameters())
        model.train()
        for rows in torch.randperm(len(labels)).split(self.batch):
            optimiser.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimiser.step()


@lru_cache(maxsize=1)
def load_shards(work: Work) -> list[tuple[Tensor, Tensor]]:
    """Images B x 3 x H x W, normalised in advance, and labels of each client; once per process."""
    with np.load(work.data) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.25)
        images = images.contiguous(memory_format=MEMORY_FORMATS[work.memory_format])
        labels = torch.from_numpy(file["labels"]).long()
    return list(zip(images.split(work.images), labels.split(work.images), strict=True))


def clock(path: str) -> Callable[[], None]:
    """Return what notes in a file that a round is over."""
    file = Path(path).open("a")  # noqa: SIM115 - open to the end of the process

    def over() -> None:
        print(time.time(), file=file, flush=True)

    return over


def times(path: Path) -> Iterator[float]:
    """Seconds since 1970 at which rounds were over."""
    return map(float, path.read_text().split()) if path.exists() else iter(())
