import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedfmd.data import ImageSet, batches

PLAIN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # leaves pixel values as they are


def pixels_and_labels(images, batch_size, **options):
    parts = list(batches(images, batch_size, **{"generator": None, "augment": False} | PLAIN | options))
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """Eleven random images of 16 x 16 pixels; the label is the position."""
    pixels = torch.randint(1, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    return ImageSet(pixels, torch.arange(11))


def test_without_a_generator_the_order_is_kept_and_the_last_batch_is_short(images):
    inputs, labels = zip(*batches(images, 4, generator=None, augment=False, **PLAIN), strict=True)
    assert [len(batch) for batch in labels] == [4, 4, 3]
    assert torch.cat(labels).tolist() == list(range(11))
    assert torch.cat(inputs).dtype == torch.float32
    assert torch.allclose(torch.cat(inputs), images.images.float())


def test_a_single_image_is_a_batch(images):
    inputs, labels = pixels_and_labels(images.subset([5]), 32, generator=seeded(), augment=True)
    assert inputs.shape == (1, 3, 16, 16)
    assert labels.tolist() == [5]


def test_normalisation_by_hand():
    grey = ImageSet(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1), torch.tensor([0]))
    inputs, _ = pixels_and_labels(grey, 1, mean=(0.5, 0.1, 0.0), std=(0.5, 0.2, 0.25))
    assert inputs.flatten().tolist() == pytest.approx([-1.0, 0.5, 4.0])


def test_the_generator_shuffles_images_with_their_labels(images):
    inputs, labels = pixels_and_labels(images, 4, generator=seeded())
    assert sorted(labels.tolist()) == list(range(11))
    assert labels.tolist() != list(range(11))
    assert torch.allclose(inputs, images.images[labels].float())


def test_the_next_pass_has_another_order(images):
    generator = seeded()
    orders = [pixels_and_labels(images, 4, generator=generator)[1].tolist() for _ in range(2)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("batch_size", [3, 11])
def test_the_same_seed_gives_the_same_augmented_pass_for_any_batch_size(images, batch_size):
    expected = pixels_and_labels(images, 4, generator=seeded(7), augment=True)
    actual = pixels_and_labels(images, batch_size, generator=seeded(7), augment=True)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert not torch.equal(pixels_and_labels(images, 4, generator=seeded(8), augment=True)[0], expected[0])


def test_augmentation_is_a_crop_of_the_padded_image_or_its_mirror_image():
    image = torch.randint(1, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    padded = F.pad(image[0], [2] * 4)  # 2 at 16 x 16 as 4 at 32 x 32
    crops = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    allowed = torch.stack([view for crop in crops for view in (crop, crop.flip(-1))]).float()

    copies = ImageSet(image.expand(2000, -1, -1, -1), torch.zeros(2000, dtype=torch.int64))
    inputs, _ = pixels_and_labels(copies, 100, generator=seeded(), augment=True)
    matches = (inputs.round()[:, None] == allowed).flatten(2).all(2)
    assert matches.any(1).all()
    # 50 equally likely views: 40 of each are expected, with a standard deviation of 6.3
    assert 15 < matches.sum(0).min() <= matches.sum(0).max() < 70


def test_each_image_has_a_crop_of_its_own():
    image = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8, generator=seeded())
    copies = ImageSet(image.expand(32, -1, -1, -1), torch.zeros(32, dtype=torch.int64))
    inputs, _ = pixels_and_labels(copies, 32, generator=seeded(), augment=True)
    assert len(inputs.flatten(1).unique(dim=0)) > 20


def test_augmentation_without_a_generator_is_refused(images):
    with pytest.raises(ValueError, match="needs a generator"):
        pixels_and_labels(images, 4, augment=True)


def test_images_on_the_device_are_gathered_and_cropped_there():
    """The meta device has shapes only: an index or a draw left on the CPU would have to be copied to it."""
    images = ImageSet(
        torch.empty(11, 3, 16, 16, dtype=torch.uint8, device="meta"), torch.arange(11, device="meta")
    )
    options = {"generator": seeded(), "augment": True, "device": "meta"} | PLAIN
    passed = batches(images, 4, **options)
    next(passed)  # what is done once a pass
    with NoCopies():
        (inputs, labels), _ = passed
    assert inputs.shape == (4, 3, 16, 16)
    assert labels.device.type == "meta"


class NoCopies(TorchDispatchMode):
    """Refuses operations with tensors of several devices, and results on another one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert len({t.device for t in tensors}) <= 1, operation
        return result
