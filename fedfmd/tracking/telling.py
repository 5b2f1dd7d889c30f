"""Tells callbacks of a run as its rows are written: each round once, in order, whatever happens in between."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from inspect import isclass
from pathlib import Path

from fedfmd.errors import SettingsError, need, not_one_of, one_line
from fedfmd.own_code import find
from fedfmd.runs import (
    ClientRow,
    EpochRow,
    RoundRow,
    RunFolder,
    atomic_write,
    clients_of,
    latest_model,
    read_epochs,
    read_rounds,
)
from fedfmd.settings import Settings
from fedfmd.tracking.callback import Callback, RunEnd, TrackedRun

logger = logging.getLogger(__name__)

LOGGERS = {
    "tensorboard": "fedfmd.tracking.tensorboard:TensorBoard",
    "wandb": "fedfmd.tracking.wandb:WandB",
    "mlflow": "fedfmd.tracking.mlflow:MLflow",
}
"""Those that come with fedfmd, by the names of the libraries that they need."""

RECORD = "tracking.json"


@dataclass(frozen=True)
class Record:
    """What a run folder keeps: the run's id, and the last round that each callback was told of."""

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    told: Mapping[str, int] = field(default_factory=dict)


def find_callbacks(settings: Settings) -> dict[str, type[Callback]]:
    """Return the callbacks that ``tracking.loggers`` names.

    Raises:
        SettingsError: there is no such class, it is no `Callback`, or its library is missing.
    """
    return {name: _find(name) for name in settings.tracking.loggers}


def _find(name: str) -> type[Callback]:
    setting = "tracking.loggers"
    if ":" not in name:
        if name not in LOGGERS:
            raise SettingsError(f"{setting} = {name!r}: {not_one_of(name, LOGGERS, 'module:Class')}")
        need(f"{setting} = {name!r}", name)
    kind = find(setting, LOGGERS.get(name, name))
    if not (isclass(kind) and issubclass(kind, Callback)):
        raise SettingsError(
            f"{setting} = {name!r} must be a class with the methods run_started, round_ended and run_ended: derive "
            "it from fedfmd.tracking.Callback"
        )
    return kind


@contextmanager
def tracked(settings: Settings, folder: RunFolder) -> Iterator[None]:
    """Tell the callbacks of all that is written to the folder while the block runs.

    Raises:
        SettingsError: as `find_callbacks`, or the folder's ``tracking.json`` is damaged.
    """
    kinds = find_callbacks(settings)
    if not kinds:
        yield
        return
    telling = Telling(kinds, settings, folder)
    folder.listeners.append(telling.round_ended)
    try:
        yield
    except BaseException as error:
        telling.run_ended(one_line(error) if isinstance(error, Exception) else "it was stopped")
        raise
    else:
        telling.run_ended()
    finally:
        folder.listeners.remove(telling.round_ended)


class Telling:
    """The callbacks of a run, which starts when this is made."""

    def __init__(self, kinds: Mapping[str, type[Callback]], settings: Settings, folder: RunFolder) -> None:
        self._folder = folder
        self._record = _read(folder.path / RECORD)
        self._callbacks: dict[str, Callback] = {}
        for name, kind in kinds.items():
            told = self._record.told.get(name, 0)
            run = TrackedRun(self._record.run, folder.path.name, folder.path, settings, told)
            self._keep(name, told)  # the id is on the disk before anyone uses it
            with self._heard_by(name):
                callback = kind()
                callback.run_started(run)
                self._callbacks[name] = callback

    def round_ended(self, row: RoundRow | EpochRow, clients: Sequence[ClientRow]) -> None:
        """Tell of a row, after all earlier ones that a callback has missed."""
        for name, callback in list(self._callbacks.items()):
            with self._heard_by(name):
                self._catch_up(name, callback, row.round - 1)
                if row.round > self._record.told[name]:
                    callback.round_ended(row, clients)
                    self._keep(name, row.round)

    def run_ended(self, error: str = "") -> None:
        """Tell how the run ended."""
        pictures = tuple(sorted(self._folder.path.glob("*.png")))
        end = RunEnd(error, pictures, latest_model(self._folder.checkpoints))
        for name, callback in list(self._callbacks.items()):
            with self._heard_by(name):
                callback.run_ended(end)

    def _catch_up(self, name: str, callback: Callback, last: int) -> None:
        told = self._record.told[name]
        if told >= last:
            return
        for row, clients in _rows(self._folder, told, last):
            callback.round_ended(row, clients)
            self._keep(name, row.round)

    def _keep(self, name: str, told: int) -> None:
        self._record = Record(self._record.run, {**self._record.told, name: told})
        atomic_write(self._folder.path / RECORD, json.dumps(asdict(self._record), indent=1) + "\n")

    @contextmanager
    def _heard_by(self, name: str) -> Iterator[None]:
        """Let go of a callback that raises: a run is worth more than its curves."""
        try:
            yield
        except (Exception, SystemExit) as error:
            self._callbacks.pop(name, None)
            logger.warning("%s is told no more, and the run goes on without it: %s", name, one_line(error))


def _rows(
    folder: RunFolder, told: int, last: int
) -> Iterable[tuple[RoundRow | EpochRow, Sequence[ClientRow]]]:
    """Read the rows after `told` up to `last`, each with its clients."""
    if folder.epochs.exists():
        return [(row, ()) for row in read_epochs(folder.epochs) if told < row.round <= last]
    clients = clients_of(folder.path)
    return [
        (row, [client for client in clients if client.round == row.round])
        for row in read_rounds(folder.rounds)
        if told < row.round <= last
    ]


def _read(path: Path) -> Record:
    if not path.exists():
        return Record()
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"{path} is damaged ({error}): delete it, and every callback is told of the run anew"
        ) from None
