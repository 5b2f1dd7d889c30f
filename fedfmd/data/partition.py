"""How the training images are split over the clients: drawn once per dataset, scheme and seed, then kept."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from fedfmd.data.files import read_npz, replacing
from fedfmd.data.images import Dataset
from fedfmd.data.plot import plot_partition
from fedfmd.data.schemes import PARTITIONS, Split, own_split
from fedfmd.errors import need
from fedfmd.own_code import is_own

if TYPE_CHECKING:
    import datasets
    from flwr_datasets.partitioner import Partitioner

DRAWS = 100

HOPELESS = 50
"""Clients with too few images, of whom there are so many in one draw that no other will have none."""


@dataclass(frozen=True, eq=False)
class Partition:
    """Which images each client has: `indices[c]` are client c's, sorted int64. No image has two clients.

    Every image has one, but where a user's own scheme leaves some over.
    `parameters` are the settings that shaped the split, such as `{"alpha": 0.5}`.
    """

    scheme: str
    seed: int
    indices: tuple[np.ndarray, ...]
    parameters: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The scheme with its parameters in words."""
        parameters = (f"{name.replace('_', ' ')} {value:g}" for name, value in self.parameters.items())
        return ", ".join([self.scheme, *parameters, f"seed {self.seed}"])

    @property
    def sizes(self) -> np.ndarray:
        """Images per client."""
        return np.array([len(own) for own in self.indices])

    def label_counts(self, labels: Tensor | np.ndarray, classes: int) -> np.ndarray:
        """Images per client and class: integers, clients x classes."""
        labels = np.asarray(labels)
        return np.stack([np.bincount(labels[own], minlength=classes) for own in self.indices])


def make_partition(
    labels: Tensor | np.ndarray,
    scheme: str,
    clients: int,
    *,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    min_images: int = 1,
    seed: int = 0,
) -> Partition:
    """Split images with these labels (integers N) over the clients; the same arguments give the same split.

    Args:
        labels: one class per image.
        scheme: a name of the registry `PARTITIONS`, or a user's own ``module:function`` (see `own_split`).
        clients: how many shares to make.
        alpha: concentration of `dirichlet` (of each class) and `quantity` (of the sizes); small is uneven.
        classes_per_client: of `pathological`.
        min_images: what every client has at least.
        seed: of all draws.

    Raises:
        ValueError: the split can't be made; one line that names the setting, its value and the fix.
    """
    labels = np.asarray(labels)
    split = Split(
        len(labels), len(np.unique(labels)), scheme, clients, alpha, classes_per_client, min_images, seed
    )
    split.check()
    return _make(labels, split)


def cached_partition(
    dataset: Dataset,
    scheme: str,
    clients: int,
    *,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    min_images: int = 1,
    seed: int = 0,
    cache_dir: Path,
) -> Partition:
    """`make_partition` of the training set, computed once and kept in `cache_dir`.

    It is found again by the dataset's content, the scheme with its parameters, and the seed. A damaged file
    is replaced; a folder that can't be written only costs computing the split again. That of a user's own scheme, whose
    code may change, is computed each time.
    """
    labels = dataset.train.labels.numpy()
    split = Split(
        len(labels), len(np.unique(labels)), scheme, clients, alpha, classes_per_client, min_images, seed
    )
    split.check()
    if is_own(scheme):
        return _make(labels, split)
    key = json.dumps([dataset.fingerprint, scheme, clients, split.parameters, min_images, seed])
    path = cache_dir / f"{scheme}-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}.npz"
    with suppress(ValueError):
        cached = load_partition(path)
        if _is_complete(cached.indices, split):
            return cached
    partition = _make(labels, split)
    with suppress(OSError):
        _write(path, partition, partition.label_counts(labels, dataset.classes))
    return partition


def own_test_size(images: int, share: float) -> int:
    """Return how many of a client's images it holds out: that share, rounded, but one at least, and one stays.

    A client with a single image has none to spare.
    """
    return min(images - 1, max(1, round(share * images))) if share else 0


