"""What a model costs, counted and measured, and how its accuracy weighs against that."""

from fedfmd.cost.counting import Cost, count, frozen_bytes, training_flops, training_memory
from fedfmd.cost.measuring import latency
from fedfmd.cost.tradeoff import ies, pareto_front, rcs

__all__ = [
    "Cost",
    "count",
    "frozen_bytes",
    "ies",
    "latency",
    "pareto_front",
    "rcs",
    "training_flops",
    "training_memory",
]
