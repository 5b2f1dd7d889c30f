"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp.strategy import FedAvg

from fedfmd.federation import Federation
from fedfmd.tracking import RunFolder
from fedfmd.wire import ARRAYS, CONFIG, WEIGHT
from strategies.tracked import TrackedStrategy


def _fedavg() -> FedAvg:
    """FedAvg (McMahan et al., 2017): the mean of the clients' models, weighted by their images."""
    return FedAvg(weighted_by_key=WEIGHT, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)


STRATEGIES: dict[str, Callable[[], FedAvg]] = {"fedavg": _fedavg}


def make_strategy(federation: Federation, folder: RunFolder) -> TrackedStrategy:
    """Wrap the Flower strategy that ``server.strategy``, a name of `STRATEGIES`, stands for."""
    return TrackedStrategy(STRATEGIES[federation.settings.server.strategy](), federation, folder)
