import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedfmd.data import ImageSet, batches

PLAIN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # leaves pixel values as they are


def pixels_and_labels(images, batch_size, **options):
    parts = list(batches(images, batch_size, **{"generator": None, "augment": "none"} | PLAIN | options))
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """Eleven random images of 16 x 16 pixels; the label is the position."""
    pixels = torch.randint(1, 256, (11, 3, 16, 16), dtype=torch.uint8, generator=seeded())
    return ImageSet(pixels, torch.arange(11))


def test_without_a_generator_the_order_is_kept_and_the_last_batch_is_short(images):
    inputs, labels = zip(*batches(images, 4, generator=None, augment="none", **PLAIN), strict=True)
    assert [len(batch) for batch in labels] == [4, 4, 3]
    assert torch.cat(labels).tolist() == list(range(11))
    assert torch.cat(inputs).dtype == torch.float32
    assert torch.allclose(torch.cat(inputs), images.images.float())


def test_a_single_image_is_a_batch(images):
    inputs, labels = pixels_and_labels(images.subset([5]), 32, generator=seeded(), augment="crop+flip")
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
    expected = pixels_and_labels(images, 4, generator=seeded(7), augment="crop+flip")
    actual = pixels_and_labels(images, batch_size, generator=seeded(7), augment="crop+flip")
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert not torch.equal(
        pixels_and_labels(images, 4, generator=seeded(8), augment="crop+flip")[0], expected[0]
    )


@pytest.mark.parametrize("augment", ["none", "crop+flip", "resized-crop+flip"])
def test_a_pass_that_goes_on_yields_the_batches_that_were_left(images, augment):
    options = {"augment": augment, **PLAIN}
    whole = list(batches(images, 4, generator=seeded(), **options))
    for skip in range(4):
        rest = list(batches(images, 4, generator=seeded(), skip=skip, **options))
        assert len(rest) == 3 - skip
        for (inputs, labels), (expected, expected_labels) in zip(rest, whole[skip:], strict=True):
            assert torch.equal(inputs, expected)
            assert torch.equal(labels, expected_labels)


@pytest.mark.parametrize("augment", ["crop", "crop+flip", "resized-crop+flip"])
def test_augmentation_without_a_generator_is_refused(images, augment):
    with pytest.raises(ValueError, match="needs a generator"):
        pixels_and_labels(images, 4, augment=augment)


def test_images_on_the_device_are_gathered_and_cropped_there():
    """The meta device has shapes only: an index or a draw left on the CPU would have to be copied to it."""
    images = ImageSet(
        torch.empty(11, 3, 16, 16, dtype=torch.uint8, device="meta"), torch.arange(11, device="meta")
    )
    options = {"generator": seeded(), "augment": "crop+flip", "device": "meta"} | PLAIN
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
