"""Weighted means of model states, in one pass and with memory for one state or two."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

MARGIN = 10
"""Bits that a value which a client sends may have more than the largest one of the array that it was sent, or 1."""

SUM_BITS = 55
"""Bits of an exact sum. What rounding it to float32's 24 bits leaves over fits into 32."""

Values = Mapping[str, Tensor | np.ndarray]


class WeightedMean:
    """Streaming weighted mean of named tensors; each keeps its dtype and has a weight of its own.

    Integer buffers (BatchNorm's counters) are averaged in float64 and rounded, so that they stay integers.
    """

    def __init__(self) -> None:
        self.weights: dict[str, float] = {}
        self._mean: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: Values, weight: float | Mapping[str, float]) -> None:
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


class ExactMean:
    """Streaming weighted mean that is the same bit for bit in whatever order, and whatever parts, it is taken.

    A value times its weight becomes a whole number of units, and whole numbers add up without error. The unit of an
    array follows from what all know who average parts of the same mean: the arrays that the clients started from, and
    how many images all clients have, which are the weights. Where all take part, that rounds values up to 1 by less
    than 1e-13, and always by less than float32 does. Values must not exceed `value_limit`. Means of integers are
    rounded.
    """

    def __init__(self, start: Values, images: int) -> None:
        self.weights: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._dtypes = {name: torch.as_tensor(array).dtype for name, array in start.items()}
        self._units = {
            name: 2.0 ** (SUM_BITS - images.bit_length()) / value_limit(array)
            if self._dtypes[name].is_floating_point
            else 1.0
            for name, array in start.items()
        }

    def add(
        self, state: Values, weight: float | Mapping[str, float], rest: Values = MappingProxyType({})
    ) -> None:
        """Add a client's arrays, or a mean of several clients' with its `rest`; either may lack arrays.

        `weight` > 0 is the number of images behind the arrays, for all of them or by name.
        """
        for name, array in state.items():
            own = weight[name] if isinstance(weight, Mapping) else weight
            value = torch.as_tensor(array).detach()
            units = self._in_units(name, value, own)
            if name in rest:
                units += torch.as_tensor(rest[name], device=units.device)
            self.weights[name] = self.weights.get(name, 0) + own
            self._sums[name] = self._sums[name].add_(units) if name in self._sums else units

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the mean of everything that was added."""
        return {name: mean.numpy(force=True) for name, mean in self._means()}

    def rest(self) -> dict[str, np.ndarray]:
        """Return what rounding the mean to its dtype leaves over of the sums, in units."""
        rests = {}
        for name, mean in self._means():
            left = self._sums[name] - self._in_units(name, mean, self.weights[name])
            rests[name] = (left.int() if mean.element_size() >= 4 else left).numpy(force=True)
        return rests

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        for name, total in self._sums.items():
            mean = total.double() / (self.weights[name] * self._units[name])
            dtype = self._dtypes[name]
            yield name, (mean if dtype.is_floating_point else mean.round()).to(dtype)

    def _in_units(self, name: str, value: Tensor, weight: float) -> Tensor:
        return value.to(torch.float64, copy=True).mul_(weight * self._units[name]).round_().long()


def first_beyond(state: Values, start: Values) -> str | None:
    """Return the name of the first array with a value beyond its `value_limit`."""
    for name, array in state.items():
        values = torch.as_tensor(array)
        if values.numel() and float(values.abs().max()) > value_limit(start[name]):
            return name
    return None


def value_limit(start: Tensor | np.ndarray) -> float:
    """Return how large the values may be, by the array that the clients started from: 2048 if none is beyond 1."""
    values = torch.as_tensor(start)
    largest = float(values.abs().max()) if values.numel() else 0.0
    return math.ldexp(1.0, math.frexp(max(1.0, largest))[1] + MARGIN)
