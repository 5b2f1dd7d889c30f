import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional as F
from torchvision.datasets import CIFAR10, CIFAR100

from fedfmd.data import AUGMENTATIONS, DATASETS, load_dataset

CIFAR = {"cifar10": (CIFAR10, 10, "labels"), "cifar100": (CIFAR100, 100, "fine_labels")}


def make_cifar(folder, name, monkeypatch, images=12):
    """Writes small files in CIFAR's format and puts their checksums into torchvision's list."""
    kind, classes, key = CIFAR[name]
    base = folder / kind.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(file, content):
        data = pickle.dumps(content)
        (base / file).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(file):
        pixels = rng.integers(0, 256, (images, 3072), np.uint8)
        return [file, write(file, {"data": pixels, key: (np.arange(images) % classes).tolist()})]

    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(kind, attribute, [batch(file) for file, _ in getattr(kind, attribute)])
    meta = {kind.meta["key"]: [f"class {c}" for c in range(classes)]}
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": write(kind.meta["filename"], meta)})
    return base


def make_folder(root, classes, images=2):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (6, 6), (40 * i, 0, 0)).save(root / name / f"{i}.png")


@pytest.fixture(params=DATASETS)
def dataset(request, tmp_path, write_npz, monkeypatch):
    """Every dataset of the registry, from tiny files where it needs files."""
    name, options = request.param, {}
    if name in CIFAR:
        make_cifar(tmp_path, name, monkeypatch)
        options = {"dir": tmp_path}
    elif name == "npz":
        options = {"train": write_npz("train"), "test": write_npz("test")}
    elif name == "imagefolder":
        make_folder(tmp_path / "train", "ab")
        make_folder(tmp_path / "val", "ab")
        options = {"dir": tmp_path, "image_size": 8}
    return load_dataset(name, **options)


def test_every_dataset_keeps_the_contract(dataset):
    for images in (dataset.train, dataset.test):
        assert images.images.dtype == torch.uint8
        assert images.images.shape == (len(images), 3, dataset.image_size, dataset.image_size)
        assert images.images.is_contiguous()
        assert images.labels.dtype == torch.int64
        assert 0 <= images.labels.min() <= images.labels.max() < dataset.classes
    assert dataset.name in DATASETS
    assert len(dataset.class_names) == dataset.classes
    assert len(dataset.mean) == len(dataset.std) == 3
    assert dataset.augment == ("crop" if dataset.name == "digits" else "crop+flip")


def test_digits_are_split_by_class_and_scaled():
    digits = load_dataset("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert digits.image_size == 16
    assert torch.bincount(digits.test.labels).tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]
    assert digits.train.images.amin() == 0
    assert digits.train.images.amax() == 255
    assert torch.equal(digits.train.images[:, 0], digits.train.images[:, 2])


@pytest.mark.parametrize("size", [8, 16, 20, 32])
def test_a_digit_fills_the_canvas_and_shrinks_back_to_the_original(size):
    digits = load_dataset("digits", image_size=size).train.images
    small = load_digits().images / 16
    train, _ = train_test_split(small, test_size=0.2, stratify=load_digits().target, random_state=0)
    shrunk = F.adaptive_avg_pool2d(digits[:, :1].float() / 255, 8)[:, 0]
    error = (shrunk - torch.from_numpy(train)).abs()
    assert digits.shape[-1] == size
    # a repeated digit, or one alone in its middle, is 0.3 or more away
    assert error.mean() < (0.1 if size > 8 else 0.002)


def test_a_digit_is_smooth():
    jumps = [
        load_dataset("digits", image_size=size).train.images[:, 0].int().diff(dim=2).abs().max().item()
        for size in (8, 16, 32)
    ]
    assert jumps[0] == 255  # as it would be at any size if pixels were repeated
    assert jumps[1] < 0.75 * 255
    assert jumps[2] < 0.4 * 255


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_the_augmentation_may_be_chosen(augment):
    assert load_dataset("digits", image_size=8, augment=augment).augment == augment


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match=r"data\.augment = 'flip': must be one of auto, none, crop"):
        load_dataset("digits", augment="flip")


@pytest.mark.parametrize("name", ["digits", "cifar10"])
@pytest.mark.parametrize("part", ["train", "test"])
def test_files_of_other_images_are_refused_where_the_data_set_has_its_own(part, name):
    with pytest.raises(
        ValueError, match=rf"^data\.{part} = mine\.npz and data\.dataset = '{name}', which has its own"
    ):
        load_dataset(name, **{part: Path("mine.npz")})


def test_unknown_dataset_is_refused():
    with pytest.raises(ValueError, match=r"data.dataset = 'cifar'.*digits, cifar10"):
        load_dataset("cifar")


def test_cifar_images_are_channels_first(tmp_path, monkeypatch):
    base = make_cifar(tmp_path, "cifar10", monkeypatch)
    dataset = load_dataset("cifar10", dir=tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (60, 12)
    assert dataset.class_names[3] == "class 3"
    with (base / "test_batch").open("rb") as file:
        expected = torch.from_numpy(pickle.load(file)["data"]).view(-1, 3, 32, 32)
    assert torch.equal(dataset.test.images, expected)


def test_cifar_at_another_size(tmp_path, monkeypatch):
    make_cifar(tmp_path, "cifar10", monkeypatch)
    assert load_dataset("cifar10", dir=tmp_path, image_size=16).image_size == 16


def test_digits_are_not_made_smaller():
    with pytest.raises(ValueError, match=r"^data\.image-size = 4: digits need at least 8$"):
        load_dataset("digits", image_size=4)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_without_a_folder_names_the_settings(name):
    with pytest.raises(ValueError, match=r"data.dir is not set.*data.download = true"):
        load_dataset(name)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_without_files_names_the_settings(name, tmp_path):
    with pytest.raises(ValueError, match=f"data.dir = {tmp_path}: has no .*data.download = true"):
        load_dataset(name, dir=tmp_path)


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar_is_found_by_its_checksum(tmp_path, monkeypatch, file):
    path = make_cifar(tmp_path, "cifar10", monkeypatch) / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load_dataset("cifar10", dir=tmp_path)


def test_cifar_is_fetched_once_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR10, "download", lambda self: make_cifar(tmp_path, "cifar10", monkeypatch))
    assert len(load_dataset("cifar10", dir=tmp_path, download=True).train) == 60
    monkeypatch.setattr(CIFAR10, "download", None)
    assert len(load_dataset("cifar10", dir=tmp_path, download=True).train) == 60


