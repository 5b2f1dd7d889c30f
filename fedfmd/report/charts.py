"""Charts of a page, by Bokeh: values on hover, axes over what is shown, series that the page switches on and off.

What moves with the chosen cost is drawn from a column per cost. A glyph's tags tell the page: the key of its
series, or "", and then the properties whose columns change (a column is the cost's name, with what comes after a
colon). Names of any text are columns and text glyphs only: Bokeh reads markup in titles, and TeX in labels.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from gzip import compress
from itertools import count
from typing import Any

import numpy as np
from bokeh import __version__
from bokeh.core.serialization import Serializer
from bokeh.models import (
    ColorBar,
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HBar,
    HoverTool,
    Image,
    Label,
    Line,
    LinearColorMapper,
    Range1d,
    Scatter,
    Segment,
    Span,
    Step,
    Text,
    VArea,
    VSpan,
)
from bokeh.palettes import Cividis256
from bokeh.plotting import figure
from bokeh.resources import Resources

from fedfmd.cost import pareto_front
from fedfmd.data.plot import MAX_CLIENTS, clients_by_images
from fedfmd.report.costs import Ranking, Row, mean_curve
from fedfmd.report.plots import MARKERS, Series
from fedfmd.report.statistics import Estimate, client_accuracies
from fedfmd.report.wording import Axis
from fedfmd.runs import ClientRow

SHAPES = dict(
    zip(MARKERS, ("circle", "square", "triangle", "diamond", "inverted_triangle", "plus"), strict=True)
)
"""Bokeh's names of Matplotlib's markers."""

PHASES = {
    "down_s": ("download", "#56B4E9"),
    "compute_s": ("compute", "#999999"),
    "up_s": ("upload", "#E3C800"),
}
CLIENTS = {
    "accuracy": (
        "Spread over the clients",
        "accuracy on the client's own images (%)",
        "worst_clients",
    ),
    "test_accuracy": (
        "Spread over the clients' own tests",
        "accuracy on what the client held out (%)",
        "client_test_worst",
    ),
    "personal_test_accuracy": (
        "Spread over the clients' own models",
        "its own model's accuracy on what the client held out (%)",
        "personal_test_worst",
    ),
}
"""Columns of clients.csv that are drawn by client: title, label, and the field of a `Group` with the worst tenth."""

ALARM, GREY, SMALL = "#B22222", "#888888", "11px"
TEX = r"[$\\]"
MANY = 40  # clients of which not each has its name
LINE = 34
"""Pixels of a line with a name and a box below it."""

FOLLOWS = "cost"
"""Tag of a chart whose horizontal axis is the chosen cost."""


def curve_chart(
    series: Sequence[Series],
    value: Callable[[Row], float | None],
    label: str,
    costs: Mapping[str, Axis],
    rankings: Mapping[str, Ranking] = {},
    target: float | None = None,
) -> figure:
    """Draw a value of the rounds over the chosen cost: mean over seeds, with a band of one standard deviation.

    A vertical line stands where rankings compare, a horizontal one at the target.
    """
    first = next(iter(costs))
    plot = _figure(320, costs[first].label, label)
    plot.tags = [FOLLOWS]
    points = []
    for one in series:
        curve = mean_curve(one.group, costs, value)
        if curve is None:
            continue
        low, high = curve.mean - curve.std, curve.mean + curve.std
        columns = {**curve.spent, "mean": curve.mean, "std": curve.std, "low": low, "high": high}
        data = ColumnDataSource({name: column.astype(np.float32) for name, column in columns.items()})
        tags = [one.key, "x"]
        if len(one.group.runs) > 1:
            alpha = min(0.15, 0.6 / len(series))
            band = VArea(x=first, y1="low", y2="high", fill_color=one.colour, fill_alpha=alpha, tags=tags)
            plot.add_glyph(data, band, name=one.name)
        dash = list(one.dash)
        line = Line(x=first, y="mean", line_color=one.colour, line_width=2, line_dash=dash, tags=tags)
        plot.add_glyph(data, line, name=one.name)
        mark = {"x": first, "y": "mean", "size": 8, "line_color": one.colour, "fill_color": one.colour}
        alone = float(len(curve.mean) == 1)  # a single point has no line
        point = Scatter(**mark, line_alpha=alone, fill_alpha=alone, tags=tags)
        points.append(plot.add_glyph(data, point, hover_glyph=Scatter(**mark), name=one.name))
    if rankings:
        budgets = ColumnDataSource({cost: [ranking.budget] for cost, ranking in rankings.items()})
        plot.add_glyph(budgets, VSpan(x=first, line_color=GREY, line_dash="dashed", tags=["", "x"]))
    if target is not None:
        plot.add_layout(Span(location=target, dimension="width", line_color=GREY, line_dash="dotted"))
        text = f"target {target:.1f}"
        plot.add_layout(Label(x=3, y=target, x_units="screen", text=text, text_font_size=SMALL))
    spread = " ± @std{0.00}" if any(len(one.group.runs) > 1 for one in series) else ""
    _hover(plot, points, [("", "$name"), (label, f"@mean{{0.00}}{spread}"), *_told(costs)])
    return plot


def front_chart(
    series: Sequence[Series], wholes: Mapping[str, Mapping[str, Estimate]], costs: Mapping[str, Axis]
) -> figure:
    """Draw final accuracy against what whole runs cost, with standard deviations, and the Pareto front as steps.

    `wholes` has, by cost, an estimate by the label of each group that is drawn. With several costs the chosen one
    is drawn.
    """
    first = next(iter(costs))
    plot = _figure(320, costs[first].label, "final test accuracy (%)")
    moving = len(costs) > 1
    plot.tags = [FOLLOWS] if moving else []

    def tags(key: str, *properties: str) -> list[str]:
        return [key, *properties] if moving else [key]

    known = [one for one in series if one.group.label in wholes[first]]
    front: dict[str, list[float]] = {}
    for cost in costs:
        ends = [(one.group.final.mean, wholes[cost][one.group.label].mean) for one in known]
        best = [ends[place] for place in pareto_front(ends)]
        padding = [np.nan] * (len(known) - len(best))
        front[cost] = [*(spent for _, spent in best), *padding]
        front[f"{cost}:final"] = [*(final for final, _ in best), *padding]
    look = {"line_width": 5, "line_color": GREY, "line_alpha": 0.35}
    steps = Step(x=first, y=f"{first}:final", mode="after", **look, tags=tags("", "x", "y"))
    plot.add_glyph(ColumnDataSource(front), steps)
    points = []
    for one in known:
        final = one.group.final
        columns = {"final": final.mean, "std": final.std}
        columns |= {"low": final.mean - final.std, "high": final.mean + final.std}
        for cost in costs:
            whole = wholes[cost][one.group.label]
            columns |= {cost: whole.mean}
            columns |= {f"{cost}:low": whole.mean - whole.std, f"{cost}:high": whole.mean + whole.std}
        data = ColumnDataSource({name: [number] for name, number in columns.items()})
        for (x0, x1), (y0, y1) in (
            ((f"{first}:low", f"{first}:high"), ("final", "final")),
            ((first, first), ("low", "high")),
        ):
            bar = {"line_color": one.colour, "line_width": 1.5, "tags": tags(one.key, "x0", "x1")}
            plot.add_glyph(data, Segment(x0=x0, x1=x1, y0=y0, y1=y1, **bar))
        mark = {"marker": SHAPES[one.marker], "line_color": one.colour, "fill_color": one.colour}
        point = Scatter(x=first, y="final", size=9, **mark, tags=tags(one.key, "x"))
        points.append(plot.add_glyph(data, point, name=one.name))
    spread = " ± @std{0.0}" if any(one.group.final.count > 1 for one in known) else ""
    _hover(plot, points, [("", "$name"), ("final accuracy", f"@final{{0.0}}{spread} %"), *_told(costs)])
    return plot


def clients_chart(series: Sequence[Series], column: str) -> figure:
    """Draw the clients' accuracies, all seeds: box of the middle half, whiskers to the extremes, worst 10 % as ▼.

    `column` is one that `CLIENTS` knows. Names stand above the boxes: however long they are, the chart stays as wide.
    """
    _, label, worst_of = CLIENTS[column]
    plot = _figure(60 + LINE * len(series), label, "")
    plot.y_range = Range1d(len(series) - 0.4, -0.85)
    plot.yaxis.visible = plot.ygrid.visible = False
    boxes = []
    for place, one in enumerate(series):
        values = [value for run in one.group.runs for value in client_accuracies(run.clients, column)]
        quartiles = np.percentile(values, [0, 25, 50, 75, 100]).tolist()
        columns = dict(zip(("low", "q1", "middle", "q3", "high"), quartiles, strict=True))
        columns |= {"y": place, "top": place - 0.22, "bottom": place + 0.22, "clients": len(values)}
        worst = getattr(one.group, worst_of)
        columns |= {"worst": worst.mean if worst else np.nan}
        data = ColumnDataSource({name: [number] for name, number in columns.items()} | {"name": [one.name]})
        tags = [one.key]
        box = HBar(y="y", left="q1", right="q3", height=0.44, fill_alpha=0.5, tags=tags)
        box.update(fill_color=one.colour, line_color=one.colour)
        boxes.append(plot.add_glyph(data, box, name=one.name))
        for (x0, x1), (y0, y1), width in (
            (("low", "q1"), ("y", "y"), 1.5),
            (("q3", "high"), ("y", "y"), 1.5),
            (("middle", "middle"), ("top", "bottom"), 3),
        ):
            bar = {"line_color": one.colour, "line_width": width, "tags": tags}
            plot.add_glyph(data, Segment(x0=x0, x1=x1, y0=y0, y1=y1, **bar))
        mark = Scatter(x="worst", y="y", marker="inverted_triangle", size=9, tags=tags)
        mark.update(fill_color=ALARM, line_color=ALARM)
        boxes.append(plot.add_glyph(data, mark, name=one.name))
        name = Text(x=0, y="top", text="name", y_offset=-2, text_font_size=SMALL, tags=tags)
        plot.add_glyph(data, name)
    told = [
        ("clients", "@clients"),
        ("worst 10 %", "@worst{0.0} %"),
        ("lowest", "@low{0.0} %"),
        ("middle half", "@q1{0.0} to @q3{0.0} %"),
        ("median", "@middle{0.0} %"),
        ("highest", "@high{0.0} %"),
    ]
    _hover(plot, boxes, [("", "$name"), *told])
    return plot


def split_chart(label_counts: np.ndarray) -> figure:
    """Draw images per client (down) and class (across); of many clients, how many have so many images (down)."""
    clients = len(label_counts)
    if clients <= MAX_CLIENTS:
        plot = _figure(min(560, 90 + 14 * clients), "class", "client")
        _grid(plot, label_counts, "images", [("client", "$y{0}"), ("class", "$x{0}"), ("images", "@counts")])
        plot.y_range = Range1d(clients - 0.5, -0.5)
        return plot
    counts, step = clients_by_images(label_counts)
    plot = _figure(320, "class", "images of the class")
    images = f"$y{{0}} ± {step / 2:g}" if step > 1 else "$y{0}"
    _grid(
        plot, counts, "clients", [("images", images), ("class", "$x{0}"), ("clients", "@counts")], height=step
    )
    return plot


def _grid(
    plot: figure, counts: np.ndarray, what: str, told: Sequence[tuple[str, str]], height: int = 1
) -> None:
    """Draw numbers as colours, a row `height` high; nothing is none. By the square root, to tell few from fewer."""
    rows, classes = counts.shape
    plot.x_range = Range1d(-0.5, classes - 0.5)
    plot.y_range = Range1d(-0.5, height * rows - 0.5)
    plot.grid.visible = False
    for axis in (plot.xaxis, plot.yaxis):
        axis.ticker.min_interval = 1
    roots = np.sqrt(np.where(counts, counts, np.nan)).astype(np.float32)
    most = int(counts.max())
    colours = LinearColorMapper(palette=Cividis256[::-1], low=0, high=most**0.5, nan_color="#00000000")
    ticks = {count**0.5: str(count) for count in (1, most // 4, most)}
    bar = ColorBar(color_mapper=colours, width=10, title=what, background_fill_alpha=0)
    bar.update(ticker=FixedTicker(ticks=list(ticks)), major_label_overrides=ticks)
    plot.add_layout(bar, "right")
    data = ColumnDataSource({"roots": [roots], "counts": [counts.astype(np.int32)]})
    image = Image(
        image="roots", x=-0.5, y=-0.5, dw=classes, dh=height * rows, color_mapper=colours, tags=[""]
    )
    _hover(plot, [plot.add_glyph(data, image)], told)


def timeline_chart(rows: Sequence[ClientRow], deadline_s: float) -> figure:
    """Draw one round of the fleet: when each client downloads, computes and uploads, the slowest first.

    A deadline of 0 is none. Clients whose update wasn't used have their status in red; bars that go on far
    beyond the deadline are cut at 2.5 times it. Of more than `MAX_CLIENTS` so many are drawn, from the fastest to the
    slowest at even steps.
    """
    ordered = sorted(rows, key=lambda row: row.total_s)
    if len(ordered) > MAX_CLIENTS:
        ordered = [
            ordered[place] for place in np.linspace(0, len(ordered) - 1, MAX_CLIENTS).round().astype(int)
        ]
    height = min(640, 80 + 17 * len(ordered))
    plot = _figure(height, "virtual time since the start of the round (s)", "client")
    plot.y_range = Range1d(-0.6, len(ordered) - 0.4)
    plot.ygrid.visible = False
    plot.yaxis.ticker = list(range(len(ordered))) if len(ordered) <= MANY else []
    plot.yaxis.major_label_overrides = {
        place: f"{row.client} {re.sub(TEX, '', row.device)[:16]}" for place, row in enumerate(ordered)
    }
    ends = np.cumsum([[getattr(row, phase) for row in ordered] for phase in PHASES], axis=0)
    end = float(ends[-1].max()) or 1.0
    if deadline_s:
        end = max(deadline_s, min(end, 2.5 * deadline_s))
        plot.add_layout(Span(location=deadline_s, dimension="height", line_dash="dashed", line_width=1.5))
    plot.x_range = Range1d(0, 1.04 * end)
    told = ("client", "device", "status", "reason", *PHASES, "total_s")
    columns: dict[str, Any] = {name: [getattr(row, name) for row in ordered] for name in told}
    columns |= {f"{phase}:end": own for phase, own in zip(PHASES, ends, strict=True)}
    data = ColumnDataSource(columns | {"place": list(range(len(ordered))), "start": np.zeros(len(ordered))})
    left, bars = "start", list[Any]()
    for phase, (_, colour) in PHASES.items():
        bar = HBar(y="place", height=0.8, left=left, right=f"{phase}:end", fill_color=colour, tags=[""])
        bar.line_color = None
        bars.append(plot.add_glyph(data, bar))
        left = f"{phase}:end"
    unused = [(place, row) for place, row in enumerate(ordered) if row.status != "ok"]
    words = {
        "x": [min(row.total_s, end) for _, row in unused],
        "y": [place for place, _ in unused],
        "text": [f"{row.status}, {row.total_s:.3g} s " for _, row in unused],
    }
    text = Text(text_color=ALARM, text_align="right", text_baseline="middle", text_font_size=SMALL, tags=[""])
    text.update(text_font_style="bold", background_fill_color="white", background_fill_alpha=0.85, padding=1)
    plot.add_glyph(ColumnDataSource(words), text)
    _hover(
        plot,
        bars,
        [
            *((name, f"@{name}") for name in ("client", "device", "status", "reason")),
            *((name, f"@{phase}{{0,0.[00]}} s") for phase, (name, _) in PHASES.items()),
            ("in all", "@total_s{0,0.[00]} s"),
        ],
    )
    return plot


def to_json(plot: figure) -> str:
    """Return what the page draws the chart from; equal charts have equal texts, and none ends a script element."""
    root = Serializer(deferred=False).encode(plot)
    item = {"root_id": root["id"], "doc": {"version": __version__, "title": "", "roots": [root]}}
    numbers = count()
    ids: dict[str, str] = {}

    def renamed(value: Any) -> Any:
        """Bokeh counts the models of a process: here they are counted from 0."""
        if isinstance(value, list | tuple):
            return [renamed(item) for item in value]
        if isinstance(value, dict):
            return {
                key: ids.setdefault(item, f"m{next(numbers)}") if key in ("id", "root_id") else renamed(item)
                for key, item in value.items()
            }
        return value

    return json.dumps(renamed(item), separators=(",", ":")).replace("<", "\\u003c")


@lru_cache
def library() -> str:
    """Return Bokeh's script."""
    return str(Resources("inline", components=["bokeh"]).js_raw[0])


