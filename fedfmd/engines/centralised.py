"""Centralised training: one model learns from all training images, epoch by epoch, as the operators' papers do it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedfmd.build import (
    build_dataset,
    build_model,
    build_rate,
    build_sgd,
    build_temperature,
    check_training,
    describe_network,
    torch_device,
)
from fedfmd.conv import TemperatureSchedule, has_temperature, set_temperature
from fedfmd.cost import Cost, count, ies, latency, rcs
from fedfmd.data import Dataset
from fedfmd.errors import RunError
from fedfmd.memory import keep_freed
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.runs import (
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
from fedfmd.training import Best, LocalSGD, evaluate_on_both, train
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
    start: str = ""


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its arrays: what a resume needs."""

    epoch: int = 0
    wall_s: float = 0.0
    best: Best = field(default_factory=Best)


def run_centralised(settings: Settings, threads: int) -> None:
    """Train from the start, or from the newest checkpoint of ``run-dir``, to the last epoch.

    It ends earlier where a limit of ``server.stop-at`` is met. Each epoch is logged with its `EpochRow` as the record's
    `round_row`.

    Args:
        settings: of ``kind = centralised``.
        threads: cores that PyTorch uses, unless the settings say so.

    Raises:
        SettingsError: as in `prepare_centralised`; nothing was started.
        RunError: the training diverged; finished epochs are kept.
    """
    torch.set_num_threads(settings.threads or threads)
    keep_freed()
    training = prepare_centralised(settings)
    with open_run_folder(settings) as folder:
        optimiser = training.sgd.optimiser(training.model.parameters())
        progress = _resume(training, optimiser, folder)
        for line in _header(training):
            logger.info(line)
        latency_s = latency(training.model, training.dataset.image_size)
        reason = stopped_by(folder.path, settings.stop_limits, progress.epoch)
        while progress.epoch < settings.length and not reason:
            epoch = progress.epoch + 1
            row, best = _run_epoch(training, optimiser, epoch, progress, latency_s)
            folder.append_epoch(row)
            reason = stopped_by(folder.path, settings.stop_limits, epoch)
            progress = Progress(epoch, row.cum_wall_s, best)
            if epoch % settings.server.checkpoint_every == 0 or epoch == settings.length or reason:
                _save(training, optimiser, progress, folder)
            logger.info(_epoch_text(row, settings.length), extra={"round_row": row})
        if reason:
            logger.info("the run ends after epoch %d of %d: %s", progress.epoch, settings.length, reason)
        logger.info("%d epochs done, best accuracy %.4f", progress.epoch, progress.best.accuracy)
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
    model = model.to(device)
    cost = count(model, dataset.image_size)
    check_training(settings, dataset.classes)
    return Training(
        settings, dataset, model, cost, build_sgd(settings), build_temperature(settings), device, start
    )


def _run_epoch(
    training: Training,
    optimiser: torch.optim.Optimizer,
    epoch: int,
    progress: Progress,
    latency_s: float,
) -> tuple[EpochRow, Best]:
    """Train for an epoch, whose order and augmentation depend on (seed, epoch) alone, and evaluate."""
    settings, dataset, model = training.settings, training.dataset, training.model
    done = epoch - 1
    lr = build_rate(settings, done)
    for group in optimiser.param_groups:
        group["lr"] = lr
    temperature = training.temperature.at(done)
    set_temperature(model, temperature)
    steps = math.ceil(len(dataset.train) / training.sgd.batch_size)
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "epoch", epoch))
    started = time.perf_counter()
    trained = train(model, dataset.train, dataset, training.sgd, steps, generator, training.device, optimiser)
    wall_s = time.perf_counter() - started
    if not math.isfinite(trained.loss):
        raise RunError(
            f"epoch {epoch}: the training loss is {trained.loss}, training diverged at a learning rate of {lr:g}; "
            f"finished epochs are kept. Choose train.lr below {settings.train.lr:g}, and another run folder"
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


def _save(
    training: Training, optimiser: torch.optim.Optimizer, progress: Progress, folder: RunFolder
) -> None:
    settings = training.settings
    tensors, numbers = _dump(optimiser)
    save_checkpoint(
        folder.checkpoints,
        progress.epoch,
        training.model.state_dict(),
        asdict(progress) | {OPTIMISER: numbers},
        settings.kept(),
        tensors,
        keep=settings.server.keep_checkpoints,
        class_names=training.dataset.class_names,
        records=folder.records,
    )


def _resume(training: Training, optimiser: torch.optim.Optimizer, folder: RunFolder) -> Progress:
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        folder.truncate_after(0)
        return Progress()
    training.model.load_state_dict(checkpoint.arrays)
    state = dict(checkpoint.state)
    _restore(optimiser, checkpoint.extra_arrays, state.pop(OPTIMISER))
    folder.truncate_after(checkpoint.round)
    logger.info("going on after epoch %d", checkpoint.round)
    return Progress(**state | {"best": Best(**state["best"])})


def _dump(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state, by `place/name`, place being a parameter's: tensors, and what JSON knows.

    The numbers of its groups of parameters stand under `group-0/…`. Anything else, as a user's own may have, is not
    kept.
    """
    whole = optimiser.state_dict()
    groups = {f"{GROUPS}{place}": group for place, group in enumerate(whole["param_groups"])}
    entries = {
        f"{place}/{name}": value
        for place, own in [*whole["state"].items(), *groups.items()]
        for name, value in own.items()
    }
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    return tensors, {
        key: value for key, value in entries.items() if isinstance(value, bool | int | float | str)
    }


def _restore(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
) -> None:
    """Take back what `_dump` gave."""
    whole = optimiser.state_dict()
    for key, value in {**tensors, **numbers}.items():
        place, _, name = key.partition("/")
        if place.startswith(GROUPS):
            whole["param_groups"][int(place.removeprefix(GROUPS))][name] = value
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
