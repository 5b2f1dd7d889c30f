"""A run as its files tell of it, whatever their form: what reports compare and what is packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedfmd.cost import Cost
from fedfmd.report.wording import WORDINGS
from fedfmd.runs import ClientRow, EpochRow, RoundRow, stop_reason
from fedfmd.settings import Scalar, Settings

PATHS = frozenset({"data.dir", "data.train", "data.test", "fleet.devices-file", "fleet.trace"})
"""Settings that name files and folders of the machine that did the run."""

CLIENT_ACCURACIES = ("accuracy", "test_accuracy", "personal_test_accuracy")
"""Columns of clients.csv that a report shows by client, of the last round that has them."""


@dataclass(frozen=True, eq=False)
class Run:
    """A run as a report reads it.

    Attributes:
        folder: where it lies; of a packed run, where it would lie below the folder that it is packed in.
        settings: all of them.
        rounds: rows of rounds.csv, or of epochs.csv.
        clients: rows of clients.csv or clients.parquet, of these rounds; none if there are neither. If `packed`,
            those of the last round and the last one of each client with an accuracy, of each of `CLIENT_ACCURACIES`.
        label_counts: images, clients x classes; None if there is no partition.npz.
        environment: environment.json; empty if there is none.
        cut: percent of the clients' full work, images × kernels trained, that their plans left out; None if unknown.
        cost: what the network costs for one image; None if its data set is not on this machine (or wasn't where it was
            packed).
        packed: whether it was packed, without a folder of its own.
        task: how its data and their split differ from the other runs', such as `alpha 0.1`.
        variant: how it differs in all else but the seed, such as `fmdconv, kernels 2`.
        unlabelled: settings that differ as well but are left out of both, because the others tell the runs apart.
    """

    folder: Path
    settings: Settings
    rounds: tuple[RoundRow | EpochRow, ...]
    clients: tuple[ClientRow, ...] = ()
    label_counts: np.ndarray | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    cut: float | None = None
    cost: Cost | None = None
    packed: bool = False
    task: str = ""
    variant: str = ""
    unlabelled: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """All in which it differs from the other runs, the seed aside."""
        return ", ".join(filter(None, (self.variant, self.task))) or "all runs"

    @property
    def machine(self) -> str:
        """The machine that made it, such as "AMD EPYC (AVX512), 2 cores"; "" if that was not kept."""
        known = self.environment.get("machine")
        if not known:
            return ""
        capability = f" ({known['capability']})" if "capability" in known else ""
        gpu = f", {known['gpu']}" if known.get("gpu") else ""
        return f"{known.get('processor')}{capability}, {known.get('cores')} cores{gpu}"

    @property
    def identity(self) -> tuple[tuple[str, Scalar], ...]:
        """All settings that its files keep: runs that have them in common are the same run, made once more."""
        return tuple(self.settings.kept().items())

    @property
    def conv(self) -> str:
        """Its convolution."""
        return self.settings.model.conv

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.settings.seed

    @property
    def started(self) -> bool:
        """Whether there is a round, or an epoch, whose accuracy is known."""
        return any(row.accuracy is not None for row in self.rounds)

    @property
    def finished(self) -> bool:
        """Whether it did all its rounds, or met a limit of ``server.stop-at``."""
        return self.rounds[-1].round >= self.settings.length or bool(
            stop_reason(self.settings.stop_limits, self.rounds)
        )

    @property
    def progress(self) -> str:
        """How far it is, such as `3 of 20 rounds`."""
        return f"{self.rounds[-1].round} of {self.settings.length} {WORDINGS[self.settings.kind].unit}s"


def common_settings(kept: Sequence[Mapping[str, Scalar]]) -> dict[str, Scalar]:
    """Return what is in all of the settings that runs' files keep, with the same value, in the order of the first."""
    first, *others = kept
    return {
        key: value for key, value in first.items() if all(key in one and one[key] == value for one in others)
    }
