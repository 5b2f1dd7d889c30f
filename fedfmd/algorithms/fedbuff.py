"""FedBuff (Nguyen et al., AISTATS 2022, arXiv:2106.06639): a step as soon as a buffer of updates is full.

Clients work all the time, each from the arrays of the moment it was asked. The older these are, the less an update
counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from flwr.serverapp import strategy as flower

from fedfmd.algorithms.algorithm import Update
from fedfmd.algorithms.flower import FlowerAlgorithm
from fedfmd.errors import SettingsError
from fedfmd.protocol.state import Arrays


class FedBuff(FlowerAlgorithm, name="fedbuff"):
    """An update that is s rounds behind counts (1 + s)^-``server.staleness``."""

    options = ("lr", "buffer", "staleness")
    separate = True
    array_by_array = True

    def check(self) -> None:
        """Raise a SettingsError if fewer clients work at a time than fill the buffer, or a setting can't be heeded."""
        settings, clients = self.settings, self.settings.clients_per_round
        if self.buffer > clients:
            raise SettingsError(
                f"server.buffer = {self.buffer} must not exceed the {clients} clients that work at a time "
                "(server.clients-per-round)"
            )
        if settings.budget.over_select > 1:
            raise SettingsError(
                f"budget.over-select = {settings.budget.over_select:g} has no effect with server.strategy = fedbuff, "
                "which replaces clients that are too late at once: set budget.over-select=1"
            )
        if settings.transport.upload != "fp32" and settings.server.checkpoint_every > 1:
            raise SettingsError(
                f"server.checkpoint-every = {settings.server.checkpoint_every}: with server.strategy = fedbuff and "
                f"transport.upload = {settings.transport.upload!r} a resumed run would lack what rounding left over: "
                "set server.checkpoint-every=1, or transport.upload=fp32"
            )

    @property
    def buffer(self) -> int:
        """Updates that make a step."""
        return self.settings.server.buffer

    def normalise(
        self, updates: Sequence[Update], current: Arrays, parameters: Collection[str]
    ) -> Sequence[Update]:
        """Return the updates as if they had begun at the current arrays, the older the shorter."""
        staleness = self.settings.server.staleness
        return [rebase(u, current, parameters, (1 + u.age) ** -staleness) for u in updates]

    def strategy(self) -> flower.FedAvg:
        """Make a step of SGD without momentum."""
        return flower.FedAvgM(server_learning_rate=self.settings.server.lr or 1.0, server_momentum=0.0)


def rebase(update: Update, current: Arrays, parameters: Collection[str], factor: float) -> Update:
    """Return what an update would be if it had begun at `current`, and were shorter by a factor.

    Buffers go that share of the way from the current ones to the client's: moved like parameters, a running
    variance could end below zero.
    """
    arrays = {}
    for name, array in update.arrays.items():
        origin = update.start[name] if name in parameters else current[name]
        moved = current[name] + factor * (np.asarray(array, np.float64) - origin)
        whole = np.issubdtype(array.dtype, np.integer)
        arrays[name] = np.asarray(np.rint(moved) if whole else moved, array.dtype)
    return replace(update, arrays=arrays)
