"""A network of one's own: two convolutions on small images (``fedfmd run experiments/own/network.yaml``)."""

from torch import nn


def make(classes, image_size, conv, norm, channels=16):  # noqa: ANN001, ANN201
    """Return a network from images B×3×image_size×image_size to logits B×classes."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        norm(channels),
        nn.ReLU(),
        conv(channels, 2 * channels, 3, stride=2, padding=1),  # what model.conv names
        norm(2 * channels),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * channels * (image_size // 2) ** 2, classes),
    )
