"""A Ray cluster of two machines of a core each, both on this one; each has a home of its own."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from fedfmd.engines.cluster import (
    Cluster,
    Facts,
    Machine,
    _reason,
    cluster_address,
    facts_of,
    faults_of,
    join_cluster,
    keeps_states,
    share_out,
)
from fedfmd.engines.flower import free_port
from fedfmd.engines.probe import versions
from fedfmd.errors import SettingsError
from fedfmd.runs import WALL_COLUMNS, read_rounds

PROGRAMS = Path(sys.executable).parent


def machine(cpus=1.0, gpus=0.0, **said):
    return Machine("box (10.0.0.2)", cpus, gpus, versions() | said.pop("versions", {}), **said)


@pytest.mark.parametrize(
    ("given", "environment", "address"),
    [
        ("", "", ""),
        ("", "local", ""),
        ("", "10.0.0.1:6379", "10.0.0.1:6379"),
        ("auto", "", "auto"),
        ("head.lab:6379", "10.0.0.1:6379", "head.lab:6379"),
        ("[::1]:6379", "", "[::1]:6379"),
    ],
)
def test_the_address_is_the_given_one_or_that_of_the_environment(monkeypatch, given, environment, address):
    monkeypatch.setenv("RAY_ADDRESS", environment)
    assert cluster_address(given) == address


@pytest.mark.parametrize("address", ["ray://10.0.0.1:10001", "10.0.0.1", "head:port"])
def test_what_is_no_address_is_refused(monkeypatch, address):
    with pytest.raises(SettingsError, match=re.escape(f"--address = {address!r}: give HOST:PORT")):
        cluster_address(address)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(SettingsError, match=re.escape(f"RAY_ADDRESS = {address!r}: give HOST:PORT")):
        cluster_address("")


def test_compiled_mixing_matters_where_kernels_are_mixed(tiny_settings, monkeypatch):
    monkeypatch.setattr("fedfmd.engines.cluster.is_compiled", lambda: True)
    assert facts_of(tiny_settings()).compiled
    assert not facts_of(tiny_settings(**{"model.conv": "static"})).compiled
    assert not facts_of(tiny_settings(**{"model.mixing": "grouped"})).compiled


def test_where_nobody_listens_there_is_no_cluster(tiny_settings):
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(
        SettingsError, match=f"--address = {address}: no Ray cluster answers there .*ray start --head"
    ):
        join_cluster(address, [tiny_settings()], 0)


@pytest.mark.parametrize(
    ("machines", "on_gpus", "workers", "taken"),
    [
        ([machine(4), machine(2)], False, 0, (6, 0)),
        ([machine(4), machine(2)], False, 3, (3, 0)),
        ([machine(8, 2), machine(8, 1)], True, 0, (3, 1)),
        ([machine(8, 2), machine(8, 1)], True, 2, (2, 1)),
        ([machine(8, 1), machine(8, 1)], True, 4, (4, 0.5)),
        ([machine(8, 1), machine(8)], True, 3, (3, 0.3333)),  # the machine without a GPU gets none
    ],
)
def test_workers_have_a_core_each_and_share_the_gpus(machines, on_gpus, workers, taken):
    assert share_out("head:1", machines, on_gpus, workers) == Cluster("head:1", *taken)


@pytest.mark.parametrize(
    ("machines", "on_gpus", "workers", "fault"),
    [
        (
            [],
            False,
            0,
            "no machine with a core for a worker: add one, by `ray start --address=head:1 --num-cpus=N`",
        ),
        ([machine(4)], True, 0, "no machine with a core and a GPU .* or set device=cpu"),
        ([machine(4), machine(2)], False, 7, "--workers = 7, and the cluster at head:1 has a core for 6"),
        ([machine(2, 1)], True, 3, "--workers = 3, .* has a core and a GPU for 2"),
    ],
)
def test_a_cluster_without_room_is_refused(machines, on_gpus, workers, fault):
    with pytest.raises(SettingsError, match=fault):
        share_out("head:1", machines, on_gpus, workers)


def faults(said, run):
    return "; ".join(faults_of(said, [run], [facts_of(run)]))


def test_a_machine_must_have_the_same_versions_code_and_images(tiny_settings):
    run = tiny_settings()
    here = facts_of(run)
    assert faults(machine(facts=(here,)), run) == ""
    assert "box (10.0.0.2) has torch 2.1.0, this machine" in faults(machine(versions={"torch": "2.1.0"}), run)
    assert "has fedfmd none, this machine" in faults(machine(versions={"fedfmd": "none"}), run)
    assert "has other source files of fedfmd: copy" in faults(machine(facts=(Facts("?", here.images),)), run)
    other = machine(facts=(Facts(here.code, "?"),))
    assert "has other images for data.dataset = 'digits': copy this machine's files" in faults(other, run)
    other = machine(facts=(replace(here, compiled=not here.compiled),))
    assert "compiled the mixing of kernels, which changes the last digits" in faults(other, run)
    assert faults(machine(fault="no such file"), run) == "box (10.0.0.2): no such file"


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({}, ""),
        ({"server.strategy": "fedbn"}, "server.strategy = 'fedbn'"),
        ({"server.strategy": "feddyn", "train.proximal-mu": 0.1}, "server.strategy = 'feddyn'"),
        ({"transport.upload": "int8"}, "transport.upload = 'int8'"),
    ],
)
def test_clients_with_states_need_a_folder_that_all_machines_share(tiny_settings, changes, setting):
    run = tiny_settings(**changes)
    facts = (facts_of(run),)
    assert keeps_states(run) == setting
    assert faults(machine(facts=facts, shares=True), run) == ""
    assert bool(faults(machine(facts=facts, shares=False), run)) == bool(setting)


def test_only_flowers_engine_joins_a_cluster(tmp_path, write_yaml):
    done = fedfmd("run", write_yaml(), "--address", "head:1", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "only --engine flwr joins a Ray cluster" in done.stderr


def fedfmd(*words, **options):
    command = [PROGRAMS / "fedfmd", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@contextmanager
def ray_machine(home: Path, *words: str) -> Iterator[psutil.Process]:
    """A machine of a cluster, for as long as the block runs; `end` takes its power away."""
    home.mkdir()
    command = [PROGRAMS / "ray", "start", "--num-cpus=1", "--disable-usage-stats", "--block", *words]
    environment = os.environ | {"HOME": str(home)}
    with (home / "log.txt").open("w") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        while "--block" not in (told := (home / "log.txt").read_text()):
            assert process.poll() is None, told
            time.sleep(0.2)
        yield process
        if process.is_running():
            process.terminate()  # it then leaves the cluster in order
            process.wait(timeout=20)
    finally:
        end(process)


def end(process: psutil.Process) -> None:
    if process.is_running():
        for part in [*process.children(recursive=True), process]:
            part.kill()
        process.wait()


@pytest.fixture(scope="module")
def head():
    pytest.importorskip("ray")
    # Ray's sockets need a short path; one of its own also keeps others from finding this cluster.
    folder, port = Path(tempfile.mkdtemp(prefix="fedfmd-ray-")), free_port()
    words = ("--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder / 'ray'}")
    with ray_machine(folder / "home", *words):
        yield f"127.0.0.1:{port}"
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def second(head, tmp_path):
    with ray_machine(tmp_path / "second", f"--address={head}") as process:
        yield process


def rows_and_models(folder: Path, *ignored: str) -> tuple[list[list[dict[str, str]]], list[bytes]]:
    """The rows but for what real machines needed, and the models byte by byte."""
    tables = []
    for name in ("rounds.csv", "clients.csv"):
        with (folder / name).open(encoding="utf-8", newline="") as file:
            tables.append(
                [
                    {key: row[key] for key in row.keys() - WALL_COLUMNS - {*ignored}}
                    for row in csv.DictReader(file)
                ]
            )
    return tables, [path.read_bytes() for path in sorted((folder / "checkpoints").glob("*.safetensors"))]


@pytest.mark.slow
def test_a_run_on_a_cluster_is_that_of_one_machine(head, second, tmp_path, write_yaml):
    """Its clients keep states, and train with a loss from beside the experiment file."""
    loss = "def loss(logits, labels):\n    return 2 * torch.nn.functional.cross_entropy(logits, labels)\n"
    (tmp_path / "mine.py").write_text(f"import torch\n\n\n{loss}")
    file = write_yaml(**{"server.strategy": "fedbn", "server.rounds": 2, "train.loss": "mine:loss"})
    for place in (("--engine", "flwr", "--address", head), ("--workers", "2")):
        done = fedfmd("run", file, *place, "--out", tmp_path / place[0])
        assert done.returncode == 0, done.stdout + done.stderr
    assert rows_and_models(tmp_path / "--engine", "node") == rows_and_models(tmp_path / "--workers", "node")


@pytest.mark.slow
@pytest.mark.faults
def test_a_machine_that_dies_ends_the_run_and_the_same_command_goes_on(head, second, tmp_path, write_yaml):
    file = write_yaml(**{"server.rounds": 20, "partition.test-share": 0.2})
    words = ("run", file, "--engine", "flwr", "--address", head, "--out", tmp_path / "run")
    command = [PROGRAMS / "fedfmd", *map(str, words)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.stdout is not None
    assert any(re.match(r"round +2/", line) for line in run.stdout), "it ended before its second round"
    end(second)
    told = run.stdout.read()
    assert run.wait(timeout=120) == 1
    assert re.search(r"a Ray worker died \(\w+\), or its machine", told)
    assert 2 <= len(read_rounds(tmp_path / "run" / "rounds.csv")) < 20

    again = fedfmd(*words)  # on the machine that is left
    assert again.returncode == 0, again.stdout + again.stderr
    whole = fedfmd("run", file, "--workers", "2", "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert rows_and_models(tmp_path / "run", "node") == rows_and_models(tmp_path / "whole", "node")


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        (
            "[2026-11-27 C 12 12] worker.cc:837:  Check failed: connected\n*** StackTrace Information ***\n"
            "/lib/ray.so(+0x1b2f) [0x7f1d2] ray::Worker()\npython3(_start+0x21) [0x559d9] _start\n",
            "[2026-11-27 C 12 12] worker.cc:837: Check failed: connected",
        ),
        ("", "exit status -6"),
    ],
)
def test_the_reason_of_a_crash_is_no_frame_of_its_stack(stderr, reason):
    assert _reason(stderr, -6) == reason


@pytest.mark.slow
def test_what_a_machine_lacks_is_told_before_the_run(head, second, tmp_path, write_yaml, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME")
    for path in (home / "train.npz", tmp_path / "test.npz"):
        np.savez(path, images=np.zeros((20, 8, 8, 3), np.uint8), labels=np.arange(20) % 2)
    for changes, fault in (
        (
            {"transport.upload": "int8"},
            r"does not see .* with transport.upload = 'int8' .*set XDG_CACHE_HOME",
        ),
        (
            {"data.dataset": "npz", "data.train": "~/train.npz", "data.test": str(tmp_path / "test.npz")},
            r"data.train = .*second/train.npz: no such file",
        ),
    ):
        refused = fedfmd(
            "run", write_yaml(**changes), "--engine", "flwr", "--address", head, "--out", tmp_path / "run"
        )
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert re.search(fault, refused.stderr)
        assert not (tmp_path / "run").exists()
