"""Packed runs: all runs of a study in three files, instead of a folder each.

`rounds.csv` has every row of every run (`epochs.csv`, if they are centralised), after a column `run` with the
run's name. `clients.csv` has, in the same form, only what a report reads of the clients: a run's last round, and
each client's last row with an accuracy, and with a test accuracy. `runs.json`, the manifest, says what the runs
were. Checkpoints, logs and the images that each client had stay behind.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from fedfmd.cost import Cost
from fedfmd.errors import SettingsError
from fedfmd.report.record import CLIENT_ACCURACIES, PATHS, Run, common_settings
from fedfmd.runs import RUN_COLUMN, ClientRow, EpochRow, RoundRow, atomic_write, csv_text, read_table
from fedfmd.settings import Scalar, Settings

MANIFEST = "runs.json"
FORMAT = 1
TABLES = {"federated": ("rounds.csv", RoundRow), "centralised": ("epochs.csv", EpochRow)}
"""By kind of run: the table of its rounds or epochs, and the type of their rows."""

CLIENTS = "clients.csv"
REMEDY = "take the whole folder from where it came, or pack the runs anew"

T = TypeVar("T")
Row = TypeVar("Row", RoundRow, ClientRow, EpochRow)
Place = Annotated[int, Field(ge=0)] | None


@dataclass(frozen=True)
class _Entry:
    """A run in the manifest.

    Attributes:
        name: in the tables' column `run`.
        rounds, clients: how many rows it has there.
        settings: those that not all runs have in common.
        environment, split, network: places in the manifest's lists; None where it is unknown.
        cut: as in `Run`, which the rows that are kept don't tell.
    """

    name: str
    rounds: int
    clients: int
    settings: dict[str, Scalar]
    environment: Place
    split: Place
    network: Place
    cut: float | None = None


@dataclass(frozen=True)
class _Manifest:
    """What stands in `runs.json`.

    Attributes:
        format: `FORMAT`.
        settings: those that all runs have in common; of files and folders (`PATHS`) their names alone.
        environments: the different environment.json.
        splits: the different label counts, for each client a text with its images of each class.
        networks: what the different networks cost, so that a report needs none of the runs' images.
        runs: all runs.
    """

    format: int
    settings: dict[str, Scalar]
    environments: list[dict[str, Any]]
    splits: list[list[str]]
    networks: list[Cost]
    runs: list[_Entry]


def write_packed(runs: Sequence[Run], folder: Path) -> None:
    """Pack runs of one kind into `folder`; equal runs make equal files, wall times aside.

    Runs that were packed there before stay, but for those that are among the others as well.

    Raises:
        SettingsError: the folder is a run's own, whose rows would be overwritten.
        OSError: as in `atomic_write`.
    """
    if (folder / "settings.yaml").exists():
        raise SettingsError(f"--pack {folder} is the folder of a run, whose rows would be lost: name another")
    folder.mkdir(parents=True, exist_ok=True)
    others = {run.identity for run in runs if not _is_in(run, folder)}
    runs = [run for run in runs if not (_is_in(run, folder) and run.identity in others)]
    names = run_names([run.folder for run in runs])
    kind = runs[0].settings.kind
    clients = [reported_clients(run) for run in runs]
    file, row_type = TABLES[kind]
    atomic_write(folder / file, _table(row_type, names, [run.rounds for run in runs]))
    if kind == "federated":
        atomic_write(folder / CLIENTS, _table(ClientRow, names, clients))
    manifest = asdict(_make_manifest(runs, names, [len(rows) for rows in clients]))
    atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read_packed(folder: Path) -> list[Run]:
    """Read the runs that are packed in `folder`.

    Raises:
        SettingsError: a file is missing or damaged, or goes with another manifest; it names file and place.
    """
    path = folder / MANIFEST
    manifest = _read_manifest(path)
    settings = [
        Settings.from_mapping(manifest.settings | entry.settings, f"{path}, run {entry.name!r}")
        for entry in manifest.runs
    ]
    if not settings:
        return []
    file, row_type = TABLES[settings[0].kind]
    rounds = _read_table(folder / file, row_type, {entry.name: entry.rounds for entry in manifest.runs})
    clients: dict[str, list[ClientRow]] = {}
    if settings[0].kind == "federated":
        counts = {entry.name: entry.clients for entry in manifest.runs}
        clients = _read_table(folder / CLIENTS, ClientRow, counts)
    try:
        splits = [np.array([line.split() for line in split], dtype=np.int64) for split in manifest.splits]
        return [
            Run(
                folder / entry.name,
                own,
                tuple(rounds[entry.name]),
                tuple(clients.get(entry.name, ())),
                _at(splits, entry.split),
                _at(manifest.environments, entry.environment) or {},
                entry.cut,
                _at(manifest.networks, entry.network),
                packed=True,
            )
            for entry, own in zip(manifest.runs, settings, strict=True)
        ]
    except (ValueError, IndexError) as error:
        raise SettingsError(f"{path}: splits, environments or networks: {error}; {REMEDY}") from None


def reported_clients(run: Run) -> list[ClientRow]:
    """Return what a report reads of the clients: the last round, and each client's last row with each accuracy."""
    lasts = [
        {row.client: row for row in run.clients if getattr(row, column) is not None}
        for column in CLIENT_ACCURACIES
    ]
    return [
        row
        for row in run.clients
        if row.round == run.rounds[-1].round or any(row is last.get(row.client) for last in lasts)
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return as much of the ends of the paths, equally many folders of each, as tells them apart.

    Raises:
        SettingsError: they differ only in spaces.
    """
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [" ".join("/".join(folder.parts[-length:]).split()) for folder in folders]
        if len(set(names)) == len(names):
            return names
    raise SettingsError("folders of runs differ only in spaces: rename one, so that their runs have names")


def _is_in(run: Run, folder: Path) -> bool:
    return run.packed and run.folder.is_relative_to(folder.resolve())


def _table(row_type: type, names: Sequence[str], rows: Sequence[Iterable[Any]]) -> str:
    """Return the rows of all runs as CSV, after the name of their run."""
    columns = [field.name for field in fields(row_type)]
    lines = (
        [name, *(getattr(row, column) for column in columns)]
        for name, own in zip(names, rows, strict=True)
        for row in own
    )
    return csv_text([[RUN_COLUMN, *columns], *lines])


def _make_manifest(runs: Sequence[Run], names: Sequence[str], clients: Sequence[int]) -> _Manifest:
    kept = _without_folders([run.settings.kept() for run in runs])
    common = common_settings(kept)
    environments: list[dict[str, Any]] = []
    splits: list[list[str]] = []
    networks: list[Cost] = []
    entries = [
        _Entry(
            name,
            len(run.rounds),
            rows,
            {key: value for key, value in own.items() if key not in common},
            _place(environments, run.environment or None),
            _place(splits, _lines(run.label_counts)),
            _place(networks, run.cost),
            run.cut,
        )
        for run, name, rows, own in zip(runs, names, clients, kept, strict=True)
    ]
    return _Manifest(FORMAT, common, environments, splits, networks, entries)


def _without_folders(kept: Sequence[Mapping[str, Scalar]]) -> list[Mapping[str, Scalar]]:
    """Return the runs' settings with the names of files in place of their paths, where these tell the runs apart."""
    unique = set()
    for key in PATHS:
        paths = {str(own[key]) for own in kept if key in own}
        if len({Path(path).name for path in paths}) == len(paths):
            unique.add(key)
    return [
        {key: Path(str(value)).name if key in unique else value for key, value in own.items()} for own in kept
    ]


def _lines(label_counts: np.ndarray | None) -> list[str] | None:
    return None if label_counts is None else [" ".join(map(str, row)) for row in label_counts.tolist()]


def _place(known: list[T], value: T | None) -> int | None:
    """Where a value stands among the different ones; a new one is added to them."""
    if value is None:
        return None
    if value not in known:
        known.append(value)
    return known.index(value)


def _at(known: Sequence[T], place: int | None) -> T | None:
    return None if place is None else known[place]


def _read_manifest(path: Path) -> _Manifest:
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}, line {error.lineno}: {error.msg}; {REMEDY}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: no text ({error.reason}); {REMEDY}") from None
    form = content.get("format") if isinstance(content, dict) else None
    if form != FORMAT:
        raise SettingsError(
            f"{path}: format {form!r} is unknown, this fedfmd reads {FORMAT}: "
            "take a newer one, or pack the runs anew"
        )
    try:
        manifest = TypeAdapter(_Manifest).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SettingsError(f"{path}, {place}: {first['msg']}; {REMEDY}") from None
    names = [entry.name for entry in manifest.runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SettingsError(f"{path}: the run {twice!r} stands there twice; {REMEDY}")
    return manifest


def _read_table(path: Path, row_type: type[Row], counts: Mapping[str, int]) -> dict[str, list[Row]]:
    """Return the rows of each run, which must be so many."""
    try:
        table = read_table(path, row_type, counts)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file, but {MANIFEST} tells of it; {REMEDY}") from None
    except ValueError as error:
        raise SettingsError(f"{error}; {REMEDY}") from None
    for name, rows in table.items():
        if len(rows) != counts[name]:
            raise SettingsError(
                f"{path}: {len(rows)} rows of the run {name!r}, but {MANIFEST} tells of {counts[name]}; {REMEDY}"
            )
    return table
