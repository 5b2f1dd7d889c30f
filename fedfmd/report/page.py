"""The comparison as one HTML page that needs nothing else, and a page for each of its runs.

Neither loads anything from a network. Bokeh's script is in the page, packed; pages of runs that lie together share
one beside them. All text passes through Jinja's escaping, and only the page's own scripts may run.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files

from bokeh.plotting import figure
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedfmd.data.plot import MAX_CLIENTS
from fedfmd.report.charts import (
    CLIENTS,
    clients_chart,
    curve_chart,
    front_chart,
    library,
    packed_library,
    split_chart,
    timeline_chart,
    to_json,
)
from fedfmd.report.costs import Ranking, Row, accuracy_percent, rank
from fedfmd.report.packed import reported_clients
from fedfmd.report.plots import Facet, Series, make_facets
from fedfmd.report.record import PATHS, Run, common_settings
from fedfmd.report.sheets import Sheet, devices_sheet, make_sheets, ranked_sheet, rows_sheet, runs_sheet
from fedfmd.report.statistics import Group, Summary, summarise
from fedfmd.report.wording import WORDINGS, Axis, Wording
from fedfmd.settings import Settings

LIBRARY_FILE = "bokeh.min.js"
MAX_TIMELINES = 6
BOXES = (
    "Accuracy of each client on its own images, those that it trains on as met while it last trained, and those that "
    "it holds out when it was last tested, all seeds. Box: the middle half, with the median; whiskers: lowest and "
    "highest; red triangle: mean of the worst 10 % of the clients."
)
PHASES_TOLD = "Blue: download, grey: compute, yellow: upload; dashed: the deadline."
ENTROPY = (
    "Mean over layers and images of H(π)/ln K: at 1 all kernels count alike and the mixture is inert, at 0 one "
    "kernel wins."
)


@dataclass(frozen=True)
class Picture:
    """A chart with what it shows, in words; with `costs` it is shown while one of these is chosen."""

    title: str
    caption: str
    plot: figure
    costs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """A ranking for one cost, with the series of its lines; the page shows the first until another is chosen."""

    cost: str
    first: bool
    sheet: Sheet
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Split:
    """What is compared on the same data, split in the same way."""

    title: str
    boards: list[Board]
    pictures: list[Picture]


@dataclass(frozen=True)
class Section:
    """A heading with its explanation and its charts."""

    id: str
    title: str
    caption: str
    pictures: list[Picture]


def render_page(
    summary: Summary, sheets: Sequence[Sheet], notes: Sequence[str], pages: Mapping[Run, str]
) -> str:
    """Return the whole page. What is not known of the runs is said in its place.

    `pages` are the addresses of the runs' own pages; without any there are no links to them.
    """
    wording = WORDINGS[summary.kind]
    runs = [run for group in summary.groups for run in group.runs]
    title = f"{len(summary.groups)} {'groups' if len(summary.groups) > 1 else 'group'} of runs compared"
    sections = [_label_splits(runs), _timelines(summary.groups)] if summary.kind == "federated" else []
    return _render(
        "report.html",
        _title(runs[0]) if len(runs) == 1 else title,
        runs,
        notes=notes,
        settings=_public_settings(runs),
        costs=wording.costs,
        splits=[_split(facet, summary.target, wording) for facet in make_facets(summary.groups)],
        sheets=sheets,
        sections=sections,
        index=runs_sheet(summary.groups, wording.costs),
        links=[pages[run] for run in runs if run in pages],
    )


def render_run(run: Run, home: str = "", library_file: str = "") -> str:
    """Return the page of a run.

    Args:
        run: packed or not; its page tells what is known.
        home: address of the comparison's page; without one there is no link.
        library_file: address of Bokeh's script; by default it is in the page.
    """
    wording = WORDINGS[run.settings.kind]
    run = replace(run, variant=run.variant or run.conv)
    summary = summarise([run])
    (facet,) = make_facets(summary.groups)
    result, *_ = make_sheets(summary)
    sheets = [
        rows_sheet(
            f"{wording.unit}s".capitalize(),
            f"The columns of {wording.unit}s.csv; accuracies are shares of 1.",
            run.rounds,
            wording.unit,
        )
    ]
    if clients := {row.client: row for row in reported_clients(run)}:
        lasts = [clients[client] for client in sorted(clients)]
        caption = "The last row of each in clients.csv: of the last round, or of the last with an accuracy."
        if len(lasts) > MAX_CLIENTS:
            sheets.append(
                devices_sheet(f"{caption} Means over the {len(lasts):,} clients, by device.", lasts)
            )
        else:
            sheets.append(rows_sheet("Clients", caption, lasts, "client"))
    return _render(
        "run.html",
        _title(run),
        [run],
        home=home,
        notes=[] if run.finished else [f"Unfinished: {run.progress}."],
        library_file=library_file,
        result=result,
        settings={"folder": run.folder.name, **_public_settings([run])},
        costs=wording.costs,
        pictures=[
            *_curves(facet.series, wording.costs),
            *_timelines(summary.groups).pictures,
            *_label_splits([run]).pictures,
        ],
        sheets=sheets,
    )


def _render(template: str, title: str, runs: Sequence[Run], library_file: str = "", **content: object) -> str:
    script = _resource("page.js")
    own = [_digest(script), "'self' file:" if library_file else _digest(library())]
    return (
        _templates()
        .get_template(template)
        .render(
            title=title,
            overview=_overview(runs),
            origin=_origin(runs),
            style=_resource("page.css"),
            script=script,
            policy=f"default-src 'none'; script-src {' '.join(own)}; style-src 'unsafe-inline'; img-src data:",
            library_file=library_file,
            library="" if library_file else b64encode(packed_library()).decode(),
            **content,
        )
    )


@lru_cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("fedfmd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["chart"] = lambda plot: Markup(to_json(plot))
    return environment


@lru_cache
def _resource(name: str) -> str:
    return files("fedfmd.report").joinpath(name).read_text(encoding="utf-8")


@lru_cache
def _digest(script: str) -> str:
    """Return how a page's policy names a script that may run."""
    return f"'sha256-{b64encode(sha256(script.encode()).digest()).decode()}'"


