"""What callbacks are told of a run: trackers of experiments, and classes of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from fedfmd.runs import ClientRow, EpochRow, RoundRow
from fedfmd.settings import Settings


@dataclass(frozen=True)
class TrackedRun:
    """The run that starts, or goes on.

    Attributes:
        id: hexadecimal digits that no other run has; the same when it goes on.
        name: that of its folder.
        folder: where all that it leaves is kept.
        settings: all settings; `settings.kept()` gives them as dotted keys and scalars.
        told: the last round, or epoch, that this callback was told of before; 0 if it is all new.
    """

    id: str
    name: str
    folder: Path
    settings: Settings
    told: int = 0


@dataclass(frozen=True)
class RunEnd:
    """How a run ended.

    Attributes:
        error: why it ended early, in one line; "" if all rounds are done, or as many as ``server.stop-at`` wants.
        pictures: PNG files in its folder, ``partition.png`` for instance.
        checkpoint: the newest model's .safetensors file, which is the final one without an error.
    """

    error: str = ""
    pictures: tuple[Path, ...] = ()
    checkpoint: Path | None = None


@runtime_checkable
class Callback(Protocol):
    """A class without arguments, one object of which is told of a run while it goes.

    Each round is told once, in order, from the first one, also where the run was stopped and goes on, or where
    the callback is new to it. What a callback returns or raises changes nothing in the run: after an error it is
    told no more until the run is started again, which first tells it what it has missed.

    A class that derives from this one need not have all three methods.
    """

    def run_started(self, run: TrackedRun) -> None:
        """Hear of the run, before its first round or before it goes on."""

    def round_ended(self, row: RoundRow | EpochRow, clients: Sequence[ClientRow]) -> None:
        """Hear of a finished round and its clients, or of an epoch of centralised training, which has none."""

    def run_ended(self, end: RunEnd) -> None:
        """Hear that the run is over, unless its process was killed."""


def numbers(row: RoundRow | EpochRow) -> dict[str, float]:
    """Return a row's numbers by their columns, without its own number and what doesn't exist."""
    columns = asdict(row).items()
    return {
        name: float(value)
        for name, value in columns
        if isinstance(value, int | float) and name not in ("round", "epoch")
    }
