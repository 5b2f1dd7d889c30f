"""A federated run on a fleet: sampling by seed, work plans, checks, virtual time, rows and checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedfmd.conv import set_temperature
from fedfmd.edge import WorkPlan, keep_first, plan_work, round_seconds
from fedfmd.errors import RunError
from fedfmd.federation import Federation
from fedfmd.seeds import derive_seed
from fedfmd.tracking import ClientRow, RunFolder, latest_checkpoint, save_checkpoint
from fedfmd.training import Evaluation, evaluate, learning_rate
from fedfmd.wire import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Instruction,
    from_record,
    load,
    pack,
    to_record,
    wire_views,
    write_instruction,
)
from strategies.aggregation import aggregate
from strategies.lines import header_lines, round_text
from strategies.nodes import Node, assign, has_boxes, meet_nodes, on_boxes
from strategies.replies import client_results, read_replies
from strategies.rows import client_rows, round_row

logger = logging.getLogger("fedfmd")

RETRY_S = 60.0
"""Virtual seconds until the server looks again where no client was there and no deadline is set."""


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its global arrays: what a resume needs."""

    round: int
    virtual_s: float
    best_accuracy: float
    client_flops: tuple[int, ...]


@dataclass(frozen=True)
class _Round:
    """A round between sending and aggregating: its plans, virtual seconds, and what each node was asked.

    At least `needed` updates must come, or it is void.
    """

    plans: list[WorkPlan]
    seconds: float
    asked: dict[int, tuple[Assignment, ...]]
    needed: int


