"""A round of clients: each trains from the same global arrays, and what comes of them is averaged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedfmd.build import build_sgd
from fedfmd.client.host import Host, states_dir
from fedfmd.client.state import ClientState, ClientStates, norm_views, states_of_run
from fedfmd.conv import AttentionRecord, record_attention, set_temperature
from fedfmd.data import ImageSet
from fedfmd.edge import PROBE_IMAGES
from fedfmd.protocol.averaging import WeightedMean, effective_steps
from fedfmd.protocol.compression import ROUNDINGS, Upload, round_update
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Instruction,
    Reply,
)
from fedfmd.protocol.state import Arrays, first_non_finite, load, parameter_names, trained_views
from fedfmd.seeds import derive_seed
from fedfmd.training import TrainResult, train
from fedfmd.training.partial import Kernels, most_attended, rotated, trained_parameters

logger = logging.getLogger("fedfmd.client")

RECORDED_STEPS = 8
"""The last local steps whose attentions are recorded: enough for a mean, and little memory."""

NOT_TRAINED = TrainResult(0, 0, math.nan, math.nan)


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
