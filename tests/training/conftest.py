import pytest
import torch

from fedfmd.data import Dataset, ImageSet


@pytest.fixture
def noise():
    """22 random images of 8 x 8 pixels in 3 classes: batches of 8, 8 and 6."""
    pixels = torch.randint(256, (22, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(22) % 3)
    return Dataset("noise", images, images, 3, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, "none")


@pytest.fixture
def assert_same_attentions():
    """Compares what two records have of the last steps, so many each; `how` are tolerances, by default PyTorch's."""

    def compare(found, expected, last, **how):
        assert found.values.keys() == expected.values.keys()
        for name, entries in expected.values.items():
            assert len(entries) == len(found.values[name]) == last
            for entry, other in zip(entries, found.values[name], strict=True):
                for one, two in zip(entry, other, strict=True):
                    assert (one is None) == (two is None)
                    if one is not None:
                        torch.testing.assert_close(two, one, **how)

    return compare
