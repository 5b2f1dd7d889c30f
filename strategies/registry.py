"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from flwr.serverapp.strategy import FedAvg

from fedfmd.errors import SettingsError, not_one_of
from fedfmd.federation import Federation
from fedfmd.tracking import RunFolder
from fedfmd.wire import ARRAYS, CONFIG, WEIGHT
from strategies.tracked import TrackedStrategy


def _fedavg() -> FedAvg:
    """FedAvg (McMahan et al., 2017): the mean of the clients' models, weighted by their images."""
    return FedAvg(weighted_by_key=WEIGHT, arrayrecord_key=ARRAYS, configrecord_key=CONFIG)


STRATEGIES: dict[str, Callable[[], FedAvg]] = {"fedavg": _fedavg}


def find_strategy(name: str) -> Callable[[], FedAvg]:
    """Return the maker of the Flower strategy that ``server.strategy`` names.

    Raises:
        SettingsError: unknown name.
    """
    if name not in STRATEGIES:
        raise SettingsError(f"server.strategy = {name!r}: {not_one_of(name, STRATEGIES)}")
    return STRATEGIES[name]


def make_strategy(federation: Federation, folder: RunFolder) -> TrackedStrategy:
    """Wrap the Flower strategy that the settings name."""
    return TrackedStrategy(find_strategy(federation.settings.server.strategy)(), federation, folder)
