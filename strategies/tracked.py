"""A federated run on a fleet: sampling by seed, work plans, checks, virtual time, rows and checkpoints."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedfmd.build import Federation
from fedfmd.conv import has_temperature, set_temperature
from fedfmd.edge import WorkPlan, keep_first, plan_work, round_seconds
from fedfmd.errors import RunError
from fedfmd.flower_compat import answered_id, dead_worker, message_id
from fedfmd.protocol.averaging import effective_steps
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    WEIGHT,
    Assignment,
    ClientResult,
    Instruction,
    to_record,
    write_instruction,
)
from fedfmd.protocol.state import Arrays, load, parameter_names, shared_arrays
from fedfmd.runs import ClientRow, RunFolder, latest_checkpoint, save_checkpoint
from fedfmd.seeds import derive_seed
from fedfmd.training import Best, Evaluation, evaluate_on_both, learning_rate
from strategies.aggregation import Replies, aggregate, lengthen
from strategies.lines import header_lines, round_text
from strategies.nodes import (
    Node,
    assign,
    empty,
    exchange,
    has_boxes,
    meet_again,
    meet_nodes,
    on_boxes,
    reachable,
)
from strategies.optimiser import optimiser_arrays, restore_optimiser
from strategies.replies import client_results, read_replies
from strategies.rows import client_rows, round_row

logger = logging.getLogger("fedfmd")

RETRY_S = 60.0
"""Virtual seconds until the server looks again where no client was there and no deadline is set."""


@dataclass(frozen=True)
class Algorithm:
    """How a strategy departs from FedAvg, apart from the server's step, which Flower's part of it makes.

    Attributes:
        separate: the server needs every client's update on its own, not the mean of a node's clients.
        normalised: FedNova's clients divide their update by their own effective steps.
        local_norm: FedBN's clients keep their own normalisation layers.
        proximal: FedProx's clients need train.proximal-mu.
    """

    separate: bool = False
    normalised: bool = False
    local_norm: bool = False
    proximal: bool = False


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its arrays: what a resume needs. `run` names it among all runs."""

    round: int
    virtual_s: float
    client_flops: tuple[int, ...]
    best: Best = field(default_factory=Best)
    run: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class Request:
    """A message to a node, and what it asks of whom."""

    message: Message
    assignments: tuple[Assignment, ...]

    @property
    def id(self) -> str:
        """The message's id, which Flower gives it when it is sent."""
        return message_id(self.message)


@dataclass(frozen=True)
class Round:
    """A round between sending and aggregating: its plans, its virtual seconds, what was asked of the nodes.

    At least `needed` updates must come, or it is void.
    """

    plans: Sequence[WorkPlan] = ()
    seconds: float = 0.0
    requests: Sequence[Request] = ()
    needed: int = 0


