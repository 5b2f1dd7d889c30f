"""The tables of a comparison: the same cells for Markdown, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fedfmd.report.costs import Place, Ranking, spent
from fedfmd.report.selection import Choice
from fedfmd.report.statistics import CONFIDENCE, Estimate, Group, Summary, estimate, final_accuracy
from fedfmd.report.tables import si
from fedfmd.report.wording import WORDINGS, Axis
from fedfmd.runs import ClientRow, EpochRow, RoundRow

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
    """Accuracy, cost to the target, cost of the whole run, the network, and IES and RCS.

    Where there are any, differences to static and tests of clients stand behind the first, and what was tried at the
    end.
    """
    origin = "as asked" if summary.asked else "the lowest mean of the final accuracies"
    wording = WORDINGS[summary.kind]
    sheets = [
        _sheet(
            summary,
            "Accuracy",
            f"Test accuracy, mean ± standard deviation over seeds.{_how_chosen(summary.choice)}",
            {
                "seeds": lambda group: str(len(group.runs)),
                "validation %": lambda group: _percent(group.validation),
                "final %": lambda group: _percent(group.final),
                "best %": lambda group: _percent(group.best),
                "top-5 %": lambda group: _percent(group.top5_final),
                "best top-5 %": lambda group: _percent(group.top5_best),
                "worst clients %": lambda group: _percent(group.worst_clients),
                "ε": lambda group: _mean(group.epsilon),
            },
            {
                "best %": _what_is_best(summary, wording.unit),
                "validation %": f"Validation: after the last {wording.unit}, on images held out of training.",
                "top-5 %": "Top-5: the label is among the five most probable classes.",
                "worst clients %": "Worst clients: mean of the worst 10 % of the clients, each on the images that "
                "it trains on, while it trains.",
                "ε": "ε: differential privacy of the clients after the last round, at the run's privacy.delta.",
            },
        ),
        _sheet(
            summary,
            f"To reach {summary.target:.1f} %",
            f"Until the first {wording.unit} with a test accuracy of {summary.target:.1f} % ({origin}): mean ± "
            f"standard deviation over the seeds that reached it. {wording.seconds} FLOPs are those of training.",
            {
                "reached": lambda group: f"{group.target.reached} of {group.target.seeds}",
                "virtual s": lambda group: _spent(group.target.virtual_s, group.virtual_s),
                "train s": lambda group: _spent(group.target.train_s, group.train_s),
                "GFLOPs": lambda group: _spent(group.target.gflops, group.gflops),
                "MB": lambda group: _spent(group.target.mb, group.mb),
            },
            {"MB": "Bytes go up and down."},
        ),
        _sheet(
            summary,
            "Cost of the whole run",
            "Mean ± standard deviation over seeds.",
            {
                "virtual s": lambda group: _amount(group.virtual_s),
                "s per epoch": lambda group: _amount(group.epoch_s),
                "train s": lambda group: _amount(group.train_s),
                "GFLOPs": lambda group: _amount(group.gflops),
                "MB": lambda group: _amount(group.mb),
                "kJ": lambda group: _amount(group.energy_kj),
                "cut %": lambda group: _percent(group.cut),
                "on the front in": lambda group: ", ".join(group.fronts) or NOTHING,
            },
            {
                "cut %": "Cut: share of the clients' full work, images × kernels trained, that the plans left out; "
                "groups that were cut unequally did not do the same work.",
                "on the front in": "On the front in: no other group of the same data and split is at least as "
                "accurate at no more of this cost and better in one of the two.",
            },
        ),
        _sheet(
            summary,
            "Network",
            f"Parameters; multiply-accumulates and {wording.latency} per image. Mean over seeds.",
            {
                "parameters": lambda group: si(group.cost.params) if group.cost else NOTHING,
                "MACs": lambda group: si(group.cost.macs) if group.cost else NOTHING,
                "latency ms": lambda group: _mean(group.latency_ms),
                "kernel entropy": lambda group: _mean(group.kernel_entropy),
            },
            {"kernel entropy": "Kernel entropy: 1 means that the mixture of kernels is inert."},
        ),
        _sheet(
            summary,
            "IES and RCS",
            "IES: response time / accuracy, lower is better; RCS: accuracy / response time, higher is better. "
            f"{wording.response} Mean over seeds.",
            {
                "IES ms": lambda group: _mean(group.ies_infer_ms),
                "RCS 1/s": lambda group: _mean(group.rcs_infer),
                "IES train s": lambda group: _mean(group.ies_train_s),
                "RCS train 1/s": lambda group: _mean(group.rcs_train),
            },
        ),
    ]
    if any(group.client_test for group in summary.groups):
        sheets.insert(1, _tests_of_clients(summary))
    if summary.groups[0].runs[0].unlabelled:
        sheets.append(_unlabelled(summary))
    if any(group.difference for group in summary.groups):
        sheets.insert(1, _differences(summary))
    if summary.choice:
        sheets.append(_tried(summary.choice))
    return sheets


def ranked_sheet(ranking: Ranking, axis: Axis, target: float, names: Mapping[Group, str]) -> Sheet:
    """Tell who is the most accurate at the same cost, and what each group spent, under these names."""
    places = ranking.places
    budget = f"{_whole(Estimate(ranking.budget, 0.0, 1))} {axis.unit}"
    cells: dict[str, Callable[[Place], str]] = {
        f"% at {budget}": lambda place: _percent(place.accuracy),
        "final %": lambda place: _percent(place.group.final),
        f"{axis.unit} in all": lambda place: _whole(place.whole),
        f"{axis.unit} to {target:.1f} %": _to_target,
        "minus static": lambda place: _minus_static(place.group),
        "on the front": lambda place: "yes" if place.on_front else "",
    }
    notes = {
        "minus static": "Minus static: paired difference of the final accuracies, holding by Holm's p-value or not.",
        "on the front": "On the front: no other is at least as accurate in the end for no more.",
    }
    columns = {"runs": [names[place.group] for place in places]}
    columns |= {name: [cell(place) for place in places] for name, cell in cells.items()}
    columns = {name: column for name, column in columns.items() if set(column) - {"", NOTHING}}
    return Sheet(
        f"Ranking: {axis.name}",
        f"The test accuracy that each had reached for {budget}, the least that any of these runs spent in all, highest "
        f"first: mean ± standard deviation over seeds. {' '.join(notes[name] for name in notes if name in columns)}",
        tuple(columns),
        tuple(zip(*columns.values(), strict=True)),
    )


def runs_sheet(groups: Sequence[Group], costs: Mapping[str, Axis]) -> Sheet:
    """Return a line per run, by group and seed."""
    return Sheet(
        "Runs",
        "Each on a page of its own, which lie in a folder beside this page: settings, rows, clients, time line, split.",
        ("runs", "seed", "final %", *(axis.unit for axis in costs.values())),
        tuple(
            (
                group.label,
                str(run.seed),
                f"{final_accuracy(run):.1f}",
                *(_whole(Estimate(spent(run.rounds, cost)[-1], 0.0, 1)) for cost in costs),
            )
            for group in groups
            for run in group.runs
        ),
    )


def rows_sheet(
    title: str, caption: str, rows: Sequence[RoundRow | ClientRow | EpochRow], first: str
) -> Sheet:
    """Return rows of a run's file under its columns, the first one named, without those that are empty."""
    lines = [asdict(row) for row in rows]
    columns = [name for name in lines[0] if any(line[name] not in (None, "") for line in lines)]
    columns.sort(key=lambda name: name != first)
    return Sheet(
        title, caption, tuple(columns), tuple(tuple(_raw(line[name]) for name in columns) for line in lines)
    )


