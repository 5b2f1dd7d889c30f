"""What runs had spent when: accuracy over a cost, and who is the most accurate at the same cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from fedfmd.cost import pareto_front
from fedfmd.report.statistics import GIGA, KILO, MEGA, Estimate, Group, estimate, estimate_known, until
from fedfmd.runs import EpochRow, RoundRow

Row = RoundRow | EpochRow

_SPENT: dict[str, Callable[[Sequence[Any]], Iterable[float]]] = {
    "round": lambda rows: (row.round for row in rows),
    "virtual_s": lambda rows: (row.virtual_s for row in rows),
    "train_s": lambda rows: (row.cum_wall_s for row in rows),
    "gflops": lambda rows: (row.cum_train_flops / GIGA for row in rows),
    "mb": lambda rows: accumulate((row.up_bytes + row.down_bytes) / MEGA for row in rows),
    "energy_kj": lambda rows: accumulate(row.energy_j / KILO for row in rows),
}


@dataclass(frozen=True, eq=False)
class Curve:
    """A value of the rounds or epochs of a group: mean over its seeds and sample standard deviation.

    Attributes:
        mean, std: of each round or epoch that all seeds have; `std` is 0 for a single seed.
        spent: by cost, the mean of what the seeds had spent by then.
    """

    mean: np.ndarray
    std: np.ndarray
    spent: dict[str, np.ndarray]


@dataclass(frozen=True)
class Place:
    """A group in a ranking.

    Attributes:
        group: which it is.
        accuracy: in percent, of the last model that each seed had when it had spent the budget; None if a seed
            had no model by then.
        whole: what the whole run cost.
        to_target: what it cost to reach the target accuracy; None if no seed did.
        on_front: whether no other group is as accurate in the end for less.
    """

    group: Group
    accuracy: Estimate | None
    whole: Estimate
    to_target: Estimate | None
    on_front: bool


@dataclass(frozen=True)
class Ranking:
    """Groups by falling accuracy at the same cost: `budget`, the least that any of their runs spent in all."""

    budget: float
    places: tuple[Place, ...]


def spent(rows: Sequence[Row], cost: str) -> list[float]:
    """Return what a run had spent after each of its rounds or epochs.

    `cost` is `round` (epochs too), `virtual_s`, `train_s`, `gflops`, `mb` (up and down) or `energy_kj`.
    """
    return list(map(float, _SPENT[cost](rows)))


def mean_curve(group: Group, costs: Iterable[str], value: Callable[[Row], float | None]) -> Curve | None:
    """Return the curve of a value over costs; rounds whose value is missing have no point. None without points."""
    known = [[place for place, row in enumerate(run.rounds) if value(row) is not None] for run in group.runs]
    length = min(map(len, known))
    if not length:
        return None

    def table(columns: Iterable[Sequence[float | None]]) -> np.ndarray:
        chosen = [
            [column[place] for place in places[:length]]
            for column, places in zip(columns, known, strict=True)
        ]
        return np.array(chosen, dtype=float)

    values = table([value(row) for row in run.rounds] for run in group.runs)
    return Curve(
        values.mean(0),
        values.std(0, ddof=1) if len(values) > 1 else np.zeros(length),
        {cost: table(spent(run.rounds, cost) for run in group.runs).mean(0) for cost in costs},
    )


def accuracy_percent(row: Row) -> float | None:
    """Return the accuracy on the test images in percent."""
    return None if row.accuracy is None else 100 * row.accuracy


def rank(groups: Sequence[Group], cost: str, target: float) -> Ranking:
    """Rank groups by their accuracy when each had spent as much as the thriftiest run did in all.

    `target` is the accuracy in percent whose cost is told beside it.
    """
    columns = {group.label: [spent(run.rounds, cost) for run in group.runs] for group in groups}
    budget = min(column[-1] for own in columns.values() for column in own)
    wholes = {label: estimate_known([column[-1] for column in own]) for label, own in columns.items()}
    front = pareto_front([(group.final.mean, wholes[group.label].mean) for group in groups])
    places = [
        Place(
            group,
            _accuracy_at(group, columns[group.label], budget),
            wholes[group.label],
            estimate(
                column[len(rows) - 1]
                for run, column in zip(group.runs, columns[group.label], strict=True)
                if (rows := until(run.rounds, target))
            ),
            place in front,
        )
        for place, group in enumerate(groups)
    ]
    places.sort(key=lambda place: -np.inf if place.accuracy is None else place.accuracy.mean, reverse=True)
    return Ranking(budget, tuple(places))


def _accuracy_at(group: Group, columns: Sequence[Sequence[float]], budget: float) -> Estimate | None:
    """Return the accuracy of the last model that was tested before more than the budget was spent."""
    values = [
        next(
            (
                100 * row.accuracy
                for row, cost in zip(reversed(run.rounds), reversed(column), strict=True)
                if row.accuracy is not None and cost <= budget
            ),
            None,
        )
        for run, column in zip(group.runs, columns, strict=True)
    ]
    return None if None in values else estimate(values)
