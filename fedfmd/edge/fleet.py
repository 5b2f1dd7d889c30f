"""Which device and which link each client has, when it is there, and how fast it is in a round."""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from fedfmd.edge.devices import DEVICES, Bandwidth, Device, Link
from fedfmd.edge.trace import ALWAYS, Trace
from fedfmd.seeds import derive_seed

ASSIGNMENTS = ("random", "size", "inverse")
_FORM = "write `pi-4:4, phone:2` (counts) or `pi-4:50%, phone:50%` (shares)"


@dataclass(frozen=True)
class Client:
    """A data shard's owner: its number, its device and its share of the link."""

    id: int
    device: Device
    bandwidth: Bandwidth


@dataclass(frozen=True)
class Fleet:
    """All clients, in the order of their ids 0, 1, ….

    What a client is like in a round is drawn from (seed, round, client) alone.
    """

    clients: tuple[Client, ...]
    seed: int = 0
    trace: Trace = ALWAYS

    @property
    def counts(self) -> dict[str, int]:
        """Number of clients by the name of their device, in alphabetical order."""
        return dict(sorted(Counter(client.device.name for client in self.clients).items()))

    def present(self, server_round: int, time_s: float) -> list[int]:
        """Return the clients that are there when a round starts, at a virtual time; they stay until it ends."""
        return [
            client.id
            for client in self.clients
            if self.trace.has(client.id, time_s) and self._is_up(server_round, client)
        ]

    def idle_seconds(self, time_s: float, retry_s: float) -> float:
        """How long the server waits if nobody is there: for the trace's next window, or `retry_s` if it has some."""
        if any(self.trace.has(client.id, time_s) for client in self.clients):
            return retry_s
        return self.trace.until_next(time_s)

    def speed(self, server_round: int, client: Client) -> float:
        """Factor on the client's rates in a round: log-normal with median 1."""
        return math.exp(client.device.jitter * self._draw("jitter", server_round, client).standard_normal())

    def _is_up(self, server_round: int, client: Client) -> bool:
        share = client.device.availability
        return share >= 1 or self._draw("availability", server_round, client).random() < share

    def _draw(self, purpose: str, server_round: int, client: Client) -> np.random.Generator:
        return np.random.default_rng(derive_seed(self.seed, purpose, server_round, client.id))


def parse_fleet(spec: str | Mapping[str, int | float | str]) -> dict[str, int | Fraction]:
    """Read a fleet: either counts (int) or shares (Fraction, summing to 1) by the name of the device.

    Args:
        spec: `"pi-4:4, phone:4"`, `"pi-4:50%, phone:0.5"`, `"pi-4"` (all of them), or the same as a mapping.

    Raises:
        ValueError: the text or an amount can't be read, counts and shares are mixed, or shares miss 100 %
            by more than 1 %, which is left for thirds.
    """
    pairs = spec.items() if isinstance(spec, Mapping) else _pairs(spec)
    amounts: dict[str, int | Fraction] = {}
    for name, amount in pairs:
        if name in amounts:
            raise ValueError(f"fleet.devices: {name!r} is named twice in {spec!r}; {_FORM}")
        amounts[name] = _amount(name, amount)
    if len({type(amount) for amount in amounts.values()}) != 1:
        raise ValueError(f"fleet.devices = {spec!r} must hold counts only or shares only; {_FORM}")
    total = sum(amounts.values())
    if isinstance(total, Fraction):
        if abs(total - 1) > Fraction(1, 100):
            raise ValueError(f"fleet.devices = {spec!r}: the shares sum to {float(total):.4g}, not to 1")
        return {name: share / total for name, share in amounts.items()}
    return amounts


def _pairs(text: str) -> list[tuple[str, str]]:
    parts = [part.partition(":") for part in text.split(",")]
    return [(name.strip(), amount.strip() if colon else "100%") for name, colon, amount in parts]


def _amount(name: str, amount: int | float | str) -> int | Fraction:
    """Read an amount: an int is a count, all else a share, exact as it is written."""
    text = str(amount)
    try:
        if text.endswith("%"):
            value: int | Fraction = Fraction(text[:-1]) / 100
        else:
            value = int(text) if text.isdecimal() else Fraction(text)
    except (ValueError, ZeroDivisionError):
        value = 0
    if value <= 0:
        raise ValueError(f"fleet.devices: {name!r} has the amount {text!r}, no positive number; {_FORM}")
    return value


def make_fleet(
    spec: str | Mapping[str, int | float | str],
    clients: int,
    link: Link,
    seed: int,
    devices: Mapping[str, Device] = DEVICES,
    *,
    assignment: str = "random",
    sizes: Sequence[int] = (),
    trace: Trace = ALWAYS,
) -> Fleet:
    """Deal devices and links out to `clients` clients.

    Links follow from the seed alone, unless a device has its own: they don't change with the devices, nor the
    first clients' links with the number of clients. Devices follow from the seed, and from the sizes where they decide.

    Args:
        spec: the fleet, as `parse_fleet` reads it; shares become counts by largest remainder.
        clients: the number of clients.
        link: where the clients' bandwidths are drawn from.
        seed: not negative.
        devices: the profiles that `spec` may name.
        assignment: "random"; "size" gives the fastest devices to the clients with most images; "inverse" to
            those with fewest.
        sizes: each client's number of images, unless the assignment is random.
        trace: when clients are there.

    Raises:
        ValueError: an unknown device, or counts that don't sum to `clients`.
    """
    amounts = parse_fleet(spec)
    for name in amounts:
        if name not in devices:
            near = difflib.get_close_matches(name, devices, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"fleet.devices: unknown device {name!r}; {hint}known: {', '.join(devices)}")
    counts = _counts(amounts, clients)
    if sum(counts.values()) != clients:
        raise ValueError(
            f"fleet.devices names {sum(counts.values())} devices, partition.clients is {clients}: "
            "make them equal, or give shares like `pi-4:50%`"
        )
    dealt = [devices[name] for name, count in counts.items() for _ in range(count)]
    places = _generator(seed, "devices").permutation(clients)
    if assignment != "random":
        dealt.sort(key=lambda device: -device.train_gflops)
        keys = np.negative(sizes) if assignment == "size" else np.asarray(sizes)
        places = np.argsort(np.lexsort((places, keys)))  # equal sizes stay in random order
    quantiles = _generator(seed, "links").random(clients)
    return Fleet(
        tuple(
            Client(id, dealt[place], dealt[place].bandwidth(link.sample(float(u))))
            for id, (place, u) in enumerate(zip(places, quantiles, strict=True))
        ),
        seed,
        trace,
    )


def _counts(amounts: Mapping[str, int | Fraction], clients: int) -> dict[str, int]:
    """Turn amounts into counts: shares are rounded by largest remainder, ties in the order of the specification."""
    if any(isinstance(amount, int) for amount in amounts.values()):
        return {name: int(amount) for name, amount in amounts.items()}
    quotas = {name: share * clients for name, share in amounts.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])
    for name in by_remainder[: clients - sum(counts.values())]:
        counts[name] += 1
    return counts


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a stream of its own per purpose, so that no draw shifts another."""
    return np.random.default_rng([seed, *purpose.encode()])
