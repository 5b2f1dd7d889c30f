import io
from pathlib import Path

import pytest
from rich.console import Console

from fedfmd.errors import SettingsError
from fedfmd.experiment import available_cores, load_experiment, run_experiment
from fedfmd.tracking import read_clients, read_epochs, read_rounds


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an experiment file in an empty folder; gives the run folders and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(file, *overrides, out=None, engine="inline"):
        console = Console(file=io.StringIO(), width=200)
        folders = run_experiment(load_experiment(file, overrides), out, engine, 2, console)
        return folders, console.file.getvalue()

    return run


def test_a_run_prints_a_line_per_round_and_leaves_its_files(run, write_yaml, tmp_path):
    (folder,), text = run(write_yaml(**{"server.rounds": 2}), out=Path("results"))
    assert folder == tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoints",
        "clients.csv",
        "environment.json",
        "log.txt",
        "partition.npz",
        "partition.png",
        "report.html",
        "rounds.csv",
        "settings.yaml",
    }
    assert [row.round for row in read_rounds(folder / "rounds.csv")] == [1, 2]
    assert [(row.round, row.client, row.status) for row in read_clients(folder / "clients.csv")] == [
        (round, client, "ok") for round in (1, 2) for client in range(3)
    ]
    for line in ("resnet8 with fmdconv (K=2)", "round 1/2", "round 2/2", f"results: {folder}"):
        assert line in text


def test_a_finished_run_is_not_trained_again(run, write_yaml):
    file = write_yaml()
    ((first,), _), ((second,), text) = run(file), run(file)
    assert first == second
    assert "round 1/1" not in text
    assert len(read_rounds(first / "rounds.csv")) == 1


def test_a_centralised_run_leaves_its_epochs_and_goes_on(run, write_centralised):
    file = write_centralised()
    ((first,), text), ((second,), again) = run(file), run(file)
    assert first == second
    assert [row.epoch for row in read_epochs(first / "epochs.csv")] == [1, 2]
    assert "epoch 2/2" in text
    assert "epoch 2/2" not in again


@pytest.mark.parametrize(
    ("override", "engine", "message"),
    [
        ("seed=0", "flwr", "kind = centralised needs no Flower: leave out --engine flwr"),
        ("data.image-size=4", "inline", "data.image-size = 4: digits need at least 8"),
    ],
)
def test_a_centralised_run_is_checked_before_it_starts(override, engine, message, run, write_centralised):
    with pytest.raises(SettingsError, match=message):
        run(write_centralised(), override, out=Path("out"), engine=engine)
    assert not Path("out").exists()


@pytest.fixture
def started(monkeypatch):
    """Runs that would have been started: the engine and the run folder of each."""
    runs = []
    monkeypatch.setattr(
        "fedfmd.experiment.run.run_inline",
        lambda server, client, config, workers, threads: runs.append(("inline", config["run-dir"])),
    )
    monkeypatch.setattr(
        "fedfmd.experiment.run.run_flower",
        lambda config, workers, folder, on_line: runs.append(("flwr", config["run-dir"])),
    )
    return runs


@pytest.mark.parametrize("engine", ["inline", "flwr"])
def test_an_engine_runs_every_cell_in_a_folder_of_its_own(engine, run, started, write_yaml, tmp_path):
    folders, _ = run(write_yaml(matrix={"model.conv": ["static", "fmdconv"]}), engine=engine)
    assert [folder.parent for folder in folders] == [tmp_path / "runs" / "tiny"] * 2
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["conv=static", "conv=fmdconv"]
    assert started == [(engine, str(folder)) for folder in folders]


def test_several_runs_are_compared_beside_their_folders(run, write_yaml, tmp_path):
    folders, text = run(write_yaml(matrix={"seed": [0, 1]}), out=Path("study"))
    assert all((folder / "report.html").exists() for folder in folders)
    assert {path.name for path in (tmp_path / "study").iterdir() if path.is_file()} == {
        "report.html",
        "report.md",
        "report.csv",
        "curves.png",
    }
    assert text.splitlines()[-1] == f"report: {tmp_path / 'study'}"


def test_a_run_is_not_lost_because_its_page_fails(run, write_yaml, monkeypatch):
    def fail(folder):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("fedfmd.experiment.report.write_page", fail)
    (folder,), text = run(write_yaml())
    assert text.splitlines()[-1] == f"no report in {folder}: no fonts"
    assert len(read_rounds(folder / "rounds.csv")) == 1


def test_runs_with_other_settings_never_meet(run, started, write_yaml, tmp_path):
    file = write_yaml()
    ((first,), _), ((second,), _) = run(file), run(file, "seed=1")
    assert first != second
    assert first.parent == second.parent == tmp_path / "runs"
    assert first.name.startswith("tiny-")


@pytest.mark.parametrize(
    ("matrix", "out", "name"),
    [(None, Path("out"), "out"), (None, None, "own"), ({"seed": [0]}, None, "own/seed=0")],
)
def test_a_folder_is_chosen_by_out_or_run_dir(matrix, out, name, run, started, write_yaml, tmp_path):
    (folder,), _ = run(write_yaml(matrix=matrix, **{"run-dir": "own"}), out=out)
    assert folder == tmp_path / name


def test_all_cells_are_checked_before_the_first_one_starts(run, started, write_yaml):
    with pytest.raises(SettingsError, match=r"fleet\.devices names 3 devices, partition\.clients is 4"):
        run(write_yaml(matrix={"partition.clients": [3, 4]}))
    assert started == []


def test_there_is_a_core_to_run_on():
    assert available_cores() >= 1
