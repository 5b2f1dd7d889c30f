"""The Flower ClientApp: a node trains the clients that the server deals out to it.

In a simulation a node hosts any client: it holds the data set and the partition. A real box hosts its
own client, named in its ``--node-config`` (``client=3 data="/srv/images.npz" device="pi-4"``), and its
images never leave it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedfmd.averaging import WeightedMean
from fedfmd.conv import set_temperature
from fedfmd.data import Dataset, ImageSet, load_image_set
from fedfmd.edge import PROBE_IMAGES
from fedfmd.federation import build_dataset, build_model, build_partition, torch_device
from fedfmd.kernels import Kernels, most_attended, rotated, trained_parameters
from fedfmd.seeds import derive_seed
from fedfmd.settings import Settings
from fedfmd.training import LocalSGD, train
from fedfmd.wire import (
    BY_ATTENTION,
    CONFIG,
    Arrays,
    Assignment,
    ClientResult,
    Instruction,
    Reply,
    first_non_finite,
    load,
    read_instruction,
    trained_views,
    write_reply,
)

app = ClientApp()
logger = logging.getLogger("fedfmd.client")
_thread = threading.local()
_loading = threading.Lock()


@dataclass(frozen=True)
class Host:
    """What the nodes of a process keep between messages."""

    settings: Settings
    dataset: Dataset
    images_of: Callable[[int], ImageSet]
    device: torch.device

    @property
    def model(self) -> nn.Module:
        """The calling thread's model, for all clients that it trains: nodes of one process are threads."""
        if getattr(_thread, "host", None) is not self:
            _thread.host = self
            _thread.model = build_model(self.settings, self.dataset.classes).to(self.device)
        return _thread.model


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tell the server which client this node hosts (-1: any) and with what."""
    box = context.node_config
    hosted: dict[str, int | str] = {
        "client": int(box.get("client", -1)),
        "rank": int(box.get("partition-id", box.get("client", 0))),
        "nodes": int(box.get("num-partitions", 0)),
        "device": str(box.get("device", "")),
        "images": 0,
        "error": "",
    }
    try:
        if "client" in box:
            hosted["images"] = len(_host_of(context).images_of(int(box["client"])))
    except Exception as error:  # the server decides what a refusing node means for the run
        hosted["error"] = f"{error}"
    return Message(RecordDict({CONFIG: ConfigRecord(hosted)}), reply_to=message)


@app.train()
def train_clients(message: Message, context: Context) -> Message:
    """Train the assigned clients one after another and answer once, with their weighted mean."""
    instruction, arrays = read_instruction(message.content)
    reply = run_assignments(_host_of(context), instruction, arrays)
    return Message(write_reply(reply), reply_to=message)


def run_assignments(host: Host, instruction: Instruction, arrays: Arrays) -> Reply:
    """Train each assigned client from the same global arrays; one that fails leaves no trace in the mean."""
    mean = WeightedMean()
    results = []
    for assignment in instruction.assignments:
        result, update = _run_client(host, instruction, assignment, arrays)
        if result.ok:
            mean.add(update, result.images)
        results.append(result)
        logger.debug("client %d: %s", result.client, result.reason or "ok", extra={"client": result.client})
    return Reply(mean.arrays(), tuple(results), mean.weights)


def _run_client(
    host: Host, instruction: Instruction, assignment: Assignment, arrays: Arrays
) -> tuple[ClientResult, dict[str, Tensor]]:
    """What became of the client, and what it trained: views of the host's model."""
    started = time.perf_counter()
    settings, client = host.settings, assignment.client
    images = 0

    def result(steps: int, examples: int, loss: float, accuracy: float, reason: str = "") -> ClientResult:
        wall_s = time.perf_counter() - started
        return ClientResult(client, images, steps, examples, loss, accuracy, wall_s, reason)

    try:
        shard = host.images_of(client)
        images = len(shard)
        load(host.model, arrays)
        set_temperature(host.model, instruction.temperature)
        generator = torch.Generator().manual_seed(
            derive_seed(settings.seed, "client", instruction.round, client)
        )
        options = settings.train
        sgd = LocalSGD(
            lr=instruction.lr,
            momentum=options.momentum,
            nesterov=options.nesterov,
            weight_decay=options.weight_decay,
            batch_size=assignment.batch_size,
            precision=options.precision,
        )
        kernels = _choose_kernels(host, assignment, shard, generator)
        with trained_parameters(host.model, kernels) as parameters:
            optimiser = sgd.optimiser(parameters)
            trained = train(
                host.model, shard, host.dataset, sgd, assignment.steps, generator, host.device, optimiser
            )
    except Exception as error:  # one client's fault must not cost the others of this node their work
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return result(0, 0, float("nan"), float("nan"), reason), {}
    update = trained_views(host.model, kernels)
    broken = first_non_finite(update)
    reason = f"the update has NaN or infinite values in {broken}" if broken else ""
    return result(trained.steps, trained.examples, trained.loss, trained.accuracy, reason), update


def _choose_kernels(
    host: Host, assignment: Assignment, shard: ImageSet, generator: torch.Generator
) -> Kernels:
    """The kernels to train in each layer; by attention only where there is a choice."""
    count, first = assignment.kernels, assignment.first_kernel
    if first != BY_ATTENTION or count == host.settings.model.kernels:
        return rotated(host.model, first, count)
    probe = shard.subset(torch.randperm(len(shard), generator=generator)[:PROBE_IMAGES])
    return most_attended(host.model, probe, host.dataset, count, host.device)


def _host_of(context: Context) -> Host:
    data = context.node_config.get("data")
    with _loading:
        return _load_host(tuple(sorted(context.run_config.items())), None if data is None else str(data))


@lru_cache(maxsize=1)
def _load_host(run_config: tuple[tuple[str, bool | int | float | str], ...], data: str | None) -> Host:
    """Load what a node needs, once per process and run."""
    settings = Settings.from_mapping(dict(run_config))
    device = torch_device(settings)
    dataset = build_dataset(settings)
    if data is None:
        partition = build_partition(settings, dataset)
        images_of = lru_cache(maxsize=None)(lambda client: dataset.train.subset(partition.indices[client]))
    else:
        own = load_image_set(Path(data), image_size=dataset.image_size, class_names=dataset.class_names)
        images_of = lambda _client: own  # noqa: E731
    return Host(settings, dataset, images_of, device)
