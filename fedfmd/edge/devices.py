"""Device profiles and links as data: the built-in tables and the files that users add to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import ErrorDetails

from fedfmd.conv import CONVS
from fedfmd.errors import not_one_of

MAX_JITTER = 2.0
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(strict=True, gt=0, le=1)]
Jitter = Annotated[float, Field(strict=True, ge=0, le=MAX_JITTER)]
Figure = Literal["train_gflops", "infer_gflops", "memory_gb", "power_w"]
_STRICT = ConfigDict(extra="forbid")


def _known_conv(name: str) -> str:
    if name not in CONVS:
        raise ValueError(not_one_of(name, CONVS))
    return name


Conv = Annotated[str, AfterValidator(_known_conv)]


@checked_dataclass(frozen=True, config=_STRICT)
class Device:
    """A kind of edge device.

    Attributes:
        name: what a fleet calls it.
        train_gflops: sustained float32 rate in training, 1e9 FLOP/s (1 MAC = 2 FLOPs).
        infer_gflops: sustained float32 rate in inference, 1e9 FLOP/s.
        memory_gb: memory, 1e9 bytes.
        power_w: power of the whole device under load, watts.
        source: where the figures come from.
        estimate: the figures that are estimates, not measurements.
        efficiency: factors on both rates for models of these convs; 1 for all others.
        availability: probability that the device is there in a round.
        jitter: standard deviation of the logarithm of its speed from round to round; the median is 1.
    """

    name: str
    train_gflops: Positive
    infer_gflops: Positive
    memory_gb: Positive
    power_w: Positive
    source: str
    estimate: tuple[Figure, ...] = ()
    efficiency: Mapping[Conv, Positive] = field(default_factory=dict, hash=False)
    availability: Probability = 1.0
    jitter: Jitter = 0.0

    def running(self, conv: str) -> Device:
        """The device with the rates that it reaches on models of this conv."""
        factor = self.efficiency.get(conv, 1.0)
        return replace(
            self,
            train_gflops=self.train_gflops * factor,
            infer_gflops=self.infer_gflops * factor,
            efficiency={},
        )


@dataclass(frozen=True)
class Bandwidth:
    """One client's rates, in bits per second."""

    down_bps: float
    up_bps: float


def _spread(value: object) -> object:
    """One number is a distribution that holds nothing else."""
    return [value] * 3 if isinstance(value, int | float) else value


def _ordered(quantiles: tuple[float, float, float]) -> tuple[float, float, float]:
    if list(quantiles) != sorted(quantiles):
        raise ValueError("minimum, median and maximum must not fall")
    return quantiles


Quantiles = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(_spread), AfterValidator(_ordered)]


@checked_dataclass(frozen=True, config=_STRICT)
class Link:
    """How fast a population of clients is connected.

    Attributes:
        name: what the settings call it.
        down_mbps: (minimum, median, maximum) over the clients in Mbit/s; one number stands for all three.
        up_mbps: the same for the upload.
        source: where the figures come from.
    """

    name: str
    down_mbps: Quantiles
    up_mbps: Quantiles
    source: str

    def sample(self, u: float) -> Bandwidth:
        """The rates at quantile `u` in [0, 1], for both directions: who has a good link has it both ways.

        The quantile function is log-linear between the minimum, the median and the maximum.
        """
        return Bandwidth(1e6 * _quantile(self.down_mbps, u), 1e6 * _quantile(self.up_mbps, u))


def _quantile(quantiles: tuple[float, float, float], u: float) -> float:
    minimum, median, maximum = quantiles
    if u < 0.5:
        return minimum * (median / minimum) ** (2 * u)
    return median * (maximum / median) ** (2 * u - 1)


Row = TypeVar("Row", Device, Link)


def _load(path: Path, row_type: type[Row]) -> dict[str, Row]:
    """The rows of a YAML file by name; anything wrong is a ValueError that names file, row and key."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path}: must hold one row per name, `name: {{key: value, …}}`, not {table!r}")
    return {str(name): _row(path, str(name), row, row_type) for name, row in table.items()}


def _row(path: Path, name: str, row: object, row_type: type[Row]) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{path}: row {name!r} must be `key: value` pairs, not {row!r}")
    try:
        return TypeAdapter(row_type).validate_python({**row, "name": name})
    except ValidationError as error:
        keys = ", ".join(field.name for field in fields(row_type) if field.name != "name")
        faults = "; ".join(map(_fault, error.errors()))
        raise ValueError(f"{path}: row {name!r}, {faults} (keys of a row: {keys})") from error


def _fault(error: ErrorDetails) -> str:
    got = "" if error["type"] == "missing" else f", got {error['input']!r}"
    return f"key {error['loc'][0]!r}: {error['msg']}{got}"


_HERE = Path(__file__).parent
DEVICES: dict[str, Device] = _load(_HERE / "devices.yaml", Device)
LINKS: dict[str, Link] = _load(_HERE / "links.yaml", Link)


def load_devices(path: Path | str | None = None) -> dict[str, Device]:
    """The built-in devices, with the rows of the file `path` added; a row of a known name replaces it.

    Raises:
        ValueError: the file cannot be read, or a row lacks a key, has an unknown one or a value that is no
            positive number; the text names file, row and key.
    """
    return DEVICES | (_load(Path(path), Device) if path else {})
