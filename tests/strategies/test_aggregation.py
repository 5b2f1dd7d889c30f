import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedfmd.wire import ARRAYS, WEIGHT, ClientResult, Reply, write_reply
from strategies import STRATEGIES
from strategies.aggregation import aggregate

PARAMETERS = ["w", "fc.bank.0"]


def state(value):
    return {
        "w": np.full((2, 2), value, np.float32),
        "fc.bank.0": np.full(3, -value, np.float32),
        "running_var": np.full(2, value, np.float32),
        "num_batches_tracked": np.array(int(value)),
    }


@pytest.fixture
def replies(reply_of):
    """Two nodes: 30 images say 1, 10 images say 9. The mean is 3."""
    made = []
    for node, images, value in ((5, 30, 1.0), (6, 10, 9.0)):
        reply = Reply(state(value), (ClientResult(node, images, 1, images, 1.0, 0.5, 0.1),))
        made.append((reply_of(node, write_reply(reply)), reply))
    return made


class Float64(FedAvg):
    """Like Flower's FedAdam: every array comes back in double precision; remembers what it was given."""

    def aggregate_train(self, server_round, replies):
        self.names = {name for message in replies for name in message.content[ARRAYS]}
        record, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({n: Array(-np.asarray(a.numpy(), np.float64)) for n, a in record.items()}), metrics


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_next_state_is_the_mean_by_images(replies, name):
    combined = aggregate(STRATEGIES[name](), 1, replies, PARAMETERS)
    assert combined.keys() == state(0).keys()
    np.testing.assert_allclose(combined["w"], 3)
    np.testing.assert_allclose(combined["fc.bank.0"], -3)
    np.testing.assert_allclose(combined["running_var"], 3)
    assert combined["num_batches_tracked"] == 3


def test_types_and_shapes_stay(replies):
    inner = Float64(weighted_by_key=WEIGHT)
    combined = aggregate(inner, 1, replies, PARAMETERS)
    for name, array in state(0).items():
        assert combined[name].dtype == array.dtype, name
        assert combined[name].shape == array.shape, name


def test_the_server_optimiser_sees_parameters_only(replies):
    inner = Float64(weighted_by_key=WEIGHT)
    combined = aggregate(inner, 1, replies, PARAMETERS)
    assert inner.names == set(PARAMETERS)
    np.testing.assert_allclose(combined["w"], -3)  # its answer
    np.testing.assert_allclose(combined["running_var"], 3)  # the plain mean


def test_one_node_alone_is_taken_over(replies):
    combined = aggregate(STRATEGIES["fedavg"](), 1, replies[1:], PARAMETERS)
    assert all(np.array_equal(combined[name], array) for name, array in state(9.0).items())
