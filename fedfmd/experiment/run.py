"""Runs an experiment, one folder for each run, side by side where there are several.

What needs Flower is imported where it is used: centralised training does without it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.console import Console

from fedfmd.build import Federation, torch_device
from fedfmd.engines.centralised import Training, prepare_centralised, run_centralised
from fedfmd.errors import RunError, SettingsError, need, one_line
from fedfmd.experiment.display import ExperimentDisplay, RunDisplay
from fedfmd.experiment.files import Experiment, PlannedRun
from fedfmd.experiment.pool import Ended, Started, attempt, run_jobs
from fedfmd.memory import trim
from fedfmd.report import LIBRARIES
from fedfmd.report.comparison import read_comparison
from fedfmd.report.selection import Selection
from fedfmd.report.wording import WORDINGS
from fedfmd.run_folder import run_path
from fedfmd.runs import CHECKPOINTS, latest_round, stopped_by
from fedfmd.settings import Settings

if TYPE_CHECKING:
    from fedfmd.engines.cluster import Cluster

Engine = Literal["inline", "flwr"]

logger = logging.getLogger("fedfmd.experiment")


@dataclass(frozen=True)
class Task:
    """A planned run in its folder, of whose rounds `done` were finished before.

    `stopped` tells which limit of ``server.stop-at`` they have met, "" if none.
    """

    name: str
    settings: Settings
    done: int
    stopped: str = ""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.settings.run_dir)

    @property
    def rounds(self) -> int:
        """How many rounds, or epochs of centralised training, there are in all."""
        return self.settings.length

    @property
    def finished(self) -> bool:
        """Whether all of them are done, or as many as it takes to meet a limit."""
        return self.done >= self.rounds or bool(self.stopped)

    def as_it_is(self) -> Task:
        """Return the run as its folder tells of it now."""
        done = latest_round(self.folder / CHECKPOINTS)
        return replace(self, done=done, stopped=stopped_by(self.folder, self.settings.stop_limits, done))


@dataclass(frozen=True)
class Layout:
    """How cores are used: `runs` at a time, each on so many `nodes`, or on so many `cores` if it is centralised.

    The nodes are on this machine, unless there is a `cluster`.
    """

    runs: int
    nodes: int
    cores: int
    cluster: Cluster | None = None

    def threads(self, settings: Settings) -> int:
        """Return the threads of PyTorch with which a node, or a centralised run, trains."""
        return settings.threads or (self.cores if settings.kind == "centralised" else 1)


def run_experiment(
    experiment: Experiment,
    out: Path | None,
    engine: Engine,
    workers: int,
    console: Console,
    address: str = "",
) -> list[Path]:
    """Run all that an experiment describes, going on where it was stopped; returns the run folders.

    `lay_out` says how it uses `workers` cores of this machine, or of the Ray cluster at `address`, which only Flower's
    engine can join; 0: all. Each folder gets a page at its end, and several a comparison beside them. Where an
    experiment has trials they come first, and then the runs with the values that they choose.

    All runs are checked before the first one starts, on all machines of a cluster; finished ones stay as they are.

    Raises:
        FedfmdError: a setting can't be used, the only run can't go on, or some of several failed.
    """
    trials = place_runs(replace(experiment, runs=experiment.trials), out)
    tasks = place_runs(experiment, out)
    for task in by_data([*trials, *tasks]):
        if task.finished:
            run_path(task.settings)
        else:
            assemble(task.settings, engine)
    cluster = _join([*trials, *tasks], engine, workers, address)
    layout = partial(lay_out, engine=engine, workers=workers or available_cores(), cluster=cluster)
    if experiment.selection:
        experiment.selection.write(tasks[0].folder.parent)
    if trials and experiment.selection:
        _run_tasks(trials, [], experiment.selection, engine, layout(len(trials)), console)
        tasks = _chosen(tasks, trials, experiment.selection)
    _run_tasks(tasks, trials, experiment.selection, engine, layout(len(tasks)), console)
    return [task.folder for task in [*trials, *tasks]]


def _run_tasks(
    tasks: Sequence[Task],
    before: Sequence[Task],
    selection: Selection | None,
    engine: Engine,
    layout: Layout,
    console: Console,
) -> None:
    """Run these tasks, and compare them with those `before`."""
    rounds, done = sum(task.rounds for task in tasks), sum(task.done for task in tasks)
    unit = WORDINGS[tasks[0].settings.kind].unit
    compared = [task.folder for task in [*before, *tasks]]
    with ExperimentDisplay(console, len(tasks), rounds, done, unit) as display:
        failures = _run_all(tasks, engine, layout, display)
        if len(compared) > 1:
            display.print(_compare(compared, tasks[0].folder.parent, selection))
        for name, error in failures.items():
            display.print(f"{name}: failed: {error}")
    if failures:
        name, error = next(iter(failures.items()))
        choosing = selection is not None and not before
        raise RunError(
            f"{len(failures)} of {len(tasks)} runs failed ({name}: {error}{', …' if len(failures) > 1 else ''}); "
            "finished rounds are kept, run the same command again to go on"
            + (", without the values that can't be trained with" if choosing else "")
        )


def _join(tasks: Sequence[Task], engine: Engine, workers: int, address: str) -> Cluster | None:
    """Return what the tasks take of a cluster, if one is meant, once it is clear that they can be there."""
    if engine == "inline":
        if address:
            raise SettingsError(f"--address = {address}: only --engine flwr joins a Ray cluster: add it")
        return None
    from fedfmd.engines.cluster import cluster_address, join_cluster

    waiting = [task.settings for task in by_data(tasks) if not task.finished]
    meant = cluster_address(address)
    return join_cluster(meant, waiting, workers) if meant and waiting else None


def _chosen(tasks: Sequence[Task], trials: Sequence[Task], selection: Selection) -> list[Task]:
    """Return the tasks with the values that the finished trials choose for their variants."""
    chosen = read_comparison([trial.folder for trial in trials], selection).runs
    apart_from_seed = {_apart_from_seed(run.settings) for run in chosen}
    return [task for task in tasks if _apart_from_seed(task.settings) in apart_from_seed]


def _apart_from_seed(settings: Settings) -> str:
    return settings.model_copy(update={"seed": 0}).digest()


def place_runs(experiment: Experiment, out: Path | None) -> list[Task]:
    """Return the runs in their folders, as far as they are.

    Without `out` and ``run-dir``, folders are named by experiment and settings below ``runs/`` of the current
    folder, so that runs with other settings never meet.

    Raises:
        SettingsError: two runs have the same folder.
    """
    tasks: dict[Path, Task] = {}
    for run in experiment.runs:
        folder = _folder(experiment, run, out)
        if folder in tasks:
            raise SettingsError(f"matrix: two runs are called {run.name}{_told_apart(run, tasks[folder])}")
        tasks[folder] = Task(run.name, run.settings.in_folder(folder), done=0).as_it_is()
    return list(tasks.values())


def _told_apart(run: PlannedRun, namesake: Task) -> str:
    """Tell how to give two runs names of their own, which have the last words of the matrix's settings."""
    other = namesake.settings.kept()
    differing = ", ".join(key for key, value in run.settings.kept().items() if other.get(key) != value)
    if not differing:
        return ": give each value once"
    return f", which differ in {differing}: vary these settings in one matrix"


