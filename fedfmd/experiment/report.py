"""Comparing finished runs: means over seeds, as a table and a picture of the learning curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from rich import box
from rich.table import Table

from fedfmd.errors import SettingsError
from fedfmd.experiment.plots import plot_curves
from fedfmd.settings import Settings, read_yaml
from fedfmd.tracking import RoundRow, atomic_write, read_rounds

FILES = ("report.md", "report.csv", "curves.png")
COLUMNS = ("runs", "seeds", "final accuracy %", "best accuracy %", "virtual s", "GFLOPs", "MB up", "kJ")
MEGA, GIGA = 1e6, 1e9


@dataclass(frozen=True)
class Run:
    """A run folder's settings and rounds; `label` tells how it differs from the other runs, seeds aside."""

    label: str
    seed: int
    rounds: tuple[RoundRow, ...]


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed only. Accuracies in percent, mean and standard deviation over seeds.

    The rest are means: virtual seconds, training GFLOPs, megabytes up and kilojoules of the whole run.
    """

    label: str
    seeds: int
    rounds: int
    final: float
    final_std: float
    best: float
    best_std: float
    virtual_s: float
    gflops: float
    up_mb: float
    energy_kj: float


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read every run below these folders.

    Raises:
        SettingsError: there is no run with a finished round.
    """
    folders = list(folders)
    found = sorted({path.parent for folder in folders for path in folder.rglob("rounds.csv")})
    runs = []
    for folder in found:
        values = read_yaml(folder / "settings.yaml")
        if rounds := read_rounds(folder / "rounds.csv"):
            runs.append((Settings.from_mapping(values).flat(), tuple(rounds)))
    if not runs:
        raise SettingsError(f"no run with a finished round below {', '.join(map(str, folders))}")
    ignored = Settings.NEUTRAL | {"seed"}
    differing = [
        key for key in runs[0][0] if key not in ignored and len({settings[key] for settings, _ in runs}) > 1
    ]
    return [
        Run(
            ", ".join(f"{key.rpartition('.')[2]} {settings[key]}" for key in differing) or "all runs",
            int(settings["seed"]),
            rounds,
        )
        for settings, rounds in runs
    ]


def summarise(runs: Sequence[Run]) -> list[Group]:
    """One line per label, in the order of first appearance."""
    labels = dict.fromkeys(run.label for run in runs)
    return [_group(label, [run for run in runs if run.label == label]) for label in labels]


def report_table(groups: Sequence[Group]) -> Table:
    """One line per group."""
    table = Table(*COLUMNS, box=box.SIMPLE)
    for column in table.columns[1:]:
        column.justify = "right"
    for group in groups:
        table.add_row(*_cells(group))
    return table


def markdown(groups: Sequence[Group]) -> str:
    """Write the same table for a README."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, groups)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def write_report(folders: Sequence[Path], out: Path) -> list[Group]:
    """Write `FILES` into `out` and return what they compare."""
    runs = read_runs(folders)
    groups = summarise(runs)
    text = io.StringIO()
    writer = csv.DictWriter(text, asdict(groups[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(group).items()}
        for group in groups
    )
    out.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    curves = [(run.label, run.rounds) for run in runs]
    plot_curves(curves).savefig(picture, format="png")
    for name, content in zip(FILES, (markdown(groups), text.getvalue(), picture.getvalue()), strict=True):
        atomic_write(out / name, content)
    return groups


def _group(label: str, runs: Sequence[Run]) -> Group:
    final = [100 * run.rounds[-1].accuracy for run in runs]
    best = [100 * run.rounds[-1].best_accuracy for run in runs]
    return Group(
        label=label,
        seeds=len(runs),
        rounds=max(run.rounds[-1].round for run in runs),
        final=fmean(final),
        final_std=_spread(final),
        best=fmean(best),
        best_std=_spread(best),
        virtual_s=fmean(run.rounds[-1].virtual_s for run in runs),
        gflops=fmean(run.rounds[-1].cum_train_flops for run in runs) / GIGA,
        up_mb=fmean(sum(row.up_bytes for row in run.rounds) for run in runs) / MEGA,
        energy_kj=fmean(sum(row.energy_j for row in run.rounds) for run in runs) / 1e3,
    )


def _cells(group: Group) -> tuple[str, ...]:
    return (
        group.label,
        str(group.seeds),
        f"{group.final:.1f} ± {group.final_std:.1f}",
        f"{group.best:.1f} ± {group.best_std:.1f}",
        f"{group.virtual_s:.0f}",
        f"{group.gflops:,.0f}",
        f"{group.up_mb:,.0f}",
        f"{group.energy_kj:.1f}",
    )


def _spread(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for a single seed."""
    return stdev(values) if len(values) > 1 else 0.0
