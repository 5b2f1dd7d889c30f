"""The statistics of a comparison, as pure functions: means over seeds, targets, paired differences, fronts.

Accuracies are in percent, differences in percentage points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

from scipy.special import stdtr, stdtrit

from fedfmd.cost import Cost, pareto_front
from fedfmd.data import own_test_size
from fedfmd.own_code import is_own
from fedfmd.report.record import Run
from fedfmd.report.selection import Choice
from fedfmd.runs import ClientRow, EpochRow, RoundRow
from fedfmd.settings import Settings

BASELINE = "static"
CONFIDENCE = 0.95
PERCENT, MILLI, KILO, MEGA, GIGA = 1e-2, 1e-3, 1e3, 1e6, 1e9
TRAFFIC = ("up_bytes", "down_bytes")

Rows = Sequence[RoundRow | EpochRow]
Pairing = tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Estimate:
    """Mean and sample standard deviation of `count` seeds; the latter is 0 for one seed, NaN with infinities."""

    mean: float
    std: float
    count: int


@dataclass(frozen=True)
class Difference:
    """Mean of `pairs` paired differences and the bounds of its 95 % confidence interval.

    `p` is that of the paired t-test, two-sided, and `holm_p` the same corrected for the number of comparisons.
    """

    mean: float
    low: float
    high: float
    pairs: int
    p: float
    holm_p: float

    @property
    def holds(self) -> bool:
        """Whether it differs from zero after the correction."""
        return self.holm_p <= 1 - CONFIDENCE


@dataclass(frozen=True)
class Target:
    """What it took to reach an accuracy, over the `reached` of `seeds` that did: None if none did."""

    reached: int
    seeds: int
    virtual_s: Estimate | None
    train_s: Estimate | None
    gflops: Estimate | None
    mb: Estimate | None


@dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ by their seed only. What runs of their kind don't have is None.

    Attributes:
        label, task, variant, conv: as in `Run`.
        runs: by rising seed.
        chosen: what was chosen for it by validation, such as `train.lr=0.05`; "" if nothing was.
        final: accuracy of the last round or epoch; `top5_final` likewise.
        best: that of the round or epoch with the highest validation accuracy; without validation images the
            highest. `top5_best` likewise.
        validation: accuracy of the last round or epoch on the validation images; None without them.
        worst_clients: mean accuracy of the worst 10 % of the clients on their own images, as met while training; None
            without rows.
        client_test, client_test_spread, client_test_worst: accuracy of the global model on what clients held out: mean
            and standard deviation over the clients, mean of the worst 10 % of them; None without such images.
        personal_test, personal_test_spread, personal_test_worst: the same of the clients' own models.
        cut: as in `Run`.
        difference: of the final accuracy to that of the runs in `baselines_of`; None below two common seeds.
        target: the cost of reaching `Summary.target`.
        virtual_s, train_s, gflops, mb, energy_kj: of the whole run; `mb` up and down, `train_s` measured.
        epoch_s: mean measured seconds of training per epoch.
        kernel_entropy: after the last round or epoch.
        epsilon: ε of differential privacy after the last round; None without.
        cost: of the network; None if unknown.
        latency_ms: time of inference per image, modelled (mean over the fleet) or, if centralised, measured.
        ies_infer_ms, rcs_infer: IES and RCS of the last round or epoch with this latency as response time.
        ies_train_s, rcs_train: the same with the virtual seconds of the round, or the measured ones of the epoch.
        fronts: the costs (names in `COSTS`) in which no other group of its task is as accurate and cheaper.
    """

    label: str
    task: str
    variant: str
    conv: str
    runs: tuple[Run, ...]
    chosen: str
    final: Estimate
    best: Estimate
    validation: Estimate | None
    top5_final: Estimate | None
    top5_best: Estimate | None
    worst_clients: Estimate | None
    client_test: Estimate | None
    client_test_spread: Estimate | None
    client_test_worst: Estimate | None
    personal_test: Estimate | None
    personal_test_spread: Estimate | None
    personal_test_worst: Estimate | None
    difference: Difference | None
    target: Target
    virtual_s: Estimate | None
    train_s: Estimate | None
    epoch_s: Estimate | None
    gflops: Estimate
    mb: Estimate | None
    energy_kj: Estimate | None
    cut: Estimate | None
    kernel_entropy: Estimate | None
    epsilon: Estimate | None
    cost: Cost | None
    latency_ms: Estimate | None
    ies_infer_ms: Estimate | None
    rcs_infer: Estimate | None
    ies_train_s: Estimate | None
    rcs_train: Estimate | None
    fronts: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Federated or centralised."""
        return self.runs[0].settings.kind


COSTS = {
    "virtual_s": "time",
    "train_s": "time",
    "gflops": "FLOPs",
    "mb": "bytes",
    "latency_ms": "latency",
}
"""What accuracy is weighed against: field of `Group` and name."""


@dataclass(frozen=True)
class Summary:
    """All groups, in the order of their first runs. `target` was asked for, or is the lowest final mean.

    `choice` tells what was tried, where groups have values that were chosen by validation.
    """

    groups: tuple[Group, ...]
    target: float
    asked: bool
    choice: Choice | None = None

    @property
    def kind(self) -> str:
        """Federated or centralised; runs of both are never compared."""
        return self.groups[0].kind


def summarise(runs: Sequence[Run], target: float | None = None, choice: Choice | None = None) -> Summary:
    """Group the runs by label; `target` in percent, by default the lowest mean of the final accuracy.

    With a `choice` the runs are those of each label's chosen values, in which pairs of runs may differ.
    """
    members: dict[str, list[Run]] = {}
    for run in runs:
        members.setdefault(run.label, []).append(run)
    for group in members.values():
        group.sort(key=lambda run: run.seed)
    lowest = min(fmean(map(final_accuracy, group)) for group in members.values())
    goal = lowest if target is None else target
    over = choice.selection.over if choice else ()
    baselines = baselines_of(runs, over)
    groups = [_group(group, baselines, goal, over) for group in members.values()]
    return Summary(_with_fronts(_corrected(groups)), goal, target is not None, choice)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Mean and standard deviation of the values that exist; None if there are none."""
    known = [value for value in values if value is not None]
    return estimate_known(known) if known else None


