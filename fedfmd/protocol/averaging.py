"""Weighted means of model states, in one pass and with memory for one state or two."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from fedfmd.protocol.state import first_non_finite

MARGIN = 10
"""Bits that a value which a client sends may have more than the largest one of the array that it was sent, or 1."""

LEAST = 2.0 ** (MARGIN + 1)
"""The limit of values in arrays of which none was beyond 1."""

SUM_BITS = 53
"""Bits of an exact sum, which a float64 holds. What rounding it to float32's 24 bits leaves over fits into 32."""

COARSE, FINE = 2.0**10, 2.0**50
"""Units of the two sums that an array of at most one dimension has: wide enough for any value, and fine enough.

These are biases, norms and statistics: few values, of which a running variance may go from 1 to thousands in a round.
"""

LARGEST = 2.0**30
"""The largest value in such an array."""

SMALL = 2**16
"""Numbers in an array up to which it is looked at, and summed, together with others."""

CHUNK = 2**18
"""Numbers that are added up at a time: what they become on the way, 2 MB, stays in the processor's cache."""

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
    than 3e-13 for each client. Values must not exceed `value_limit`. Means of integers are rounded.
    """

    def __init__(self, start: Values, images: int) -> None:
        self.weights: dict[str, float] = {}
        bits = SUM_BITS - images.bit_length()
        self._packs = [_pack(arrays, bits) for arrays in _packs_of(start, partial(_units_of, bits=bits))]

    def add(
        self, state: Values, weight: float | Mapping[str, float], rest: Values = MappingProxyType({})
    ) -> None:
        """Add a client's arrays, or a mean of several clients' with its `rest`; either may lack arrays.

        `weight` > 0 is the number of images behind the arrays, for all of them or by name.
        """
        weights = weight if isinstance(weight, Mapping) else dict.fromkeys(state, weight)
        for name in state:
            self.weights[name] = self.weights.get(name, 0) + weights[name]
        for pack in self._packs:
            pack.add(state, weights, rest)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the mean of everything that was added."""
        return self._by_name(pack.means(self.weights) for pack in self._packs)

    def rest(self, arrays: Values) -> dict[str, np.ndarray]:
        """Return what rounding leaves over of the sums in units, `arrays` being the mean."""
        return self._by_name(pack.rests(arrays, self.weights) for pack in self._packs)

    def _by_name(self, found: Iterable[Mapping[str, Tensor]]) -> dict[str, np.ndarray]:
        tensors = {name: tensor for part in found for name, tensor in part.items()}
        return {name: tensors[name].numpy(force=True) for name in self.weights}


