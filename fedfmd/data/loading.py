"""Reading images and their labels from an npz file, or from a folder with one sub-folder of images per class."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedfmd.data.augmentation import fit
from fedfmd.data.files import read_npz
from fedfmd.data.images import Images, ImageSet
from fedfmd.data.streaming import IN_MEMORY, StreamedImages, Streaming, place
from fedfmd.errors import ImageError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFile import ImageFile

FOLDER_IMAGE_SIZE = 64
MAX_PIXELS = 64_000_000  # of an image file: a tiny one can claim any number

CHECKED_TOGETHER = 1000
CHECKING_THREADS = 8  # headers are small: what takes time is the disk


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """The images in files, of the folder `source`."""

    source: str
    files: Sequence[str]

    def __getitem__(self, index: int) -> Tensor:
        """Decode a file in RGB: uint8 3 x H x W.

        Raises:
            ImageError: one line that starts with the path.
        """
        return decode(Path(self.files[index]))

    def check(self) -> None:
        """Open all files and read their headers; of a million, that takes about half a minute if the disk is fast.

        Raises:
            ImageError: one line that starts with the path of the first that is no image, or too large.
        """
        chunks = [
            self.files[start : start + CHECKED_TOGETHER]
            for start in range(0, len(self.files), CHECKED_TOGETHER)
        ]
        with ThreadPoolExecutor(CHECKING_THREADS) as pool:
            for _ in pool.map(_check_headers, chunks):
                pass


def decode(path: Path) -> Tensor:
    """Decode a file in RGB: uint8 3 x H x W.

    Raises:
        ImageError: one line that starts with the path.
    """
    from torchvision.io import ImageReadMode, decode_jpeg, read_file
    from torchvision.transforms.functional import pil_to_tensor

    with _opened(path) as file:
        pixels: Tensor | None = None
        if file.format == "JPEG":
            with suppress(RuntimeError):  # then Pillow tells what is wrong, or can read it
                # the same pixels as Pillow's in three quarters of the time
                pixels = decode_jpeg(read_file(str(path)), ImageReadMode.RGB)
        return pil_to_tensor(_in_rgb(file)) if pixels is None else pixels


def _in_rgb(file: Image) -> Image:
    """Convert an image; of 16 bits the upper 8 stay, where Pillow would make all above 255 white.

    Raises:
        ValueError: its numbers have no range from which eight bits could follow.
    """
    from PIL.Image import fromarray

    if file.mode.startswith("I;16"):
        file = fromarray((np.asarray(file, np.uint16) >> 8).astype(np.uint8))
    if file.mode in ("I", "F"):
        raise ValueError(f"its mode is {file.mode}, not 8 or 16 bits")
    return file.convert("RGB")


def read_image(path: Path, size: int) -> Tensor:
    """Decode a file in RGB and `fit` it: uint8 3 x size x size.

    Raises:
        ImageError: one line that starts with the path.
    """
    return fit(decode(path)[None], size)[0]


def _check_headers(files: Sequence[str]) -> None:
    for file in files:
        with _opened(Path(file)):
            pass


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """Yield the file with its header read; errors in the block, too, are those of the file."""
    from PIL import Image

    try:
        with Image.open(path) as file:
            if math.prod(file.size) > MAX_PIXELS:
                raise Image.DecompressionBombError
            yield file
    except Image.DecompressionBombError:
        raise ImageError(
            f"{path}: has more than {MAX_PIXELS / 1e6:.0f} million pixels, and would need gigabytes; shrink or "
            "remove it"
        ) from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's plugins raise all of them
        raise ImageError(f"{path}: not a readable image ({error}); replace or remove it") from None


def load_image_set(
    path: Path,
    image_size: int | None = None,
    class_names: Sequence[str] | None = None,
    streaming: Streaming = IN_MEMORY,
) -> Images:
    """Read an npz file or a folder with one sub-folder of images per class.

    An npz file holds `images` uint8 N x H x W x 3 and `labels` integers N. Its images keep their size unless
    `image_size` is given. A folder's images are decoded once, into memory, or whenever they are used; the short side
    is resized and the centre cut to `image_size` (64 unless given).

    Args:
        path: the file or the folder.
        image_size: height and width of the result in pixels.
        class_names: the classes by label. A folder may hold some of them only, as one client's own data may;
            without the names, its sorted sub-folders are the classes.
        streaming: whether a folder's images are decoded whenever they are used.

    Raises:
        ValueError: one line that starts with the path and says what is wrong with the data.
    """
    if path.is_dir():
        images = image_folder(path, image_size, class_names)
        return place(images, streaming.wanted(images))
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
    checked = check_labels(labels, len(pixels), source, class_names)
    if not pixels.size:
        raise ValueError(f"{source}: holds no images ({_shape(pixels)})")
    if image_size is None and pixels.shape[1] != pixels.shape[2]:
        raise ValueError(
            f"{source}: images of {_shape(pixels[0])} are not square; set data.image-size to cut them"
        )
    images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous()
    if image_size is not None and images.shape[2:] != (image_size, image_size):
        images = fit(images, image_size)
    return ImageSet(images, checked)


def check_labels(labels: np.ndarray, images: int, source: str, class_names: Sequence[str] | None) -> Tensor:
    """Check that labels are integers, one for each of so many images, of known classes; return them as int64 N.

    Raises:
        ValueError: one line that starts with their `source` and says what is wrong with them.
    """
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise ValueError(
            f"{source}: 'labels' must be integers of shape N, not {labels.dtype} {_shape(labels)}"
        )
    if images != len(labels):
        raise ValueError(f"{source}: {images} images but {len(labels)} labels; each image needs one label")
    if not images:
        raise ValueError(f"{source}: holds no images")
    if labels.min() < 0:
        raise ValueError(f"{source}: label {labels.min()} is negative; classes count from 0")
    if class_names is not None and labels.max() >= len(class_names):
        raise ValueError(
            f"{source}: label {labels.max()} is outside the classes 0..{len(class_names) - 1}; "
            "relabel or remove those images"
        )
    return torch.from_numpy(labels.astype(np.int64))


def class_folders(path: Path) -> list[str]:
    """Return the names of a folder's sub-folders, sorted; not hidden ones, such as .ipynb_checkpoints."""
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def image_folder(
    path: Path, image_size: int | None = None, class_names: Sequence[str] | None = None
) -> StreamedImages:
    """List a folder's images, none of which is opened; arguments and errors are those of `load_image_set`."""
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
    return StreamedImages(
        ImageFiles(str(path), [file for file, _ in samples]),
        torch.arange(len(samples)),
        torch.tensor([label for _, label in samples]),
        image_size or FOLDER_IMAGE_SIZE,
    )


def _is_shown(file: str) -> bool:
    """Whether it is an image, and not hidden as macOS's ._x.png is."""
    from torchvision.datasets.folder import is_image_file

    return not Path(file).name.startswith(".") and bool(is_image_file(file))


def _shape(array: np.ndarray) -> str:
    return " x ".join(map(str, array.shape)) or "scalar"
