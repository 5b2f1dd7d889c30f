"""The strategies by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedfmd.build import Federation
from fedfmd.errors import SettingsError, not_one_of
from fedfmd.protocol.messages import ARRAYS, CONFIG, WEIGHT
from fedfmd.runs import RunFolder
from fedfmd.settings import ServerSettings, Settings
from strategies.buffered import BufferedStrategy
from strategies.tracked import Algorithm, TrackedStrategy

KEYS = {"weighted_by_key": WEIGHT, "arrayrecord_key": ARRAYS, "configrecord_key": CONFIG}
OPTIONS = ("lr", "momentum", "beta_2", "tau", "trim", "byzantine", "buffer", "staleness")
"""The settings of `server` that only some strategies read."""


@dataclass(frozen=True)
class Entry:
    """A strategy by name: how it departs from FedAvg, Flower's part of it, and the options that it reads."""

    algorithm: Algorithm
    inner: Callable[[Settings], FedAvg]
    options: tuple[str, ...] = ()
    tracked: type[TrackedStrategy] = TrackedStrategy


def _fedavg(_settings: Settings) -> FedAvg:
    return FedAvg(**KEYS)


def _fedavgm(settings: Settings) -> FedAvg:
    server = settings.server
    return flower.FedAvgM(**KEYS, server_learning_rate=server.lr or 1.0, server_momentum=server.momentum)


def _buffered(settings: Settings) -> FedAvg:
    return flower.FedAvgM(**KEYS, server_learning_rate=settings.server.lr or 1.0, server_momentum=0.0)


def _fedadagrad(settings: Settings) -> FedAvg:
    server = settings.server
    return flower.FedAdagrad(**KEYS, eta=server.lr or 0.1, tau=server.tau)


def _adaptive(kind: type[flower.FedAdam] | type[flower.FedYogi]) -> Callable[[Settings], FedAvg]:
    def make(settings: Settings) -> FedAvg:
        server = settings.server
        betas = {"beta_1": server.momentum, "beta_2": server.beta_2}
        return kind(**KEYS, eta=server.lr or 0.01, tau=server.tau, **betas)

    return make


def _fedmedian(_settings: Settings) -> FedAvg:
    return flower.FedMedian(**KEYS)


def _fedtrimmedavg(settings: Settings) -> FedAvg:
    return flower.FedTrimmedAvg(**KEYS, beta=settings.server.trim)


def _krum(settings: Settings) -> FedAvg:
    return flower.Krum(**KEYS, num_malicious_nodes=settings.server.byzantine)


def _multikrum(settings: Settings) -> FedAvg:
    byzantine = settings.server.byzantine
    selected = settings.clients_per_round - byzantine
    return flower.MultiKrum(**KEYS, num_malicious_nodes=byzantine, num_nodes_to_select=selected)


MEAN, SEPARATE = Algorithm(), Algorithm(separate=True)
STRATEGIES: dict[str, Entry] = {
    # McMahan et al., 2017: the mean of the clients' models, weighted by their images
    "fedavg": Entry(MEAN, _fedavg),
    # Li et al., 2020: clients are held near the global model by train.proximal-mu
    "fedprox": Entry(Algorithm(proximal=True), _fedavg),
    # Wang et al., 2020: each update divided by the client's own steps, for unequal work
    "fednova": Entry(Algorithm(normalised=True), _fedavg),
    # Li et al., 2021: normalisation layers stay on the client
    "fedbn": Entry(Algorithm(local_norm=True), _fedavg),
    # Hsu et al., 2019; Reddi et al., 2021: the mean update as the gradient of a server's optimiser
    "fedavgm": Entry(MEAN, _fedavgm, ("lr", "momentum")),
    "fedadagrad": Entry(MEAN, _fedadagrad, ("lr", "tau")),
    "fedadam": Entry(MEAN, _adaptive(flower.FedAdam), ("lr", "momentum", "beta_2", "tau")),
    "fedyogi": Entry(MEAN, _adaptive(flower.FedYogi), ("lr", "momentum", "beta_2", "tau")),
    # Yin et al., 2018; Blanchard et al., 2017: against broken or hostile clients
    "fedmedian": Entry(SEPARATE, _fedmedian),
    "fedtrimmedavg": Entry(SEPARATE, _fedtrimmedavg, ("trim",)),
    "krum": Entry(SEPARATE, _krum, ("byzantine",)),
    "multikrum": Entry(SEPARATE, _multikrum, ("byzantine",)),
    # Nguyen et al., 2022: asynchronous, a step whenever `buffer` updates are there
    "fedbuff": Entry(SEPARATE, _buffered, ("lr", "buffer", "staleness"), BufferedStrategy),
}


def find_strategy(settings: Settings) -> Entry:
    """Return the strategy that ``server.strategy`` names: one of `STRATEGIES`, or a user's `module:Class`.

    A class of one's own derives from Flower's `FedAvg`, and gets every client's update in a message of its own.

    Raises:
        SettingsError: unknown name, no such class, or an option that the strategy does not read.
    """
    name = settings.server.strategy
    if ":" in name:
        kind = _users_class(name)
        entry = Entry(SEPARATE, lambda _settings: kind(**KEYS))
    elif name in STRATEGIES:
        entry = STRATEGIES[name]
    else:
        raise SettingsError(
            f"server.strategy = {name!r}: {not_one_of(name, STRATEGIES)}, or module:Class of your own"
        )
    _check_options(settings, entry)
    return entry


def own_sources(settings: Settings) -> tuple[Path, ...]:
    """The file of a user's own strategy; none for one of `STRATEGIES`.

    Raises:
        SettingsError: there is no such class.
    """
    name = settings.server.strategy
    file = inspect.getsourcefile(_users_class(name)) if ":" in name else None
    return (Path(file),) if file else ()


def make_strategy(federation: Federation, folder: RunFolder) -> TrackedStrategy:
    """Make the strategy that the settings name."""
    entry = find_strategy(federation.settings)
    return entry.tracked(entry.inner(federation.settings), federation, folder, entry.algorithm)


def _users_class(name: str) -> type[FedAvg]:
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SettingsError(
            f"server.strategy = {name!r} can't be imported ({error}): put its folder on PYTHONPATH"
        ) from None
    if not (inspect.isclass(kind) and issubclass(kind, FedAvg)):
        raise SettingsError(f"server.strategy = {name!r} must be a class that derives from Flower's FedAvg")
    return kind


def _check_options(settings: Settings, entry: Entry) -> None:
    server, defaults = settings.server, ServerSettings()
    for option in OPTIONS:
        if option not in entry.options and getattr(server, option) != getattr(defaults, option):
            readers = ", ".join(name for name, other in STRATEGIES.items() if option in other.options)
            raise SettingsError(
                f"server.{option.replace('_', '-')} = {getattr(server, option)} has no effect with "
                f"server.strategy = {server.strategy}: it belongs to {readers}"
            )
    if entry.algorithm.proximal and not settings.train.proximal_mu:
        raise SettingsError(f"server.strategy = {server.strategy} needs train.proximal-mu > 0, such as 0.01")
    clients = settings.clients_per_round
    if "byzantine" in entry.options and 2 * server.byzantine + 2 >= clients:
        raise SettingsError(
            f"server.byzantine = {server.byzantine}: {server.strategy} needs more than "
            f"{2 * server.byzantine + 2} clients per round, there are {clients}"
        )
    if "buffer" in entry.options and server.buffer > clients:
        raise SettingsError(
            f"server.buffer = {server.buffer} must not exceed the {clients} clients that work at a time "
            "(server.clients-per-round)"
        )
