"""What an experiment looks like in a terminal: log lines above a bar per run in progress and one for all."""

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
from rich.table import Column

from fedfmd.runs import parse_round_line

SPEED_PERIOD_S = 3600.0
"""Seconds that the estimate of the remaining time looks back: a round may take minutes."""


class ExperimentDisplay:
    """The bars of an experiment, in a terminal only: anywhere else there are log lines alone.

    Several runs have a bar in common too, which counts the `rounds` of all (or what `unit` says), of which
    some may be `done`, and their lines begin with the run's name. Use as a context manager.
    """

    def __init__(self, console: Console, runs: int, rounds: int, done: int = 0, unit: str = "round") -> None:
        name = Column(no_wrap=True, overflow="ellipsis", max_width=console.width // 4)
        self.progress = Progress(
            TextColumn("{task.description}", table_column=name),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(f"{unit}s{{task.fields[clients]}}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,  # in a file it would leave an empty line
            speed_estimate_period=SPEED_PERIOD_S,
        )
        self._runs, self._runs_done = runs, 0
        self._total = self.progress.add_task(
            self._count, total=rounds, completed=done, clients="", visible=runs > 1
        )

    def __enter__(self) -> ExperimentDisplay:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def run(self, name: str, rounds: int, done: int = 0) -> RunDisplay:
        """Show a run that begins after `done` of its rounds."""
        return RunDisplay(self, name if self._runs > 1 else "", rounds, done)

    def print(self, text: str) -> None:
        """Print lines as they are, with a question mark for each sign that the console can't show."""
        console = self.progress.console
        shown = text.encode(console.encoding, "replace").decode(console.encoding)
        console.print(shown, markup=False, highlight=False, soft_wrap=True)

    def advance(self, rounds: int) -> None:
        """Count rounds of any run."""
        self.progress.advance(self._total, rounds)

    def run_ended(self) -> None:
        """Count a run."""
        self._runs_done += 1
        self.progress.update(self._total, description=self._count)

    @property
    def _count(self) -> str:
        return f"{self._runs_done}/{self._runs} runs"


class RunDisplay(logging.Handler):
    """Shows the records of a run's ``fedfmd`` loggers, or its log lines from other processes, until closed."""

    def __init__(self, display: ExperimentDisplay, name: str, rounds: int, done: int) -> None:
        super().__init__(logging.DEBUG)
        self._display, self._progress = display, display.progress
        self._prefix = f"{name} | " if name else ""
        self._done, self._trained = done, 0
        self._task = self._progress.add_task(name or "training", total=rounds, completed=done, clients="")

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
            self._print(self.format(record))
        if hasattr(record, "round_row"):
            self._round_done(record.round_row.round)

    def line(self, text: str) -> None:
        """Print a line of the run's log; the machine-readable line of a round moves the bar instead."""
        row = parse_round_line(text)
        if row is None:
            self._print(text)
        else:
            self._round_done(row.round)

    def close(self) -> None:
        """Take the run's bar away and count the run, once: `logging` closes what is left at the end of the process."""
        super().close()
        if self._task in self._progress.task_ids:
            self._progress.remove_task(self._task)
            self._display.run_ended()

    def _round_done(self, server_round: int) -> None:
        self._display.advance(server_round - self._done)
        self._done, self._trained = server_round, 0
        self._progress.update(self._task, completed=server_round, clients="")

    def _print(self, text: str) -> None:
        for line in text.splitlines():
            self._display.print(f"{self._prefix}{line}")
