"""Runs as a report reads them, from their folders or packed: which can be compared, and how they differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedfmd.build import build_dataset, build_model
from fedfmd.conv import CONVS, OPTIONS, options_of
from fedfmd.cost import Cost, count
from fedfmd.data import PARTITIONS, parameters_of
from fedfmd.data.files import read_npz
from fedfmd.errors import SettingsError
from fedfmd.own_code import is_own
from fedfmd.report.packed import MANIFEST, read_packed
from fedfmd.report.record import PATHS, Run
from fedfmd.report.selection import FILE as SELECTION_FILE
from fedfmd.report.selection import Choice, Selection, choose, stored_selection
from fedfmd.report.statistics import cut_percent
from fedfmd.runs import EpochRow, RoundRow, clients_of, read_environment, read_epochs, read_rounds
from fedfmd.settings import DataSettings, Scalar, Settings, read_settings

TASK = ("data.", "partition.")
"""Settings that say what is to be learnt; runs that differ in them solve different tasks."""

CIFAR = {"cifar10": (10, 32), "cifar100": (100, 32)}
"""Classes and pixels of the data sets whose images a report needn't have."""

RUN_FILES = frozenset({"rounds.csv", "epochs.csv", "environment.json"})
"""Files of which a run's folder has one at least."""

MANY = 5
"""Settings that differ above which labels leave out those that tell no runs apart."""

Row = TypeVar("Row", RoundRow, EpochRow)


@dataclass(frozen=True)
class Comparison:
    """The runs that can be compared, and `notes` on what was left out or is to be known of them.

    `read` are all that were read. `choice` tells what was tried where the runs are those of values chosen by
    validation.
    """

    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    read: tuple[Run, ...]
    choice: Choice | None = None


def read_comparison(folders: Iterable[Path], selection: Selection | None = None) -> Comparison:
    """Read every run below these folders, and those that are packed there.

    Unfinished runs are left out, unless there are no others; so is a run whose settings another one has, and one
    whose values are not those that the selection, by default the folders' own, chooses for its variant.

    Raises:
        SettingsError: a folder is missing, there is no run with a finished round, a file of one can't be read, some
            are federated and some centralised, or there is nothing to choose by.
    """
    folders = list(folders)
    if absent := [str(folder) for folder in folders if not folder.exists()]:
        raise SettingsError(f"no such folder: {', '.join(absent)}")
    files = {place: names for folder in folders for place, names in _walk(folder)}
    read = _with_whole_paths(_read_all(files))
    started = [run for run in read if run.started]
    if not started:
        raise SettingsError(f"no run with a finished round below {', '.join(map(str, folders))}")
    kinds = {run.settings.kind: run.folder for run in read}
    if len(kinds) > 1:
        named = ", ".join(f"{folder} is {kind}" for kind, folder in kinds.items())
        raise SettingsError(f"runs of different kinds don't compare ({named}): report on each kind apart")
    unfinished = [run for run in started if not run.finished]
    finished = [run for run in started if run.finished]
    states = [f"{run.folder.name} (no round)" for run in read if not run.started]
    states += [f"{run.folder.name} ({run.progress})" for run in unfinished]
    notes = []
    if states:
        treatment = "left out" if finished else "compared as far as they are, because no run is finished"
        notes.append(f"Unfinished runs, {treatment}: {', '.join(states)}.")
    runs, twins = _without_twins(finished or unfinished)
    if twins:
        names = ", ".join(run.folder.name for run in twins)
        notes.append(f"Left out, because another run has the same settings: {names}.")
    commits = sorted({str(run.environment.get("commit"))[:12] for run in runs if run.environment})
    if len(commits) > 1:
        notes.append(f"The runs come from different code: commits {', '.join(commits)}.")
    machines = sorted({run.machine for run in runs if run.machine})
    if len(machines) > 1:
        notes.append(f"Measured seconds don't compare, as the machines differ: {'; '.join(machines)}.")
    if beyond := _labelled(runs)[0].unlabelled:
        notes.append(f"Labels are short: groups may differ in {', '.join(beyond)} as well.")
    selection = selection or _stored_selection(files, read)
    if selection is None:
        return Comparison(_labelled(runs), tuple(notes), tuple(read))
    chosen, choice, missing = choose(_labelled(runs, selection.over), selection)
    return Comparison(tuple(chosen), (*notes, *missing), tuple(read), choice)


