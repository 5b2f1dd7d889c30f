from dataclasses import replace

import numpy as np
import pytest

from fedfmd.conv import CONVS
from fedfmd.report.plots import (
    ALARM,
    CLIENTS,
    COLOURS,
    PALETTE,
    make_facets,
    plot_accuracy,
    plot_clients,
    plot_curves,
    plot_entropy,
    plot_front,
    plot_scores,
    plot_split,
    plot_timeline,
)
from fedfmd.report.statistics import summarise
from fedfmd.report.wording import WORDINGS


@pytest.fixture
def series(make_run):
    """Two seeds of static and one of fmdconv."""
    static = [make_run([0.4, 0.6], (0.3, 0.5), seed=0, **{"model.conv": "static"})]
    static.append(make_run([0.6, 0.8], (0.5, 0.7), seed=1, **{"model.conv": "static"}))
    (facet,) = make_facets(summarise([*static, make_run([0.5, 0.9], (0.9,))]).groups)
    return facet.series


def line(axes, label):
    return next(line for line in axes.lines if line.get_label() == label)


def test_each_convolution_has_a_colour_of_its_own():
    assert set(COLOURS) == set(CONVS)
    assert len(set(COLOURS.values())) == len(CONVS)


def test_a_convolution_has_the_same_colour_in_every_task(make_run):
    runs = [
        make_run([0.5], task=task, variant=conv, **{"model.conv": conv})
        for task in ("alpha 0.1", "alpha 0.5")
        for conv in ("static", "fmdconv")
    ]
    facets = make_facets(summarise(runs).groups)
    assert [facet.title for facet in facets] == ["alpha 0.1", "alpha 0.5"]
    for facet in facets:
        assert [(one.name, one.colour.lower()) for one in facet.series] == [
            (conv, COLOURS[conv].lower()) for conv in ("static", "fmdconv")
        ]


def test_convolutions_of_ones_own_have_the_colours_that_are_left(make_run):
    convs = ("static", "mine:One", "mine:Other")
    (facet,) = make_facets(summarise([make_run([0.5], **{"model.conv": conv}) for conv in convs]).groups)
    assert len({one.colour for one in facet.series}) == 3
    assert not {one.colour for one in facet.series[1:]} & {colour.lower() for colour in COLOURS.values()}


@pytest.mark.parametrize("column", CLIENTS)
def test_each_accuracy_of_the_clients_is_drawn(column, make_run):
    run = make_run([0.5], clients=[None, None])
    rows = [replace(row, **{column: value}) for row, value in zip(run.clients, (0.2, 0.6), strict=True)]
    (facet,) = make_facets(summarise([replace(run, clients=tuple(rows))]).groups)
    (axes,) = plot_clients(facet.series, column).axes
    assert axes.get_xlabel() == CLIENTS[column][0]
    markers = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "v"]
    assert markers == [pytest.approx(20)]


def test_variants_of_a_convolution_differ_in_colour_dashes_and_marker(make_run):
    runs = [make_run([0.5], variant=f"fmdconv, kernels {kernels}") for kernels in (2, 4, 8)]
    (facet,) = make_facets(summarise(runs).groups)
    for style in ("colour", "dash", "marker"):
        assert len({getattr(one, style) for one in facet.series}) == 3


def test_one_group_per_task_shares_a_panel(make_run):
    runs = [make_run([0.5], task=task, variant="") for task in ("alpha 0.1", "alpha 0.5")]
    (facet,) = make_facets(summarise(runs).groups)
    assert [one.name for one in facet.series] == ["fmdconv, alpha 0.1", "fmdconv, alpha 0.5"]


def policies(make_run, count):
    """So many groups of one convolution, with two seeds each."""
    runs = [make_run([0.5, 0.6], seed=seed, variant=f"{n}") for n in range(count) for seed in (0, 1)]
    (facet,) = make_facets(summarise(runs).groups)
    return facet.series


def test_groups_of_the_only_convolution_have_colours_of_their_own(make_run):
    assert [one.colour for one in policies(make_run, 6)] == list(PALETTE[:6])


