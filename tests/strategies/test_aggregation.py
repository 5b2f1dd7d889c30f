from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedfmd.algorithms import ALGORITHMS, Update
from fedfmd.algorithms.flower import FlowerAlgorithm
from fedfmd.protocol.messages import ARRAYS, ClientResult
from strategies.aggregation import aggregate, limit_updates, update_norm

PARAMETERS = {"w", "fc.bank.0", "fc.bank.1"}


def state(value):
    return {
        "w": np.full((2, 2), value, np.float32),
        "fc.bank.0": np.full(3, -value, np.float32),
        "running_var": np.full(2, value, np.float32),
        "num_batches_tracked": np.array(int(value)),
    }


CURRENT = state(100.0) | {"fc.bank.1": np.array([0.1, 0.2, 0.3], np.float32)}


def update(node, images, arrays):
    """What a client says that began with `CURRENT`."""
    result = ClientResult(node, images, 1, images, 1.0, 0.5, 0.1)
    return Update(arrays, dict.fromkeys(arrays, images), (result,), CURRENT, node=node)


@pytest.fixture(autouse=True)
def identity(make_grid):
    """Messages need an identity of the process, which a grid gives it."""
    make_grid([])


UPDATES = [update(5, 30, state(1.0)), update(6, 10, state(9.0))]
"""30 images say 1, 10 images say 9. The mean is 3."""


class Float64(FedAvg):
    """Like Flower's FedAdam: changes every array, in double precision; remembers what it was given."""

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.messages = len(replies)
        self.names = {name for message in replies for name in message.content[ARRAYS]}
        record, metrics = super().aggregate_train(server_round, replies)
        return ArrayRecord({n: Array(-np.asarray(a.numpy(), np.float64)) for n, a in record.items()}), metrics


class Doubled(FlowerAlgorithm):
    """Runs `Float64`."""

    def strategy(self):
        return Float64()


class Users(FlowerAlgorithm):
    """A user's FedAvg: its mean is what Flower's messages make of it."""

    def strategy(self):
        return FedAvg()


@pytest.fixture
def step(tiny_settings):
    """Steps an algorithm from `CURRENT`; the next arrays and its state."""

    def make(kind, updates, current=CURRENT, server_round=1, state=None, parameters=PARAMETERS, **options):
        algorithm = kind(tiny_settings(**{"partition.clients": 5, "fleet.devices": "pi-4"} | options))
        return aggregate(algorithm, state or algorithm.init(), server_round, updates, current, parameters)

    return make


