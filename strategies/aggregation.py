"""From the clients' updates to the next global arrays, through the step of an algorithm."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from statistics import median
from typing import Any

import numpy as np

from fedfmd.algorithms import Algorithm, Update
from fedfmd.algorithms.fedbuff import rebase
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
    whatever it makes of them, and the others their dtype: some of Flower's optimisers return float64. Buffers are
    combined apart, by their plain mean or a robust one: a server optimiser would treat running variances as weights
    and drive them below zero, and integers would not stay integers.
    """
    normalised = algorithm.normalise(updates, current, parameters)
    told = [update.part(update.arrays.keys() - parameters) for update in normalised]
    buffers = algorithm.buffers(told, current)
    learnt = [update.part(parameters) for update in normalised]
    start = {name: array for name, array in current.items() if name in parameters}
    stepped, state = algorithm.step(state, server_round, start, learnt)
    trained = {name for update in learnt for name in update.arrays}
    moved = {name: np.asarray(stepped[name], dtype=current[name].dtype) for name in trained}
    return current | buffers | moved, state


def limit_updates(
    algorithm: Algorithm, updates: Sequence[Update], parameters: Collection[str], norm: float, ratio: float
) -> tuple[list[Update], dict[int, str]]:
    """Scale single clients' updates down to a limit; also return what was done to whom, by client.

    An update's norm is the L2 norm of its way from the parameters it began with, as the algorithm will stretch it. The
    limit is `norm`, or `ratio` times the median norm of all these updates, whichever is less; 0 is none. Buffers go the
    same share of their way: an update that is too long is likely one whose buffers are wrong too.
    """
    if not (norm or ratio) or not updates:
        return list(updates), {}
    stretch = algorithm.stretch(updates)
    norms = [stretch * update_norm(update, parameters) for update in updates]
    limit, setting = min(
        (norm or math.inf, "server.max-update-norm"),
        (ratio * median(norms) if ratio else math.inf, "server.max-update-ratio"),
    )
    limited: list[Update] = []
    done: dict[int, str] = {}
    for update, length in zip(updates, norms, strict=True):
        if length > limit:
            remark = f"update of norm {length:.4g} scaled down to {limit:.4g} ({setting})"
            done |= {result.client: remark for result in update.results}
            limited.append(rebase(update, update.start, parameters, limit / length))
        else:
            limited.append(update)
    return limited, done


def update_norm(update: Update, parameters: Collection[str]) -> float:
    """Return the L2 norm of an update's way from the parameters that it began with."""
    return math.hypot(
        *(
            float(np.linalg.norm(np.asarray(array, np.float64) - update.start[name]))
            for name, array in update.arrays.items()
            if name in parameters
        )
    )