def _read_all(files: Mapping[Path, frozenset[str]]) -> list[Run]:
    """Read the runs in the order of their folders; one that is packed beside its folder is read from the folder."""
    packed = {place for place, names in files.items() if MANIFEST in names}
    own = {place for place, names in files.items() if names & RUN_FILES}
    runs = {run.folder: run for place in packed for run in read_packed(place)}
    runs |= {place: _read(place) for place in own - packed}
    return [runs[folder] for folder in sorted(runs)]


def _with_whole_paths(runs: Sequence[Run]) -> list[Run]:
    """Return the runs, the packed ones with whole paths, where a path of the others is the only one of its name."""
    if not any(run.packed for run in runs):
        return list(runs)
    known = [run.settings.flat() for run in runs if not run.packed]
    wholes: dict[str, dict[Scalar, str]] = {}
    for key in PATHS:
        paths = {str(flat[key]) for flat in known}
        names = [Path(path).name for path in paths]
        wholes[key] = {Path(path).name: path for path in paths if names.count(Path(path).name) == 1}
        wholes[key].pop("", None)  # no path at all
    return [_with_paths(run, wholes) if run.packed else run for run in runs]


def _with_paths(run: Run, paths: Mapping[str, Mapping[Scalar, str]]) -> Run:
    """Return the run with other paths, where there are some for its own."""
    flat = run.settings.flat()
    changes = {key: own[flat[key]] for key, own in paths.items() if flat[key] in own}
    return replace(run, settings=Settings.from_mapping(flat | changes)) if changes else run


def _stored_selection(files: Mapping[Path, frozenset[str]], runs: Iterable[Run]) -> Selection | None:
    """Return what the folders say is to be chosen; None if none says it.

    Raises:
        SettingsError: as in `stored_selection`, or some runs are of folders that don't say it.
    """
    places = [place for place, names in files.items() if SELECTION_FILE in names]
    selection = stored_selection(places)
    strays = [run.folder for run in runs if not any(run.folder.is_relative_to(place) for place in places)]
    if selection and strays:
        raise SettingsError(
            f"{places[0] / SELECTION_FILE} chooses {', '.join(selection.over)} for the runs beside it, but not for "
            f"{strays[0]}: report on them apart, or add --select {selection.over[0]} to choose for all"
        )
    return selection


def _walk(folder: Path) -> Iterator[tuple[Path, frozenset[str]]]:
    """Yield every folder from this one down, once, with the names of its files; links to folders are followed."""
    seen: set[Path] = set()
    for place, inner, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        yield real, frozenset(names)


def _read(folder: Path) -> Run:
    """Read the run of a folder, with or without rounds."""
    settings = read_settings(folder / "settings.yaml")
    rounds: list[RoundRow] | list[EpochRow]
    try:
        if settings.kind == "federated":
            rounds = _rows(read_rounds, folder / "rounds.csv")
        else:
            rounds = _rows(read_epochs, folder / "epochs.csv")
        clients = [row for row in clients_of(folder) if rounds and row.round <= rounds[-1].round]
        counts = _label_counts(folder / "partition.npz", max((row.client for row in clients), default=0))
        environment = read_environment(folder)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    cost = _cost(settings.model_copy(update={"seed": 0, "run_dir": ""}))
    run = Run(folder, settings, tuple(rounds), tuple(clients), counts, environment, cost=cost)
    return replace(run, cut=cut_percent(run))


def _rows(read: Callable[[Path], list[Row]], path: Path) -> list[Row]:
    """Read the rows of rounds or epochs, of which each must be there once; none if there is no such file."""
    rows = read(path) if path.exists() else []
    for number, row in enumerate(rows, start=1):
        if row.round != number:
            raise ValueError(
                f"{path}: row {number} is of {row.round}: a row is missing, or there twice; restore the file"
            )
    return rows


def _label_counts(path: Path, last: int) -> np.ndarray | None:
    """Read the clients' images of each class, `last` being the highest client met; None if there is no such file."""
    if not path.exists():
        return None
    (counts,) = read_npz(path, "label_counts")
    if counts.ndim != 2 or counts.dtype.kind not in "iu" or len(counts) <= last:
        raise ValueError(
            f"{path}: label_counts is {counts.dtype} of shape {counts.shape}: it must hold whole numbers, clients × "
            f"classes, for more than {last} clients; restore the file"
        )
    return counts


