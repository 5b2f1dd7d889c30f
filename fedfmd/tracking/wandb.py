"""Weights & Biases: a run of the project ``tracking.project``; without a login, files for ``wandb sync``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import wandb

from fedfmd.runs import ClientRow, EpochRow, RoundRow
from fedfmd.tracking.callback import RunEnd, TrackedRun, numbers


class WandB:
    """Logs the settings as config, each row at the step of its round, the pictures, and the model as an artifact."""

    def run_started(self, run: TrackedRun) -> None:
        """Begin or resume the run of this id: offline if WANDB_MODE says so, or if nobody has logged in."""
        known = "WANDB_MODE" in os.environ or wandb.login(prompt=False, verify=False)
        self._run = wandb.init(
            project=run.settings.tracking.project,
            name=run.name,
            id=run.id,
            resume="allow",
            dir=run.folder,
            config=run.settings.kept(),
            mode=None if known else "offline",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._round = run.told

    def round_ended(self, row: RoundRow | EpochRow, clients: Sequence[ClientRow]) -> None:
        """Log the numbers, unless they are there since a crash."""
        self._round = row.round
        if row.round >= self._run.starting_step:
            self._run.log(numbers(row), step=row.round)

    def run_ended(self, end: RunEnd) -> None:
        """Add pictures and model."""
        pictures = {path.stem: wandb.Image(str(path)) for path in end.pictures}
        if pictures:
            self._run.log(pictures, step=self._round)
        if end.checkpoint:
            model = wandb.Artifact(f"model-{self._run.id}", type="model")
            model.add_file(str(end.checkpoint))
            self._run.log_artifact(model)
        self._run.finish(exit_code=1 if end.error else 0)
