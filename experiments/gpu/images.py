"""Pack image sets into few files of limited size, without loss, and join them on the other side.

    python experiments/gpu/images.py pack FOLDER PARTS --part-mib 50
    python experiments/gpu/images.py join PARTS FOLDER

FOLDER holds cifar10_train.npz and cifar10_test.npz: `images` uint8 N × H × W × 3 and `labels` N. PARTS gets
part-1.zip, part-2.zip, …: sheets of 1000 images as lossless WebP, with their labels. All of CIFAR-10 needs two
parts of 48.6 MiB, and half a minute.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

SPLITS = ("train", "test")
IMAGES_PER_SHEET, COLUMNS = 1000, 40
ABOUT = "about.json"


def pack(folder: Path, parts: Path, part_bytes: int) -> list[Path]:
    """Write the parts, and return their paths.

    Raises:
        ValueError: a sheet alone is larger than a part may be.
    """
    contents: list[dict[str, bytes]] = []
    room = 0
    for name, entries in sheets(folder):
        needed = sum(map(len, entries.values()))
        if needed > part_bytes:
            raise ValueError(f"--part-mib {part_bytes / 2**20:g}: {name} alone needs {needed / 2**20:.1f}")
        if needed > room:
            contents.append({})
            room = part_bytes
        contents[-1] |= entries
        room -= needed
    parts.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, entries in enumerate(contents, start=1):
        paths.append(parts / f"part-{number}.zip")
        about = json.dumps({"part": number, "parts": len(contents)})
        with ZipFile(paths[-1], "w") as archive:
            for name, content in (entries | {ABOUT: about}).items():
                archive.writestr(name, content)
    return paths


def sheets(folder: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Encode sheet by sheet: its name, and its files."""
    for split in SPLITS:
        with np.load(folder / f"cifar10_{split}.npz", allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        for start in range(0, len(images), IMAGES_PER_SHEET):
            some = slice(start, start + IMAGES_PER_SHEET)
            name = f"{split}-{start:08}"
            sheet, numbers = io.BytesIO(), io.BytesIO()
            Image.fromarray(tiled(images[some])).save(sheet, "webp", lossless=True)
            np.save(numbers, labels[some])
            yield name, {f"{name}.webp": sheet.getvalue(), f"{name}.npy": numbers.getvalue()}


def tiled(images: np.ndarray) -> np.ndarray:
    """Lay images N × H × W × 3 out in rows of `COLUMNS`, the last one filled up with black."""
    rows = -(-len(images) // COLUMNS)
    height, width = images.shape[1:3]
    full = np.zeros((rows * COLUMNS, height, width, 3), np.uint8)
    full[: len(images)] = images
    sheet = full.reshape(rows, COLUMNS, height, width, 3).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, COLUMNS * width, 3)


def cut(sheet: np.ndarray, count: int) -> np.ndarray:
    """The inverse of `tiled`, for square images."""
    size = sheet.shape[1] // COLUMNS
    images = sheet.reshape(-1, size, COLUMNS, size, 3).transpose(0, 2, 1, 3, 4)
    return images.reshape(-1, size, size, 3)[:count]


def join(parts: Path, folder: Path) -> None:
    """Write cifar10_train.npz and cifar10_test.npz from the parts.

    Raises:
        ValueError: a part is missing.
    """
    entries: dict[str, bytes] = {}
    found: dict[int, int] = {}
    for path in sorted(parts.glob("*.zip")):
        with ZipFile(path) as archive:
            content = {name: archive.read(name) for name in archive.namelist()}
        about = json.loads(content.pop(ABOUT))
        found[about["part"]] = about["parts"]
        entries |= content
    wanted = set(range(1, max(found.values(), default=1) + 1))
    if missing := sorted(wanted - found.keys()):
        raise ValueError(
            f"{parts}: has no part {', '.join(map(str, missing))} of {len(wanted)}; bring it too"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        names = sorted(
            name.removesuffix(".npy") for name in entries if name.startswith(split) and name.endswith(".npy")
        )
        labels = [np.load(io.BytesIO(entries[f"{name}.npy"]), allow_pickle=False) for name in names]

        def decode(name: str) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(entries[f"{name}.webp"])).convert("RGB"))

        with ThreadPoolExecutor() as pool:  # decoding lets go of Python's lock
            pixels = [
                cut(sheet, len(some)) for sheet, some in zip(pool.map(decode, names), labels, strict=True)
            ]
        np.savez(
            folder / f"cifar10_{split}.npz", images=np.concatenate(pixels), labels=np.concatenate(labels)
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("pack", "join"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--part-mib", type=float, default=50, help="most MiB of a part")
    options = parser.parse_args(arguments)
    try:
        if options.command == "join":
            join(options.source, options.target)
        else:
            for path in pack(options.source, options.target, int(options.part_mib * 2**20)):
                print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")
    except (ValueError, OSError) as error:
        sys.exit(f"images.py: {error}")


if __name__ == "__main__":
    main()
