"""How long inference takes on this machine."""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
from torch import nn

WARM_UP = 3


def latency(
    model: nn.Module,
    image_size: int,
    *,
    batch: int = 1,
    repeats: int = 20,
    device: torch.device | str | None = None,
) -> float:
    """Seconds per image of a forward pass: the median over `repeats` batches, after a warm-up.

    Random images of 3 × `image_size` × `image_size` go through a copy of the model in evaluation mode, on
    `device` (by default where the model is), with the number of threads that torch is set to.

    Raises:
        ValueError: `image_size`, `batch` or `repeats` < 1.
    """
    for name, value in (("image_size", image_size), ("batch", batch), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    device = torch.device(device or next(model.parameters()).device)
    model = copy.deepcopy(model).to(device).eval()
    generator = torch.Generator().manual_seed(0)  # leaves the caller's random numbers alone
    images = torch.rand(batch, 3, image_size, image_size, generator=generator).to(device)
    with torch.inference_mode():
        seconds = [_seconds(model, images) for _ in range(WARM_UP + repeats)]
    return median(seconds[WARM_UP:]) / batch


def _seconds(model: nn.Module, images: torch.Tensor) -> float:
    _synchronize(images.device)
    start = time.perf_counter()
    model(images)
    _synchronize(images.device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
