import logging
from copy import deepcopy

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAvg, FedAvgM

from fedfmd.algorithms import ALGORITHMS
from fedfmd.algorithms.flower import FlowerAlgorithm, OwnStrategy
from fedfmd.errors import RunError, SettingsError

FLOWERS = [name for name, kind in ALGORITHMS.items() if issubclass(kind, FlowerAlgorithm)]
PARAMETERS = {"w": np.full((2, 2), 100.0, np.float32), "fc.bank.0": np.full(3, -100.0, np.float32)}


class Counting(FedAvgM):
    """A user's: counts its steps, anneals a rate, remembers means, and takes a longer and longer step."""

    def __init__(self):
        super().__init__(weighted_by_key="images", arrayrecord_key="model", server_momentum=0.5)
        self.steps = 0
        self.rate = 1.0
        self.history = []
        self.by_node = {}
        self.largest = np.float32(0)
        self.threshold = 3
        self.log = logging.getLogger("own")

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.steps += 1
        self.rate *= 0.9
        for reply in replies:
            assert reply.content["model"].keys() == PARAMETERS.keys()
            self.by_node[reply.metadata.src_node_id] = self.steps
        record, metrics = super().aggregate_train(server_round, replies)
        means = {name: float(array.numpy().mean()) for name, array in record.items()}
        self.history.append(means)
        self.largest = np.float32(max(self.largest, *means.values()))
        return ArrayRecord({n: Array(a.numpy() * self.rate + self.steps) for n, a in record.items()}), metrics


class Silent(FedAvg):
    """Makes no step."""

    def aggregate_train(self, server_round, replies):
        return None, None


class Answering(FedAvg):
    """Answers as its test says, from what Flower's FedAvg returns."""

    def aggregate_train(self, server_round, replies):
        return self.answer(*super().aggregate_train(server_round, replies))


class Greedy(FedAvg):
    """Wants to pick clients itself."""

    def configure_train(self, server_round, arrays, config, grid):
        return [*grid.get_node_ids()]


class Own(FlowerAlgorithm):
    """Runs the class that its test gives it."""

    kind = Counting
    separate = True

    def strategy(self):
        return self.kind()


@pytest.fixture
def own(tiny_settings):
    return Own(tiny_settings())


@pytest.fixture
def steps(update, identity):
    """Does rounds of two clients that say other values each time; gives the last arrays and state."""

    def run(algorithm, state, first, last):
        arrays = PARAMETERS
        for server_round in range(first, last + 1):
            said = [update({n: a + server_round * i for n, a in PARAMETERS.items()}, node=i) for i in (1, 2)]
            arrays, state = algorithm.step(state, server_round, arrays, said)
        return arrays, state

    return run


def test_a_users_strategy_goes_on_as_if_it_had_not_stopped(own, steps):
    """Counters, floats, lists, dicts by node, NumPy's scalars and momentum: nothing is lost."""
    _, half = steps(own, own.init(), 1, 2)
    kept = own.dump(half)
    assert (kept["steps"], kept["by_node/=1"], kept["rate"]) == (2, 2, pytest.approx(0.81))
    assert kept.keys() >= {"history/#1/w", "largest", "momentum_vector/#0"}
    assert kept.keys() & {"threshold", "server_momentum", "log", "fraction_train"} == set()
    restored = own.restore(deepcopy(kept))
    resumed, whole = steps(own, restored, 3, 4), steps(own, half, 3, 4)
    assert all(np.array_equal(resumed[0][name], whole[0][name]) for name in PARAMETERS)
    assert str(own.dump(resumed[1])) == str(own.dump(whole[1]))
    assert restored.strategy.rate == pytest.approx(0.9**4)


def test_what_a_checkpoint_cannot_keep_is_told_once(own, caplog):
    running = own.init()
    running.strategy.seen = {1, 2}
    for _ in range(2):
        own.dump(running)
    assert [m for m in caplog.messages if "seen" in m] == [
        "Counting.seen is no part of the checkpoints, which can't keep set"
    ]


def test_moments_and_momentum_come_back(tiny_settings):
    adam, momentum = (ALGORITHMS[name](tiny_settings()) for name in ("fedadam", "fedavgm"))
    moved = adam.init()
    moved.strategy.m_t, moved.strategy.v_t = {"w": np.ones(2), "b": np.zeros(1)}, {"w": np.full(2, 3.0)}
    rolled = momentum.init()
    rolled.strategy.momentum_vector = [np.full(1, float(place)) for place in range(12)]
    assert list(adam.dump(moved)) == ["m_t/w", "m_t/b", "v_t/w"]
    for algorithm, before in ((adam, moved), (momentum, rolled)):
        after = algorithm.restore(algorithm.dump(before))
        assert str(algorithm.dump(after)) == str(algorithm.dump(before))
    assert [int(array[0]) for array in momentum.dump(rolled).values()] == list(range(12))
    assert isinstance(momentum.restore(momentum.dump(rolled)).strategy.momentum_vector, list)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_before_the_first_round_there_is_nothing_to_keep(tiny_settings, name):
    algorithm = ALGORITHMS[name](tiny_settings())
    assert algorithm.dump(algorithm.init()) == {}


