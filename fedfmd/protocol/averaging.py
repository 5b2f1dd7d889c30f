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

LEAST = 2.0 ** (MARGIN + 1)
"""The limit of values in arrays of which none was beyond 1."""

SUM_BITS = 55
"""Bits of an exact sum. What rounding it to float32's 24 bits leaves over fits into 32."""

COARSE, FINE = 2.0**10, 2.0**50
"""Units of the two sums that an array of at most one dimension has: wide enough for any value, and fine enough.

These are biases, norms and statistics: few values, of which a running variance may go from 1 to thousands in a round.
"""

LARGEST = 2.0**30
"""The largest value in such an array."""

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
            name: _units(torch.as_tensor(array), SUM_BITS - images.bit_length())
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
            narrow = len(self._units[name]) == 1 and mean.element_size() >= 4
            rests[name] = (left.int() if narrow else left).numpy(force=True)
        return rests

    def _means(self) -> Iterator[tuple[str, Tensor]]:
        for name, sums in self._sums.items():
            parts = [part.double() / unit for part, unit in zip(sums, self._units[name], strict=True)]
            mean = sum(parts[1:], parts[0]) / self.weights[name]
            dtype = self._dtypes[name]
            yield name, (mean if dtype.is_floating_point else mean.round()).to(dtype)

    def _in_units(self, name: str, value: Tensor, weight: float) -> Tensor:
        """Return value × weight as whole numbers of each unit, the coarse ones first."""
        left, units = value.double() * weight, self._units[name]
        whole = []
        for unit in units[:-1]:
            whole.append((left * unit).floor())
            left = left - whole[-1] / unit
        return torch.stack([*whole, (left * units[-1]).round()]).long()


def rest_shape(array: np.ndarray) -> tuple[int, ...]:
    """Return the shape of the `rest` of a mean of this array."""
    return (2 if _is_wide(array) else 1, *array.shape)


def first_beyond(state: Values, start: Values) -> str | None:
    """Return the name of the first array with a value beyond its `value_limit`."""
    for name, array in state.items():
        if is_beyond(_largest(torch.as_tensor(array)), start[name]):
            return name
    return None


def is_beyond(largest: float, start: Tensor | np.ndarray) -> bool:
    """Tell whether a value is beyond `value_limit`, which takes a look at all of `start` and is at least `LEAST`."""
    return largest > LEAST and largest > value_limit(start)


def value_limit(start: Tensor | np.ndarray) -> float:
    """Return how large the values may be, by the array that the clients started from.

    `LEAST`, 2048, if none of it is beyond 1; far more if it has at most one dimension.
    """
    values = torch.as_tensor(start)
    if _is_wide(values):
        return LARGEST
    return math.ldexp(1.0, math.frexp(max(1.0, _largest(values)))[1] + MARGIN)


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _units(start: Tensor, bits: int) -> tuple[float, ...]:
    """Return how many units make 1; a sum may have so many bits, apart from those of the weights."""
    if not start.is_floating_point():
        return (1.0,)
    return (COARSE, FINE) if _is_wide(start) else (2.0**bits / value_limit(start),)


def _is_wide(array: Tensor | np.ndarray) -> bool:
    """Tell whether an array has two sums for each value."""
    return array.ndim <= 1 and torch.as_tensor(array).is_floating_point()
