"""Pictures of a comparison. A convolution has one colour in all of them (Okabe & Ito's, safe for the colour-blind).

Panels are small, so that they can be read on a phone; the page puts them side by side. Groups of one
convolution differ by shade, dashes and marker; where there is no other convolution, by colour.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm, to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator

from fedfmd.conv import CONVS
from fedfmd.report.statistics import Estimate, Group, client_accuracies, front
from fedfmd.report.wording import WORDINGS
from fedfmd.runs import ClientRow, EpochRow, RoundRow

PALETTE = ("#4d4d4d", "#E69F00", "#CC79A7", "#009E73", "#0072B2", "#D55E00", "#56B4E9", "#F0E442")
COLOURS = dict(zip(CONVS, PALETTE, strict=False))
DASHES: tuple[tuple[int, ...], ...] = ((), (6, 2), (2, 2), (8, 2, 2, 2))
MARKERS = ("o", "s", "^", "D", "v", "P")
PHASES = {
    "down_s": ("download", "#56B4E9"),
    "compute_s": ("compute", "#999999"),
    "up_s": ("upload", "#F0E442"),
}
CLIENTS = {
    "accuracy": ("accuracy on the client's own images (%)", "worst_clients"),
    "test_accuracy": ("accuracy on what the client held out (%)", "client_test_worst"),
    "personal_test_accuracy": (
        "its own model's accuracy on what the client held out (%)",
        "personal_test_worst",
    ),
}
"""Columns of clients.csv that are drawn by client: label, and the field of a `Group` with the worst tenth."""
ALARM = "#B22222"
FEW = 5  # seeds of which each has its own line, if there are no more groups than that either
LEGEND_COLUMNS = 3
MANY = 40  # clients of which not each has its name

STYLE: dict[Any, Any] = {  # matplotlib types the keys, and not the same way in all versions
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "svg.fonttype": "none",
    "svg.hashsalt": "fedfmd",
    "figure.dpi": 120,
}
"""Matplotlib's settings for all these pictures; text stays text, and equal pictures are equal files."""


@dataclass(frozen=True, eq=False)
class Series:
    """A group as it is drawn."""

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
    styles = {}
    convs = dict.fromkeys(group.conv for _, group in named)
    own = (conv for conv in convs if conv not in COLOURS)
    colours = COLOURS | dict(zip(own, cycle(PALETTE[len(COLOURS) :]), strict=False))
    for conv in convs:
        names = list(dict.fromkeys(name for name, group in named if group.conv == conv))
        alone = len(convs) == 1 < len(names) <= len(PALETTE)
        for place, name in enumerate(names):
            shade = 0.0 if len(names) == 1 else -0.45 + 0.95 * place / (len(names) - 1)
            colour = PALETTE[place] if alone else _shaded(colours[conv], shade)
            styles[name] = (colour, DASHES[place % len(DASHES)], place)
    return tuple(
        Series(name, group, colour, dash, MARKERS[place % len(MARKERS)])
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
    lines = -(-len(series) // LEGEND_COLUMNS)
    height = 0.6 + 3.2 * len(facets) + 0.2 * lines
    figure = Figure(figsize=(12, height), layout="constrained")
    for facet, row in zip(facets, figure.subplots(len(facets), 3, sharey=True, squeeze=False), strict=True):
        for axes, column in zip(row, _curves(facet.series), strict=True):
            draw_accuracy(axes, facet.series, column)
        row[0].set_title(facet.title, loc="left")
    handles = [Line2D([], [], color=one.colour, linewidth=2, linestyle=_line(one)) for one in series.values()]
    figure.legend(handles, series, loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False)
    return figure


def plot_accuracy(series: Sequence[Series], column: str, target: float) -> Figure:
    """Test accuracy against a column of rounds.csv or epochs.csv, with the target as a line."""
    figure, axes = _panel()
    draw_accuracy(axes, series, column)
    axes.axhline(target, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"target {target:.1f} %", (0, target), (3, 2), xycoords=("axes fraction", "data"), fontsize=8,
        textcoords="offset points",
    )  # fmt: skip
    return figure


def draw_accuracy(axes: Axes, series: Sequence[Series], column: str) -> None:
    """Mean line and band of a standard deviation per group; with few seeds, a thin line for each.

    The mean at a round stands at the mean of the seeds' `column` after it.
    """
    for one in series:
        _draw_mean(axes, one, column, lambda row: row.accuracy, 100, thin=len(series) <= FEW)
    axes.set(xlabel=_curves(series)[column], ylabel="test accuracy (%)")
    axes.set_xlim(left=0)
    if column == "cum_train_flops":
        axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=column in ("round", "epoch")))
    axes.grid()


