"""The benchmark of simulators: what it makes of times, and that all systems do the same work."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "experiments" / "benchmarks"


@pytest.fixture(scope="module")
def simulator(script):
    return script("simulator")


def test_speeds_are_told_relative_to_the_bare_loop_around_each_start(simulator):
    work = replace(simulator.MODELS["cnn"], clients=20, rounds=4, workers=2)
    runs = (
        simulator.Run(first_s=7.0, rounds_s=(1.0, 2.0, 2.0), bare_s=1.6, peak=10**9),
        simulator.Run(first_s=9.0, rounds_s=(4.0, 4.0, 4.0), bare_s=3.2, peak=3 * 10**9),  # a slower machine
    )
    result = simulator.Result(work, runs)
    assert result.of_bare == pytest.approx(0.8)
    assert result.beyond_bare_s == pytest.approx(
        0.06
    )  # the median of 0.4 and 0.8 s, for 10 clients of a worker
    assert result.updates_per_s == pytest.approx(20 / 3)
    assert result.first_update_s == pytest.approx(8.0 - 3.0 + 0.3)
    assert result.peak_mb == 2000


def test_the_rounds_of_fedfmd_are_those_of_its_log(simulator, tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "2026-11-27 16:57:33,261 INFO 3 rounds of fedavg with all clients\n"
        "2026-11-27 16:57:37,739 INFO round 1/3  virtual 0.3 s\n"
        "2026-11-27 16:57:38,359 INFO round 2/3  virtual 0.6 s\n  a line of another form\n"
    )
    first, second = simulator.logged(log)
    assert second - first == pytest.approx(0.62)
    assert simulator.logged(tmp_path / "none.txt") == []


@pytest.mark.parametrize("name", ["cnn", "resnet8-fmdconv4"])
def test_fedfmd_trains_the_network_of_the_others(simulator, name, tmp_path, monkeypatch):
    from fedfmd.build import build_model
    from fedfmd.settings import Settings

    monkeypatch.syspath_prepend(str(BENCHMARKS / "simulators"))
    work = replace(simulator.MODELS[name], clients=2, rounds=2)
    settings = Settings.from_mapping(simulator.experiment(work, tmp_path, quiet=False))
    ours = build_model(settings, classes=10, image_size=work.size).state_dict()
    theirs = work.network().state_dict()
    assert [tensor.shape for tensor in ours.values()] == [tensor.shape for tensor in theirs.values()]


def test_a_client_takes_a_step_for_each_batch(simulator):
    work = replace(simulator.MODELS["cnn"], batch=4)
    steps = []
    model = work.network()
    model.register_forward_hook(lambda *_: steps.append(1))
    before = [p.clone() for p in model.parameters()]
    work.train(model, torch.randn(10, 3, 28, 28), torch.arange(10))
    assert len(steps) == 3
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.slow
def test_systems_are_measured_in_turn(tmp_path):
    out = tmp_path / "simulator.csv"
    command = [
        sys.executable,
        BENCHMARKS / "simulator.py",
        "--quick",
        "--systems",
        "bare",
        "fedfmd",
        "fedfmd-quiet",
        "pfl",
        "--out",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "without pfl: --pfl names the Python" in done.stdout
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["system"], row["rounds"]) for row in rows] == [
        ("cnn", "bare", "2"),
        ("cnn", "fedfmd", "2"),
        ("cnn", "fedfmd-quiet", "2"),
    ]
    assert all(float(row["updates_per_s"]) > 0 and float(row["peak_rss_mb"]) > 100 for row in rows)
