import csv
import io
import json
import os
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from fedfmd import build
from fedfmd.engines.cluster import Cluster
from fedfmd.errors import RunError, SettingsError
from fedfmd.experiment import available_cores, load_experiment, run_experiment
from fedfmd.experiment.pool import Started, attempt
from fedfmd.experiment.run import Layout, lay_out
from fedfmd.report.comparison import read_comparison
from fedfmd.runs import read_clients, read_epochs, read_rounds
from fedfmd.settings import Settings

CONVS = {"model.conv": ["static", "fmdconv"]}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an experiment file in an empty folder; gives the run folders and what was printed."""
    monkeypatch.chdir(tmp_path)

    def run(file, *overrides, out=None, engine="inline"):
        console = Console(file=io.StringIO(), width=200)
        folders = run_experiment(load_experiment(file, overrides), out, engine, 2, console)
        return folders, console.file.getvalue()

    return run


@pytest.fixture
def pools(monkeypatch):
    """Has jobs done in this process, as starting others takes seconds; lists the sizes of the pools asked for."""
    sizes = []

    def run_jobs(work, jobs, processes):
        sizes.append(processes)
        for job in jobs:
            yield job, Started()
            yield job, attempt(work, job)

    monkeypatch.setattr("fedfmd.experiment.run.run_jobs", run_jobs)
    return sizes


@pytest.fixture
def no_plots(monkeypatch):
    """Leaves pages empty and comparisons out, as drawing them takes seconds."""
    page = "fedfmd.report.writing.write_page"
    monkeypatch.setattr(page, lambda folder: (folder / "report.html").touch())
    monkeypatch.setattr("fedfmd.report.writing.write_report", lambda folders, out, selection: None)


def test_a_run_prints_a_line_per_round_and_leaves_its_files(run, write_yaml, tmp_path):
    (folder,), text = run(write_yaml(**{"server.rounds": 2}), out=Path("results"))
    assert folder == tmp_path / "results"
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
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


def test_the_example_of_an_own_network_runs_as_it_is(run, no_plots, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    example = Path(__file__).parents[2] / "experiments" / "own" / "network.yaml"
    (folder,), text = run(example, out=Path("results"))
    assert "network:make with fmdconv (K=2)" in text
    first, last = read_rounds(folder / "rounds.csv")
    assert first.accuracy < last.accuracy


def test_a_matrix_loads_the_images_of_a_seed_once(run, pools, started, write_yaml, monkeypatch):
    loads = []
    hold_out = build.hold_out
    monkeypatch.setattr(build, "hold_out", lambda *args: loads.append(args[2]) or hold_out(*args))
    build._with_validation.cache_clear()
    run(write_yaml(matrix=CONVS | {"seed": [0, 1]}, **{"data.validation": 0.2}))
    assert len(loads) == 2


@pytest.mark.parametrize("matrix", [None, CONVS])
def test_what_is_finished_is_neither_assembled_nor_trained_again(
    matrix, run, pools, no_plots, write_yaml, monkeypatch
):
    file = write_yaml(matrix=matrix)
    folders, _ = run(file)
    before = [(folder / "log.txt").read_bytes() for folder in folders]
    (folders[0] / "report.html").unlink()  # it was stopped just before its page
    monkeypatch.setattr("fedfmd.server_app.prepare", None)
    again, text = run(file)
    assert again == folders
    assert [(folder / "log.txt").read_bytes() for folder in folders] == before
    assert (folders[0] / "report.html").exists()
    for folder in folders:
        assert f"finished before: {folder}\n" in text


QUITTER = """
import sys
from flwr.serverapp.strategy import FedAvg

class Quitter(FedAvg):
    def aggregate_train(self, server_round, replies):
        return sys.exit() if server_round == 2 else super().aggregate_train(server_round, replies)
