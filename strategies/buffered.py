"""FedBuff (Nguyen et al., AISTATS 2022, arXiv:2106.06639): asynchronous rounds on the virtual clock.

A fixed number of clients work at a time, each from the global state of the moment it was asked. What they send
is gathered; as soon as the buffer is full the server makes a step, which is what a round is here. A client that
has sent, or was too late, is replaced at once by another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedfmd.build import Federation
from fedfmd.edge import WorkPlan
from fedfmd.protocol.messages import Assignment, from_record, to_record
from fedfmd.protocol.state import Arrays
from fedfmd.runs import RunFolder
from strategies.aggregation import Replies, transplant
from strategies.nodes import assign, reachable
from strategies.tracked import Algorithm, Round, TrackedStrategy

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
    """FedBuff: a round is the time until ``server.buffer`` updates are there.

    ``server.clients-per-round`` clients work at a time. An update that is s rounds behind counts
    (1 + s)^-``server.staleness``.
    """

    def __init__(
        self, inner: FedAvg, federation: Federation, folder: RunFolder, algorithm: Algorithm
    ) -> None:
        super().__init__(inner, federation, folder, algorithm)
        self._started = 0
        self._flights: list[Flight] = []
        self._landed: dict[int, Flight] = {}
        self._versions: dict[int, Arrays] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Find out whose updates fill the buffer; a message to train each, from the state it was asked with."""
        settings = self.federation.settings
        version, time_s = server_round - 1, float(config.get("virtual-s", 0.0))
        self._versions[version] = from_record(arrays)

        def start(now: float, busy: Iterable[Flight]) -> Flight | None:
            return self._start(now, version, busy)

        concurrency = settings.clients_per_round
        while len(self._flights) < concurrency and (flight := start(time_s, self._flights)):
            self._flights.append(flight)
        landed, self._flights, now = fill_buffer(self._flights, settings.server.buffer, start)
        seconds = now - time_s if landed else self._idle_seconds(time_s)
        self._landed = {flight.plan.client.id: flight for flight in landed}
        arriving = [flight for flight in landed if flight.arrives]
        begun = {flight.version for flight in arriving}
        states = {version: to_record(self._versions[version]) for version in begun}
        requests = []
        for node, hand in assign(self.nodes, [flight.plan for flight in arriving], separate=True):
            flight = self._landed[hand[0].client.id]
            requests.append(self._request(node, hand, flight.number, flight.version, states[flight.version]))
        plans = [flight.plan for flight in landed]
        needed = self.federation.budget.needed(settings.server.buffer)
        self._round = Round(plans, seconds, requests, needed)
        return [request.message for request in requests]

    def _start(self, now: float, version: int, busy: Iterable[Flight]) -> Flight | None:
        """Send the next client off, drawn by the number of its flight from those that are there and free."""
        number = self._started + 1
        taken = {flight.plan.client.id for flight in busy}
        present = reachable(self.nodes, self.federation.fleet.present(number, now))
        free = [client for client in present if client not in taken]
        if not free:
            return None
        self._started = number
        client = int(self._sampling_generator(number).choice(free))
        return self._flight(number, version, now, client)

    def _flight(self, number: int, version: int, start_s: float, client: int) -> Flight:
        plan = self._plan(number, client)
        needs_s = plan.total_s if plan.status == "ok" else min(plan.total_s, self._deadline_s)
        return Flight(number, version, start_s, start_s + needs_s, plan)

    @property
    def _deadline_s(self) -> float:
        return self.federation.budget.deadline_s or math.inf

    def _start_of(self, work: Sequence[Assignment], current: Arrays) -> Arrays:
        del current
        return self._versions[self._landed[work[0].client].version]

    def _comparable(self, replies: Replies, current: Arrays) -> Replies:
        """The replies as updates of the current state, the older the shorter."""
        newest = max(self._versions)
        comparable = []
        for message, reply in replies:
            flight = self._landed[reply.results[0].client]
            weight = (1 + newest - flight.version) ** -self.federation.settings.server.staleness
            start = self._versions[flight.version]
            comparable.append((message, transplant(reply, start, current, self._parameters, weight)))
        return comparable

    def _state(self) -> dict[str, Any]:
        flights = [(f.number, f.version, f.start_s, f.plan.client.id) for f in self._flights]
        return super()._state() | {"started": self._started, "flights": flights}

    def _arrays(self) -> Arrays:
        """The optimiser's, and the older states that clients at work began with."""
        needed = {flight.version for flight in self._flights}
        self._versions = {version: state for version, state in self._versions.items() if version in needed}
        return super()._arrays() | {
            f"{VERSION}{version}/{name}": array
            for version, state in self._versions.items()
            for name, array in state.items()
        }

    def _restore(self, state: Mapping[str, Any], arrays: Arrays) -> None:
        of_versions = {name: array for name, array in arrays.items() if name.startswith(VERSION)}
        super()._restore(state, {name: array for name, array in arrays.items() if name not in of_versions})
        for name, array in of_versions.items():
            version, _, own = name.removeprefix(VERSION).partition("/")
            self._versions.setdefault(int(version), {})[own] = array
        self._started = state["started"]
        self._flights = [self._flight(*flight) for flight in state["flights"]]
