import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchvision.transforms import RandomResizedCrop

from fedfmd.data.augmentation import AREA, RATIO, draw_augmentation, draw_box, read_augmentation


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(size, count=1):
    return torch.randint(1, 256, (count, 3, size, size), dtype=torch.uint8, generator=seeded())


def varied(images, augment, generator):
    drawn = draw_augmentation(augment, len(images), images.shape[-1], generator)
    return drawn.batch(images, torch.arange(len(images)))


@pytest.mark.parametrize(
    ("augment", "views"),
    [("crop", lambda crop: [crop]), ("crop+flip", lambda crop: [crop, crop.flip(-1)])],
)
def test_all_crops_of_the_padded_image_are_equally_likely(augment, views):
    image = noise(16)
    padded = F.pad(image[0], [2] * 4)  # an eighth of the size
    crops = [padded[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
    allowed = torch.stack([view for crop in crops for view in views(crop)])
    copies = image.expand(40 * len(allowed), -1, -1, -1)
    matches = (varied(copies, augment, seeded())[:, None] == allowed).flatten(2).all(2)
    assert matches.any(1).all()
    # 40 of each view are expected, with a standard deviation of 6.3
    assert 15 < matches.sum(0).min() <= matches.sum(0).max() < 70


def test_without_augmentation_images_stay_and_nothing_is_drawn():
    images, generator = noise(16, 3), seeded()
    assert torch.equal(varied(images, "none", generator), images)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=seeded()))


def test_each_image_has_a_crop_of_its_own():
    copies = noise(32).expand(32, -1, -1, -1)
    assert len(varied(copies, "crop", seeded()).flatten(1).unique(dim=0)) > 20


def test_a_seed_draws_all_rows_then_all_columns_then_all_mirrors():
    images, generator = noise(32, 6), seeded(5)
    rows, columns = torch.randint(9, (2, 6), generator=generator).tolist()
    mirrored = torch.randint(2, (6,), generator=generator).tolist()
    crops = [
        padded[:, row : row + 32, column : column + 32]
        for padded, row, column in zip(F.pad(images, [4] * 4), rows, columns, strict=True)
    ]
    views = [crop.flip(-1) if mirror else crop for crop, mirror in zip(crops, mirrored, strict=True)]
    assert torch.equal(varied(images, "crop", seeded(5)), torch.stack(crops))
    assert torch.equal(varied(images, "crop+flip", seeded(5)), torch.stack(views))
    assert {*mirrored} == {0, 1}


def test_boxes_of_resized_crops_are_distributed_as_torchvisions():
    rng, image = np.random.default_rng(0), torch.empty(3, 200, 300)
    torch.manual_seed(0)
    ours = np.array([draw_box(200, 300, rng) for _ in range(4000)])
    theirs = np.array([RandomResizedCrop.get_params(image, AREA, RATIO) for _ in range(4000)])
    for boxes in (ours, theirs):
        top, left, height, width = boxes.T
        assert min(top.min(), left.min(), 200 - (top + height).max(), 300 - (left + width).max()) == 0
    tenths = np.linspace(0.1, 0.9, 9)
    assert np.quantile(ours, tenths, axis=0) == pytest.approx(np.quantile(theirs, tenths, axis=0), abs=8)


@pytest.mark.parametrize(
    ("shape", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 9), (494, 0, 12, 9)), ((1, 1), (0, 0, 1, 1))]
)
def test_an_image_that_has_no_such_part_is_cut_in_the_middle(shape, box):
    assert draw_box(*shape, np.random.default_rng(0)) == box


def test_a_resized_crop_enlarges_a_part_and_mirrors_every_other():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(40, 3, 64, 64)  # brighter to the right
    crops = varied(ramp, "resized-crop+flip", seeded())
    rise = crops[:, 0, 32, -1].int() - crops[:, 0, 32, 0].int()
    assert crops.shape == ramp.shape
    assert 10 < (rise > 0).sum() < 30
    assert rise.abs().median() < 200  # of 252
    assert len(rise.unique()) > 20
    one = draw_augmentation("resized-crop+flip", 40, 16, seeded())
    assert one.image(ramp[0, :, :30], 3).shape == (3, 16, 16)


@pytest.mark.parametrize("augment", ["flip", True, False])
def test_an_unknown_augmentation_is_refused(augment):
    with pytest.raises(ValueError, match=rf"augment = {augment!r}: must be one of none, crop, crop\+flip, "):
        draw_augmentation(augment, 1, 8, seeded())


@pytest.mark.parametrize(
    ("kept", "augment"),
    [(True, "crop+flip"), (False, "none"), ("none", "none"), ("crop", "crop"), ("crop+flip", "crop+flip")],
)
def test_older_files_say_true_or_false(kept, augment):
    assert read_augmentation(kept) == augment


def test_a_file_with_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"augment = 'crops': .*did you mean 'crop'"):
        read_augmentation("crops")