"""


def test_a_strategy_that_exits_fails_the_run(run, write_yaml, monkeypatch):
    Path("quitter.py").write_text(QUITTER)
    monkeypatch.syspath_prepend(Path.cwd())
    with pytest.raises(
        RunError,
        match=r"'quitter:Quitter': aggregate_train fails in quitter\.py, line 7: it calls sys\.exit",
    ):
        run(write_yaml(**{"server.rounds": 2}), "server.strategy=quitter:Quitter")


@pytest.mark.parametrize("matrix", [None, CONVS])
def test_a_run_that_ends_early_without_an_error_fails(matrix, run, pools, no_plots, write_yaml, monkeypatch):
    monkeypatch.setattr("fedfmd.engines.inline.serve", lambda *arguments: None)
    with pytest.raises(
        RunError, match="ended after round 0 of 1 without an error" if not matrix else "2 of 2 runs"
    ):
        run(write_yaml(matrix=matrix))


def delete_a_row(folder):
    rows = (folder / "rounds.csv").read_text().splitlines(keepends=True)
    (folder / "rounds.csv").write_text("".join([rows[0], *rows[2:]]))


def flip_a_byte(folder):
    file = next((folder / "checkpoints").glob("round-*2.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "fault"), [(delete_a_row, r"rounds\.csv"), (flip_a_byte, r"round-0*2\.safetensors")]
)
def test_what_has_changed_since_it_was_written_is_not_finished(change, fault, run, no_plots, write_yaml):
    """With one checkpoint there is none to go back to."""
    file = write_yaml(**{"server.rounds": 2, "server.checkpoint-every": 2})
    ((folder,), _) = run(file)
    change(folder)
    with pytest.raises(RunError, match=rf"no checkpoint can be used: .*{fault} is not as the run wrote it"):
        run(file)


def empty_the_mark(folder):
    (folder / "checkpoints" / "round-00002.json").write_bytes(b"")


@pytest.mark.parametrize("change", [flip_a_byte, empty_the_mark])
def test_the_round_of_a_changed_checkpoint_is_done_again(change, run, no_plots, write_yaml):
    file = write_yaml(**{"server.rounds": 2, "server.checkpoint-every": 1})
    ((folder,), _) = run(file)
    before = read_rounds(folder / "rounds.csv")
    change(folder)
    _, text = run(file)
    assert "round-00002.json is broken: " in text
    assert "going on after round 1" in text
    after = read_rounds(folder / "rounds.csv")
    assert [(row.round, row.loss) for row in after] == [(row.round, row.loss) for row in before]


@pytest.mark.parametrize("matrix", [None, CONVS])
def test_a_folder_of_other_code_is_refused_before_anything_starts(matrix, run, pools, no_plots, write_yaml):
    file = write_yaml(matrix=matrix)
    folder = run(file)[0][-1]
    environment = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(environment | {"code": "0123abcd"}))
    with pytest.raises(SettingsError, match=rf"^run-dir = {folder} .*0123abcd"):
        run(file)
    assert pools == ([2] if matrix else [])


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
        ("data.image-size=4", "inline", "data.image-size = 4: "),
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
    monkeypatch.setattr("fedfmd.experiment.run._check_end", lambda task: None)  # nothing is trained
    monkeypatch.setattr(
        "fedfmd.engines.inline.run_inline",
        lambda server, client, config, workers, threads, forked: runs.append(("inline", config["run-dir"])),
    )
    monkeypatch.setattr(
        "fedfmd.engines.flower.run_flower",
        lambda config, workers, folder, on_line, cluster: runs.append(("flwr", config["run-dir"])),
    )
    return runs


@pytest.mark.parametrize("engine", ["inline", "flwr"])
def test_an_engine_runs_each_run_in_a_folder_of_its_own(engine, run, pools, started, write_yaml, tmp_path):
    folders, _ = run(write_yaml(matrix=CONVS), engine=engine)
    assert pools == ([2] if engine == "inline" else [])
    assert [folder.parent for folder in folders] == [tmp_path / "runs" / "tiny"] * 2
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["conv=static", "conv=fmdconv"]
    assert started == [(engine, str(folder)) for folder in folders]


@pytest.mark.parametrize(
    ("runs", "engine", "layout"),
    [
        (1, "inline", Layout(runs=1, nodes=2, cores=6)),
        (5, "inline", Layout(runs=2, nodes=1, cores=1)),
        (1, "flwr", Layout(runs=1, nodes=2, cores=1)),
        (5, "flwr", Layout(runs=1, nodes=2, cores=1)),
    ],
)
def test_cores_go_to_the_nodes_of_one_run_or_to_several_runs(runs, engine, layout, monkeypatch):
    monkeypatch.setattr("fedfmd.experiment.run.available_cores", lambda: 6)
    assert lay_out(runs, engine, workers=2) == layout


def test_on_a_cluster_there_are_the_workers_that_it_has_room_for():
    cluster = Cluster("head:6379", workers=12)
    assert lay_out(5, "flwr", 2, cluster) == Layout(runs=1, nodes=12, cores=1, cluster=cluster)


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_number_of_threads_follows_from_the_number_of_workers(workers, monkeypatch):
    monkeypatch.setattr("fedfmd.experiment.run.available_cores", lambda: 6)
    layout = lay_out(1, "inline", workers)
    assert layout.threads(Settings()) == 1
    assert layout.threads(Settings(kind="centralised")) == 6
    assert layout.threads(Settings(threads=4)) == 4


@pytest.mark.parametrize("engine", ["inline", "flwr"])
def test_a_run_that_fails_does_not_stop_the_others(engine, run, pools, started, write_yaml, monkeypatch):
    def fail_static(*arguments):
        config = next(argument for argument in arguments if isinstance(argument, dict))
        if config["model.conv"] == "static":
            raise RunError("round 3: all clients failed")
        started.append(config["model.conv"])

    for name in ("inline.run_inline", "flower.run_flower"):
        monkeypatch.setattr(f"fedfmd.engines.{name}", fail_static)
    with pytest.raises(
        RunError, match=r"^1 of 2 runs failed \(.*\); finished rounds are kept, run the same command"
    ):
        run(write_yaml(matrix=CONVS), engine=engine)
    assert started == ["fmdconv"]


def test_several_runs_are_compared_beside_their_folders(run, pools, write_yaml, tmp_path):
    folders, text = run(write_yaml(matrix={"seed": [0, 1]}), out=Path("study"))
    assert all((folder / "report.html").exists() for folder in folders)
    assert {path.name for path in (tmp_path / "study").iterdir() if path.is_file()} == {
        "report.html",
        "report.md",
        "report.csv",
        "curves.png",
    }
    assert text.splitlines()[-1] == f"report: {tmp_path / 'study'}"


SELECT = {"over": "train.lr", "by": "validation", "seeds": [100]}
RATES = {"train.lr": [1e-6, 0.05], "seed": [0, 1]}  # the lower one learns nothing


def test_trials_come_first_and_then_the_runs_of_the_values_that_they_choose(
    run, pools, no_plots, write_yaml, tmp_path
):
    file = write_yaml(matrix=RATES, select=SELECT, **{"data.validation": 0.1, "model.conv": "static"})
    folders, text = run(file, out=Path("study"))
    names = ["seed=100,lr=1e-06", "seed=100,lr=0.05", "seed=0,lr=0.05", "seed=1,lr=0.05"]
    assert [folder.name for folder in folders] == names
    assert pools == [2, 2]
    assert (tmp_path / "study" / "select.json").exists()
    again, text = run(file, out=Path("study"))
    assert again == folders
    assert text.count("finished before") == 4


def test_a_trial_that_fails_leaves_the_choice_open(run, pools, no_plots, started, write_yaml, monkeypatch):
    def fail_slow(server, client, config, workers, threads, forked):
        if config["train.lr"] < 1e-3:
            raise RunError("round 1: all clients failed")

    monkeypatch.setattr("fedfmd.engines.inline.run_inline", fail_slow)
    with pytest.raises(
        RunError, match=r"^1 of 2 runs failed .* go on, without the values that can.t be trained with$"
    ):
        run(write_yaml(matrix=RATES, select=SELECT, **{"data.validation": 0.1}))
    assert pools == [2]


def test_a_run_is_not_lost_because_its_page_fails(run, write_yaml, monkeypatch):
    def fail(folder):
        raise RuntimeError("no\nfonts")

    monkeypatch.setattr("fedfmd.report.writing.write_page", fail)
    (folder,), text = run(write_yaml())
    assert text.splitlines()[-1] == f"no report in {folder}: RuntimeError: no fonts"
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


def test_all_runs_are_checked_before_the_first_one_starts(run, started, write_yaml):
    with pytest.raises(SettingsError, match=r"^fleet\.devices "):
        run(write_yaml(matrix={"partition.clients": [3, 4]}))
    assert started == []


def test_runs_that_would_share_a_folder_are_refused(run, started, write_yaml):
    with pytest.raises(SettingsError, match="matrix: two runs are called seed=1: give each value once"):
        run(write_yaml(matrix={"seed": [1, 0, 1]}))
    assert started == []


def test_runs_whose_settings_have_the_same_last_word_are_told_apart(run, started, write_yaml, tmp_path):
    matrices = [{"server.rounds": [7]}, {"temperature.rounds": [7]}]
    with pytest.raises(
        SettingsError,
        match=r"two runs are called rounds=7, which differ in temperature\.rounds, server\.rounds: vary these",
    ):
        run(write_yaml(matrix=matrices), out=tmp_path / "out")
    assert started == []


def test_there_is_a_core_to_run_on():
    assert available_cores() >= 1


def start(file, out, workers):
    """The command in a session of its own, as a terminal has it, on a matrix of four runs."""
    command = [Path(sys.executable).with_name("fedfmd"), "run", file, "--out", out, "--workers", str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def stop_after(run, rounds, stop):
    """Call `stop` after so many rounds; gives the exit status and stderr once all processes are gone."""
    assert len(list(islice((line for line in run.stdout if "| round " in line), rounds))) == rounds
    processes = psutil.Process(run.pid).children(recursive=True)
    assert processes
    stop(run.pid)
    _, error = run.communicate(timeout=300)
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive
    return run.returncode, error


def rows(folder):
    """The rows of all CSV files below but for the time that this machine needed."""
    tables = {}
    for path in folder.rglob("*.csv"):
        with path.open(encoding="utf-8", newline="") as file:
            tables[path.relative_to(folder)] = [
                {name: run for name, run in row.items() if name != "wall_s"} for row in csv.DictReader(file)
            ]
    return tables


@pytest.mark.slow
def test_a_matrix_that_is_stopped_and_killed_ends_as_if_it_had_not_been(write_yaml, tmp_path):
    file = write_yaml(matrix=CONVS | {"seed": [0, 1]}, **{"server.rounds": 5})
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    status, error = stop_after(start(file, stopped, 2), 3, lambda pid: os.killpg(pid, signal.SIGINT))
    assert status == 130
    assert error == "fedfmd: stopped; finished rounds are kept, run the same command again to go on\n"
    assert stop_after(start(file, stopped, 2), 9, lambda pid: os.kill(pid, signal.SIGKILL)) == (
        -signal.SIGKILL,
        "",
    )

    text, _ = start(file, stopped, 2).communicate(timeout=900)
    assert "finished before" in text
    assert "going on after round" in text
    _, error = start(file, whole, 1).communicate(timeout=900)
    assert error == ""
    assert len(rows(whole)) == 2 * 4 + 1
    assert rows(stopped) == rows(whole)


@pytest.mark.parametrize("matrix", [None, CONVS])
def test_a_run_that_met_its_limit_is_finished_for_runs_matrices_and_reports(matrix, run, pools, write_yaml):
    file = write_yaml(matrix=matrix, **{"server.rounds": 4, "server.stop-at": "accuracy=0.01"})
    folders, _ = run(file)
    for folder in folders:
        log = (folder / "log.txt").read_text()
        assert "the run ends after round 1 of 4: accuracy on the test images" in log
    before = [(folder / "rounds.csv").read_bytes() for folder in folders]
    _, again = run(file)
    assert again.count("finished before, accuracy on the test images, without any validation images,") == len(
        folders
    )
    assert [(folder / "rounds.csv").read_bytes() for folder in folders] == before
    comparison = read_comparison(folders)
    assert all(run.finished for run in comparison.runs)
    assert not any("Unfinished" in note for note in comparison.notes)


@pytest.mark.slow
def test_a_run_whose_node_is_killed_ends_with_one_line_and_goes_on(write_yaml, tmp_path):
    file = write_yaml(**{"server.rounds": 6, "fleet.devices": "pi-4:100%"})
    run, folder = start(file, tmp_path / "killed", 2), tmp_path / "killed"
    next(line for line in run.stdout if line.startswith("round "))
    psutil.Process(run.pid).children()[-1].kill()
    _, error = run.communicate(timeout=120)
    assert run.returncode == 1
    assert error.startswith("fedfmd: a node is gone, its process was killed")
    assert error.count("\n") == 1
    for place in (folder, tmp_path / "whole"):
        assert start(file, place, 2).wait(timeout=300) == 0
    assert rows(folder) == rows(tmp_path / "whole")
