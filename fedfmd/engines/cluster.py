"""A Ray cluster that is there already: how much of it a run takes, and whether its machines are fit for the run.

Workers read data and code on the machine that they are on. What one machine has in another version, or lacks, would
fail in the middle of a run, or change its results: so all machines are asked before it starts.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from fedfmd.algorithms import make_algorithm
from fedfmd.algorithms.algorithm import Algorithm
from fedfmd.build import build_dataset, own_sources, torch_device
from fedfmd.cache import cache_dir
from fedfmd.conv import is_dynamic
from fedfmd.conv.mixing import AUTO, NATIVE
from fedfmd.conv.native import is_compiled
from fedfmd.engines.probe import versions
from fedfmd.errors import SettingsError, need, one_line
from fedfmd.flower_compat import CLUSTER_ADDRESS, worker_environment
from fedfmd.protocol.compression import ROUNDINGS
from fedfmd.protocol.parsing import clean_text
from fedfmd.runs.provenance import code_digest
from fedfmd.settings import Settings

REACH_S = 5.0
ANSWER_S = 330.0
"""Seconds until a machine has started a worker and read the data of all runs."""

GPU_PARTS = 10_000
"""Into how many parts Ray divides a GPU at most."""

MAX_FAULTS = 2000
"""Characters of an error that names what is wrong with the machines."""

_HOST_PORT = re.compile(r"([\w.-]+|\[[\da-fA-F:.]+\]):\d{1,5}")


@dataclass(frozen=True)
class Cluster:
    """What a run takes of a cluster.

    Attributes:
        address: host and port of its head.
        workers: how many train at once, each on a core.
        gpus: GPUs of a worker, a share or 1; 0: it computes on the core.
    """

    address: str
    workers: int
    gpus: float = 0.0


@dataclass(frozen=True)
class Facts:
    """What a run's results depend on beside its settings.

    Attributes:
        code: hash of all code.
        images: hash of all images.
        compiled: whether kernels are mixed by code compiled for the processor.
    """

    code: str
    images: str
    compiled: bool = False


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster: what it has to give, and what it says of itself.

    Attributes:
        name: host name and address.
        cpus: cores that Ray may use.
        gpus: GPUs that Ray may use.
        versions: of the libraries that must be the same, by name.
        facts: of each run.
        shares: whether it sees the folder in which clients keep their states on this machine.
        fault: why it can't tell all that.
    """

    name: str
    cpus: float
    gpus: float
    versions: Mapping[str, str]
    facts: tuple[Facts, ...] = ()
    shares: bool = False
    fault: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Machine:
        """Return the machine that `fedfmd.engines.probe` tells of."""
        return cls(**{**values, "facts": tuple(Facts(*told) for told in values.get("facts", ()))})


def cluster_address(given: str) -> str:
    """Return the address of the cluster to join: the given one, or that of RAY_ADDRESS; "" if none is meant.

    Raises:
        SettingsError: it can't be one.
    """
    name, address = ("--address", given) if given else (CLUSTER_ADDRESS, os.environ.get(CLUSTER_ADDRESS, ""))
    if address in ("", "local"):
        return ""
    if address != "auto" and not _HOST_PORT.fullmatch(address):
        raise SettingsError(
            f"{name} = {address!r}: give HOST:PORT of the cluster's head, as `ray start --head` prints it, or auto "
            "for the cluster that this machine is in"
        )
    return address


def join_cluster(address: str, runs: Sequence[Settings], workers: int) -> Cluster:
    """Return what these runs take of the cluster at `address`, once all of its machines are found fit.

    `workers` train at once; 0: as many as there is room for.

    Raises:
        SettingsError: there is no such cluster, it has no room, or a machine has other versions, code or images.
    """
    need("--engine flwr", "ray")
    on_gpus = any(_on_gpu(settings) for settings in runs)
    with _marked_cache() as marker:
        answer = _ask(
            {
                "address": address,
                "environment": worker_environment(),
                "marker": marker,
                "runs": [run.flat() for run in runs],
            }
        )
    if error := answer.get("error"):
        raise SettingsError(f"--address = {address}: {error}")
    joined, machines = answer["address"], [Machine.from_json(machine) for machine in answer["machines"]]
    cluster = share_out(joined, machines, on_gpus, workers)
    here = [facts_of(run) for run in runs]
    if faults := [fault for machine in machines for fault in faults_of(machine, runs, here)]:
        text = clean_text("; ".join(dict.fromkeys(faults)), MAX_FAULTS)
        raise SettingsError(f"the cluster at {joined} is not fit for this run: {text}")
    if answer["busy"]:
        raise SettingsError(
            f"the cluster at {joined} has {answer['busy']:g} of its cores and GPUs taken by other jobs, and Flower "
            "uses all of a cluster: wait until they are done"
        )
    return cluster


def share_out(address: str, machines: Sequence[Machine], on_gpus: bool, workers: int) -> Cluster:
    """Return how the workers are spread: a core for each, and `on_gpus` a GPU, or equal shares if there are fewer.

    Raises:
        SettingsError: there is no room for them.
    """
    gpus = sum(int(machine.gpus) for machine in machines)
    share = (
        min(1.0, math.floor(GPU_PARTS * gpus / (workers or gpus)) / GPU_PARTS) if on_gpus and gpus else 0.0
    )
    room = 0
    if share or not on_gpus:
        room = sum(
            min(int(machine.cpus), int(machine.gpus / share)) if share else int(machine.cpus)
            for machine in machines
        )
    place = "a core and a GPU" if on_gpus else "a core"
    if not room:
        raise SettingsError(
            f"the cluster at {address} has no machine with {place} for a worker: add one, by `ray start --address="
            f"{address} --num-cpus=N{' --num-gpus=N` or set device=cpu' if on_gpus else '`'}"
        )
    if workers > room:
        raise SettingsError(
            f"--workers = {workers}, and the cluster at {address} has {place} for {room}: ask for at most that many, "
            "or leave it out to take all"
        )
    return Cluster(address, workers or room, share)