@pytest.mark.parametrize("name", FLOWERS)
def test_options_and_start_of_a_step_are_no_state(tiny_settings, identity, update, name):
    algorithm = ALGORITHMS[name](tiny_settings(**{"partition.clients": 5, "fleet.devices": "pi-4"}))
    said = [update({n: a - 1 for n, a in PARAMETERS.items()}, node=node) for node in range(5)]
    _, after = algorithm.step(algorithm.init(), 1, PARAMETERS, said)
    kept = {path.partition("/")[0] for path in algorithm.dump(after)}
    assert kept <= {"m_t", "v_t", "momentum_vector"}


def test_a_strategy_that_makes_no_step_leaves_the_arrays(own, steps, monkeypatch, caplog):
    monkeypatch.setattr(Own, "kind", Silent)
    arrays, _ = steps(own, own.init(), 1, 1)
    assert arrays is PARAMETERS
    assert caplog.messages == ["round 1: server.strategy = 'fedavg' makes no step, the model stays as it was"]


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (lambda self, record, metrics: None, "what it returned is None"),
        (lambda self, record, metrics: record, "what it returned is of type ArrayRecord"),
        (lambda self, record, metrics: ({}, metrics), "the first of what it returned is of type dict"),
        (lambda self, record, metrics: (ArrayRecord(), metrics), "array fc.bank.0 is missing"),
        (
            lambda self, record, metrics: (ArrayRecord({n: Array(np.ones(7)) for n in record}), metrics),
            r"array w has shape \(7,\), the model's has \(2, 2\)",
        ),
        (
            lambda self, record, metrics: (ArrayRecord({n: Array(np.array("x")) for n in record}), metrics),
            r"an array is no \.npy file of numbers",
        ),
    ],
    ids=["nothing", "no pair", "no record", "an empty record", "another shape", "no numbers"],
)
def test_a_strategy_that_returns_no_model_ends_the_run_in_one_line(answer, fault, own, steps, monkeypatch):
    monkeypatch.setattr(Own, "kind", Answering)
    monkeypatch.setattr(Answering, "answer", answer, raising=False)
    with pytest.raises(
        RunError, match=rf"^round 1: .*: aggregate_train must return .*: {fault}; finished rounds"
    ):
        steps(own, own.init(), 1, 1)


def test_a_strategy_that_raises_ends_the_run_in_one_line(own, steps, monkeypatch):
    def fail(*_):
        raise KeyError("a\nb")

    for hook in ("aggregate_train", "configure_train"):
        monkeypatch.setattr(Own, "kind", type("Failing", (FedAvg,), {hook: fail}))
        with pytest.raises(RunError, match=rf"^round 1: .*: {hook} fails: KeyError: "):
            steps(own, own.init(), 1, 1)


@pytest.mark.parametrize(
    ("init", "fault"),
    [
        (lambda self, more: None, "can't be made without arguments: TypeError: .* argument: 'more'"),
        (lambda self: None, r"has no fraction_train: let its __init__ call super\(\)\.__init__\(\)"),
        (lambda self: 1 / 0, "can't be made without arguments: ZeroDivisionError: division by zero"),
    ],
    ids=["arguments", "no super", "raises"],
)
def test_a_class_that_cannot_be_made_is_refused_before_the_run(init, fault, tiny_settings, monkeypatch):
    monkeypatch.setattr(
        "fedfmd.algorithms.flower.find", lambda *_: type("Mine", (FedAvg,), {"__init__": init})
    )
    with pytest.raises(SettingsError, match=rf"^server\.strategy = 'own:Mine' {fault}"):
        OwnStrategy(tiny_settings(**{"server.strategy": "own:Mine"})).check()


def test_what_holds_itself_is_no_part_of_a_checkpoint(own, caplog):
    running = own.init()
    running.strategy.circle = circle = {}
    circle["again"] = circle
    assert own.dump(running) == {}
    assert (
        "Counting.circle is no part of the checkpoints, which can't keep what holds itself or is "
        in caplog.text
    )


def test_a_strategy_that_wants_to_pick_clients_is_told(own, steps, monkeypatch):
    monkeypatch.setattr(Own, "kind", Greedy)
    with pytest.raises(RunError, match=r"configure_train uses the grid \(get_node_ids\)"):
        steps(own, own.init(), 1, 1)


def test_a_client_does_without_the_users_class(tiny_settings):
    algorithm = OwnStrategy(tiny_settings(**{"server.strategy": "nowhere:Mine"}))
    assert algorithm.update(None, {"w": 1}, 3) == {"w": 1}
