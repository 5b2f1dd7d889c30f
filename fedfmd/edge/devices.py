"""Device profiles and links as data: the built-in tables and the files that users add to them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
)
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import ErrorDetails

from fedfmd.conv import CONVS
from fedfmd.errors import not_one_of
from fedfmd.models import MODELS
from fedfmd.strict_yaml import load_yaml

MAX_JITTER = 2.0
LEAST, MOST = 1e-6, 1e9
"""Bounds of every rate, size, power and factor, so that no device can stretch virtual time without end."""


def _physical(value: float) -> float:
    if not LEAST <= value <= MOST:
        raise ValueError(f"no device has that; must be from {LEAST:g} to {MOST:g}")
    return value


Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), AfterValidator(_physical)]
NonNegative = Annotated[float, Field(strict=True, ge=0, le=MOST, allow_inf_nan=False)]
Probability = Annotated[float, Field(strict=True, gt=0, le=1)]
Jitter = Annotated[float, Field(strict=True, ge=0, le=MAX_JITTER)]
Figure = Literal["train_gflops", "infer_gflops", "memory_gb", "power_w", "efficiency"]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Scope:
    """What a figure is for: a conv, or a model `arch/conv`, with so many kernels per bank; None: with any number."""

    name: str
    kernels: int | None = None

    def __str__(self) -> str:
        return self.name if self.kernels is None else f"{self.name}/{self.kernels}"


def _scope(names: Collection[str]) -> BeforeValidator:
    """Read `name` or `name/K`, where the name is one of these."""

    def read(value: object) -> Scope:
        if isinstance(value, Scope):
            return value
        text = str(value)
        head, _, tail = text.rpartition("/")
        scope = Scope(head, int(tail)) if tail.isdecimal() else Scope(text)
        if scope.name not in names:
            raise ValueError(not_one_of(scope.name, names))
        if scope.kernels == 0:
            raise ValueError(f"{text!r} needs at least one kernel")
        return scope

    return BeforeValidator(read)


_MODELS = tuple(f"{arch}/{conv}" for arch in MODELS for conv in CONVS)
Conv = Annotated[Scope, _scope(tuple(CONVS)), PlainSerializer(str)]
Model = Annotated[Scope, _scope(_MODELS), PlainSerializer(str)]


@checked_dataclass(frozen=True, config=_STRICT)
class Factors:
    """Factors on a device's rates in training and in inference."""

    train: Positive
    infer: Positive


def _both(value: object) -> object:
    """One number is the factor on both rates."""
    return {"train": value, "infer": value} if isinstance(value, int | float) else value


@checked_dataclass(frozen=True, config=_STRICT)
class Speed:
    """How fast a device works on one model: FLOPs at a rate, and what time passes beside them.

    Attributes:
        train_gflops, infer_gflops: as `Device` has them.
        step_s: seconds of a local step whatever its batch, such as the optimiser's.
        round_s: seconds of a round whatever its steps, such as loading the model.
    """

    train_gflops: Positive
    infer_gflops: Positive
    step_s: NonNegative = 0.0
    round_s: NonNegative = 0.0


@dataclass(frozen=True)
class Bandwidth:
    """One client's rates, in bits per second."""

    down_bps: float
    up_bps: float


@checked_dataclass(frozen=True, config=_STRICT)
class Device:
    """A kind of edge device, or a single one.

    Attributes:
        name: what a fleet calls it.
        train_gflops: sustained float32 rate in training, 1e9 FLOP/s (1 MAC = 2 FLOPs).
        infer_gflops: sustained float32 rate in inference, 1e9 FLOP/s.
        memory_gb: memory, 1e9 bytes.
        power_w: power of the whole device under load, watts.
        source: where the figures come from.
        estimate: the figures that are estimates, not measurements.
        efficiency: factors on the rates for models of these convs, by `conv` or `conv/K`; 1 for all others.
        availability: probability that the device is there in a round.
        jitter: standard deviation of the logarithm of its speed from round to round; the median is 1.
        step_s, round_s: seconds of every local step and of every round, beside the FLOPs.
        models: the speed on single models, by `arch/conv` or `arch/conv/K`; it replaces the rates, factors and
            seconds above.
        down_mbps, up_mbps: its own link, 1e6 bit/s, in the place of the fleet's; None: the fleet's.
    """

    name: str
    train_gflops: Positive
    infer_gflops: Positive
    memory_gb: Positive
    power_w: Positive
    source: str
    estimate: tuple[Figure, ...] = ()
    efficiency: Mapping[Conv, Annotated[Factors, BeforeValidator(_both)]] = field(
        default_factory=dict, hash=False
    )
    availability: Probability = 1.0
    jitter: Jitter = 0.0
    step_s: NonNegative = 0.0
    round_s: NonNegative = 0.0
    models: Mapping[Model, Speed] = field(default_factory=dict, hash=False)
    down_mbps: Positive | None = None
    up_mbps: Positive | None = None

    def running(self, arch: str, conv: str, kernels: int) -> Device:
        """Return the device with the speed that it reaches on this model, with K kernels per bank.

        Of the figures for the model, or else of those for its conv, that for exactly K kernels counts; else the one
        for any number; else that for the nearest number, by ratio, and the larger of two as near.
        """
        factors = _nearest(self.efficiency, conv, kernels) or Factors(1, 1)
        speed = _nearest(self.models, f"{arch}/{conv}", kernels) or Speed(
            self.train_gflops * factors.train, self.infer_gflops * factors.infer, self.step_s, self.round_s
        )
        return replace(self, **asdict(speed), efficiency={}, models={})

    def bandwidth(self, fleet: Bandwidth) -> Bandwidth:
        """Return the rates of its own link, where it has one; those of the fleet's where not."""
        return Bandwidth(
            1e6 * self.down_mbps if self.down_mbps else fleet.down_bps,
            1e6 * self.up_mbps if self.up_mbps else fleet.up_bps,
        )


