"""FedNova (Wang et al., NeurIPS 2020, arXiv:2007.07481): each update divided by its client's own steps.

Where clients do unequal work, FedAvg leans to those that do the most. How far steps go is known of SGD alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedfmd.algorithms.algorithm import Algorithm, LocalTraining, Update
from fedfmd.errors import SettingsError
from fedfmd.protocol.state import Arrays, parameter_names


class FedNova(Algorithm, name="fednova"):
    """Clients send w₀ + (w − w₀) / a, and the server goes the clients' mean a along the mean of these ways."""

    def check(self) -> None:
        """Raise a SettingsError unless clients train by SGD."""
        if (optimiser := self.settings.train.optimiser) != "sgd":
            raise SettingsError(
                f"server.strategy = fednova divides updates by how far SGD's steps go, and train.optimiser = "
                f"{optimiser!r} goes otherwise: set train.optimiser=sgd, or take another strategy"
            )

    def update(self, local: LocalTraining, trained: Mapping[str, Tensor], steps: int) -> Mapping[str, Tensor]:
        """Return w₀ + (w − w₀) / a for the parameters w; buffers as they are."""
        parameters, share = parameter_names(local.model), 1 / self._way(steps)
        return {
            name: torch.as_tensor(local.received[name], device=tensor.device).lerp(tensor, share)
            if name in parameters
            else tensor
            for name, tensor in trained.items()
        }

    def stretch(self, updates: Sequence[Update]) -> float:
        """Return the clients' mean a, by images."""
        done = [result for update in updates for result in update.results]
        return math.fsum(r.images * self._way(r.steps) for r in done) / sum(r.images for r in done)

    def normalise(
        self, updates: Sequence[Update], current: Arrays, parameters: Collection[str]
    ) -> Sequence[Update]:
        """Return updates as long as if every client had gone the mean way of all."""
        way = self.stretch(updates)
        return [scale(update, current, parameters, way) for update in updates]

    def _way(self, steps: int) -> float:
        train = self.settings.train
        return effective_steps(steps, train.momentum, train.nesterov)


def scale(update: Update, current: Arrays, parameters: Collection[str], factor: float) -> Update:
    """Multiply the way from the current parameters to those of an update by a factor; buffers stay."""
    longer = {
        name: np.asarray(current[name] + factor * (array - current[name]), array.dtype)
        for name, array in update.arrays.items()
        if name in parameters
    }
    return replace(update, arrays=update.arrays | longer)


def effective_steps(steps: int, momentum: float, nesterov: bool = False) -> float:
    """Return how many learning rates far `steps` of SGD go along one and the same gradient: the paper's ‖a‖₁.

    Without momentum that is the number of steps; with momentum ρ, (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ); Nesterov's
    looks one step ahead, hence ρ² for the first ρ.
    """
    lag = momentum**2 if nesterov else momentum
    return (steps - lag * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
