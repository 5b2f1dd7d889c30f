"""An edge device, a SuperNode with images of its own: what its ``--node-config`` says, and whether it fits a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fedfmd.data import Dataset, ImageFormat, Streaming, load_image_set
from fedfmd.edge import device_text, read_own_device
from fedfmd.errors import SettingsError, nearest_of
from fedfmd.flower_compat import NODES, RANK
from fedfmd.version import __version__

PROFILES = (".yaml", ".yml")
"""How the name of an edge device's own profile ends."""

KEYS = ("client", "data", "device", "device-backend", RANK, NODES)


@dataclass(frozen=True)
class NodeConfig:
    """What a node is told when it is started; the last two by Flower's simulation.

    Attributes:
        client: the client that this edge device is; None: a worker, which hosts any.
        data: the edge device's own images, an npz file or a folder of class folders; None: it loads the run's data set
            and takes its client's share.
        device: name of its device profile, or a file (YAML) with its own; "" leaves that to the server.
        backend: what it computes on, cpu, cuda or cuda:N; "" takes the run's setting `device`.
        rank: its place among the nodes.
        nodes: how many nodes there are, 0 if that is unknown.
    """

    client: int | None = None
    data: Path | None = None
    device: str = ""
    backend: str = ""
    rank: int = 0
    nodes: int = 0

    @classmethod
    def from_mapping(cls, config: Mapping[str, bool | int | float | str]) -> NodeConfig:
        """Read the keys of ``--node-config``.

        Raises:
            SettingsError: an unknown key, or a client that is no number from 0.
        """
        for key, value in config.items():
            if key not in KEYS:
                raise SettingsError(
                    f"unknown key {key} = {value!r}; the nearest one is {nearest_of(key, KEYS)}"
                )
        client = config.get("client")
        if client is None and "data" in config:
            raise SettingsError(f"data = {config['data']!r} needs client=N, the number of this edge device")
        if client is not None and (type(client) is not int or client < 0):
            raise SettingsError(f"client = {client!r}: must be a number from 0, one for each edge device")
        return cls(
            client=client,
            data=Path(str(config["data"])).expanduser() if "data" in config else None,
            device=str(config.get("device", "")),
            backend=str(config.get("device-backend", "")),
            rank=int(config.get(RANK, client or 0)),
            nodes=int(config.get(NODES, 0)),
        )

    def profile(self) -> str:
        """Return the text of the edge device's own profile, "" if it has none.

        Raises:
            ValueError: the file can't be read, or doesn't hold one device.
        """
        if not self.device.endswith(PROFILES):
            return ""
        return device_text(read_own_device(Path(self.device).expanduser()))


def check_version(server: str) -> None:
    """Refuse a server with another version of fedfmd.

    Raises:
        SettingsError: names both versions.
    """
    if server != __version__:
        raise SettingsError(
            f"this edge device has fedfmd {__version__}, the server {server}: install the same version on both"
        )


def own_dataset(path: Path, wanted: ImageFormat, image_size: int, streaming: Streaming) -> Dataset:
    """Load an edge device's images as the run wants them, without a test set.

    `image_size` is the run's ``data.image-size``; `streaming` says whether they are decoded on the way. All of them are
    trained on: the run's validation images are the server's (see `fedfmd.build.build_dataset`).

    Raises:
        ValueError: they can't be read, have labels that the run doesn't know, or another size.
    """
    own = load_image_set(path, image_size or None, wanted.class_names, streaming)
    if own.size != wanted.image_size:
        raise ValueError(
            f"{path}: images of {own.size}×{own.size} pixels, the run's have {wanted.image_size}×"
            f"{wanted.image_size}: resize them, or have all resized by data.image-size={wanted.image_size}"
        )
    return Dataset(
        name=path.name,
        train=own,
        test=own.subset(torch.arange(0)),
        classes=len(wanted.class_names),
        class_names=wanted.class_names,
        mean=wanted.mean,
        std=wanted.std,
        augment=wanted.augment,
    )
