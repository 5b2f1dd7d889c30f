"""Centralised training: one model learns from all training images, epoch by epoch, as the operators' papers do it."""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fedfmd.build import (
    build_compute,
    build_dataset,
    build_model,
    build_rate,
    build_sgd,
    build_temperature,
    check_last_batches,
    check_training,
    describe_network,
    placed,
    torch_device,
)
from fedfmd.conv import TemperatureSchedule, has_temperature, set_temperature
from fedfmd.cost import Cost, count, ies, latency, rcs
from fedfmd.data import Dataset, decoded_by
from fedfmd.errors import RunError, SettingsError
from fedfmd.memory import keep_freed
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.runs import (
    Checkpoint,
    EpochRow,
    RunFolder,
    known,
    latest_checkpoint,
    save_checkpoint,
    stopped_by,
)
from fedfmd.seeds import derive_seed
from fedfmd.settings import Settings
from fedfmd.start import load_start
from fedfmd.tracking import find_callbacks
from fedfmd.training import Best, Compute, LocalSGD, Tally, TrainResult, evaluate_on_both, train
from fedfmd.version import __version__

logger = logging.getLogger(__name__)

OPTIMISER = "optimiser"
"""What a checkpoint calls the optimiser's own numbers."""

GROUPS = "group-"
"""How the places of an optimiser's groups of parameters begin."""


