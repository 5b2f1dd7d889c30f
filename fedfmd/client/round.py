"""A round of clients: each trains from the same global arrays, and what comes of them is averaged."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedfmd.algorithms import Algorithm, LocalTraining, make_algorithm
from fedfmd.build import build_sgd
from fedfmd.client.host import Host, states_dir
from fedfmd.client.state import ClientState, ClientStates, states_of_run
from fedfmd.conv import AttentionRecord, record_attention, set_temperature
from fedfmd.data import Images
from fedfmd.edge import PROBE_IMAGES
from fedfmd.protocol.averaging import ExactMean, fault_of
from fedfmd.protocol.compression import ROUNDINGS, Upload, round_update
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    ClientScore,
    Instruction,
    Reply,
    Scores,
)
from fedfmd.protocol.privacy import noise_generator, noised_update
from fedfmd.protocol.state import Arrays, fill, parameter_names, trained_views
from fedfmd.seeds import derive_seed
from fedfmd.training import (
    BatchTest,
    TrainResult,
    compute_gradients,
    evaluate,
    part_of,
    run_tests,
    train,
)
from fedfmd.training.partial import Kernels, are_whole, most_attended, rotated, trained_parameters

logger = logging.getLogger("fedfmd.client")

RECORDED_STEPS = 8
"""The last local steps whose attentions are recorded: enough for a mean, and little memory."""

NOT_TRAINED = TrainResult(0, 0, math.nan, math.nan)


def run_assignments(host: Host, instruction: Instruction, arrays: Arrays) -> Reply:
    """Train each assigned client from the same global arrays; one that fails leaves no trace in the mean.

    The mean is of what the clients would send on their own. A client that is alone sends its arrays, or rounded ones.
    """
    algorithm = make_algorithm(host.settings)
    ran = (_run_client(host, algorithm, instruction, one, arrays) for one in instruction.assignments)
    if len(instruction.assignments) == 1:
        ((result, upload),) = ran
        sent = {name: torch.as_tensor(a).clone().numpy(force=True) for name, a in upload.arrays.items()}
        return Reply(sent, (result,), dict.fromkeys(sent, result.images), dict(upload.scales))
    rounded = host.settings.transport.upload in ROUNDINGS
    mean, results = ExactMean(arrays, images=len(host.dataset.train)), []
    for result, upload in ran:
        results.append(result)
        if result.ok:
            mean.add(upload.restored(arrays) if rounded else upload.arrays, result.images)
    averaged = mean.arrays()
    return Reply(averaged, tuple(results), mean.weights, rest=mean.rest(averaged))


def test_model(host: Host, instruction: Instruction, arrays: Arrays) -> Scores:
    """Test the global arrays on the images that each assigned client holds out, and on a part of the run's own.

    Where the algorithm leaves arrays with the client, its own model is tested too: the global arrays, with those that
    the client kept in the round before the instruction's.
    """
    algorithm = make_algorithm(host.settings)
    clients = tuple(
        _score(host, algorithm, instruction, assignment.client, arrays)
        for assignment in instruction.assignments
    )
    return Scores(clients, *_test_part(host, instruction, arrays))


def _test_part(
    host: Host, instruction: Instruction, arrays: Arrays
) -> tuple[Sequence[BatchTest], Sequence[BatchTest]]:
    """Test the global arrays on a part of the run's test images, and of its validation images."""
    if not instruction.parts:
        return (), ()
    dataset, model = host.dataset, host.model
    fill(host.views, arrays)
    test, validation = (
        run_tests(model, part_of(images, instruction.part, instruction.parts), dataset, device=host.device)
        if images
        else ()
        for images in (dataset.test, dataset.validation)
    )
    return test, validation


def _score(
    host: Host, algorithm: Algorithm, instruction: Instruction, client: int, arrays: Arrays
) -> ClientScore:
    try:
        images, model = host.tests_of(client), host.model
        if not len(images):
            return ClientScore(client)
        fill(host.views, arrays)
        tested = evaluate(model, images, host.dataset, device=host.device)
        score = ClientScore(client, tested.loss, tested.accuracy)
        own = _kept(host, instruction, client).own if algorithm.private(model) else {}
        if not own:
            return score
        with algorithm.training(LocalTraining(model, arrays, own)):  # puts the client's arrays in
            tested = evaluate(model, images, host.dataset, device=host.device)
        return replace(score, personal_test_loss=tested.loss, personal_test_accuracy=tested.accuracy)
    except Exception as error:  # one client's fault must not cost the others of this node their scores
        return ClientScore(client, reason=_fault(error))


