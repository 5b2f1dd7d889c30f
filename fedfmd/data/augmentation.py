"""How decoded images become those of a pass: fitted to a size, or varied at random in ways that keep their labels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedfmd.errors import not_one_of

Augmentation = Literal["none", "crop", "crop+flip", "resized-crop+flip"]
"""`crop` shifts an image by up to an eighth of its size (zero padding, random crop); `resized-crop` enlarges a part of
it, as is usual for ImageNet; `flip` mirrors every other one.
"""

AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)

AREA = (0.08, 1.0)
"""Share of an image's area that a resized crop keeps, from and to."""

RATIO = (3 / 4, 4 / 3)
"""Width by height of a resized crop, from and to."""

CROP_DRAWS = 10
"""How often such a crop is drawn until it lies within the image."""


class Variation(Protocol):
    """How each image is varied in one pass over a set; drawn beforehand, so that nothing depends on who applies it.

    Images of one size S come in batches; others, as a file holds them, one by one. Places are those in the set.
    """

    def batch(self, images: Tensor, places: Tensor) -> Tensor:
        """Vary images B x 3 x S x S at the places B, without changing their shape."""

    def image(self, image: Tensor, place: int) -> Tensor:
        """Make an image 3 x S x S of a larger or smaller one, 3 x H x W, at this place."""


@dataclass(frozen=True)
class Fitted:
    """Images as they are, of this size (see `fit`)."""

    size: int

    def batch(self, images: Tensor, _places: Tensor) -> Tensor:
        """Return the images."""
        return images

    def image(self, image: Tensor, _place: int) -> Tensor:
        """Fit the image."""
        return fit(image[None], self.size)[0]


@dataclass(frozen=True, eq=False)
class _Shifted:
    """Crops of the padded image, which begin at `top` and `left` (N); mirrored where `mirror` (N x 1 x 1 x 1) says."""

    size: int
    top: Tensor
    left: Tensor
    mirror: Tensor | None

    def batch(self, images: Tensor, places: Tensor) -> Tensor:
        row, column = (draw[places].to(images.device) for draw in (self.top, self.left))
        # a view B x 3 x (2p+1) x (2p+1) x S x S: all crops of the batch, without a copy
        padded = F.pad(images, [self.size // 8] * 4)
        crops = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        crop = crops[torch.arange(len(images), device=images.device), :, row, column]
        if self.mirror is None:
            return crop
        return torch.where(self.mirror[places].to(images.device), crop.flip(-1), crop)

    def image(self, image: Tensor, place: int) -> Tensor:
        return self.batch(fit(image[None], self.size), torch.tensor([place]))[0]


@dataclass(frozen=True)
class _ResizedCrops:
    """Random parts of the images, each drawn from (seed, place), resized to one size and mirrored or not."""

    size: int
    seed: int

    def batch(self, images: Tensor, places: Tensor) -> Tensor:
        return torch.stack(
            [self.image(image, place) for image, place in zip(images, places.tolist(), strict=True)]
        )

    def image(self, image: Tensor, place: int) -> Tensor:
        from torchvision.transforms.v2.functional import resized_crop

        rng = np.random.default_rng((self.seed, place))
        height, width = image.shape[-2:]
        crop: Tensor = resized_crop(image, *draw_box(height, width, rng), [self.size] * 2, antialias=True)
        return crop.flip(-1) if rng.integers(2) else crop


def read_augmentation(value: bool | str) -> Augmentation:
    """Return the augmentation that a file or a message names; older ones say true for `crop+flip` and false for `none`.

    Raises:
        ValueError: it is none of `AUGMENTATIONS`.
    """
    if isinstance(value, bool):
        return "crop+flip" if value else "none"
    if value not in AUGMENTATIONS:
        raise ValueError(_unknown(value))
    return value


def draw_augmentation(
    augment: Augmentation,
    count: int,
    size: int,
    generator: torch.Generator | None,
    device: torch.device | str = "cpu",
) -> Variation:
    """Draw how each of `count` images is varied in one pass, to images of `size` pixels.

    All is drawn on the CPU, and from `generator` alone, so that every device, batch size and process sees the same
    ones; what was drawn lies on `device`, where the images do.

    Raises:
        ValueError: an unknown augmentation, or no generator to draw it.
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(_unknown(augment))
    if augment == "none":
        return Fitted(size)
    if generator is None:
        raise ValueError(f"augment = {augment!r} is drawn at random: it needs a generator")
    if augment == "resized-crop+flip":
        return _ResizedCrops(size, int(torch.randint(2**63 - 1, (), generator=generator)))
    top, left = torch.randint(2 * (size // 8) + 1, (2, count), generator=generator).to(device)
    mirror = None
    if augment == "crop+flip":
        mirror = torch.randint(2, (count, 1, 1, 1), generator=generator).bool().to(device)
    return _Shifted(size, top, left, mirror)


def draw_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a part of an image for a resized crop: top, left, height, width (Szegedy et al., arXiv:1409.4842).

    Its share of the area is uniform in `AREA`, the logarithm of its ratio in `RATIO`. Where none was found within the
    image, as in one that is very wide, it is the largest one of a ratio in that range, in the middle.
    """
    for _ in range(CROP_DRAWS):
        area = height * width * rng.uniform(*AREA)
        ratio = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            top, left = rng.integers((height - box_height + 1, width - box_width + 1)).tolist()
            return top, left, box_height, box_width
    box_height, box_width = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def fit(images: Tensor, size: int, interpolation: Literal["bilinear", "bicubic"] = "bilinear") -> Tensor:
    """Resize the short side and cut the centre: uint8 N x C x H x W to N x C x size x size."""
    from torchvision.transforms import InterpolationMode, functional

    mode = InterpolationMode(interpolation)
    # in chunks, because resizing may pass through float32
    resized = (functional.resize(chunk, [size], mode) for chunk in images.split(1024))
    return torch.cat([functional.center_crop(chunk, [size]) for chunk in resized])


def _unknown(value: object) -> str:
    return f"augment = {value!r}: {not_one_of(value, AUGMENTATIONS)}"
