import numpy as np
import pytest

from fedfmd.seeds import derive_seed


def test_the_same_name_gives_the_same_stream():
    assert derive_seed(0, "client", 3, 7) == derive_seed(0, "client", 3, 7)


@pytest.mark.parametrize(
    "other", [(1, "client", 3, 7), (0, "model", 3, 7), (0, "client", 7, 3), (0, "client", 3)]
)
def test_every_part_of_the_name_counts(other):
    assert derive_seed(0, "client", 3, 7) != derive_seed(*other)


def test_seeds_of_neighbours_differ_and_fit_a_signed_integer():
    seeds = [
        derive_seed(seed, "client", round, client)
        for seed in range(5)
        for round in range(20)
        for client in range(20)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_every_bit_of_neighbours_is_balanced():
    seeds = np.array([derive_seed(0, "client", 1, client) for client in range(1000)])
    ones = np.array([(seeds >> bit & 1).mean() for bit in range(63)])
    assert abs(ones - 0.5).max() < 0.08  # five standard deviations of a fair coin
