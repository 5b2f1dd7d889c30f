import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedfmd.protocol.averaging import CHUNK, SMALL, SUM_BITS, ExactMean, WeightedMean, fault_of, value_limit


def mean_of(*states_and_weights):
    mean = WeightedMean()
    for state, weight in states_and_weights:
        mean.add(state, weight)
    return mean.arrays()


def test_states_count_by_their_weight():
    states = [np.array([0.0, 4.0]), np.array([3.0, 0.0]), np.array([6.0, 8.0])]
    arrays = mean_of(*(({"w": state}, weight) for state, weight in zip(states, (1, 2, 3), strict=True)))
    np.testing.assert_allclose(arrays["w"], [(0 + 6 + 18) / 6, (4 + 0 + 24) / 6])


def test_batch_statistics_are_averaged():
    clients = [nn.BatchNorm2d(2) for _ in range(2)]
    for client, value, seen in zip(clients, (0.0, 10.0), (3, 5), strict=True):
        client.running_mean.fill_(value)
        client.num_batches_tracked.fill_(seen)
    arrays = mean_of(*((client.state_dict(), 50) for client in clients))
    assert arrays["running_mean"].tolist() == [5, 5]
    assert arrays["num_batches_tracked"] == 4


@pytest.mark.parametrize(
    ("counters", "mean"), [((3, 3, 4), 3), ((3, 4, 4), 4), ((2**40, 2**40, 2**40), 2**40)]
)
def test_counters_stay_integers(counters, mean):
    arrays = mean_of(*(({"n": torch.tensor(counter)}, 1) for counter in counters))
    assert arrays["n"].dtype == np.int64
    assert arrays["n"].shape == ()
    assert arrays["n"] == mean


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_keep_their_precision(dtype):
    arrays = mean_of(({"w": torch.ones(2, dtype=dtype)}, 1), ({"w": torch.zeros(2, dtype=dtype)}, 3))
    assert torch.as_tensor(arrays["w"]).dtype == dtype
    assert arrays["w"].tolist() == [0.25, 0.25]


def test_equal_states_are_kept_bit_for_bit():
    state = {"w": torch.rand(100)}
    arrays = mean_of((state, 3), (state, 7), (state, 11))
    assert np.array_equal(arrays["w"], state["w"].numpy())


def test_what_is_added_is_left_alone():
    model = nn.Linear(2, 1)
    mean = WeightedMean()
    mean.add(model.state_dict(), 1)
    first = model.weight.detach().clone()
    nn.init.zeros_(model.weight)  # the next client trains in the same memory
    mean.add(model.state_dict(), 1)
    np.testing.assert_allclose(mean.arrays()["weight"], first / 2)
    assert not model.weight.any()


def test_an_array_counts_only_the_states_that_have_it():
    mean = WeightedMean()
    mean.add({"shared": np.array([0.0]), "own": np.array([7.0])}, 1)
    mean.add({"shared": np.array([4.0])}, 3)
    assert {name: array.tolist() for name, array in mean.arrays().items()} == {"shared": [3], "own": [7]}
    assert mean.weights == {"shared": 4, "own": 1}


def test_means_of_means_are_weighted_array_by_array():
    mean = WeightedMean()
    mean.add({"a": np.array([1.0]), "b": np.array([1.0])}, {"a": 1, "b": 3})
    mean.add({"a": np.array([5.0]), "b": np.array([5.0])}, {"a": 3, "b": 1})
    assert {name: array.tolist() for name, array in mean.arrays().items()} == {"a": [4], "b": [2]}
    assert mean.weights == {"a": 4, "b": 4}


def test_nothing_has_no_mean():
    assert mean_of() == {}


NAMES = ("shared", "bank.0", "bank.1")
CLIENTS = st.lists(
    st.tuples(
        st.dictionaries(
            st.sampled_from(NAMES), st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=2).map(np.array)
        ),
        st.integers(1, 10**6),
    ),
    min_size=1,
    max_size=8,
)


@given(clients=CLIENTS, data=st.data())
def test_each_array_is_the_mean_of_those_who_have_it_in_whatever_order_they_come(clients, data):
    shuffled = mean_of(*data.draw(st.permutations(clients)))
    having = {name: [(s[name], weight) for s, weight in clients if name in s] for name in NAMES}
    assert shuffled.keys() == {name for name in NAMES if having[name]}
    for name, array in shuffled.items():
        states, weights = zip(*having[name], strict=True)
        np.testing.assert_allclose(array, np.average(states, axis=0, weights=weights), rtol=1e-9, atol=1e-9)


@given(
    value=st.floats(-(2.0**100), 2.0**100, width=32) | st.integers(-(2**52), 2**52),
    weights=st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=8),
)
def test_the_mean_of_equal_updates_is_the_update(value, weights):
    state = {"w": torch.tensor([value])}
    assert np.array_equal(mean_of(*((state, weight) for weight in weights))["w"], state["w"].numpy())


START = {
    "w": np.array([[0.3, -0.9]], np.float32),
    "var": np.ones(1, np.float32),
    "zero": np.zeros(2, np.float32),
    "n": np.array(7),
}
STATES = st.fixed_dictionaries(
    {},
    optional={
        "w": st.lists(st.floats(-2048, 2048, width=32), min_size=2, max_size=2).map(
            lambda v: np.array([v], np.float32)
        ),
        "var": st.floats(0, 2.0**30, width=32).map(lambda v: np.array([v], np.float32)),
        "zero": st.lists(st.floats(-(2.0**-10), 2.0**-10, width=32), min_size=2, max_size=2).map(
            lambda v: np.array(v, np.float32)
        ),
        "n": st.integers(0, 1000).map(np.array),
    },
)
UPDATES = st.lists(st.tuples(STATES, st.integers(1, 9_000)), min_size=1, max_size=8)


