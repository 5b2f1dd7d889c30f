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
        images: the images to pass over.
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
    pixels, labels = images.images.to(device), images.labels.to(device)
    std_255 = torch.tensor(std, device=device).view(-1, 1, 1) * 255
    mean_255 = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    order = (
        torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
    )
    take = _random_crops(pixels, generator) if augment else pixels.__getitem__
    for chosen in order.to(device).split(batch_size):
        yield take(chosen).float().sub_(mean_255).div_(std_255), labels[chosen]


def _random_crops(pixels: Tensor, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Draw a crop and flip per image (N x 3 x S x S); the result maps indices B to crops B x 3 x S x S.

    All are drawn at once and on the CPU, so that every device and batch size sees the same ones.
    """
    count, size = len(pixels), pixels.shape[-1]
    padding = size // 8
    # a view N x 3 x (2p+1) x (2p+1) x S x S: all crops of all images, without a copy
    crops = F.pad(pixels, [padding] * 4).unfold(2, size, 1).unfold(3, size, 1)
    top, left = torch.randint(2 * padding + 1, (2, count), generator=generator).to(pixels.device)
    mirror = torch.randint(2, (count, 1, 1, 1), generator=generator).bool().to(pixels.device)

    def take(chosen: Tensor) -> Tensor:
        crop = crops[chosen, :, top[chosen], left[chosen]]
        return torch.where(mirror[chosen], crop.flip(-1), crop)

    return take
