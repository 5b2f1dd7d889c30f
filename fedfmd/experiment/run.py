"""Runs the cells of an experiment, one folder each, and shows how far they are."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from fedfmd.client_app import app as client_app
from fedfmd.engines import run_flower, run_inline
from fedfmd.errors import SettingsError
from fedfmd.experiment.centralised import prepare_centralised, run_centralised
from fedfmd.experiment.display import RunDisplay
from fedfmd.experiment.files import Cell, Experiment
from fedfmd.experiment.wording import WORDINGS
from fedfmd.server_app import app as server_app
from fedfmd.server_app import prepare
from fedfmd.settings import Settings

Engine = Literal["inline", "flwr"]


def run_experiment(
    experiment: Experiment, out: Path | None, engine: Engine, workers: int, console: Console
) -> list[Path]:
    """Run every cell, going on where it was stopped; returns the run folders.

    Each folder gets a page at its end, and several runs a comparison beside their folders.

    Without `out` and ``run-dir``, folders are named by experiment and settings below ``runs/`` of the current
    folder, so that runs with other settings never meet. All cells are checked before the first one starts.

    Raises:
        FedfmdError: a setting can't be used, or a run can't go on.
    """
    cells = [(cell, cell.settings.in_folder(_folder(experiment, cell, out))) for cell in experiment.cells]
    for _, settings in cells:
        _prepare(settings, engine)
    folders = [_run_cell(cell, settings, engine, workers, console) for cell, settings in cells]
    if len(folders) > 1:
        _write_report(folders, folders[0].parent, console)
    return folders


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run_cell(cell: Cell, settings: Settings, engine: Engine, workers: int, console: Console) -> Path:
    folder = Path(settings.run_dir)
    with RunDisplay(console, settings.length, cell.name, WORDINGS[settings.kind].unit) as display:
        if engine == "flwr":
            run_flower(settings.flat(), workers, folder, display.line)
        else:
            with display.handling(logging.getLogger("fedfmd")):
                _run_here(settings, workers)
    _write_report([folder], folder, console)
    return folder


def _prepare(settings: Settings, engine: Engine) -> None:
    """All the checks of a run that can be made before anything is written."""
    if settings.kind == "federated":
        prepare(settings)
    elif engine == "flwr":
        raise SettingsError("kind = centralised needs no Flower: leave out --engine flwr")
    else:
        prepare_centralised(settings)


def _run_here(settings: Settings, workers: int) -> None:
    """Run in this process."""
    if settings.kind == "federated":
        threads = settings.threads or max(1, available_cores() // workers)
        run_inline(server_app, client_app, settings.flat(), workers, threads)
    else:
        run_centralised(settings, available_cores())


def _write_report(folders: Sequence[Path], out: Path, console: Console) -> None:
    """Write the page of a run, or compare several; a run is not lost because that fails."""
    from fedfmd.experiment.report import write_page, write_report

    try:
        if len(folders) == 1:
            write_page(out)
            return
        write_report(folders, out)
        message = f"report: {out}"
    except Exception as error:
        message = f"no report in {out}: {' '.join(str(error).split())}"
    console.print(message, markup=False, highlight=False, soft_wrap=True)


def _folder(experiment: Experiment, cell: Cell, out: Path | None) -> Path:
    """Where a cell is kept: a single run in `out` or ``run-dir`` itself, the cells of a matrix below it."""
    if out is not None or cell.settings.run_dir:
        return ((out or Path(cell.settings.run_dir).expanduser()) / cell.name).resolve()
    unique = cell.settings.digest()
    if not cell.name:
        return Path("runs", f"{experiment.name}-{unique}").resolve()
    return Path("runs", experiment.name, f"{cell.name}-{unique}").resolve()
