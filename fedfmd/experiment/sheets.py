"""The tables of a comparison: the same cells for Markdown, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich import box
from rich.table import Table

from fedfmd.experiment.summary import Difference, Estimate, Group, Summary
from fedfmd.experiment.tables import si

NOTHING = "–"

Cells = Mapping[str, Callable[[Group], str]]


@dataclass(frozen=True)
class Sheet:
    """A table of texts: the first column names the group, the others hold numbers."""

    title: str
    caption: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


def make_sheets(summary: Summary) -> list[Sheet]:
    """Accuracy, cost to the target, cost of the whole run, and the network."""
    origin = "as asked" if summary.asked else "the lowest mean of the final accuracies"
    return [
        _sheet(
            summary,
            "Accuracy",
            "Test accuracy, mean ± standard deviation over seeds.",
            {
                "seeds": lambda group: str(len(group.runs)),
                "final %": lambda group: _percent(group.final),
                "best %": lambda group: _percent(group.best),
                "worst clients %": lambda group: _percent(group.worst_clients),
                "minus static": _difference,
            },
            {
                "worst clients %": "Worst clients: mean of the worst 10 % of the clients, each on its own images "
                "after local training.",
                "minus static": "Minus static: paired difference of the final accuracy over common seeds in "
                "percentage points, with its 95 % confidence interval (Student's t).",
            },
        ),
        _sheet(
            summary,
            f"To reach {summary.target:.1f} %",
            f"Until the first round with a test accuracy of {summary.target:.1f} % ({origin}): mean ± standard "
            "deviation over the seeds that reached it. Seconds are virtual, FLOPs are those of training, bytes "
            "go up and down.",
            {
                "reached": lambda group: f"{group.target.reached} of {group.target.seeds}",
                "virtual s": lambda group: _amount(group.target.virtual_s, "not reached"),
                "GFLOPs": lambda group: _amount(group.target.gflops, "not reached"),
                "MB": lambda group: _amount(group.target.mb, "not reached"),
            },
        ),
        _sheet(
            summary,
            "Cost of the whole run",
            "Mean ± standard deviation over seeds.",
            {
                "virtual s": lambda group: _amount(group.virtual_s),
                "GFLOPs": lambda group: _amount(group.gflops),
                "MB": lambda group: _amount(group.mb),
                "kJ": lambda group: _amount(group.energy_kj),
                "on the front in": lambda group: ", ".join(group.fronts) or NOTHING,
            },
            {
                "on the front in": "On the front in: no other group of the same data and split is at least as "
                "accurate at no more of this cost and better in one of the two.",
            },
        ),
        _sheet(
            summary,
            "Network and scores",
            "Per image: parameters, multiply-accumulates, modelled latency (mean over the fleet). IES: response "
            "time / accuracy, lower is better; RCS: accuracy / response time, higher is better. The response "
            "time is the latency, or in training the virtual seconds of the last round. Mean over seeds.",
            {
                "parameters": lambda group: si(group.cost.params) if group.cost else NOTHING,
                "MACs": lambda group: si(group.cost.macs) if group.cost else NOTHING,
                "latency ms": lambda group: _mean(group.latency_ms),
                "IES ms": lambda group: _mean(group.ies_infer_ms),
                "RCS 1/s": lambda group: _mean(group.rcs_infer),
                "IES train s": lambda group: _mean(group.ies_train_s),
                "RCS train 1/s": lambda group: _mean(group.rcs_train),
            },
        ),
    ]


def markdown(sheet: Sheet) -> str:
    """The sheet under its title, as a table for a README."""
    lines = [sheet.columns, ("---", *["---:"] * (len(sheet.columns) - 1)), *sheet.lines]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"### {sheet.title}\n\n{sheet.caption}\n\n{table}"


def terminal_table(sheet: Sheet) -> Table:
    """The sheet for a terminal of 100 columns: numbers are never broken, names only if they must be."""
    table = Table(title=sheet.title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    for number, column in enumerate(sheet.columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for line in sheet.lines:
        table.add_row(*line)
    return table


def flat_row(group: Group, target: float) -> dict[str, Any]:
    """All that is known of a group, as cells for CSV and JSON; accuracies in percent, None is unknown."""
    row = {"label": group.label, "seeds": len(group.runs), "rounds": group.runs[0].rounds[-1].round}
    measured = {
        "final": group.final,
        "best": group.best,
        "worst_clients": group.worst_clients,
        "virtual_s": group.virtual_s,
        "gflops": group.gflops,
        "mb": group.mb,
        "energy_kj": group.energy_kj,
        "target_virtual_s": group.target.virtual_s,
        "target_gflops": group.target.gflops,
        "target_mb": group.target.mb,
        "latency_ms": group.latency_ms,
        "ies_infer_ms": group.ies_infer_ms,
        "rcs_infer": group.rcs_infer,
        "ies_train_s": group.ies_train_s,
        "rcs_train": group.rcs_train,
    }
    for name, value in measured.items():
        row[name] = value and _cell(value.mean)
        row[f"{name}_std"] = value and _cell(value.std)
    gain = group.difference
    return row | {
        "target": target,
        "target_reached": group.target.reached,
        "minus_static": gain and gain.mean,
        "minus_static_low": gain and gain.low,
        "minus_static_high": gain and gain.high,
        "minus_static_pairs": gain and gain.pairs,
        "params": group.cost and group.cost.params,
        "macs": group.cost and group.cost.macs,
        "fronts": " ".join(group.fronts),
    }


def _sheet(
    summary: Summary, title: str, caption: str, cells: Cells, notes: Mapping[str, str] = MappingProxyType({})
) -> Sheet:
    """Columns without a value are left out, and with them the notes that explain them in the caption."""
    columns = {"runs": [group.label for group in summary.groups]}
    for name, cell in cells.items():
        column = [cell(group) for group in summary.groups]
        if set(column) != {NOTHING}:
            columns[name] = column
    explained = [note for name, note in notes.items() if name in columns]
    return Sheet(
        title,
        " ".join([caption, *explained]),
        tuple(columns),
        tuple(zip(*columns.values(), strict=True)),
    )


def _cell(value: float) -> float | str:
    """JSON has no infinity."""
    return value if math.isfinite(value) else str(value)


def _percent(value: Estimate | None) -> str:
    return NOTHING if value is None else _spread(value, 1)


def _amount(value: Estimate | None, missing: str = NOTHING) -> str:
    """Three digits, or all those before the point."""
    return missing if value is None else _spread(value, _decimals(value.mean, 3))


def _spread(value: Estimate, decimals: int) -> str:
    """Mean ± standard deviation; one seed has none."""
    mean = f"{value.mean:,.{decimals}f}"
    return mean if value.count == 1 else f"{mean} ± {value.std:,.{decimals}f}"


def _mean(value: Estimate | None) -> str:
    """Four digits."""
    if value is None:
        return NOTHING
    return f"{value.mean:,.{_decimals(value.mean, 4)}f}" if math.isfinite(value.mean) else "∞"


def _decimals(value: float, digits: int) -> int:
    """Places after the point that show so many digits."""
    return max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0


def _difference(group: Group) -> str:
    gain: Difference | None = group.difference
    if gain is None:
        return NOTHING
    return f"{gain.mean:+.1f} [{gain.low:+.1f}, {gain.high:+.1f}]"