@dataclass(frozen=True)
class Training:
    """Everything that is fixed during a run."""

    settings: Settings
    dataset: Dataset
    model: nn.Module
    cost: Cost
    sgd: LocalSGD
    temperature: TemperatureSchedule
    device: torch.device
    compute: Compute
    start: str = ""

    @property
    def steps(self) -> int:
        """How many steps an epoch has."""
        return math.ceil(len(self.dataset.train) / self.sgd.batch_size)


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its arrays: what a resume needs.

    `epoch` epochs are finished, in `wall_s` seconds of training. In the next one, training has met what `begun` tells,
    in `begun_s` seconds.
    """

    epoch: int = 0
    wall_s: float = 0.0
    best: Best = field(default_factory=Best)
    begun: Tally = field(default_factory=Tally)
    begun_s: float = 0.0


def run_centralised(settings: Settings, threads: int, cores: int = 1) -> None:
    """Train from the start, or from the newest checkpoint of ``run-dir``, to the last epoch.

    It ends earlier where a limit of ``server.stop-at`` is met. Each epoch is logged with its `EpochRow` as the record's
    `round_row`.

    Args:
        settings: of ``kind = centralised``.
        threads: cores that PyTorch uses, unless the settings say so.
        cores: all that the run may use; those that training leaves free may decode streamed images.

    Raises:
        SettingsError: as in `prepare_centralised`; nothing was started.
        RunError: the training diverged, or an image can't be read; finished epochs are kept.
    """
    torch.set_num_threads(settings.threads or threads)
    keep_freed()
    training = _with_workers(prepare_centralised(settings), cores)
    with open_run_folder(settings) as folder:
        optimiser = training.sgd.optimiser(training.model.parameters())
        for group in optimiser.param_groups:
            group.setdefault("initial_lr", group["lr"])  # PyTorch's name; a group may have a rate of its own
        progress = _resume(training, optimiser, folder)
        for line in _header(training):
            logger.info(line)
        latency_s = latency(training.model, training.dataset.image_size)
        reason = stopped_by(folder.path, settings.stop_limits, progress.epoch)
        while progress.epoch < settings.length and not reason:
            epoch = progress.epoch + 1
            row, best = _run_epoch(training, optimiser, progress, latency_s, folder)
            folder.append_epoch(row)
            reason = stopped_by(folder.path, settings.stop_limits, epoch)
            progress = Progress(epoch, row.cum_wall_s, best)
            if epoch % settings.server.checkpoint_every == 0 or epoch == settings.length or reason:
                _save(training, optimiser, progress, folder)
            logger.info(_epoch_text(row, settings.length), extra={"round_row": row})
        if reason:
            logger.info("the run ends after epoch %d of %d: %s", progress.epoch, settings.length, reason)
        chosen = " by validation" if training.dataset.validation else ""
        logger.info("%d epochs done, best accuracy%s %.4f", progress.epoch, chosen, progress.best.accuracy)
        logger.info("results: %s", folder.path)


def prepare_centralised(settings: Settings) -> Training:
    """Assemble a run, with all the checks that can be made before anything is written.

    Raises:
        SettingsError: the settings can't be used, or their run folder holds another run.
    """
    find_callbacks(settings)
    run_path(settings)
    device = torch_device(settings)
    dataset = build_dataset(settings)
    model = build_model(settings, dataset.classes, dataset.image_size)
    start = load_start(model, settings, dataset.classes)
    check_last_batches(settings, model, [(len(dataset.train), settings.train.batch_size)], dataset)
    model = model.to(device)
    cost = count(model, dataset.image_size)
    check_training(settings, model, dataset.classes)
    return Training(
        settings,
        placed(dataset, device),
        model,
        cost,
        build_sgd(settings),
        build_temperature(settings),
        device,
        build_compute(settings, device),
        start,
    )


def _with_workers(training: Training, cores: int) -> Training:
    """Have as many processes decode streamed images as cores are left by training; on a GPU that takes one core."""
    busy = torch.get_num_threads() if training.device.type == "cpu" else 1
    workers = max(0, min(training.settings.data.workers, cores - busy))
    return replace(training, dataset=decoded_by(training.dataset, workers))


def _run_epoch(
    training: Training,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    latency_s: float,
    folder: RunFolder,
) -> tuple[EpochRow, Best]:
    """Train for an epoch, or for what is left of it, and evaluate.

    Its order and augmentation depend on (seed, epoch) alone.
    """
    settings, dataset, model = training.settings, training.dataset, training.model
    done = progress.epoch
    epoch = done + 1
    lr = build_rate(settings, done)
    for group in optimiser.param_groups:
        group["lr"] = lr * (group.get("initial_lr", training.sgd.lr) / training.sgd.lr)
    temperature = training.temperature.at(done)
    set_temperature(model, temperature)
    trained, wall_s = _train_epoch(training, optimiser, progress, folder)
    if not math.isfinite(trained.loss):
        raise RunError(
            f"epoch {epoch}: the training loss is {trained.loss}, training diverged at a learning rate of {lr:g}; "
            f"finished epochs are kept. Choose {settings.train.steadier()}, and another run folder"
        )
    tested, validated = evaluate_on_both(model, dataset, training.device)
    best = progress.best.or_later(tested, validated)
    train_flops = trained.examples * training.cost.train_flops
    row = EpochRow(
        epoch=epoch,
        wall_s=wall_s,
        cum_wall_s=progress.wall_s + wall_s,
        lr=lr,
        temperature=temperature if has_temperature(model) else None,
        train_loss=trained.loss,
        train_accuracy=trained.accuracy,
        loss=tested.loss,
        accuracy=tested.accuracy,
        top5_accuracy=known(tested.top5_accuracy),
        best_accuracy=best.accuracy,
        validation_loss=validated.loss if validated else None,
        validation_accuracy=validated.accuracy if validated else None,
        kernel_entropy=known(tested.kernel_entropy),
        train_flops=train_flops,
        cum_train_flops=epoch * train_flops,
        latency_s=latency_s,
        ies_train=ies(wall_s, tested.accuracy),
        rcs_train=rcs(tested.accuracy, wall_s),
        ies_infer=ies(latency_s, tested.accuracy),
        rcs_infer=rcs(tested.accuracy, latency_s),
    )
    return row, best


def _train_epoch(
    training: Training, optimiser: torch.optim.Optimizer, progress: Progress, folder: RunFolder
) -> tuple[TrainResult, float]:
    """Train for what is left of an epoch, with checkpoints in between; returns also all of its seconds but these."""
    settings, dataset = training.settings, training.dataset
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "epoch", progress.epoch + 1))
    started, saved = time.perf_counter() - progress.begun_s, time.perf_counter()

    def save_now_and_then(tally: Callable[[], Tally]) -> None:
        nonlocal started, saved
        if (now := time.perf_counter()) < saved + settings.train.checkpoint_s:
            return
        _save(training, optimiser, replace(progress, begun=tally(), begun_s=now - started), folder)
        saved = time.perf_counter()
        started += saved - now

    trained = train(
        training.model,
        dataset.train,
        dataset,
        training.sgd,
        training.steps,
        generator,
        training.device,
        optimiser,
        since=progress.begun,
        after_step=save_now_and_then if settings.train.checkpoint_s else None,
        compute=training.compute,
    )
    return trained, time.perf_counter() - started


def _save(
    training: Training,
    optimiser: torch.optim.Optimizer,
    progress: Progress,
    folder: RunFolder,
) -> None:
    """Write the checkpoint of the last epoch, or, once the next has begun, one numbered by all steps so far."""
    settings, begun = training.settings, progress.begun.steps
    tensors, numbers = _dump(optimiser)
    if begun:
        folder.unfinished.mkdir(exist_ok=True)
    save_checkpoint(
        folder.unfinished if begun else folder.checkpoints,
        progress.epoch * training.steps + begun if begun else progress.epoch,
        training.model.state_dict(),
        asdict(progress) | {OPTIMISER: numbers},
        settings.kept(),
        tensors,
        keep=1 if begun else settings.server.keep_checkpoints,
        class_names=training.dataset.class_names,
        records=folder.records,
    )
    if not begun:
        shutil.rmtree(folder.unfinished, ignore_errors=True)


def _resume(training: Training, optimiser: torch.optim.Optimizer, folder: RunFolder) -> Progress:
    checkpoint = _newest(folder)
    if checkpoint is None:
        folder.truncate_after(0)
        return Progress()
    training.model.load_state_dict(checkpoint.arrays)
    state = dict(checkpoint.state)
    _restore(optimiser, checkpoint.extra_arrays, state.pop(OPTIMISER))
    parts = {"best": Best(**state["best"]), "begun": Tally(**state["begun"])}
    progress = Progress(**state | parts)
    folder.truncate_after(progress.epoch)
    steps = progress.begun.steps
    logger.info(
        "going on after epoch %d%s", progress.epoch, f" and {steps} steps of the next" if steps else ""
    )
    return progress


def _newest(folder: RunFolder) -> Checkpoint | None:
    """Return the checkpoint that is furthest; one within an epoch counts as long as none of its end is there."""
    finished, unfinished = latest_checkpoint(folder.checkpoints), None
    with suppress(RunError):  # it was warned of, and the last epoch's checkpoint can stand in for it
        unfinished = latest_checkpoint(folder.unfinished)
    if unfinished and unfinished.state["epoch"] >= (finished.round if finished else 0):
        return unfinished
    return finished


def _dump(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state, by `place/name`, place being a parameter's: tensors, and what JSON knows.

    The values of its groups of parameters stand under `group-0/…`.

    Raises:
        SettingsError: it keeps something else, as a user's own may, without which it could not go on.
    """
    whole = optimiser.state_dict()
    groups = {f"{GROUPS}{place}": group for place, group in enumerate(whole["param_groups"])}
    entries = {
        f"{place}/{name}": value
        for place, own in [*whole["state"].items(), *groups.items()]
        for name, value in own.items()
        if name != "params"  # the places of the group's parameters
    }
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    others = {key: value for key, value in entries.items() if key not in tensors}
    for key, value in others.items():
        try:
            json.dumps(value)
        except TypeError:
            raise SettingsError(
                f"train.optimiser = {type(optimiser).__name__}: {key} of its state is of type {type(value).__name__}: "
                "keep tensors, numbers, texts and lists of them, which checkpoints can hold"
            ) from None
    return tensors, others


