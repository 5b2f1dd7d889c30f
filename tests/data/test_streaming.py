import dataclasses
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from fedfmd.data import StreamedImages, Streaming, batches, decoded_by, hold_out, load_dataset, load_image_set
from fedfmd.data.augmentation import AUGMENTATIONS, Fitted
from fedfmd.data.loading import ImageFiles
from fedfmd.errors import ImageError, RunError

PLAIN = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # leaves pixel values as they are


def write_image(path, seed, size=(14, 20)):
    """A smooth picture in random colours, as a photo's would be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eleven training images of two classes in several shapes and formats, and four to test."""
    root = tmp_path_factory.mktemp("images")
    for seed in range(11):
        suffix = ("jpg", "png")[seed % 3 == 0]
        write_image(root / "train" / "ab"[seed % 2] / f"{seed:02}.{suffix}", seed, (12 + seed, 30 - 2 * seed))
    for seed in range(4):
        write_image(root / "val" / "ab"[seed % 2] / f"{seed}.jpg", 100 + seed)
    return root


def load(folder, streaming="always", **options):
    return load_dataset("imagefolder", dir=folder, **{"image_size": 8, "streaming": streaming} | options)


def passed(images, batch_size=4, seed=0, augment="resized-crop+flip", **options):
    generator = torch.Generator().manual_seed(seed)
    how = {"generator": generator, "augment": augment} | PLAIN | options
    parts = list(batches(images, batch_size, **how))
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])


def test_streamed_images_are_those_in_memory(folder):
    streamed, held = load(folder), load(folder, "never")
    assert isinstance(streamed.train, StreamedImages)
    assert (streamed.mean, streamed.std, streamed.class_names) == (held.mean, held.std, held.class_names)
    assert (len(streamed.train), streamed.image_size) == (11, 8)
    for ours, theirs in ((streamed.train, held.train), (streamed.test, held.test)):
        assert torch.equal(ours.in_memory().images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        chosen = np.array([3, 0])
        assert torch.equal(ours.subset(chosen).in_memory().images, theirs.subset(chosen).images)
    ours, theirs = hold_out(streamed, 0.3, seed=0), hold_out(held, 0.3, seed=0)
    assert torch.equal(ours.validation.in_memory().images, theirs.validation.images)
    assert (ours.mean, ours.std) == (theirs.mean, theirs.std)


@pytest.mark.parametrize("augment", ["none", "crop", "crop+flip"])
def test_a_pass_that_shifts_images_is_the_same_as_in_memory(folder, augment):
    ours, theirs = (passed(load(folder, mode).train, augment=augment) for mode in ("always", "never"))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_neither_processes_nor_threads_nor_batches_change_a_pass(folder, augment):
    dataset = load(folder)
    expected = passed(dataset.train, augment=augment)
    own_draws = torch.get_rng_state()
    for workers, batch_size in ((0, 11), (1, 4), (2, 3)):
        actual = passed(decoded_by(dataset, workers).train, batch_size, augment=augment)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
    assert torch.equal(torch.get_rng_state(), own_draws)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))  # 1 or 2, the other one
        assert torch.equal(passed(dataset.train, augment=augment)[0], expected[0])
    finally:
        torch.set_num_threads(threads)


def test_every_pass_and_image_has_a_crop_of_its_own(folder):
    images = load(folder).train.subset(torch.zeros(6, dtype=torch.int64))
    first, again, other = (passed(images, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.flatten(1).unique(dim=0)) == 6


def test_a_pass_that_goes_on_yields_what_was_left(folder):
    images = load(folder).train
    for workers in (0, 1):
        rest = passed(dataclasses.replace(images, workers=workers), skip=2)
        assert torch.equal(rest[0], passed(images)[0][8:])


def test_in_a_process_that_may_have_no_children_it_decodes_itself(folder, monkeypatch):
    expected = passed(load(folder).train)
    images = decoded_by(load(folder), 2).train
    daemon = type("Process", (), {"daemon": True})
    monkeypatch.setattr(multiprocessing, "current_process", daemon)
    monkeypatch.setattr(os, "fork", None)
    assert torch.equal(passed(images)[0], expected[0])


@pytest.mark.parametrize(
    ("memory_gb", "streamed"), [(1e-6 * 15 * 3 * 64 / 1000, False), (1e-6 * 14 * 3 * 64 / 1000, True)]
)
def test_a_folder_beyond_the_limit_is_decoded_on_the_way_and_cropped(folder, memory_gb, streamed):
    dataset = load(folder, "auto", memory_gb=memory_gb)  # eleven and four images of 3 x 8 x 8 bytes
    assert isinstance(dataset.train, StreamedImages) == isinstance(dataset.test, StreamedImages) == streamed
    assert dataset.augment == ("resized-crop+flip" if streamed else "crop+flip")
    assert load(folder, "auto", memory_gb=memory_gb, augment="crop").augment == "crop"


def test_arrays_have_nothing_to_decode(write_npz):
    with pytest.raises(
        ValueError, match=r"^data\.streaming = 'always' and data\.dataset = 'npz', .*: leave it"
    ):
        load_dataset("npz", train=write_npz("a"), test=write_npz("b"), streaming="always")


def test_an_edge_devices_own_folder_may_be_streamed(folder):
    images = load_image_set(folder / "train", 8, ["x", "a", "b"], Streaming("always"))
    assert isinstance(images, StreamedImages)
    assert images.labels.tolist() == [1] * 6 + [2] * 5


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


@pytest.fixture
def damaged(tmp_path):
    """Four images of one class; the last bytes of one are missing."""
    for part in ("train", "val"):
        for seed in range(4):
            write_image(tmp_path / part / "a" / f"{seed}.jpg", seed, (64, 64))
    cut(tmp_path / "train" / "a" / "2.jpg")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_a_run_ends_it_with_the_name_of_the_file(damaged, workers):
    images = StreamedImages(
        ImageFiles("folder", [str(path) for path in sorted((damaged / "train" / "a").iterdir())]),
        torch.arange(4),
        torch.zeros(4, dtype=torch.int64),
        8,
        workers,
    )
    seen = batches(images, 2, generator=None, augment="none", **PLAIN)
    assert next(seen)[0].shape == (2, 3, 8, 8)
    with pytest.raises(
        RunError, match=r"a/2\.jpg: not a readable image \(.*truncated.*\); replace or remove it"
    ):
        next(seen)


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_files_that_cannot_be_images_are_found_before_a_run(damaged, content):
    path = damaged / "val" / "a" / "1.jpg"
    path.unlink()
    if content is None:
        path.symlink_to("nothing")
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^data\.test = .*val/a/1\.jpg: not a readable image"):
        load(damaged)


def test_a_cut_image_among_those_measured_is_found_before_a_run(damaged):
    with pytest.raises(ImageError, match=r"train/a/2\.jpg: not a readable image"):
        load(damaged)


def test_a_killed_process_is_one_line(folder):
    class Deadly(Fitted):
        def image(self, image, place):
            os.kill(os.getpid(), signal.SIGKILL)

    images = dataclasses.replace(load(folder).train, workers=1)
    with pytest.raises(
        RunError, match=r"train: decoding images failed .*DataLoader worker .*: give the same"
    ):
        list(images.passed([torch.arange(2)], Deadly(8)))


def test_statistics_are_those_of_images_spread_over_the_folder(folder, monkeypatch):
    monkeypatch.setattr("fedfmd.data.streaming.MEASURED_IMAGES", 3)
    images = load(folder).train
    assert torch.equal(images.histograms(), images.subset([0, 5, 10]).in_memory().histograms())
