"""The flwr engine starts real Flower and Ray processes, so most of these tests take tens of seconds each."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from fedfmd.engines.flower import run_flower
from fedfmd.engines.inline import run_inline
from fedfmd.errors import RunError, SettingsError
from fedfmd.runs import read_clients, read_rounds
from fedfmd.settings import Settings

TINY = {
    "data.image-size": 8,
    "model.width": 0.25,
    "partition.clients": 3,
    "partition.scheme": "iid",
    "fleet.devices": "pi-4:2, phone:1",
    "train.local-epochs": 1,
    "server.rounds": 2,
}


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.mark.slow
def test_run_equals_the_inline_engine(tmp_path):
    from fedfmd.client_app import app as client_app
    from fedfmd.server_app import app as server_app

    before = children()
    lines: list[str] = []
    flower = Settings.from_mapping(TINY | {"run-dir": str(tmp_path / "flwr")})
    inline = Settings.from_mapping(TINY | {"run-dir": str(tmp_path / "inline")})

    run_flower(flower.flat(), 2, tmp_path / "flwr", lines.append)
    run_inline(server_app, client_app, inline.flat(), workers=3)

    assert any(line.startswith("results:") for line in lines)
    assert children() == before
    ours, theirs = (read_clients(tmp_path / name / "clients.csv") for name in ("inline", "flwr"))
    assert [replace(row, wall_s=0, node=0) for row in ours] == [
        replace(row, wall_s=0, node=0) for row in theirs
    ]
    models = [
        [path.read_bytes() for path in sorted((tmp_path / name / "checkpoints").glob("*.safetensors"))]
        for name in ("inline", "flwr")
    ]
    assert len(models[0]) == 2
    assert models[0] == models[1]


@pytest.mark.slow
def test_failing_server_app_is_an_error_with_its_reason(tmp_path):
    before = children()
    broken = Settings().flat() | {"model.conv": "fmdcnv"}
    with pytest.raises(RunError, match=r"model.conv = 'fmdcnv'.*did you mean 'fmdconv'"):
        run_flower(broken, 1, tmp_path, lambda line: None)
    assert children() == before


def test_without_ray_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("fedfmd.errors.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs ray: pip install 'fedfmd\[simulation\]'"):
        run_flower(Settings().flat(), 1, tmp_path, print)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_interrupt_leaves_no_process(tmp_path):
    file = tmp_path / "long.yaml"
    file.write_text(yaml.safe_dump({"base": TINY | {"server.rounds": 10_000}}))
    command = [Path(sys.executable).with_name("fedfmd"), "run", file, "--engine", "flwr", "--workers", "1"]
    run = subprocess.Popen(
        command,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    assert any(re.match(r"round +1/", line) for line in run.stdout), "it ended before its first round"
    started = psutil.Process(run.pid).children(recursive=True)
    assert any("raylet" in process.name() for process in started)

    run.send_signal(signal.SIGINT)
    _, error = run.communicate(timeout=60)

    assert run.returncode == 130
    assert "run the same command again" in error
    time.sleep(1)
    assert not [
        process for process in started if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]
    assert len(read_rounds(next(tmp_path.glob("runs/*/rounds.csv")))) >= 1


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_the_same_command_goes_on(tmp_path):
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump({"base": TINY | {"server.rounds": 15}}))
    fedfmd = Path(sys.executable).with_name("fedfmd")
    command = [fedfmd, "run", file, "--engine", "flwr", "--workers", "2", "--out", tmp_path / "run"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    assert any(re.match(r"round +1/", line) for line in run.stdout), "it ended before its first round"
    workers = [p for p in psutil.Process(run.pid).children(recursive=True) if "ClientAppActor" in _name(p)]
    assert len(workers) == 2
    workers[0].kill()
    told = run.stdout.read()
    assert run.wait(timeout=120) == 1
    assert "a Ray worker died (ActorDiedError)" in told
    done = read_rounds(tmp_path / "run" / "rounds.csv")
    assert {row.clients_failed for row in done} == {0}, "the round of the fault was counted"

    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    rounds = read_rounds(tmp_path / "run" / "rounds.csv")
    assert [row.round for row in rounds] == list(range(1, 16))
    assert {row.clients_failed for row in rounds} == {0}


def _name(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
