"""Against broken or hostile clients: median, trimmed mean, and the updates that are nearest to each other.

Medians and trimmed means are of Yin et al. (ICML 2018, arXiv:1803.01498), Krum and Multi-Krum of Blanchard et al.
(NeurIPS 2017, arXiv:1703.02757). Buffers, such as running variances, are combined as the parameters are: by their
own medians and trimmed means, or from the clients that Krum's distances between parameters select.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
from flwr.serverapp import strategy as flower

from fedfmd.algorithms.algorithm import Algorithm, Update
from fedfmd.algorithms.flower import FlowerAlgorithm
from fedfmd.errors import SettingsError
from fedfmd.protocol.state import Arrays


class ByNumber(FlowerAlgorithm):
    """An algorithm that combines what the clients say number by number, whatever it stands for."""

    separate = True
    array_by_array = True

    def buffers(self, updates: Sequence[Update], current: Arrays) -> Arrays:
        """Combine them as the parameters; whole numbers stay so."""
        if not any(update.arrays for update in updates):
            return {}
        start = {name: array for name, array in current.items() if name in updates[0].arrays}
        combined, _ = self.step(self.init(), 0, start, updates)
        return {
            name: np.asarray(np.rint(array) if start[name].dtype.kind == "i" else array, start[name].dtype)
            for name, array in combined.items()
        }


class FedMedian(ByNumber, name="fedmedian"):
    """The median of each number."""

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedMedian."""
        return flower.FedMedian()


class FedTrimmedAvg(ByNumber, name="fedtrimmedavg"):
    """The mean of each number without the largest and smallest ``server.trim`` of them."""

    options = ("trim",)

    def strategy(self) -> flower.FedAvg:
        """Make Flower's FedTrimmedAvg."""
        return flower.FedTrimmedAvg(beta=self.settings.server.trim)


class Krum(Algorithm, name="krum"):
    """The update that is nearest to the others, where ``server.byzantine`` of them are bad."""

    options = ("byzantine",)
    separate = True

    def check(self) -> None:
        """Raise a SettingsError if there are too few clients to outvote the bad ones."""
        server, clients = self.settings.server, self.settings.clients_per_round
        least = 2 * server.byzantine + 2
        if clients <= least:
            raise SettingsError(
                f"server.byzantine = {server.byzantine}: {server.strategy} needs more than {least} clients per "
                f"round, there are {clients}"
            )

    def selected(self, updates: int) -> int:
        """How many of so many updates are taken."""
        del updates
        return 1

    def normalise(
        self, updates: Sequence[Update], current: Arrays, parameters: Collection[str]
    ) -> Sequence[Update]:
        """Return the selected updates, in their order; the mean of these is the step."""
        scores = krum_scores(squared_distances(updates, current, parameters), self.settings.server.byzantine)
        best = np.argsort(scores, kind="stable")[: self.selected(len(updates))]
        return [updates[place] for place in sorted(best.tolist())]


class MultiKrum(Krum, name="multikrum"):
    """The mean of all updates but the ``server.byzantine`` that are farthest from the others."""

    def selected(self, updates: int) -> int:
        """How many of so many updates are taken."""
        return max(1, updates - self.settings.server.byzantine)


def krum_scores(distances: np.ndarray, byzantine: int) -> np.ndarray:
    """Return each update's sum of the squared distances to its n − f − 2 nearest others, f being `byzantine`.

    `distances` is the n × n matrix of squared distances; at least one other counts.
    """
    count = len(distances)
    others = np.sort(distances + np.diag(np.full(count, math.inf)), axis=1)
    nearest = others[:, : min(max(1, count - byzantine - 2), max(count - 1, 0))]
    return np.asarray(nearest.sum(axis=1))


def squared_distances(updates: Sequence[Update], current: Arrays, parameters: Collection[str]) -> np.ndarray:
    """Return the matrix of squared L2 distances between the parameters after each update, in float64.

    What an update lacks is as in `current`.
    """
    total = np.zeros((len(updates), len(updates)))
    for name in sorted({name for update in updates for name in update.arrays} & set(parameters)):
        start = np.asarray(current[name], np.float64).reshape(-1)
        ways = np.stack(
            [
                np.asarray(u.arrays[name], np.float64).reshape(-1) - start if name in u.arrays else 0 * start
                for u in updates
            ]
        )
        for place, way in enumerate(ways):
            total[place] += np.square(ways - way).sum(axis=1)
    return total
