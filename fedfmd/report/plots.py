"""How groups look, and the picture of a comparison for a README.

A convolution has one colour everywhere (Okabe & Ito's, safe for the colour-blind, without their yellow). Groups of
one convolution differ by shade, dashes and marker; where there is no other convolution, by colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedfmd.conv import CONVS
from fedfmd.report.costs import accuracy_percent, mean_curve
from fedfmd.report.statistics import Group
from fedfmd.report.wording import WORDINGS

PALETTE = ("#4d4d4d", "#E69F00", "#CC79A7", "#009E73", "#0072B2", "#D55E00", "#56B4E9", "#7A68B8")
COLOURS = dict(zip(CONVS, PALETTE, strict=False))
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 2), (2, 2), (8, 2, 2, 2))
MARKERS = ("o", "s", "^", "D", "v", "P")
LEGEND_COLUMNS = 3
PANELS = ("round", "virtual_s", "train_s", "gflops")
"""Costs that the picture shows, those that the runs have."""

STYLE: dict[Any, Any] = {  # matplotlib types the keys, and not the same way in all versions
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "figure.dpi": 120,
}
"""Matplotlib's settings for pictures; equal pictures are equal files."""


@dataclass(frozen=True, eq=False)
class Series:
    """A group as it is drawn; `key` stands for its name where names of any text can't."""

    key: str
    name: str
    group: Group
    colour: str
    dash: tuple[int, ...]
    marker: str


@dataclass(frozen=True, eq=False)
class Facet:
    """The groups that share a panel; `title` is what they have in common, "" if there is one facet only."""

    title: str
    series: tuple[Series, ...]


def make_facets(groups: Sequence[Group]) -> list[Facet]:
    """Return a facet per task, if several groups share one; else all in one."""
    tasks = dict.fromkeys(group.task for group in groups)
    if len(tasks) in (1, len(groups)):
        return [Facet("", _series([(group.label, group) for group in groups]))]
    series = _series([(group.variant or group.conv, group) for group in groups])
    return [Facet(task, tuple(one for one in series if one.group.task == task)) for task in tasks]


def _series(named: Sequence[tuple[str, Group]]) -> tuple[Series, ...]:
    """Names of one convolution get its shades, dashes and markers in turn, or colours if they are alone."""
    keys = {name: f"s{number}" for number, name in enumerate(dict.fromkeys(name for name, _ in named))}
    styles = {}
    convs = dict.fromkeys(group.conv for _, group in named)
    own = (conv for conv in convs if conv not in COLOURS)
    colours = COLOURS | dict(zip(own, cycle(PALETTE[len(COLOURS) :]), strict=False))
    for conv in convs:
        names = list(dict.fromkeys(name for name, group in named if group.conv == conv))
        alone = len(convs) == 1 < len(names) <= len(PALETTE)
        for place, name in enumerate(names):
            shade = 0.0 if len(names) == 1 else -0.35 + 0.7 * place / (len(names) - 1)
            colour = PALETTE[place] if alone else _shaded(colours[conv], shade)
            styles[name] = (colour, DASHES[place % len(DASHES)], place)
    return tuple(
        Series(keys[name], name, group, colour, dash, MARKERS[place % len(MARKERS)])
        for name, group in named
        for colour, dash, place in [styles[name]]
    )


def _shaded(colour: str, amount: float) -> str:
    """Nearer to black (to -1) or to white (to 1)."""
    goal = float(amount > 0)
    red, green, blue = (channel + (goal - channel) * abs(amount) for channel in to_rgb(colour))
    return to_hex((red, green, blue))


def plot_curves(facets: Sequence[Facet]) -> Figure:
    """For a README: accuracy against rounds or epochs, time and FLOPs, a row per facet."""
    series = {one.name: one for facet in facets for one in facet.series}
    axes_of = WORDINGS[facets[0].series[0].group.kind].costs
    costs = [cost for cost in axes_of if cost in PANELS]
    lines = -(-len(series) // LEGEND_COLUMNS)
    height = 0.6 + 3.2 * len(facets) + 0.2 * lines
    figure = Figure(figsize=(12, height), layout="constrained")
    panels = figure.subplots(len(facets), len(costs), sharey=True, squeeze=False)
    for facet, row in zip(facets, panels, strict=True):
        for axes, cost in zip(row, costs, strict=True):
            for one in facet.series:
                _draw_accuracy(axes, one, cost)
            axes.set(xlabel=axes_of[cost].label, ylabel="test accuracy (%)")
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=cost == "round"))
            axes.grid()
        row[0].set_title(facet.title, loc="left")
    handles = [Line2D([], [], color=one.colour, linewidth=2, linestyle=_line(one)) for one in series.values()]
    figure.legend(handles, series, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    return figure


def _draw_accuracy(axes: Axes, one: Series, cost: str) -> None:
    """Draw the mean over the seeds as a line and one standard deviation as a band."""
    curve = mean_curve(one.group, [cost], accuracy_percent)
    if curve is None:
        return
    x = curve.spent[cost]
    if len(one.group.runs) > 1:
        axes.fill_between(
            x, curve.mean - curve.std, curve.mean + curve.std, color=one.colour, alpha=0.12, linewidth=0
        )
    marker = one.marker if len(x) == 1 else None  # a single point has no line
    axes.plot(
        x, curve.mean, color=one.colour, linewidth=2, linestyle=_line(one), marker=marker, label=one.name
    )


def _line(one: Series) -> Literal["solid"] | tuple[float, Sequence[float]]:
    return (0, one.dash) if one.dash else "solid"