def plot_entropy(series: Sequence[Series]) -> Figure:
    """Kernel entropy against rounds or epochs."""
    figure, axes = _panel()
    column, label = next(iter(_curves(series).items()))
    for one in series:
        _draw_mean(axes, one, column, lambda row: row.kernel_entropy, 1, thin=len(series) <= FEW)
    axes.set(xlabel=label, ylabel="kernel entropy H(π)/ln K (no unit)", ylim=(0, 1.05))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid()
    return figure


def plot_scores(series: Sequence[Series], values: Sequence[Estimate | None], label: str) -> Figure:
    """Draw a bar per group, with its standard deviation."""
    figure, axes = _panel(height=0.8 + 0.28 * len(series))
    for place, (one, value) in enumerate(zip(series, values, strict=True)):
        if value is not None and np.isfinite(value.mean):
            error = value.std if value.count > 1 else None
            axes.barh(place, value.mean, xerr=error, color=one.colour, height=0.7, capsize=2)
            axes.annotate(
                _short(value.mean), (0, place), (4, 0), textcoords="offset points", va="center", fontsize=8,
                bbox={"boxstyle": "round,pad=0.15", "color": "white", "alpha": 0.85},
            )  # fmt: skip
    _names(axes, series)
    axes.set_xlabel(label, loc="right")  # long names leave little room to its right
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    return figure


def plot_front(series: Sequence[Series], field: str, label: str) -> Figure:
    """Draw final accuracy against a cost, standard deviations as error bars; the Pareto front as a grey line."""
    figure, axes = _panel()
    known = [one for one in series if getattr(one.group, field) is not None]
    best = front([one.group for one in known], field)
    axes.plot(
        [getattr(group, field).mean for group in best],
        [group.final.mean for group in best],
        color="0.6",
        linewidth=5,
        alpha=0.5,
        drawstyle="steps-post",
        zorder=1,
    )
    for one in known:
        cost, final = getattr(one.group, field), one.group.final
        axes.errorbar(
            cost.mean, final.mean, xerr=cost.std, yerr=final.std, fmt=one.marker, color=one.colour, capsize=2
        )
    axes.set(xlabel=label, ylabel="final test accuracy (%)")
    axes.margins(0.12)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid()
    return figure


def plot_clients(series: Sequence[Series], column: str = "accuracy") -> Figure:
    """Draw the clients' accuracies, all seeds: box of the middle half, whiskers to the extremes, worst 10 % as ▼.

    `column` is one of clients.csv that `CLIENTS` knows.
    """
    label, worst_of = CLIENTS[column]
    figure, axes = _panel(height=0.8 + 0.34 * len(series))
    for place, one in enumerate(series):
        values = [value for run in one.group.runs for value in client_accuracies(run.clients, column)]
        if not values:
            continue
        box = axes.boxplot(
            [values],
            positions=[place],
            orientation="horizontal",
            widths=0.6,
            whis=(0, 100),
            patch_artist=True,
        )
        box["boxes"][0].set(facecolor=one.colour, alpha=0.6)
        box["medians"][0].set(color="black")
        if worst := getattr(one.group, worst_of):
            axes.plot(worst.mean, place, "v", color=ALARM, markersize=7, markeredgecolor="white", zorder=3)
    _names(axes, series)
    axes.set_xlabel(label, loc="right")
    axes.set_xlim(-2, 102)
    axes.grid(axis="x")
    return figure


