"""What ends a run before its last round or epoch: a pure function of its rows, so that a resume sees the same.

A run that has met a limit is finished. Nothing else is kept of that than the limits and the rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedfmd.errors import nearest_of
from fedfmd.runs.rows import EpochRow, RoundRow, read_epochs, read_rounds, rounded

LIMITS = ("accuracy", "seconds", "mb", "joules")
MEGA = 1e6

Rows = Sequence[RoundRow | EpochRow]


def parse_stop(text: str) -> dict[str, float]:
    """Read limits, such as ``accuracy=0.95, seconds=600``, in their order; none is no limit.

    Raises:
        ValueError: one is unknown, is there twice, or has no value that can be met.
    """
    limits: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not equals:
            raise ValueError(f"{part!r} must be name=value, such as accuracy=0.95")
        if name not in LIMITS:
            raise ValueError(
                f"{name!r} must be one of {', '.join(LIMITS)}; did you mean {nearest_of(name, LIMITS)!r}?"
            )
        if name in limits:
            raise ValueError(f"{name} is given twice")
        limits[name] = _limit(name, value)
    return limits


def stop_reason(limits: Mapping[str, float], rows: Rows) -> str:
    """Return which limit the rows of a run have met, in words; "" if none.

    Accuracy is that on the validation images, on the test images only where there are no others, of the last
    row's model; it is not met where that wasn't tested. Seconds are virtual, or those of training if centralised.
    """
    if not rows:
        return ""
    for name, limit in limits.items():
        value, text = _reached(name, rows)
        if value is not None and value >= limit:
            return f"{text} {value:.6g} has reached server.stop-at {name}={limit:g}"
    return ""


def stopped_by(folder: Path, limits: Mapping[str, float], round: int) -> str:
    """Return which limit the first `round` rounds or epochs of the run in `folder` have met, in words; "" if none.

    Raises:
        ValueError: a row of its can't be read.
    """
    if not (limits and round):
        return ""
    epochs = folder / "epochs.csv"
    rows: Rows = read_epochs(epochs) if epochs.exists() else read_rounds(folder / "rounds.csv")
    return stop_reason(limits, [row for row in rows if row.round <= round])


def _limit(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} = {text!r} must be a number") from None
    if not 0 < value < float("inf") or (name == "accuracy" and value > 1):
        raise ValueError(f"{name} = {text} must be above 0{' and at most 1' if name == 'accuracy' else ''}")
    return value


def _reached(name: str, rows: Rows) -> tuple[float | None, str]:
    """Return what a limit is compared with, as the rows' files tell it, and its name; None if it isn't known."""
    last = rows[-1]
    if name == "accuracy":
        if last.validation_accuracy is not None:
            return rounded(last.validation_accuracy), "validation accuracy"
        accuracy = None if last.accuracy is None else rounded(last.accuracy)
        return accuracy, "accuracy on the test images, without any validation images,"
    if isinstance(last, EpochRow):
        return (rounded(last.cum_wall_s), "training time in seconds") if name == "seconds" else (None, "")
    if name == "seconds":
        return rounded(last.virtual_s), "virtual time in seconds"
    columns = ("energy_j",) if name == "joules" else ("up_bytes", "down_bytes")
    total = sum(rounded(getattr(row, column)) for row in rows for column in columns)
    return (total, "energy in joules") if name == "joules" else (total / MEGA, "traffic in MB")
