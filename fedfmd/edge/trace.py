"""When clients are there: windows of virtual time from a CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

COLUMNS = ["client", "start_s", "end_s"]
TOLERANCE_S = 1e-6  # the clock's rounding must not keep a window closed that it was advanced to


@dataclass(frozen=True)
class Trace:
    """The windows (start, end), in virtual seconds, of the clients that have any; others are always there.

    The trace repeats after `period_s`, the last end of all windows.
    """

    windows: Mapping[int, tuple[tuple[float, float], ...]] = field(default_factory=dict, hash=False)
    period_s: float = math.inf

    def has(self, client: int, time_s: float) -> bool:
        """Whether the client is there at this time."""
        if client not in self.windows:
            return True
        phase = (time_s + TOLERANCE_S) % self.period_s
        return any(start <= phase < end for start, end in self.windows[client])

    def until_next(self, time_s: float) -> float:
        """Seconds until a window opens, the trace having some."""
        starts = (start for windows in self.windows.values() for start, _ in windows)
        return min((start - time_s) % self.period_s for start in starts)


ALWAYS = Trace()


def load_trace(path: Path, clients: int) -> Trace:
    """Read a CSV file with the columns client, start_s and end_s, one window per line.

    Raises:
        ValueError: the file can't be read, or a line is no window of a client 0, 1, … `clients` - 1; the text
            names file and line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            columns, lines = reader.fieldnames, list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"fleet.trace = {path}: cannot be read: {error}") from error
    if columns != COLUMNS or not lines:
        raise ValueError(
            f"fleet.trace = {path}: must have the header `{','.join(COLUMNS)}` and a line per window"
        )
    windows: dict[int, list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, start=2):
        client, window = _window(path, number, line)
        if client >= clients:
            raise ValueError(
                f"fleet.trace = {path}: line {number} is of client {client}, partition.clients is {clients}: "
                "remove the line or have more clients"
            )
        windows.setdefault(client, []).append(window)
    period_s = max(end for own in windows.values() for _, end in own)
    return Trace({client: tuple(sorted(own)) for client, own in windows.items()}, period_s)


def _window(path: Path, number: int, line: Mapping[str, str]) -> tuple[int, tuple[float, float]]:
    try:
        client, start, end = int(line["client"]), float(line["start_s"]), float(line["end_s"])
        if client >= 0 and 0 <= start < end < math.inf:
            return client, (start, end)
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"fleet.trace = {path}: line {number} is {','.join(map(str, line.values()))!r}: it must hold the number of "
        "a client, and the seconds at which a window opens and closes, 0 <= start_s < end_s"
    )
