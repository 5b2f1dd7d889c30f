"""The Flower ClientApp: a node trains the clients that the server deals out to it.

In a simulation a node hosts any client: it holds the data set and the partition. A real box hosts its
own client, named in its ``--node-config`` (``client=3 data="/srv/images.npz" device="pi-4"``), and its
images never leave it. Its device is a known one or a file of its own, as `fedfmd calibrate` writes it
(``device="/srv/box.yaml"``).
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedfmd.build import build_dataset, build_model, build_partition, build_sgd, cache_dir, torch_device
from fedfmd.client.node_config import NodeConfig, check_version, own_dataset
from fedfmd.client.state import ClientState, ClientStates, discard_old, norm_views, states_of_run
from fedfmd.conv import AttentionRecord, record_attention, set_temperature
from fedfmd.cost import latency
from fedfmd.data import Dataset, ImageFormat, ImageSet
from fedfmd.edge import PROBE_IMAGES
from fedfmd.memory import keep_freed
from fedfmd.protocol.averaging import WeightedMean, effective_steps
from fedfmd.protocol.compression import ROUNDINGS, Upload, round_update
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    CONFIG,
    Assignment,
    ClientResult,
    Instruction,
    Reply,
    read_instruction,
    read_question,
    write_reply,
)
from fedfmd.protocol.state import Arrays, first_non_finite, load, parameter_names, trained_views
from fedfmd.seeds import derive_seed
from fedfmd.settings import Settings
from fedfmd.training import TrainResult, train
from fedfmd.training.partial import Kernels, most_attended, rotated, trained_parameters

app = ClientApp()
logger = logging.getLogger("fedfmd.client")
_thread = threading.local()
_loading = threading.Lock()

RECORDED_STEPS = 8
"""The last local steps whose attentions are recorded: enough for a mean, and little memory."""

LATENCY_IMAGES = 5
"""Images, after a warm-up, on which a box measures how long inference takes: their median."""

NOT_TRAINED = TrainResult(0, 0, math.nan, math.nan)


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
    hosted: dict[str, int | str] = {
        "client": -1,
        "rank": 0,
        "nodes": 0,
        "device": "",
        "profile": "",
        "images": 0,
        "error": "",
    }
    try:
        node = NodeConfig.from_mapping(context.node_config)
        hosted |= {"rank": node.rank, "nodes": node.nodes, "device": node.device, "profile": node.profile()}
        if node.client is not None:
            hosted["client"] = node.client
            version, images = read_question(message.content)
            check_version(version)
            hosted["images"] = len(_host_of(context, images).images_of(node.client))
    except Exception as error:  # the server decides what a refusing node means for the run
        hosted["error"] = f"{error}"
    return Message(RecordDict({CONFIG: ConfigRecord(hosted)}), reply_to=message)


@app.train()
def train_clients(message: Message, context: Context) -> Message:
    """Train the assigned clients one after another and answer once, with their weighted mean."""
    instruction, arrays = read_instruction(message.content)
    host = _host_of(context, instruction.images)
    reply = run_assignments(host, instruction, arrays)
    if "client" in context.node_config and reply.arrays:
        latency_s = latency(host.model, host.dataset.image_size, repeats=LATENCY_IMAGES)
        reply = replace(reply, results=tuple(replace(r, latency_s=latency_s) for r in reply.results))
    return Message(write_reply(reply), reply_to=message)


def run_assignments(host: Host, instruction: Instruction, arrays: Arrays) -> Reply:
    """Train each assigned client from the same global arrays; one that fails leaves no trace in the mean.

    The mean is of what the clients would send on their own. A client that is alone sends its rounded arrays.
    """
    mean = WeightedMean()
    results = []
    for assignment in instruction.assignments:
        result, upload = _run_client(host, instruction, assignment, arrays)
        if result.ok:
            mean.add(upload.restored(arrays), result.images)
        results.append(result)
        logger.debug("client %d: %s", result.client, result.reason or "ok", extra={"client": result.client})
    reply = Reply(mean.arrays(), tuple(results), mean.weights)
    if len(results) == 1 and results[0].ok and host.settings.transport.upload in ROUNDINGS:
        sent = {name: torch.as_tensor(array).numpy(force=True) for name, array in upload.arrays.items()}
        return replace(reply, arrays=sent, scales=dict(upload.scales))
    return reply


def _run_client(
    host: Host, instruction: Instruction, assignment: Assignment, arrays: Arrays
) -> tuple[ClientResult, Upload]:
    """What became of the client, and what it sends."""
    client, images, started = assignment.client, 0, time.perf_counter()
    trained, attention, upload, reason = NOT_TRAINED, AttentionRecord(), Upload({}), ""
    try:
        shard, model = host.images_of(client), host.model
        images, started = len(shard), time.perf_counter()  # data and model are made once per process
        states = _states(host, instruction)
        kept = states.load(client, instruction.round) if states else ClientState()
        _prepare(model, instruction, arrays, kept)
        trained, attention, kernels = _train(host, instruction, assignment, shard)
        update = trained_views(model, kernels)
        if instruction.normalised:
            update = _normalised(host, update, arrays, trained.steps)
        if broken := first_non_finite(update):
            reason = f"the update has NaN or infinite values in {broken}"
        else:
            upload, kept = _upload(host, instruction, update, arrays, kept)
            if states:
                states.save(client, instruction.round, kept)
    except Exception as error:  # one client's fault must not cost the others of this node their work
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    result = ClientResult(
        client,
        images,
        trained.steps,
        trained.examples,
        trained.loss,
        trained.accuracy,
        time.perf_counter() - started,
        reason,
        attention.kernel_entropy(),
        attention.mean("input"),
        attention.mean("output"),
    )
    return result, upload


def _states(host: Host, instruction: Instruction) -> ClientStates | None:
    """Where this run's clients keep what they need in later rounds; None if that is nothing."""
    settings = host.settings
    if not instruction.local_norm and settings.transport.upload not in ROUNDINGS:
        return None
    server = settings.server
    return states_of_run(states_dir(), instruction.run, server.checkpoint_every, server.keep_checkpoints)