def faults_of(machine: Machine, runs: Sequence[Settings], here: Sequence[Facts]) -> list[str]:
    """Return why these runs, of which `here` the facts are known, can't be on the machine; nothing if they can."""
    wanted = versions()
    if differing := [
        f"{machine.name} has {name} {version}, this machine {wanted[name]}: install the same on both"
        for name, version in machine.versions.items()
        if version != wanted[name]
    ]:
        return differing
    if machine.fault:
        return [f"{machine.name}: {machine.fault}"]
    faults = []
    for run, there, own in zip(runs, machine.facts, here, strict=True):
        if there.code != own.code:
            files = "".join(f", or of {key} = {name!r}" for key, name in run.own_code.items())
            faults.append(f"{machine.name} has other source files of fedfmd{files}: copy this machine's")
        if there.images != own.images:
            faults.append(
                f"{machine.name} has other images for data.dataset = {run.data.dataset!r}: copy this machine's files "
                "to the same place"
            )
        if there.compiled != own.compiled:
            here_it, there_it = ("has", "has not") if own.compiled else ("has not", "has")
            faults.append(
                f"this machine {here_it} compiled the mixing of kernels, which changes the last digits, and "
                f"{machine.name} {there_it}: run `fedfmd compile` on both, or set model.mixing to another way than "
                "auto and native"
            )
        if not machine.shares and (setting := keeps_states(run)):
            faults.append(
                f"{machine.name} does not see this machine's {cache_dir()}, where with {setting} clients keep what "
                "they need in their next round: set XDG_CACHE_HOME to a folder that all machines share"
            )
    return faults


def keeps_states(settings: Settings) -> str:
    """Return the setting because of which clients keep something between rounds; "" if they don't."""
    if settings.transport.upload in ROUNDINGS:
        return f"transport.upload = {settings.transport.upload!r}"
    if type(make_algorithm(settings)).keep is not Algorithm.keep:
        return f"server.strategy = {settings.server.strategy!r}"
    return ""


def facts_of(settings: Settings) -> Facts:
    """Return what a run's results depend on here beside its settings.

    Raises:
        SettingsError: code or images can't be read.
    """
    mixes = is_dynamic(settings.model.conv) and settings.model.mixing in (AUTO, NATIVE)
    code, images = code_digest(*own_sources(settings)), build_dataset(settings).fingerprint
    return Facts(code, images, compiled=mixes and is_compiled())


def report(runs: Sequence[Mapping[str, Any]], marker: str) -> dict[str, Any]:
    """Return what a worker tells of its machine, as far as `Machine.from_json` reads it."""
    try:
        facts = [facts_of(Settings.from_mapping(run)) for run in runs]
    except Exception as error:  # whatever it is, the machine is not fit
        return {"fault": one_line(error)}
    return {"facts": [astuple(fact) for fact in facts], "shares": (cache_dir() / marker).exists()}


def _on_gpu(settings: Settings) -> bool:
    device = torch_device(settings)
    if device.index:
        raise SettingsError(
            f"device = {settings.device!r}: Ray gives each worker of a cluster its GPU; set device=cuda"
        )
    return device.type == "cuda"


@contextmanager
def _marked_cache() -> Iterator[str]:
    """Put a file into the cache while the block runs, by which another machine sees whether it has the same one."""
    folder = cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / f"cluster-{secrets.token_hex(8)}"
    marker.touch()
    try:
        yield marker.name
    finally:
        marker.unlink(missing_ok=True)


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `fedfmd.engines.probe` answers: in a process of its own, as Ray may end the one that it fails in."""
    address = str(request["address"])
    if address != "auto":
        _knock(address)
    with tempfile.TemporaryDirectory(prefix="fedfmd-cluster-") as scratch:
        asked, told = Path(scratch) / "request.json", Path(scratch) / "answer.json"
        asked.write_text(json.dumps(request))
        command = [sys.executable, "-m", "fedfmd.engines.probe", str(asked), str(told)]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=ANSWER_S
            )
        except subprocess.TimeoutExpired:
            raise SettingsError(
                f"--address = {address}: no Ray cluster answers there within {ANSWER_S:g} s"
            ) from None
        if not told.exists():
            raise SettingsError(
                f"--address = {address}: no Ray cluster answers there ({_reason(done.stderr, done.returncode)})"
            )
        answer: dict[str, Any] = json.loads(told.read_text())
        return answer


def _reason(stderr: str, status: int) -> str:
    """Return the last line that is no frame of the stack that Ray prints where it ends its process."""
    lines = [
        line
        for line in stderr.splitlines()
        if line.strip() and not re.search(r"\[0x[0-9a-f]+\]|^\*\*\*", line)
    ]
    return " ".join(lines[-1].split()) if lines else f"exit status {status}"


def _knock(address: str) -> None:
    """See that somebody listens there: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
    except (OSError, OverflowError) as error:
        raise SettingsError(
            f"--address = {address}: no Ray cluster answers there ({one_line(error)}): start its head by "
            f"`ray start --head --port={port}`, or leave --address and {CLUSTER_ADDRESS} out"
        ) from None
