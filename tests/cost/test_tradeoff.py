import math

import pytest

from fedfmd.cost import ies, pareto_front, rcs


def test_600_ms_at_10_percent_errors():
    assert 1000 * ies(0.6, 0.9) == pytest.approx(666.7, abs=0.05)
    assert rcs(0.9, 0.6) == pytest.approx(1.5)


def test_no_correct_answer_is_infinitely_inefficient():
    assert ies(0.6, 0) == math.inf
    assert rcs(0, 0.6) == 0


def test_no_time_is_infinitely_fast():
    assert ies(0, 0.9) == 0
    assert rcs(0.9, 0) == math.inf


@pytest.mark.parametrize("accuracy", [-0.1, 1.1, 90, math.nan])
def test_an_accuracy_is_a_proportion(accuracy):
    with pytest.raises(ValueError, match=f"accuracy = {accuracy} must be a proportion from 0 to 1"):
        ies(1.0, accuracy)
    with pytest.raises(ValueError, match="accuracy"):
        rcs(accuracy, 1.0)


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_time_does_not_run_backwards(seconds):
    with pytest.raises(ValueError, match=f"seconds = {seconds} must not be negative"):
        ies(seconds, 0.5)
    with pytest.raises(ValueError, match="seconds"):
        rcs(0.5, seconds)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([], []),
        ([(0.5, 1.0)], [0]),
        ([(0.9, 3.0), (0.8, 1.0), (0.85, 2.0)], [1, 2, 0]),
        ([(0.9, 1.0), (0.8, 1.0), (0.9, 2.0)], [0]),
        ([(0.9, 1.0), (0.9, 1.0)], [0, 1]),
    ],
    ids=["none", "one", "all, by cost", "beaten in one of the two", "equal points"],
)
def test_pareto_front_keeps_what_no_other_point_beats(points, front):
    assert pareto_front(points) == front
