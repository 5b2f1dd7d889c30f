"""Asynchronous rounds on the virtual clock: a step whenever the updates that an algorithm wants are there.

A fixed number of clients work at a time, each from the global arrays of the moment it was asked. What they send
is gathered; as soon as the buffer is full the server makes a step, which is what a round is here. A client that
has sent, or was too late, is replaced at once by another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord

from fedfmd.algorithms import Algorithm
from fedfmd.build import Federation
from fedfmd.edge import WorkPlan
from fedfmd.protocol.messages import Assignment, from_record, to_record
from fedfmd.protocol.state import Arrays
from fedfmd.runs import RunFolder
from strategies.nodes import assign
from strategies.planning import Round
from strategies.tracked import Origin, TrackedStrategy

VERSION = "version-"


@dataclass(frozen=True)
class Flight:
    """A client at work: since `start_s`, on the model of round `version`, as the `number`-th ever started.

    It is free again at `end_s`, whether its update comes in time or not.
    """

    number: int
    version: int
    start_s: float
    end_s: float
    plan: WorkPlan

    @property
    def arrives(self) -> bool:
        """Whether its update counts."""
        return self.plan.status == "ok"


Starter = Callable[[float, Iterable[Flight]], Flight | None]
"""(virtual time, those that can't be asked) → the next client's flight, or None if nobody is there."""


def fill_buffer(
    flights: Iterable[Flight], size: int, start: Starter
) -> tuple[list[Flight], list[Flight], float]:
    """Let clients land, and others start in their place, until `size` updates are there.

    Returns those that landed, in the order of their landings, those still at work, and the time of the last
    landing. The last one to land is not replaced: its successor gets the model of the step that now follows.
    Clients that land at the same time do so in the order of their starts.
    """
    working = sorted(flights, key=lambda flight: (flight.end_s, flight.number))
    landed: list[Flight] = []
    now = 0.0
    while working and sum(flight.arrives for flight in landed) < size:
        flight = working.pop(0)
        landed.append(flight)
        now = flight.end_s
        if sum(flight.arrives for flight in landed) < size and (successor := start(now, working + landed)):
            working.append(successor)
            working.sort(key=lambda flight: (flight.end_s, flight.number))
    return landed, working, now


class BufferedStrategy(TrackedStrategy):
    """A round is the time until `Algorithm.buffer` updates are there.

    ``server.clients-per-round`` clients work at a time.
    """

    def __init__(self, algorithm: Algorithm, federation: Federation, folder: RunFolder) -> None:
        super().__init__(algorithm, federation, folder)
        self._started = 0
        self._flights: list[Flight] = []
        self._resumed: list[tuple[int, int, float, int]] = []
        self._landed: dict[int, Flight] = {}
        self._versions: dict[int, Arrays] = {}

    def _plan_round(self, server_round: int, arrays: ArrayRecord) -> Round:
        """Find out whose updates fill the buffer; a message to train each, from the arrays it was asked with."""
        version, time_s, buffer = server_round - 1, self.progress.virtual_s, self.algorithm.buffer
        self._versions[version] = from_record(arrays)

        def start(now: float, busy: Iterable[Flight]) -> Flight | None:
            return self._start(now, version, busy)

        self._flights += [self._flight(*flight) for flight in self._resumed]
        self._resumed = []
        concurrency = self.federation.settings.clients_per_round
        while len(self._flights) < concurrency and (flight := start(time_s, self._flights)):
            self._flights.append(flight)
        landed, self._flights, now = fill_buffer(self._flights, buffer, start)
        # clients that land at once may end a rounding error before the last step did
        seconds = max(0.0, now - time_s) if landed else self._planner.idle_seconds(time_s)
        self._landed = {flight.plan.client.id: flight for flight in landed}
        arriving = [flight for flight in landed if flight.arrives]
        begun = {flight.version for flight in arriving}
        states = {version: to_record(self._versions[version]) for version in begun}
        requests = []
        for node, hand in assign(self.nodes, [flight.plan for flight in arriving], separate=True):
            flight = self._landed[hand[0].client.id]
            begin = states[flight.version]
            requests.append(self._planner.training(node, hand, flight.number, flight.version, begin))
        plans = [flight.plan for flight in landed]
        return Round(plans, seconds, requests, self.federation.budget.needed(buffer))

    def _start(self, now: float, version: int, busy: Iterable[Flight]) -> Flight | None:
        """Send the next client off, drawn by the number of its flight from those that are there and free.

        A number for which none of the idle clients is there is used up: who is there is drawn by it, so that the same
        number would find nobody for ever.
        """
        number = self._started + 1
        taken = {flight.plan.client.id for flight in busy}
        free = [client for client in self._planner.present(number, now) if client not in taken]
        if not free:
            if len(taken) < len(self.federation.fleet.clients):
                self._started = number
            return None
        self._started = number
        client = int(self._planner.generator(number).choice(free))
        return self._flight(number, version, now, client)

    def _flight(self, number: int, version: int, start_s: float, client: int) -> Flight:
        plan = self._planner.plan(number, client)
        needs_s = plan.total_s if plan.status == "ok" else min(plan.total_s, self._deadline_s)
        return Flight(number, version, start_s, start_s + needs_s, plan)

    @property
    def _deadline_s(self) -> float:
        return self.federation.budget.deadline_s or math.inf

    def _origin(self, work: Sequence[Assignment], current: Arrays) -> Origin:
        del current
        version = self._landed[work[0].client].version
        return Origin(self._versions[version], age=max(self._versions) - version)

    def _dump(self) -> dict[str, Any]:
        """Return the algorithm's, the clients at work, and the older arrays that they began with."""
        needed = {flight.version for flight in self._flights}
        self._versions = {version: arrays for version, arrays in self._versions.items() if version in needed}
        begun = {
            f"{VERSION}{version}/{name}": array
            for version, arrays in self._versions.items()
            for name, array in arrays.items()
        }
        flights = [(f.number, f.version, f.start_s, f.plan.client.id) for f in self._flights]
        return super()._dump() | begun | {"started": self._started, "flights": flights}

    def _restore(self, kept: Mapping[str, Any]) -> None:
        own = {name: value for name, value in kept.items() if not name.startswith(VERSION)}
        self._started = own.pop("started")
        # to be planned once it is known which devices and images there are
        self._resumed = own.pop("flights")
        for name in kept.keys() - own.keys() - {"started", "flights"}:
            version, _, array = name.removeprefix(VERSION).partition("/")
            self._versions.setdefault(int(version), {})[array] = kept[name]
        super()._restore(own)
