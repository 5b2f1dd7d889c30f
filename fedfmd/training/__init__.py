"""Local training of one model on one set of images; knows nothing of Flower."""

from fedfmd.training.local import (
    LOSSES,
    MEMORY_FORMATS,
    OPTIMISERS,
    PRECISIONS,
    SCHEDULES,
    Best,
    Evaluation,
    LocalSGD,
    Loss,
    Tally,
    TrainResult,
    evaluate,
    evaluate_on_both,
    learning_rate,
    scheduled_rate,
    train,
)

__all__ = [
    "LOSSES",
    "MEMORY_FORMATS",
    "OPTIMISERS",
    "PRECISIONS",
    "SCHEDULES",
    "Best",
    "Evaluation",
    "LocalSGD",
    "Loss",
    "Tally",
    "TrainResult",
    "evaluate",
    "evaluate_on_both",
    "learning_rate",
    "scheduled_rate",
    "train",
]
