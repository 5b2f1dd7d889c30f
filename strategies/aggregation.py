"""From the nodes' means to the next global state, through one of Flower's strategies."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedfmd.averaging import WeightedMean
from fedfmd.wire import ARRAYS, METRICS, WEIGHT, Arrays, Reply, from_record, to_record


def aggregate(
    inner: FedAvg,
    server_round: int,
    replies: Sequence[tuple[Message, Reply]],
    current: Arrays,
    parameters: Collection[str],
) -> Arrays:
    """Average each array over the clients that trained it, and let `inner` step from `current` to that mean.

    `inner` gets one message with all parameters, where those that nobody trained have their current values;
    whatever it makes of these, they keep them bit for bit. Buffers take their plain mean: a server optimiser
    would treat running variances as weights and drive them below zero, and integers would not stay integers.
    Parameters keep their dtype: some of Flower's optimisers return float64.
    """
    mean = WeightedMean()
    for _, reply in replies:
        mean.add(reply.arrays, reply.weights)
    trained = mean.arrays()
    complete = current | trained
    message = replies[0][0]
    message.content = RecordDict(
        {
            ARRAYS: to_record({name: array for name, array in complete.items() if name in parameters}),
            METRICS: MetricRecord({WEIGHT: sum(reply.weight for _, reply in replies)}),
        }
    )
    record, _ = inner.aggregate_train(server_round, [message])
    stepped = from_record(record)
    return complete | {
        name: np.asarray(stepped[name], dtype=array.dtype)
        for name, array in trained.items()
        if name in parameters
    }