def plot_split(label_counts: np.ndarray) -> Figure:
    """Images per client (rows) and class (columns); white is none. By the square root, to tell few from fewer."""
    clients, classes = label_counts.shape
    figure, axes = _panel(height=min(6.0, 1.4 + 0.14 * clients))
    heat = axes.imshow(
        np.where(label_counts, label_counts, np.nan),
        aspect="auto",
        interpolation="nearest",
        cmap="cividis_r",
        norm=PowerNorm(0.5, vmin=0),
    )
    axes.set(xlabel="class", ylabel="client")
    axes.xaxis.set_major_locator(MaxNLocator(min(classes, 10), integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(min(clients, 12), integer=True))
    figure.colorbar(heat, ax=axes, label="images")
    return figure


def plot_timeline(rows: Sequence[ClientRow], deadline_s: float) -> Figure:
    """One round of the fleet: when each client downloads, computes and uploads, the slowest first.

    A deadline of 0 is none. Clients whose update wasn't used have their status in red; bars that go on far
    beyond the deadline are cut at 2.5 times it.
    """
    ordered = sorted(rows, key=lambda row: row.total_s)
    places = np.arange(len(ordered))
    figure, axes = _panel(height=min(6.5, 1.3 + 0.17 * len(ordered)))
    start = np.zeros(len(ordered))
    for column, (name, colour) in PHASES.items():
        seconds = np.array([getattr(row, column) for row in ordered])
        axes.barh(
            places, seconds, left=start, color=colour, label=name, height=0.8, edgecolor="white", lw=0.3
        )
        start += seconds
    end = float(start.max())
    if deadline_s:
        axes.axvline(deadline_s, color="black", linestyle="--", linewidth=1.2, label="deadline")
        end = max(deadline_s, min(end, 2.5 * deadline_s))
    unused = [(place, row) for place, row in zip(places, ordered, strict=True) if row.status != "ok"]
    right = end * (1.28 if unused else 1.04) or 1  # the bars leave room for the words
    for place, row in unused:
        axes.annotate(
            f"{row.status}, {row.total_s:.3g} s", (right, place), ha="right", va="center", fontsize=7,
            color=ALARM, weight="bold", bbox={"boxstyle": "round,pad=0.1", "color": "white", "alpha": 0.85},
        )  # fmt: skip
    if len(ordered) <= MANY:
        axes.set_yticks(places, [f"{row.client} {row.device}" for row in ordered], fontsize=7.5)
    else:
        axes.set_yticks([])
    axes.set(xlabel="virtual time since the start of the round (s)", xlim=(0, right))
    axes.set(ylabel="client", ylim=(-0.6, len(ordered) - 0.4))
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8, handlelength=1.2)
    return figure


def _curves(series: Sequence[Series]) -> Mapping[str, str]:
    """Return the columns that their runs' curves are drawn against, and what these are called."""
    return WORDINGS[series[0].group.kind].curves


def _panel(height: float = 2.9) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.subplots()


def _short(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:#.3g}".rstrip(".")


def _names(axes: Axes, series: Sequence[Series]) -> None:
    """Return the groups' names, the first one on top."""
    axes.set_yticks(range(len(series)), [one.name for one in series])
    axes.set_ylim(len(series) - 0.4, -0.6)


def _draw_mean(
    axes: Axes,
    one: Series,
    column: str,
    value: Callable[[RoundRow | EpochRow], float | None],
    scale: float,
    thin: bool,
) -> None:
    """Values that are missing have no points; seeds are compared on the rounds that all of them have."""
    seeds = [
        [(row, known) for row in run.rounds if (known := value(row)) is not None] for run in one.group.runs
    ]
    x, y = (
        np.array([seed[: min(map(len, seeds))] for seed in table])
        for table in (
            [[getattr(row, column) for row, _ in seed] for seed in seeds],
            [[scale * known for _, known in seed] for seed in seeds],
        )
    )
    if not y.size:
        return
    if thin and 1 < len(seeds) <= FEW:
        for own_x, own_y in zip(x, y, strict=True):
            axes.plot(own_x, own_y, color=one.colour, linewidth=0.7, alpha=0.5)
    middle = y.mean(0)
    if len(seeds) > 1:
        spread = y.std(0, ddof=1)
        axes.fill_between(
            x.mean(0),
            middle - spread,
            middle + spread,
            color=one.colour,
            alpha=0.15 if thin else 0.07,
            linewidth=0,
        )
    marker = one.marker if y.shape[1] == 1 else None  # a single point has no line
    axes.plot(
        x.mean(0), middle, color=one.colour, linewidth=2, linestyle=_line(one), marker=marker, label=one.name
    )


def _line(one: Series) -> Literal["solid"] | tuple[float, Sequence[float]]:
    return (0, one.dash) if one.dash else "solid"
