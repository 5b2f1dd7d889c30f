"""A federation's rounds on a fleet: sampling by seed, work plans, checks, virtual time, rows and checkpoints."""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedfmd.algorithms import Algorithm, Update
from fedfmd.build import Federation
from fedfmd.conv import has_temperature, set_temperature
from fedfmd.errors import RunError
from fedfmd.flower_compat import answered_id, dead_worker
from fedfmd.protocol.averaging import ExactMean
from fedfmd.protocol.compression import upload_bytes
from fedfmd.protocol.messages import (
    WEIGHT,
    Assignment,
    ClientResult,
    ClientScore,
    Reply,
    Scores,
    from_record,
    to_record,
)
from fedfmd.protocol.privacy import noise_generator
from fedfmd.protocol.state import (
    Arrays,
    first_non_finite,
    fixed_names,
    load,
    parameter_names,
    shared_arrays,
    variance_names,
)
from fedfmd.runs import (
    ClientRow,
    RoundRow,
    RunFolder,
    latest_checkpoint,
    read_rounds,
    save_checkpoint,
    stop_reason,
    stopped_by,
)
from fedfmd.seeds import derive_seed
from fedfmd.training import Best, Evaluation, evaluate_on_both, evaluation_of
from strategies.aggregation import aggregate, limit_updates
from strategies.lines import header_lines, round_text
from strategies.nodes import (
    Node,
    are_edge_devices,
    check_device,
    empty,
    exchange,
    meet_again,
    meet_nodes,
    on_edge_devices,
)
from strategies.planning import Planner, Round
from strategies.privacy import private_mean, spent
from strategies.replies import Terms, client_results, read_replies
from strategies.rows import client_rows, round_row, with_scores
from strategies.scores import model_scores, plan_tests

logger = logging.getLogger("fedfmd")


@dataclass(frozen=True)
class Progress:
    """Where a run is, beside its arrays: what a resume needs.

    `releases` counts by client what was made known under differential privacy; `run` names it among all runs.
    """

    round: int
    virtual_s: float
    client_flops: tuple[int, ...]
    releases: tuple[int, ...]
    best: Best = field(default_factory=Best)
    run: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class Origin:
    """The arrays that a message carried, which were the current ones `age` rounds ago."""

    arrays: Arrays
    age: int = 0