@pytest.fixture
def agree(step):
    """Steps an algorithm from `CURRENT` where five clients say the same; the next arrays."""
    return lambda name, arrays: step(ALGORITHMS[name], [update(node, 20, arrays) for node in range(5, 10)])[0]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_where_nobody_has_learnt_anything_the_state_stays(agree, name):
    stepped = agree(name, dict(CURRENT))
    assert stepped.keys() == CURRENT.keys()
    for key, array in CURRENT.items():
        np.testing.assert_allclose(stepped[key], array, rtol=1e-6)
        assert (stepped[key].dtype, stepped[key].shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_strategy_follows_clients_that_agree(agree, name):
    stepped = agree(name, CURRENT | state(90.0))
    assert (stepped["w"] < 100).all()
    assert (stepped["fc.bank.0"] > -100).all()
    np.testing.assert_allclose(stepped["running_var"], 90)  # buffers are no optimiser's business
    assert stepped["num_batches_tracked"] == 90


@pytest.mark.parametrize("name", ["fedmedian", "fedtrimmedavg", "krum", "multikrum"])
def test_one_hostile_client_of_five_does_not_matter(step, name):
    updates = [update(node, 20, state(3.0)) for node in (5, 6, 7, 8)] + [update(9, 20, state(-1e6))]
    stepped, _ = step(ALGORITHMS[name], updates, state(100.0), parameters=PARAMETERS - {"fc.bank.1"})
    np.testing.assert_allclose(stepped["w"], 3)
    np.testing.assert_allclose(stepped["running_var"], 3)  # a mean would be far off
    assert stepped["num_batches_tracked"] == 3
    assert stepped["num_batches_tracked"].dtype == np.int64


@pytest.mark.parametrize(("name", "taken"), [("krum", [1.1]), ("multikrum", [1.0, 1.1, 1.3, 1.6])])
def test_krum_takes_the_updates_that_are_nearest_to_the_others(step, name, taken):
    """With five updates and one bad, the two nearest others count: those of 1.1 are at 0.1 and 0.2."""
    updates = [update(node, 20, state(value)) for node, value in enumerate((1.0, 1.1, 1.3, 1.6, 90.0))]
    stepped, _ = step(ALGORITHMS[name], updates, state(100.0), parameters=PARAMETERS - {"fc.bank.1"})
    np.testing.assert_allclose(stepped["w"], np.mean(taken), rtol=1e-6)
    np.testing.assert_allclose(stepped["running_var"], np.mean(taken), rtol=1e-6)


def test_krum_tells_small_ways_apart_where_weights_are_large(step):
    """‖x‖² + ‖y‖² − 2xy in float32 would see no difference at all between these."""

    def near(value):
        return {n: np.asarray(a + np.float32(value), a.dtype) for n, a in state(1000.0).items()}

    updates = [update(node, 20, near(value)) for node, value in enumerate((0.0, 0.001, 0.002, 0.003, 0.5))]
    stepped, _ = step(ALGORITHMS["krum"], updates, state(1000.0), parameters=PARAMETERS - {"fc.bank.1"})
    assert 1000 < stepped["w"][0, 0] < 1000.0025


def test_krum_with_fewer_updates_than_asked_for_leaves_the_farthest_out(step):
    updates = [update(node, 20, state(value)) for node, value in enumerate((1.0, 1.2, 1e6))]
    stepped, _ = step(ALGORITHMS["multikrum"], updates, state(100.0), parameters=PARAMETERS - {"fc.bank.1"})
    np.testing.assert_allclose(stepped["w"], 1.1, rtol=1e-6)


def test_an_update_is_as_long_as_its_way_from_where_it_began(tiny_settings):
    assert update_norm(update(1, 20, state(97.0)), PARAMETERS) == pytest.approx((4 * 9 + 3 * 9) ** 0.5)
    algorithm = ALGORITHMS["fedavg"](tiny_settings())
    said = [update(1, 20, state(97.0))]
    (short,), done = limit_updates(algorithm, said, PARAMETERS, norm=63**0.5 / 3, ratio=0)
    np.testing.assert_allclose(short.arrays["w"], 99, rtol=1e-6)
    np.testing.assert_allclose(short.arrays["running_var"], 99, rtol=1e-6)
    assert short.arrays["num_batches_tracked"] == 99
    assert done == {1: "update of norm 7.937 scaled down to 2.646 (server.max-update-norm)"}


def test_an_update_of_fednova_is_as_long_as_the_server_goes(tiny_settings):
    """Clients send what one of their four steps did."""
    algorithm = ALGORITHMS["fednova"](tiny_settings(**{"train.momentum": 0.0, "train.nesterov": False}))
    said = update(1, 20, state(99.0))
    said = replace(said, results=(replace(said.results[0], steps=4),))
    limited, done = limit_updates(algorithm, [said], PARAMETERS, norm=7**0.5, ratio=0)
    assert done == {1: "update of norm 10.58 scaled down to 2.646 (server.max-update-norm)"}
    stepped, _ = aggregate(algorithm, algorithm.init(), 1, limited, CURRENT, PARAMETERS)
    np.testing.assert_allclose(stepped["w"], 99, rtol=1e-6)


@pytest.mark.parametrize(("name", "mean"), [("fedmedian", 3), ("fedtrimmedavg", 3), ("fedbuff", 4)])
def test_a_kernel_follows_the_clients_that_trained_it(step, name, mean):
    """Three of five clients have a kernel, and say 3, 3 and 6 of it; the others say nothing of it."""
    said = [update(node, 20, state(-value)) for node, value in enumerate((3.0, 3.0, 6.0, 9.0, 9.0))]
    for one in said[3:]:
        del one.arrays["fc.bank.0"]
    options = {"server.trim": 0.34} if name == "fedtrimmedavg" else {}
    stepped, _ = step(ALGORITHMS[name], said, **options)
    np.testing.assert_allclose(stepped["fc.bank.0"], mean)
    np.testing.assert_array_equal(stepped["fc.bank.1"], CURRENT["fc.bank.1"])


def test_server_momentum_carries_on_in_the_next_round(step):
    half = {"server.momentum": 0.5}
    first, moving = step(ALGORITHMS["fedavgm"], [update(5, 20, CURRENT | state(96.0))], **half)
    np.testing.assert_allclose(first["w"], 96)
    nothing = [update(5, 20, dict(first))]  # it rolls on
    again, _ = step(ALGORITHMS["fedavgm"], nothing, first, server_round=2, state=moving, **half)
    np.testing.assert_allclose(again["w"], 94)
    assert np.array_equal(again["fc.bank.1"], CURRENT["fc.bank.1"])


def test_a_first_step_of_fedadam_by_hand(step):
    options = {"server.lr": 0.1, "server.tau": 1.0}
    stepped, _ = step(ALGORITHMS["fedadam"], [update(5, 20, CURRENT | state(90.0))], **options)
    # Flower counts the first round as the second
    delta, rate = -10, 0.1 * (1 - 0.99**2) ** 0.5 / (1 - 0.9**2)
    expected = 100 + rate * 0.1 * delta / ((0.01 * delta**2) ** 0.5 + 1.0)
    np.testing.assert_allclose(stepped["w"], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("fedadagrad", -10 / (10 + 3)),  # mean and root of what has been so far: 10 itself
        ("fedyogi", 0.1 * -10 / ((0.01 * 100) ** 0.5 + 3)),  # unlike FedAdam's, not corrected for the start
    ],
)
def test_a_first_step_of_the_other_optimisers_by_hand(step, name, way):
    options = {"server.lr": 0.1, "server.tau": 3.0}
    stepped, _ = step(ALGORITHMS[name], [update(5, 20, CURRENT | state(90.0))], **options)
    np.testing.assert_allclose(stepped["w"], 100 + 0.1 * way, rtol=1e-6)


