import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import ttest_rel

from fedfmd.report.statistics import (
    Estimate,
    client_accuracies,
    cut_percent,
    estimate,
    holm,
    paired_difference,
    summarise,
    to_target,
    worst_decile,
)


def test_an_estimate_is_mean_and_sample_standard_deviation():
    assert estimate([80, 90]) == Estimate(85, pytest.approx(math.sqrt(50)), 2)  # n - 1 = 1
    assert estimate([80]) == Estimate(80, 0, 1)
    assert estimate([None, 80]) == Estimate(80, 0, 1)
    assert estimate([None]) is None


def test_the_score_of_a_network_that_is_always_wrong_is_infinite():
    infinite = estimate([1.0, math.inf])
    assert infinite.mean == math.inf
    assert math.isnan(infinite.std)


def test_a_paired_difference_has_students_interval():
    # differences 1, 2, 3: mean 2, s = 1; t(0.975, 2) = 4.303 from a table, so 2 ± 4.303 / sqrt(3)
    gain = paired_difference([(71, 70), (82, 80), (93, 90)])
    assert (gain.mean, gain.pairs) == (2, 3)
    assert (gain.low, gain.high) == (pytest.approx(2 - 2.484, abs=1e-3), pytest.approx(2 + 2.484, abs=1e-3))
    # differences 0 and 2: s = sqrt(2), t(0.975, 1) = 12.706, half width 12.706
    assert paired_difference([(70, 70), (82, 80)]).high == pytest.approx(1 + 12.706, abs=1e-3)


def test_the_p_value_is_that_of_a_paired_t_test():
    gain = paired_difference([(71, 70), (82, 80), (93, 90)])
    assert gain.p == pytest.approx(0.0742, abs=1e-4)  # t = 2 sqrt(3) = 3.464 with 2 degrees, from a table
    assert gain.p == pytest.approx(ttest_rel([71, 82, 93], [70, 80, 90]).pvalue)
    assert paired_difference([(71, 70), (81, 80)]).p == 0  # equal differences
    assert paired_difference([(70, 70), (80, 80)]).p == 1