def by_data(tasks: Iterable[Task]) -> list[Task]:
    """Return the tasks in an order in which those with the same images follow each other, as these stay loaded."""
    return sorted(tasks, key=lambda task: (task.settings.data.model_dump_json(), task.settings.seed))


def assemble(settings: Settings, engine: Engine) -> Federation | Training:
    """All that a run of this kind needs, once it is clear that it can start; nothing is written.

    Raises:
        SettingsError: a setting can't be used, or the folder holds another run.
    """
    if settings.kind == "federated":
        from fedfmd.server_app import prepare

        return prepare(settings)
    if engine == "flwr":
        raise SettingsError("kind = centralised needs no Flower: leave out --engine flwr")
    return prepare_centralised(settings)


def lay_out(runs: int, engine: Engine, workers: int, cluster: Cluster | None = None) -> Layout:
    """Share `workers` cores out: to the nodes of a single run, or of Flower's engine, which takes runs in turn.

    On a cluster there are the workers that it has room for.

    Of several runs, as many are made at once, each in a process with one node. No number of threads follows from
    `workers`, so that it changes no result.
    """
    if engine == "flwr":
        return Layout(runs=1, nodes=cluster.workers if cluster else workers, cores=1, cluster=cluster)
    if runs == 1:
        return Layout(runs=1, nodes=workers, cores=available_cores())
    return Layout(runs=workers, nodes=1, cores=1)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _folder(experiment: Experiment, run: PlannedRun, out: Path | None) -> Path:
    """Where a run is kept: a single one in `out` or ``run-dir`` itself, those of a matrix below it."""
    if out is not None or run.settings.run_dir:
        return ((out or Path(run.settings.run_dir).expanduser()) / run.name).resolve()
    unique = run.settings.digest()
    if not run.name:
        return Path("runs", f"{experiment.name}-{unique}").resolve()
    return Path("runs", experiment.name, f"{run.name}-{unique}").resolve()


