"""Telling of runs while they go: TensorBoard, Weights & Biases, MLflow, and callbacks of a user's own."""

from fedfmd.runs import ClientRow, EpochRow, RoundRow
from fedfmd.tracking.callback import Callback, RunEnd, TrackedRun, numbers
from fedfmd.tracking.telling import LOGGERS, find_callbacks, tracked

__all__ = [
    "LOGGERS",
    "Callback",
    "ClientRow",
    "EpochRow",
    "RoundRow",
    "RunEnd",
    "TrackedRun",
    "find_callbacks",
    "numbers",
    "tracked",
]