def test_failing_download_names_the_way_out(tmp_path, monkeypatch):
    def fail(self):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(CIFAR10, "download", fail)
    with pytest.raises(ValueError, match=r"data.download = true: .*no route to host.*data.dir"):
        load_dataset("cifar10", dir=tmp_path, download=True)


@pytest.mark.parametrize("missing", ["train", "test"])
def test_npz_needs_both_files(write_npz, missing):
    paths = {"train": write_npz("train"), "test": write_npz("test")} | {missing: None}
    with pytest.raises(ValueError, match=f"data.{missing} is not set"):
        load_dataset("npz", **paths)


def test_npz_errors_name_the_setting(write_npz, tmp_path):
    with pytest.raises(ValueError, match=f"^data.train = {tmp_path}/none.npz: no such file"):
        load_dataset("npz", train=tmp_path / "none.npz", test=write_npz("test"))
    with pytest.raises(ValueError, match=f"^data.test = {tmp_path}/bad.npz: has no array 'labels'"):
        load_dataset("npz", train=write_npz("train"), test=write_npz("bad", labels=None))


def test_npz_test_labels_must_be_among_the_training_classes(write_npz):
    with pytest.raises(ValueError, match=r"^data\.test = .*label 3 "):
        load_dataset("npz", train=write_npz("train", [0, 1, 2]), test=write_npz("test", [0, 3]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 7, 500], r"without gaps, but 1 has no image and the largest is 500 .found 0, 7, 500.; relabel"),
        ([0, 1, 3_000_000_000], r"without gaps, but 2 has no image and the largest is 3000000000 "),
        ([1, 2], r"without gaps, but 0 has no image"),
    ],
)
def test_a_wrong_label_of_npz_makes_no_classes(labels, message, write_npz):
    with pytest.raises(ValueError, match=rf"^data.train = .*: labels must be 0, 1, 2, … {message}"):
        load_dataset("npz", train=write_npz("train", labels), test=write_npz("test", [0]))


def test_npz_may_have_classes_without_training_images_if_told(write_npz):
    files = {"train": write_npz("train", [0, 2]), "test": write_npz("test", [3])}
    assert load_dataset("npz", **files, classes=4).classes == 4
    with pytest.raises(
        ValueError, match=r"data.train = .*: label 2 is outside the classes 0..1 of data.classes"
    ):
        load_dataset("npz", **files, classes=2)
    with pytest.raises(ValueError, match=r"data.classes = 3 is for data.dataset = 'npz' alone"):
        load_dataset("digits", classes=3)


def test_npz_images_must_have_one_size(write_npz):
    other = write_npz("test", [0], images=np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"8 pixels but data.test of 16; set data.image-size"):
        load_dataset("npz", train=write_npz("train"), test=other)
    assert load_dataset("npz", train=write_npz("train"), test=other, image_size=16).image_size == 16


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_imagefolder_finds_its_parts(tmp_path, test_name):
    make_folder(tmp_path / "train", ["cat", "dog"], images=3)
    make_folder(tmp_path / test_name, ["cat", "dog"])
    dataset = load_dataset("imagefolder", dir=tmp_path, image_size=4)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.test.labels.tolist() == [0, 0, 1, 1]


def test_imagefolder_passes_over_what_is_hidden(tmp_path):
    for part in ("train", "val"):
        make_folder(tmp_path / part, [".ipynb_checkpoints", "cat", "dog"])
        (tmp_path / part / "cat" / "._0.png").write_bytes(b"of macOS")
    dataset = load_dataset("imagefolder", dir=tmp_path, image_size=4)
    assert dataset.class_names == ("cat", "dog")
    assert len(dataset.train) == 4


def test_imagefolder_takes_explicit_parts(tmp_path):
    make_folder(tmp_path / "mine", "ab")
    make_folder(tmp_path / "held-out", "ab", images=1)
    dataset = load_dataset("imagefolder", train=tmp_path / "mine", test=tmp_path / "held-out")
    assert (len(dataset.train), len(dataset.test), dataset.image_size) == (4, 2, 64)


def test_imagefolder_needs_the_same_classes_in_both(tmp_path):
    make_folder(tmp_path / "train", "abc")
    make_folder(tmp_path / "val", "bcd")
    with pytest.raises(ValueError, match=r"must have data.train's classes, but a, d differ"):
        load_dataset("imagefolder", dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "data.train is not set: .*data.dir"),
        ({"dir": "nothing"}, "data.dir = .*nothing: has no folder train"),
        ({"dir": "half"}, "data.dir = .*half: has no folder val or test"),
        ({"dir": "half", "test": "nothing"}, "data.test = .*nothing: no such folder"),
    ],
)
def test_imagefolder_errors_name_the_setting(tmp_path, options, message):
    make_folder(tmp_path / "half" / "train", "ab")
    with pytest.raises(ValueError, match=message):
        load_dataset("imagefolder", **{key: tmp_path / value for key, value in options.items()})
