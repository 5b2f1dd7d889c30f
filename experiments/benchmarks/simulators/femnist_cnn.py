"""The CNN of LEAF (Caldas et al., 2018) and McMahan et al. (AISTATS 2017) at its usual size: 1.66 M parameters."""

from __future__ import annotations

from typing import Any

from torch import nn


def network(classes: int, image_size: int, **_: Any) -> nn.Module:
    """Return two 5×5 convolutions and a hidden layer of 512; images have 3 channels here."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * (image_size // 4) ** 2, 512),
        nn.ReLU(),
        nn.Linear(512, classes),
    )
