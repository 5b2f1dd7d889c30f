"""Flower's strategies, and those of users that derive from them, as the server's half of an algorithm.

Which clients train, and what they do, fedfmd's plans say. Of a strategy's hooks, `configure_train` is called to tell it
the parameters that a step starts from, with no node to ask, and `aggregate_train` to make the step. The server itself
evaluates the model, so that the hooks of evaluation have nothing to do.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar, cast

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedfmd.algorithms.algorithm import Algorithm, Update, mean
from fedfmd.algorithms.tree import Leaves, flatten, unflatten
from fedfmd.errors import RunError, SettingsError
from fedfmd.flower_compat import kept_between_rounds, start_step
from fedfmd.own_code import find, running
from fedfmd.protocol.messages import METRICS, from_record, to_record
from fedfmd.protocol.state import Arrays, check_layout

logger = logging.getLogger("fedfmd")

NEEDED = ("fraction_train", "arrayrecord_key", "weighted_by_key")
"""What Flower's FedAvg notes when it is made, and a step needs."""


@dataclass(frozen=True)
class Running:
    """A strategy at work, and what its attributes were when it was made."""

    strategy: FedAvg
    made: dict[str, Leaves]


class FlowerAlgorithm(Algorithm):
    """An algorithm whose step is that of a Flower strategy.

    Attributes:
        array_by_array: the step makes of each array what it would make of it alone, and keeps nothing for the next one.
    """

    array_by_array: ClassVar[bool] = False

    def strategy(self) -> FedAvg:
        """Make the strategy."""
        raise NotImplementedError

    def init(self) -> Running:
        """Return the strategy as it is when made."""
        strategy = self.strategy()
        return Running(strategy, deepcopy(_attributes(strategy)))

    def step(
        self, state: Running, server_round: int, current: Arrays, updates: Sequence[Update]
    ) -> tuple[Arrays, Running]:
        """Let the strategy aggregate all updates, or their mean.

        It makes a step for all arrays that the same clients trained, if it treats each array on its own; else what a
        client did not train has its current values. If it returns no arrays, the current ones stay.

        Raises:
            RunError: it raises something, or returns what is no next model; the text says where.
        """
        if not self.separate:
            results = tuple(result for update in updates for result in update.results)
            updates = [replace(updates[0], arrays=mean(updates), results=results)]
        if not self.array_by_array:
            return self._step(state, server_round, current, updates), state
        stepped = dict(current)
        for trained, group in by_trainers(updates):
            stepped |= self._step(state, server_round, {name: current[name] for name in trained}, group)
        return stepped, state

    def _step(self, state: Running, server_round: int, current: Arrays, updates: Sequence[Update]) -> Arrays:
        replies = [_reply(state.strategy, update, current) for update in updates]
        name = f"round {server_round}: server.strategy = {self.settings.server.strategy!r}"
        with running(f"{name}: configure_train fails", RunError, type(state.strategy)):
            start_step(state.strategy, server_round, to_record(current), cast("Grid", _NoNodes()))
        with running(f"{name}: aggregate_train fails", RunError, type(state.strategy)):
            answer = state.strategy.aggregate_train(server_round, replies)
        try:
            arrays = _arrays(answer, current)
        except ValueError as error:
            raise RunError(
                f"{name}: aggregate_train must return an ArrayRecord like the one in each reply, or None, and a "
                f"MetricRecord or None: {error}; finished rounds are kept"
            ) from None
        if arrays is None:
            logger.warning("%s makes no step, the model stays as it was", name)
        return current if arrays is None else arrays

    def dump(self, state: Running) -> Leaves:
        """Return the attributes that have changed since the strategy was made."""
        attributes = _attributes(state.strategy)
        changed = {k: v for k, v in attributes.items() if not _same(v, state.made.get(k))}
        return {path: leaf for leaves in changed.values() for path, leaf in leaves.items()}

    def restore(self, leaves: Leaves) -> Running:
        """Return a strategy that has these attributes again."""
        state = self.init()
        vars(state.strategy).update(unflatten(leaves))
        return state


