"""One pass over images in memory: shuffled, augmented and normalised in whole batches on the device.

The images stay uint8 until they are used, and there are no worker processes (the style of airbench,
https://github.com/KellerJordan/cifar10-airbench).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedfmd.data.augmentation import Augmentation, draw_augmentation
from fedfmd.data.images import ImageSet


def batches(
    images: ImageSet,
    batch_size: int,
    *,
    generator: torch.Generator | None,
    augment: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield every image once: inputs float32 B x 3 x H x W on the device, and labels int64 B.

    The last batch may be shorter. Training passes a generator, evaluation passes None and `augment="none"`.

    Args:
        images: the images to pass over; on the device already, they are gathered there, and no batch waits.
        batch_size: images per batch.
        generator: a CPU generator that draws the order and the augmentation; None keeps the order.
        augment: how the images are varied at random.
        mean: per channel, of pixels scaled to 0..1; becomes 0.
        std: per channel, of pixels scaled to 0..1; becomes 1.
        device: where the batches are made.

    Raises:
        ValueError: an unknown augmentation, or one without a generator.
    """
    std_255 = torch.tensor(std, device=device).view(-1, 1, 1) * 255
    mean_255 = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    order = (
        torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
    ).to(images.images.device)
    vary = draw_augmentation(augment, images.images, generator)
    for chosen in order.split(batch_size):
        # only a batch at a time: the images may need more memory than the device has
        pixels = images.images[chosen].to(device)
        yield vary(pixels, chosen).float().sub_(mean_255).div_(std_255), images.labels[chosen].to(device)
