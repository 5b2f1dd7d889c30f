import dataclasses
import zlib

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from fedfmd.data import ImageSet, hold_out, load_image_set, read_image
from fedfmd.data.images import channel_statistics, histograms
from fedfmd.data.loading import image_set


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


def label_counts(images):
    return torch.bincount(images.labels, minlength=3).tolist()


def with_labels(dataset, *counts):
    """As many of the images as there are labels, with so many labels of each class."""
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    return dataclasses.replace(dataset, train=ImageSet(dataset.train.images[: len(labels)], labels))


@pytest.mark.parametrize(("amount", "held"), [(0.1, 12), (12, 12), (12.0, 12), (0.2501, 30), (1, 1)])
def test_validation_images_are_a_share_or_a_number(amount, held, tiny_dataset):
    split = hold_out(tiny_dataset, amount, seed=0)
    assert (len(split.train), len(split.validation)) == (120 - held, held)
    pixels = [part.images[:, 0, 0, 0].tolist() for part in (split.train, split.validation)]
    assert pixels == [sorted(part) for part in pixels]  # in their order
    assert sorted(pixels[0] + pixels[1]) == list(range(120))  # each once
    assert all(
        label == pixel % 3 for pixel, label in zip(pixels[1], split.validation.labels.tolist(), strict=True)
    )
    assert split.test is tiny_dataset.test


@pytest.mark.parametrize(
    ("counts", "amount", "held"),
    [
        ((60, 30, 30), 12, [6, 3, 3]),
        ((60, 30, 30), 13, [7, 3, 3]),  # 6.5, 3.25, 3.25
        ((1, 1, 10), 9, [0, 0, 9]),  # each class keeps one
        ((0, 4, 4), 2, [0, 1, 1]),  # a class that only the test set has
    ],
)
def test_every_class_gives_its_share_of_validation_images(counts, amount, held, tiny_dataset):
    split = hold_out(with_labels(tiny_dataset, *counts), amount, seed=0)
    assert label_counts(split.validation) == held
    assert label_counts(split.train) == [own - given for own, given in zip(counts, held, strict=True)]


def test_validation_images_follow_from_the_seed(tiny_dataset):
    first, again, other = (hold_out(tiny_dataset, 0.5, seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint
    assert len({data.fingerprint for data in (tiny_dataset, first, other)}) == 3


def test_images_are_normalised_by_those_that_stay_in_training(tiny_dataset):
    split = hold_out(tiny_dataset, 0.5, seed=0)
    assert (split.mean, split.std) == channel_statistics(split.train.histograms())
    assert split.mean != channel_statistics(tiny_dataset.train.histograms())[0]


@pytest.mark.parametrize(("amount", "number"), [(118, 118), (120, 120), (500, 500), (0.99, 119), (0.001, 0)])
def test_too_many_or_no_validation_images_are_refused(amount, number, tiny_dataset):
    with pytest.raises(
        ValueError,
        match=rf"^data\.validation = {amount:g}: would hold out {number} of 120 training images, .* 1 to 117, ",
    ):
        hold_out(tiny_dataset, amount, seed=0)


def test_channel_statistics_by_hand():
    pixels = torch.tensor([[0, 255], [51, 51], [0, 102]], dtype=torch.uint8)  # three channels of two pixels
    mean, std = channel_statistics(histograms(pixels.view(1, 3, 1, 2)))
    assert mean == pytest.approx((0.5, 0.2, 0.2))
    assert std == pytest.approx((0.5, 1 / 255, 0.2))  # the constant channel gets one grey level


def test_npz_becomes_channels_first(write_npz):
    path = write_npz("own", labels=np.array([0, 2], np.uint8))
    images = load_image_set(path)
    assert images.images.dtype == torch.uint8
    assert torch.equal(images.images.permute(0, 2, 3, 1), torch.from_numpy(np.load(path)["images"]))
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == [0, 2]


def test_arrays_may_be_views_that_run_backwards():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    images = image_set(pixels[::-1, :, ::-1], np.array([0, 1])[::-1], "mine:load")
    assert torch.equal(images.images, torch.from_numpy(pixels).permute(0, 3, 1, 2).flip(0, 3))
    assert images.labels.tolist() == [1, 0]


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
    with pytest.raises(ValueError, match=r"^.*cut\.npz: "):
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
        match=r"images of 4096 pixels need 0\.\d GB of memory, and 0\.0 GB are free: set data\.streaming=always, a",
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


def test_of_sixteen_bits_the_upper_eight_are_read(tmp_path):
    Image.fromarray(np.full((2, 2), 0x1234, np.uint16)).save(tmp_path / "deep.png")
    assert torch.equal(read_image(tmp_path / "deep.png", 2), torch.full((3, 2, 2), 0x12, dtype=torch.uint8))


def test_an_image_of_fractions_is_refused(tmp_path):
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "deep.tiff")
    with pytest.raises(
        ValueError, match=r"deep\.tiff: not a readable image \(its mode is F, not 8 or 16 bits\)"
    ):
        read_image(tmp_path / "deep.tiff", 2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8001, 10_000, 30_000])
def test_an_image_of_too_many_pixels_is_not_decoded(side, tmp_path, monkeypatch):
    path = tmp_path / "bomb.png"
    Image.new("1", (2, 2)).save(path)
    header = bytearray(path.read_bytes())
    header[16:24] = side.to_bytes(4) * 2  # the width and height that its header claims
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4)
    path.write_bytes(header)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.raises(
        ValueError, match=r"bomb\.png: has more than 64 million pixels, .*; shrink or remove it"
    ):
        read_image(path, 8)


def test_damaged_image_is_named(folder):
    path = folder / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=r"1\.png: not a readable image"):
        load_image_set(folder)
