"""Real runs tell of themselves, whatever their kind, and are not changed by it."""

import io
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from fedfmd.experiment import load_experiment, run_experiment
from fedfmd.runs import WALL_COLUMNS, EpochRow, RunFolder, read_clients, read_epochs, read_rounds

EXAMPLE = Path(__file__).parents[2] / "experiments" / "own" / "callback.yaml"
OWN = "own:Listener"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an experiment file without a page; gives the folder of its last run."""
    monkeypatch.setattr("fedfmd.experiment.run._write_page", lambda folder, anew=True: None)
    monkeypatch.setattr("fedfmd.experiment.run._compare", lambda folders, out, selection: "")
    monkeypatch.chdir(tmp_path)

    def run(file, *overrides, out="out"):
        console = Console(file=io.StringIO())
        return run_experiment(load_experiment(file, overrides), Path(out), "inline", 2, console)[-1]

    return run


def heard_rows(listener):
    return [event[1] for event in listener.heard if isinstance(event[0], int)]


def without_wall(rows):
    return [{name: value for name, value in asdict(row).items() if name not in WALL_COLUMNS} for row in rows]


@pytest.mark.parametrize("strategy", ["fedavg", "fedbuff"])
def test_a_federated_run_tells_its_rounds_and_stays_as_it_is(strategy, run, write_yaml, make_listener):
    listener = make_listener()
    file = write_yaml(**{"server.rounds": 2, "server.strategy": strategy})
    fewer = ["server.buffer=2"] if strategy == "fedbuff" else []
    alone = run(file, *fewer, out="alone")
    told = run(file, *fewer, f"tracking.loggers={OWN}", out="told")
    assert [row.round for row in heard_rows(listener)] == [1, 2]
    for read, name in ((read_rounds, "rounds.csv"), (read_clients, "clients.csv")):
        assert without_wall(read(told / name)) == without_wall(read(alone / name))
    end = listener.heard[-1][1]
    assert end.pictures == (told / "partition.png",)
    assert end.checkpoint == told / "checkpoints" / "round-00002.safetensors"


def test_a_centralised_run_that_was_stopped_tells_each_epoch_once(
    run, write_centralised, make_listener, monkeypatch
):
    listener = make_listener()
    file = write_centralised(**{"train.epochs": 3, "server.checkpoint-every": 2, "tracking.loggers": OWN})
    append = RunFolder.append_epoch

    def stop_after_three(folder, row):
        append(folder, row)
        if row.epoch == 3:
            raise KeyboardInterrupt  # before the checkpoint

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_epoch", stop_after_three)
        with pytest.raises(KeyboardInterrupt):
            run(file)
    folder = run(file)
    assert [event[0] for event in listener.heard] == ["started", 1, 2, 3, "ended", "started", "ended"]
    assert all(isinstance(row, EpochRow) for row in heard_rows(listener))
    assert [row.accuracy for row in heard_rows(listener)] == pytest.approx(
        [row.accuracy for row in read_epochs(folder / "epochs.csv")]
    )


def test_the_example_of_a_callback_runs(run, tmp_path):
    file = tmp_path / "callback.yaml"
    for name in (EXAMPLE.name, "callback.py"):
        shutil.copy(EXAMPLE.with_name(name), tmp_path)
    folder = run(file)
    rows = read_rounds(folder / "rounds.csv")
    lines = (folder / "progress.txt").read_text().splitlines()
    assert len(lines) == len(rows) == 3
    assert lines[-1].startswith(f"round 3: {rows[-1].accuracy:.1%}, client ")


def test_runs_of_a_matrix_are_told_of_in_their_own_processes(run, tmp_path):
    shutil.copy(EXAMPLE.with_name("callback.py"), tmp_path)
    file = tmp_path / "two.yaml"
    file.write_text(EXAMPLE.read_text() + "matrix: {seed: [0, 1]}\n")
    last = run(file, "server.rounds=1")
    for folder in (last, last.with_name("seed=0")):
        assert len((folder / "progress.txt").read_text().splitlines()) == 1
