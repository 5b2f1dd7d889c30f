"""What an algorithm is: how its clients train, how their updates combine, and the server's step.

The defaults are FedAvg's, so that an algorithm says only where it departs from it, in one file: a class with a name,
which is what ``server.strategy`` calls it. Clients and server each make their own object of it, from the settings.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from fedfmd.algorithms.tree import Leaves, flatten, unflatten
from fedfmd.protocol.averaging import WeightedMean
from fedfmd.protocol.messages import ClientResult
from fedfmd.protocol.state import Arrays
from fedfmd.settings import Settings

ALGORITHMS: dict[str, type[Algorithm]] = {}
"""All algorithms that have a name."""


@dataclass(frozen=True)
class LocalTraining:
    """A client's training in a round.

    Attributes:
        model: holds the global arrays before, and the client's after it.
        received: the global arrays, by their names on the wire.
        own: what the client kept of its last round; nothing in its first.
    """

    model: nn.Module
    received: Arrays
    own: Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What a round brought: a client's arrays after training, or the mean of all clients'.

    Attributes:
        arrays: by their names on the wire; those that nobody trained are missing.
        weights: images behind each array.
        results: what each of the clients did, which all succeeded.
        start: the arrays that they began with.
        age: how many rounds ago these were the current ones.
        node: Flower's id of the node that the one client is on.
    """

    arrays: Arrays
    weights: Mapping[str, float]
    results: tuple[ClientResult, ...]
    start: Arrays
    age: int = 0
    node: int = 0

    @property
    def images(self) -> int:
        """Images of its clients."""
        return sum(result.images for result in self.results)

    def part(self, names: Collection[str]) -> Update:
        """Return the update with the arrays of these names alone."""
        return replace(self, arrays={name: array for name, array in self.arrays.items() if name in names})


@dataclass(frozen=True)
class Algorithm:
    """FedAvg, and what others change of it.

    Attributes:
        options: the settings of `server` that it reads, of those that only some algorithms read.
        separate: its server needs every client's update on its own, in the order of their numbers, not their mean.
        only_mean: its server needs nothing of the clients but their mean, in which all may count alike: what
            differential privacy leaves of them.
    """

    settings: Settings
    options: ClassVar[tuple[str, ...]] = ()
    separate: ClassVar[bool] = False
    only_mean: ClassVar[bool] = False

    def __init_subclass__(cls, name: str = "") -> None:
        if name:
            ALGORITHMS[name] = cls

    def check(self) -> None:
        """Check on the server, before anything starts, that it can be used with these settings.

        Raises:
            SettingsError: it can't.
        """

    @property
    def buffer(self) -> int:
        """Updates that make a step as soon as they are there; 0: a round waits for all that it asked for."""
        return 0

    def private(self, model: nn.Module) -> Collection[str]:
        """Return the names on the wire of the arrays that stay on the clients, none of them a kernel of a bank."""
        del model
        return ()

    def training(self, local: LocalTraining) -> AbstractContextManager[None]:
        """Prepare the model, which has the global arrays, for training; take down afterwards what must not stay."""
        del local
        return nullcontext()

    def update(self, local: LocalTraining, trained: Mapping[str, Tensor], steps: int) -> Mapping[str, Tensor]:
        """Return what the client sends of what it `trained` in so many steps; the tensors are the model's own."""
        del local, steps
        return trained

    def keep(self, local: LocalTraining) -> Mapping[str, Tensor]:
        """Return what stays on the client after training, for its next round."""
        del local
        return {}

    def stretch(self, updates: Sequence[Update]) -> float:
        """Return how many times longer than what the clients sent `normalise` makes their updates."""
        del updates
        return 1.0

    def normalise(
        self, updates: Sequence[Update], current: Arrays, parameters: Collection[str]
    ) -> Sequence[Update]:
        """Return the updates as updates of the current arrays, so that they can be averaged."""
        del current, parameters
        return updates

    def buffers(self, updates: Sequence[Update], current: Arrays) -> Arrays:
        """Return the next buffers, such as running variances, of normalised updates that hold nothing else."""
        del current
        return mean(updates)

    def init(self) -> Any:
        """Return the server's state before the first round: nested dicts and lists of arrays and plain values."""
        return {}

    def step(
        self, state: Any, server_round: int, current: Arrays, updates: Sequence[Update]
    ) -> tuple[Arrays, Any]:
        """Return the next parameters and state.

        `current` holds all parameters, `updates` those that were trained; what it returns of others is not used.
        `buffers` combines what is no parameter.
        """
        del server_round, current
        return mean(updates), state

    def dump(self, state: Any) -> Leaves:
        """Return what a checkpoint keeps of the state."""
        return flatten(state)

    def restore(self, leaves: Leaves) -> Any:
        """Return the state of which `dump` kept this."""
        return unflatten(leaves)


def mean(updates: Iterable[Update]) -> Arrays:
    """Return each array's mean over the clients that trained it, by their images."""
    weighted = WeightedMean()
    for update in updates:
        weighted.add(update.arrays, update.weights)
    return weighted.arrays()
