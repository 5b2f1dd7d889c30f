"""Accuracy of an exported model on the 360 test digits, enlarged in other ways than those it was trained on.

It takes what `fedfmd export CHECKPOINT --format safetensors` writes.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from fedfmd.classifier import load_classifier

WAYS = (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
SIZES = (16, 32)
"""Pixels to enlarge to; the model scales what is not of its own size."""


def enlarge(digits: np.ndarray, size: int, way: Image.Resampling) -> torch.Tensor:
    """Return digits N × 8 × 8 of 0..16 as images uint8 N × 3 × size × size."""
    grey = (digits * (255 / 16)).round().astype(np.uint8)
    images = np.stack([np.asarray(Image.fromarray(digit).resize((size, size), way)) for digit in grey])
    return torch.from_numpy(images)[:, None].repeat(1, 3, 1, 1)


def main(path: str) -> None:
    """Print a line for each way and size."""
    classifier, digits = load_classifier(path), load_digits()
    _, test = train_test_split(
        np.arange(len(digits.target)), test_size=0.2, stratify=digits.target, random_state=0
    )
    for way in WAYS:
        for size in SIZES:
            chosen = classifier.probabilities(enlarge(digits.images[test], size, way)).argmax(1).numpy()
            accuracy = 100 * (chosen == digits.target[test]).mean()
            print(f"{way.name.lower():9} {size} pixels  {accuracy:.1f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