def estimate_known(known: Sequence[float]) -> Estimate:
    """Mean and standard deviation of values that all exist, one at least."""
    if not all(map(math.isfinite, known)):
        return Estimate(fmean(known), math.nan, len(known))
    return Estimate(fmean(known), spread(known), len(known))


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference | None:
    """First minus second, with Student's interval; None for less than two pairs.

    The half width is t(0.975, n - 1) * s / sqrt(n), with s the standard deviation of the differences. The p-value
    is that of a single comparison.
    """
    if len(pairs) < 2:
        return None
    differences = [first - second for first, second in pairs]
    mean, freedom = fmean(differences), len(pairs) - 1
    error = stdev(differences) / math.sqrt(len(pairs))
    half = float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) * error
    p = 2 * float(stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    return Difference(mean, mean - half, mean + half, len(pairs), p, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979); in the same order.

    The lowest of m is multiplied by m, the next by m - 1, and so on; none ends below a lower one, or above 1.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def worst_decile(accuracies: Sequence[float]) -> float:
    """Mean of the lowest 10 % of the values, at least of one."""
    lowest = sorted(accuracies)[: math.ceil(len(accuracies) / 10)]
    return fmean(lowest)


def client_accuracies(rows: Iterable[ClientRow], column: str = "accuracy") -> list[float]:
    """Percent of its own images that each client's model got right when it last trained, or was last tested.

    `column` is one of `fedfmd.report.record.CLIENT_ACCURACIES`.
    """
    known = ((row.client, getattr(row, column)) for row in rows)
    return list({client: 100 * accuracy for client, accuracy in known if accuracy is not None}.values())


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 of a single value."""
    return stdev(values) if len(values) > 1 else 0.0


def _over_clients(
    runs: Iterable[Run], column: str, figure: Callable[[Sequence[float]], float]
) -> Estimate | None:
    """Return a figure of the clients' accuracies, over the seeds; None where no client has one."""
    return estimate(
        figure(accuracies) for run in runs if (accuracies := client_accuracies(run.clients, column))
    )


def cut_percent(run: Run) -> float | None:
    """Percent of the clients' full work, images × kernels trained, that their plans left out; None if unknown."""
    if run.label_counts is None:
        return None
    settings, share = run.settings, run.settings.partition.test_share
    images = [own - own_test_size(own, share) for own in run.label_counts.sum(axis=1).tolist()]
    planned = [row for row in run.clients if row.steps]
    kernels = _kernels(run, planned)
    full = sum(settings.train.local_epochs * images[row.client] * kernels for row in planned)
    left = full - sum(row.examples * row.kernels for row in planned)
    return 100 * left / full if full else None


def _kernels(run: Run, planned: Sequence[ClientRow]) -> int:
    """Return how many kernels a bank has; of own code that isn't on this machine, the most that a client trained."""
    model = run.settings.model
    if run.cost:
        return run.cost.kernels
    if is_own(model.arch) or is_own(model.conv):
        return max((row.kernels for row in planned), default=1)
    return 1 if run.conv == BASELINE else model.kernels


def final_accuracy(run: Run) -> float:
    """Percent of the test images that the last model got right."""
    return 100 * next(row.accuracy for row in reversed(run.rounds) if row.accuracy is not None)


def to_target(runs: Sequence[Run], target: float) -> Target:
    """Time, training FLOPs and bytes until the end of the first round or epoch with this accuracy."""
    needed = [rows for run in runs if (rows := until(run.rounds, target))]
    ends = [rows[-1] for rows in needed]
    return Target(
        reached=len(needed),
        seeds=len(runs),
        virtual_s=_column(ends, "virtual_s"),
        train_s=_column(ends, "cum_wall_s"),
        gflops=_column(ends, "cum_train_flops", GIGA),
        mb=estimate(_total(rows, TRAFFIC, MEGA) for rows in needed),
    )


def until(rounds: Rows, target: float) -> Rows:
    """Return the rounds or epochs up to the first that reaches the target; none if none does."""
    for number, row in enumerate(rounds, start=1):
        if row.accuracy is not None and 100 * row.accuracy >= target:
            return rounds[:number]
    return ()


def _column(rows: Rows, name: str, unit: float = 1.0) -> Estimate | None:
    """Over the seeds, a row of each; None if rows of their kind lack the column."""
    values = [getattr(row, name, None) for row in rows]
    return estimate(None if value is None else value / unit for value in values)


def _total(rounds: Rows, names: Sequence[str], unit: float) -> float | None:
    """Sum of columns of rounds; None for epochs, which lack them."""
    if isinstance(rounds[0], EpochRow):
        return None
    return float(sum(getattr(row, name) for row in rounds for name in names)) / unit


def _best(rounds: Rows, name: str) -> float | None:
    """Return a percentage of the round or epoch with the highest validation accuracy; None if there is none.

    Without validation images it is the column's highest.
    """
    known = [
        (value if row.validation_accuracy is None else row.validation_accuracy, value)
        for row in rounds
        if (value := getattr(row, name, None)) is not None
    ]
    return 100 * max(known, key=lambda pair: pair[0])[1] if known else None


def baselines_of(runs: Sequence[Run], chosen: Collection[str] = ()) -> dict[Run, Run]:
    """Return the static run with which each run's accuracy is compared, where there is one.

    Both have the same values of all settings that static networks heed, but those `chosen` for each variant. A
    static run is compared with that of the narrowest network, which shows what more parameters do without
    attentions.
    """
    but_width = {*chosen, "model.width"}
    static = sorted((run for run in runs if run.conv == BASELINE), key=_width, reverse=True)
    equals = {_apart_from_mixture(run.settings, chosen): run for run in static}
    narrowest = {_apart_from_mixture(run.settings, but_width): run for run in static}
    found: dict[Run, Run] = {}
    for run in runs:
        if run.conv != BASELINE:
            other = equals.get(_apart_from_mixture(run.settings, chosen))
        else:
            other = narrowest[_apart_from_mixture(run.settings, but_width)]
        if other and (run.conv != BASELINE or _width(other) < _width(run)):
            found[run] = other
    return found


def _width(run: Run) -> float:
    return run.settings.model.width


def _apart_from_mixture(settings: Settings, ignored: Collection[str]) -> Pairing:
    """All settings that a static network heeds, but for the `ignored` ones."""
    mixture = {
        *("model.conv", "model.kernels", "model.attentions", "model.attention-init"),
        *("model.reduction", "model.mixing", "model.conv-options"),
    }
    return tuple(
        (key, value)
        for key, value in settings.flat().items()
        if key not in Settings.NEUTRAL.union(mixture, ignored) and not key.startswith("temperature.")
    )


def _group(runs: Sequence[Run], baselines: Mapping[Run, Run], target: float, over: Collection[str]) -> Group:
    first, last = runs[0], [run.rounds[-1] for run in runs]
    pairs = [(final_accuracy(run), final_accuracy(baselines[run])) for run in runs if run in baselines]
    return Group(
        label=first.label,
        task=first.task,
        variant=first.variant,
        conv=first.conv,
        runs=tuple(runs),
        chosen=", ".join(f"{key}={first.settings.flat()[key]}" for key in over),
        final=estimate_known([final_accuracy(run) for run in runs]),
        best=estimate_known([best for run in runs if (best := _best(run.rounds, "accuracy")) is not None]),
        validation=_column(last, "validation_accuracy", PERCENT),
        top5_final=_column(last, "top5_accuracy", PERCENT),
        top5_best=estimate(_best(run.rounds, "top5_accuracy") for run in runs),
        worst_clients=_over_clients(runs, "accuracy", worst_decile),
        client_test=_over_clients(runs, "test_accuracy", fmean),
        client_test_spread=_over_clients(runs, "test_accuracy", spread),
        client_test_worst=_over_clients(runs, "test_accuracy", worst_decile),
        personal_test=_over_clients(runs, "personal_test_accuracy", fmean),
        personal_test_spread=_over_clients(runs, "personal_test_accuracy", spread),
        personal_test_worst=_over_clients(runs, "personal_test_accuracy", worst_decile),
        difference=paired_difference(pairs),
        target=to_target(runs, target),
        virtual_s=_column(last, "virtual_s"),
        train_s=_column(last, "cum_wall_s"),
        epoch_s=estimate(row.cum_wall_s / row.epoch for row in last if isinstance(row, EpochRow)),
        gflops=estimate_known([row.cum_train_flops / GIGA for row in last]),
        mb=estimate(_total(run.rounds, TRAFFIC, MEGA) for run in runs),
        energy_kj=estimate(_total(run.rounds, ["energy_j"], KILO) for run in runs),
        cut=estimate(run.cut for run in runs),
        kernel_entropy=_column(last, "kernel_entropy"),
        epsilon=_column(last, "epsilon"),
        cost=first.cost,
        latency_ms=_column(last, "latency_s", MILLI),
        ies_infer_ms=_column(last, "ies_infer", MILLI),
        rcs_infer=_column(last, "rcs_infer"),
        ies_train_s=_column(last, "ies_train"),
        rcs_train=_column(last, "rcs_train"),
    )


def _corrected(groups: Sequence[Group]) -> list[Group]:
    """Return the groups with the p-values of their differences corrected for the number of them."""
    corrected = iter(holm([group.difference.p for group in groups if group.difference]))
    return [
        replace(group, difference=replace(group.difference, holm_p=next(corrected)))
        if group.difference
        else group
        for group in groups
    ]


def _with_fronts(groups: Sequence[Group]) -> tuple[Group, ...]:
    """Return the groups with the fronts that they are on, among those of their task; a lone group is on none."""
    fronts: dict[str, list[str]] = {group.label: [] for group in groups}
    for task in dict.fromkeys(group.task for group in groups):
        for field, name in COSTS.items():
            rivals = [group for group in groups if group.task == task and getattr(group, field)]
            for rival in front(rivals, field) if len(rivals) > 1 else ():
                fronts[rival.label].append(name)
    return tuple(replace(group, fronts=tuple(fronts[group.label])) for group in groups)


def front(groups: Sequence[Group], field: str) -> list[Group]:
    """Return the groups that no other beats in the means of final accuracy and this cost, by rising cost."""
    points = [(group.final.mean, getattr(group, field).mean) for group in groups]
    return [groups[index] for index in pareto_front(points)]
