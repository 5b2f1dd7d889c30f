import multiprocessing
import re
import sys

import pytest
import torch

from fedfmd.algorithms import find_algorithm
from fedfmd.build import build_model, own_sources
from fedfmd.conv import FMDConv2d
from fedfmd.errors import SettingsError
from fedfmd.experiment import load_experiment
from fedfmd.own_code import FOLDER, find, look_in, sources_of
from fedfmd.run_folder import open_run_folder, run_path
from fedfmd.runs import code_digest

MINE = """
from torch import nn

def make(classes, image_size, conv, norm, channels=8):
    flat = nn.Linear(channels * image_size**2, classes)
    return nn.Sequential(conv(3, channels, 3, padding=1), norm(channels), nn.Flatten(), flat)

def wrong(classes, image_size, conv, norm):
    return nn.Flatten()

def nothing(**given):
    pass
"""


@pytest.fixture(autouse=True)
def clean_path(monkeypatch):
    """Where modules are looked for, as it was before the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(FOLDER, "")


@pytest.fixture
def mine(tmp_path):
    """A folder with a user's module `mine`, which is found there as long as the test runs."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    look_in(folder)
    yield folder
    sys.modules.pop("mine", None)
    code_digest.cache_clear()


@pytest.fixture
def own(tiny_settings, mine):
    """Makes settings of a run of the user's network."""

    def make(**changes):
        return tiny_settings(**{"model.arch": "mine:make", "model.width": 1.0} | changes)

    return make


def test_code_beside_an_experiment_file_is_found_here_and_in_other_processes(write_yaml, tmp_path):
    (tmp_path / "beside_it.py").write_text("RATE = 0.5\n")
    load_experiment(write_yaml())
    assert find("a.setting", "beside_it:RATE") == 0.5
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(find, ("a.setting", "beside_it:RATE")) == 0.5


def test_no_file_there_hides_a_library(tmp_path):
    (tmp_path / "wave.py").write_text("class Wave_read: own = True\n")
    look_in(tmp_path)
    assert not hasattr(find("a.setting", "wave:Wave_read"), "own")


def test_the_file_of_own_code_is_known(mine):
    assert sources_of(find("model.arch", "mine:make")) == (mine / "mine.py",)


def test_a_strategy_may_stand_beside_the_experiment_file(write_yaml, tmp_path):
    (tmp_path / "strategy_beside_it.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg): pass\n"
    )
    file = write_yaml(**{"server.strategy": "strategy_beside_it:Mine"})
    settings = load_experiment(file).runs[0].settings
    find_algorithm(settings)
    assert own_sources(settings) == (tmp_path / "strategy_beside_it.py",)


def test_an_own_network_gets_what_the_settings_say(own):
    settings = own(**{"model.options": {"channels": 16}, "model.norm": "group", "temperature.initial": 7})
    model = build_model(settings, 5)
    assert isinstance(model[0], FMDConv2d)
    assert (model[0].kernels, model[0].out_channels, float(model[0].temperature)) == (2, 16, 7.0)
    assert isinstance(model[1], torch.nn.GroupNorm)
    assert (model[3].in_features, model[3].out_features) == (16 * 8 * 8, 5)
    assert model.training
    assert torch.equal(model[3].weight, build_model(settings, 5)[3].weight)


@pytest.mark.parametrize("kind", ["federated", "centralised"])
def test_its_source_counts_as_code_of_the_run(kind, own, mine, tmp_path):
    settings = own(kind=kind).in_folder(tmp_path / "run")
    assert own_sources(settings) == (mine / "mine.py",)
    with open_run_folder(settings):
        pass
    run_path(settings)
    code_digest.cache_clear()
    (mine / "mine.py").write_text(f"{MINE}\n# changed")
    with pytest.raises(SettingsError, match="holds a run of other code"):
        run_path(settings)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"model.arch": "mine:mak"}, "model.arch = 'mine:mak' can't be imported (module 'mine' has no attribute 'mak'"),
        ({"model.arch": "nowhere:make"}, "'nowhere:make' can't be imported (No module named 'nowhere'): put "),
        ({"model.arch": ":make"}, "model.arch = ':make' can't be imported"),
        ({"model.arch": "mine:wrong"}, "must map images B×3×8×8 to logits B×10; one image gave (1, 192)"),
        ({"model.arch": "mine:nothing"}, "must return an nn.Module, and returned a NoneType"),
        ({"model.options": "chanels:16"}, "can't be called (got an unexpected keyword argument 'chanels'): it gets"),
        ({"model.width": 0.5}, "model.width = 0.5 has no effect with model.arch = 'mine:make': leave it out"),
        ({"model.arch": "resnet8", "model.options": "a:1"}, "model.options = 'a:1': model.arch = 'resnet8' has none"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_clear_line(changes, line, own):
    with pytest.raises(SettingsError, match=re.escape(line)):
        build_model(own(**changes), 10)
