"""One pass over images in memory: shuffled, augmented and normalised in whole batches on the device.

The images stay uint8 until they are used, and there are no worker processes (the style of airbench,
https://github.com/KellerJordan/cifar10-airbench).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fedfmd.data.images import ImageSet


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    generator: torch.Generator | None,
    augment: bool,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once: inputs float32 B x 3 x H x W on the device, and labels int64 B.

    The last batch may be shorter. Training passes a generator, evaluation passes None and `augment=False`.

    Args:
        images: the images to pass over; on the device already, they are gathered there, and no batch waits.
        batch_size: images per batch.
        generator: a CPU generator that draws the order and the augmentation; None keeps the order.
        augment: random crop after zero padding (4 pixels at 32 x 32) and random horizontal flip.
        mean: per channel, of pixels scaled to 0..1; becomes 0.
        std: per channel, of pixels scaled to 0..1; becomes 1.
        device: where the batches are made.

    Raises:
        ValueError: augmentation without a generator.
    """
    if augment and generator is None:
        raise ValueError("augment = True draws crops and flips: it needs a generator")
    std_255 = torch.tensor(std, device=device).view(-1, 1, 1) * 255
    mean_255 = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    order = (
        torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
    ).to(images.images.device)
    crop = _random_crops(images.images, generator) if augment else None
    for chosen in order.split(batch_size):
        # only a batch at a time: the images may need more memory than the device has
        pixels = images.images[chosen].to(device)
        inputs = crop(pixels, chosen) if crop else pixels
        yield inputs.float().sub_(mean_255).div_(std_255), images.labels[chosen].to(device)


def _random_crops(images: Tensor, generator: torch.Generator) -> Callable[[Tensor, Tensor], Tensor]:
    """Draw a crop and flip per image (N x 3 x S x S).

    The result maps a batch of images B x 3 x S x S, with its indices B, to their crops. All are drawn at once and
    on the CPU, so that every device and batch size sees the same ones; they lie where the images do.
    """
    count, size = len(images), images.shape[-1]
    padding = size // 8
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(images.device)
    mirror = torch.randint(2, (count, 1, 1, 1), generator=generator).bool().to(images.device)

    def crop(batch: Tensor, chosen: Tensor) -> Tensor:
        row, column, flip = (draw[chosen].to(batch.device) for draw in (top, left, mirror))
        # a view B x 3 x (2p+1) x (2p+1) x S x S: all crops of the batch, without a copy
        crops = F.pad(batch, [padding] * 4).unfold(2, size, 1).unfold(3, size, 1)
        crop = crops[torch.arange(len(batch), device=batch.device), :, row, column]
        return torch.where(flip, crop.flip(-1), crop)

    return crop
