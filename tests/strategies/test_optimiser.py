import numpy as np
import pytest

from strategies import STRATEGIES
from strategies.optimiser import optimiser_arrays, restore_optimiser


@pytest.fixture
def inner(tiny_settings):
    return lambda name: STRATEGIES[name].inner(tiny_settings())


def test_moments_and_momentum_come_back(inner):
    adam, momentum = inner("fedadam"), inner("fedavgm")
    adam.m_t, adam.v_t = {"w": np.ones(2), "b": np.zeros(1)}, {"w": np.full(2, 3.0), "b": np.ones(1)}
    momentum.momentum_vector = [np.full(1, float(place)) for place in range(12)]
    for before, after in ((adam, inner("fedadam")), (momentum, inner("fedavgm"))):
        restore_optimiser(after, optimiser_arrays(before))
        assert str(optimiser_arrays(after)) == str(optimiser_arrays(before))
    assert [int(array[0]) for array in optimiser_arrays(momentum).values()] == list(range(12))
    assert isinstance(momentum.momentum_vector, list)


@pytest.mark.parametrize("name", STRATEGIES)
def test_before_the_first_round_there_is_nothing_to_keep(inner, name):
    assert optimiser_arrays(inner(name)) == {}
