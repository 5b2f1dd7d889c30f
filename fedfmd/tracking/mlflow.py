"""MLflow: a run of the experiment ``tracking.project``, at MLFLOW_TRACKING_URI or else in the current folder."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # as Flower's is off; mlflow reads it when imported

import mlflow
from mlflow.entities import Metric, Param, RunStatus

from fedfmd.runs import ClientRow, EpochRow, RoundRow
from fedfmd.tracking.callback import RunEnd, TrackedRun, numbers

TAG = "fedfmd.run"
ROUND = "round"
BATCH = 100
"""How many parameters, at most, MLflow's server takes at once."""


class MLflow:
    """Logs the settings as parameters, a metric for each number of a row, and files as artifacts."""

    def run_started(self, run: TrackedRun) -> None:
        """Find MLflow's run of the same id, or make one."""
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(run.settings.tracking.project).experiment_id
        found = self._client.search_runs([experiment], f"tags.`{TAG}` = '{run.id}'")
        ours = (
            found[0] if found else self._client.create_run(experiment, tags={TAG: run.id}, run_name=run.name)
        )
        self._id = ours.info.run_id
        self._last = int(ours.data.metrics.get(ROUND, 0))
        self._client.update_run(self._id, RunStatus.to_string(RunStatus.RUNNING))
        kept = run.settings.kept().items()
        params = [Param(key, str(value)) for key, value in kept if key not in ours.data.params]
        for start in range(0, len(params), BATCH):
            self._client.log_batch(self._id, params=params[start : start + BATCH])

    def round_ended(self, row: RoundRow | EpochRow, clients: Sequence[ClientRow]) -> None:
        """Log the numbers, unless they are there since a crash: MLflow would keep both."""
        if row.round <= self._last:
            return
        now = int(1000 * time.time())
        values = numbers(row) | {ROUND: float(row.round)}
        self._client.log_batch(
            self._id, [Metric(key, value, now, row.round) for key, value in values.items()]
        )

    def run_ended(self, end: RunEnd) -> None:
        """Add pictures and model."""
        for path in end.pictures:
            self._client.log_artifact(self._id, str(path))
        if end.checkpoint:
            self._client.log_artifact(self._id, str(end.checkpoint), "checkpoints")
        status = RunStatus.FAILED if end.error else RunStatus.FINISHED
        self._client.set_terminated(self._id, RunStatus.to_string(status))
