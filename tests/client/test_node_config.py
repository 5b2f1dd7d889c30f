from pathlib import Path

import pytest

from fedfmd.client.node_config import NodeConfig
from fedfmd.errors import SettingsError


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"partition-id": 1, "num-partitions": 4}, NodeConfig(rank=1, nodes=4)),
        ({"client": 3}, NodeConfig(client=3, rank=3)),
        (
            {"client": 0, "data": "/srv/a.npz", "device": "pi-5", "device-backend": "cpu"},
            NodeConfig(client=0, data=Path("/srv/a.npz"), device="pi-5", backend="cpu"),
        ),
    ],
    ids=["worker", "its share of the run's data", "own data"],
)
def test_what_a_node_is_told_at_its_start(config, expected):
    assert NodeConfig.from_mapping(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clients": 0}, "unknown key clients = 0; the nearest one is client"),
        ({"client": 0, "dta": "x.npz"}, "unknown key dta = 'x.npz'; the nearest one is data"),
        ({"client": "first"}, "client = 'first': must be a number from 0"),
        ({"client": -1}, "client = -1: must be a number from 0"),
        ({"client": True}, "client = True: must be a number from 0"),
        ({"data": "x.npz"}, "data = 'x.npz' needs client=N"),
    ],
)
def test_a_wrong_key_or_value_is_named(config, message):
    with pytest.raises(SettingsError, match=message):
        NodeConfig.from_mapping(config)
