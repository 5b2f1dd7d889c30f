"""The comparison as one HTML page that needs nothing else: no network, no script, no font, pictures inline."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from operator import attrgetter

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedfmd.report import plots
from fedfmd.report.plots import Facet, Series
from fedfmd.report.record import PATHS, Run
from fedfmd.report.sheets import Sheet
from fedfmd.report.statistics import Group, Summary
from fedfmd.report.wording import WORDINGS, Wording
from fedfmd.settings import Settings

MAX_TIMELINES = 6


@dataclass(frozen=True)
class Picture:
    """A figure with what it shows, in words."""

    title: str
    figure: Figure


@dataclass(frozen=True)
class Section:
    """A heading with its explanation and what stands below it, as HTML."""

    id: str
    title: str
    caption: str
    body: str


def render_page(summary: Summary, sheets: Sequence[Sheet], notes: Sequence[str]) -> str:
    """Return the whole page. What is not known of the runs is said in its place."""
    runs = [run for group in summary.groups for run in group.runs]
    with rc_context(plots.STYLE):
        sections = list(_sections(summary, plots.make_facets(summary.groups), runs))
    title = f"{len(summary.groups)} {'groups' if len(summary.groups) > 1 else 'group'} of runs compared"
    if len(runs) == 1:
        title = f"{runs[0].settings.model.arch} with {runs[0].conv} on {runs[0].settings.data.dataset}"
    links = "".join(f'<a href="#{one.id}">{escape(one.title)}</a>' for one in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fedfmd: {escape(title)}</title>
<style>
{files("fedfmd.report").joinpath("page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<p>{escape(_overview(runs))}</p>
{"".join(f'<p class="note">{escape(note)}</p>' for note in notes)}
{_common_settings(runs)}
<nav>{links}</nav>
<main>
<section id="tables"><h2>Results</h2>
{"".join(map(_table, sheets))}
</section>
{"".join(map(_section, sections))}
</main>
<footer>{escape(_origin(runs))}</footer>
</body>
</html>
"""


def _sections(summary: Summary, facets: Sequence[Facet], runs: Sequence[Run]) -> Iterator[Section]:
    wording = WORDINGS[summary.kind]
    yield _accuracy(facets, summary.target, wording)
    if compared := [facet for facet in facets if len(facet.series) > 1]:
        yield _front(compared, wording)
        yield _scores(compared, wording)
    if summary.kind == "federated":
        yield _clients(facets)
        yield _split(runs)
        yield _timeline(summary.groups)
    yield _entropy(facets)


def _accuracy(facets: Sequence[Facet], target: float, wording: Wording) -> Section:
    return Section(
        "accuracy",
        f"Accuracy over {wording.over}",
        "Accuracy of the model on the test set. Thick: mean over seeds; band: ± one standard deviation; "
        f"thin: single seeds, where seeds and groups are at most {plots.FEW}. {wording.seconds}",
        "".join(
            _heading(facet)
            + _legend(facet.series)
            + _plots(
                f"accuracy{number}",
                [
                    Picture(f"Against {label}", plots.plot_accuracy(facet.series, column, target))
                    for column, label in wording.curves.items()
                ],
            )
            for number, facet in enumerate(facets)
        ),
    )


def _front(facets: Sequence[Facet], wording: Wording) -> Section:
    return Section(
        "front",
        "Accuracy against cost",
        "Final accuracy, with standard deviations over seeds as bars. The grey line is the Pareto front: no "
        "group beats those on it in both. Up and to the left is better.",
        "".join(
            _heading(facet)
            + _legend(facet.series)
            + _plots(
                f"front{number}",
                [
                    Picture(f"Against {label}", plots.plot_front(facet.series, field, label))
                    for field, label in wording.fronts.items()
                    if any(getattr(one.group, field) for one in facet.series)
                ],
            )
            for number, facet in enumerate(facets)
        ),
    )


