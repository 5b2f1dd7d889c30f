import dataclasses

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from fedfmd.data import ImageSet, load_image_set, read_image
from fedfmd.data.images import channel_statistics


@pytest.fixture
def folder(tmp_path):
    """Two classes: a red image 20 x 10 and two blue ones 10 x 10 (height x width)."""
    for name, colour, size in (
        ("b/0", "blue", (10, 10)),
        ("b/1", "blue", (10, 10)),
        ("a/0", "red", (10, 20)),
    ):
        path = tmp_path / "folder" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, colour).save(path)
    return tmp_path / "folder"


def test_subset_follows_the_indices():
    images = ImageSet(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.tensor([7, 8, 9, 10]))
    subset = images.subset(np.array([3, 1]))
    assert len(subset) == 2
    assert subset.images.flatten().tolist() == [3, 1]
    assert subset.labels.tolist() == [10, 8]


def test_fingerprint_depends_on_the_content_alone(tiny_dataset):
    renamed = dataclasses.replace(tiny_dataset, name="other")
    relabelled = dataclasses.replace(
        tiny_dataset, train=ImageSet(tiny_dataset.train.images, tiny_dataset.train.labels.flip(0))
    )
    assert renamed.fingerprint == tiny_dataset.fingerprint
    assert relabelled.fingerprint != tiny_dataset.fingerprint


def test_channel_statistics_by_hand():
    pixels = torch.tensor([[0, 255], [51, 51], [0, 102]], dtype=torch.uint8)  # three channels of two pixels
    mean, std = channel_statistics(pixels.view(1, 3, 1, 2))
    assert mean == pytest.approx((0.5, 0.2, 0.2))
    assert std == pytest.approx((0.5, 1 / 255, 0.2))  # the constant channel gets one grey level


def test_npz_becomes_channels_first(write_npz):
    path = write_npz("own", labels=np.array([0, 2], np.uint8))
    images = load_image_set(path)
    assert images.images.dtype == torch.uint8
    assert torch.equal(images.images.permute(0, 2, 3, 1), torch.from_numpy(np.load(path)["images"]))
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 2]


def test_npz_is_cut_to_the_image_size(write_npz):
    wide = np.zeros((1, 4, 8, 3), np.uint8)
    wide[:, :, 2:6] = 200
    images = load_image_set(write_npz("wide", labels=[0], images=wide), image_size=4)
    assert torch.equal(images.images, torch.full((1, 3, 4, 4), 200, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": None}, "has no array 'labels' .it holds images."),
        ({"images": None}, "has no array 'images' .it holds labels."),
        (
            {"images": np.zeros((3, 8, 8, 3), np.float32)},
            "must be uint8 N x H x W x 3, not float32 3 x 8 x 8 x 3",
        ),
        ({"images": np.zeros((3, 8, 8), np.uint8)}, "must be uint8 N x H x W x 3, not uint8 3 x 8 x 8"),
        (
            {"images": np.zeros((3, 3, 8, 8), np.uint8)},
            "must be uint8 N x H x W x 3, not uint8 3 x 3 x 8 x 8",
        ),
        ({"labels": np.zeros(3)}, "must be integers of shape N, not float64 3"),
        ({"labels": np.zeros((3, 1), int)}, "must be integers of shape N, not int64 3 x 1"),
        ({"images": np.zeros((3, 8, 8, 3), np.uint8), "labels": [0, 1]}, "3 images but 2 labels"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": np.zeros(0, int)}, "holds no images"),
        ({"labels": np.array([0, -1, 2])}, "label -1 is negative"),
        ({"labels": np.array([0, 1, 5])}, r"label 5 is outside the classes 0\.\.2"),
        ({"images": np.zeros((3, 8, 6, 3), np.uint8)}, "8 x 6 x 3 are not square; set data.image-size"),
    ],
)
def test_bad_npz_is_one_clear_line(write_npz, arrays, message):
    path = write_npz("bad", **arrays)
    with pytest.raises(ValueError, match=message) as raised:
        load_image_set(path, class_names=["a", "b", "c"])
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_truncated_npz_is_one_clear_line(write_npz):
    path = write_npz("cut", labels=[0] * 50)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable npz file"):
        load_image_set(path)


def test_missing_path_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npz: no such file or folder"):
        load_image_set(tmp_path / "none.npz")


def test_folder_is_decoded_by_sorted_class(folder):
    images = load_image_set(folder, image_size=5)
    assert images.labels.tolist() == [0, 1, 1]
    red, blue = images.images[0], images.images[1]
    assert images.images.shape == (3, 3, 5, 5)
    assert red.amin((1, 2)).tolist() == red.amax((1, 2)).tolist() == [255, 0, 0]
    assert blue.amin((1, 2)).tolist() == blue.amax((1, 2)).tolist() == [0, 0, 255]


def test_folder_has_64_pixels_by_default(folder):
    assert load_image_set(folder).images.shape == (3, 3, 64, 64)


def test_folder_that_does_not_fit_into_memory_is_refused_before_it_is_read(folder, monkeypatch):
    memory = psutil.virtual_memory()._replace(available=1_000_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(
        ValueError,
        match=r"images of 4096 pixels need 0\.\d GB of memory, and 0\.0 GB are free: set a smaller",
    ):
        load_image_set(folder, image_size=4096)


def test_folder_may_hold_some_of_the_named_classes(folder):
    assert load_image_set(folder, 4, ["x", "b", "a"]).labels.tolist() == [2, 1, 1]


def test_folder_with_an_unknown_class_is_refused(folder):
    with pytest.raises(ValueError, match="class folders a are not among b, c"):
        load_image_set(folder, 4, ["b", "c"])


def test_folder_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path}: .*empty"):
        load_image_set(tmp_path)


def test_an_image_of_any_mode_is_read_in_rgb_and_its_centre_cut(tmp_path):
    grey = Image.fromarray(np.array([[9, 50, 50, 9]] * 2, np.uint8))
    grey.save(tmp_path / "wide.png")
    assert torch.equal(read_image(tmp_path / "wide.png", 2), torch.full((3, 2, 2), 50, dtype=torch.uint8))


def test_damaged_image_is_named(folder):
    path = folder / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        load_image_set(folder)
