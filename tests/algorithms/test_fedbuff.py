import numpy as np
import pytest

from fedfmd.algorithms.fedbuff import FedBuff, rebase

PARAMETERS = {"w"}


def state(value):
    return {
        "w": np.full((2, 2), value, np.float32),
        "running_var": np.full(2, value, np.float32),
        "num_batches_tracked": np.array(int(value)),
    }


def test_an_old_update_is_moved_to_the_current_arrays(update):
    moved = rebase(update(state(9.0), start=state(5.0)), state(100.0), PARAMETERS, 0.5)
    np.testing.assert_allclose(moved.arrays["w"], 100 + 0.5 * 4)
    np.testing.assert_allclose(moved.arrays["running_var"], (100 + 9) / 2)
    assert moved.arrays["num_batches_tracked"] == 54
    assert moved.arrays["num_batches_tracked"].dtype == state(9.0)["num_batches_tracked"].dtype


@pytest.mark.parametrize(("age", "share"), [(0, 1), (1, 1 / 2), (3, 1 / 4)])
def test_an_update_counts_less_the_older_it_is(tiny_settings, update, age, share):
    algorithm = FedBuff(tiny_settings(**{"server.staleness": 1.0}))
    (moved,) = algorithm.normalise([update(state(9.0), start=state(5.0), age=age)], state(100.0), PARAMETERS)
    np.testing.assert_allclose(moved.arrays["w"], 100 + share * 4)
