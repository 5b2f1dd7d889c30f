"""What a process that hosts clients keeps between Flower's messages: settings, images and a model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from torch import Tensor, nn

from fedfmd.build import (
    build_compute,
    build_dataset,
    build_model,
    build_partition,
    build_streaming,
    placed,
    torch_device,
)
from fedfmd.cache import cache_dir
from fedfmd.client.node_config import NodeConfig, own_dataset
from fedfmd.client.state import discard_old
from fedfmd.data import Dataset, ImageFormat, Images, hold_out_own
from fedfmd.memory import keep_freed
from fedfmd.protocol.state import WireState
from fedfmd.seeds import derive_seed
from fedfmd.settings import Settings
from fedfmd.training import Compute


class _Thread(threading.local):
    """What each thread has of its own."""

    host: Host | None = None
    state: WireState
    compute: Compute


_thread = _Thread()
_loading = threading.Lock()


@dataclass(frozen=True)
class Host:
    """What the nodes of a process keep between messages; `shard_of` gives all images of a client."""

    settings: Settings
    dataset: Dataset
    shard_of: Callable[[int], Images]
    device: torch.device

    def images_of(self, client: int) -> Images:
        """Return the images that a client trains on: all that it has, without those that it holds out."""
        shard = self.shard_of(client)
        return shard.subset(self._split(client, shard)[0]) if self.settings.partition.test_share else shard

    def tests_of(self, client: int) -> Images:
        """Return the images that a client holds out (``partition.test-share``); none without a share."""
        shard = self.shard_of(client)
        return shard.subset(self._split(client, shard)[1])

    def _split(self, client: int, shard: Images) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of the images to train on and to test: the same in every round and process."""
        seed = derive_seed(self.settings.seed, "client-test", client)
        return hold_out_own(len(shard), self.settings.partition.test_share, seed)

    @property
    def model(self) -> nn.Module:
        """The calling thread's model, for all clients that it trains: nodes of one process are threads."""
        return self._state.module

    @property
    def views(self) -> Mapping[str, Tensor]:
        """The arrays of `model` by their names on the wire, as tensors that share its memory."""
        return self._state.views()

    @property
    def compute(self) -> Compute:
        """What computes gradients of `model`, all of whose kernels are trained."""
        return self._of_thread().compute

    @property
    def _state(self) -> WireState:
        return self._of_thread().state

    def _of_thread(self) -> _Thread:
        if _thread.host is not self:
            model = build_model(self.settings, self.dataset.classes, self.dataset.image_size)
            _thread.host, _thread.state = self, WireState(model.to(self.device))
            _thread.compute = build_compute(self.settings, self.device)
        return _thread


def host_of(context: Context, images: ImageFormat | None) -> Host:
    """Return what the node needs; `images` tells an edge device what its own must be like."""
    node = NodeConfig.from_mapping(context.node_config)
    with _loading:
        return _load_host(tuple(sorted(context.run_config.items())), node.data, node.backend, images)


@lru_cache(maxsize=1)
def _load_host(
    run_config: tuple[tuple[str, bool | int | float | str], ...],
    data: Path | None,
    backend: str,
    images: ImageFormat | None,
) -> Host:
    """Load what a node needs, once per process and run."""
    keep_freed()
    settings = Settings.from_mapping(dict(run_config))
    device = torch_device(settings, backend)
    discard_old(states_dir())
    if data is None:
        torch.set_num_threads(settings.threads or 1)  # as in process: their number changes the last digits
        dataset = build_dataset(settings)
        partition = build_partition(settings, dataset)
        shard_of = lambda client: dataset.train.subset(partition.indices[client])  # noqa: E731
    else:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        assert images is not None  # the server tells every edge device what its images must be like
        dataset = own_dataset(data, images, settings.data.image_size, build_streaming(settings))
        shard_of = lambda _client: dataset.train  # noqa: E731
    dataset = placed(dataset, device)  # of which the shards are
    return Host(settings, dataset, shard_of, device)


def states_dir() -> Path:
    """Where the clients of all runs keep what they need between rounds."""
    return cache_dir() / "clients"
