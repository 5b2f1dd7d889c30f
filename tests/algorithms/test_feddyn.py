import numpy as np
import pytest
import torch
from torch import nn

from fedfmd.algorithms import LocalTraining, make_algorithm
from fedfmd.conv import FMDConv2d
from fedfmd.errors import SettingsError
from fedfmd.protocol.state import pack, wire_views

ALPHA, IMAGES = 0.5, (30, 10)
SHARPNESS, OPTIMA = (4.0, 1.0), (0.0, 1.0)


class Point(nn.Module):
    """One weight; a client's loss is sharpness / 2 · (w − optimum)²."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))


def descend(algorithm, model, received, own, client, steps=200, rate=0.1):
    """A client's round, as `fedfmd.client.round` does it: what it sends, and what it keeps."""
    model.w.data.copy_(torch.as_tensor(received["w"]))
    local, start = LocalTraining(model, received, own), model.w.detach().clone()
    with algorithm.training(local):
        for _ in range(steps):
            model.w.grad = None
            loss = (
                SHARPNESS[client] / 2 * (model.w - OPTIMA[client]) ** 2 + ALPHA / 2 * (model.w - start) ** 2
            )
            loss.backward()
            model.w.data -= rate * model.w.grad
    return {"w": model.w.detach().numpy().copy()}, algorithm.keep(local)


@pytest.mark.parametrize("present", [(0, 1), (0,)], ids=["all", "one by one"])
def test_clients_agree_on_the_optimum_of_their_common_loss(tiny_settings, update, present):
    """The clients' own optima are 0 and 1; that of 30 images of the first and 10 of the second is 1/13."""
    settings = tiny_settings(
        **{"server.strategy": "feddyn", "train.proximal-mu": ALPHA, "partition.clients": 2}
    )
    algorithm, model = make_algorithm(settings), Point()
    current, state, own = {"w": np.zeros(1, np.float32)}, algorithm.init(), [{}, {}]
    images = IMAGES if len(present) == 2 else (20, 20)  # by turns, each mean is of one client's images
    for round in range(120):
        updates = []
        for client in [(client + round) % 2 for client in present]:
            sent, own[client] = descend(algorithm, model, current, own[client], client)
            updates.append(update(sent, images=images[client]))
        current, state = algorithm.step(state, round, current, updates)
    weight = [share * sharpness for share, sharpness in zip(images, SHARPNESS, strict=True)]
    assert current["w"] == pytest.approx(np.dot(weight, OPTIMA) / sum(weight), abs=1e-3)


def test_every_kernel_is_bent_by_its_own_moves(tiny_settings):
    algorithm = make_algorithm(tiny_settings(**{"server.strategy": "feddyn", "train.proximal-mu": ALPHA}))
    model = nn.Sequential(FMDConv2d(4, 4, 3, kernels=2))
    received = pack(model)
    with torch.no_grad():
        wire_views(model)["0.bank.1"].add_(1.0)
    own = algorithm.keep(LocalTraining(model, received, {}))
    torch.testing.assert_close(own["0.bank.1"], torch.full_like(own["0.bank.1"], -1))
    assert own["0.bank.0"].eq(0).all()
    with algorithm.training(LocalTraining(model, received, own)):
        model[0].bank.sum().backward()
    torch.testing.assert_close(model[0].bank.grad.mean((1, 2, 3, 4)), torch.tensor([1, 1 + ALPHA]))
    model[0].bank.sum().backward()  # outside, gradients are as they are
    torch.testing.assert_close(model[0].bank.grad.mean((1, 2, 3, 4)), torch.tensor([2, 2 + ALPHA]))


@pytest.mark.parametrize("key", ["server.max-update-norm", "server.max-update-ratio", "budget.min-reports"])
def test_a_server_that_may_not_follow_the_clients_is_refused(tiny_settings, key):
    settings = tiny_settings(**{"server.strategy": "feddyn", "train.proximal-mu": ALPHA, key: 0.5})
    with pytest.raises(SettingsError, match=rf"{key} = 0.5 and server.strategy = feddyn: .* set {key}=0, or"):
        make_algorithm(settings).check()
