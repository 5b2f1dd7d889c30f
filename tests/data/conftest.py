import numpy as np
import pytest
import torch

from fedfmd.data import Dataset, ImageSet


@pytest.fixture
def write_npz(tmp_path):
    """Writes `NAME.npz` with random 8 x 8 images for the labels; an array given as None is left out."""

    def write(name, labels=(0, 1, 2), **arrays):
        count = 3 if labels is None else len(labels)
        images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
        arrays = {"images": images, "labels": labels} | arrays
        path = tmp_path / f"{name}.npz"
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    return write


@pytest.fixture
def tiny_dataset():
    """120 grey training images of 4 x 4 pixels in 3 classes."""
    labels = torch.arange(120) % 3
    images = ImageSet(torch.arange(120, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 4, 4), labels)
    return Dataset(
        "tiny", images, images.subset([0, 1, 2]), 3, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, "none"
    )
