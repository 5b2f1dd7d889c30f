"""The rows of a round for ``rounds.csv`` and ``clients.csv``: modelled costs beside measured results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any

from fedfmd.build import Federation
from fedfmd.cost import ies, rcs
from fedfmd.edge import WorkPlan
from fedfmd.protocol.messages import ClientResult, ClientScore
from fedfmd.runs import ClientRow, RoundRow, known
from fedfmd.training import Evaluation


def _names(of: type[ClientResult] | type[ClientScore] | type[ClientRow] | type[WorkPlan]) -> set[str]:
    return {field.name for field in fields(of)}


TOLD = sorted(_names(ClientResult) & _names(ClientRow) - _names(WorkPlan))
"""What a client measures under the name of its column; plans say the rest."""

SCORED = sorted(_names(ClientScore) & _names(ClientRow) - {"client", "reason"})
"""What it measures on images that it holds out."""


def client_rows(
    server_round: int,
    plans: Sequence[WorkPlan],
    results: Mapping[int, ClientResult],
    ranks: Mapping[int, int],
    client_flops: Sequence[int],
    trips: Mapping[int, float],
    remarks: Mapping[int, str] = MappingProxyType({}),
) -> list[ClientRow]:
    """One row per client of the round, in the order of `plans`.

    `results` holds the clients that were asked to train, `ranks` the node of each, `trips` the measured seconds
    between an edge device's message and its reply, `remarks` what was done to a client's update. A client that was
    never asked because its update would come too late, or because its device can't hold the model, has no result; if
    its plan was fine, its device has gone while it was at work.
    """
    return [
        _client_row(
            server_round,
            plan,
            results.get(plan.client.id),
            ranks.get(plan.client.id),
            client_flops[plan.client.id],
            trips.get(plan.client.id, math.nan),
            remarks.get(plan.client.id, ""),
        )
        for plan in plans
    ]


def with_scores(rows: Sequence[ClientRow], scores: Mapping[int, ClientScore]) -> list[ClientRow]:
    """Return the rows with what the clients that have a score measured on images that they hold out."""

    def columns(score: ClientScore) -> dict[str, Any]:
        return {name: known(getattr(score, name)) for name in SCORED}

    return [replace(row, **columns(scores[row.client])) if row.client in scores else row for row in rows]


def round_row(
    server_round: int,
    clients: Sequence[ClientRow],
    evaluation: Evaluation | None,
    validation: Evaluation | None,
    federation: Federation,
    *,
    round_s: float,
    clients_cut: int,
    discarded: bool,
    temperature: float | None,
    virtual_s: float,
    best_accuracy: float | None,
    cum_train_flops: int,
    wall_s: float,
    epsilon: float | None = None,
) -> RoundRow:
    """Return the row of a round of `round_s` virtual seconds, in which the work of `clients_cut` clients was cut.

    `evaluation` is that on the test images, None if the round's model was not evaluated, `validation` that on the
    validation images, if there are any.
    `best_accuracy` is that after the round, `virtual_s` and `cum_train_flops` are those before it; `discarded` if the
    model stayed as it was.
    A model without a mixture of kernels has neither temperature (None) nor kernel entropy (NaN).
    """
    train_flops = sum(client.train_flops for client in clients)
    latency_s = federation.mean_latency_s
    return RoundRow(
        round=server_round,
        virtual_s=virtual_s + round_s,
        round_s=round_s,
        wall_s=wall_s,
        best_accuracy=best_accuracy,
        validation_loss=validation.loss if validation else None,
        validation_accuracy=validation.accuracy if validation else None,
        temperature=temperature,
        clients_ok=_count(clients, "ok"),
        clients_late=_count(clients, "late"),
        clients_failed=_count(clients, "failed") + _count(clients, "unfit"),
        train_flops=train_flops,
        cum_train_flops=cum_train_flops + train_flops,
        up_bytes=sum(client.up_bytes for client in clients),
        down_bytes=sum(client.down_bytes for client in clients),
        energy_j=math.fsum(client.energy_j for client in clients),
        latency_s=latency_s,
        status="discarded" if discarded else "ok",
        clients_cut=clients_cut,
        epsilon=epsilon,
        **_scores(evaluation, round_s, latency_s),
    )


def _scores(evaluation: Evaluation | None, round_s: float, latency_s: float) -> dict[str, float | None]:
    """Return the columns that need an evaluation."""
    if evaluation is None:
        return {}
    return {
        "loss": evaluation.loss,
        "accuracy": evaluation.accuracy,
        "kernel_entropy": known(evaluation.kernel_entropy),
        "ies_train": ies(round_s, evaluation.accuracy),
        "rcs_train": rcs(evaluation.accuracy, round_s),
        "ies_infer": ies(latency_s, evaluation.accuracy),
        "rcs_infer": rcs(evaluation.accuracy, latency_s),
    }


def _client_row(
    server_round: int,
    plan: WorkPlan,
    result: ClientResult | None,
    rank: int | None,
    flops_before: int,
    trip_s: float,
    remark: str,
) -> ClientRow:
    status: str = plan.status
    reason = plan.reason or remark
    if result is not None and not result.ok:
        status, reason = "failed", result.reason
    elif result is None and status == "ok":
        status, reason = "failed", "its edge device has gone"
    return ClientRow(
        round=server_round,
        client=plan.client.id,
        node=rank,
        device=plan.client.device.name,
        status=status,
        reason=reason,
        examples=plan.examples,
        steps=plan.steps,
        kernels=plan.kernels,
        train_flops=plan.train_flops,
        cum_train_flops=flops_before + plan.train_flops,
        compute_s=plan.compute_s,
        down_s=plan.down_s,
        up_s=plan.up_s,
        total_s=plan.total_s,
        up_bytes=plan.up_bytes,
        down_bytes=plan.down_bytes,
        energy_j=plan.energy_j,
        latency_s=plan.latency_s,
        **_told(result, plan.latency_s, trip_s),
    )


def _told(result: ClientResult | None, latency_s: float, trip_s: float) -> dict[str, float | None]:
    """Return the columns that the client tells; one that failed tells how long it was at work."""
    if result is None:
        return {}
    if not result.ok:
        return {"wall_s": known(result.wall_s)}
    return {
        **{name: known(getattr(result, name)) for name in TOLD},
        "ies": ies(latency_s, result.accuracy),
        "rcs": rcs(result.accuracy, latency_s),
        "measured_transfer_s": known(trip_s - result.wall_s),
        "measured_latency_s": known(result.latency_s),
    }


def _count(clients: Sequence[ClientRow], status: str) -> int:
    return sum(client.status == status for client in clients)
