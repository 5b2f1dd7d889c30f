import multiprocessing
import sys

import pytest

from fedfmd import plugins
from fedfmd.algorithms import make_algorithm
from fedfmd.experiment import load_experiment


@pytest.fixture(autouse=True)
def clean_path(monkeypatch):
    """Where modules are looked for, as it was before the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(plugins.FOLDER, "")


def test_code_beside_an_experiment_file_is_found_here_and_in_other_processes(write_yaml, tmp_path):
    (tmp_path / "beside_it.py").write_text("RATE = 0.5\n")
    load_experiment(write_yaml())
    assert plugins.find("a.setting", "beside_it:RATE") == 0.5
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(plugins.find, ("a.setting", "beside_it:RATE")) == 0.5


def test_no_file_there_hides_a_library(tmp_path):
    (tmp_path / "wave.py").write_text("class Wave_read: own = True\n")
    plugins.look_in(tmp_path)
    assert not hasattr(plugins.find("a.setting", "wave:Wave_read"), "own")


def test_a_strategy_may_stand_beside_the_experiment_file(write_yaml, tmp_path):
    (tmp_path / "strategy_beside_it.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg): pass\n"
    )
    file = write_yaml(**{"server.strategy": "strategy_beside_it:Mine"})
    own = make_algorithm(load_experiment(file).runs[0].settings)
    assert own.sources == (tmp_path / "strategy_beside_it.py",)
