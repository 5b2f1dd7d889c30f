"""What an experiment will cost, before it runs: FLOPs from formulas, seconds from a few training steps here."""

from __future__ import annotations

import heapq
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from fedfmd.build import Federation, build_sgd
from fedfmd.edge import plan_work
from fedfmd.engines.centralised import Training
from fedfmd.experiment.files import Experiment, PlannedRun
from fedfmd.experiment.run import Engine, Layout, Task, assemble, by_data, lay_out, place_runs
from fedfmd.settings import Settings
from fedfmd.training import evaluate, train

MEASURED_S = 1.5
"""Seconds that the measured steps of a network may take, after one to warm up; one step may take longer."""

MEASURED_STEPS = 20
TEST_IMAGES = 64


@dataclass(frozen=True)
class RunEstimate:
    """What a run will cost.

    Attributes:
        name: its name, "" if it is the only one.
        rounds: or epochs, in all; `done` of them were finished before.
        params: parameters of its network; `macs` of a forward pass for one image.
        train_flops: of all rounds, as `cum_train_flops` counts them.
        wall_s: seconds on this machine for the rounds that are left.
    """

    name: str
    rounds: int
    done: int
    params: int
    macs: int
    train_flops: int
    wall_s: float


@dataclass(frozen=True)
class Estimate:
    """What an experiment will cost, with `workers` runs at a time."""

    runs: tuple[RunEstimate, ...]
    workers: int

    @property
    def train_flops(self) -> int:
        """FLOPs of all runs."""
        return sum(run.train_flops for run in self.runs)

    @property
    def wall_s(self) -> float:
        """Seconds on this machine until the last run ends, each being started as soon as a worker is free."""
        free = [0.0] * self.workers
        for run in self.runs:
            heapq.heapreplace(free, free[0] + run.wall_s)
        return max(free)

    def as_json(self) -> dict[str, Any]:
        """Return the runs, as `cells`, and the totals; the names of the keys are those of the command's ``--json``."""
        cells = [{"cell": run.name, **asdict(run)} for run in self.runs]
        for cell in cells:
            del cell["name"]
        return {
            "cells": cells,
            "workers": self.workers,
            "train_flops": self.train_flops,
            "wall_s": self.wall_s,
        }


@dataclass(frozen=True)
class Speed:
    """Seconds per image on this machine."""

    train_s: float
    test_s: float


def estimate_experiment(experiment: Experiment, out: Path | None, engine: Engine, workers: int) -> Estimate:
    """Check all runs as `fedfmd run` does, write nothing, and say what they will cost.

    Each network is timed once, with the batches, threads and precision of its runs. Where trials are to choose
    values, the first value stands for the chosen one.

    Raises:
        SettingsError: a setting can't be used, or a folder holds another run.
    """
    trials = len(experiment.trials)
    tasks = place_runs(replace(experiment, runs=(*experiment.trials, *_to_follow(experiment))), out)
    layout = lay_out(len(tasks), engine, workers)
    speeds: dict[tuple[Any, ...], Speed] = {}
    estimates: dict[Task, RunEstimate] = {}
    for task in by_data(tasks):
        assembled = assemble(task.settings, engine)
        key = _what_sets_the_speed(task.settings)
        if key not in speeds:
            speeds[key] = measure_speed(assembled, layout.threads(task.settings))
        estimates[task] = estimate_run(task, assembled, speeds[key], layout)
    runs = [estimates[task] for task in tasks]
    if trials:
        runs[trials:] = [replace(run, name=f"{run.name} or as chosen") for run in runs[trials:]]
    return Estimate(tuple(runs), layout.runs)


def _to_follow(experiment: Experiment) -> tuple[PlannedRun, ...]:
    """Return the runs after the trials: each variant and seed with the first value, as the chosen one isn't known."""
    if not experiment.selection or not experiment.trials:
        return experiment.runs
    over = experiment.selection.over
    firsts: dict[tuple[Any, ...], PlannedRun] = {}
    for run in experiment.runs:
        flat = run.settings.flat().items()
        variant = tuple((key, value) for key, value in flat if key not in over)
        firsts.setdefault(variant, run)
    return tuple(firsts.values())