class TrackedStrategy(Strategy):
    """Runs an algorithm on a federation.

    `run` goes on from the newest checkpoint in the folder to the last round. In a ServerApp of one's own, Flower's
    `start` does all rounds anew, with the same rows, checkpoints and results:

        strategy.start(grid, strategy.initial_arrays, num_rounds=settings.server.rounds)

    The clients are those of `fedfmd.client_app`, which reads the same settings from the app's run config.
    Flower's hooks are the two halves of a round. Before it ends, a second message has several workers share the test
    of the model out among them, and the round's clients test it on what they hold out (``partition.test-share``). That
    costs neither virtual time nor energy nor counted bytes. A single node is not asked: the server tests.
    """

    def __init__(self, algorithm: Algorithm, federation: Federation, folder: RunFolder) -> None:
        self.algorithm = algorithm
        self._terms = _terms(algorithm, federation)
        self.federation = _without(federation, self._terms.private)
        self.folder = folder
        self.nodes: tuple[Node, ...] = ()
        self.results: dict[int, ClientResult] = {}
        nothing = (0,) * federation.settings.partition.clients
        self.progress = Progress(0, 0.0, nothing, nothing)
        self._state = algorithm.init()
        self._round = Round()
        self._limited: dict[int, str] = {}
        self._began = 0.0
        self._grid: Grid | None = None
        self._stopped = ""
        self._parameters = self._terms.parameters
        self._annealed = has_temperature(federation.model)

    @property
    def initial_arrays(self) -> ArrayRecord:
        """The federation's model, as its clients receive it."""
        return to_record(shared_arrays(self.federation.model))

    def summary(self) -> None:
        """Log what runs, on which fleet."""
        for line in header_lines(self.federation, own_data=are_edge_devices(self.nodes)):
            logger.info(line)

    def run(self, grid: Grid) -> Progress:
        """Train to the last round, from the newest checkpoint if the folder holds one.

        It ends earlier where a limit of ``server.stop-at`` is met.

        Raises:
            RunError: the nodes are not there, or more than ``server.max-failed-share`` of a round's clients failed.
        """
        server = self.federation.settings.server
        self._resume()
        self._stopped = stopped_by(self.folder.path, self._limits, self.progress.round)
        if self.progress.round < server.rounds and not self._stopped:
            self._meet(grid, resumed=self.progress.round > 0)
        self.summary()
        while self.progress.round < server.rounds and not self._stopped:
            server_round = self.progress.round + 1
            messages = self._begin_round(server_round, grid)
            self._finish_round(server_round, *exchange(grid, messages, server.round_timeout_s))
        if self._stopped:
            done = self.progress.round
            logger.info("the run ends after round %d of %d: %s", done, server.rounds, self._stopped)
        return self.progress

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample and plan the round's clients, who start from `arrays`; the messages for the nodes that have work.

        Raises:
            RunError: as `run`, or there are to be more rounds than the settings say, which schedules follow.
            ValueError: the arrays are not those of the federation's model.
        """
        del config  # the settings say it all
        if server_round > (rounds := self.federation.settings.server.rounds):
            raise RunError(
                f"round {server_round}, but server.rounds = {rounds}: start with num_rounds={rounds}"
            )
        if self._limits:
            raise RunError(
                "server.stop-at ends a run of `run`, and Flower's `start` does all rounds: leave it empty"
            )
        if server_round == 1:
            self.folder.truncate_after(0)
        load(self.federation.model, from_record(arrays))
        return self._begin_round(server_round, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and the number of images behind them; (None, None) if too few clients succeeded."""
        if not self._finish_round(server_round, list(replies)):
            return None, None
        images = sum(result.images for result in self.results.values() if result.ok)
        return self.initial_arrays, MetricRecord({WEIGHT: images})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing to combine."""
        return None

    def _begin_round(self, server_round: int, grid: Grid) -> list[Message]:
        """Plan the round; the messages that are to be sent."""
        self._grid = grid
        if are_edge_devices(self.nodes) or not self.nodes:
            self._meet(grid, resumed=bool(self.nodes))
        self._began = time.perf_counter()
        set_temperature(self.federation.model, self.federation.temperature.at(server_round - 1))
        self._round = self._plan_round(server_round, self.initial_arrays)
        return [request.message for request in self._round.requests]

    def _plan_round(self, server_round: int, arrays: ArrayRecord) -> Round:
        """Return the round's plans and the messages for its clients, who start from `arrays`."""
        return self._planner.plan_round(server_round, self.progress.virtual_s, arrays)

    @property
    def _planner(self) -> Planner:
        return Planner(self.federation, self.nodes, self.progress.run, self._separate)

    @property
    def _separate(self) -> bool:
        """Whether every client's update is needed on its own: for the algorithm, or to limit it."""
        settings = self.federation.settings
        limits = (
            settings.server.max_update_norm,
            settings.server.max_update_ratio,
            settings.privacy.clip_norm,
        )
        return self.algorithm.separate or any(limits)

    def _finish_round(
        self, server_round: int, replies: Sequence[Message], arrived: Mapping[str, float] | None = None
    ) -> bool:
        """Learn from the replies, evaluate, and keep everything; whether the model has changed.

        `arrived` tells after how many seconds each reply was there, by its request's id, if that was measured.
        """
        learnt = self._learn(server_round, replies)
        clients = self._client_rows(server_round, arrived or {})
        self.progress = replace(self.progress, releases=self._released(learnt))
        before, best = self._rows(), self.progress.best
        evaluations: tuple[Evaluation | None, Evaluation | None] = None, None
        row = self._round_row(server_round, clients, evaluations, best, discarded=not learnt)
        server = self.federation.settings.server
        last = server_round == server.rounds or bool(stop_reason(self._limits, [*before, row]))
        if last or server_round % server.evaluate_every == 0:
            evaluations, scores = self._test(server_round)
            best = best.or_later(*evaluations)
            clients = with_scores(clients, scores)
            row = self._round_row(server_round, clients, evaluations, best, discarded=not learnt)
        self._stopped = stop_reason(self._limits, [*before, row])
        flops = dict(enumerate(self.progress.client_flops)) | {c.client: c.cum_train_flops for c in clients}
        self.progress = replace(
            self.progress,
            round=server_round,
            virtual_s=row.virtual_s,
            best=best,
            client_flops=tuple(flops.values()),
        )
        self.folder.append_round(row, clients)
        if server_round % server.checkpoint_every == 0 or server_round == server.rounds or self._stopped:
            self._save()
        logger.info(round_text(row, server.rounds), extra={"round_row": row})
        for failed in (client for client in clients if client.status == "failed"):
            logger.warning("round %d: client %d failed: %s", server_round, failed.client, failed.reason)
        for number, remark in self._limited.items():
            logger.warning("round %d: client %d: %s", server_round, number, remark)
        self._stop_if_hopeless(server_round, clients)
        return learnt

    @property
    def _limits(self) -> Mapping[str, float]:
        return self.federation.settings.stop_limits

    def _rows(self) -> list[RoundRow]:
        """Return the rows of the rounds so far, as a resume reads them; none where nothing asks for them."""
        return read_rounds(self.folder.rounds) if self._limits and self.folder.rounds.exists() else []

    def _released(self, learnt: bool) -> tuple[int, ...]:
        """Count what this round has made known: the mean of all, or each update that a client may have sent."""
        clients = range(len(self.progress.releases))
        if self.federation.settings.privacy.mode == "central":
            known = set(clients) if learnt else set()
        else:
            known = {work.client for request in self._round.requests for work in request.assignments}
        return tuple(self.progress.releases[client] + (client in known) for client in clients)

    def _learn(self, server_round: int, replies: Sequence[Message]) -> bool:
        """Let the model take the algorithm's step; False if too few clients succeeded.

        Raises:
            RunError: a worker of Flower's simulation died, or the step gave no usable model.
        """
        current = shared_arrays(self.federation.model)
        server = self.federation.settings.server
        updates, self._limited = limit_updates(
            self.algorithm,
            self._updates(server_round, replies, current),
            self._parameters,
            server.max_update_norm,
            server.max_update_ratio,
        )
        enough = sum(result.ok for result in self.results.values()) >= max(1, self._round.needed)
        if enough and self.federation.settings.privacy.clip_norm:
            updates = [self._private_mean(server_round, updates, current)]
        if enough:
            new, self._state = aggregate(
                self.algorithm, self._state, server_round, updates, current, self._parameters
            )
            if broken := first_non_finite(new):
                raise self._diverged(server_round, f"NaN or infinite values in {broken}")
            load(self.federation.model, new)
        answered = {answered_id(reply) for reply in replies}
        empty([*replies, *(request.message for request in self._round.requests if request.id in answered)])
        return enough

    def _private_mean(self, server_round: int, updates: Sequence[Update], current: Arrays) -> Update:
        """Return the mean of the updates under differential privacy."""
        settings = self.federation.settings
        seed = derive_seed(settings.seed, "privacy", server_round)
        generator = noise_generator(seed, secret=are_edge_devices(self.nodes))
        return private_mean(updates, current, self._parameters, settings, generator)

    def _updates(self, server_round: int, replies: Sequence[Message], current: Arrays) -> list[Update]:
        """Check the replies, note what became of each client, and return the updates that can be used."""
        self._refuse_dead_worker(server_round, replies)
        asked = {request.id: request.assignments for request in self._round.requests}
        origins = {request: self._origin(work, current) for request, work in asked.items()}
        received = {request: origin.arrays for request, origin in origins.items()}
        terms = replace(self._terms, sizes=self.federation.sizes)
        answers = read_replies(replies, asked, received, terms)
        self.results = client_results(answers, asked)
        usable = [(a.request, a.reply) for a in answers if a.reply is not None and a.reply.arrays]
        if not self._separate:
            return self._mean([reply for _, reply in usable], current)
        nodes = {request.id: request.node for request in self._round.requests}
        updates = [
            Update(
                reply.arrays,
                reply.weights,
                reply.results,
                start=origins[request].arrays,
                age=origins[request].age,
                node=nodes[request],
            )
            for request, reply in usable
        ]
        return sorted(updates, key=lambda update: update.results[0].client)

    def _mean(self, replies: Sequence[Reply], current: Arrays) -> list[Update]:
        """Return the mean of all clients, in which it can't be seen who was trained with whom; none of none."""
        federation = self.federation
        mean = ExactMean(current, max(len(federation.dataset.train), sum(federation.sizes)))
        for reply in replies:
            mean.add(reply.arrays, reply.weights, reply.rest)
        results = tuple(result for reply in replies for result in reply.results if result.ok)
        arrays = mean.arrays()
        return [Update(arrays, mean.weights, results, start=current)] if arrays else []

    def _client_rows(self, server_round: int, arrived: Mapping[str, float]) -> list[ClientRow]:
        places = {node.id: node.rank for node in self.nodes}
        asked = [(request, work.client) for request in self._round.requests for work in request.assignments]
        ranks = {client: places[request.node] for request, client in asked}
        measured = asked if are_edge_devices(self.nodes) else []
        trips = {client: arrived[request.id] for request, client in measured if request.id in arrived}
        done = self.progress.client_flops
        return client_rows(server_round, self._round.plans, self.results, ranks, done, trips, self._limited)

    def _round_row(
        self,
        server_round: int,
        clients: Sequence[ClientRow],
        evaluations: tuple[Evaluation | None, Evaluation | None],
        best: Best,
        discarded: bool,
    ) -> RoundRow:
        temperature = self.federation.temperature.at(server_round - 1)
        return round_row(
            server_round,
            clients,
            *evaluations,
            self.federation,
            round_s=self._round.seconds,
            clients_cut=sum(plan.is_cut for plan in self._round.plans),
            discarded=discarded,
            temperature=temperature if self._annealed else None,
            virtual_s=self.progress.virtual_s,
            best_accuracy=best.known_accuracy,
            cum_train_flops=sum(self.progress.client_flops),
            wall_s=time.perf_counter() - self._began,
            epsilon=spent(self.federation.settings, max(self.progress.releases)),
        )

    def _meet(self, grid: Grid, resumed: bool) -> None:
        """Meet the nodes: all of them for a new run; later they come and go, and it does without the failed share."""
        settings, images = self.federation.settings, self.federation.dataset.format
        clients, server = settings.partition.clients, settings.server
        least = max(1, math.ceil((1 - server.max_failed_share) * clients)) if resumed else clients
        meet = partial(meet_again, self.nodes) if are_edge_devices(self.nodes) else meet_nodes
        self.nodes = meet(grid, images, clients, server.node_timeout_s, least, check_device(settings))
        self.federation = on_edge_devices(self.federation, self.nodes)

    def _origin(self, work: Sequence[Assignment], current: Arrays) -> Origin:
        """Return what these clients were sent."""
        del work
        return Origin(current)

    def _test(self, server_round: int) -> tuple[tuple[Evaluation, Evaluation | None], dict[int, ClientScore]]:
        """Test the model on test and validation images; have clients do so on what they hold out, if they do.

        Workers of a simulation share the run's images out, since they wait meanwhile; else the server tests.
        """
        federation = self.federation
        shared, scores = self._ask_for_scores(server_round)
        if shared.test:
            both = evaluation_of(shared.test), evaluation_of(shared.validation) if shared.validation else None
        else:
            both = evaluate_on_both(federation.model, federation.dataset, federation.device)
        for evaluation in both:
            if evaluation and not math.isfinite(evaluation.loss):
                raise self._diverged(server_round, f"a loss of {evaluation.loss}")
        return both, scores

    def _ask_for_scores(self, server_round: int) -> tuple[Scores, dict[int, ClientScore]]:
        """Return what the workers say of the run's images, nothing if they weren't asked, and the clients' scores.

        Clients are asked whose update came.
        """
        settings, came = self.federation.settings, dict[int, list[Assignment]]()
        if settings.partition.test_share:
            for request in self._round.requests:
                node = request.node
                came.setdefault(node, []).extend(a for a in request.assignments if self.results[a.client].ok)
        planned = plan_tests(self.nodes, came, self.federation.dataset)
        if not planned or self._grid is None:
            return Scores(), {}
        arrays = self.initial_arrays
        requests = [self._planner.testing(work, server_round, arrays) for work in planned]
        messages = [request.message for request in requests]
        replies, _ = exchange(self._grid, messages, settings.server.round_timeout_s)
        self._refuse_dead_worker(server_round, replies)
        asked = {request.id: work for request, work in zip(requests, planned, strict=True)}
        shared, scores, missing = model_scores(replies, asked)
        answered = {answered_id(reply) for reply in replies}
        empty([*replies, *(request.message for request in requests if request.id in answered)])
        for score in scores.values():
            if score.reason:
                logger.warning("round %d: no test of client %d: %s", server_round, score.client, score.reason)
        if missing and planned[0].parts:
            logger.warning("round %d: the server tests the model alone: %s", server_round, missing)
            return Scores(), scores
        return shared, scores

    def _refuse_dead_worker(self, server_round: int, replies: Iterable[Message]) -> None:
        """End the run where a worker of Flower's simulation, or its machine, died: from then on it fails all clients.

        Raises:
            RunError: one died.
        """
        if not are_edge_devices(self.nodes) and (fault := dead_worker(replies)):
            raise RunError(
                f"round {server_round}: a Ray worker died ({fault}), or its machine, and Flower does not replace it. "
                "Give the workers more memory or start fewer, then run the same command again: it does this round anew"
            )

    def _diverged(self, server_round: int, sign: str) -> RunError:
        """Make the error of a global model that can't be used; rows and checkpoints are those before its round."""
        server, train = self.federation.settings.server, self.federation.settings.train
        step = f"server.lr below {server.lr:g} or " if server.lr else ""
        return RunError(
            f"round {server_round}: training diverged, the new global model has {sign}; finished rounds are kept. "
            f"Choose {step}{train.steadier()}, and another run folder"
        )

    def _save(self) -> None:
        settings, kept = self.federation.settings, self._dump()
        arrays = {name: value for name, value in kept.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in kept.items() if name not in arrays}
        save_checkpoint(
            self.folder.checkpoints,
            self.progress.round,
            self.federation.model.state_dict(),
            asdict(self.progress) | {"strategy": plain},
            settings.kept(),
            arrays,
            keep=settings.server.keep_checkpoints,
            class_names=self.federation.dataset.class_names,
            records=self.folder.records,
        )

    def _resume(self) -> None:
        """Take up the newest checkpoint, if there is one, and drop the rows after it."""
        checkpoint = latest_checkpoint(self.folder.checkpoints)
        self.folder.truncate_after(checkpoint.round if checkpoint else 0)
        if checkpoint is None:
            return
        logger.info("going on after round %d", checkpoint.round)
        self.federation.model.load_state_dict(checkpoint.arrays)
        saved = {name: checkpoint.state[name] for name in asdict(self.progress)}
        by_client = {name: tuple(saved[name]) for name in ("client_flops", "releases")}
        self.progress = Progress(**saved | by_client | {"best": Best(**saved["best"])})
        arrays = {name: tensor.numpy() for name, tensor in checkpoint.extra_arrays.items()}
        self._restore(checkpoint.state["strategy"] | arrays)

    def _dump(self) -> dict[str, Any]:
        """Return what a resume needs beside the model and the progress, by name: arrays, and what JSON knows."""
        return dict(self.algorithm.dump(self._state))

    def _restore(self, kept: Mapping[str, Any]) -> None:
        """Take back what `_dump` gave."""
        self._state = self.algorithm.restore(kept)

    def _stop_if_hopeless(self, server_round: int, clients: Sequence[ClientRow]) -> None:
        limit = self.federation.settings.server.max_failed_share
        reasons = [client.reason for client in clients if client.status in ("failed", "unfit")]
        if len(reasons) > limit * len(clients):
            raise RunError(
                f"round {server_round}: {len(reasons)} of {len(clients)} clients failed, more than "
                f"server.max-failed-share = {limit:g}; the last reason: {reasons[-1]}"
            )


def _terms(algorithm: Algorithm, federation: Federation) -> Terms:
    """Return what the replies of the federation's clients are held against."""
    model = federation.model
    return Terms(
        sizes=federation.sizes,
        parameters=parameter_names(model),
        upload=federation.settings.transport.upload,
        private=algorithm.private(model),
        fixed=fixed_names(model),
        variances=variance_names(model),
    )


def _without(federation: Federation, private: Collection[str]) -> Federation:
    """Return the federation with uploads that lack these arrays, none of which is a bank's kernel."""
    model, upload = federation.model, federation.settings.transport.upload
    kept = {name: array for name, array in shared_arrays(model).items() if name in private}
    spared = upload_bytes(kept, upload, parameter_names(model))
    return replace(federation, upload_bytes=tuple(sent - spared for sent in federation.upload_bytes))
