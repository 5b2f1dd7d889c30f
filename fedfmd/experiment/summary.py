"""The statistics of a comparison, as pure functions: means over seeds, targets, paired differences, fronts.

Accuracies are in percent, differences in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from scipy.special import stdtrit

from fedfmd.cost import Cost, pareto_front
from fedfmd.experiment.runs import Run
from fedfmd.settings import Settings
from fedfmd.tracking import ClientRow, RoundRow

BASELINE = "static"
CONFIDENCE = 0.95
MILLI, KILO, MEGA, GIGA = 1e-3, 1e3, 1e6, 1e9


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of `count` seeds; the latter is 0 for one seed, NaN with infinities."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of `pairs` paired differences and the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    pairs: int


@dataclass(frozen=True)
class Target:
    """What it took to reach an accuracy, over the `reached` of `seeds` that did: None if none did."""

    reached: int
    seeds: int
    virtual_s: Estimate | None
    gflops: Estimate | None
    mb: Estimate | None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by their seed only.

    Attributes:
        label, task, variant, conv: as in `Run`.
        runs: by rising seed.
        final, best: accuracy of the last round and of the best one.
        worst_clients: mean accuracy of the worst 10 % of the clients on their own images; None without rows.
        difference: of the final accuracy to static's; None for static, and below two common seeds.
        target: the cost of reaching `Summary.target`.
        virtual_s, gflops, mb, energy_kj: of the whole run; `mb` up and down.
        cost: of the network; None if unknown.
        latency_ms: modelled time of inference per image on the fleet.
        ies_infer_ms, rcs_infer: IES and RCS of the last round with this latency as response time.
        ies_train_s, rcs_train: the same with the virtual seconds of the round as response time.
        fronts: the costs (names of `COSTS`) in which no other group of its task is as accurate and cheaper.
    """

    label: str
    task: str
    variant: str
    conv: str
    runs: tuple[Run, ...]
    final: Estimate
    best: Estimate
    worst_clients: Estimate | None
    difference: Difference | None
    target: Target
    virtual_s: Estimate
    gflops: Estimate
    mb: Estimate
    energy_kj: Estimate
    cost: Cost | None
    latency_ms: Estimate | None
    ies_infer_ms: Estimate | None
    rcs_infer: Estimate | None
    ies_train_s: Estimate | None
    rcs_train: Estimate | None
    fronts: tuple[str, ...] = ()


COSTS = {"time": "virtual_s", "FLOPs": "gflops", "bytes": "mb", "latency": "latency_ms"}
"""What accuracy is weighed against: name and field of `Group`."""


@dataclass(frozen=True)
class Summary:
    """All groups, in the order of their first runs. `target` was asked for, or is the lowest final mean."""

    groups: tuple[Group, ...]
    target: float
    asked: bool


def summarise(runs: Sequence[Run], target: float | None = None) -> Summary:
    """Group the runs by label; `target` in percent, by default the lowest mean of the final accuracy."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.label, []).append(run)
    for group in members.values():
        group.sort(key=lambda run: run.seed)
    lowest = min(fmean(map(final_accuracy, group)) for group in members.values())
    goal = lowest if target is None else target
    baselines = {_apart_from_mixture(run.settings): run for run in runs if run.conv == BASELINE}
    groups = [_group(group, baselines, goal) for group in members.values()]
    return Summary(_with_fronts(groups), goal, target is not None)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and standard deviation of the values that exist; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    if not all(map(math.isfinite, known)):
        return Estimate(fmean(known), math.nan, len(known))
    return Estimate(fmean(known), stdev(known) if len(known) > 1 else 0.0, len(known))


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """First minus second, with Student's interval; None for less than two pairs.

    The half width is t(0.975, n - 1) * s / sqrt(n), with s the standard deviation of the differences.
    """
    if len(pairs) < 2:
        return None
    differences = [first - second for first, second in pairs]
    mean = fmean(differences)
    quantile = float(stdtrit(len(pairs) - 1, (1 + CONFIDENCE) / 2))
    half = quantile * stdev(differences) / math.sqrt(len(pairs))
    return Difference(mean, mean - half, mean + half, len(pairs))


def worst_decile(accuracies: Sequence[float]) -> float:
    """Mean of the lowest 10 % of the values, at least of one."""
    lowest = sorted(accuracies)[: math.ceil(len(accuracies) / 10)]
    return fmean(lowest)


def client_accuracies(rows: Iterable[ClientRow]) -> list[float]:
    """Percent of its own images that each client's model got right when it last trained."""
    last = {row.client: 100 * row.accuracy for row in rows if row.accuracy is not None}
    return list(last.values())