def devices_sheet(caption: str, rows: Sequence[ClientRow]) -> Sheet:
    """Return a line for each kind of device: its clients, by status, and the means of their rows' numbers."""
    kinds: dict[str, list[ClientRow]] = {}
    for row in rows:
        kinds.setdefault(row.device, []).append(row)
    statuses = [
        status for status in ("ok", "late", "failed", "unfit") if any(r.status == status for r in rows)
    ]

    def mean(own: Sequence[ClientRow], name: str) -> float | None:
        values = [value for row in own if (value := getattr(row, name)) is not None]
        return fmean(values) if values else None

    means = [
        field.name
        for field in fields(ClientRow)
        if field.name not in ("round", "client", "node")
        and any(isinstance(getattr(row, field.name), int | float) for row in rows)
    ]
    return Sheet(
        "Clients by device",
        caption,
        ("device", "clients", *statuses, *means),
        tuple(
            (
                device,
                _raw(len(own)),
                *(_raw(sum(row.status == status for row in own)) for status in statuses),
                *(_raw(mean(own, name)) for name in means),
            )
            for device, own in sorted(kinds.items())
        ),
    )


def markdown(sheet: Sheet) -> str:
    """Return the sheet under its title, as a table for a README."""
    lines = [sheet.columns, ("---", *["---:"] * (len(sheet.columns) - 1)), *sheet.lines]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"### {sheet.title}\n\n{sheet.caption}\n\n{table}"