@lru_cache
def _cost(settings: Settings) -> Cost | None:
    """Count the network of these settings, None where its data set, or the user's own code, can't be loaded."""
    try:
        classes, pixels = _shape(settings.data)
        return count(build_model(settings, classes, pixels), pixels)
    except SettingsError:
        return None


def _shape(data: DataSettings) -> tuple[int, int]:
    """Return the number of classes; height and width in pixels."""
    if data.dataset in CIFAR:
        classes, pixels = CIFAR[data.dataset]
        return classes, data.image_size or pixels
    dataset = build_dataset(Settings(data=data.model_copy(update={"validation": 0.0})))
    return dataset.classes, dataset.image_size


def _without_twins(runs: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Return a run of each settings that it heeds, the first that has a folder of its own, and the others.

    Packed copies of a run in a folder are neither.
    """
    firsts: dict[tuple[tuple[str, Any], ...], Run] = {}
    for run in sorted(runs, key=lambda run: run.packed):
        heeded = _heeded(run.settings.flat())
        counted = run.settings.kept().keys() - Settings.NEUTRAL
        firsts.setdefault(tuple(item for item in heeded.items() if item[0] in counted), run)
    kept = list(firsts.values())
    others = [run for run in runs if run not in kept]
    if not any(run.packed for run in others):
        return kept, others
    known = {(run.identity, run.rounds) for run in kept if not run.packed}
    return kept, [run for run in others if not (run.packed and (run.identity, run.rounds) in known)]


def _labelled(runs: Sequence[Run], chosen: Iterable[str] = ()) -> tuple[Run, ...]:
    """Return the runs with `task` and `variant`, as short as they tell them apart, in the order of their values.

    The labels don't tell what is `chosen` for each.
    """
    flats = [run.settings.flat() for run in runs]
    ignored = Settings.NEUTRAL | {"seed", *chosen}
    every = [key for key in flats[0] if key not in ignored and len({flat[key] for flat in flats}) > 1]
    differing = every if len(every) <= MANY else _telling([_heeded(flat) for flat in flats], every)
    unlabelled = tuple(key for key in every if key not in differing)
    shorts = [key.rpartition(".")[2] for key in differing]
    names = {
        key: key if shorts.count(short) > 1 else short for key, short in zip(differing, shorts, strict=True)
    }
    task = [key for key in differing if key.startswith(TASK)]
    variant = [key for key in differing if key not in task]

    def part(flat: dict[str, Any], keys: Iterable[str]) -> str:
        heeded = _heeded(flat)
        return ", ".join(
            _text(flat[key]) if key == "model.conv" else f"{names[key]} {_text(flat[key])}"
            for key in keys
            if key in heeded
        )

    def order(run: Run) -> tuple[Any, ...]:
        flat = run.settings.flat() | {"model.conv": ([*CONVS, run.conv].index(run.conv), run.conv)}
        return (*(flat[key] for key in (*task, *variant)), run.seed)

    return tuple(
        replace(
            run,
            task=part(run.settings.flat(), task),
            variant=part(run.settings.flat(), variant),
            unlabelled=unlabelled,
        )
        for run in sorted(runs, key=order)
    )


def _telling(flats: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    """Return few of the keys that tell all tasks apart, and all variants of each; the convolution is always there."""

    def told(chosen: Iterable[str]) -> int:
        return len({tuple(flat.get(key) for key in chosen) for flat in flats})

    chosen: list[str] = []
    tasks = [key for key in keys if key.startswith(TASK)]
    for part in (tasks, keys):
        chosen += [key for key in part if key == "model.conv"]
        while told(chosen) < told(part):
            chosen.append(
                max((key for key in part if key not in chosen), key=lambda key: told([*chosen, key]))
            )
    return [key for key in keys if key in chosen]


def _heeded(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out settings that only other splits or other convolutions heed: static ones have no kernels."""
    conv = flat["model.conv"]
    options = OPTIONS if is_own(conv) else options_of(conv)  # which need not be on this machine
    own = parameters_of(flat["partition.scheme"])
    splits = {name for split in PARTITIONS.values() for name in split.parameters if name not in own}
    others = {f"partition.{name}" for name in splits} | {
        f"model.{name}" for name in OPTIONS.keys() - options.keys()
    }
    unused = {name.replace("_", "-") for name in others}
    anneals = "temperature" in options
    return {
        key: value
        for key, value in flat.items()
        if key not in unused and (anneals or not key.startswith("temperature."))
    }


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