def estimate_run(task: Task, assembled: Federation | Training, speed: Speed, layout: Layout) -> RunEstimate:
    """Return what a run costs; if it is federated, with all clients there and planned for devices of nominal speed."""
    cost = assembled.cost
    images: float
    flops: float
    if isinstance(assembled, Training):
        images, nodes, testing = len(assembled.dataset.train), 1, 1
        flops = len(assembled.dataset.train) * cost.train_flops
    else:
        images, flops, nodes = _federated_round(assembled, layout)
        testing = layout.nodes
    evaluated: float = len(assembled.dataset.test) + len(assembled.dataset.validation or ())
    if task.settings.kind == "federated":
        evaluated /= task.settings.server.evaluate_every
    round_s = images * speed.train_s / nodes + evaluated * speed.test_s / testing
    return RunEstimate(
        name=task.name,
        rounds=task.rounds,
        done=task.done,
        params=cost.params,
        macs=cost.macs,
        train_flops=round(task.rounds * flops),
        wall_s=0.0 if task.finished else (task.rounds - task.done) * round_s,
    )


def _federated_round(federation: Federation, layout: Layout) -> tuple[float, float, int]:
    """Images trained on, FLOPs spent, and nodes that share the work, in a round."""
    clients = federation.fleet.clients
    plans = [plan_work(client, federation.workload(client.id), federation.budget) for client in clients]
    trained, asked = _clients_of_a_round(federation)
    images = trained / len(clients) * sum(plan.examples for plan in plans if plan.status == "ok")
    flops = asked / len(clients) * sum(plan.train_flops for plan in plans)
    return images, flops, min(layout.nodes, trained)


def measure_speed(assembled: Federation | Training, threads: int) -> Speed:
    """Time a few steps of training and an evaluation, which change the assembled model."""
    torch.set_num_threads(threads)
    dataset, model, device = assembled.dataset, assembled.model, assembled.device
    sgd = build_sgd(assembled.settings)
    images = dataset.train.subset(torch.arange(min(len(dataset.train), MEASURED_STEPS * sgd.batch_size)))
    tested = dataset.test.subset(torch.arange(min(len(dataset.test), TEST_IMAGES)))

    def train_s(steps: int) -> float:
        """Seconds per image."""
        started = time.perf_counter()
        done = train(model, images, dataset, sgd, steps, torch.Generator().manual_seed(0), device)
        return (time.perf_counter() - started) / done.examples

    def test_s() -> float:
        started = time.perf_counter()
        evaluate(model, tested, dataset, device=device)
        return (time.perf_counter() - started) / len(tested)

    train_s(1)
    steps = int(MEASURED_S / (train_s(1) * sgd.batch_size))
    test_s()
    return Speed(train_s(min(max(steps, 1), MEASURED_STEPS)), test_s())


def estimate_table(estimate: Estimate, title: str) -> Table:
    """One line per run, and the totals below."""
    runs = estimate.runs
    table = Table(title=title, box=box.SIMPLE, show_footer=True, padding=(0, 0, 0, 1))
    table.add_column("run", footer=f"{len(runs)}, {estimate.workers} at a time", overflow="fold")
    for head, total in (
        ("rounds", f"{sum(run.rounds for run in runs)}"),
        ("done", f"{sum(run.done for run in runs)}"),
        ("parameters", ""),
        ("GFLOPs", _giga(estimate.train_flops)),
        ("time left", _duration(estimate.wall_s)),
    ):
        table.add_column(head, footer=total, justify="right", no_wrap=True)
    for run in runs:
        counts = str(run.rounds), str(run.done), f"{run.params:,}"
        table.add_row(run.name or title, *counts, _giga(run.train_flops), _duration(run.wall_s))
    return table


def _clients_of_a_round(federation: Federation) -> tuple[int, int]:
    """How many clients train, and how many are asked to."""
    from fedfmd.algorithms import make_algorithm  # here, since Flower is what a federation needs

    settings = federation.settings
    if buffer := make_algorithm(settings).buffer:
        return buffer, buffer
    wanted = settings.clients_per_round
    return wanted, federation.budget.asked(wanted)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.0f}" if flops >= 1e11 else f"{flops / 1e9:.3g}"


def _duration(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def _what_sets_the_speed(settings: Settings) -> tuple[Any, ...]:
    train = settings.train
    of_training = train.batch_size, train.precision, train.memory_format
    return settings.model, settings.data, of_training, settings.device, settings.threads
