"""From settings to the strategy of a run."""

from __future__ import annotations

from fedfmd.algorithms import find_algorithm
from fedfmd.build import Federation
from fedfmd.runs import RunFolder
from strategies.buffered import BufferedStrategy
from strategies.tracked import TrackedStrategy


def make_strategy(federation: Federation, folder: RunFolder) -> TrackedStrategy:
    """Make the strategy that runs the algorithm which the settings name, in rounds of the kind that it wants.

    Raises:
        SettingsError: the settings don't suit it.
    """
    algorithm = find_algorithm(federation.settings)
    kind = BufferedStrategy if algorithm.buffer else TrackedStrategy
    return kind(algorithm, federation, folder)
