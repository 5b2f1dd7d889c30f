"""Experiments from Python, in scripts and notebooks: run them, and have what they leave as tables."""

from __future__ import annotations

import io
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from rich.console import Console

from fedfmd.errors import FedfmdError, RunError, SettingsError, need, not_one_of, one_line
from fedfmd.experiment.files import PARTS, Experiment, PlannedRun, load_experiment, make_experiment
from fedfmd.experiment.run import Engine, run_experiment
from fedfmd.report import LIBRARIES
from fedfmd.report.comparison import Comparison, read_comparison
from fedfmd.report.packed import run_names
from fedfmd.report.record import Run
from fedfmd.runs import RUN_COLUMN, ClientRow, EpochRow, RoundRow
from fedfmd.settings import Settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

_TURN = threading.Lock()
"""Whoever runs an experiment holds it: Flower's identity and the run's log belong to the process."""


@dataclass(frozen=True, eq=False)
class Results:
    """Runs that were read, as pandas tables and as a picture.

    The column `run` of the tables is the index of `settings`, so that settings are joined to any of them:

        results.rounds.join(results.settings[["model.conv", "seed"]], on="run")

    Attributes:
        runs: all of them, finished or not.
        comparison: those of them that a report compares.
    """

    comparison: Comparison

    def __repr__(self) -> str:
        runs = "run" if len(self.runs) == 1 else "runs"
        return f"<Results of {len(self.runs)} {runs}: {', '.join(self.names)}>"

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, with their folders."""
        return self.comparison.read

    @property
    def names(self) -> list[str]:
        """What the tables call the runs: the ends of their folders."""
        return run_names([run.folder for run in self.runs])

    @cached_property
    def settings(self) -> DataFrame:
        """A line per run, indexed by its name, and a column per setting."""
        from pandas import DataFrame, Index

        return DataFrame([run.settings.flat() for run in self.runs], Index(self.names, name=RUN_COLUMN))

    @cached_property
    def rounds(self) -> DataFrame:
        """A line per round, with the columns of `fedfmd.runs.RoundRow`; none of centralised runs."""
        return self._table(RoundRow, [run.rounds for run in self.runs])

    @cached_property
    def clients(self) -> DataFrame:
        """A line per client and round, with the columns of `fedfmd.runs.ClientRow`."""
        return self._table(ClientRow, [run.clients for run in self.runs])

    @cached_property
    def epochs(self) -> DataFrame:
        """A line per epoch, with the columns of `fedfmd.runs.EpochRow`; none of federated runs."""
        return self._table(EpochRow, [run.rounds for run in self.runs])

    def plot(self) -> Figure:
        """Draw accuracy against rounds (or epochs), time and compute, with means over the seeds, as reports do."""
        need("a picture", *LIBRARIES)
        from matplotlib import rc_context

        from fedfmd.report.plots import STYLE, make_facets, plot_curves
        from fedfmd.report.statistics import summarise

        summary = summarise(self.comparison.runs, choice=self.comparison.choice)
        with rc_context(STYLE):
            return plot_curves(make_facets(summary.groups))

    def _table(self, kind: type, rows: Sequence[Sequence[object]]) -> DataFrame:
        """Return the rows of this kind in a table; what does not exist is NaN."""
        from pandas import DataFrame

        named = [
            (name, row)
            for name, own in zip(self.names, rows, strict=True)
            for row in own
            if type(row) is kind
        ]
        columns = [field.name for field in fields(kind)]
        return DataFrame(
            {RUN_COLUMN: [name for name, _ in named]}
            | {column: [_number(getattr(row, column)) for _, row in named] for column in columns}
        )


def run(
    experiment: Settings | Mapping[str, Any] | Path | str,
    *,
    out: Path | str | None = None,
    workers: int | None = None,
    engine: Engine = "inline",
    address: str = "",
    progress: bool = False,
) -> Results:
    """Run an experiment to its end, as ``fedfmd run`` does, and return its results.

    Runs that are finished are read, not made again; others go on after their last checkpoint. Calls from several
    threads take turns.

        results = fedfmd.run({"data.dataset": "digits", "server.rounds": 5})
        results.rounds["accuracy"].iloc[-1]

    Args:
        experiment: a file, or the name of an example; settings, nested or with dotted keys; or a mapping of what
            such a file holds: `base`, `matrix`, `select`.
        out: run folder, or the one that holds those of a matrix; by default below ``runs/``.
        workers: nodes, or runs of several, that go at once; by default one for each core, of this machine or of the
            cluster. A single centralised run takes the setting `threads`.
        engine: "inline", or "flwr" for Flower's simulation on Ray.
        address: the Ray cluster that "flwr" joins, as ``--address``.
        progress: print what ``fedfmd run`` prints; else nothing is printed.

    Raises:
        FedfmdError: a setting can't be used, or a run failed; finished rounds are kept.
    """
    need("a table of results", "pandas")
    if engine not in get_args(Engine):
        raise SettingsError(f"engine = {engine!r}: {not_one_of(engine, get_args(Engine))}")
    if workers is not None and workers < 1:
        raise SettingsError(f"workers = {workers}: must be at least 1, or None for all cores")
    planned = _plan(experiment)
    console = Console(force_jupyter=False) if progress else Console(file=io.StringIO(), quiet=True)
    with _TURN, _threads_kept():
        try:
            folders = run_experiment(
                planned, None if out is None else Path(out), engine, workers or 0, console, address
            )
        except FedfmdError:
            raise
        except Exception as error:
            raise RunError(one_line(error)) from error
    return Results(read_comparison(folders, planned.selection))


def load(paths: Path | str | Iterable[Path | str]) -> Results:
    """Read the runs below one folder, or several, and those that are packed there.

        results = fedfmd.load("runs/compare-small")
        results.plot().savefig("curves.png")

    Raises:
        SettingsError: there is no run with a finished round, or a file of one can't be read.
    """
    need("a table of results", "pandas")
    several = [paths] if isinstance(paths, Path | str) else paths
    return Results(read_comparison([Path(path) for path in several]))


def _plan(experiment: Settings | Mapping[str, Any] | Path | str) -> Experiment:
    """Return the experiment that is meant."""
    if isinstance(experiment, Path | str):
        return load_experiment(Path(experiment).expanduser())
    if isinstance(experiment, Settings):
        return Experiment(_name(experiment), (PlannedRun("", experiment),))
    if experiment.keys() & (set(PARTS) - {"kind"}):
        return make_experiment(experiment, "experiment", "the experiment")
    planned = make_experiment({"base": experiment}, "", "the experiment")
    return replace(planned, name=_name(planned.runs[0].settings))


def _name(settings: Settings) -> str:
    """Return what a run is called that comes from no file."""
    return f"{settings.data.dataset}-{settings.model.arch}-{settings.model.conv}"


@contextmanager
def _threads_kept() -> Iterator[None]:
    """Give PyTorch the number of threads again that it had."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _number(value: object) -> object:
    return math.nan if value is None else value