def _split(facet: Facet, target: float, wording: Wording) -> Split:
    groups = [one.group for one in facet.series]
    by_group = {one.group: one for one in facet.series}
    rankings = {cost: rank(groups, cost, target) for cost in wording.costs}
    boards = [
        Board(
            cost,
            number == 0,
            ranked_sheet(rankings[cost], axis, target, {one.group: one.name for one in facet.series}),
            tuple(by_group[place.group] for place in rankings[cost].places),
        )
        for number, (cost, axis) in enumerate(wording.costs.items())
    ]
    pictures = _curves(facet.series, wording.costs, rankings, target)
    if len(groups) > 1:
        pictures[1:1] = _fronts(facet.series, rankings, wording)
    for column, (title, _, worst) in CLIENTS.items():
        if known := [one for one in facet.series if getattr(one.group, worst)]:
            pictures.append(Picture(title, BOXES, clients_chart(known, column)))
    return Split(facet.title or "Ranking", boards, pictures)


def _curves(
    series: Sequence[Series],
    costs: Mapping[str, Axis],
    rankings: Mapping[str, Ranking] = {},
    target: float | None = None,
) -> list[Picture]:
    """Return accuracy, and kernel entropy where there is any, over the chosen cost."""
    band = (
        " Mean over seeds, band: ± one standard deviation."
        if any(len(s.group.runs) > 1 for s in series)
        else ""
    )
    line = " Dashed: where the ranking compares." if rankings else ""
    pictures = [
        Picture(
            "Accuracy",
            f"Of the model on the test set.{band}{line}",
            curve_chart(series, accuracy_percent, "test accuracy (%)", costs, rankings, target),
        )
    ]
    mixing = [one for one in series if one.group.runs[0].rounds[-1].kernel_entropy is not None]
    if mixing:
        chart = curve_chart(mixing, _entropy, "kernel entropy H(π)/ln K (no unit)", costs)
        pictures.append(Picture("Kernel entropy", ENTROPY, chart))
    return pictures


def _entropy(row: Row) -> float | None:
    return row.kernel_entropy


def _fronts(series: Sequence[Series], rankings: Mapping[str, Ranking], wording: Wording) -> Iterator[Picture]:
    wholes = {
        cost: {place.group.label: place.whole for place in ranking.places}
        for cost, ranking in rankings.items()
    }
    caption = "Grey: the Pareto front, no other beats those on it in both. Up and to the left is better."
    if differing := {
        cost: axis
        for cost, axis in wording.costs.items()
        if len({whole.mean for whole in wholes[cost].values()}) > 1
    }:
        chart = front_chart(series, wholes, differing)
        yield Picture("Final accuracy and cost of the whole run", caption, chart, tuple(differing))
    latencies = {one.group.label: one.group.latency_ms for one in series if one.group.latency_ms}
    if len({latency.mean for latency in latencies.values()}) > 1:
        chart = front_chart(
            series,
            {"latency_ms": latencies},
            {"latency_ms": Axis("latency", "ms", f"{wording.latency} per image (ms)")},
        )
        yield Picture("Final accuracy and latency", caption, chart)


