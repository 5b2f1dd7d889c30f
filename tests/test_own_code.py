import os
import re
import sys

import pytest
import torch

from fedfmd.build import build_model, network_sources
from fedfmd.conv import FMDConv2d
from fedfmd.errors import SettingsError
from fedfmd.own_code import find_in, load_own, sources_of
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


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a user's module `mine`, which is found there as long as the test runs."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.py").write_text(MINE)
    find_in(folder)
    yield folder
    sys.modules.pop("mine", None)
    code_digest.cache_clear()


@pytest.fixture
def own(tiny_settings, mine):
    """Makes settings of a run of the user's network."""

    def make(**changes):
        return tiny_settings(**{"model.arch": "mine:make", "model.width": 1.0} | changes)

    return make


def test_a_folder_is_found_last_by_this_process_and_its_children(mine):
    find_in(mine)
    assert (sys.path[-1], sys.path.count(str(mine)), os.environ["PYTHONPATH"]) == (str(mine), 1, str(mine))
    assert sources_of(load_own("model.arch", "mine:make")) == (mine / "mine.py",)


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
    assert network_sources(settings) == (mine / "mine.py",)
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
