"""What a person reads of a run: a short header and one line per round."""

from __future__ import annotations

from collections.abc import Sequence

from fedfmd.build import Federation, describe_network
from fedfmd.edge import Budget
from fedfmd.runs import RoundRow
from fedfmd.settings import Settings
from fedfmd.version import __version__
from strategies.privacy import sampling_rate


def header_lines(federation: Federation, own_data: bool = False) -> list[str]:
    """Say what runs, on which data and fleet, and how; `own_data` if the clients have images of their own."""
    settings = federation.settings
    server, partition = settings.server, settings.partition
    sizes, epochs = federation.sizes, settings.train.local_epochs
    split = "own data" if own_data else partition.scheme
    fleet = ", ".join(f"{count} {name}" for name, count in federation.fleet.counts.items())
    asked = f"{server.clients_per_round} clients" if server.clients_per_round else "all clients"
    network = describe_network(settings, federation.cost, federation.dataset)
    return [
        f"fedfmd {__version__}: {network}",
        f"{partition.clients} clients ({split}, {_range(sizes)} images each) on {fleet} "
        f"over {settings.fleet.link}",
        f"{server.rounds} rounds of {server.strategy} with {asked}, {epochs} local "
        f"{'epoch' if epochs == 1 else 'epochs'} of batch {settings.train.batch_size}; "
        f"policy {settings.budget.policy}, {_limits(federation.budget)}; "
        f"seed {settings.seed}",
        *([_privacy(settings)] if settings.privacy.clip_norm else []),
        *([f"starting from {federation.start}"] if federation.start else []),
    ]


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def round_text(row: RoundRow, rounds: int) -> str:
    """One round in one line."""
    cut = f" {row.clients_cut} cut" if row.clients_cut else ""
    return (
        f"round {row.round:>{len(str(rounds))}}/{rounds}  virtual {row.virtual_s:9.1f} s  {_scores(row)}"
        f"clients {row.clients_ok} ok {row.clients_late} late {row.clients_failed} failed"
        f"{cut}{'' if row.epsilon is None else f'  ε {row.epsilon:.3g}'}"
        f"{'  discarded' if row.status == 'discarded' else ''}"
    )


def _scores(row: RoundRow) -> str:
    if row.accuracy is None:  # the model was not tested
        return ""
    return (
        f"accuracy {row.accuracy:.4f}  loss {row.loss:7.4f}  IES {row.ies_train:8.2f} s  "
        f"RCS {row.rcs_train:8.5f} /s  "
    )


def _privacy(settings: Settings) -> str:
    """Say what ε rests upon."""
    privacy = settings.privacy
    sampled = (
        f"every client in a round with probability {sampling_rate(settings):g}, independently and unknown to others"
        if privacy.mode == "central"
        else "each client's own updates, whose server knows who sends them"
    )
    return (
        f"differential privacy, {privacy.mode}: updates clipped to an L2 norm of {privacy.clip_norm:g}, noise "
        f"multiplier {privacy.noise_multiplier:g}; ε at δ = {privacy.delta:g}, for {sampled}"
    )


def _limits(budget: Budget) -> str:
    limits = [
        f"{name} {limit:g} {unit}"
        for name, limit, unit in (
            ("deadline", budget.deadline_s, "s"),
            ("energy", budget.energy_j, "J"),
            ("upload", budget.up_bytes, "bytes"),
        )
        if limit is not None
    ]
    unheeded = " (unheeded)" if limits and budget.rules.waits else ""
    return ", ".join(limits) + unheeded or "no limits"
