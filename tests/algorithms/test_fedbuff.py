import numpy as np
import pytest

from fedfmd.algorithms.fedbuff import FedBuff, rebase
from fedfmd.errors import SettingsError

PARAMETERS = {"w"}


def state(value):
    return {
        "w": np.full((2, 2), value, np.float32),
        "running_var": np.full(2, value, np.float32),
        "num_batches_tracked": np.array(int(value)),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server.buffer": 3}, "server.buffer = 3 must not exceed the 2 clients"),
        (
            {"budget.over-select": 1.5},
            "budget.over-select = 1.5 has no effect with server.strategy = fedbuff",
        ),
        (
            {"transport.upload": "int8", "server.checkpoint-every": 3},
            "server.checkpoint-every = 3: .* set server.checkpoint-every=1, or transport.upload=fp32",
        ),
    ],
)
def test_what_it_can_not_heed_is_refused(tiny_settings, changes, message):
    fits = {"server.strategy": "fedbuff", "server.buffer": 2, "server.clients-per-round": 2}
    FedBuff(tiny_settings(**fits)).check()
    with pytest.raises(SettingsError, match=message):
        FedBuff(tiny_settings(**fits | changes)).check()


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
