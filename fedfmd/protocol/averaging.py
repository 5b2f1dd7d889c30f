"""Weighted means of model states, in one pass and with memory for one state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class WeightedMean:
    """Streaming weighted mean of named tensors; each keeps its dtype and has a weight of its own.

    Integer buffers (BatchNorm's counters) are averaged in float64 and rounded, so that they stay integers.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._mean: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor | np.ndarray], weight: float | Mapping[str, float]) -> None:
        """Add one state, which may lack tensors: each is averaged over the states that have it.

        `weight` > 0 is usually the number of images behind the state, for all of it or by name.
        """
        for name, array in state.items():
            own = weight[name] if isinstance(weight, Mapping) else weight
            self.weights[name] = self.weights.get(name, 0) + own
            value = torch.as_tensor(array).detach()
            exact = value if value.is_floating_point() else value.double()
            if name in self._mean:
                self._mean[name].lerp_(exact, own / self.weights[name])
            else:
                self._dtypes[name] = value.dtype
                self._mean[name] = exact.clone()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the mean of everything that was added."""
        return {
            name: (mean if dtype.is_floating_point else mean.round()).to(dtype).numpy(force=True)
            for (name, mean), dtype in zip(self._mean.items(), self._dtypes.values(), strict=True)
        }
