import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedfmd.wire import ARRAYS, WEIGHT, ClientResult, Reply, write_reply
from strategies import STRATEGIES
from strategies.aggregation import aggregate

PARAMETERS = {"w", "fc.bank.0", "fc.bank.1"}


def state(value):
    return {
        "w": np.full((2, 2), value, np.float32),
        "fc.bank.0": np.full(3, -value, np.float32),
        "running_var": np.full(2, value, np.float32),
        "num_batches_tracked": np.array(int(value)),
    }


CURRENT = state(100.0) | {"fc.bank.1": np.array([0.1, 0.2, 0.3], np.float32)}


@pytest.fixture
def reply(reply_of):
    """Makes a node's reply: `images` of one client say `values`."""

    def make(node, images, values):
        result = ClientResult(node, images, 1, images, 1.0, 0.5, 0.1)
        made = Reply(values, (result,), dict.fromkeys(values, images))
        return reply_of(node, write_reply(made)), made

    return make


@pytest.fixture
def replies(reply):
    """Two nodes: 30 images say 1, 10 images say 9. The mean is 3."""
    return [reply(5, 30, state(1.0)), reply(6, 10, state(9.0))]


class Float64(FedAvg):
    """Like Flower's FedAdam: changes every array, in double precision; remembers what it was given."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.messages = len(replies)
        self.names = {name for message in replies for name in message.content[ARRAYS]}
        record, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({n: Array(-np.asarray(a.numpy(), np.float64)) for n, a in record.items()}), metrics


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_next_state_is_the_mean_by_images(replies, name):
    combined = aggregate(STRATEGIES[name](), 1, replies, CURRENT, PARAMETERS)
    assert combined.keys() == CURRENT.keys()
    np.testing.assert_allclose(combined["w"], 3)
    np.testing.assert_allclose(combined["fc.bank.0"], -3)
    np.testing.assert_allclose(combined["running_var"], 3)
    assert combined["num_batches_tracked"] == 3


def test_types_and_shapes_stay(replies):
    inner = Float64(weighted_by_key=WEIGHT)
    combined = aggregate(inner, 1, replies, CURRENT, PARAMETERS)
    for name, array in state(0).items():
        assert combined[name].dtype == array.dtype, name
        assert combined[name].shape == array.shape, name


def test_the_server_optimiser_sees_parameters_only(replies):
    inner = Float64(weighted_by_key=WEIGHT)
    combined = aggregate(inner, 1, replies, CURRENT, PARAMETERS)
    assert inner.names == PARAMETERS
    np.testing.assert_allclose(combined["w"], -3)  # its answer
    np.testing.assert_allclose(combined["running_var"], 3)  # the plain mean


def test_one_node_alone_is_taken_over(replies):
    combined = aggregate(STRATEGIES["fedavg"](), 1, replies[1:], CURRENT, PARAMETERS)
    assert all(np.array_equal(combined[name], array) for name, array in state(9.0).items())


def test_a_kernel_is_the_mean_of_the_clients_that_trained_it(reply):
    """Five clients; two of them, with 10 and 30 images, trained kernel 1."""
    replies = [reply(node, 20, state(3.0)) for node in (5, 6, 7)]
    replies += [
        reply(node, images, state(3.0) | {"fc.bank.1": np.full(3, value, np.float32)})
        for node, images, value in ((8, 10, 8.0), (9, 30, 4.0))
    ]
    combined = aggregate(STRATEGIES["fedavg"](), 1, replies, CURRENT, PARAMETERS)
    np.testing.assert_allclose(combined["fc.bank.1"], 5)  # (10 · 8 + 30 · 4) / 40
    np.testing.assert_allclose(combined["fc.bank.0"], -3)


def test_a_kernel_that_nobody_trained_keeps_its_value_bit_for_bit(replies):
    combined = aggregate(Float64(weighted_by_key=WEIGHT), 1, replies, CURRENT, PARAMETERS)
    assert np.array_equal(combined["fc.bank.1"], CURRENT["fc.bank.1"])
    np.testing.assert_allclose(combined["fc.bank.0"], 3)


def test_the_server_optimiser_steps_once_from_a_complete_mean(replies):
    inner = Float64(weighted_by_key=WEIGHT)
    aggregate(inner, 1, replies, CURRENT, PARAMETERS)
    assert inner.messages == 1