class TrackedStrategy(Strategy):
    """Wraps a Flower strategy, which combines the parameters; everything around it happens here.

    `run` is the loop with rows, checkpoints and resume. The hooks follow Flower's `Strategy`.
    """

    def __init__(
        self, inner: FedAvg, federation: Federation, folder: RunFolder, algorithm: Algorithm
    ) -> None:
        self.inner = inner
        self.algorithm = algorithm
        self.federation = federation
        self.folder = folder
        self.nodes: tuple[Node, ...] = ()
        self.results: dict[int, ClientResult] = {}
        self._run_token = ""
        self._round = Round()
        self._parameters = parameter_names(federation.model)
        self._annealed = has_temperature(federation.model)

    def summary(self) -> None:
        """Log what runs, on which fleet."""
        for line in header_lines(self.federation, own_data=has_boxes(self.nodes)):
            logger.info(line)

    def run(self, grid: Grid) -> Progress:
        """Train to the last round, from the newest checkpoint if the folder holds one.

        Raises:
            RunError: the nodes are not there, or more than ``server.max-failed-share`` of a round's clients failed.
        """
        settings = self.federation.settings
        progress = self._resume()
        if progress.round < settings.server.rounds:
            self._meet(grid, resumed=progress.round > 0)
        self.summary()
        for server_round in range(progress.round + 1, settings.server.rounds + 1):
            progress = self._run_round(grid, server_round, progress)
        return progress

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample and plan the round's clients; the messages for the nodes that have work.

        `config` tells the virtual time at which the round starts, `virtual-s`.
        """
        budget = self.federation.budget
        wanted = self.federation.settings.clients_per_round
        time_s = float(config.get("virtual-s", 0.0))
        clients = self._sample(server_round, time_s, budget.asked(wanted))
        plans = keep_first((self._plan(server_round, client) for client in clients), wanted)
        seconds = round_seconds(plans, budget, wanted) if plans else self._idle_seconds(time_s)
        working = [plan for plan in plans if plan.status == "ok"]
        requests = [
            self._request(node, hand, server_round, server_round - 1, arrays)
            for node, hand in assign(self.nodes, working, self.algorithm.separate)
        ]
        self._round = Round(plans, seconds, requests, budget.needed(wanted))
        return [request.message for request in requests]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new state and the number of images behind it; (None, None) if too few clients succeeded."""
        arrays = self.combine(server_round, list(replies))
        if arrays is None:
            return None, None
        images = sum(result.images for result in self.results.values() if result.ok)
        return to_record(arrays), MetricRecord({WEIGHT: images})

    def combine(self, server_round: int, replies: Sequence[Message]) -> Arrays | None:
        """Check the replies and combine what is usable; None if too few clients succeeded.

        Raises:
            RunError: a worker of Flower's simulation died.
        """
        asked = {request.id: request.assignments for request in self._round.requests}
        current = shared_arrays(self.federation.model)
        received = {request: self._start_of(work, current) for request, work in asked.items()}
        if fault := dead_worker(replies):
            raise RunError(
                f"round {server_round}: a Ray worker died ({fault}), and Flower does not replace it. Give the workers "
                "more memory or start fewer, then run the same command again: it does this round anew"
            )
        answers = read_replies(replies, asked, received)
        self.results = client_results(answers, asked)
        if sum(result.ok for result in self.results.values()) < max(1, self._round.needed):
            return None
        messages = {answered_id(message): message for message in replies}
        usable = [
            (messages[answer.request], answer.reply)
            for answer in answers
            if answer.reply is not None and answer.reply.arrays
        ]
        return aggregate(
            self.inner,
            server_round,
            self._comparable(usable, current),
            current,
            self._parameters,
            self.algorithm.separate,
        )

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates the global model."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to combine, as nobody was asked."""
        return None

    def _run_round(self, grid: Grid, server_round: int, progress: Progress) -> Progress:
        if has_boxes(self.nodes):
            self._meet(grid, resumed=True)
        started = time.perf_counter()
        federation = self.federation
        model, settings = federation.model, federation.settings
        temperature = federation.temperature.at(server_round - 1)
        set_temperature(model, temperature)
        trained, arrived = self._train(grid, server_round, progress.virtual_s)
        evaluation, validation = self._evaluate(server_round)
        best = progress.best.or_later(evaluation, validation)
        places = {node.id: node.rank for node in self.nodes}
        asked = [(request, work.client) for request in self._round.requests for work in request.assignments]
        ranks = {client: places[request.message.metadata.dst_node_id] for request, client in asked}
        measured = asked if has_boxes(self.nodes) else []
        trips = {client: arrived[request.id] for request, client in measured if request.id in arrived}
        clients = client_rows(
            server_round, self._round.plans, self.results, ranks, progress.client_flops, trips
        )
        row = round_row(
            server_round,
            clients,
            evaluation,
            validation,
            federation,
            round_s=self._round.seconds,
            clients_cut=sum(plan.is_cut for plan in self._round.plans),
            void=not trained,
            temperature=temperature if self._annealed else None,
            virtual_s=progress.virtual_s,
            best_accuracy=best.known_accuracy,
            cum_train_flops=sum(progress.client_flops),
            wall_s=time.perf_counter() - started,
        )
        flops = list(progress.client_flops)
        for client_row in clients:
            flops[client_row.client] = client_row.cum_train_flops
        progress = replace(
            progress,
            round=server_round,
            virtual_s=row.virtual_s,
            best=best,
            client_flops=tuple(flops),
        )
        self.folder.append_round(row, clients)
        if server_round % settings.server.checkpoint_every == 0 or server_round == settings.server.rounds:
            self._save(progress)
        logger.info(round_text(row, settings.server.rounds), extra={"round_row": row})
        for failed in (client for client in clients if client.status == "failed"):
            logger.warning("round %d: client %d failed: %s", server_round, failed.client, failed.reason)
        self._stop_if_hopeless(server_round, clients)
        return progress

    def _train(self, grid: Grid, server_round: int, virtual_s: float) -> tuple[bool, dict[str, float]]:
        """Let the nodes train, and take over what they learnt: whether there was enough, and when each reply came."""
        model = self.federation.model
        arrays, config = to_record(shared_arrays(model)), ConfigRecord({"virtual-s": virtual_s})
        messages = self.configure_train(server_round, arrays, config, grid)
        replies, arrived = exchange(grid, messages, self.federation.settings.server.round_timeout_s)
        empty(request.message for request in self._round.requests if request.id in arrived)
        new = self.combine(server_round, replies)
        if new is not None:
            load(model, new)
        empty(replies)
        return new is not None, arrived

    def _meet(self, grid: Grid, resumed: bool) -> None:
        """A new run starts with all its boxes. Later they come and go, and it does without the failed share."""
        settings, images = self.federation.settings, self.federation.dataset.format
        clients, server = settings.partition.clients, settings.server
        least = max(1, math.ceil((1 - server.max_failed_share) * clients)) if resumed else clients
        meet = partial(meet_again, self.nodes) if has_boxes(self.nodes) else meet_nodes
        self.nodes = meet(grid, images, clients, server.node_timeout_s, least)
        self.federation = on_boxes(self.federation, self.nodes)

    def _sample(self, server_round: int, time_s: float, count: int) -> list[int]:
        """Clients of the round among those that are there, from (seed, round) alone."""
        present = reachable(self.nodes, self.federation.fleet.present(server_round, time_s))
        generator = self._sampling_generator(server_round)
        return sorted(generator.choice(present, min(count, len(present)), replace=False).tolist())

    def _sampling_generator(self, number: int) -> np.random.Generator:
        """Draws clients, for the round or the flight of this number."""
        return np.random.default_rng(derive_seed(self.federation.settings.seed, "sampling", number))

    def _idle_seconds(self, time_s: float) -> float:
        """Virtual seconds until the server looks again, where nobody is there."""
        federation = self.federation
        return federation.fleet.idle_seconds(time_s, federation.budget.deadline_s or RETRY_S)

    def _plan(self, server_round: int, client: int) -> WorkPlan:
        federation = self.federation
        owner = federation.fleet.clients[client]
        speed = federation.fleet.speed(server_round, owner)
        return plan_work(owner, federation.workload(client), federation.budget, speed)

    def _request(
        self, node: int, hand: Iterable[WorkPlan], server_round: int, done: int, arrays: ArrayRecord
    ) -> Request:
        """The message for a node: its clients start from `arrays`, with the rates after `done` rounds.

        `server_round` is what the clients' randomness and their rotation of kernels follow.
        """
        settings = self.federation.settings
        assignments = tuple(self._assignment(server_round, plan) for plan in hand)
        instruction = Instruction(
            server_round,
            learning_rate(settings.train.lr, settings.train.schedule, done / settings.server.rounds),
            self.federation.temperature.at(done),
            assignments,
            normalised=self.algorithm.normalised,
            local_norm=self.algorithm.local_norm,
            run=self._run_token,
            images=self.federation.dataset.format if has_boxes(self.nodes) else None,
        )
        return Request(Message(write_instruction(instruction, arrays), node, MessageType.TRAIN), assignments)

    def _start_of(self, work: Sequence[Assignment], current: Arrays) -> Arrays:
        """The arrays that these clients were sent."""
        del work
        return current

    def _comparable(self, replies: Replies, current: Arrays) -> Replies:
        """The replies as updates of the current state, so that they can be averaged."""
        if not self.algorithm.normalised:
            return replies
        train = self.federation.settings.train
        done = [result for result in self.results.values() if result.ok]
        ways = (r.images * effective_steps(r.steps, train.momentum, train.nesterov) for r in done)
        factor = math.fsum(ways) / sum(result.images for result in done)
        return lengthen(replies, current, self._parameters, factor)

    def _assignment(self, server_round: int, plan: WorkPlan) -> Assignment:
        """A client's kernels in rotation start one further with every round, and with every client."""
        client, budget = plan.client.id, self.federation.budget
        first = (server_round + client) % self.federation.cost.kernels
        if budget.kernel_choice == "attention":
            first = BY_ATTENTION
        return Assignment(client, plan.steps, plan.batch_size, plan.kernels, first)

    def _evaluate(self, server_round: int) -> tuple[Evaluation | None, Evaluation | None]:
        """The model's evaluations on test and validation images, None where the settings want none."""
        server = self.federation.settings.server
        if server_round % server.evaluate_every and server_round != server.rounds:
            return None, None
        federation = self.federation
        return evaluate_on_both(federation.model, federation.dataset, federation.device)

    def _save(self, progress: Progress) -> None:
        settings = self.federation.settings
        save_checkpoint(
            self.folder.checkpoints,
            progress.round,
            self.federation.model.state_dict(),
            asdict(progress) | {"strategy": self._state()},
            settings.kept(),
            self._arrays(),
            keep=settings.server.keep_checkpoints,
            class_names=self.federation.dataset.class_names,
        )

    def _resume(self) -> Progress:
        progress = Progress(0, 0.0, (0,) * self.federation.settings.partition.clients)
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        if checkpoint is None:
            self.folder.truncate_after(0)
        else:
            self.federation.model.load_state_dict(checkpoint.arrays)
            self.folder.truncate_after(checkpoint.round)
            logger.info("going on after round %d", checkpoint.round)
            saved = {name: checkpoint.state[name] for name in asdict(progress)}
            flops, best = tuple(saved["client_flops"]), Best(**saved["best"])
            progress = Progress(**saved | {"client_flops": flops, "best": best})
            extra = {name: tensor.numpy() for name, tensor in checkpoint.extra_arrays.items()}
            self._restore(checkpoint.state["strategy"], extra)
        self._run_token = progress.run
        return progress

    def _state(self) -> dict[str, Any]:
        """What the strategy needs for a resume beside arrays, as JSON knows it."""
        return {}

    def _arrays(self) -> Arrays:
        """The arrays that the strategy needs for a resume beside the model."""
        return optimiser_arrays(self.inner)

    def _restore(self, state: Mapping[str, Any], arrays: Arrays) -> None:
        """Take back what `_state` and `_arrays` gave."""
        del state
        restore_optimiser(self.inner, arrays)

    def _stop_if_hopeless(self, server_round: int, clients: Sequence[ClientRow]) -> None:
        limit = self.federation.settings.server.max_failed_share
        reasons = [client.reason for client in clients if client.status in ("failed", "unfit")]
        if len(reasons) > limit * len(clients):
            raise RunError(
                f"round {server_round}: {len(reasons)} of {len(clients)} clients failed, more than "
                f"server.max-failed-share = {limit:g}; the last reason: {reasons[-1]}"
            )
