import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg

from fedfmd.protocol.messages import ARRAYS, ClientResult, Reply, write_reply
from strategies import STRATEGIES
from strategies.aggregation import aggregate, lengthen, transplant
from strategies.registry import KEYS

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


@pytest.fixture
def agree(reply, tiny_settings):
    """Steps a strategy from `CURRENT` where five clients say the same; the next state."""

    def step(name, values):
        inner = STRATEGIES[name].inner(tiny_settings(**{"partition.clients": 5, "fleet.devices": "pi-4"}))
        replies = [reply(node, 20, values) for node in range(5, 10)]
        return aggregate(inner, 1, replies, CURRENT, PARAMETERS, STRATEGIES[name].algorithm.separate)

    return step


@pytest.mark.parametrize("name", STRATEGIES)
def test_where_nobody_has_learnt_anything_the_state_stays(agree, name):
    stepped = agree(name, dict(CURRENT))
    assert stepped.keys() == CURRENT.keys()
    for key, array in CURRENT.items():
        np.testing.assert_allclose(stepped[key], array, rtol=1e-6)
        assert (stepped[key].dtype, stepped[key].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_follows_clients_that_agree(agree, name):
    stepped = agree(name, CURRENT | state(90.0))
    assert (stepped["w"] < 100).all()
    assert (stepped["fc.bank.0"] > -100).all()
    np.testing.assert_allclose(stepped["running_var"], 90)  # buffers are no optimiser's business
    assert stepped["num_batches_tracked"] == 90


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_one_hostile_client_of_five_does_not_matter(reply, tiny_settings, name):
    inner = STRATEGIES[name].inner(tiny_settings(**{"partition.clients": 5, "fleet.devices": "pi-4"}))
    replies = [reply(node, 20, state(3.0)) for node in (5, 6, 7, 8)] + [reply(9, 20, state(-1e6))]
    stepped = aggregate(inner, 1, replies, state(100.0), PARAMETERS - {"fc.bank.1"}, separate=True)
    np.testing.assert_allclose(stepped["w"], 3)


def test_server_momentum_carries_on_in_the_next_round(reply, tiny_settings):
    inner = STRATEGIES["fedavgm"].inner(tiny_settings(**{"server.momentum": 0.5}))
    first = aggregate(inner, 1, [reply(5, 20, CURRENT | state(96.0))], CURRENT, PARAMETERS)
    np.testing.assert_allclose(first["w"], 96)
    again = aggregate(inner, 2, [reply(5, 20, dict(first))], first, PARAMETERS)  # learns nothing, rolls on
    np.testing.assert_allclose(again["w"], 94)
    assert np.array_equal(again["fc.bank.1"], CURRENT["fc.bank.1"])


def test_a_first_step_of_fedadam_by_hand(reply, tiny_settings):
    inner = STRATEGIES["fedadam"].inner(tiny_settings(**{"server.lr": 0.1, "server.tau": 1.0}))
    stepped = aggregate(inner, 1, [reply(5, 20, CURRENT | state(90.0))], CURRENT, PARAMETERS)
    delta, rate = (
        -10,
        0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2),
    )  # Flower counts the first round as the second
    expected = 100 + rate * 0.1 * delta / ((0.01 * delta**2) ** 0.5 + 1.0)
    np.testing.assert_allclose(stepped["w"], expected, rtol=1e-6)


class OwnFedAvg(FedAvg):
    """A user's: its mean is what Flower's messages make of it."""


@pytest.mark.parametrize("kind", [FedAvg, OwnFedAvg])
def test_the_next_state_is_the_mean_by_images(replies, kind):
    combined = aggregate(kind(**KEYS), 1, replies, CURRENT, PARAMETERS)
    assert combined.keys() == CURRENT.keys()
    np.testing.assert_allclose(combined["w"], 3)
    np.testing.assert_allclose(combined["fc.bank.0"], -3)
    np.testing.assert_allclose(combined["running_var"], 3)
    assert combined["num_batches_tracked"] == 3


def test_lengthening_stretches_the_way_of_parameters_only(replies):
    ((_, longer), _) = lengthen(replies, CURRENT, PARAMETERS, 0.5)
    np.testing.assert_allclose(longer.arrays["w"], 100 - 0.5 * 99)
    np.testing.assert_allclose(longer.arrays["running_var"], 1)
    assert longer.weights == replies[0][1].weights


def test_an_old_update_is_moved_to_the_current_state(replies):
    old = state(5.0)  # what the client of node 6, which now says 9, began with
    moved = transplant(replies[1][1], old, CURRENT, PARAMETERS, 0.5)
    np.testing.assert_allclose(moved.arrays["w"], 100 + 0.5 * 4)
    np.testing.assert_allclose(moved.arrays["running_var"], (100 + 9) / 2)
    assert moved.arrays["num_batches_tracked"] == 54
    assert moved.arrays["num_batches_tracked"].dtype == CURRENT["num_batches_tracked"].dtype


def test_types_and_shapes_stay(replies):
    inner = Float64(**KEYS)
    combined = aggregate(inner, 1, replies, CURRENT, PARAMETERS)
    for name, array in state(0).items():
        assert combined[name].dtype == array.dtype, name
        assert combined[name].shape == array.shape, name


def test_the_server_optimiser_sees_parameters_only(replies):
    inner = Float64(**KEYS)
    combined = aggregate(inner, 1, replies, CURRENT, PARAMETERS)
    assert inner.names == PARAMETERS
    np.testing.assert_allclose(combined["w"], -3)  # its answer
    np.testing.assert_allclose(combined["running_var"], 3)  # the plain mean


def test_one_node_alone_is_taken_over(replies):
    combined = aggregate(FedAvg(**KEYS), 1, replies[1:], CURRENT, PARAMETERS)
    assert all(np.array_equal(combined[name], array) for name, array in state(9.0).items())


def test_a_kernel_is_the_mean_of_the_clients_that_trained_it(reply):
    """Five clients; two of them, with 10 and 30 images, trained kernel 1."""
    replies = [reply(node, 20, state(3.0)) for node in (5, 6, 7)]
    replies += [
        reply(node, images, state(3.0) | {"fc.bank.1": np.full(3, value, np.float32)})
        for node, images, value in ((8, 10, 8.0), (9, 30, 4.0))
    ]
    combined = aggregate(FedAvg(**KEYS), 1, replies, CURRENT, PARAMETERS)
    np.testing.assert_allclose(combined["fc.bank.1"], 5)  # (10 · 8 + 30 · 4) / 40
    np.testing.assert_allclose(combined["fc.bank.0"], -3)


def test_a_kernel_that_nobody_trained_keeps_its_value_bit_for_bit(replies):
    combined = aggregate(Float64(**KEYS), 1, replies, CURRENT, PARAMETERS)
    assert np.array_equal(combined["fc.bank.1"], CURRENT["fc.bank.1"])
    np.testing.assert_allclose(combined["fc.bank.0"], 3)


def test_the_server_optimiser_steps_once_from_a_complete_mean(replies):
    inner = Float64(**KEYS)
    aggregate(inner, 1, replies, CURRENT, PARAMETERS)
    assert inner.messages == 1