def test_holms_correction_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx(
        [0.03, 0.06, 0.06]
    )  # 3 · 0.01; 2 · 0.03; 1 · 0.04, but not below
    assert holm([0.4, 0.6]) == pytest.approx([0.8, 0.8])
    assert holm([0.7, 0.9]) == [1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_of_several_differences_fewer_hold_than_alone(make_run):
    gains = {"static": (0, 0, 0), "condconv": (0.02, 0.03, 0.041), "dyconv": (0.01, 0.03, 0.08)}
    runs = {
        conv: [
            make_run([0.6 + own], seed=seed, **{"model.conv": conv}) for seed, own in enumerate(accuracies)
        ]
        for conv, accuracies in gains.items()
    }
    (alone,) = (group.difference for group in summarise(runs["static"] + runs["condconv"]).groups[1:])
    assert (alone.p, alone.holds) == (alone.holm_p, True)
    first, second = (
        group.difference for group in summarise([run for own in runs.values() for run in own]).groups[1:]
    )
    assert (first.p, first.holm_p, first.holds) == (alone.p, pytest.approx(2 * alone.p), False)
    assert second.holm_p == pytest.approx(max(first.holm_p, second.p))
    assert first.low > 0  # the plain interval stays as it is


def test_the_best_round_is_the_best_on_validation_images(make_run, make_centralised):
    (group,) = summarise([make_run([0.9, 0.7, 0.8], validation=[0.5, 0.8, 0.7])]).groups
    assert (group.best.mean, group.final.mean, group.validation.mean) == pytest.approx((70, 80, 70))
    (group,) = summarise([make_centralised([0.9, 0.7, 0.8], validation=[0.5, 0.8, 0.7])]).groups
    assert group.top5_best.mean == pytest.approx(85)
    (group,) = summarise([make_run([0.9, 0.7, 0.8])]).groups
    assert (group.best.mean, group.validation) == (pytest.approx(90), None)


def test_one_pair_has_no_interval():
    assert paired_difference([(71, 70)]) is None


@pytest.mark.parametrize(
    ("accuracies", "worst"),
    [
        ([50], 50),
        ([90, 20, 70], 20),  # a tenth of three clients is one
        ([*range(40, 59), 30], 35),  # a tenth of twenty is two: 30 and 40
        ([*range(40, 60), 30], (30 + 40 + 41) / 3),  # 2.1 clients are three
    ],
)
def test_the_worst_decile_is_the_mean_of_the_lowest_tenth(accuracies, worst):
    assert worst_decile(accuracies) == pytest.approx(worst)


def test_a_client_counts_by_the_last_round_in_which_it_trained(make_run):
    first, second = (make_run([0.5], clients=own).clients for own in ((0.2, 0.4), (0.6, None)))
    assert client_accuracies([*first, *second]) == [pytest.approx(60), pytest.approx(40)]


@pytest.fixture
def with_work(make_run):
    """Makes a run of clients with 30 and 10 images, two epochs; `work`: a plan's client, images, kernels."""

    def make(*work, **changes):
        run = make_run([0.5], clients=[0.5], **{"train.local-epochs": 2, "model.kernels": 4} | changes)
        (row,) = run.clients
        clients = tuple(
            replace(row, client=client, examples=examples, steps=examples // 10, kernels=kernels)
            for client, examples, kernels in work
        )
        run = replace(run, clients=clients, label_counts=np.array([[20, 10], [10, 0]]))
        return replace(run, cut=cut_percent(run))

    return make


def test_cut_is_the_share_of_images_times_kernels_that_plans_left_out(with_work):
    assert cut_percent(with_work((0, 60, 4), (1, 20, 4))) == 0
    assert cut_percent(with_work((0, 60, 4), (1, 10, 2))) == pytest.approx(100 * 60 / 320)
    assert (
        cut_percent(with_work((0, 30, 1), **{"model.conv": "static"})) == 50
    )  # it has no kernels to leave out
    assert cut_percent(with_work((0, 30, 4), (1, 0, 0))) == 50  # an unfit client had no plan
    groups = summarise([with_work((0, 60, 4)), with_work((0, 30, 4), seed=1)]).groups
    assert groups[0].cut == Estimate(25, pytest.approx(math.sqrt(1250)), 2)


def test_cut_is_unknown_without_the_clients_images(make_run):
    assert cut_percent(make_run([0.5], clients=[0.5])) is None


def test_the_cost_of_a_target_is_that_until_the_first_round_that_reaches_it(make_run):
    runs = [make_run(a) for a in ([0.5, 0.8, 0.7], [0.8, 0.9, 0.9], [0.1, 0.2, 0.3])]
    target = to_target(runs, 80)
    assert (target.reached, target.seeds) == (2, 3)
    assert target.virtual_s == Estimate(15, pytest.approx(math.sqrt(50)), 2)  # 20 and 10 s
    assert target.gflops.mean == 1.5
    assert target.mb.mean == pytest.approx(7.5)  # 5 MB up and down per round


def test_a_target_that_nobody_reaches_has_no_cost(make_run):
    target = to_target([make_run([0.5])], 80)
    assert (target.reached, target.virtual_s, target.gflops, target.mb) == (0, None, None, None)


def test_groups_hold_means_over_seeds(make_run):
    runs = [make_run([0.5, 0.8], seed=1), make_run([0.95, 0.9], clients=(0.7, 0.4), seed=0)]
    (group,) = summarise(runs).groups
    assert [run.seed for run in group.runs] == [0, 1]
    assert group.final == Estimate(pytest.approx(85), pytest.approx(math.sqrt(50)), 2)
    assert group.best.mean == pytest.approx(87.5)
    assert group.worst_clients == Estimate(pytest.approx(40), 0, 1)
    assert (group.virtual_s.mean, group.gflops.mean, group.mb.mean, group.energy_kj.mean) == (20, 2, 10, 1)
    assert group.latency_ms.mean == pytest.approx(2)
    assert group.ies_infer_ms.mean == pytest.approx((2 / 0.8 + 2 / 0.9) / 2)
    assert group.rcs_train.mean == pytest.approx((0.08 + 0.09) / 2)


def test_centralised_groups_have_measured_seconds_and_top5(make_centralised):
    runs = [make_centralised([0.5, 0.8], seed=0), make_centralised([0.95, 0.9], seed=1)]
    summary = summarise(runs)
    (group,) = summary.groups
    assert summary.kind == "centralised"
    assert group.final.mean == pytest.approx(85)
    assert group.top5_final == Estimate(pytest.approx(92.5), pytest.approx(math.sqrt(12.5)), 2)  # 90, 95 %
    assert group.top5_best.mean == pytest.approx((90 + 97.5) / 2)
    assert (group.epoch_s.mean, group.train_s.mean, group.gflops.mean) == (4, 8, 2)
    assert (group.target.train_s.mean, group.target.reached) == (4, 1)  # 85 % after one epoch
    assert group.rcs_train.mean == pytest.approx((0.2 + 0.225) / 2)
    assert (group.virtual_s, group.mb, group.energy_kj, group.worst_clients) == (None,) * 4


def test_a_centralised_front_weighs_accuracy_against_training_time(make_centralised):
    runs = [
        make_centralised([0.7], variant="cheap"),
        make_centralised([0.7, 0.7], variant="dear"),
    ]
    assert [group.fronts for group in summarise(runs).groups] == [("time", "FLOPs", "latency"), ("latency",)]


def test_the_target_is_the_lowest_final_mean_unless_asked(make_run):
    runs = [make_run([0.5, 0.6]), make_run([0.5, 0.7], **{"model.conv": "static"})]
    summary = summarise(runs)
    assert (summary.target, summary.asked) == (pytest.approx(60), False)
    assert [group.target.reached for group in summary.groups] == [1, 1]
    asked = summarise(runs, 65)
    assert (asked.target, asked.asked) == (65, True)
    assert [group.target.reached for group in asked.groups] == [0, 1]


def test_the_difference_to_static_pairs_runs_of_the_same_seed_and_settings(make_run):
    static = [
        make_run([0.6], seed=0, **{"model.conv": "static"}),
        make_run([0.7], seed=1, **{"model.conv": "static"}),
        make_run([0.1], seed=2, **{"model.conv": "static", "train.lr": 0.2}),  # another learning rate
    ]
    dynamic = [
        make_run([accuracy], seed=seed, **{"model.kernels": 2, "temperature.initial": 9.0})
        for seed, accuracy in enumerate((0.65, 0.73, 0.99))
    ]
    *_, group = summarise(static + dynamic).groups
    assert group.difference.pairs == 2
    assert group.difference.mean == pytest.approx(4)  # of 5 and 3 points
    assert summarise(static + dynamic).groups[0].difference is None
    assert summarise(static[:1] + dynamic).groups[1].difference is None


def test_a_wider_static_network_is_compared_with_the_narrowest(make_run):
    def static(width, *accuracies):
        return [
            make_run(
                [value], seed=seed, variant=f"width {width}", **{"model.conv": "static", "model.width": width}
            )
            for seed, value in enumerate(accuracies)
        ]

    dynamic = [make_run([value], seed=seed, **{"model.width": 1.0}) for seed, value in enumerate((0.8, 0.82))]
    groups = summarise([*static(0.5, 0.6, 0.62), *static(1.0, 0.7, 0.73), *static(2.0, 0.9), *dynamic]).groups
    narrow, wide, once, mixed = (group.difference for group in groups)
    assert (narrow, once) == (None, None)  # one pair tells no interval
    assert (wide.pairs, wide.mean) == (2, pytest.approx(10.5))
    assert mixed.mean == pytest.approx(9.5)  # a dynamic one is compared with its own width


def test_fronts_are_those_of_a_task(make_run):
    def group(variant, accuracy, task, rounds=1):
        return make_run([accuracy] * rounds, task=task, variant=variant)

    runs = [
        group("cheap", 0.7, "alpha 0.1"),
        group("dear", 0.8, "alpha 0.1", rounds=2),
        group("dear and bad", 0.6, "alpha 0.1", rounds=2),
        group("alone", 0.9, "alpha 0.5"),
    ]
    fronts = {group.variant: group.fronts for group in summarise(runs).groups}
    assert fronts == {
        "cheap": ("time", "FLOPs", "bytes"),  # in latency all are equal, and dear is more accurate
        "dear": ("time", "FLOPs", "bytes", "latency"),
        "dear and bad": (),
        "alone": (),
    }


def test_tests_of_clients_are_told_by_mean_spread_and_worst_tenth(make_run):
    def tested(seed, *accuracies, personal=None):
        run = make_run([0.5], clients=[0.9] * len(accuracies), seed=seed)
        rows = [
            replace(row, test_accuracy=accuracy, personal_test_accuracy=personal)
            for row, accuracy in zip(run.clients, accuracies, strict=True)
        ]
        earlier = [replace(row, round=0, test_accuracy=0.0) for row in rows]
        return replace(run, clients=(*earlier, *rows))

    (group,) = summarise([tested(0, 0.5, 0.7), tested(1, 0.8)]).groups
    assert group.client_test == Estimate(pytest.approx(70), pytest.approx(math.sqrt(200)), 2)
    assert group.client_test_spread.mean == pytest.approx(math.sqrt(200) / 2)
    assert group.client_test_worst.mean == pytest.approx(65)
    assert (group.personal_test, group.personal_test_spread, group.personal_test_worst) == (None, None, None)
    assert group.worst_clients.mean == pytest.approx(90)
    (group,) = summarise([tested(0, 0.5, 0.7, personal=0.75)]).groups
    assert (group.personal_test.mean, group.personal_test_spread.mean) == (75, 0)


def test_held_out_images_are_no_work_that_was_cut(with_work):
    everything = with_work((0, 2 * 24, 4), (1, 2 * 8, 4), **{"partition.test-share": 0.2})
    assert cut_percent(everything) == 0


@pytest.mark.parametrize(("kernels", "cut"), [((1, 1), 0), ((2, 1), 12.5)])
def test_of_own_code_that_is_not_here_the_rows_tell_the_kernels(with_work, kernels, cut):
    work = [
        (client, images, count) for (client, images), count in zip(((0, 60), (1, 20)), kernels, strict=True)
    ]
    assert cut_percent(with_work(*work, **{"model.conv": "elsewhere:Conv"})) == pytest.approx(cut)
