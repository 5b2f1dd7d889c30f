"""Comparing finished runs: tables over seeds as Markdown and CSV, a picture, and a page with all of it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from matplotlib import rc_context

from fedfmd.errors import SettingsError
from fedfmd.report.charts import library
from fedfmd.report.comparison import read_comparison
from fedfmd.report.packed import run_names, write_packed
from fedfmd.report.page import LIBRARY_FILE, render_page, render_run
from fedfmd.report.plots import STYLE, make_facets, plot_curves
from fedfmd.report.record import Run
from fedfmd.report.selection import Selection
from fedfmd.report.sheets import flat_row, make_sheets, markdown
from fedfmd.report.statistics import Summary, summarise
from fedfmd.report.wording import WORDINGS
from fedfmd.runs import atomic_write

PAGE = "report.html"
PAGES = "report_files"
"""Folder of the runs' own pages, named as browsers name the folder that goes with a page."""

FILES = ("report.md", "report.csv", "curves.png", PAGE)


def write_report(
    folders: Sequence[Path],
    out: Path,
    target: float | None = None,
    pack: Path | None = None,
    selection: Selection | None = None,
) -> tuple[Summary, Sequence[str]]:
    """Write `FILES`, and the runs' own pages, into `out`; returns what they compare, and notes on runs left out.

    `target` is the accuracy in percent whose cost is reported, by default the lowest final mean of the groups;
    `selection` is what is chosen by validation, by default what the folders themselves say. All runs that were
    read, those left out too, are packed into the folder `pack`, if there is one, with what is to be chosen.

    Raises:
        SettingsError: as in `read_comparison`, `pack` is the folder of a run, or `target` is no percentage.
    """
    if target is not None and not 0 < target <= 100:
        raise SettingsError(f"--target {target:g} is no accuracy in percent: choose one up to 100")
    comparison = read_comparison(folders, selection)
    summary = summarise(comparison.runs, target, comparison.choice)
    sheets = make_sheets(summary)
    notes = [f"**{note}**\n" for note in comparison.notes]
    text = "\n".join(
        [*notes, *map(markdown, sheets), f"![Accuracy over {WORDINGS[summary.kind].over}](curves.png)\n"]
    )
    picture = io.BytesIO()
    with rc_context(STYLE):
        plot_curves(make_facets(summary.groups)).savefig(picture, format="png")
    runs = [run for group in summary.groups for run in group.runs]
    pages = {run: f"{PAGES}/{name}" for run, name in zip(runs, page_names(runs), strict=True)}
    page = render_page(summary, sheets, comparison.notes, pages)
    if pack:
        write_packed(comparison.read, pack)
        if comparison.choice:
            comparison.choice.selection.write(pack)
    contents: tuple[str | bytes, ...] = (text, _csv(summary), picture.getvalue(), page)
    (out / PAGES).mkdir(parents=True, exist_ok=True)
    atomic_write(out / PAGES / LIBRARY_FILE, library())
    for run, address in pages.items():
        atomic_write(out / address, render_run(run, f"../{PAGE}", LIBRARY_FILE))
    for name, content in zip(FILES, contents, strict=True):
        atomic_write(out / name, content)
    return summary, comparison.notes


def write_page(folder: Path) -> None:
    """Write the page of a single run into its folder.

    Raises:
        SettingsError: as in `read_comparison`.
    """
    runs = read_comparison([folder]).runs
    own = next((run for run in runs if run.folder == folder.resolve()), runs[0])
    atomic_write(folder / PAGE, render_run(own))


def page_names(runs: Sequence[Run]) -> list[str]:
    """Return names for the runs' pages that any file system and address takes, and that tell them apart."""
    return [
        f"{re.sub(r'[^A-Za-z0-9=.+-]+', '-', name)[:80]}-{sha256(name.encode()).hexdigest()[:8]}.html"
        for name in run_names([run.folder for run in runs])
    ]


def _csv(summary: Summary) -> str:
    """Return a line per group, numbers with six digits."""
    rows = [flat_row(group, summary.target) for group in summary.groups]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        for row in rows
    )
    return text.getvalue()
