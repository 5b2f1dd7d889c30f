"""What the parts share: their arguments, a deadline, rows that are written at once, precisions and images."""

from __future__ import annotations

import argparse
import csv
import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fedfmd.conv import DynamicConv2d
from fedfmd.data import Dataset, load_dataset

OUT_OF_TIME = "not run: out of time"


class Failure(str):
    """The status of what failed, other than for want of time or memory: the type and the first line of its error."""

    __slots__ = ()

    def __new__(cls, error: Exception) -> Failure:
        """Tell of an error."""
        return super().__new__(cls, f"failed: {type(error).__name__}: {error}".splitlines()[0])


class Precision(NamedTuple):
    """What PyTorch may round: TF32 in convolutions and in matrix products, bf16 in a forward pass."""

    conv_tf32: bool
    matmul_tf32: bool
    bf16: bool

    @contextmanager
    def flags(self) -> Iterator[None]:
        """Set PyTorch's switches for TF32, and set them back."""
        switches = torch.backends.cudnn, torch.backends.cuda.matmul
        before = [switch.allow_tf32 for switch in switches]
        for switch, value in zip(switches, self, strict=False):
            switch.allow_tf32 = value
        try:
            yield
        finally:
            for switch, value in zip(switches, before, strict=True):
                switch.allow_tf32 = value

    def autocast(self, device: str) -> AbstractContextManager:
        """The context of a forward pass."""
        return torch.autocast(device, torch.bfloat16, enabled=self.bf16)


PRECISIONS = {
    "fp32": Precision(conv_tf32=False, matmul_tf32=False, bf16=False),
    "tf32": Precision(conv_tf32=True, matmul_tf32=True, bf16=False),
    "bf16": Precision(conv_tf32=True, matmul_tf32=False, bf16=True),  # PyTorch's defaults, under autocast
}


@dataclass(frozen=True)
class Deadline:
    """A moment of `time.monotonic`."""

    moment: float

    @classmethod
    def after(cls, seconds: float) -> Deadline:
        """Return the deadline that many seconds from now."""
        return cls(time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds; negative once it has passed."""
        return self.moment - time.monotonic()

    @property
    def passed(self) -> bool:
        return self.left <= 0

    def share(self, groups: int) -> Deadline:
        """Return the deadline of the next of so many groups that share the time left."""
        return Deadline.after(self.left / groups)


class Table:
    """A CSV file that gets its rows one by one, each with date, device and PyTorch's version."""

    def __init__(self, path: Path, device: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="")
        self._about = {
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name() if device == "cuda" else device,
            "torch": torch.__version__,
        }

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def append(self, row: Mapping[str, object]) -> None:
        """Write a row, and before the first one the names of the columns."""
        writer = csv.writer(self._file)
        if self._file.tell() == 0:
            writer.writerow([*self._about, *row])
        writer.writerow([*self._about.values(), *row.values()])
        self._file.flush()


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all parts have."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    made.add_argument("--seconds", type=float, default=120, help="no new work is started after them")
    made.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    return made


def device_of(options: argparse.Namespace) -> str:
    """Return "cpu" for toys, otherwise "cuda"."""
    return "cpu" if options.toy else "cuda"


def precisions_of(device: str, *names: str) -> list[str]:
    """Return those of the precisions that the device has: there is no TF32 on the CPU."""
    return [name for name in names if device == "cuda" or name != "tf32"]


def set_mixing(model: nn.Module, mixing: str) -> None:
    """Force a way of mixing in all dynamic layers of a model, or in one layer."""
    for module in model.modules():
        if isinstance(module, DynamicConv2d):
            module.mixing = mixing


def synchronise(device: str) -> None:
    """Wait until the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def free(device: str) -> None:
    """Give back memory that nothing uses any more."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def placed(dataset: Dataset, device: str) -> Dataset:
    """Return the dataset with its images, still uint8, and labels on the device."""
    return replace(dataset, train=dataset.train.to(device), test=dataset.test.to(device))


def synthetic(train: int, test: int, size: int = 32, classes: int = 10) -> Dataset:
    """Return noisy images with a colour per class, as the project reads them from npz files."""
    random = np.random.default_rng(0)
    colours = random.integers(60, 196, (classes, 1, 1, 3))
    with TemporaryDirectory() as folder:
        paths = [Path(folder, f"{split}.npz") for split in ("train", "test")]
        for path, count in zip(paths, (train, test), strict=True):
            labels = np.arange(count) % classes
            noise = random.integers(-60, 60, (count, size, size, 3))
            np.savez(path, images=(colours[labels] + noise).astype(np.uint8), labels=labels)
        return load_dataset("npz", train=paths[0], test=paths[1])
