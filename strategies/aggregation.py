"""From the clients' updates to the next global arrays, through the step of an algorithm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedfmd.algorithms import Algorithm, Update
from fedfmd.algorithms.algorithm import mean
from fedfmd.protocol.state import Arrays


def aggregate(
    algorithm: Algorithm,
    state: Any,
    server_round: int,
    updates: Sequence[Update],
    current: Arrays,
    parameters: Collection[str],
) -> tuple[Arrays, Any]:
    """Return the next arrays, and the algorithm's next state.

    The algorithm steps from the current parameters. Those that nobody trained keep their values bit for bit,
    whatever it makes of them, and the others their dtype: some of Flower's optimisers return float64. Buffers take
    their plain mean: a server optimiser would treat running variances as weights and drive them below zero, and
    integers would not stay integers.
    """
    normalised = algorithm.normalise(updates, current, parameters)
    buffers = mean(_part(update, update.arrays.keys() - parameters) for update in normalised)
    learnt = [_part(update, parameters) for update in normalised]
    start = {name: array for name, array in current.items() if name in parameters}
    stepped, state = algorithm.step(state, server_round, start, learnt)
    trained = {name for update in learnt for name in update.arrays}
    moved = {name: np.asarray(stepped[name], dtype=current[name].dtype) for name in trained}
    return current | buffers | moved, state


def _part(update: Update, names: Collection[str]) -> Update:
    return replace(update, arrays={name: array for name, array in update.arrays.items() if name in names})
