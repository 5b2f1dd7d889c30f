import json
from dataclasses import replace

import numpy as np
import pytest

from fedfmd.report.charts import (
    CLIENTS,
    clients_chart,
    curve_chart,
    front_chart,
    split_chart,
    timeline_chart,
    to_json,
)
from fedfmd.report.costs import accuracy_percent, rank
from fedfmd.report.plots import make_facets
from fedfmd.report.statistics import summarise
from fedfmd.report.wording import WORDINGS

COSTS = WORDINGS["federated"].costs


@pytest.fixture
def series(make_run):
    """Two seeds of static and one of fmdconv."""
    static = [make_run([0.4, 0.6], (0.3, 0.5), seed=0, **{"model.conv": "static"})]
    static.append(make_run([0.6, 0.8], (0.5, 0.7), seed=1, **{"model.conv": "static"}))
    (facet,) = make_facets(summarise([*static, make_run([0.5, 0.9], (0.9,))]).groups)
    return facet.series


def drawn(plot, kind):
    """The renderers of a kind of glyph, by their name."""
    return [one for one in plot.renderers if type(one.glyph).__name__ == kind]


def column(renderer, name):
    return np.asarray(renderer.data_source.data[name]).tolist()


def test_a_curve_is_the_mean_over_seeds_over_every_cost(series):
    plot = curve_chart(series, accuracy_percent, "test accuracy (%)", COSTS)
    static, fmdconv = drawn(plot, "Line")
    assert (static.name, fmdconv.name) == ("static", "fmdconv")
    assert column(static, "mean") == pytest.approx([50, 70])
    assert column(static, "low") == pytest.approx([50 - 200**0.5, 70 - 200**0.5])
    assert {cost: column(static, cost) for cost in COSTS} == {
        "round": [1, 2],
        "virtual_s": [10, 20],
        "mb": [5, 10],
        "energy_kj": [0.5, 1],
        "gflops": [1, 2],
    }
    assert len(drawn(plot, "VArea")) == 1  # fmdconv has one seed
    assert (plot.xaxis.axis_label, plot.yaxis.axis_label) == ("round", "test accuracy (%)")


def test_the_page_can_move_curves_to_another_cost_and_switch_series_off(series):
    plot = curve_chart(
        series, accuracy_percent, "", COSTS, {c: rank([series[0].group], c, 50) for c in COSTS}
    )
    assert plot.tags == ["cost"]
    for renderer in plot.renderers:
        key, *moving = renderer.glyph.tags
        assert moving == ["x"]
        assert key == {"static": "s0", "fmdconv": "s1"}.get(renderer.name, "")
        assert set(COSTS) <= set(renderer.data_source.data)
    assert plot.x_range.only_visible
    assert plot.y_range.only_visible


def test_the_front_goes_through_the_groups_that_are_not_beaten(series):
    groups = [one.group for one in series]
    wholes = {
        cost: {place.group.label: place.whole for place in rank(groups, cost, 50).places} for cost in COSTS
    }
    plot = front_chart(series, wholes, COSTS)
    (front,) = drawn(plot, "Step")
    assert column(front, "mb")[:1] == [10]
    assert column(front, "mb:final")[:1] == pytest.approx([90])
    assert np.isnan(column(front, "mb")[1])  # static is beaten
    static, _ = drawn(plot, "Scatter")
    assert [column(static, name)[0] for name in ("mb", "mb:low", "final", "low")] == pytest.approx(
        [10, 10, 70, 70 - 200**0.5]
    )


def test_the_clients_are_boxes_and_the_worst_are_marked(series):
    plot = clients_chart(series, "accuracy")
    static, fmdconv = drawn(plot, "HBar")
    assert [column(static, name)[0] for name in ("low", "q1", "middle", "q3", "high")] == pytest.approx(
        [30, 45, 50, 55, 70]
    )
    assert [column(one, "worst")[0] for one in (static, fmdconv)] == pytest.approx([40, 90])  # of 30 and 50 %
    assert [one.data_source.data["name"] for one in drawn(plot, "Text")] == [["static"], ["fmdconv"]]


@pytest.mark.parametrize("column", CLIENTS)
def test_each_accuracy_of_the_clients_is_drawn(column, make_run):
    run = make_run([0.5], clients=[None, None])
    rows = [replace(row, **{column: value}) for row, value in zip(run.clients, (0.2, 0.6), strict=True)]
    (facet,) = make_facets(summarise([replace(run, clients=tuple(rows))]).groups)
    plot = clients_chart(facet.series, column)
    assert plot.xaxis.axis_label == CLIENTS[column][1]
    (box,) = drawn(plot, "HBar")
    assert [column_of[0] for column_of in (box.data_source.data["worst"], box.data_source.data["high"])] == (
        pytest.approx([20, 60])
    )


def test_the_split_has_counts_and_leaves_absent_classes_empty():
    (image,) = drawn(split_chart(np.array([[4, 0], [1, 9]])), "Image")
    np.testing.assert_array_equal(image.data_source.data["roots"][0], [[2, np.nan], [1, 3]])
    np.testing.assert_array_equal(image.data_source.data["counts"][0], [[4, 0], [1, 9]])


def test_of_many_clients_the_split_shows_how_many_have_so_many_images():
    label_counts = np.repeat([[0, 2], [1, 2]], [150, 50], axis=0)
    (image,) = drawn(split_chart(label_counts), "Image")
    np.testing.assert_array_equal(image.data_source.data["counts"][0], [[150, 0], [50, 0], [0, 200]])
    assert (image.glyph.dw, image.glyph.dh) == (2, 3)


def test_of_many_clients_a_time_line_shows_some_from_the_fastest_to_the_slowest(make_run):
    (row,) = make_run([0.5], clients=(0.5,)).clients
    rows = [replace(row, client=client, total_s=float(client)) for client in range(10_000)]
    (down, *_) = drawn(timeline_chart(rows[::-1], deadline_s=0), "HBar")
    clients = column(down, "client")
    assert (len(clients), clients[0], clients[1], clients[-1]) == (100, 0, 101, 9999)


def test_a_time_line_shows_phases_deadline_and_who_was_late(make_run):
    ok, late = make_run([0.5], clients=(0.5, 0.5)).clients
    late = replace(late, status="late", compute_s=97.0, total_s=100.0)
    plot = timeline_chart([late, ok], deadline_s=8)
    down, compute, up = drawn(plot, "HBar")
    assert [column(compute, name) for name in ("down_s:end", "compute_s:end", "up_s:end")] == [
        [1, 1],
        [4, 98],
        [6, 100],
    ]
    assert [bar.glyph.left for bar in (down, compute, up)] == ["start", "down_s:end", "compute_s:end"]
    assert up.glyph.right == "up_s:end"
    assert column(down, "client") == [0, 1]  # the first to finish at the bottom
    (text,) = drawn(plot, "Text")
    assert text.data_source.data["text"] == ["late, 100 s "]
    assert 20 < plot.x_range.end < 30  # the late bar is cut at 2.5 deadlines


def test_equal_charts_have_equal_texts_that_end_no_script(series):
    named = [replace(one, name="</script><b>") for one in series]
    first, second = (to_json(curve_chart(named, accuracy_percent, "", COSTS)) for _ in range(2))
    assert first == second
    assert "<" not in first
    assert "</script><b>" in json.dumps(json.loads(first))
