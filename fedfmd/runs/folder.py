"""The folder that a run leaves behind: settings, environment, rows, checkpoints and log."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from fedfmd.conv.native import is_compiled
from fedfmd.runs import columns
from fedfmd.runs.files import append, atomic_write
from fedfmd.runs.provenance import code_digest
from fedfmd.runs.rows import (
    CLIENT_COLUMNS,
    EPOCH_COLUMNS,
    ROUND_COLUMNS,
    ClientRow,
    EpochRow,
    RoundRow,
    Row,
    csv_text,
    read_clients,
    whole_lines,
)
from fedfmd.version import __version__

CHECKPOINTS = "checkpoints"
CLIENTS, CLIENT_PARTS = "clients.csv", "clients.parquet"
_LIBRARIES = ("flwr", "numpy", "torch", "torchvision")

Listener = Callable[[RoundRow | EpochRow, Sequence[ClientRow]], None]
"""Is called with each round and its clients, or each epoch, once they are written."""


class RunFolder:
    """A run's folder, created if it isn't there.

    `rounds.csv` is the record of what is finished: a round's clients are written before it, so that a crash
    leaves at most a tail that `truncate_after` removes. Centralised training has `epochs.csv` instead, and may have
    checkpoints of an `unfinished` epoch, which are numbered by the steps so far.

    The rows of clients are added to `clients.csv`, or where `in_columns` to `clients.parquet` (`fedfmd.runs.columns`).

    Raises:
        ValueError: the folder can't be made; the text names `run-dir`.
    """

    def __init__(self, path: Path | str, in_columns: bool = False) -> None:
        self.in_columns = in_columns
        self.path = Path(path).expanduser().absolute()
        self.settings = self.path / "settings.yaml"
        self.environment = self.path / "environment.json"
        self.rounds = self.path / "rounds.csv"
        self.clients = self.path / CLIENTS
        self.client_parts = self.path / CLIENT_PARTS
        self.epochs = self.path / "epochs.csv"
        self.checkpoints = self.path / CHECKPOINTS
        self.unfinished = self.checkpoints / "unfinished"
        self.log = self.path / "log.txt"
        self.lock = self.path / ".lock"
        self.listeners: list[Listener] = []
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run-dir = {self.path} can't be made: {error.strerror}; give a folder that you may write to"
            ) from error

    @property
    def records(self) -> list[Path]:
        """The files that tell of the rounds or epochs so far; they only grow."""
        return [*self._tables, *columns.parts(self.client_parts).values()]

    @property
    def _tables(self) -> list[Path]:
        return [path for path in (self.rounds, self.clients, self.epochs) if path.exists()]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out, as two would write every row twice; one that dies lets go.

        Raises:
            ValueError: another process holds it; the text names `run-dir` and that process.
        """
        lock = FileLock(self.lock)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            holder = self.lock.read_text(encoding="utf-8").strip() or "unknown"
            raise ValueError(
                f"run-dir = {self.path} is in use: process {holder} writes to it; wait until it ends, or name "
                "another folder"
            ) from None
        try:
            self.lock.write_text(f"{os.getpid()}\n", encoding="utf-8")
            yield
        finally:
            lock.release()

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the resolved settings, in their order."""
        atomic_write(self.settings, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))

    def write_environment(self, *own: Path, **inputs: str) -> None:
        """Write the versions, the machine and the code that the run uses, `own` files of the user included.

        `inputs` are digests of what the run reads, such as its images.
        """
        facts = environment(*own) | inputs
        atomic_write(self.environment, json.dumps(facts, indent=2) + "\n")

    def append_round(self, row: RoundRow, clients: Iterable[ClientRow]) -> None:
        """Add a finished round and its clients.

        Raises:
            OSError: the disk is full, say; earlier rounds are intact.
        """
        clients = tuple(clients)
        if self.in_columns:
            columns.write_part(self.client_parts, row.round, clients)
        else:
            _append(self.clients, CLIENT_COLUMNS, clients)
        _append(self.rounds, ROUND_COLUMNS, [row])
        self._tell(row, clients)

    def append_epoch(self, row: EpochRow) -> None:
        """Add a finished epoch.

        Raises:
            OSError: as in `append_round`.
        """
        _append(self.epochs, EPOCH_COLUMNS, [row])
        self._tell(row)

    def truncate_after(self, round: int) -> None:
        """Drop all rows after this round or epoch, and lines that are none, before a run goes on from there."""
        for number, path in columns.parts(self.client_parts).items():
            if number > round:
                path.unlink()
        for path in self._tables:
            header, *rows = whole_lines(path) or [""]
            atomic_write(path, "".join([header, *(row for row in rows if _is_until(round, row))]))

    def log_handler(self) -> logging.Handler:
        """Return a handler that appends to `log.txt`, for the caller to add to its loggers and to close."""
        handler = logging.FileHandler(self.log, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        return handler

    def _tell(self, row: RoundRow | EpochRow, clients: Sequence[ClientRow] = ()) -> None:
        for listener in self.listeners:
            listener(row, clients)


def clients_of(folder: Path) -> list[ClientRow]:
    """Read the rows of the clients in a run's folder, round after round; none where there are no files of them.

    Raises:
        ValueError: as `read_clients` and `columns.read_parts`.
    """
    table = folder / CLIENTS
    rows = read_clients(table) if table.exists() else []
    return sorted([*rows, *columns.read_parts(folder / CLIENT_PARTS)], key=lambda row: row.round)


def _is_until(round: int, line: str) -> bool:
    """Whether a line is a row of this round or epoch, or of an earlier one."""
    number = line.partition(",")[0]
    return number.isdecimal() and int(number) <= round


def _append(path: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    empty = not path.exists() or path.stat().st_size == 0
    table: list[Iterable[float | str | None]] = [[getattr(row, name) for name in names] for row in rows]
    append(path, csv_text([names, *table] if empty else table))


def read_environment(folder: Path) -> dict[str, Any]:
    """Read the environment.json of a run folder; empty if there is none.

    Raises:
        ValueError: it is damaged; the text names it.
    """
    path = folder / "environment.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged (it holds {content!r}, no mapping)")
    return content


def environment(*own: Path) -> dict[str, Any]:
    """Versions, machine, commit and digest of the code; nothing that names a user, a host or a folder."""
    return {
        "versions": {
            "fedfmd": __version__,
            "python": platform.python_version(),
            **{library: version for library in _LIBRARIES if (version := _version(library))},
        },
        "machine": {
            "system": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),  # such as AVX512: one name stands for many
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "native_mixing": is_compiled(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "commit": _commit(),
        "code": code_digest(*own),
    }


def _version(library: str) -> str | None:
    """Return the installed version; none where it is missing: centralised training does without Flower."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the board's or the processor's name, where Linux tells it."""
    board, cpu = Path("/proc/device-tree/model"), Path("/proc/cpuinfo")
    if board.exists():
        return board.read_text().strip("\0\n")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Return the commit of the checkout that the package runs from, `-dirty` if it was changed; None without one.

    The package may lie in an environment inside another project's repository, so git must know its files.
    """
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--exclude=*", "--abbrev=40", "--dirty")
    except (OSError, subprocess.CalledProcessError):
        return None
