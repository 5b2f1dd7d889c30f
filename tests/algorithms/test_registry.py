import sys
from types import SimpleNamespace

import pytest
from flwr.serverapp.strategy import FedMedian

from fedfmd.algorithms import ALGORITHMS, Algorithm, find_algorithm
from fedfmd.build import own_sources
from fedfmd.errors import SettingsError

FIVE = {"partition.clients": 5, "fleet.devices": "pi-4"}


class Mine(FedMedian):
    """A user's strategy."""


class Toy(Algorithm):
    """Has no name."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_name_is_found(tiny_settings, name):
    prox = {"train.proximal-mu": 0.1} if name in ("fedprox", "feddyn") else {}
    settings = tiny_settings(**FIVE, **prox, **{"server.strategy": name})
    assert type(find_algorithm(settings)) is ALGORITHMS[name]
    assert find_algorithm(settings).settings == settings


def test_each_file_of_the_folder_is_known():
    assert sorted(ALGORITHMS) == [
        *(
            "fedadagrad",
            "fedadam",
            "fedavg",
            "fedavgm",
            "fedbn",
            "fedbuff",
            "feddyn",
            "fedmedian",
            "fednova",
            "fedprox",
        ),
        *("fedtrimmedavg", "fedyogi", "krum", "multikrum"),
    ]


def test_a_class_of_ones_own_gets_every_update_in_a_message(tiny_settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(Mine=Mine))
    algorithm = find_algorithm(tiny_settings(**{"server.strategy": "mine:Mine"}))
    assert isinstance(algorithm.strategy(), Mine)
    assert algorithm.separate


def test_the_file_of_a_class_of_ones_own_is_known(tiny_settings, tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(
        "from flwr.serverapp.strategy import FedAvg\nclass Mine(FedAvg): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert own_sources(tiny_settings(**{"server.strategy": "users:Mine"})) == (tmp_path / "users.py",)
    assert own_sources(tiny_settings()) == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server.strategy": "fedavgn"}, r"server\.strategy = 'fedavgn': .*fedavg"),
        ({"server.strategy": "nowhere:Mine"}, r"'nowhere:Mine' can't be imported .*PYTHONPATH"),
        ({"server.strategy": "math:Mine"}, r"'math:Mine' can't be imported"),
        ({"server.strategy": "math:pi"}, r"must be a class that derives from Flower's FedAvg"),
        (
            {"server.trim": 0.3},
            r"server\.trim = 0\.3 has no effect with server\.strategy = fedavg: .*trimmed",
        ),
        ({"server.strategy": "fedprox"}, r"needs train\.proximal-mu > 0"),
        ({"server.strategy": "feddyn"}, r"needs train\.proximal-mu > 0, its α"),
        (
            {"server.strategy": "krum", "server.byzantine": 2},
            r"server\.byzantine = 2: krum needs more than 6",
        ),
        (
            {"server.strategy": "fedbuff", "server.buffer": 9},
            r"server\.buffer = 9 must not exceed the 5 clients",
        ),
    ],
)
def test_what_cannot_be_used_is_named(tiny_settings, changes, message):
    with pytest.raises(SettingsError, match=message):
        find_algorithm(tiny_settings(**FIVE, **changes))