def _run_client(
    host: Host, algorithm: Algorithm, instruction: Instruction, assignment: Assignment, arrays: Arrays
) -> tuple[ClientResult, Upload]:
    """Train a client; return what became of it, and what it sends."""
    client, images, started = assignment.client, 0, time.perf_counter()
    trained, attention, upload, reason = NOT_TRAINED, AttentionRecord(), Upload({}), ""
    try:
        shard, model = host.images_of(client), host.model
        images, started = len(shard), time.perf_counter()  # data and model are made once per process
        kept = _kept(host, instruction, client)
        fill(host.views, arrays)
        set_temperature(model, instruction.temperature)
        local = LocalTraining(model, arrays, kept.own)
        with algorithm.training(local):
            trained, attention, kernels = _train(host, instruction, assignment, shard)
        update = algorithm.update(local, trained_views(host.views, kernels), trained.steps)
        if fault := fault_of(update, arrays):
            reason = f"the update has {fault}"
        else:
            update = _noised(host, instruction, client, update, arrays)
            upload, residual = _upload(host, update, arrays, kept.residual)
            _keep(host, instruction, client, ClientState(algorithm.keep(local), residual))
    except Exception as error:  # one client's fault must not cost the others of this node their work
        reason = _fault(error)
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
    logger.debug("client %d: %s", client, reason or "ok", extra={"client": client})
    return result, upload


def _fault(error: Exception) -> str:
    """Tell an error in one line, its kind too: it may be of any."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _kept(host: Host, instruction: Instruction, client: int) -> ClientState:
    """Return what the client keeps from earlier rounds."""
    if not instruction.run:
        return ClientState()
    return _states(host, instruction).load(client, instruction.round)


def _keep(host: Host, instruction: Instruction, client: int, state: ClientState) -> None:
    """Keep what there is for later rounds."""
    if state.own or state.residual:
        _states(host, instruction).save(client, instruction.round, state)


def _states(host: Host, instruction: Instruction) -> ClientStates:
    server = host.settings.server
    return states_of_run(states_dir(), instruction.run, server.checkpoint_every, server.keep_checkpoints)


def _train(
    host: Host, instruction: Instruction, assignment: Assignment, shard: Images
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
            host.model,
            shard,
            host.dataset,
            sgd,
            assignment.steps,
            generator,
            host.device,
            optimiser,
            compute=host.compute if are_whole(parameters) else compute_gradients,
        )
        optimiser.zero_grad()  # gradients are as large as the model, and a reply needs that room
    return trained, attention, kernels


def _noised(
    host: Host, instruction: Instruction, client: int, update: Mapping[str, Tensor], arrays: Arrays
) -> Mapping[str, Tensor]:
    """Return the update as it is, or clipped and with noise under local privacy."""
    privacy = host.settings.privacy
    if not privacy.clip_norm or privacy.mode != "local":
        return update
    seed = derive_seed(host.settings.seed, "privacy", instruction.round, client)
    generator = noise_generator(seed, secret=instruction.images is not None)
    parameters = parameter_names(host.model)
    return noised_update(update, arrays, parameters, privacy.clip_norm, privacy.noise_multiplier, generator)


def _upload(
    host: Host, update: Mapping[str, Tensor], arrays: Arrays, residual: Mapping[str, Tensor]
) -> tuple[Upload, Mapping[str, Tensor]]:
    """Return what the client sends, and what rounding leaves over of it."""
    rounding = host.settings.transport.upload
    if rounding not in ROUNDINGS:
        return Upload(update), residual
    return round_update(update, arrays, residual, rounding, parameter_names(host.model))


def _choose_kernels(host: Host, assignment: Assignment, shard: Images, generator: torch.Generator) -> Kernels:
    """Return the kernels to train in each layer; by attention only where there is a choice."""
    count, first = assignment.kernels, assignment.first_kernel
    if first != BY_ATTENTION or count == host.settings.model.kernels:
        return rotated(host.model, first, count)
    probe = shard.subset(torch.randperm(len(shard), generator=generator)[:PROBE_IMAGES])
    return most_attended(host.model, probe, host.dataset, count, host.device)
