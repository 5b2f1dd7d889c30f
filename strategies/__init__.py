"""The server's algorithms: Flower's strategies, tracked and under edge budgets."""

from strategies.buffered import BufferedStrategy
from strategies.registry import STRATEGIES, find_strategy, make_strategy, own_sources
from strategies.tracked import TrackedStrategy

__all__ = [
    "STRATEGIES",
    "BufferedStrategy",
    "TrackedStrategy",
    "find_strategy",
    "make_strategy",
    "own_sources",
]