def _scores(facets: Sequence[Facet], wording: Wording) -> Section:
    return Section(
        "scores",
        "IES and RCS",
        f"IES = response time / accuracy, RCS = accuracy / response time. {wording.response} Bars: mean over seeds, "
        "± standard deviation. Both say little where many answers are wrong: look at the accuracy too.",
        "".join(
            _heading(facet)
            + _plots(
                f"scores{number}",
                [
                    Picture(label, plots.plot_scores(facet.series, values, label))
                    for field, label in wording.scores.items()
                    if any(values := [getattr(one.group, field) for one in facet.series])
                ],
            )
            for number, facet in enumerate(facets)
        ),
    )


def _clients(facets: Sequence[Facet]) -> Section:
    return Section(
        "clients",
        "Spread over the clients",
        "Accuracy of each client on its own images, those that it trains on as met while it last trained, and those "
        "that it holds out when it was last tested, all seeds. Box: the middle half, with the median; whiskers: lowest "
        "and highest; red triangle: mean of the worst 10 % of the clients.",
        _plots(
            "clients",
            [
                Picture(_titled(title, facet), plots.plot_clients(facet.series, column))
                for column, title in (
                    ("accuracy", "Accuracy per client"),
                    ("test_accuracy", "Test accuracy per client"),
                    ("personal_test_accuracy", "Test accuracy of the client's own model"),
                )
                for facet in _facets_with(facets, attrgetter(plots.CLIENTS[column][1]))
            ],
        ),
    )


def _split(runs: Sequence[Run]) -> Section:
    return Section(
        "split",
        "Label split",
        "Training images of each class that each client has; white is none.",
        _plots("split", list(_splits(runs))),
    )


def _timeline(groups: Sequence[Group]) -> Section:
    return Section(
        "timeline",
        "Time line of a round",
        "The last round of each group's first seed, the first client to finish at the bottom. Red: clients "
        "whose update was not used, and why."
        + (f" The first {MAX_TIMELINES} groups." if len(groups) > MAX_TIMELINES else ""),
        _plots("timeline", list(_timelines(groups[:MAX_TIMELINES]))),
    )


def _entropy(facets: Sequence[Facet]) -> Section:
    mixing = _facets_with(facets, lambda group: group.runs[0].rounds[-1].kernel_entropy is not None)
    return Section(
        "entropy",
        "Kernel entropy",
        "Mean over layers and images of H(π)/ln K: at 1 all kernels count alike and the mixture is inert, at 0 "
        "one kernel wins.",
        _legend({one.name: one for facet in mixing for one in facet.series}.values())
        + _plots(
            "entropy",
            [Picture(_titled("Kernel entropy", facet), plots.plot_entropy(facet.series)) for facet in mixing],
        ),
    )


def _facets_with(facets: Sequence[Facet], keep: Callable[[Group], object]) -> list[Facet]:
    """Return the facets without the groups that have nothing to show; without empty facets."""
    kept = (Facet(facet.title, tuple(one for one in facet.series if keep(one.group))) for facet in facets)
    return [facet for facet in kept if facet.series]


def _titled(text: str, facet: Facet) -> str:
    return f"{text}: {facet.title}" if facet.title else text


def _splits(runs: Sequence[Run]) -> Iterator[Picture]:
    """Return a split per task, that of the first run which has one."""
    shown: dict[str, tuple[Run, np.ndarray]] = {}
    for run in runs:
        if run.label_counts is not None:
            shown.setdefault(run.task, (run, run.label_counts))
    for run, counts in shown.values():
        scheme = run.settings.partition.scheme
        parts = ("" if scheme in run.task else scheme, run.task, f"seed {run.seed}")
        title = ", ".join(filter(None, parts))
        yield Picture(f"Images per client and class: {title}", plots.plot_split(counts))


def _timelines(groups: Iterable[Group]) -> Iterator[Picture]:
    for group in groups:
        run = group.runs[0]
        last = [row for row in run.clients if row.round == run.rounds[-1].round]
        if last:
            title = f"{group.label}, seed {run.seed}, round {last[0].round}"
            yield Picture(title, plots.plot_timeline(last, run.settings.budget.deadline_s))


