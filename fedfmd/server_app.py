"""The Flower ServerApp: checks the settings, opens the run folder and lets the strategy run."""

from __future__ import annotations

import logging

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedfmd.build import Federation, build_federation
from fedfmd.data import save_partition
from fedfmd.errors import SettingsError, need
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.settings import Settings
from fedfmd.tracking import find_callbacks
from strategies import find_strategy, make_strategy

app = ServerApp()
logger = logging.getLogger("fedfmd")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one federation from its start, or from its newest checkpoint, to its last round.

    Raises:
        SettingsError: the settings can't be used; nothing was started.
        RunError: the run can't go on; finished rounds are kept.
    """
    settings = Settings.from_mapping(context.run_config)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    federation = prepare(settings)
    with open_run_folder(settings) as folder:
        strategy = make_strategy(federation, folder)
        dataset = federation.dataset
        save_partition(
            federation.partition, dataset.train.labels, dataset.classes, folder.path, dataset.class_names
        )
        progress = strategy.run(grid)
        chosen = " by validation" if dataset.validation else ""
        logger.info("%d rounds done, best accuracy%s %.4f", progress.round, chosen, progress.best.accuracy)
        logger.info("results: %s", folder.path)


def prepare(settings: Settings) -> Federation:
    """Assemble a run, with all the checks that can be made before anything is written.

    Raises:
        SettingsError: the settings can't be used, or their run folder holds another run.
    """
    if settings.kind != "federated":
        raise SettingsError(f"kind = {settings.kind!r} is not for Flower: use `fedfmd run FILE.yaml`")
    find_strategy(settings)
    find_callbacks(settings)
    if settings.clients_in_columns:
        need(f"server.csv-rows = {settings.server.csv_rows}, as this run has more,", "pyarrow")
    run_path(settings)
    return build_federation(settings)