@pytest.mark.parametrize(("groups", "lines"), [(5, 3), (6, 1)])
def test_seeds_have_lines_of_their_own_where_there_are_few_groups(groups, lines, make_run):
    (axes,) = plot_entropy(policies(make_run, groups)).axes
    assert len(axes.lines) == groups * lines


@pytest.mark.parametrize(
    ("column", "x"), [("round", [1, 2]), ("virtual_s", [10, 20]), ("cum_train_flops", [1e9, 2e9])]
)
def test_accuracy_is_drawn_as_mean_of_the_seeds(column, x, series):
    (axes,) = plot_accuracy(series, column, 60).axes
    mean = line(axes, "static")
    assert mean.get_xdata().tolist() == x
    assert mean.get_ydata().tolist() == pytest.approx([50, 70])
    assert len(axes.collections) == 1  # the band of static; fmdconv has one seed
    assert axes.get_xlabel() == WORDINGS["federated"].curves[column]
    assert axes.get_ylabel() == "test accuracy (%)"


@pytest.mark.parametrize(
    ("column", "x"), [("epoch", [1, 2]), ("cum_wall_s", [4, 8]), ("cum_train_flops", [1e9, 2e9])]
)
def test_centralised_runs_are_drawn_against_their_own_columns(column, x, make_centralised):
    (facet,) = make_facets(summarise([make_centralised([0.5, 0.6])]).groups)
    (axes,) = plot_accuracy(facet.series, column, 60).axes
    assert line(axes, "fmdconv").get_xdata().tolist() == x
    assert axes.get_xlabel() == WORDINGS["centralised"].curves[column]
    assert plot_entropy(facet.series).axes[0].get_xlabel() == "epoch"


def test_seeds_of_different_length_are_compared_on_common_rounds(make_run):
    runs = [make_run([0.4, 0.6]), make_run([0.6], seed=1, **{"server.rounds": 2})]
    (facet,) = make_facets(summarise(runs).groups)
    (axes,) = plot_entropy(facet.series).axes
    assert line(axes, "fmdconv").get_xdata().tolist() == [1]


def test_curves_are_three_panels_per_facet(series, make_run):
    facets = make_facets(summarise([make_run([0.5])]).groups)
    assert len(plot_curves(facets).axes) == 3


def test_scores_are_bars_of_the_means(series):
    values = [one.group.rcs_infer for one in series]
    (axes,) = plot_scores(series, values, "RCS (1/s)").axes
    assert [bar.get_width() for bar in axes.patches if hasattr(bar, "get_width")][:2] == pytest.approx(
        [350, 450]
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == ["static", "fmdconv"]


def test_the_front_is_a_line_through_the_groups_that_are_not_beaten(series):
    (axes,) = plot_front(series, "gflops", "GFLOPs").axes
    assert axes.lines[0].get_ydata().tolist() == pytest.approx([90])


def test_the_worst_clients_are_marked(series):
    (axes,) = plot_clients(series).axes
    marked = [line.get_xdata()[0] for line in axes.lines if line.get_color() == ALARM]
    assert marked == pytest.approx([40, 90])  # static: mean of 30 and 50 %


def test_the_split_leaves_absent_classes_white():
    figure = plot_split(np.array([[5, 0], [1, 7]]))
    heat = figure.axes[0].images[0].get_array()
    assert np.ma.getmaskarray(np.ma.masked_invalid(heat)).tolist() == [[False, True], [False, False]]


def test_a_time_line_shows_phases_deadline_and_who_was_late(make_run):
    from dataclasses import replace

    ok, late = make_run([0.5], clients=(0.5, 0.5)).clients
    late = replace(late, status="late", compute_s=97.0, total_s=100.0)
    (axes,) = plot_timeline([late, ok], deadline_s=8).axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches if bar.get_y() < 0]
    assert bars == [(0, 1), (1, 3), (4, 2)]  # the first to finish: download, compute, upload
    assert [text.get_text() for text in axes.texts] == ["late, 100 s"]
    assert axes.lines[0].get_xdata() == [8, 8]
    assert 20 < axes.get_xlim()[1] < 30  # the late bar is cut at 2.5 deadlines