def _restore(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Take back what `_dump` gave."""
    whole = optimiser.state_dict()
    for key, value in {**tensors, **numbers}.items():
        place, _, name = key.partition("/")
        if place.startswith(GROUPS):
            group = whole["param_groups"][int(place.removeprefix(GROUPS))]
            group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
        else:
            whole["state"].setdefault(int(place), {})[name] = value
    optimiser.load_state_dict(whole)


def _header(training: Training) -> list[str]:
    settings, dataset = training.settings, training.dataset
    train = settings.train
    return [
        f"fedfmd {__version__}: {describe_network(settings, training.cost, dataset)}",
        f"{settings.length} epochs over {len(dataset.train):,} images in batches of {train.batch_size}, learning rate "
        f"{train.lr:g} ({train.schedule}), {train.precision} on {training.device}; seed {settings.seed}",
        *([f"starting from {training.start}"] if training.start else []),
    ]


def _epoch_text(row: EpochRow, epochs: int) -> str:
    """One epoch in one line."""
    top5 = "" if row.top5_accuracy is None else f"  top-5 {row.top5_accuracy:.4f}"
    return (
        f"epoch {row.epoch:>{len(str(epochs))}}/{epochs}  {row.wall_s:8.1f} s  accuracy {row.accuracy:.4f}{top5}  "
        f"loss {row.loss:7.4f}  IES {row.ies_train:8.2f} s  RCS {row.rcs_train:8.5f} /s"
    )
