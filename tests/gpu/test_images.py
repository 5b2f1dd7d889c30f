"""Images survive packing, and a part that was left behind is named."""

import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path):
    """1100 training and 7 test images of 8 x 8 random pixels."""
    random = np.random.default_rng(0)
    for split, count in (("train", 1100), ("test", 7)):
        images = random.integers(0, 256, (count, 8, 8, 3), np.uint8)
        np.savez(tmp_path / f"cifar10_{split}.npz", images=images, labels=np.arange(count) % 10)
    return tmp_path


def test_packed_and_joined_images_are_the_same(folder, script):
    images = script("images")
    parts = images.pack(folder, folder / "parts", 215_000)
    assert len(parts) == 2
    assert max(path.stat().st_size for path in parts) < 217_000  # the archive's own bytes come on top
    images.join(folder / "parts", folder / "joined")
    for split in ("train", "test"):
        with (
            np.load(folder / f"cifar10_{split}.npz") as before,
            np.load(folder / "joined" / f"cifar10_{split}.npz") as after,
        ):
            assert np.array_equal(before["images"], after["images"])
            assert np.array_equal(before["labels"], after["labels"])


def test_a_missing_part_is_named(folder, script):
    images = script("images")
    parts = images.pack(folder, folder / "parts", 215_000)
    parts[0].unlink()
    with pytest.raises(ValueError, match="has no part 1 of 2; bring it too"):
        images.join(folder / "parts", folder / "joined")


def test_an_empty_folder_has_no_parts(folder, script):
    with pytest.raises(ValueError, match="has no part 1 of 1"):
        script("images").join(folder, folder / "joined")


def test_a_part_too_small_for_a_sheet_is_refused(folder, script):
    with pytest.raises(ValueError, match=r"--part-mib 0\.0100002: train-00000000 alone needs 0\.2"):
        script("images").pack(folder, folder / "parts", 10_486)
