"""What a round asks of whom: the clients that are drawn, their work, and the messages that carry it to their nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import ArrayRecord, Message, MessageType

from fedfmd.build import Federation, build_rate
from fedfmd.edge import WorkPlan, keep_first, plan_work, round_seconds
from fedfmd.errors import RunError, SettingsError
from fedfmd.flower_compat import message_id
from fedfmd.protocol.messages import BY_ATTENTION, Assignment, Instruction, write_instruction
from fedfmd.seeds import derive_seed
from strategies.nodes import Node, are_edge_devices, assign, reachable
from strategies.scores import NodeTest

RETRY_S = 60.0
"""Virtual seconds until the server looks again where no client was there and no deadline is set."""


@dataclass(frozen=True)
class Request:
    """A message to a node, and what it asks of whom."""

    message: Message
    assignments: tuple[Assignment, ...]

    @property
    def id(self) -> str:
        """The message's id, which Flower gives it when it is sent."""
        return message_id(self.message)

    @property
    def node(self) -> int:
        """The id of the node that it goes to."""
        return self.message.metadata.dst_node_id


@dataclass(frozen=True)
class Round:
    """A round between sending and aggregating: its plans, its virtual seconds, what was asked of the nodes.

    At least `needed` updates must come, or it is discarded.
    """

    plans: Sequence[WorkPlan] = ()
    seconds: float = 0.0
    requests: Sequence[Request] = ()
    needed: int = 0


@dataclass(frozen=True)
class Planner:
    """Plans the rounds of a run, `run` by name, on those of its nodes that are there.

    What it draws follows from the run's seed and the number of the round alone. `separate` if every client's update
    is needed on its own.
    """

    federation: Federation
    nodes: Sequence[Node]
    run: str
    separate: bool = False

    def plan_round(self, server_round: int, time_s: float, arrays: ArrayRecord) -> Round:
        """Return the round's clients, their plans, and a message for each node that has work, with `arrays`."""
        budget, wanted = self.federation.budget, self.federation.settings.clients_per_round
        clients = self._sample(server_round, time_s, budget.asked(wanted))
        plans = keep_first((self.plan(server_round, client) for client in clients), wanted)
        seconds = round_seconds(plans, budget, wanted) if plans else self.idle_seconds(time_s)
        working = [plan for plan in plans if plan.status == "ok"]
        requests = [
            self.training(node, hand, server_round, server_round - 1, arrays)
            for node, hand in assign(self.nodes, working, self.separate)
        ]
        return Round(plans, seconds, requests, budget.needed(wanted))

    def present(self, number: int, time_s: float) -> list[int]:
        """Return the clients that can be asked in the round, or for the flight, of this number."""
        return reachable(self.nodes, self.federation.fleet.present(number, time_s))

    def generator(self, number: int) -> np.random.Generator:
        """Return what draws clients, for the round or the flight of this number."""
        return np.random.default_rng(derive_seed(self.federation.settings.seed, "sampling", number))

    def idle_seconds(self, time_s: float) -> float:
        """Return the virtual seconds until the server looks again, where nobody is there."""
        federation = self.federation
        return federation.fleet.idle_seconds(time_s, federation.budget.deadline_s or RETRY_S)

    def plan(self, number: int, client: int) -> WorkPlan:
        """Return what the client does in the round, or on the flight, of this number.

        Raises:
            RunError: a policy of the user's own fails, or chooses no plan, as it did not before the run.
        """
        federation = self.federation
        owner = federation.fleet.clients[client]
        speed = federation.fleet.speed(number, owner)
        try:
            return plan_work(owner, federation.workload(client), federation.budget, speed)
        except (SettingsError, ValueError) as error:
            raise RunError(f"round {number}, client {client}: {error}") from error

    def training(
        self, node: int, hand: Iterable[WorkPlan], number: int, done: int, arrays: ArrayRecord
    ) -> Request:
        """Return the message that has a node train; its clients start from `arrays`, at the rate after `done` rounds.

        `number` is what the clients' randomness and their rotation of kernels follow.
        """
        assignments = tuple(self._assignment(number, plan) for plan in hand)
        content = write_instruction(self._instruction(assignments, number, done), arrays)
        return Request(Message(content, node, MessageType.TRAIN), assignments)

    def testing(self, work: NodeTest, server_round: int, arrays: ArrayRecord) -> Request:
        """Return the message that has a node test `arrays`, which the round brought."""
        instruction = self._instruction(work.clients, server_round + 1, server_round)
        instruction = replace(instruction, part=work.part, parts=work.parts)
        content = write_instruction(instruction, arrays)
        return Request(Message(content, work.node, MessageType.EVALUATE), work.clients)

    def _sample(self, server_round: int, time_s: float, count: int) -> list[int]:
        present = self.present(server_round, time_s)
        drawn = self.generator(server_round).choice(present, min(count, len(present)), replace=False)
        return sorted(drawn.tolist())

    def _instruction(self, assignments: tuple[Assignment, ...], number: int, done: int) -> Instruction:
        """Return a node's part of the round `number`, before which is what clients kept, after `done` rounds."""
        federation = self.federation
        return Instruction(
            number,
            build_rate(federation.settings, done),
            federation.temperature.at(done),
            assignments,
            run=self.run,
            images=federation.dataset.format if are_edge_devices(self.nodes) else None,
        )

    def _assignment(self, number: int, plan: WorkPlan) -> Assignment:
        """Name a client's kernels: in rotation they start one further with every round, and with every client."""
        client, budget = plan.client.id, self.federation.budget
        first = (number + client) % self.federation.cost.kernels
        if budget.kernel_choice == "attention":
            first = BY_ATTENTION
        return Assignment(client, plan.steps, plan.batch_size, plan.kernels, first)
