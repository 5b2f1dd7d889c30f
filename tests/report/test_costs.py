from dataclasses import replace

import pytest

from fedfmd.report.costs import accuracy_percent, mean_curve, rank, spent
from fedfmd.report.statistics import summarise
from fedfmd.report.wording import WORDINGS


def stretched(run, factor):
    """The same run on devices that need so many times the time and the bytes."""
    rows = [
        replace(row, virtual_s=factor * row.virtual_s, up_bytes=factor * row.up_bytes, down_bytes=0)
        for row in run.rounds
    ]
    return replace(run, rounds=tuple(rows))


@pytest.mark.parametrize(
    ("cost", "values"),
    [
        ("round", [1, 2, 3]),
        ("virtual_s", [10, 20, 30]),
        ("gflops", [1, 2, 3]),
        ("mb", [5, 10, 15]),
        ("energy_kj", [0.5, 1.0, 1.5]),
    ],
)
def test_costs_are_sums_since_the_start(cost, values, make_run):
    assert spent(make_run([0.1, 0.2, 0.3]).rounds, cost) == pytest.approx(values)


def test_costs_of_each_kind_of_run_are_known(make_run, make_centralised):
    for run in (make_run([0.5, 0.6]), make_centralised([0.5, 0.6])):
        for cost in WORDINGS[run.settings.kind].costs:
            assert len(spent(run.rounds, cost)) == 2
    assert spent(run.rounds, "train_s") == [4, 8]


def test_a_curve_is_the_mean_of_the_rounds_that_all_seeds_have(make_run):
    short = make_run([0.4], seed=0, **{"server.rounds": 1})
    long = stretched(make_run([0.6, 0.9], seed=1, **{"server.rounds": 1}), 3)
    (group,) = summarise([short, long]).groups
    curve = mean_curve(group, ["round", "virtual_s"], accuracy_percent)
    assert curve.mean.tolist() == pytest.approx([50])
    assert curve.std.tolist() == pytest.approx([14.142], rel=1e-3)
    assert curve.spent["round"].tolist() == [1]
    assert curve.spent["virtual_s"].tolist() == [20]  # of 10 and 30 s


def test_rounds_without_a_value_have_no_point(make_run):
    (group,) = summarise([make_run([0.4, None, 0.6])]).groups
    curve = mean_curve(group, ["round"], accuracy_percent)
    assert (curve.mean.tolist(), curve.spent["round"].tolist()) == (pytest.approx([40, 60]), [1, 3])
    assert mean_curve(group, ["round"], lambda row: row.temperature) is None


@pytest.fixture
def groups(make_run):
    """Static with 60 % for 20 s; fmdconv with 80 % for 60 s, after 30 % at 30 s."""
    static = make_run([0.5, 0.6], **{"model.conv": "static"})
    fmdconv = stretched(make_run([0.3, 0.8]), 3)
    return summarise([static, fmdconv]).groups


def ranked(groups, cost):
    ranking = rank(groups, cost, target=50)
    accuracies = [place.accuracy and round(place.accuracy.mean) for place in ranking.places]
    return ranking.budget, list(zip([place.group.label for place in ranking.places], accuracies, strict=True))


def test_groups_are_ranked_by_what_they_reach_for_the_same_cost(groups):
    assert ranked(groups, "round") == (2, [("fmdconv", 80), ("static", 60)])
    assert ranked(groups, "mb") == (10, [("static", 60), ("fmdconv", 30)])  # 9 MB a round


def test_a_group_that_had_no_model_by_then_is_last(groups):
    assert ranked(groups, "virtual_s") == (20, [("static", 60), ("fmdconv", None)])


def test_a_place_tells_the_whole_cost_the_cost_to_the_target_and_the_front(groups):
    static, fmdconv = rank(groups, "virtual_s", target=60).places
    assert (static.whole.mean, static.to_target.mean, static.on_front) == (20, 20, True)
    assert (fmdconv.whole.mean, fmdconv.to_target.mean, fmdconv.on_front) == (60, 60, True)
    static, fmdconv = reversed(rank(groups, "round", target=90).places)
    assert (static.on_front, static.to_target) == (False, None)  # as many rounds, less accurate
    assert fmdconv.on_front
