"""One pass over images: shuffled, augmented and normalised in whole batches on the device.

The images stay uint8 until they are used, and those in memory need no worker processes (the style of airbench,
https://github.com/KellerJordan/cifar10-airbench).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedfmd.data.augmentation import Augmentation, draw_augmentation
from fedfmd.data.images import Images


def batches(
    images: Images,
    batch_size: int,
    *,
    generator: torch.Generator | None,
    augment: Augmentation,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    skip: int = 0,
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
        skip: how many batches to leave out, as they were yielded before: the others are those that follow.

    Raises:
        ImageError: an image can't be read.
        ValueError: an unknown augmentation, or one without a generator.
    """
    std_255 = torch.tensor(std, device=device).view(-1, 1, 1) * 255
    mean_255 = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    order = (
        torch.arange(len(images)) if generator is None else torch.randperm(len(images), generator=generator)
    ).to(images.device)
    vary = draw_augmentation(augment, len(images), images.size, generator, images.device)
    for pixels, labels in images.passed(order.split(batch_size)[skip:], vary, device):
        yield pixels.float().sub_(mean_255).div_(std_255), labels
