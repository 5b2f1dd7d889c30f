"""Random variations of training images that keep their labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfmd.errors import not_one_of

Augmentation = Literal["none", "crop", "crop+flip"]
"""`crop` shifts an image by up to an eighth of its size (zero padding, random crop); `flip` mirrors every other one."""

AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)


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
    augment: Augmentation, images: Tensor, generator: torch.Generator | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Draw how each image (N x 3 x S x S) is varied in one pass.

    The result maps a batch of images B x 3 x S x S, with its indices B, to their variations. All are drawn at once
    and on the CPU, so that every device and batch size sees the same ones; they lie where the images do.

    Raises:
        ValueError: an unknown augmentation, or no generator to draw it.
    """
    if augment not in AUGMENTATIONS:
        raise ValueError(_unknown(augment))
    if augment == "none":
        return lambda batch, _chosen: batch
    if generator is None:
        raise ValueError(f"augment = {augment!r} is drawn at random: it needs a generator")
    count, size = len(images), images.shape[-1]
    padding = size // 8
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    mirror = None
    if augment == "crop+flip":
        mirror = torch.randint(2, (count, 1, 1, 1), generator=generator).bool().to(images.device)

    def vary(batch: Tensor, chosen: Tensor) -> Tensor:
        row, column = (draw[chosen].to(batch.device) for draw in (top, left))
        # a view B x 3 x (2p+1) x (2p+1) x S x S: all crops of the batch, without a copy
        crops = F.pad(batch, [padding] * 4).unfold(2, size, 1).unfold(3, size, 1)
        crop = crops[torch.arange(len(batch), device=batch.device), :, row, column]
        return crop if mirror is None else torch.where(mirror[chosen].to(batch.device), crop.flip(-1), crop)

    return vary


def _unknown(value: object) -> str:
    return f"augment = {value!r}: {not_one_of(value, AUGMENTATIONS)}"