@given(updates=UPDATES, data=st.data())
def test_an_exact_mean_is_the_same_bit_for_bit_in_whatever_order_and_parts(updates, data):
    """Each worker averages some of the clients; a single client is sent as it is."""
    alone = ExactMean(START, 80_000)
    for state, weight in updates:
        alone.add(state, weight)
    shuffled = data.draw(st.permutations(updates))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(updates)), max_size=3)))
    together = ExactMean(START, 80_000)
    for first, last in zip([0, *cuts], [*cuts, len(updates)], strict=True):
        part = ExactMean(START, 80_000)
        for state, weight in shuffled[first:last]:
            part.add(state, weight)
        if last - first == 1:
            together.add(*shuffled[first])
        else:
            arrays = part.arrays()
            together.add(arrays, part.weights, part.rest(arrays))
    assert together.weights == alone.weights
    for name, array in alone.arrays().items():
        assert array.dtype == START[name].dtype
        assert np.array_equal(together.arrays()[name], array)
        having = [(state[name], weight) for state, weight in updates if name in state]
        states, weights = zip(*having, strict=True)
        expected = np.average(np.stack(states).astype(np.float64), axis=0, weights=weights)
        if name == "n":
            assert abs(array - expected) <= 0.5
        else:
            unit = value_limit(START[name]) / 2.0 ** (SUM_BITS - (80_000).bit_length())
            rounding = len(weights) / sum(weights) * unit / 2 if START[name].ndim > 1 else 2**-28
            np.testing.assert_allclose(array, expected, rtol=2**-24, atol=rounding)


def test_the_exact_mean_of_equal_states_is_the_state():
    mean = ExactMean(START, 100)
    state = {
        "w": torch.rand(1, 2),
        "var": torch.tensor([5e4]),
        "zero": torch.full((2,), 1e-6),
        "n": torch.tensor(8),
    }
    for weight in (3, 7, 11):
        mean.add(state, weight)
    assert all(np.array_equal(array, state[name].numpy()) for name, array in mean.arrays().items())


def test_a_large_array_is_summed_in_chunks_that_fit_together():
    values = torch.randn(3, CHUNK)[:, 5:].reshape(1, -1)  # 2 chunks and most of a third
    start = {"w": torch.zeros_like(values)}
    mean = ExactMean(start, 100)
    for weight, factor in ((30, 1.0), (70, -0.5)):
        mean.add({"w": factor * values}, weight)
    expected = (30 * values.double() - 35 * values.double()) / 100
    np.testing.assert_allclose(mean.arrays()["w"], expected, rtol=2**-23, atol=1e-12)
    alone = ExactMean(start, 100)
    arrays = mean.arrays()
    alone.add(arrays, mean.weights, mean.rest(arrays))
    assert np.array_equal(alone.arrays()["w"], arrays["w"])
    assert np.array_equal(alone.rest(arrays)["w"], mean.rest(arrays)["w"])


@pytest.mark.parametrize(("largest", "limit"), [(0, 2048), (1, 2048), (-5, 8192), (1000, 2.0**20)])
def test_values_have_room_to_grow_a_thousandfold_and_those_of_norms_any(largest, limit):
    for shape, room in ((1, 2), limit), ((2,), 2.0**30):
        start = {"w": np.array([0, largest], np.float32).reshape(shape)}
        assert value_limit(start["w"]) == room
        assert fault_of({"w": np.array([-room, room])}, start) == ""
        assert fault_of({"w": np.array([0, -2 * room])}, start) == f"values beyond {room:g} in w"
    assert value_limit(np.array([[]])) == 2048


def test_a_fault_is_found_among_small_arrays_looked_at_together_and_large_ones():
    sizes = {"a": 3, "bias": 5, "large": SMALL + 1, "b": 4}
    start = {
        name: np.zeros((1, size) if name != "bias" else size, np.float32) for name, size in sizes.items()
    }
    start["count"] = np.int64(5000)
    assert fault_of(start, start) == ""
    for name in sizes:
        for value, fault in (
            (np.nan, "NaN or infinite values"),
            (-np.inf, "NaN or infinite values"),
            (2e9, "values"),
        ):
            broken = start | {name: start[name].copy()}
            broken[name][..., -1] = value
            assert fault_of(broken, start).startswith(fault)
            assert fault_of(broken, start).endswith(f" in {name}")


def test_a_mean_takes_as_many_steps_for_a_hundred_small_arrays_as_for_two():
    """What a client costs beside its training: calls for each array would be a good part of a small network's step."""

    def steps(count):
        arrays = {f"w{n}": np.ones((2, 3), np.float32) for n in range(count)} | {
            "bias": np.ones(4, np.float32)
        }
        mean = ExactMean(arrays, 100)
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True
        ) as profiled:
            mean.add(arrays, 3)
        counts = {event.key: event.count for event in profiled.key_averages()}
        return counts["aten::mul"], counts["aten::round"]

    assert steps(100) == steps(2)


@pytest.mark.parametrize("buffer", [torch.tensor([True, False]), torch.tensor([200, 1], dtype=torch.uint8)])
def test_masks_and_unsigned_buffers_are_averaged(buffer):
    start = {"buffer": buffer.numpy()}
    assert fault_of(start, start) == ""
    mean = ExactMean(start, 10)
    mean.add(start, {"buffer": 3})
    assert np.array_equal(mean.arrays()["buffer"], start["buffer"])
