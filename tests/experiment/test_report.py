from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedfmd.errors import SettingsError
from fedfmd.experiment.report import FILES, read_runs, summarise, write_report
from fedfmd.settings import Settings
from fedfmd.tracking import RoundRow, RunFolder


def row(number: int, accuracy: float, best: float) -> RoundRow:
    return RoundRow(
        round=number,
        virtual_s=10.0 * number,
        round_s=10.0,
        wall_s=1.0,
        loss=1.0,
        accuracy=accuracy,
        best_accuracy=best,
        clients_ok=2,
        clients_late=0,
        clients_failed=0,
        train_flops=10**9,
        cum_train_flops=number * 10**9,
        up_bytes=3 * 10**6,
        down_bytes=3 * 10**6,
        energy_j=500.0,
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of fmdconv (final 80 and 90 %) and one of static (final 70, best 75 %), two rounds each."""
    accuracies = {("fmdconv", 0): (0.5, 0.8), ("fmdconv", 1): (0.6, 0.9), ("static", 0): (0.75, 0.7)}
    for (conv, seed), (first, second) in accuracies.items():
        folder = RunFolder(tmp_path / "runs" / f"{conv}-{seed}")
        folder.write_settings(Settings.from_mapping({"model.conv": conv, "seed": seed}).flat())
        folder.append_round(row(1, first, first), [])
        folder.append_round(row(2, second, max(first, second)), [])
    return tmp_path / "runs"


def test_groups_are_means_over_seeds(runs):
    fmdconv, static = summarise(read_runs([runs]))
    assert (fmdconv.label, fmdconv.seeds, fmdconv.rounds) == ("conv fmdconv", 2, 2)
    assert fmdconv.final == pytest.approx(85)
    assert fmdconv.final_std == pytest.approx(50**0.5)  # of 80 and 90, n - 1 = 1
    assert (fmdconv.virtual_s, fmdconv.gflops, fmdconv.up_mb, fmdconv.energy_kj) == (20, 2, 6, 1)
    assert (static.final, static.best) == (pytest.approx(70), pytest.approx(75))
    assert static.final_std == 0


def test_report_is_written_as_markdown_csv_and_picture(runs, tmp_path):
    groups = write_report([runs], tmp_path / "report")
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == sorted(FILES)
    assert "| conv fmdconv | 2 | 85.0 ± 7.1 | 85.0 ± 7.1 | 20 | 2 | 6 | 1.0 |" in (
        tmp_path / "report" / "report.md"
    ).read_text(encoding="utf-8")
    with (tmp_path / "report" / "report.csv").open() as file:
        assert [line["label"] for line in csv.DictReader(file)] == [group.label for group in groups]
    assert (tmp_path / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no run with a finished round"):
        read_runs([tmp_path])
