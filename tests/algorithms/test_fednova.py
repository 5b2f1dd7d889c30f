import numpy as np
import pytest
import torch

from fedfmd.algorithms.fednova import FedNova, effective_steps, scale
from fedfmd.errors import SettingsError

PARAMETERS = {"w"}


def state(w, running_var):
    return {"w": np.full(2, w, np.float32), "running_var": np.full(2, running_var, np.float32)}


def test_lengthening_stretches_the_way_of_parameters_only(update):
    before = update(state(1.0, 2.0))
    longer = scale(before, state(100.0, 1.0), PARAMETERS, 0.5)
    np.testing.assert_allclose(longer.arrays["w"], 100 - 0.5 * 99)
    np.testing.assert_allclose(longer.arrays["running_var"], 2)
    assert longer.weights == before.weights


def test_the_server_goes_the_mean_way_of_its_clients_by_images(tiny_settings, update):
    """30 images did 2 steps, 10 images 6: the mean way is 3."""
    algorithm = FedNova(tiny_settings(**{"train.momentum": 0.0, "train.nesterov": False}))
    said = [update(state(1.0, 1.0), images=30, steps=2), update(state(-1.0, 1.0), images=10, steps=6)]
    first, second = algorithm.normalise(said, state(0.0, 5.0), PARAMETERS)
    assert (first.arrays["w"].tolist(), second.arrays["w"].tolist()) == ([3, 3], [-3, -3])
    assert first.arrays["running_var"].tolist() == [1, 1]


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.9, True)])
def test_effective_steps_are_the_way_along_a_constant_gradient(steps, momentum, nesterov):
    weight = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.SGD([weight], lr=0.1, momentum=momentum, nesterov=nesterov)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimiser.step()
    assert effective_steps(steps, momentum, nesterov) == pytest.approx(-weight.item() / 0.1)


@pytest.mark.parametrize("optimiser", ["adam", "torch.optim:SGD"])
def test_only_sgd_has_steps_whose_length_is_known(tiny_settings, optimiser):
    FedNova(tiny_settings()).check()
    with pytest.raises(
        SettingsError, match=rf"train\.optimiser = '{optimiser}' goes otherwise: set train\.optimiser"
    ):
        FedNova(tiny_settings(**{"train.optimiser": optimiser})).check()