def _run_all(
    tasks: Sequence[Task], engine: Engine, layout: Layout, display: ExperimentDisplay
) -> dict[str, str]:
    """Do what is left to do; returns why runs failed, by their names, where there are several."""
    for task in tasks:
        if task.finished:
            with _shown(task, display):
                logger.info("finished before%s: %s", f", {task.stopped}" if task.stopped else "", task.folder)
                _write_page(task.folder, anew=False)
    waiting = [task for task in tasks if not task.finished]
    if len(tasks) == 1:
        for task in waiting:
            _run_here(task, engine, layout, display)
        return {}
    if engine == "inline":
        return _run_side_by_side(waiting, layout, display)
    run = partial(_run_here, engine=engine, layout=layout, display=display)
    return {task.name: error for task in waiting if (error := attempt(run, task).error)}


def _run_here(task: Task, engine: Engine, layout: Layout, display: ExperimentDisplay) -> None:
    """Make a run from this process."""
    with _shown(task, display) as shown:
        if engine == "flwr":
            from fedfmd.engines.flower import run_flower

            trim()  # checking the settings built the model
            run_flower(task.settings.flat(), layout.nodes, task.folder, shown.line, layout.cluster)
        else:
            _train(task.settings, layout)
        _check_end(task)
        _write_page(task.folder)


def _run_side_by_side(tasks: Sequence[Task], layout: Layout, display: ExperimentDisplay) -> dict[str, str]:
    work = partial(_run_alone, layout)
    shown: dict[Task, RunDisplay] = {}
    failures = {}
    with closing(run_jobs(work, tasks, layout.runs)) as events:
        for task, event in events:
            match event:
                case Started():
                    shown[task] = display.run(task.name, task.rounds, task.done)
                case Ended(error):
                    if error:
                        failures[task.name] = error
                        shown[task].line(f"failed: {error}")
                    shown.pop(task).close()
                case record:
                    shown[task].handle(record)
    return failures


def _run_alone(layout: Layout, task: Task) -> None:
    """Make one of several runs, in a process of its own."""
    torch.set_num_threads(layout.threads(task.settings))
    _train(task.settings, layout)
    _check_end(task)
    _write_page(task.folder)


def _train(settings: Settings, layout: Layout) -> None:
    """Do a run in this process, as its kind wants it."""
    threads = layout.threads(settings)
    if settings.kind == "federated":
        from fedfmd.client_app import app as client_app
        from fedfmd.engines.forked import can_fork
        from fedfmd.engines.inline import run_inline
        from fedfmd.flower_compat import quiet_logs
        from fedfmd.server_app import app as server_app

        quiet_logs()
        forked = layout.nodes > 1 and can_fork(torch_device(settings), threads)
        run_inline(server_app, client_app, settings.flat(), layout.nodes, threads, forked)
    else:
        run_centralised(settings, threads, available_cores() // layout.runs)


def _check_end(task: Task) -> None:
    """Refuse a run that ended early without an error or a limit, whatever ended it.

    Raises:
        RunError: its last round or epoch isn't there as the run wrote it.
    """
    if not (ended := task.as_it_is()).finished:
        unit = WORDINGS[task.settings.kind].unit
        raise RunError(
            f"the run ended after {unit} {ended.done} of {task.rounds} without an error; finished ones are kept, run "
            "the same command again to go on"
        )


@contextmanager
def _shown(task: Task, display: ExperimentDisplay) -> Iterator[RunDisplay]:
    """Show what this process logs as the run's."""
    shown = display.run(task.name, task.rounds, task.done)
    with closing(shown), shown.handling(logging.getLogger("fedfmd")):
        yield shown


def _write_page(folder: Path, anew: bool = True) -> None:
    """Write the page of a run, or leave the one that is there; a run is not lost because that fails."""
    try:
        need("it", *LIBRARIES)
        from fedfmd.report.writing import PAGE, write_page

        if anew or not (folder / PAGE).exists():
            write_page(folder)
    except Exception as error:
        logger.warning("no report in %s: %s", folder, one_line(error))


def _compare(folders: Sequence[Path], out: Path, selection: Selection | None) -> str:
    """Compare several runs; says where, or why there is no comparison."""
    try:
        need("it", *LIBRARIES)
        from fedfmd.report.writing import write_report

        write_report(folders, out, selection=selection)
    except Exception as error:
        return f"no report in {out}: {one_line(error)}"
    return f"report: {out}"
