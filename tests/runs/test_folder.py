import json
import logging
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import fedfmd
from fedfmd.runs import (
    ClientRow,
    RoundRow,
    RunFolder,
    code_digest,
    read_clients,
    read_environment,
    read_rounds,
)
from fedfmd.runs.folder import environment

COSTS = {"train_flops": 1, "cum_train_flops": 1, "up_bytes": 1, "down_bytes": 1, "energy_j": 1.0}
PLAN = {"examples": 1, "steps": 1, "kernels": 4, "compute_s": 1.0, "down_s": 1.0, "up_s": 1.0, "total_s": 3.0}
ROUND = RoundRow(
    round=0, virtual_s=1.0, round_s=1.0, wall_s=1.0, clients_ok=2, clients_late=0, clients_failed=0, **COSTS
)
CLIENT = ClientRow(
    round=0, client=0, device="pi-4", status="failed", reason="naïve, “quoted”", **COSTS, **PLAN
)


def rows(round: int) -> tuple[RoundRow, list[ClientRow]]:
    return replace(ROUND, round=round), [replace(CLIENT, round=round, client=id) for id in (0, 1)]


def finished(path: Path, rounds: int) -> RunFolder:
    folder = RunFolder(path)
    for round in range(1, rounds + 1):
        folder.append_round(*rows(round))
    return folder


def content(folder: RunFolder) -> tuple[bytes, bytes]:
    return folder.rounds.read_bytes(), folder.clients.read_bytes()


def test_settings_keep_their_order_and_text(tmp_path):
    settings = {"model.conv": "fmdconv", "budget.deadline-s": None, "data.dir": "données"}
    folder = RunFolder(tmp_path / "new" / "run")
    folder.write_settings(settings)
    assert list(yaml.safe_load(folder.settings.read_text(encoding="utf-8")).items()) == list(settings.items())


def test_a_folder_that_cannot_be_made_names_the_setting(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run-dir = .*file/run can't be made: .*; give a folder"):
        RunFolder(tmp_path / "file" / "run")


def test_the_environment_says_what_ran_where_but_not_whose_it_is(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_environment()
    text = folder.environment.read_text()
    facts = json.loads(text)
    assert facts["versions"]["fedfmd"] == fedfmd.__version__
    assert facts["code"] == code_digest()
    assert set(facts["versions"]) == {"fedfmd", "python", "flwr", "numpy", "torch", "torchvision"}
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["threads"] >= 1
    assert str(Path.home()) not in text
    assert str(Path(fedfmd.__file__).parent) not in text


def test_the_environment_is_read_back_where_there_is_one(tmp_path):
    assert read_environment(tmp_path) == {}
    RunFolder(tmp_path).write_environment()
    assert read_environment(tmp_path) == environment()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_known_where_git_knows_the_package(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        user = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *user, *arguments], check=True, capture_output=True)

    file = tmp_path / "__init__.py"
    file.write_text("version = 1")
    monkeypatch.setattr("fedfmd.runs.folder.__file__", str(tmp_path / "runs" / "folder.py"))
    git("init")
    git("commit", "--allow-empty", "-m", "a project with the package in an environment of its own")
    assert environment()["commit"] is None
    git("add", ".")
    git("commit", "-m", "a checkout of the package")
    commit = environment()["commit"]
    assert len(commit) == 40
    file.write_text("version = 2")
    assert environment()["commit"] == f"{commit}-dirty"


def test_a_resumed_run_has_the_files_of_one_that_never_stopped(tmp_path):
    folder = finished(tmp_path / "stopped", 7)
    folder.truncate_after(4)
    for round in (5, 6, 7, 8):
        folder.append_round(*rows(round))
    assert content(folder) == content(finished(tmp_path / "straight", 8))


def test_a_run_killed_at_any_byte_of_a_round_goes_on_from_the_round_before(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _handle: None)  # hundreds of cuts, and no disk to wait for
    before = content(finished(tmp_path / "before", 2))
    whole = content(finished(tmp_path / "whole", 3))
    folder = RunFolder(tmp_path / "killed")
    new_rounds, new_clients = (len(new) - len(old) for new, old in zip(whole, before, strict=True))
    states = [(0, cut) for cut in range(new_clients + 1)] + [(cut, new_clients) for cut in range(new_rounds)]
    for rounds, clients in states:
        folder.rounds.write_bytes(whole[0][: len(before[0]) + rounds])
        folder.clients.write_bytes(whole[1][: len(before[1]) + clients])
        assert [row.round for row in read_rounds(folder.rounds)] == [1, 2]
        folder.truncate_after(2)
        assert content(folder) == before


def test_epochs_are_cut_as_rounds_are(tmp_path):
    folder = RunFolder(tmp_path)
    folder.epochs.write_text("epoch,accuracy\n1,0.5\n2,0.6\n3,0.")
    folder.truncate_after(2)
    assert folder.epochs.read_text() == "epoch,accuracy\n1,0.5\n2,0.6\n"


def test_a_run_killed_in_its_first_round_starts_afresh(tmp_path):
    folder = RunFolder(tmp_path)
    folder.clients.write_text("round,cli")
    folder.truncate_after(0)
    folder.append_round(*rows(1))
    assert [row.client for row in read_clients(folder.clients)] == [0, 1]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_on_a_full_disk_the_error_says_so_and_finished_rounds_stay(tmp_path):
    folder = finished(tmp_path, 2)
    rounds = folder.rounds.read_bytes()
    folder.clients.unlink()
    folder.clients.symlink_to("/dev/full")
    with pytest.raises(
        OSError, match=r"cannot write .*clients\.csv: No space left on device; .* then resume"
    ):
        folder.append_round(*rows(3))
    assert folder.rounds.read_bytes() == rounds


def test_the_log_is_continued(tmp_path):
    folder = RunFolder(tmp_path)
    for message in ("started", "resumed"):
        handler = folder.log_handler()
        handler.emit(logging.makeLogRecord({"msg": message, "levelname": "INFO"}))
        handler.close()
    first, second = folder.log.read_text().splitlines()
    assert first.endswith("INFO started")
    assert second.endswith("INFO resumed")