@pytest.mark.parametrize("kind", [ALGORITHMS["fedavg"], Users])
def test_the_next_state_is_the_mean_by_images(step, kind):
    combined, _ = step(kind, UPDATES)
    assert combined.keys() == CURRENT.keys()
    np.testing.assert_allclose(combined["w"], 3)
    np.testing.assert_allclose(combined["fc.bank.0"], -3)
    np.testing.assert_allclose(combined["running_var"], 3)
    assert combined["num_batches_tracked"] == 3


def test_types_and_shapes_stay(step):
    combined, _ = step(Doubled, UPDATES)
    for name, array in state(0).items():
        assert combined[name].dtype == array.dtype, name
        assert combined[name].shape == array.shape, name


def test_the_server_optimiser_sees_parameters_only(step):
    combined, running = step(Doubled, UPDATES)
    assert running.strategy.names == PARAMETERS
    np.testing.assert_allclose(combined["w"], -3)  # its answer
    np.testing.assert_allclose(combined["running_var"], 3)  # the plain mean


def test_one_node_alone_is_taken_over(step):
    combined, _ = step(ALGORITHMS["fedavg"], UPDATES[1:])
    assert all(np.array_equal(combined[name], array) for name, array in state(9.0).items())


def test_a_kernel_is_the_mean_of_the_clients_that_trained_it(step):
    """Five clients; two of them, with 10 and 30 images, trained kernel 1."""
    updates = [update(node, 20, state(3.0)) for node in (5, 6, 7)]
    updates += [
        update(node, images, state(3.0) | {"fc.bank.1": np.full(3, value, np.float32)})
        for node, images, value in ((8, 10, 8.0), (9, 30, 4.0))
    ]
    combined, _ = step(ALGORITHMS["fedavg"], updates)
    np.testing.assert_allclose(combined["fc.bank.1"], 5)  # (10 · 8 + 30 · 4) / 40
    np.testing.assert_allclose(combined["fc.bank.0"], -3)


def test_a_kernel_that_nobody_trained_keeps_its_value_bit_for_bit(step):
    combined, _ = step(Doubled, UPDATES)
    assert np.array_equal(combined["fc.bank.1"], CURRENT["fc.bank.1"])
    np.testing.assert_allclose(combined["fc.bank.0"], 3)


KERNELS = [f"fc.bank.{place}" for place in range(3)]
TRAINED = st.lists(
    st.tuples(st.integers(1, 1000), st.dictionaries(st.sampled_from(KERNELS), st.floats(-9, 9), min_size=1)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clients=TRAINED)
def test_each_kernel_is_the_mean_by_images_of_who_trained_it_or_stays(step, clients):
    current = {name: np.full(2, 0.1 + place) for place, name in enumerate(KERNELS)}
    updates = [
        update(node, images, {name: np.full(2, value) for name, value in kernels.items()})
        for node, (images, kernels) in enumerate(clients, start=5)
    ]
    combined, _ = step(ALGORITHMS["fedavg"], updates, current, parameters=KERNELS)
    assert combined.keys() == current.keys()
    for name in KERNELS:
        having = [(kernels[name], images) for images, kernels in clients if name in kernels]
        if having:
            values, images = zip(*having, strict=True)
            np.testing.assert_allclose(combined[name], np.average(values, weights=images), atol=1e-12)
        else:
            assert np.array_equal(combined[name], current[name])


def test_the_server_optimiser_steps_once_from_a_complete_mean(step):
    _, running = step(Doubled, UPDATES)
    assert running.strategy.messages == 1