def _label_splits(runs: Sequence[Run]) -> Section:
    """Return a split per task, that of the first run which has one."""
    shown: dict[str, Picture] = {}
    for run in runs:
        if run.label_counts is not None and run.task not in shown:
            scheme = run.settings.partition.scheme
            parts = ("" if scheme in run.task else scheme, run.task, f"seed {run.seed}")
            title = f"Images per client and class: {', '.join(filter(None, parts))}"
            many = len(run.label_counts) > MAX_CLIENTS
            caption = "How many of the clients have so many images of a class." if many else ""
            shown[run.task] = Picture(title, caption, split_chart(run.label_counts))
    return Section(
        "split", "Label split", "Training images of each class that each client has.", list(shown.values())
    )


def _timelines(groups: Sequence[Group]) -> Section:
    pictures = []
    for group in groups[:MAX_TIMELINES]:
        run = group.runs[0]
        last = [row for row in run.clients if row.round == run.rounds[-1].round]
        if last:
            title = f"Time line of round {last[0].round}: {group.label}, seed {run.seed}"
            some = (
                f" {MAX_CLIENTS} of {len(last):,} clients, at even steps." if len(last) > MAX_CLIENTS else ""
            )
            chart = timeline_chart(last, run.settings.budget.deadline_s)
            pictures.append(Picture(title, f"{PHASES_TOLD}{some}", chart))
    return Section(
        "timeline",
        "Time line of a round",
        "The last round of each group's first seed, the first client to finish at the bottom. Red: clients whose "
        "update was not used, and why."
        + (f" The first {MAX_TIMELINES} groups." if len(groups) > MAX_TIMELINES else ""),
        pictures,
    )


def _title(run: Run) -> str:
    what = f"{run.settings.model.arch} with {run.conv} on {run.settings.data.dataset}"
    return f"{what if run.label in ('all runs', run.conv) else run.label}, seed {run.seed}"


def _overview(runs: Sequence[Run]) -> str:
    """Tell what was run, in a sentence."""
    seeds = "seeds" if len({run.seed for run in runs}) > 1 else "seed"

    def values(pick: Callable[[Settings], object]) -> str:
        return ", ".join(dict.fromkeys(str(pick(run.settings)) for run in runs))

    who = (
        f"{len(runs)} {'runs' if len(runs) > 1 else 'run'}: {values(lambda s: s.model.arch)} with "
        f"{values(lambda s: s.model.conv)} on {values(lambda s: s.data.dataset)}, "
    )
    if runs[0].settings.kind == "centralised":
        return who + (
            f"centralised, {values(lambda s: s.length)} epochs in batches of {values(lambda s: s.train.batch_size)}, "
            f"learning rate {values(lambda s: f'{s.train.lr:g} ({s.train.schedule})')}, "
            f"{values(lambda s: s.train.precision)} on {values(lambda s: s.device)}, "
            f"{seeds} {values(lambda s: s.seed)}."
        )
    return who + (
        f"{values(lambda s: s.partition.clients)} clients, {values(lambda s: s.partition.scheme)} split, "
        f"{values(lambda s: s.server.rounds)} rounds, {seeds} {values(lambda s: s.seed)}; "
        f"fleet {values(lambda s: s.fleet.devices)} on {values(lambda s: s.fleet.link)}, "
        f"deadline {values(lambda s: f'{s.budget.deadline_s:g} s' if s.budget.deadline_s else 'none')}."
    )


def _public_settings(runs: Sequence[Run]) -> dict[str, object]:
    """Return the settings in which the runs agree and on which results depend; folders are nobody's business."""
    common = common_settings([run.settings.kept() for run in runs])
    return {key: value for key, value in common.items() if key not in PATHS | Settings.NEUTRAL}


def _origin(runs: Sequence[Run]) -> str:
    """Versions, machine and commit of the runs, as far as they are known."""
    origins = dict.fromkeys(
        f"{', '.join(f'{name} {version}' for name, version in run.environment.get('versions', {}).items())}; "
        f"{run.machine}; commit {str(run.environment.get('commit'))[:12]}"
        for run in runs
        if run.environment
    )
    return " · ".join(origins) or "Versions and machine were not kept of the runs."
