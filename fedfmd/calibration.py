"""Measures this machine with a client's own code: the device profile that fleets and SuperNodes take.

The seconds of a client's round are modelled as ``round_s + steps · step_s + FLOPs / rate``. Rounds of one step and
of several, on single images and on batches, tell the three parts apart. The first is loading and packing the model,
the second what a step needs whatever its batch, above all the optimiser on the many parameters of a bank.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import product
from math import log
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from torch import nn

from fedfmd.build import torch_device
from fedfmd.client.host import Host
from fedfmd.client.round import run_assignments
from fedfmd.cost import Cost, count, latency
from fedfmd.data import Dataset, ImageSet
from fedfmd.edge import DEVICES, Device, Factors, Figure, Scope, Speed, device_row, read_devices
from fedfmd.errors import RunError, SettingsError
from fedfmd.memory import keep_freed
from fedfmd.protocol.messages import Assignment, Instruction
from fedfmd.protocol.state import Arrays, pack
from fedfmd.runs import atomic_write
from fedfmd.runs.folder import environment
from fedfmd.settings import Settings

BASE = "static"
"""The operator whose rates are the device's; `efficiency` holds the others' relative to it."""

ROUND_S = 1.0
"""Seconds, about, that a round of several steps lasts, within these numbers of steps."""
FEWEST_STEPS, MOST_STEPS = 3, 30
GLANCES = 9  # turns of inference, which is short and thus noisy

FASTEST_GFLOPS = 1e6
LEARNING_RATE = 1e-3  # random labels teach nothing: all that matters is that the weights stay finite


@dataclass(frozen=True)
class Round:
    """A client's round, as it was measured."""

    steps: int
    batch_size: int
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Seconds per image of a model: in a round of local training, and in inference; `kernels` is 1 without banks."""

    arch: str
    conv: str
    kernels: int
    batch_size: int
    train_s: float
    infer_s: float


@dataclass(frozen=True)
class Measurement:
    """What a model was measured to need, in order of the batch sizes, and the speed that predicts it.

    `factors` are its rates relative to those of the static network, which took turns with it: in steps of the
    largest batch, what a round needs beside them aside, and in inference of one image.
    """

    timings: tuple[Timing, ...]
    cost: Cost
    speed: Speed
    factors: Factors

    @property
    def arch(self) -> str:
        """The network's name."""
        return self.timings[0].arch

    @property
    def conv(self) -> str:
        """The operator's name."""
        return self.timings[0].conv

    @property
    def scope(self) -> Scope:
        """The operator, and its kernels where it has banks: what the factors are for."""
        return Scope(self.conv, None if self.conv == BASE else self.timings[0].kernels)

    @property
    def train_gflops(self) -> float:
        """The whole rate in training with the largest batch: fixed seconds included."""
        return self.cost.train_flops / self.timings[-1].train_s / 1e9


def models_of(
    archs: Iterable[str], convs: Iterable[str], kernels: Iterable[int], common: Mapping[str, Any]
) -> list[Settings]:
    """Return the settings of every network to measure, static ones included; `common` are those of all, by dotted key.

    Raises:
        SettingsError: an unknown name, or another setting that can't be used.
    """
    counts = tuple(dict.fromkeys(kernels))
    return [
        Settings.from_mapping({"model.arch": arch, "model.conv": conv, "model.kernels": count, **common})
        for arch, conv in product(dict.fromkeys(archs), dict.fromkeys((BASE, *convs)))
        for count in (counts[:1] if conv == BASE else counts)
    ]


def measure(
    settings: Settings, classes: int, image_size: int, batch_sizes: Iterable[int], repeats: int = 5
) -> Measurement:
    """Train and run the settings' network on random images, alone and in these batches.

    Training is a client's round as the server asks for it, augmentation and optimiser included. Every time is the
    median over `repeats` rounds after a warm-up; rounds of all kinds, and of the static network beside it, take
    turns, so that a slow moment of the machine meets all of them.

    Raises:
        RunError: a round fails; the text names the network and the batch.
    """
    keep_freed()  # as a client does
    model, sizes = settings.model, sorted({1, *batch_sizes})
    networks = [settings]
    if model.conv != BASE:
        networks.append(Settings.from_mapping(settings.flat() | {"model.conv": BASE}))
    with ExitStack() as stack:
        own, *others = (
            stack.enter_context(_bench(network, classes, image_size, MOST_STEPS * sizes[-1]))
            for network in networks
        )
        kinds = _kinds(own, sizes)
        for base in others:
            base.train(*kinds[-1])  # to warm up
        jobs = [(bench, kind) for bench in (own, *others) for kind in (kinds if bench is own else kinds[-2:])]
        trained = [[bench.train(*kind) for bench, kind in jobs] for _ in range(repeats)]
        infer_s = {size: latency(own.model, image_size, batch=size, repeats=repeats) for size in sizes}
        inferred = [
            [latency(bench.model, image_size, repeats=repeats) for bench in (own, *others)]
            for _ in range(GLANCES)
        ]
    seconds = list(map(median, zip(*trained, strict=True)))
    rounds = [Round(*kind, taken) for kind, taken in zip(kinds, seconds[: len(kinds)], strict=True)]
    cost = own.cost
    speed = fit_speed(rounds, cost, infer_gflops=cost.flops / infer_s[1] / 1e9)
    long = {r.batch_size: r.seconds / (r.steps * r.batch_size) for r in rounds if r.steps > 1}
    timings = tuple(
        Timing(model.arch, model.conv, cost.kernels, size, long[size], infer_s[size]) for size in sizes
    )
    factors = Factors(1, 1)
    for base in others:
        factors = Factors(
            cost.train_flops / base.cost.train_flops * _speed_up(map(_steps_alone, trained)),
            cost.flops / base.cost.flops * _speed_up(inferred),
        )
    return Measurement(timings, cost, speed, factors)