def _section(section: Section) -> str:
    body = section.body or '<p class="missing">Nothing of this was kept of the runs.</p>'
    return (
        f'<section id="{section.id}"><h2>{escape(section.title)}</h2>\n'
        f"<p>{escape(section.caption)}</p>\n{body}</section>\n"
    )


def _heading(facet: Facet) -> str:
    return f"<h3>{escape(facet.title)}</h3>\n" if facet.title else ""


def _plots(name: str, pictures: Sequence[Picture]) -> str:
    drawn = [
        f"<figure><figcaption>{escape(picture.title)}</figcaption>\n"
        f"{inline_svg(picture.figure, f'{name}-{number}', picture.title)}</figure>\n"
        for number, picture in enumerate(pictures)
    ]
    layout = "plots pairs" if len(drawn) in (1, 2, 4) else "plots"  # else in rows of three
    return f'<div class="{layout}">\n{"".join(drawn)}</div>\n' if drawn else ""


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """Return the figure as an SVG element that fills its box; `name` keeps its ids apart from those of others."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = text.getvalue()
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    opening, rest = svg.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    return f'{opening} role="img" aria-label="{escape(description)}">{rest}'


def _legend(series: Collection[Series]) -> str:
    items = "".join(
        f'<li><svg width="36" height="12" aria-hidden="true"><line x1="1" y1="6" x2="35" y2="6" stroke="{one.colour}" '
        f'stroke-width="3" stroke-dasharray="{" ".join(str(2 * dash) for dash in one.dash)}"/></svg>'
        f"{escape(one.name)}</li>"
        for one in series
    )
    return f'<ul class="legend">{items}</ul>\n' if items else ""


def _table(sheet: Sheet) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in sheet.columns)
    body = "".join(
        f'<tr><th scope="row">{escape(line[0])}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in line[1:])}</tr>\n"
        for line in sheet.lines
    )
    return (
        f"<h3>{escape(sheet.title)}</h3>\n<p>{escape(sheet.caption)}</p>\n"
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    )


def _overview(runs: Sequence[Run]) -> str:
    """Tell what was run, in a sentence."""

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
            f"{values(lambda s: s.train.precision)} on {values(lambda s: s.device)}, seeds {values(lambda s: s.seed)}."
        )
    return who + (
        f"{values(lambda s: s.partition.clients)} clients, {values(lambda s: s.partition.scheme)} split, "
        f"{values(lambda s: s.server.rounds)} rounds, seeds {values(lambda s: s.seed)}; "
        f"fleet {values(lambda s: s.fleet.devices)} on {values(lambda s: s.fleet.link)}, "
        f"deadline {values(lambda s: f'{s.budget.deadline_s:g} s' if s.budget.deadline_s else 'none')}."
    )


def _common_settings(runs: Sequence[Run]) -> str:
    """All settings in which the runs agree; folders are nobody's business."""
    flats = [run.settings.kept() for run in runs]
    common = [
        (key, value)
        for key, value in flats[0].items()
        if key not in PATHS | Settings.NEUTRAL and all(flat[key] == value for flat in flats)
    ]
    lines = "".join(
        f'<tr><th scope="row">{key}</th><td>{escape(str(value))}</td></tr>' for key, value in common
    )
    return (
        "<details><summary>Settings that all runs have in common</summary>"
        f'<div class="scroll"><table><tbody>{lines}</tbody></table></div></details>'
    )


def _origin(runs: Sequence[Run]) -> str:
    """Versions, machine and commit of the runs, as far as they are known."""
    origins = dict.fromkeys(
        f"{', '.join(f'{name} {version}' for name, version in known.get('versions', {}).items())}; "
        f"{known.get('machine', {}).get('processor')}, {known.get('machine', {}).get('cores')} cores; "
        f"commit {str(known.get('commit'))[:12]}"
        for known in (run.environment for run in runs)
        if known
    )
    return " · ".join(origins) or "Versions and machine were not kept of the runs."
