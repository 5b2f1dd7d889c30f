"""What a client's update is rounded to for its upload, and how nothing of it is lost for good.

Parameters travel as differences to those that the client received, in fp16, or in int8 with one scale per
array. What rounding leaves over, the client adds to its next update: error feedback (Seide et al., Interspeech
2014; Karimireddy et al., ICML 2019, arXiv:1901.09847). Buffers travel as they are: they are few, counters must
stay integers, and a rounded running variance could become negative.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

Received = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Rounding:
    """A smaller type for floats: x ≈ scale · values; `encode` gives values and scale.

    A number has the type `dtype` on the wire, an array needs `array_bytes` more for its scale, which is 1 and not
    sent if that is 0.
    """

    encode: Callable[[Tensor], tuple[Tensor, float]]
    dtype: np.dtype
    array_bytes: int


def _to_fp16(x: Tensor) -> tuple[Tensor, float]:
    largest = torch.finfo(torch.float16).max
    return x.clamp(-largest, largest).half(), 1.0


def _to_int8(x: Tensor) -> tuple[Tensor, float]:
    """Symmetric: the largest value becomes ±127; clamped, as a scale among the smallest floats is rounded down."""
    scale = float(x.abs().amax() / 127) or 1.0
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale


ROUNDINGS = {
    "fp16": Rounding(_to_fp16, np.dtype(np.float16), 0),
    "int8": Rounding(_to_int8, np.dtype(np.int8), 8),
}
UPLOADS = ("fp32", *ROUNDINGS)

Scale = Annotated[float, Field(strict=True, gt=0, le=float(np.finfo(np.float16).max) / 127)]
"""Of an int8 array, which can say no more than one in fp16 could."""


@dataclass(frozen=True)
class Upload:
    """Arrays as they travel: a small type tells a rounded difference; `scales` holds those of int8 arrays."""

    arrays: Mapping[str, Tensor | np.ndarray]
    scales: Mapping[str, float] = field(default_factory=dict)

    def restored(self, received: Received) -> dict[str, Tensor]:
        """Return the client's state: rounded differences added to what it had received, in the type of that.

        Raises:
            ValueError: an array has another type than it can have, or an int8 array no scale.
        """
        restored = {}
        for name, array in self.arrays.items():
            values, start = torch.as_tensor(array), torch.as_tensor(received[name])
            if values.dtype == start.dtype:
                restored[name] = values
            elif values.dtype == torch.float16 or (values.dtype == torch.int8 and name in self.scales):
                restored[name] = start.to(values.device) + _decode(values, self.scales.get(name, 1.0))
            else:
                raise ValueError(f"array {name} of type {values.dtype} can't be added to {start.dtype}")
        return restored


def round_update(
    update: Mapping[str, Tensor],
    received: Received,
    residual: Mapping[str, Tensor],
    upload: str,
    parameters: Collection[str],
) -> tuple[Upload, dict[str, Tensor]]:
    """Round the way from `received` to `update`, and what earlier roundings left over of it.

    Args:
        update: the client's arrays; it may lack frozen kernels, whose residuals stay as they are.
        received: the arrays that it started from.
        residual: what its earlier roundings left over, by name; nothing at first.
        upload: one of `ROUNDINGS`.
        parameters: names of the arrays to round.

    Returns:
        what is sent, and the residual for the next time.
    """
    encode = ROUNDINGS[upload].encode
    sent: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    left = dict(residual)
    for name, tensor in update.items():
        if name not in parameters:
            sent[name] = tensor.clone()
            continue
        difference = tensor - torch.as_tensor(received[name], device=tensor.device)
        if name in residual:
            difference += residual[name].to(tensor.device)
        sent[name], scale = encode(difference)
        if ROUNDINGS[upload].array_bytes:
            scales[name] = scale
        left[name] = difference - _decode(sent[name], scale)
    return Upload(sent, scales), left


def upload_bytes(arrays: Mapping[str, np.ndarray], upload: str, parameters: Collection[str]) -> int:
    """Bytes of the values and scales if these arrays are sent."""
    if upload not in ROUNDINGS:
        return sum(array.nbytes for array in arrays.values())
    rounding = ROUNDINGS[upload]
    return sum(
        array.size * rounding.dtype.itemsize + rounding.array_bytes if name in parameters else array.nbytes
        for name, array in arrays.items()
    )


def _decode(values: Tensor, scale: float) -> Tensor:
    return values.float() * scale