@lru_cache
def packed_library() -> bytes:
    """Return the same, gzipped: a quarter of it."""
    return compress(library().encode(), mtime=0)


def _figure(height: int, x_label: str, y_label: str) -> figure:
    """Return an empty chart that is as wide as its box; a finger on it scrolls the page."""
    plot = figure(
        height=height, sizing_mode="stretch_width", toolbar_location=None, tools="",
        x_axis_label=x_label, y_axis_label=y_label,
        x_range=DataRange1d(only_visible=True), y_range=DataRange1d(only_visible=True),
        background_fill_color=None, border_fill_color=None, outline_line_color=None, min_border_right=12,
    )  # fmt: skip
    for axis in plot.axis:
        axis.update(axis_label_text_font_style="normal", major_label_text_font_size="11px")
        axis.minor_tick_line_color = None
        axis.formatter.use_scientific = False
    return plot


def _hover(plot: figure, renderers: Sequence[Any], told: Sequence[tuple[str, str]]) -> None:
    plot.add_tools(HoverTool(renderers=list(renderers), tooltips=list(told), limit=1))


def _told(costs: Mapping[str, Axis]) -> list[tuple[str, str]]:
    """Return what stands on hover of each cost."""
    return [
        (axis.name, f"@{{{cost}}}{{0,0.[00]}}{'' if axis.unit == axis.name else f' {axis.unit}'}")
        for cost, axis in costs.items()
    ]