class OwnStrategy(FlowerAlgorithm):
    """A user's ``module:Class``, which derives from Flower's `FedAvg` and gets every client's update on its own.

    Clients, who train as FedAvg's do, need not have it.
    """

    separate = True

    def check(self) -> None:
        """Raise a SettingsError unless there is such a class, which can be made without arguments."""
        self.strategy()

    def strategy(self) -> FedAvg:
        """Make the user's strategy.

        Raises:
            SettingsError: there is no such class, or it can't be made.
        """
        name = f"server.strategy = {self.settings.server.strategy!r}"
        with running(f"{name} can't be made without arguments", SettingsError, self._kind):
            strategy = self._kind()
        if missing := [option for option in NEEDED if not hasattr(strategy, option)]:
            raise SettingsError(f"{name} has no {missing[0]}: let its __init__ call super().__init__()")
        return strategy

    @cached_property
    def _kind(self) -> type[FedAvg]:
        name = self.settings.server.strategy
        kind = find("server.strategy", name)
        if not (inspect.isclass(kind) and issubclass(kind, FedAvg)):
            raise SettingsError(
                f"server.strategy = {name!r} must be a class that derives from Flower's FedAvg"
            )
        return kind


def by_trainers(updates: Sequence[Update]) -> Iterator[tuple[list[str], list[Update]]]:
    """Yield the names of arrays that the same clients trained, with the updates of these, which hold nothing else."""
    together: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(name for update in updates for name in update.arrays):
        places = tuple(place for place, update in enumerate(updates) if name in update.arrays)
        together.setdefault(places, []).append(name)
    for places, names in together.items():
        yield names, [updates[place].part(names) for place in places]


class _NoNodes:
    """Stands for the grid, of which a strategy is to ask nothing."""

    def __getattr__(self, name: str) -> Any:
        raise RunError(
            f"the strategy's configure_train uses the grid ({name}), and fedfmd's plans pick the clients: let it call "
            "that of Flower's FedAvg, which picks none here"
        )


def _reply(strategy: FedAvg, update: Update, current: Arrays) -> Message:
    """Return the update as a node's reply, under the names that the strategy looks for."""
    content = RecordDict(
        {
            strategy.arrayrecord_key: to_record(current | update.arrays),
            METRICS: MetricRecord({strategy.weighted_by_key: update.images}),
        }
    )
    return Message(content, reply_to=Message(RecordDict(), update.node, MessageType.TRAIN))


def _arrays(answer: object, current: Arrays) -> Arrays | None:
    """Return the arrays of what `aggregate_train` returned, None if it made no step.

    Raises:
        ValueError: it is something else, or the arrays don't have the names and shapes of the current ones.
    """
    if not (isinstance(answer, tuple) and len(answer) == 2):
        raise ValueError(f"what it returned is {_kind_of(answer)}")
    record, _ = answer
    if record is None:
        return None
    if not isinstance(record, ArrayRecord):
        raise ValueError(f"the first of what it returned is {_kind_of(record)}")
    arrays = from_record(record)
    check_layout(arrays, {name: array.shape for name, array in current.items()})
    return arrays


def _kind_of(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"


def _attributes(strategy: FedAvg) -> dict[str, Leaves]:
    """Return the leaves of each attribute that a checkpoint can keep."""
    attributes: dict[str, Leaves] = {}
    for name, value in kept_between_rounds(strategy).items():
        if callable(value):
            continue
        try:
            attributes[name] = flatten(value, name)
        except TypeError as error:
            _warn(type(strategy).__name__, name, str(error))
        except RecursionError:
            _warn(type(strategy).__name__, name, "what holds itself or is nested too deeply")
    return attributes


@lru_cache
def _warn(kind: str, attribute: str, what: str) -> None:
    """Say it once."""
    logger.warning("%s.%s is no part of the checkpoints, which can't keep %s", kind, attribute, what)


def _same(leaves: Leaves, others: Leaves | None) -> bool:
    return (
        others is not None
        and leaves.keys() == others.keys()
        and all(np.array_equal(leaf, others[path]) for path, leaf in leaves.items())
    )
