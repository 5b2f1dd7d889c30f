"""The ways to split a training set over clients, each by one of flwr-datasets' partitioners, or a user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedfmd.own_code import call, is_own

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

MAX_ALPHA = 1e6


@dataclass(frozen=True)
class Split:
    """What is asked for: the settings `partition.*` and `seed`, over so many images of so many classes."""

    images: int
    classes: int
    scheme: str
    clients: int
    alpha: float
    classes_per_client: int
    min_images: int
    seed: int

    @property
    def parameters(self) -> dict[str, float]:
        """The settings that the scheme heeds besides clients and min_images."""
        return {name: getattr(self, name) for name in parameters_of(self.scheme)}

    def check(self) -> None:
        """Refuse what no draw can meet.

        Raises:
            ValueError: one line that names the setting, its value and the fix.
        """
        if self.scheme not in PARTITIONS and not is_own(self.scheme):
            raise ValueError(f"partition.scheme = '{self.scheme}': must be one of {', '.join(PARTITIONS)}")
        for setting, value, least in (
            ("partition.clients", self.clients, 1),
            ("partition.min-images", self.min_images, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ValueError(f"{setting} = {value}: must be at least {least}")
        if self.clients * self.min_images > self.images:
            raise ValueError(
                f"partition.clients = {self.clients} but the training set has {self.images} images: each "
                f"client needs partition.min-images = {self.min_images}, so use at most "
                f"{self.images // self.min_images} clients"
            )
        if is_own(self.scheme):  # which says itself what can't be met
            return
        if "alpha" in self.parameters and not 0 < self.alpha <= MAX_ALPHA:
            raise ValueError(
                f"partition.alpha = {self.alpha}: must be above 0 (small: a very uneven split) and at most "
                f"{MAX_ALPHA:g} (an even one)"
            )
        if "classes_per_client" in self.parameters:
            if not 1 <= self.classes_per_client <= self.classes:
                raise ValueError(
                    f"partition.classes-per-client = {self.classes_per_client}: must be 1 to {self.classes}, "
                    "the number of classes"
                )
            shares = self.clients * self.classes_per_client
            if not self.classes <= shares <= self.images:
                raise ValueError(
                    f"partition.classes-per-client = {self.classes_per_client} with partition.clients = "
                    f"{self.clients} makes {shares} shares of one class each: use at least {self.classes} "
                    f"(the classes) and at most {self.images} (the images)"
                )


@dataclass(frozen=True)
class Scheme:
    """Makes the partitioner of one draw from the wanted split and the draw's seed.

    `parameters` names the fields of `Split` that shape it; `failure` says why draws may fail, and the fix. Where
    they all do, `last_resort` makes the split from the labels and a seed.
    """

    partitioner: Callable[[Split, int], Partitioner]
    parameters: tuple[str, ...] = ()
    failure: str = ""
    last_resort: Callable[[Split, np.ndarray, int], tuple[np.ndarray, ...]] | None = None


def _iid(split: Split, _seed: int) -> Partitioner:
    """Equal shares of the shuffled images."""
    from flwr_datasets.partitioner import IidPartitioner

    return IidPartitioner(split.clients)


def _dirichlet(split: Split, seed: int) -> Partitioner:
    """Each class is shared out in proportions drawn from Dirichlet(alpha).

    A client that has its even share of the images gets no further class, as in the original (Yurochkin et al.
    2019, https://arxiv.org/abs/1905.12022), NIID-Bench and NVFlare.
    """
    from flwr_datasets.partitioner import DirichletPartitioner

    return DirichletPartitioner(
        split.clients,
        "label",
        alpha=float(split.alpha),
        min_partition_size=0,  # who has too few is counted by the caller, who draws again
        self_balancing=True,
        shuffle=False,
        seed=seed,
    )


def _pathological(split: Split, seed: int) -> Partitioner:
    """Exactly `classes_per_client` classes for each client (NIID-Bench, https://arxiv.org/abs/2102.02079)."""
    from flwr_datasets.partitioner import PathologicalPartitioner

    return PathologicalPartitioner(
        split.clients,
        "label",
        num_classes_per_partition=split.classes_per_client,
        class_assignment_mode="first-deterministic",
        shuffle=False,
        seed=seed,
    )


def _deal_classes(split: Split, labels: np.ndarray, seed: int) -> tuple[np.ndarray, ...]:
    """Deal the classes out in turn, in a random order, and each one's images in equal parts to its clients.

    So every class has a client, and two classes have equally many clients, or one more: what random draws hardly
    ever meet where there are few clients. Nothing where a class has fewer images than clients.
    """
    rng = np.random.default_rng(seed)
    classes, count = rng.permutation(np.unique(labels)), split.classes_per_client
    hands = [np.take(classes, range(c * count, (c + 1) * count), mode="wrap") for c in range(split.clients)]
    shares: list[list[np.ndarray]] = [[] for _ in hands]
    for label in classes:
        owners = [client for client, hand in enumerate(hands) if label in hand]
        images = rng.permutation(np.flatnonzero(labels == label))
        if len(images) < len(owners):
            return ()
        for client, share in zip(owners, np.array_split(images, len(owners)), strict=True):
            shares[client].append(share)
    return tuple(np.sort(np.concatenate(own)) for own in shares)


def _quantity(split: Split, seed: int) -> Partitioner:
    """Labels iid, sizes in proportions drawn from Dirichlet(alpha) (NIID-Bench's quantity skew).

    Every client has min_images beforehand, so that any alpha can be met.
    """
    from flwr_datasets.partitioner import SizePartitioner

    proportions = np.random.default_rng(seed).dirichlet([split.alpha] * split.clients)
    spare = split.images - split.clients * split.min_images
    edges = np.rint(np.cumsum(proportions) * spare).astype(int)
    return SizePartitioner((split.min_images + np.diff(edges, prepend=0)).tolist())


PARTITIONS: dict[str, Scheme] = {
    "iid": Scheme(_iid),
    "dirichlet": Scheme(
        _dirichlet,
        ("alpha",),
        "left some client with too few images: raise partition.alpha or lower partition.clients",
    ),
    "pathological": Scheme(
        _pathological,
        ("classes_per_client",),
        "left some class without a client, or gave it to more clients than it has images: change "
        "partition.classes-per-client or partition.clients",
        _deal_classes,
    ),
    "quantity": Scheme(_quantity, ("alpha",)),
}


def parameters_of(scheme: str) -> tuple[str, ...]:
    """Return the names of the settings that shape a split; all there are for a user's own, which may heed any."""
    if is_own(scheme):
        return tuple(dict.fromkeys(name for known in PARTITIONS.values() for name in known.parameters))
    return PARTITIONS[scheme].parameters


def own_split(split: Split, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Split by a user's own function, which gets labels, the number of clients and a generator of random numbers.

    It also gets what it has arguments for of alpha, classes_per_client and min_images, and returns the indices of
    each client's images. Images may be left over.

    Raises:
        ValueError: it fails, or returns no such split, or another one each time; one line that names the setting.
    """
    first, second = (_called(split, labels) for _ in range(2))
    if not all(map(np.array_equal, first, second)):
        raise ValueError(
            f"partition.scheme = {split.scheme!r} splits otherwise each time: draw from its argument rng alone"
        )
    return first


def _called(split: Split, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    given = {
        "labels": labels.copy(),
        "clients": split.clients,
        "rng": np.random.default_rng(split.seed),
    }
    shares = call(
        "partition.scheme", split.scheme, given, split.parameters | {"min_images": split.min_images}
    )
    must = f"partition.scheme = {split.scheme!r} must return the image indices of each client"
    try:
        indices = tuple(np.asarray(share) for share in shares)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{must}, and returned {type(shares).__name__} ({error})") from None
    if len(indices) != split.clients:
        raise ValueError(f"{must}: partition.clients = {split.clients}, and it returned {len(indices)} lists")
    for client, own in enumerate(indices):
        if own.ndim != 1 or (own.size and own.dtype.kind not in "iu"):
            raise ValueError(
                f"{must}, and client {client} has {own.dtype} of shape {own.shape}, not whole numbers"
            )
        if len(own) < split.min_images:
            raise ValueError(
                f"{must}: client {client} has {len(own)} images, and partition.min-images = {split.min_images}"
            )
        if own.min() < 0 or own.max() >= split.images:
            raise ValueError(
                f"{must}: client {client} has indices {own.min()} to {own.max()}, the training images' are 0 to "
                f"{split.images - 1}"
            )
    everyone = np.sort(np.concatenate(indices))
    if len(twice := everyone[1:][everyone[1:] == everyone[:-1]]):
        raise ValueError(f"{must}, each image once: image {twice[0]} is there twice")
    return tuple(np.sort(own.astype(np.int64)) for own in indices)
