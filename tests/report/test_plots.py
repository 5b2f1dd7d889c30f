import pytest

from fedfmd.conv import CONVS
from fedfmd.report.plots import COLOURS, PALETTE, make_facets, plot_curves
from fedfmd.report.statistics import summarise


def test_each_convolution_has_a_colour_of_its_own():
    assert set(COLOURS) == set(CONVS)
    assert len(set(COLOURS.values())) == len(CONVS)


def test_a_convolution_has_the_same_colour_and_key_in_every_task(make_run):
    runs = [
        make_run([0.5], task=task, variant=conv, **{"model.conv": conv})
        for task in ("alpha 0.1", "alpha 0.5")
        for conv in ("static", "fmdconv")
    ]
    facets = make_facets(summarise(runs).groups)
    assert [facet.title for facet in facets] == ["alpha 0.1", "alpha 0.5"]
    for facet in facets:
        assert [(one.key, one.name, one.colour.lower()) for one in facet.series] == [
            ("s0", "static", COLOURS["static"].lower()),
            ("s1", "fmdconv", COLOURS["fmdconv"].lower()),
        ]


def test_convolutions_of_ones_own_have_the_colours_that_are_left(make_run):
    convs = ("static", "mine:One", "mine:Other")
    (facet,) = make_facets(summarise([make_run([0.5], **{"model.conv": conv}) for conv in convs]).groups)
    assert len({one.colour for one in facet.series}) == 3
    assert not {one.colour for one in facet.series[1:]} & {colour.lower() for colour in COLOURS.values()}


def test_variants_of_a_convolution_differ_in_colour_dashes_and_marker(make_run):
    runs = [make_run([0.5], variant=f"fmdconv, kernels {kernels}") for kernels in (2, 4, 8)]
    (facet,) = make_facets(summarise(runs).groups)
    for style in ("key", "colour", "dash", "marker"):
        assert len({getattr(one, style) for one in facet.series}) == 3


def test_groups_of_the_only_convolution_have_colours_of_their_own(make_run):
    runs = [make_run([0.5], variant=f"{n}") for n in range(6)]
    (facet,) = make_facets(summarise(runs).groups)
    assert [one.colour for one in facet.series] == list(PALETTE[:6])


def test_one_group_per_task_shares_a_panel(make_run):
    runs = [make_run([0.5], task=task, variant="") for task in ("alpha 0.1", "alpha 0.5")]
    (facet,) = make_facets(summarise(runs).groups)
    assert [one.name for one in facet.series] == ["fmdconv, alpha 0.1", "fmdconv, alpha 0.5"]


@pytest.mark.parametrize("kind", ["federated", "centralised"])
def test_the_picture_has_three_panels_with_the_mean_over_seeds(kind, make_run, make_centralised):
    make = make_run if kind == "federated" else make_centralised
    runs = [make([0.4, 0.6], seed=0), make([0.6, 0.8], seed=1)]
    axes = plot_curves(make_facets(summarise(runs).groups)).axes
    assert [one.get_xlabel() for one in axes] == {
        "federated": ["round", "virtual time (s)", "training compute of all clients (GFLOPs)"],
        "centralised": ["epoch", "training time (s)", "training compute (GFLOPs)"],
    }[kind]
    assert [one.lines[0].get_xdata().tolist() for one in axes] == [
        [1, 2],
        [10, 20] if kind == "federated" else [4, 8],
        [1, 2],
    ]
    for one in axes:
        assert one.lines[0].get_ydata().tolist() == pytest.approx([50, 70])
        assert len(one.collections) == 1  # the band
        assert one.get_ylabel() == "test accuracy (%)"