def hold_out_own(images: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw which of a client's images it trains on, and which are held out to test: sorted int64, by place."""
    order = np.random.default_rng(seed).permutation(images)
    held = own_test_size(images, share)
    return np.sort(order[held:]), np.sort(order[:held])


def save_partition(
    partition: Partition,
    labels: Tensor | np.ndarray,
    classes: int,
    folder: Path,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write `partition.npz` and `partition.png` (see `plot_partition`) into the folder, each of them whole.

    The npz file holds `indices` int64 (client after client), `sizes`, `label_counts` (clients x classes),
    `scheme`, `seed` and `parameters` (JSON). `load_partition` reads it.
    """
    counts = partition.label_counts(labels, classes)
    _write(folder / "partition.npz", partition, counts)
    figure = plot_partition(counts, class_names or [str(c) for c in range(classes)], title=partition.title)
    with replacing(folder / "partition.png") as temporary:
        figure.savefig(temporary, format="png")


def load_partition(path: Path) -> Partition:
    """Read a partition that `save_partition` wrote.

    Raises:
        ValueError: the file is missing or damaged.
    """
    names = ("scheme", "seed", "parameters", "indices", "sizes")
    scheme, seed, parameters, indices, sizes = read_npz(path, *names)
    shares = np.split(indices, np.cumsum(sizes)[:-1])
    return Partition(str(scheme), int(seed), tuple(shares), json.loads(str(parameters)))


def _write(path: Path, partition: Partition, label_counts: np.ndarray) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            indices=np.concatenate(partition.indices),
            sizes=partition.sizes,
            label_counts=label_counts,
            scheme=partition.scheme,
            seed=partition.seed,
            parameters=json.dumps(dict(partition.parameters)),
        )


def _make(labels: np.ndarray, split: Split) -> Partition:
    """Draw until every image has a client and every client `min_images`; give up after `DRAWS`."""
    if is_own(split.scheme):
        return Partition(split.scheme, split.seed, own_split(split, labels))
    need(f"partition.scheme = '{split.scheme}'", "flwr_datasets")

    rng = np.random.default_rng(split.seed)
    order = rng.permutation(len(labels))
    table = _table(labels[order])
    scheme, draws = PARTITIONS[split.scheme], 0
    for draw_seed in rng.integers(2**32, size=DRAWS).tolist():
        indices, draws = _draw(scheme.partitioner(split, draw_seed), table, order), draws + 1
        if _is_complete(indices, split):
            return Partition(split.scheme, split.seed, indices, split.parameters)
        if sum(len(own) < split.min_images for own in indices) >= HOPELESS:
            break
    if scheme.last_resort and _is_complete(indices := scheme.last_resort(split, labels, split.seed), split):
        return Partition(split.scheme, split.seed, indices, split.parameters)
    parameters = "".join(
        f"partition.{name.replace('_', '-')} = {v}, " for name, v in split.parameters.items()
    )
    drawn = f"each of {draws} draws" if draws > 1 else "a draw"
    raise ValueError(
        f"{parameters}partition.clients = {split.clients}, partition.min-images = {split.min_images}: {drawn} over "
        f"{split.images} images {scheme.failure}"
    )


def _table(labels: np.ndarray) -> datasets.Dataset:
    """Return these labels as a partitioner wants them, in a table of which a part is the places of its rows.

    Thousands of parts that are tables too would take seconds.
    """
    import datasets

    class Table(datasets.Dataset):  # type: ignore[misc]  # without types
        def select(self, indices: Iterable[int], *_: object, **__: object) -> np.ndarray:
            return np.asarray(indices, dtype=np.int64)

    # as arrow, because the other formats make a Python object of every label
    return Table.from_dict({"label": labels}).with_format("arrow")


def _draw(partitioner: Partitioner, table: datasets.Dataset, order: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return the clients' image indices, or nothing where the partitioner warns or fails.

    `order` holds the index of the image in each row of the table.
    """
    partitioner.dataset = table
    with warnings.catch_warnings():
        # It warns when it leaves a class out, and when a tiny alpha makes a proportion 0/0. Each is a failed draw here.
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        try:
            clients = range(partitioner.num_partitions)
        except (ValueError, UserWarning, RuntimeWarning):
            return ()
    return tuple(np.sort(order[partitioner.load_partition(client)]) for client in clients)


def _is_complete(indices: Sequence[np.ndarray], split: Split) -> bool:
    """Whether each image is someone's, once, and each client has enough."""
    return (
        len(indices) == split.clients
        and min(map(len, indices)) >= split.min_images
        and np.array_equal(np.sort(np.concatenate(indices)), np.arange(split.images))
    )