def fit_speed(rounds: Sequence[Round], cost: Cost, infer_gflops: float) -> Speed:
    """Fit the speed with the least squares of relative errors over these rounds; no part of it is negative.

    Where a batch needs no longer than an image (a GPU that waits for its next kernel) the rate is `FASTEST_GFLOPS`.
    """
    seconds = np.array([r.seconds for r in rounds])
    gflops = cost.train_flops / 1e9
    terms = np.array([(1, r.steps, r.steps * r.batch_size * gflops) for r in rounds])
    lowest = np.array([0, 0, 1 / FASTEST_GFLOPS])
    fit = _least_squares(terms / seconds[:, None], np.ones(len(rounds)), lowest)
    round_s, step_s, s_per_gflop = fit.tolist()
    return Speed(1 / s_per_gflop, infer_gflops, step_s, round_s)


def _least_squares(a: np.ndarray, b: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """Return the x ≥ `lowest` with the least ‖ax − b‖, for a few unknowns: each is tried free and at its bound."""
    found = []
    for choice in itertools.product((True, False), repeat=len(lowest)):
        free, x = np.array(choice), lowest.copy()
        x[free] = np.linalg.lstsq(a[:, free], b - a[:, ~free] @ lowest[~free])[0]
        if (x >= lowest).all():
            found.append(x)
    return min(found, key=lambda x: float(np.linalg.norm(a @ x - b)))


def make_device(
    name: str,
    measured: Sequence[Measurement],
    source: str,
    *,
    memory_gb: float,
    power_w: float | None = None,
    down_mbps: float | None = None,
    up_mbps: float | None = None,
) -> Device:
    """Return the profile that follows from the measurements: each network's speed, and what it tells of other networks.

    For these, rates are geometric means over the architectures: of the static networks, and of what the other
    operators, with so many kernels, reach relative to them.

    Args:
        name: the row's name.
        measured: for each architecture the static network, and others.
        source: what was measured where.
        memory_gb: 1e9 bytes.
        power_w: watts; None: an estimate, those of the built-in device whose rate is nearest.
        down_mbps: its own link, 1e6 bit/s; None: the fleet's.
        up_mbps: the same for the upload.
    """
    static = {m.arch: m for m in measured if m.conv == BASE}
    train_gflops = geometric_mean(m.train_gflops for m in static.values())
    relative = {
        scope: [m.factors for m in measured if m.scope == scope] for scope in (m.scope for m in measured)
    }
    estimate: tuple[Figure, ...] = ()
    if power_w is None:
        like = min(DEVICES.values(), key=lambda device: abs(log(device.train_gflops / train_gflops)))
        power_w, estimate = like.power_w, ("power_w",)
        source = f"{source}; watts of {like.name}, whose rate is the nearest"
    return Device(
        name,
        train_gflops=_rounded(train_gflops),
        infer_gflops=_rounded(geometric_mean(m.speed.infer_gflops for m in static.values())),
        memory_gb=_rounded(memory_gb),
        power_w=power_w,
        source=source,
        estimate=estimate,
        efficiency={
            scope: Factors(
                _rounded(geometric_mean(f.train for f in factors)),
                _rounded(geometric_mean(f.infer for f in factors)),
            )
            for scope, factors in relative.items()
        },
        models={
            Scope(f"{m.arch}/{m.scope.name}", m.scope.kernels): _rounded_speed(m.speed) for m in measured
        },
        down_mbps=down_mbps,
        up_mbps=up_mbps,
    )


def total_memory_gb(device: torch.device) -> float:
    """All memory of the machine, or of the GPU, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return psutil.virtual_memory().total / 1e9


def source_of(settings: Settings, kernels: Iterable[int], image_size: int, batch_sizes: Iterable[int]) -> str:
    """Tell what was measured, where and when, for a row's `source`."""
    about, model = environment(), settings.model
    machine, versions = about["machine"], about["versions"]
    gpu = torch_device(settings).type == "cuda"
    place = machine["gpu"] if gpu else f"{machine['processor']}, {torch.get_num_threads()} threads"
    return (
        f"fedfmd calibrate {versions['fedfmd']}, {date.today().isoformat()}: {place}; torch {versions['torch']}; "
        f"K={', '.join(map(str, kernels))}, {model.norm} normalisation, {image_size}×{image_size} images, "
        f"batches of {', '.join(map(str, sorted({1, *batch_sizes})))}"
    )


def other_rows(path: Path, name: str) -> dict[str, Device]:
    """Return what a profile file holds so far, but for the row that is to be replaced.

    Raises:
        SettingsError: the name can't stand in `fleet.devices`, or the file can't be read or written.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise SettingsError(f"--name {name!r}: use letters, digits, dots and hyphens alone")
    if not os.access(path.parent, os.W_OK):
        raise SettingsError(f"--out {path}: give a file in a folder that you may write to")
    try:
        rows = read_devices(path) if path.exists() else {}
    except ValueError as error:
        raise SettingsError(f"--out {error}") from error
    return {other: device for other, device in rows.items() if other != name}


def write_devices(path: Path, devices: Mapping[str, Device]) -> None:
    """Write the file that `fleet.devices-file`, or the `device` of a SuperNode's node config, names."""
    rows = {name: device_row(device) for name, device in devices.items()}
    atomic_write(path, yaml.safe_dump(rows, sort_keys=False, allow_unicode=True, width=110))


@dataclass(frozen=True)
class _Bench:
    """A network that is measured, in a thread of its own, as a thread keeps one model for its clients."""

    host: Host
    model: nn.Module
    cost: Cost
    arrays: Arrays
    thread: ThreadPoolExecutor

    def train(self, steps: int, batch_size: int) -> float:
        """Return the seconds of a client's round of so many steps, with all kernels."""
        work = Assignment(steps * batch_size, steps, batch_size, self.cost.kernels)
        return self.thread.submit(_train, self.host, self.arrays, work).result()


@contextmanager
def _bench(settings: Settings, classes: int, image_size: int, images: int) -> Iterator[_Bench]:
    """Yield the settings' network beside random images, of which client n has n, up to `images`."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    shard = ImageSet(pixels, torch.arange(images) % classes)
    names = tuple(str(label) for label in range(classes))
    dataset = Dataset("random", shard, shard, classes, names, (0.5,) * 3, (0.25,) * 3, augment="crop+flip")
    host = Host(settings, dataset, lambda client: shard.subset(torch.arange(client)), torch_device(settings))
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(threads,)) as thread:
        model = thread.submit(lambda: host.model).result()
        yield _Bench(host, model, count(model, image_size), pack(model), thread)


def _kinds(bench: _Bench, batch_sizes: Iterable[int]) -> list[tuple[int, int]]:
    """Warm the network up; return steps and batch size of rounds of one step and of about `ROUND_S`, longest last."""
    kinds = []
    for size in batch_sizes:
        bench.train(1, size)
        steps = min(MOST_STEPS, max(FEWEST_STEPS, round(ROUND_S / bench.train(1, size))))
        kinds += [(1, size), (steps, size)]
    return kinds


def _steps_alone(turn: Sequence[float]) -> tuple[float, float]:
    """Return the seconds by which the long round of each network exceeds its short one, what both need aside.

    A turn ends with the two rounds of largest batches of a network, and the same of the static one. Where something
    held a short one up, the long ones as they are.
    """
    *_, short, long, base_short, base_long = turn
    if long <= short or base_long <= base_short:
        return long, base_long
    return long - short, base_long - base_short


def _speed_up(turns: Iterable[Sequence[float]]) -> float:
    """How many times faster the first of two is than the second, the median over turns of the seconds of both."""
    return median(second / first for first, second in turns)


def _train(host: Host, arrays: Arrays, work: Assignment) -> float:
    """Seconds of a client's round."""
    instruction = Instruction(1, LEARNING_RATE, host.settings.temperature.initial, (work,))
    (result,) = run_assignments(host, instruction, arrays).results
    if not result.ok:
        model = host.settings.model
        raise RunError(f"{model.arch} with {model.conv}, batch {work.batch_size}: {result.reason}")
    return result.wall_s


def _rounded_speed(speed: Speed) -> Speed:
    return Speed(*map(_rounded, (speed.train_gflops, speed.infer_gflops, speed.step_s, speed.round_s)))


def _rounded(value: float) -> float:
    """Four digits: more are noise."""
    return float(f"{value:.4g}")