Value = TypeVar("Value", Factors, Speed)


def _nearest(figures: Mapping[Scope, Value], name: str, kernels: int) -> Value | None:
    """Return the figure that stands for this name and K, as `Device.running` has it; None if there is none."""
    measured = [scope.kernels for scope in figures if scope.name == name and scope.kernels]
    nearest = min(measured, key=lambda k: (max(k / kernels, kernels / k), -k), default=None)
    scopes = (Scope(name, kernels), Scope(name), Scope(name, nearest))
    return next((figures[scope] for scope in scopes if scope in figures), None)


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
        """Return the rates at quantile `u` in [0, 1], for both directions: who has a good link has it both ways.

        The quantile function is log-linear between the minimum, the median and the maximum.
        """
        return Bandwidth(1e6 * _quantile(self.down_mbps, u), 1e6 * _quantile(self.up_mbps, u))


def _quantile(quantiles: tuple[float, float, float], u: float) -> float:
    minimum, median, maximum = quantiles
    if u < 0.5:
        return minimum * math.pow(median / minimum, 2 * u)
    return median * math.pow(maximum / median, 2 * u - 1)


Row = TypeVar("Row", Device, Link)


def _load(path: Path, row_type: type[Row]) -> dict[str, Row]:
    """Read the rows of a YAML file by name; anything wrong is a ValueError that names file, row and key."""
    try:
        table = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return _rows(table, str(path), row_type)


def _rows(table: object, origin: str, row_type: type[Row]) -> dict[str, Row]:
    if not isinstance(table, dict):
        raise ValueError(f"{origin}: must hold one row per name, `name: {{key: value, …}}`, not {table!r}")
    return {str(name): _row(origin, str(name), row, row_type) for name, row in table.items()}


def _row(origin: str, name: str, row: object, row_type: type[Row]) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{origin}: row {name!r} must be `key: value` pairs, not {row!r}")
    try:
        return TypeAdapter(row_type).validate_python({**row, "name": name})
    except ValidationError as error:
        keys = ", ".join(field.name for field in fields(row_type) if field.name != "name")
        faults = "; ".join(map(_fault, error.errors()))
        raise ValueError(f"{origin}: row {name!r}, {faults} (keys of a row: {keys})") from error


def _fault(error: ErrorDetails) -> str:
    got = "" if error["type"] == "missing" else f", got {error['input']!r}"
    return f"key {error['loc'][0]!r}: {error['msg']}{got}"


def device_row(device: Device) -> dict[str, object]:
    """Return the device as a row of a YAML file, under its name: only what it says, no defaults."""
    row = TypeAdapter(Device).dump_python(device, mode="json", exclude_defaults=True)
    return {key: value for key, value in row.items() if key != "name"}


def device_text(device: Device) -> str:
    """Return the device as the text of a file that holds it alone; `parse_device` reads it."""
    return json.dumps({device.name: device_row(device)})


def parse_device(text: str, origin: str) -> Device:
    """Parse the device that `device_text` wrote, as a client sent it.

    That is JSON: YAML's aliases could stand for gigabytes.

    Raises:
        ValueError: the text holds none or several, or as `load_devices` does; the message names `origin`.
    """
    try:
        return _only(_rows(json.loads(text), origin, Device), origin)
    except json.JSONDecodeError as error:
        raise ValueError(f"{origin}: cannot be read: {error}") from error
    except RecursionError:
        raise ValueError(f"{origin}: cannot be read: it is nested too deeply") from None


def _only(devices: Mapping[str, Device], origin: str) -> Device:
    if len(devices) != 1:
        raise ValueError(f"{origin}: holds {len(devices)} devices, an edge device's own file must hold one")
    return next(iter(devices.values()))


_HERE = Path(__file__).parent
DEVICES: dict[str, Device] = _load(_HERE / "devices.yaml", Device)
LINKS: dict[str, Link] = _load(_HERE / "links.yaml", Link)


def load_devices(path: Path | str | None = None) -> dict[str, Device]:
    """Load the built-in devices, with the rows of the file `path` added; a row of a known name replaces it.

    Raises:
        ValueError: the file cannot be read, or a row lacks a key, has an unknown one or a value that is no
            positive number; the text names file, row and key.
    """
    return DEVICES | (read_devices(Path(path)) if path else {})


def read_devices(path: Path) -> dict[str, Device]:
    """Read the rows of a file by name.

    Raises:
        ValueError: as `load_devices` does.
    """
    return _load(path, Device)


def read_own_device(path: Path) -> Device:
    """Return the device in an edge device's own file, as `fedfmd calibrate` writes it.

    Raises:
        ValueError: as `load_devices` does, or the file has other than one row.
    """
    return _only(_load(path, Device), str(path))