def final_accuracy(run: Run) -> float:
    """Percent of the test images that the last model got right."""
    return 100 * next(row.accuracy for row in reversed(run.rounds) if row.accuracy is not None)


def to_target(runs: Sequence[Run], target: float) -> Target:
    """Virtual time, training FLOPs and bytes until the end of the first round with this accuracy."""
    needed = [rows for run in runs if (rows := _until(run.rounds, target))]
    return Target(
        reached=len(needed),
        seeds=len(runs),
        virtual_s=estimate(rows[-1].virtual_s for rows in needed),
        gflops=estimate(rows[-1].cum_train_flops / GIGA for rows in needed),
        mb=estimate(map(_megabytes, needed)),
    )


def _until(rounds: Sequence[RoundRow], target: float) -> Sequence[RoundRow]:
    """The rounds up to the first that reaches the target; none if none does."""
    for number, row in enumerate(rounds, start=1):
        if row.accuracy is not None and 100 * row.accuracy >= target:
            return rounds[:number]
    return ()


def _megabytes(rounds: Sequence[RoundRow]) -> float:
    return sum(row.up_bytes + row.down_bytes for row in rounds) / MEGA


def _apart_from_mixture(settings: Settings) -> tuple[tuple[str, object], ...]:
    """All settings that a static network heeds: runs that have them in common are pairs."""
    mixture = {"model.conv", "model.kernels", "model.attentions", "model.reduction", "model.mixing"}
    return tuple(
        (key, value)
        for key, value in settings.flat().items()
        if key not in Settings.NEUTRAL | mixture and not key.startswith("temperature.")
    )


def _group(runs: Sequence[Run], baselines: Mapping[object, Run], target: float) -> Group:
    first, last = runs[0], [run.rounds[-1] for run in runs]
    pairs = [
        (final_accuracy(run), final_accuracy(baselines[key]))
        for run in runs
        if run.conv != BASELINE and (key := _apart_from_mixture(run.settings)) in baselines
    ]
    return Group(
        label=first.label,
        task=first.task,
        variant=first.variant,
        conv=first.conv,
        runs=tuple(runs),
        final=estimate(map(final_accuracy, runs)),
        best=estimate(
            100 * max(row.accuracy for row in run.rounds if row.accuracy is not None) for run in runs
        ),
        worst_clients=estimate(
            worst_decile(accuracies) for run in runs if (accuracies := client_accuracies(run.clients))
        ),
        difference=paired_difference(pairs),
        target=to_target(runs, target),
        virtual_s=estimate(row.virtual_s for row in last),
        gflops=estimate(row.cum_train_flops / GIGA for row in last),
        mb=estimate(_megabytes(run.rounds) for run in runs),
        energy_kj=estimate(sum(row.energy_j for row in run.rounds) / KILO for run in runs),
        cost=first.cost,
        latency_ms=_scaled((row.latency_s for row in last), MILLI),
        ies_infer_ms=_scaled((row.ies_infer for row in last), MILLI),
        rcs_infer=estimate(row.rcs_infer for row in last),
        ies_train_s=estimate(row.ies_train for row in last),
        rcs_train=estimate(row.rcs_train for row in last),
    )


def _scaled(values: Iterable[float | None], unit: float) -> Estimate | None:
    return estimate(None if value is None else value / unit for value in values)


def _with_fronts(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with the fronts that they are on, among those of their task; a lone group is on none."""
    fronts: dict[str, list[str]] = {group.label: [] for group in groups}
    for task in dict.fromkeys(group.task for group in groups):
        for name, field in COSTS.items():
            rivals = [group for group in groups if group.task == task and getattr(group, field)]
            for rival in front(rivals, field) if len(rivals) > 1 else ():
                fronts[rival.label].append(name)
    return tuple(replace(group, fronts=tuple(fronts[group.label])) for group in groups)


def front(groups: Sequence[Group], field: str) -> list[Group]:
    """The groups that no other beats in the means of final accuracy and this cost, by rising cost."""
    points = [(group.final.mean, getattr(group, field).mean) for group in groups]
    return [groups[index] for index in pareto_front(points)]
