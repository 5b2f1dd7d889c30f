"""Choosing settings by validation accuracy, for each variant of a comparison on its own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from fedfmd.errors import SettingsError, nearest_of
from fedfmd.runs import atomic_write
from fedfmd.settings import Scalar, Settings

if TYPE_CHECKING:
    from fedfmd.report.record import Run

FILE = "select.json"
BY = "validation"


@dataclass(frozen=True)
class Selection:
    """What is chosen, by the mean validation accuracy of the last round or epoch.

    Attributes:
        over: the settings of which each variant gets its own best value.
        seeds: the runs of these seeds choose, and those of other seeds are reported; without any, all do both.
    """

    over: tuple[str, ...]
    seeds: tuple[int, ...] = ()

    @classmethod
    def from_mapping(cls, values: object) -> Selection:
        """Read the part ``select`` of an experiment file, or the content of a `FILE`.

        Raises:
            SettingsError: an unknown key or setting, or a value that can't be used.
        """
        if not isinstance(values, Mapping) or not values.keys() <= {"over", "by", "seeds"}:
            raise SettingsError(
                f"select = {values!r}: must hold `over:` and `by: {BY}`, and may hold `seeds:`, nothing else"
            )
        if values.get("by") != BY:
            raise SettingsError(
                f"select: by = {values.get('by')!r}: must be {BY}; nothing is chosen on test images"
            )
        seeds = values.get("seeds", [])
        if not isinstance(seeds, list) or any(type(seed) is not int or seed < 0 for seed in seeds):
            raise SettingsError(f"select: seeds = {seeds!r}: must be a list of whole numbers from 0")
        over = values.get("over")
        return cls.over_keys([over] if isinstance(over, str) else over, seeds)

    @classmethod
    def over_keys(cls, over: object, seeds: Iterable[int] = ()) -> Selection:
        """Choose values of these settings.

        Raises:
            SettingsError: one is no setting, or none that results depend on, or is the seed.
        """
        if not isinstance(over, list) or not over or not all(isinstance(key, str) for key in over):
            raise SettingsError(f"select: over = {over!r}: must be a setting, or a list of some")
        known = [key for key in Settings().flat() if key not in Settings.NEUTRAL | {"seed"}]
        for key in over:
            if key not in known:
                raise SettingsError(
                    f"select: over = {key!r}: nothing that can be chosen; the nearest setting is "
                    f"{nearest_of(key, known)}"
                )
        return cls(tuple(over), tuple(seeds))

    def values_of(self, settings: Settings) -> tuple[Scalar, ...]:
        """Return the values of `over`."""
        flat = settings.flat()
        return tuple(flat[key] for key in self.over)

    def write(self, folder: Path) -> None:
        """Write `FILE` beside the runs, so that reports on them choose likewise."""
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / FILE, json.dumps(asdict(self) | {"by": BY}, indent=2) + "\n")


def stored_selection(folders: Iterable[Path]) -> Selection | None:
    """Return the selection in the `FILE` of these folders, None if there is none.

    Raises:
        SettingsError: one is damaged, or they differ.
    """
    found: dict[Selection, Path] = {}
    for path in (folder / FILE for folder in folders):
        if not path.exists():
            continue
        try:
            found[Selection.from_mapping(json.loads(path.read_text(encoding="utf-8")))] = path
        except ValueError as error:
            raise SettingsError(f"{path}: {error}: mend or delete it") from None
    if len(found) > 1:
        raise SettingsError(f"{' and '.join(map(str, found.values()))} differ: report on each folder apart")
    return next(iter(found), None)


@dataclass(frozen=True)
class Trial:
    """A value, or a combination of several, that was tried for a variant.

    Attributes:
        label: the variant, as in `Run`.
        values: of the settings that are chosen, in their order.
        accuracies: percent of the validation images that the last model got right, by seed.
        chosen: whether it is the variant's best one.
    """

    label: str
    values: tuple[Scalar, ...]
    accuracies: Mapping[int, float]
    chosen: bool


@dataclass(frozen=True)
class Choice:
    """A selection that was made, and all that was tried."""

    selection: Selection
    trials: tuple[Trial, ...]


def choose(runs: Sequence[Run], selection: Selection) -> tuple[list[Run], Choice, list[str]]:
    """Return the runs to report, each label at its own best value, what was tried, and notes on it.

    Of values with the same mean the lowest is taken. While no other seed has run, those that choose are reported.

    Args:
        runs: with labels that don't tell the values of `Selection.over`.
        selection: what is chosen.

    Raises:
        SettingsError: a run has no validation images.
    """
    tried: dict[str, dict[tuple[Scalar, ...], dict[int, float]]] = {}
    for run in runs:
        tested = [row.validation_accuracy for row in run.rounds if row.validation_accuracy is not None]
        if not tested:
            raise SettingsError(
                f"data.validation = {run.settings.data.validation:g} in {run.folder}: choosing "
                f"{', '.join(selection.over)} by validation needs validation images in every run: set "
                "data.validation=0.1, say, and run again"
            )
        if not selection.seeds or run.seed in selection.seeds:
            values = tried.setdefault(run.label, {})
            values.setdefault(selection.values_of(run.settings), {})[run.seed] = 100 * tested[-1]
    best = {label: _best(values) for label, values in tried.items()}
    trials = [
        Trial(label, value, values[value], value == best[label])
        for label, values in tried.items()
        for value in sorted(values)
    ]
    chosen = [run for run in runs if best.get(run.label) == selection.values_of(run.settings)]
    reported = [run for run in chosen if run.seed not in selection.seeds] or chosen
    if not reported:
        raise SettingsError(f"select: seeds = {list(selection.seeds)}: no finished run has one of them")
    unequal = [label for label, values in tried.items() if len(set(map(frozenset, values.values()))) > 1]
    shown = {run.label for run in reported}
    missing = [label for label in dict.fromkeys(run.label for run in runs) if label not in shown]
    notes = [
        f"{text}: {'; '.join(labels)}."
        for text, labels in (
            ("Values were tried with different seeds, so that their means are of unequal runs", unequal),
            ("Left out, because no run of a chosen value is finished", missing),
        )
        if labels
    ]
    return reported, Choice(selection, tuple(trials)), notes


def _best(values: Mapping[tuple[Scalar, ...], Mapping[int, float]]) -> tuple[Scalar, ...]:
    return max(sorted(values), key=lambda value: fmean(values[value].values()))
