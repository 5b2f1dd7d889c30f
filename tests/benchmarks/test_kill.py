"""The benchmark that kills runs: what it compares, and a real kill or two."""

import csv
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def kill(script):
    return script("kill")


@pytest.fixture
def folders(finished_runs, tmp_path):
    """Two copies of a finished run."""
    return [Path(shutil.copytree(finished_runs / "static-0", tmp_path / name)) for name in ("one", "two")]


def change(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_equal_runs_do_not_differ_whatever_time_they_took(kill, folders):
    one, two = folders
    change(two / "rounds.csv", "1,10,10,1,", "1,10,10,77,")
    (two / "log.txt").write_text("another")
    assert kill.differences(one, two) == []


@pytest.mark.parametrize(
    ("spoil", "differing"),
    [
        (lambda run: change(run / "rounds.csv", "1,10,10,1,", "1,11,10,1,"), ["rounds.csv"]),
        (lambda run: (run / "clients.csv").unlink(), ["clients.csv"]),
        (lambda run: (run / "partition.npz").write_bytes(b"no"), ["partition.npz"]),
        (lambda run: (run / "more").touch(), ["more"]),
    ],
    ids=["a row", "a file less", "bytes", "a file more"],
)
def test_whatever_else_differs_is_named(kill, folders, spoil, differing):
    one, two = folders
    spoil(two)
    assert kill.differences(one, two) == differing


@pytest.mark.slow
@pytest.mark.faults
def test_a_run_that_is_killed_leaves_what_it_would_have_left(kill, tmp_path):
    out = tmp_path / "kill.csv"
    assert kill.main(["--cases", "int8", "--kills", "2", "--rounds", "3", "--out", str(out)]) == 0
    with out.open(newline="") as file:
        trials = list(csv.DictReader(file))
    assert sum(int(trial["kills"]) for trial in trials) == 2
    assert {trial["differing"] for trial in trials} == {""}
