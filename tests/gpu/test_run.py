"""The script as it is called, at toy size on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu" / "run.sh"


def run(*arguments, **variables):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_a_part_that_fails_does_not_stop_the_next(tmp_path):
    done = run("--toy", tmp_path, PARTS="train graphs compiled layers", TRAIN="--networks static-1 magic-2")
    assert done.returncode == 1, done.stdout
    assert "run.sh: FAILED: train, in" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        *("compiled.csv", "graphs.csv", "layers.csv", "log.txt", "summary.txt", "train.csv")
    }
    summary = (tmp_path / "summary.txt").read_text()
    assert "static K=1: accuracy" in summary
    assert "magic K=2: failed: ValueError: conv = 'magic' is unknown" in summary
    assert "8×8×8, batch 4" in summary
    assert summary.count("resnet8 fmdconv K=4, batch 2, float32") == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_started(tmp_path):
    done = run(tmp_path / "out", DATA=str(tmp_path))
    assert done.returncode == 2
    assert "has no PyTorch that can use a GPU here; --toy tries the script on the CPU" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"PARTS": "check speed"},
            "PARTS = 'check speed': 'speed' is none of check, layers, networks, graphs, compiled, train",
        ),
        ({"LIMIT_S": "5m"}, "LIMIT_S = '5m': must be a whole number of seconds"),
    ],
)
def test_bad_variables_are_named(tmp_path, variables, message):
    done = run("--toy", tmp_path, **variables)
    assert done.returncode == 2
    assert message in done.stderr
