"""Flower's own loop, `Strategy.start`, in a ServerApp that a user of Flower writes."""

from dataclasses import asdict

import numpy as np
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp

from fedfmd.build import build_federation
from fedfmd.client_app import app as client_app
from fedfmd.engines.inline import run_inline
from fedfmd.errors import RunError
from fedfmd.protocol.messages import from_record
from fedfmd.protocol.state import pack
from fedfmd.runs import WALL_COLUMNS, RunFolder, latest_checkpoint, read_clients, read_rounds
from fedfmd.settings import Settings
from strategies import make_strategy


def server_app(folder, train):
    """A ServerApp that lets `train` do what it wants with the strategy and the grid."""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        federation = build_federation(Settings.from_mapping(context.run_config))
        train(make_strategy(federation, RunFolder(folder)), grid)

    return app


@pytest.fixture
def run_app(tiny_settings, tmp_path):
    """Runs such an app for two rounds, in a folder of this name; changes as dotted settings."""

    def run(name, train, **changes):
        settings = tiny_settings(**{"server.rounds": 2} | changes)
        run_inline(server_app(tmp_path / name, train), client_app, settings.flat())
        return RunFolder(tmp_path / name)

    return run


def rows(folder):
    made = [*read_rounds(folder.rounds), *read_clients(folder.clients)]
    return [{key: value for key, value in asdict(row).items() if key not in WALL_COLUMNS} for row in made]


@pytest.mark.parametrize(
    "changes",
    [
        {"server.strategy": "fedadam", "budget.policy": "kernels", "budget.kernels": 1},
        {"server.strategy": "fedbuff", "server.buffer": 2},
    ],
    ids=["fedadam", "fedbuff"],
)
def test_start_makes_the_same_rounds_as_run(run_app, changes):
    results = []
    start = lambda strategy, grid: results.append(strategy.start(grid, strategy.initial_arrays, num_rounds=2))  # noqa: E731
    theirs = run_app("start", start, **changes)
    ours = run_app("run", lambda strategy, grid: results.append((strategy.run(grid), strategy)), **changes)
    result, (_, strategy) = results
    arrays = from_record(result.arrays)
    assert all(np.array_equal(arrays[name], array) for name, array in pack(strategy.federation.model).items())
    assert rows(theirs) == rows(ours)
    assert result.train_metrics_clientapp.keys() == {1, 2}
    assert result.train_metrics_clientapp[1]["num-examples"] > 0
    assert latest_checkpoint(theirs.checkpoints).round == 2


def test_started_again_it_begins_anew(run_app):
    for _ in range(2):
        folder = run_app("again", lambda s, grid: s.start(grid, s.initial_arrays, num_rounds=2))
    assert [row.round for row in read_rounds(folder.rounds)] == [1, 2]


def test_more_rounds_than_the_schedules_are_made_for_are_refused(run_app):
    with pytest.raises(RunError, match=r"round 3, but server\.rounds = 2: start with num_rounds=2"):
        run_app("long", lambda s, grid: s.start(grid, s.initial_arrays, num_rounds=3))


def test_arrays_of_another_model_are_named(run_app):
    with pytest.raises(ValueError, match=r"array .* is missing"):
        run_app("other", lambda s, grid: s.start(grid, ArrayRecord({}), num_rounds=2))
