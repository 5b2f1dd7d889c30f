r"""Images that are decoded on the way: how fast they come, and how much memory a run on more than fits needs.

    python experiments/benchmarks/streaming.py --out experiments/benchmarks/results/streaming.csv \
        --memory-out experiments/benchmarks/results/streaming-memory.csv

The images are JPEGs of 300 to 500 pixels, drawn by a seed. Fedfmd's stream and torchvision's ImageFolder with a
DataLoader, both with random resized crops of 224 pixels, mirrors and normalisation, take turns with 0, 1 and 2
processes that decode, on one thread each; a number is the median of several passes.

Then a real `fedfmd run` trains a small network on the whole folder: decoded on the way, in memory, and on the way with
an eighth of the images. The limit, `data.memory-gb`, is half of what the decoded images need. Its processes' memory is
looked at ten times a second: resident memory of the run's own process, and PSS of all, in which shared pages count
once.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
import yaml
from common import about, family, pss_of, table_of, write_rows
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from fedfmd.data import StreamedImages, batches, load_dataset
from fedfmd.runs.folder import environment

CLASSES = 10
SIZE = 224
BATCH_SIZE = 64
TEST_IMAGES = 100
EPOCHS = 1
LOOK_S = 0.1
NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def write_images(folder: Path, count: int, seed: int) -> None:
    """Smooth shapes with some noise, about as large on disk as photos of their size."""
    rng = np.random.default_rng(seed)
    for place in range(count):
        width, height = rng.integers(300, 501, 2).tolist()
        shapes = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
        pixels = np.asarray(shapes.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += rng.integers(-8, 9, (height, width, 1), np.int16)
        path = folder / f"{place % CLASSES}" / f"{place:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def ours(images: StreamedImages, workers: int) -> Iterable[tuple[Tensor, Tensor]]:
    """A pass of fedfmd's."""
    generator = torch.Generator().manual_seed(0)
    images = replace(images, workers=workers)
    return batches(images, BATCH_SIZE, generator=generator, augment="resized-crop+flip", **NORMAL)


def torchvisions(images: Dataset, workers: int) -> Iterable[tuple[Tensor, Tensor]]:
    """A pass of the usual kind."""
    return DataLoader(images, BATCH_SIZE, shuffle=True, num_workers=workers)


def images_per_second(passed: Iterable[tuple[Tensor, Tensor]]) -> float:
    started = time.perf_counter()
    seen = sum(len(labels) for _, labels in passed)
    return seen / (time.perf_counter() - started)


def compare_speed(folder: Path, count: int, repeats: int) -> Iterator[dict[str, object]]:
    """Images per second of both over the first images, taking turns."""
    recipe = [
        v2.RandomResizedCrop(SIZE, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(**NORMAL),
    ]
    theirs = Subset(ImageFolder(folder / "train", v2.Compose(recipe)), range(count))
    streamed = load_dataset("imagefolder", dir=folder, image_size=SIZE, streaming="always").train
    assert isinstance(streamed, StreamedImages)
    ways = {
        "fedfmd": partial(ours, streamed.subset(torch.arange(count))),
        "torchvision": partial(torchvisions, theirs),
    }
    speeds = {(name, workers): [] for workers in (0, 1, 2) for name in ways}
    for repeat in range(repeats + 1):
        for (name, workers), found in speeds.items():
            speed = images_per_second(ways[name](workers))
            if repeat:  # the first pass fills caches
                found.append(speed)
    for workers in (0, 1, 2):
        row: dict[str, object] = {"workers": workers}
        for name in ways:
            found = speeds[name, workers]
            row |= {f"{name}_per_s": round(median(found))}
            row |= {f"{name}_least": round(min(found)), f"{name}_most": round(max(found))}
        row["ratio"] = round(median(speeds["fedfmd", workers]) / median(speeds["torchvision", workers]), 2)
        yield row


def measure_memory(name: str, folder: Path, out: Path, limit_gb: float, streaming: str) -> dict[str, object]:
    """Peak memory of a run's training."""
    settings = {
        "kind": "centralised",
        "data": {"dataset": "imagefolder", "dir": str(folder), "image-size": SIZE},
        "data.streaming": streaming,
        "data.memory-gb": limit_gb,
        "model": {"arch": "resnet8", "conv": "static", "stem": "imagenet", "width": 0.25},
        "train": {"epochs": EPOCHS, "batch-size": 32},
        "threads": 1,
    }
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({"base": settings}))
    command = [str(Path(sys.executable).with_name("fedfmd")), "run", str(file), "--out", str(out)]
    peaks = np.zeros(2)
    with out.with_suffix(".txt").open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while run.poll() is None:
            if lines(out / "epochs.csv") <= EPOCHS:  # what follows is the report
                peaks = np.maximum(peaks, look(psutil.Process(run.pid)))
            time.sleep(LOOK_S)
    if run.returncode:
        sys.exit(out.with_suffix(".txt").read_text())
    images = sum(1 for _ in folder.glob("*/*/*.jpg"))
    with (out / "epochs.csv").open(newline="") as table:
        seconds = [float(row["wall_s"]) for row in csv.DictReader(table)]
    return {
        "run": name,
        "images": images,
        "decoded_mb": round(3 * images * SIZE**2 / 1e6),
        "limit_mb": round(1000 * limit_gb),
        "epoch_s": round(min(seconds), 1),
        "peak_rss_mb": round(peaks[0] / 1e6),
        "peak_pss_of_all_mb": round(peaks[1] / 1e6),
    }


def look(root: psutil.Process) -> tuple[float, float]:
    """Resident memory of a process, and PSS of it and all below."""
    with suppress(psutil.NoSuchProcess):
        return root.memory_info().rss, pss_of(family(root))
    return 0, 0


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def write(path: Path, rows: list[dict[str, object]], console: Console) -> None:
    cores = {"cores": environment()["machine"]["cores"]}
    write_rows(path, [about() | cores | row for row in rows])
    console.print(table_of(rows))


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    console = Console(width=140)
    with tempfile.TemporaryDirectory(prefix="fedfmd-streaming-") as scratch:
        whole, part = Path(scratch) / "whole", Path(scratch) / "part"
        for folder, count in ((whole, options.images), (part, options.images // 8)):
            write_images(folder / "train", count, seed=0)
            write_images(folder / "val", TEST_IMAGES, seed=1)
        limit_gb = 3 * (options.images + TEST_IMAGES) * SIZE**2 / 1e9 / 2
        speeds = list(compare_speed(whole, min(options.measured, options.images), options.repeats))
        write(options.out, speeds, console)
        runs = [
            ("streamed", whole, "auto"),
            ("in memory", whole, "never"),
            ("an eighth, streamed", part, "always"),
        ]
        memory = [
            measure_memory(name, folder, Path(scratch) / f"run-{place}", limit_gb, streaming)
            for place, (name, folder, streaming) in enumerate(runs)
        ]
        write(options.memory_out, memory, console)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=3200, help="images of the folder")
    parser.add_argument("--measured", type=int, default=800, help="images of a pass whose time is taken")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("streaming.csv"))
    parser.add_argument("--memory-out", type=Path, default=Path("streaming-memory.csv"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