class _Pack(ABC):
    """The sums of arrays of one dtype, one after another in a vector.

    A network has a hundred small arrays, for which the calls take longer than the numbers.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self._shapes = {name: array.shape for name, array in start.items()}
        self._sizes = [array.numel() for array in start.values()]
        self._dtype = next(iter(start.values())).dtype
        self._sums: Tensor | None = None

    def add(self, state: Values, weights: Mapping[str, float], rest: Values) -> None:
        """Add those of the arrays that are there, each times its weight."""
        there = self._shapes.keys() & state.keys()
        if not there:
            return
        values = self._values(state)
        if self._sums is None:
            self._sums = self._nothing(values)
        self._add(self._sums, values, self._weights({name: weights[name] for name in there}))
        if left := {name: torch.as_tensor(rest[name], device=values.device) for name in there & rest.keys()}:
            self._add_units(self._sums, self._joined_rest(left))

    def means(self, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the means of the arrays that were added, by the weight behind each."""
        if self._sums is None:
            return {}
        # what nobody added is 0, whatever it is divided by
        return self._split(self._mean(self._sums, self._weights(weights, missing=1)), weights)

    def rests(self, means: Values, weights: Mapping[str, float]) -> dict[str, Tensor]:
        """Return what the means leave over of the sums."""
        if self._sums is None:
            return {}
        return self._split(self._rest(self._sums, self._values(means), self._weights(weights)), weights)

    @abstractmethod
    def _nothing(self, values: Tensor) -> Tensor:
        """Return the sums of so many values before any is added."""

    @abstractmethod
    def _add(self, sums: Tensor, values: Tensor, weights: Tensor) -> None:
        """Add values, each times its weight, or the one weight."""

    @abstractmethod
    def _add_units(self, sums: Tensor, units: Tensor) -> None:
        """Add whole numbers of units: units × values."""

    @abstractmethod
    def _mean(self, sums: Tensor, weights: Tensor) -> Tensor:
        """Return the sums by the weights, in the arrays' dtype."""

    @abstractmethod
    def _rest(self, sums: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
        """Return the sums less what gave the mean, in units: units × values."""

    def _weights(self, weights: Mapping[str, float], missing: float = 0) -> Tensor:
        """Return each array's weight as one for each value; a single one if they are all the same."""
        numbers = [weights.get(name, missing) for name in self._shapes]
        if len(set(numbers)) == 1:
            return torch.tensor(numbers[0], dtype=torch.float64)
        return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(torch.tensor(self._sizes))

    def _values(self, arrays: Values) -> Tensor:
        """Return the arrays one after another, zeros where one is missing; at least one is there."""
        return joined(
            self._whole({name: torch.as_tensor(arrays[name]) for name in self._shapes if name in arrays})
        )

    def _joined_rest(self, rest: Mapping[str, Tensor]) -> Tensor:
        """Return the rests one after another, zeros where one is missing: units × values."""
        (units,) = {array.shape[0] for array in rest.values()}
        return torch.cat([array.reshape(units, -1) for array in self._whole(rest, (units,))], dim=1)

    def _whole(self, arrays: Mapping[str, Tensor], leading: tuple[int, ...] = ()) -> list[Tensor]:
        """Return all arrays, zeros in the place of missing ones; they have these dimensions more."""
        one = next(iter(arrays.values()))
        return [
            arrays[name] if name in arrays else one.new_zeros((*leading, *shape))
            for name, shape in self._shapes.items()
        ]

    def _split(self, vector: Tensor, weights: Mapping[str, float]) -> dict[str, Tensor]:
        parts = vector.split(self._sizes, dim=-1)
        return {
            name: part.reshape((*part.shape[:-1], *shape))
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
            if name in weights
        }


class _Sums(_Pack):
    """Sums in units, as float64: whole numbers, so far from its limit that adding them makes no error.

    These are nearly all of a network's numbers. They are taken a chunk at a time, which memory is read once for.
    """

    def __init__(self, start: Mapping[str, Tensor], unit: float) -> None:
        super().__init__(start)
        self._unit = unit

    def _nothing(self, values: Tensor) -> Tensor:
        return torch.zeros_like(values, dtype=torch.float64)

    def _add(self, sums: Tensor, values: Tensor, weights: Tensor) -> None:
        chunk = torch.empty_like(sums[:CHUNK])
        factors = self._chunks((weights * self._unit).to(sums.device))
        for part, given, factor in zip(sums.split(CHUNK), values.split(CHUNK), factors, strict=True):
            part += chunk[: len(part)].copy_(given).mul_(factor).round_()

    def _add_units(self, sums: Tensor, units: Tensor) -> None:
        for part, given in zip(sums.split(CHUNK), units[0].split(CHUNK), strict=True):
            part += given.double()

    def _mean(self, sums: Tensor, weights: Tensor) -> Tensor:
        mean = torch.empty_like(sums, dtype=self._dtype)
        factors = self._chunks((weights * self._unit).to(sums.device))
        for part, summed, factor in zip(mean.split(CHUNK), sums.split(CHUNK), factors, strict=True):
            part.copy_(summed / factor)  # the unit is a power of 2: as exact as one division
        return mean

    def _rest(self, sums: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
        left = sums.clone()
        self._add(left, mean, -weights)
        return (left.int() if self._dtype.itemsize >= 4 else left.long())[None]

    def _chunks(self, numbers: Tensor) -> Sequence[Tensor]:
        """Return the numbers that belong to each chunk of the vector, or the one number."""
        return list(numbers.expand(sum(self._sizes)).split(CHUNK))


class _WideSums(_Pack):
    """Sums as int64, in as many units for each value as it takes: those of norms, biases and counters."""

    def __init__(self, start: Mapping[str, Tensor], units: Sequence[float]) -> None:
        super().__init__(start)
        self._units = units

    def _nothing(self, values: Tensor) -> Tensor:
        return torch.zeros(len(self._units), *values.shape, dtype=torch.long, device=values.device)

    def _add(self, sums: Tensor, values: Tensor, weights: Tensor) -> None:
        sums += self._in_units(values, weights)

    def _add_units(self, sums: Tensor, units: Tensor) -> None:
        sums += units

    def _mean(self, sums: Tensor, weights: Tensor) -> Tensor:
        parts = [part.double() / unit for part, unit in zip(sums, self._units, strict=True)]
        mean: Tensor = sum(parts[1:], parts[0]) / weights.to(parts[0].device)
        return (mean if self._dtype.is_floating_point else mean.round()).to(self._dtype)

    def _rest(self, sums: Tensor, mean: Tensor, weights: Tensor) -> Tensor:
        return sums - self._in_units(mean, weights)

    def _in_units(self, values: Tensor, weights: Tensor) -> Tensor:
        """Return value × weight as whole numbers of each unit, the coarse ones first: units × values."""
        left = values.double() * weights.to(values.device)
        *coarse, last = self._units
        whole = []
        for unit in coarse:
            whole.append((left * unit).floor())
            left = left - whole[-1] / unit
        return torch.stack([*whole, (left * last).round()]).long()


def _pack(start: Mapping[str, Tensor], bits: int) -> _Pack:
    """Return what sums these arrays, of one dtype and units, up; a sum may have so many bits, less those of weights."""
    one = next(iter(start.values()))
    units = _units_of(one, bits)
    return _WideSums(start, units) if _is_wide(one) or not one.is_floating_point() else _Sums(start, *units)


def _units_of(start: Tensor, bits: int) -> tuple[float, ...]:
    """Return how many units make 1, for each sum that an array has."""
    if not start.is_floating_point():
        return (1.0,)
    return (COARSE, FINE) if _is_wide(start) else (2.0**bits / value_limit(start),)


def _packs_of(arrays: Values, kind: Callable[[Tensor], object]) -> Iterable[dict[str, Tensor]]:
    """Return small arrays of one dtype and kind together, and large ones alone: joined, they are copied."""
    packs: dict[object, dict[str, Tensor]] = {}
    for name, array in arrays.items():
        tensor = torch.as_tensor(array)
        key = (tensor.dtype, kind(tensor)) if tensor.numel() <= SMALL else name
        packs.setdefault(key, {})[name] = tensor
    return packs.values()


def rest_shape(array: np.ndarray) -> tuple[int, ...]:
    """Return the shape of the `rest` of a mean of this array."""
    return (2 if _is_wide(array) else 1, *array.shape)


def fault_of(state: Values, start: Values) -> str:
    """Return what keeps a state out of a mean: values that are no numbers, or beyond `value_limit`; "" if nothing."""
    suspects = suspects_of(state)
    if broken := first_non_finite(suspects):
        return f"NaN or infinite values in {broken}"
    for name, array in suspects.items():
        if is_beyond(largest(array), start[name]):
            return f"values beyond {value_limit(start[name]):g} in {name}"
    return ""


def suspects_of(state: Values) -> dict[str, Tensor]:
    """Return the arrays that are to be looked at one by one: all others have numbers up to `LEAST`."""
    suspects: dict[str, Tensor] = {}
    for arrays in _packs_of(state, _is_wide):
        if not largest(joined(list(arrays.values()))) <= LEAST:  # NaN isn't
            suspects |= arrays
    return suspects


def is_beyond(value: float, start: Tensor | np.ndarray) -> bool:
    """Tell whether a value is beyond `value_limit`, which takes a look at all of `start` and is at least `LEAST`."""
    return value > LEAST and value > value_limit(start)


def value_limit(start: Tensor | np.ndarray) -> float:
    """Return how large the values may be, by the array that the clients started from.

    `LEAST`, 2048, if none of it is beyond 1; far more if it has at most one dimension.
    """
    values = torch.as_tensor(start)
    if _is_wide(values):
        return LARGEST
    return math.ldexp(1.0, math.frexp(max(1.0, largest(values)))[1] + MARGIN)


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of tensors of one dtype, one after another; in C++, as a network has a hundred small ones."""
    flat: Tensor = _flatten_dense_tensors(tensors)
    return flat.detach()


def largest(values: Tensor) -> float:
    """Return the largest absolute value, 0 if there is none; NaN if there is one."""
    if not values.numel():
        return 0.0
    least, most = values.aminmax()  # NaN is both
    return max(-float(least), float(most))  # masks and unsigned numbers can't be negated


def _is_wide(array: Tensor | np.ndarray) -> bool:
    """Tell whether an array has two sums for each value."""
    return array.ndim <= 1 and torch.as_tensor(array).is_floating_point()