class TrackedStrategy(Strategy):
    """Wraps a Flower strategy, which combines the parameters; everything around it happens here.

    `run` is the loop with rows, checkpoints and resume. The hooks follow Flower's `Strategy`.
    """

    def __init__(self, inner: FedAvg, federation: Federation, folder: RunFolder) -> None:
        self.inner = inner
        self.federation = federation
        self.folder = folder
        self.nodes: tuple[Node, ...] = ()
        self.results: dict[int, ClientResult] = {}
        self._round = _Round([], 0.0, {}, 0)
        views = wire_views(federation.model)
        self._shapes = {name: tuple(view.shape) for name, view in views.items()}
        self._parameters = _parameter_names(federation)
        self._annealed = any(name.endswith(".temperature") for name in views)

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
            self.nodes = meet_nodes(grid, settings.partition.clients, settings.server.node_timeout_s)
            self.federation = on_boxes(self.federation, self.nodes)
        self.summary()
        for server_round in range(progress.round + 1, settings.server.rounds + 1):
            progress = self._run_round(grid, server_round, progress)
        return progress

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample and plan the round's clients; one message per node that has work.

        `config` tells the virtual time at which the round starts, `virtual-s`.
        """
        settings, budget = self.federation.settings, self.federation.budget
        wanted = settings.server.clients_per_round or settings.partition.clients
        time_s = float(config.get("virtual-s", 0.0))
        clients = self._sample(server_round, time_s, budget.asked(wanted))
        plans = keep_first((self._plan(server_round, client) for client in clients), wanted)
        if plans:
            seconds = round_seconds(plans, budget, wanted)
        else:
            seconds = self.federation.fleet.idle_seconds(time_s, budget.deadline_s or RETRY_S)
        hands = assign(self.nodes, [plan for plan in plans if plan.status == "ok"])
        asked = {
            node: tuple(self._assignment(server_round, plan) for plan in hand) for node, hand in hands.items()
        }
        self._round = _Round(plans, seconds, asked, budget.needed(wanted))
        lr = learning_rate(
            settings.train.lr, settings.train.schedule, (server_round - 1) / settings.server.rounds
        )
        return [
            Message(
                write_instruction(
                    Instruction(
                        server_round,
                        lr,
                        self.federation.temperature.at(server_round - 1),
                        assignments,
                    ),
                    arrays,
                ),
                node,
                MessageType.TRAIN,
            )
            for node, assignments in asked.items()
        ]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies and combine what is usable; (None, None) if too few clients succeeded."""
        replies = list(replies)
        asked = self._round.asked
        answers = read_replies(replies, asked, self._shapes)
        self.results = client_results(answers, asked)
        messages = {message.metadata.src_node_id: message for message in replies}
        usable = [
            (messages[answer.node], answer.reply)
            for answer in answers
            if answer.reply is not None and answer.reply.arrays
        ]
        if sum(result.ok for result in self.results.values()) < self._round.needed:
            return None, None
        weight = sum(reply.weight for _, reply in usable)
        arrays = aggregate(self.inner, server_round, usable, pack(self.federation.model), self._parameters)
        return to_record(arrays), MetricRecord({"num-examples": weight})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates the global model."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to combine, as nobody was asked."""
        return None

    def _run_round(self, grid: Grid, server_round: int, progress: Progress) -> Progress:
        started = time.perf_counter()
        federation = self.federation
        model, settings = federation.model, federation.settings
        temperature = federation.temperature.at(server_round - 1)
        set_temperature(model, temperature)
        config = ConfigRecord({"virtual-s": progress.virtual_s})
        messages = self.configure_train(server_round, to_record(pack(model)), config, grid)
        timeout = settings.server.round_timeout_s
        replies = grid.send_and_receive(messages, timeout=timeout) if messages else []
        arrays, _ = self.aggregate_train(server_round, replies)
        if arrays is not None:
            load(model, from_record(arrays))
        evaluation = self._evaluate()
        ranks = {a.client: node.rank for node in self.nodes for a in self._round.asked.get(node.id, ())}
        clients = client_rows(server_round, self._round.plans, self.results, ranks, progress.client_flops)
        row = round_row(
            server_round,
            clients,
            evaluation,
            federation,
            round_s=self._round.seconds,
            void=arrays is None,
            temperature=temperature if self._annealed else None,
            virtual_s=progress.virtual_s,
            best_accuracy=progress.best_accuracy,
            cum_train_flops=sum(progress.client_flops),
            wall_s=time.perf_counter() - started,
        )
        flops = list(progress.client_flops)
        for client_row in clients:
            flops[client_row.client] = client_row.cum_train_flops
        progress = Progress(server_round, row.virtual_s, row.best_accuracy, tuple(flops))
        self.folder.append_round(row, clients)
        if server_round % settings.server.checkpoint_every == 0 or server_round == settings.server.rounds:
            self._save(progress)
        logger.info(round_text(row, settings.server.rounds), extra={"round_row": row})
        for failed in (client for client in clients if client.status == "failed"):
            logger.warning("round %d: client %d failed: %s", server_round, failed.client, failed.reason)
        self._stop_if_hopeless(server_round, clients)
        return progress

    def _sample(self, server_round: int, time_s: float, count: int) -> list[int]:
        """Clients of the round among those that are there, from (seed, round) alone."""
        federation = self.federation
        present = federation.fleet.present(server_round, time_s)
        generator = np.random.default_rng(derive_seed(federation.settings.seed, "sampling", server_round))
        return sorted(generator.choice(present, min(count, len(present)), replace=False).tolist())

    def _plan(self, server_round: int, client: int) -> WorkPlan:
        federation = self.federation
        owner = federation.fleet.clients[client]
        speed = federation.fleet.speed(server_round, owner)
        return plan_work(owner, federation.workload(client), federation.budget, speed)

    def _assignment(self, server_round: int, plan: WorkPlan) -> Assignment:
        """A client's kernels in rotation start one further with every round, and with every client."""
        client, budget = plan.client.id, self.federation.budget
        first = (server_round + client) % self.federation.cost.kernels
        if budget.kernel_choice == "attention":
            first = BY_ATTENTION
        return Assignment(client, plan.steps, plan.batch_size, plan.kernels, first)

    def _evaluate(self) -> Evaluation:
        federation = self.federation
        return evaluate(
            federation.model, federation.dataset.test, federation.dataset, device=federation.device
        )

    def _save(self, progress: Progress) -> None:
        settings = self.federation.settings
        save_checkpoint(
            self.folder.checkpoints,
            progress.round,
            self.federation.model.state_dict(),
            asdict(progress),
            settings.kept(),
            keep=settings.server.keep_checkpoints,
        )

    def _resume(self) -> Progress:
        start = Progress(0, 0.0, 0.0, (0,) * self.federation.settings.partition.clients)
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        if checkpoint is None:
            self.folder.truncate_after(0)
            return start
        self.federation.model.load_state_dict(checkpoint.arrays)
        self.folder.truncate_after(checkpoint.round)
        logger.info("going on after round %d", checkpoint.round)
        saved = {name: checkpoint.state[name] for name in asdict(start)}
        return Progress(**saved | {"client_flops": tuple(saved["client_flops"])})

    def _stop_if_hopeless(self, server_round: int, clients: Sequence[ClientRow]) -> None:
        limit = self.federation.settings.server.max_failed_share
        reasons = [client.reason for client in clients if client.status in ("failed", "unfit")]
        if any("ActorDiedError" in reason for reason in reasons):
            raise RunError(
                f"round {server_round}: a Ray worker died and Flower does not replace it; the run stops here. "
                "Give the workers more memory or start fewer, then run again to go on after this round"
            )
        if len(reasons) > limit * len(clients):
            raise RunError(
                f"round {server_round}: {len(reasons)} of {len(clients)} clients failed, more than "
                f"server.max-failed-share = {limit:g}; the last reason: {reasons[-1]}"
            )


def _parameter_names(federation: Federation) -> set[str]:
    """Names on the wire of what the optimiser trains, as opposed to buffers."""
    buffers = {name for name, _ in federation.model.named_buffers()}
    return {name for name in wire_views(federation.model) if name not in buffers}