def terminal_tables(sheet: Sheet, console: Console) -> list[Table]:
    """Return the sheet in as many tables below each other as the console's width needs, each with all names.

    Numbers are never broken, names only if they are longer than a third of the width.
    """
    unlimited = console.options.update_width(10**6)

    def fits(places: Sequence[int]) -> bool:
        table = _terminal_table(sheet, places, console.width)
        return Measurement.get(console, unlimited, table).minimum <= console.width

    parts: list[list[int]] = [[]]
    for place in range(1, len(sheet.columns)):
        if parts[-1] and not fits([*parts[-1], place]):
            parts.append([])
        parts[-1].append(place)
    return [_terminal_table(sheet, places, console.width) for places in parts]


def _terminal_table(sheet: Sheet, places: Sequence[int], width: int) -> Table:
    """Return the names and the columns at these places."""
    title = sheet.title if 1 in places else f"{sheet.title}, continued"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 0, 0, 1))
    longest = max((len(line[0]) for line in sheet.lines), default=0)
    table.add_column(sheet.columns[0], overflow="fold", min_width=min(longest, width // 3))
    for place in places:
        needed = max(len(cells[place]) for cells in (sheet.columns, *sheet.lines))
        table.add_column(sheet.columns[place], justify="right", no_wrap=True, min_width=needed)
    for line in sheet.lines:
        table.add_row(line[0], *(line[place] for place in places))
    return table


def flat_row(group: Group, target: float) -> dict[str, Any]:
    """All that is known of a group, as cells for CSV and JSON; accuracies in percent, None is unknown."""
    wording = WORDINGS[group.kind]
    row = {"label": group.label, "seeds": len(group.runs), f"{wording.unit}s": group.runs[0].rounds[-1].round}
    measured = {name: getattr(group, name) for name in wording.figures}
    measured |= {f"target_{name}": getattr(group.target, name) for name in wording.target}
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
        "minus_static_p": gain and gain.p,
        "minus_static_holm_p": gain and gain.holm_p,
        "chosen": group.chosen,
        "params": group.cost and group.cost.params,
        "macs": group.cost and group.cost.macs,
        "fronts": " ".join(group.fronts),
    }


def _tests_of_clients(summary: Summary) -> Sheet:
    """How well clients are served on images of their own: on average, how unequally, and the worst of them."""
    return _sheet(
        summary,
        "Clients' own test images",
        "Accuracy on what each client held out of its training, when it was last tested: mean over the clients, "
        "standard deviation over them, and mean of the worst 10 %; each as mean ± standard deviation over seeds.",
        {
            "mean %": lambda group: _percent(group.client_test),
            "spread": lambda group: _percent(group.client_test_spread),
            "worst tenth %": lambda group: _percent(group.client_test_worst),
            "own mean %": lambda group: _percent(group.personal_test),
            "own spread": lambda group: _percent(group.personal_test_spread),
            "own worst tenth %": lambda group: _percent(group.personal_test_worst),
        },
        {"own mean %": "Own: of the client's own model, which has layers that never leave it."},
    )


def _unlabelled(summary: Summary) -> Sheet:
    """Return what groups differ in beyond their labels."""
    keys = summary.groups[0].runs[0].unlabelled
    return Sheet(
        "Settings beyond the labels",
        "The labels are as short as they tell the groups apart; they differ in these settings as well.",
        ("runs", *keys),
        tuple(
            (group.label, *(str(group.runs[0].settings.flat()[key]) for key in keys))
            for group in summary.groups
        ),
    )


def _differences(summary: Summary) -> Sheet:
    """Each paired difference, whether it holds on its own, and whether it does among the others."""
    compared = [(group, group.difference) for group in summary.groups if group.difference]
    return Sheet(
        "Difference to static",
        "Paired difference of the final accuracy over common seeds in percentage points, with its 95 % confidence "
        "interval (Student's t) and the p-value of the paired t-test; a wider static network is compared with the "
        "narrowest one. With more comparisons some will be far from "
        f"zero by chance: Holm's p-value is corrected for all {len(compared)}, and a difference holds where it is at "
        f"most {1 - CONFIDENCE:g}.",
        ("runs", "pairs", "minus static", "95 % interval", "p", "Holm's p", "holds"),
        tuple(
            (
                group.label,
                str(gain.pairs),
                f"{gain.mean:+.1f}",
                f"[{gain.low:+.1f}, {gain.high:+.1f}]",
                f"{gain.p:.3f}",
                f"{gain.holm_p:.3f}",
                "yes" if gain.holds else "no",
            )
            for group, gain in compared
        ),
    )


def _tried(choice: Choice) -> Sheet:
    """Every value that was tried."""
    over = choice.selection.over
    return Sheet(
        "What was tried",
        f"Values of {', '.join(over)} by validation accuracy after the last round or epoch, mean ± standard deviation "
        "over seeds. The best mean is chosen; test images have no part in it.",
        ("runs", *over, "seeds", "validation %", "chosen"),
        tuple(
            (
                trial.label,
                *(f"{value:g}" if isinstance(value, float) else str(value) for value in trial.values),
                str(len(trial.accuracies)),
                _percent(estimate(trial.accuracies.values())),
                "chosen" if trial.chosen else "",
            )
            for trial in choice.trials
        ),
    )


def _whole(value: Estimate) -> str:
    """Write a count, such as rounds, that is the same for all seeds without digits after the point."""
    return f"{value.mean:.0f}" if value.std == 0 and value.mean.is_integer() else _amount(value)


def _to_target(place: Place) -> str:
    """Tell the cost, and how many seeds got there if not all did."""
    if place.to_target is None:
        return "not reached"
    reached, seeds = place.to_target.count, len(place.group.runs)
    return _amount(place.to_target) + (f" ({reached} of {seeds})" if reached < seeds else "")


def _minus_static(group: Group) -> str:
    gain = group.difference
    return f"{gain.mean:+.1f}{', holds' if gain.holds else ''}" if gain else NOTHING


def _raw(value: object) -> str:
    """Six digits of a number, all of a whole one."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return NOTHING if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _how_chosen(choice: Choice | None) -> str:
    if choice is None:
        return ""
    selection = choice.selection
    by = f" of {'seeds' if len(selection.seeds) > 1 else 'seed'} {', '.join(map(str, selection.seeds))}"
    return (
        f" Each at its own {', '.join(selection.over)}, chosen by the validation accuracy"
        f"{by if selection.seeds else ''} (see What was tried)."
    )


def _what_is_best(summary: Summary, unit: str) -> str:
    texts = {
        True: f"Best: that of the {unit} with the highest validation accuracy.",
        False: f"Best: the highest of all {unit}s; without validation images that is a choice by the test images.",
    }
    return " ".join(
        texts[known] for known in sorted({group.validation is not None for group in summary.groups})
    )


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


def _spent(until_target: Estimate | None, whole: Estimate | None) -> str:
    """Return what it took to reach the target; nothing if runs of this kind don't have such a cost at all."""
    return _amount(until_target, "not reached" if whole else NOTHING)


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
