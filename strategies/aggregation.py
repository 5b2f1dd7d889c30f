"""From the nodes' means to the next global state, through one of Flower's strategies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedfmd.averaging import WeightedMean
from fedfmd.wire import ARRAYS, METRICS, WEIGHT, Arrays, Reply, from_record


def aggregate(
    inner: FedAvg,
    server_round: int,
    replies: Sequence[tuple[Message, Reply]],
    parameters: Iterable[str],
) -> Arrays:
    """Let `inner` combine the parameters; buffers take their plain mean, weighted by images.

    Buffers go apart because a server optimiser would treat running variances as weights and drive them
    below zero, and because integers would not stay integers. Parameters keep their dtype: some of Flower's
    optimisers return float64.
    """
    names = set(parameters)
    first = replies[0][1].arrays
    buffers = WeightedMean()
    for message, reply in replies:
        buffers.add(_without(reply.arrays, names), reply.weight)
        kept = ArrayRecord({name: array for name, array in message.content[ARRAYS].items() if name in names})
        message.content = RecordDict({ARRAYS: kept, METRICS: MetricRecord({WEIGHT: reply.weight})})
    record, _ = inner.aggregate_train(server_round, [message for message, _ in replies])
    combined = {
        name: np.asarray(array, dtype=first[name].dtype) for name, array in from_record(record).items()
    }
    return combined | (buffers.arrays() or {})


def _without(arrays: Mapping[str, np.ndarray], names: set[str]) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in names}
