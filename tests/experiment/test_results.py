"""The studies that come with the project: their reports are what their rows say."""

import csv
from pathlib import Path

import pytest

from fedfmd.report.comparison import read_comparison
from fedfmd.report.packed import MANIFEST
from fedfmd.report.sheets import make_sheets
from fedfmd.report.statistics import summarise

ROOT = Path(__file__).parents[2] / "experiments" / "results"
STUDIES = sorted(path.parent.name for path in ROOT.rglob(MANIFEST))


def test_no_run_folder_is_left():
    assert STUDIES
    assert not list(ROOT.rglob("settings.yaml"))


@pytest.mark.parametrize("name", STUDIES)
def test_the_tables_of_a_study_are_those_of_its_rows(name):
    folder = ROOT / name
    text = (folder / "report.md").read_text(encoding="utf-8")
    with (folder / "report.csv").open() as file:
        target = float(next(csv.DictReader(file))["target"]) if "(as asked)" in text else None
    comparison = read_comparison([folder])
    for sheet in make_sheets(summarise(comparison.runs, target, comparison.choice)):
        for cells in (sheet.columns, *sheet.lines):
            assert f"| {' | '.join(cells)} |\n" in text
    assert all(note in text for note in comparison.notes)