def _prepare(model: nn.Module, instruction: Instruction, arrays: Arrays, kept: ClientState) -> None:
    """Give the model the global arrays and the round's temperature, and FedBN's client its own layers back."""
    load(model, arrays)
    set_temperature(model, instruction.temperature)
    if instruction.local_norm:
        views = norm_views(model)
        with torch.no_grad():
            for name, tensor in kept.norm.items():
                views[name].copy_(tensor)


def _train(
    host: Host, instruction: Instruction, assignment: Assignment, shard: ImageSet
) -> tuple[TrainResult, AttentionRecord, Kernels]:
    """Train the host's model; with the attentions of the last steps and the kernels that it chose."""
    settings = host.settings
    generator = torch.Generator().manual_seed(
        derive_seed(settings.seed, "client", instruction.round, assignment.client)
    )
    sgd = replace(
        build_sgd(settings),
        lr=instruction.lr,
        batch_size=assignment.batch_size,
        proximal=settings.train.proximal_mu,
    )
    kernels = _choose_kernels(host, assignment, shard, generator)
    with (
        trained_parameters(host.model, kernels) as parameters,
        record_attention(host.model, last=RECORDED_STEPS) as attention,
    ):
        optimiser = sgd.optimiser(parameters)
        trained = train(
            host.model, shard, host.dataset, sgd, assignment.steps, generator, host.device, optimiser
        )
    host.model.zero_grad()  # gradients are as large as the model, and a reply needs that room
    return trained, attention, kernels


def _normalised(host: Host, update: Mapping[str, Tensor], arrays: Arrays, steps: int) -> dict[str, Tensor]:
    """FedNova's w₀ + (w − w₀) / a for the parameters w; buffers as they are."""
    train, parameters = host.settings.train, parameter_names(host.model)
    share = 1 / effective_steps(steps, train.momentum, train.nesterov)
    return {
        name: torch.as_tensor(arrays[name], device=tensor.device).lerp(tensor, share)
        if name in parameters
        else tensor
        for name, tensor in update.items()
    }


def _upload(
    host: Host, instruction: Instruction, update: Mapping[str, Tensor], arrays: Arrays, kept: ClientState
) -> tuple[Upload, ClientState]:
    """What the client sends, and what it keeps for its next round."""
    upload, residual = Upload(update), kept.residual
    rounding = host.settings.transport.upload
    if rounding in ROUNDINGS:
        upload, residual = round_update(update, arrays, residual, rounding, parameter_names(host.model))
    return upload, ClientState(norm_views(host.model) if instruction.local_norm else {}, residual)


def _choose_kernels(
    host: Host, assignment: Assignment, shard: ImageSet, generator: torch.Generator
) -> Kernels:
    """The kernels to train in each layer; by attention only where there is a choice."""
    count, first = assignment.kernels, assignment.first_kernel
    if first != BY_ATTENTION or count == host.settings.model.kernels:
        return rotated(host.model, first, count)
    probe = shard.subset(torch.randperm(len(shard), generator=generator)[:PROBE_IMAGES])
    return most_attended(host.model, probe, host.dataset, count, host.device)


def states_dir() -> Path:
    """Where the clients of all runs keep what they need between rounds."""
    return cache_dir() / "clients"


def _host_of(context: Context, images: ImageFormat | None) -> Host:
    """What the node needs; `images` tells a box what its own must be like."""
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
        dataset = build_dataset(settings)
        partition = build_partition(settings, dataset)
        images_of = lambda client: dataset.train.subset(partition.indices[client])  # noqa: E731
    else:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        dataset = own_dataset(data, images, settings.data.image_size)
        images_of = lambda _client: dataset.train  # noqa: E731
    return Host(settings, dataset, images_of, device)
