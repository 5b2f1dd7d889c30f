"""The server's half of a run as a Flower strategy: its rounds under edge budgets, its rows and checkpoints."""

from fedfmd.algorithms import ALGORITHMS as STRATEGIES
from fedfmd.algorithms import find_algorithm as find_strategy
from strategies.buffered import BufferedStrategy
from strategies.factory import make_strategy
from strategies.tracked import TrackedStrategy

__all__ = [
    "STRATEGIES",
    "BufferedStrategy",
    "TrackedStrategy",
    "find_strategy",
    "make_strategy",
]
