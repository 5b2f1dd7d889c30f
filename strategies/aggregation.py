"""From the nodes' replies to the next global state, through one of Flower's strategies."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedfmd.flower_compat import start_step
from fedfmd.protocol.averaging import WeightedMean
from fedfmd.protocol.messages import ARRAYS, METRICS, WEIGHT, Reply, from_record, to_record
from fedfmd.protocol.state import Arrays

Replies = Sequence[tuple[Message, Reply]]


def aggregate(
    inner: FedAvg,
    server_round: int,
    replies: Replies,
    current: Arrays,
    parameters: Collection[str],
    separate: bool = False,
) -> Arrays:
    """Average each array over the clients that trained it, and let `inner` step from `current` to that mean.

    `inner` gets one message with the mean of all parameters, or the update of every reply if it needs them
    separately; in both, arrays that were not trained have their current values. Those that nobody trained keep
    them bit for bit, whatever `inner` makes of them. Buffers take their plain mean: a server optimiser would
    treat running variances as weights and drive them below zero, and integers would not stay integers.
    Parameters keep their dtype: some of Flower's optimisers return float64. Plain FedAvg's step is the mean
    itself, so that the copies which Flower's messages are made of can be spared.
    """
    mean = WeightedMean()
    for _, reply in replies:
        mean.add(reply.arrays, reply.weights)
    trained = mean.arrays()
    if type(inner) is FedAvg:
        return current | trained
    if separate:
        states = [(message, reply.arrays, reply.weight) for message, reply in replies]
    else:
        states = [(replies[0][0], trained, sum(reply.weight for _, reply in replies))]

    def of_parameters(state: Mapping[str, np.ndarray]) -> Arrays:
        return {name: array for name, array in (current | state).items() if name in parameters}

    start_step(inner, server_round, to_record(of_parameters({})))
    for message, state, weight in states:
        message.content = RecordDict(
            {ARRAYS: to_record(of_parameters(state)), METRICS: MetricRecord({WEIGHT: weight})}
        )
    record, _ = inner.aggregate_train(server_round, [message for message, _, _ in states])
    stepped = from_record(record)
    return (current | trained) | {
        name: np.asarray(stepped[name], dtype=array.dtype)
        for name, array in trained.items()
        if name in parameters
    }


def lengthen(replies: Replies, current: Arrays, parameters: Collection[str], factor: float) -> Replies:
    """Multiply the way from the current parameters to those of each reply by a factor; buffers stay."""
    return [
        (
            message,
            replace(
                reply,
                arrays=reply.arrays
                | {
                    name: np.asarray(current[name] + factor * (array - current[name]), array.dtype)
                    for name, array in reply.arrays.items()
                    if name in parameters
                },
            ),
        )
        for message, reply in replies
    ]


def transplant(
    reply: Reply, start: Arrays, current: Arrays, parameters: Collection[str], factor: float
) -> Reply:
    """What an update would be if it had begun at `current` and not at `start`, and were shorter by a factor.

    Buffers go that share of the way from the current ones to the client's: moved like parameters, a running
    variance could end below zero.
    """
    arrays = {}
    for name, array in reply.arrays.items():
        origin = start[name] if name in parameters else current[name]
        moved = current[name] + factor * (np.asarray(array, np.float64) - origin)
        whole = np.issubdtype(array.dtype, np.integer)
        arrays[name] = np.asarray(np.rint(moved) if whole else moved, array.dtype)
    return replace(reply, arrays=arrays)
