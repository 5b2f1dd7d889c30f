"""Weighted means of model states, in one pass and with memory for one state."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class WeightedMean:
    """Streaming weighted mean of named tensors; each keeps its dtype.

    Integer buffers (BatchNorm's counters) are averaged in float64 and rounded, so that they stay integers.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._mean: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Mapping[str, Tensor | np.ndarray], weight: float) -> None:
        """Add one state; `weight` > 0 is usually its number of images."""
        self._weight += weight
        for name, array in state.items():
            value = torch.as_tensor(array).detach()
            exact = value if value.is_floating_point() else value.double()
            if name in self._mean:
                self._mean[name].lerp_(exact, weight / self._weight)
            else:
                self._dtypes[name] = value.dtype
                self._mean[name] = exact.clone()

    def arrays(self) -> dict[str, np.ndarray] | None:
        """Return the mean; None if nothing was added."""
        if not self._mean:
            return None
        return {
            name: (mean if dtype.is_floating_point else mean.round()).to(dtype).numpy(force=True)
            for (name, mean), dtype in zip(self._mean.items(), self._dtypes.values(), strict=True)
        }
