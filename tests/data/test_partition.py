import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from fedfmd.data import (
    PARTITIONS,
    Partition,
    cached_partition,
    load_partition,
    make_partition,
    save_partition,
)
from fedfmd.data import partition as partition_module

LABELS = np.arange(600) % 10
BY_HAND = Partition("iid", 3, (np.array([0, 2]), np.array([1]), np.array([3, 4, 5])))


def same(left, right):
    return len(left.indices) == len(right.indices) and all(map(np.array_equal, left.indices, right.indices))


@pytest.fixture
def no_drawing(monkeypatch):
    """Makes computing a partition an error, so that only the cache can give one."""
    monkeypatch.setattr(partition_module, "_make", None)


@pytest.mark.parametrize("scheme", PARTITIONS)
@pytest.mark.parametrize("clients", [1, 10, 60])
def test_every_image_has_one_client_and_every_client_enough(scheme, clients):
    partition = make_partition(
        LABELS, scheme, clients, classes_per_client=10 if clients == 1 else 2, alpha=1.0
    )
    assert len(partition.indices) == clients
    assert np.concatenate(partition.indices).dtype == np.int64
    assert np.array_equal(np.sort(np.concatenate(partition.indices)), np.arange(600))
    assert all(np.array_equal(own, np.sort(own)) for own in partition.indices)
    assert partition.sizes.min() >= 1


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_min_images_are_met(scheme):
    assert make_partition(LABELS, scheme, 10, min_images=20).sizes.min() >= 20


def test_a_draw_that_leaves_a_client_one_image_short_does_not_count():
    labels = [0] * 10 + [1] * 2  # a class each
    assert sorted(make_partition(labels, "pathological", 2, classes_per_client=1, min_images=2).sizes) == [
        2,
        10,
    ]
    with pytest.raises(ValueError, match=r"partition\.min-images = 3"):
        make_partition(labels, "pathological", 2, classes_per_client=1, min_images=3)


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_a_thousand_clients_make_no_tables(scheme, monkeypatch):
    """A part of a table is a table, and takes half a millisecond."""
    labels = np.arange(50_000) % 10
    made, init = [], datasets.Dataset.__init__
    monkeypatch.setattr(
        datasets.Dataset, "__init__", lambda *args, **kwargs: made.append(1) or init(*args, **kwargs)
    )
    assert len(make_partition(labels, scheme, 1000, alpha=10.0).indices) == 1000
    assert len(made) < 5


def test_draws_end_where_none_can_do(monkeypatch):
    draws, draw = [], partition_module._draw
    monkeypatch.setattr(partition_module, "_draw", lambda *args: draws.append(1) or draw(*args))
    with pytest.raises(
        ValueError, match="a draw over 2000 images left some client with too few images: raise"
    ):
        make_partition(np.arange(2000) % 10, "dirichlet", 1000, alpha=0.1)
    assert len(draws) == 1


@pytest.mark.parametrize("scheme", PARTITIONS)
def test_the_seed_decides(scheme):
    first, again, other = (make_partition(LABELS, scheme, 10, seed=seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)


def test_labels_may_be_a_tensor():
    labels = torch.from_numpy(LABELS)
    assert same(make_partition(labels, "dirichlet", 10), make_partition(LABELS, "dirichlet", 10))


def test_sizes_and_label_counts_by_hand():
    assert BY_HAND.sizes.tolist() == [2, 1, 3]
    counts = BY_HAND.label_counts(torch.tensor([0, 1, 0, 1, 2, 2]), classes=4)
    assert counts.tolist() == [[2, 0, 0, 0], [0, 1, 0, 0], [0, 1, 2, 0]]


def test_title_tells_the_parameters():
    assert make_partition(LABELS, "pathological", 10).title == "pathological, classes per client 2, seed 0"
    assert BY_HAND.title == "iid, seed 3"


def test_saved_table_and_picture(tmp_path):
    partition = make_partition(LABELS, "dirichlet", 10, alpha=0.5, seed=4)
    save_partition(partition, LABELS, 10, tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["partition.npz", "partition.png"]

    with np.load(tmp_path / "run" / "partition.npz") as table:
        assert np.array_equal(table["label_counts"], partition.label_counts(LABELS, 10))
        assert np.array_equal(table["sizes"], partition.sizes)
    loaded = load_partition(tmp_path / "run" / "partition.npz")
    assert same(loaded, partition)
    assert (loaded.scheme, loaded.seed, loaded.parameters) == ("dirichlet", 4, {"alpha": 0.5})
    with Image.open(tmp_path / "run" / "partition.png") as picture:
        picture.load()


def test_saving_twice_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        save_partition(BY_HAND, LABELS, 10, tmp_path / folder)
    for name in ("partition.npz", "partition.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_partition_is_computed_once(tiny_dataset, tmp_path, request):
    computed = cached_partition(tiny_dataset, "dirichlet", 5, alpha=1.0, seed=2, cache_dir=tmp_path)
    assert same(computed, make_partition(tiny_dataset.train.labels, "dirichlet", 5, alpha=1.0, seed=2))
    request.getfixturevalue("no_drawing")
    cached = cached_partition(tiny_dataset, "dirichlet", 5, alpha=1.0, seed=2, cache_dir=tmp_path)
    assert same(cached, computed)
    assert cached.title == computed.title


def test_parameters_that_a_scheme_does_not_heed_share_the_cache(tiny_dataset, tmp_path, request):
    cached_partition(tiny_dataset, "iid", 5, alpha=0.1, cache_dir=tmp_path)
    request.getfixturevalue("no_drawing")
    cached_partition(tiny_dataset, "iid", 5, alpha=0.9, classes_per_client=1, cache_dir=tmp_path)


@pytest.mark.parametrize("change", [{"alpha": 2.0}, {"seed": 1}, {"min_images": 2}, {"clients": 6}])
def test_other_settings_have_a_cache_file_of_their_own(tiny_dataset, tmp_path, change):
    for settings in ({}, change):
        options = {"scheme": "dirichlet", "clients": 5, "alpha": 1.0} | settings
        cached_partition(tiny_dataset, **options, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["empty", "cut", "other"])
def test_a_damaged_cache_file_is_computed_anew(tiny_dataset, tmp_path, damage):
    computed = cached_partition(tiny_dataset, "dirichlet", 3, alpha=1.0, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other":  # a sound file, but not of this dataset
        np.savez(
            path, scheme="dirichlet", seed=0, parameters="{}", indices=np.arange(3), sizes=np.ones(3, int)
        )
    else:
        path.write_bytes(whole[:-20] if damage == "cut" else b"")
    assert same(cached_partition(tiny_dataset, "dirichlet", 3, alpha=1.0, cache_dir=tmp_path), computed)
    assert path.read_bytes() == whole


def test_bad_settings_are_refused_with_a_cache_too(tiny_dataset, tmp_path):
    with pytest.raises(ValueError, match=r"partition.scheme = 'x'"):
        cached_partition(tiny_dataset, "x", 5, cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"partition.alpha = 0"):
        cached_partition(tiny_dataset, "dirichlet", 5, alpha=0, cache_dir=tmp_path)


def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(tiny_dataset, tmp_path):
    (tmp_path / "file").touch()
    assert len(cached_partition(tiny_dataset, "iid", 5, cache_dir=tmp_path / "file").indices) == 5


def test_importing_the_room_is_cheap():
    heavy = ["torchvision", "sklearn", "matplotlib", "datasets", "flwr_datasets"]
    code = f"import sys, fedfmd.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
