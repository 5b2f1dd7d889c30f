"""The server's algorithms: Flower's strategies, tracked and under edge budgets."""

from strategies.registry import STRATEGIES, make_strategy
from strategies.tracked import TrackedStrategy

__all__ = ["STRATEGIES", "TrackedStrategy", "make_strategy"]
