"""What an algorithm may do: one class, and client and server do as it says."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from fedfmd.algorithms import ALGORITHMS, Algorithm
from fedfmd.algorithms.algorithm import mean
from fedfmd.build import build_federation
from fedfmd.client_app import app as client_app
from fedfmd.engines.inline import InlineGrid
from fedfmd.protocol.state import parameter_names
from fedfmd.runs import RunFolder, latest_checkpoint
from strategies import make_strategy


class Toy(Algorithm):
    """Clients don't learn but count their rounds and say so; the server adds up what they say, and counts too."""

    @contextmanager
    def training(self, local):
        hooks = [parameter.register_hook(torch.zeros_like) for parameter in local.model.parameters()]
        yield
        for hook in hooks:
            hook.remove()

    def update(self, local, trained, steps):
        rounds = self.rounds(local)
        return {
            name: torch.as_tensor(local.received[name]) + rounds
            if name in parameter_names(local.model)
            else tensor
            for name, tensor in trained.items()
        }

    def keep(self, local):
        return {"rounds": self.rounds(local)}

    @staticmethod
    def rounds(local):
        return local.own.get("rounds", torch.tensor(0)) + 1

    def init(self):
        return {"steps": 0, "sum": {"fc.bias": np.zeros(10, np.float32)}}

    def step(self, state, server_round, current, updates):
        said = mean(updates)
        total = state["sum"]["fc.bias"] + said["fc.bias"] - current["fc.bias"]
        return said, {"steps": state["steps"] + 1, "sum": {"fc.bias": total}}


@pytest.fixture
def run(tiny_settings, tmp_path, monkeypatch):
    """Runs the toy so many rounds; the strategy after them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(ALGORITHMS, "toy", Toy)

    def run(rounds):
        settings = tiny_settings(
            **{
                "server.strategy": "toy",
                "server.rounds": rounds,
                "model.conv": "static",
                "train.weight-decay": 0.0,
            }
        )
        strategy = make_strategy(build_federation(settings), RunFolder(tmp_path / "run"))
        with InlineGrid(client_app, settings.flat(), [{}]) as grid:
            strategy.run(grid)
        return strategy

    return run


def test_an_algorithm_is_all_that_client_and_server_need(run, tiny_settings):
    start = build_federation(tiny_settings(**{"model.conv": "static"})).model.fc.bias.detach()
    model = run(2).federation.model
    torch.testing.assert_close(model.fc.bias.detach(), start + 1 + 2)  # what clients kept counts


def test_its_states_go_on_after_a_resume(run):
    run(1)
    strategy = run(3)
    checkpoint = latest_checkpoint(strategy.folder.checkpoints)
    assert checkpoint.state["strategy"] == {"steps": 3}
    torch.testing.assert_close(checkpoint.extra_arrays["sum/fc.bias"], torch.full((10,), 1.0 + 2 + 3))
