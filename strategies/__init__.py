"""The server's algorithms: Flower's strategies, tracked and under edge budgets."""

from strategies.registry import STRATEGIES, find_strategy, make_strategy
from strategies.tracked import TrackedStrategy

__all__ = ["STRATEGIES", "TrackedStrategy", "find_strategy", "make_strategy"]
