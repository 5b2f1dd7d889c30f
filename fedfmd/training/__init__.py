"""Local training of one model on one set of images; knows nothing of Flower."""

from fedfmd.training.local import (
    PRECISIONS,
    SCHEDULES,
    Best,
    Evaluation,
    LocalSGD,
    TrainResult,
    evaluate,
    evaluate_on_both,
    learning_rate,
    train,
)

__all__ = [
    "PRECISIONS",
    "SCHEDULES",
    "Best",
    "Evaluation",
    "LocalSGD",
    "TrainResult",
    "evaluate",
    "evaluate_on_both",
    "learning_rate",
    "train",
]
