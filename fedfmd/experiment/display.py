"""What a run looks like in a terminal: its log lines above a progress bar."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedfmd.tracking import parse_round_line


class RunDisplay(logging.Handler):
    """Shows the records of the ``fedfmd`` loggers, or the log lines of a run in other processes."""

    def __init__(self, console: Console, length: int, name: str, unit: str = "round") -> None:
        super().__init__(logging.DEBUG)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}s{{task.fields[clients]}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # in a file it would leave an empty line
        )
        self._task = self._progress.add_task(name or "training", total=length, clients="")
        self._trained = 0

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @contextmanager
    def handling(self, logger: logging.Logger) -> Iterator[None]:
        """Show this logger's records while the block runs."""
        level = logger.level
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            logger.removeHandler(self)
            logger.setLevel(level)

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record; a round or a trained client moves the bar."""
        if hasattr(record, "client"):
            self._trained += 1
            self._progress.update(self._task, clients=f", {self._trained} clients trained")
            return
        if record.levelno >= logging.INFO:
            self._print(record.getMessage())
        if hasattr(record, "round_row"):
            self._round_done(record.round_row.round)

    def line(self, text: str) -> None:
        """Print a line of the run's log; the machine-readable line of a round moves the bar instead."""
        row = parse_round_line(text)
        if row is None:
            self._print(text)
        else:
            self._round_done(row.round)

    def _round_done(self, server_round: int) -> None:
        self._trained = 0
        self._progress.update(self._task, completed=server_round, clients="")

    def _print(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
