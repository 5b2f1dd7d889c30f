"""Experiment files: the runs that ``kind``, ``base`` settings and a ``matrix`` of variations, or several, describe.

``select`` says which of the varied settings each variant gets its own best value of.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedfmd.errors import SettingsError
from fedfmd.own_code import look_in
from fedfmd.packaged import find_experiment
from fedfmd.report.selection import Selection
from fedfmd.settings import Settings, flatten, read_yaml
from fedfmd.strict_yaml import load_yaml

PARTS = ("kind", "base", "matrix", "select")

Matrix = Mapping[str, list[Any]]
"""Values of settings, or of groups of settings, of which each combination is a run."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of an experiment; `name` tells what differs from the others, "" if there is one only."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Experiment:
    """An experiment file, expanded.

    Attributes:
        name: the file's.
        runs: all of it; if there are `trials`, those of the values that these choose are done.
        selection: what is chosen by validation, None if nothing is.
        trials: the runs of the selection's own seeds, which come first.
    """

    name: str
    runs: tuple[PlannedRun, ...]
    selection: Selection | None = None
    trials: tuple[PlannedRun, ...] = ()


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a YAML file, or the example of that name; `overrides` are ``key=value`` texts that win over what it says.

    Code of a user's own that the settings name is looked for beside the file, too.

    Raises:
        SettingsError: no such file, no YAML, an unknown part or setting, or a value that can't be used.
    """
    path = find_experiment(path)
    look_in(path.parent)
    return make_experiment(read_yaml(path), path.stem, str(path), overrides)


def make_experiment(
    content: Mapping[str, Any], name: str, source: str, overrides: Sequence[str] = ()
) -> Experiment:
    """Expand what a file holds; `source` is what errors call it.

    Raises:
        SettingsError: as in `load_experiment`.
    """
    if not content.keys() <= set(PARTS):
        found = ", ".join(map(str, content))
        raise SettingsError(
            f"{source} must hold `base:` and may hold `matrix:`, `kind:` and `select:`, found {found}"
        )
    fixed = parse_overrides(overrides)
    kind = {"kind": content["kind"]} if "kind" in content else {}
    base = flatten({**kind, **_mapping(source, content, "base")})
    matrices = _matrices(source, content)
    runs = _planned(base, matrices, fixed)
    if "select" not in content:
        return Experiment(name, runs)
    selection = Selection.from_mapping(content["select"])
    if fixed.keys() >= set(selection.over):
        return Experiment(name, runs)  # the overrides have chosen
    _check_selection(selection, runs, fixed)
    seeds = {"seed": list(selection.seeds)}
    others = {key: value for key, value in fixed.items() if key != "seed"}
    trials = _planned(base, [{**matrix, **seeds} for matrix in matrices], others) if selection.seeds else ()
    return Experiment(name, runs, selection, trials)


def load_settings(path: Path | None, overrides: Sequence[str] = ()) -> Settings:
    """Load the settings of a single run: those of a YAML file, or the defaults, changed by `overrides`.

    Raises:
        SettingsError: as in `load_experiment`, or the file describes several runs.
    """
    if path is None:
        return Settings.from_mapping(parse_overrides(overrides))
    runs = load_experiment(path, overrides).runs
    if len(runs) > 1:
        raise SettingsError(f"{path} describes {len(runs)} runs: choose one by --set of its matrix's keys")
    return runs[0].settings


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` texts as dotted keys and YAML values; the last one of a key wins.

    Raises:
        SettingsError: a text has no "=" or no key.
    """
    return flatten(dict(map(_override, texts)))


def _planned(
    base: Mapping[str, Any], matrices: Sequence[Matrix], fixed: Mapping[str, Any]
) -> tuple[PlannedRun, ...]:
    """Return the runs of all matrices; of those that `fixed` values make equal, the first."""
    runs = [run for matrix in _chosen_part(matrices, fixed) for run in _expand(base, matrix, fixed)]
    if fixed:
        firsts: dict[tuple[object, ...], PlannedRun] = {}
        for run in runs:
            firsts.setdefault(tuple(run.settings.flat().items()), run)
        runs = list(firsts.values())
    if len(runs) > 1:  # a run without a name would lie in the folder of all
        runs = [replace(run, name=run.name or "base") for run in runs]
    return tuple(runs)


def _chosen_part(matrices: Sequence[Matrix], fixed: Mapping[str, Any]) -> Sequence[Matrix]:
    """Return the part of the matrices that has the `fixed` values; those of which no matrix has any choose nothing."""
    for key, value in fixed.items():
        entries = (
            (name, entry) for matrix in matrices for name, values in matrix.items() for entry in values
        )
        if any(_told(name, entry, key) == value for name, entry in entries):
            parts = [
                {
                    name: [e for e in values if _told(name, e, key, value) == value]
                    for name, values in matrix.items()
                }
                for matrix in matrices
            ]
            matrices = [part for part in parts if all(part.values())]
    return matrices


def _told(name: str, entry: Any, key: str, otherwise: Any = None) -> Any:
    """Return the value of `key` that an entry of a matrix's setting or group `name` tells, if any."""
    return flatten({name: entry}).get(key, otherwise)


def _expand(base: Mapping[str, Any], matrix: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[PlannedRun]:
    """Every combination of the matrix's values but those of `fixed` keys, the last key varying fastest."""
    matrix = {key: values for key, values in matrix.items() if key not in fixed}
    runs = []
    for values in itertools.product(*matrix.values()):
        varied = flatten(dict(zip(matrix, values, strict=True)))
        given = {**base, **varied, **fixed}
        settings = Settings.from_mapping(given)
        if unused := sorted(settings.unused & given.keys()):
            raise SettingsError(
                f"{unused[0]} = {given[unused[0]]!r} means nothing to a run of kind = {settings.kind}: leave it out"
            )
        flat = settings.flat()
        name = ",".join(f"{key.rpartition('.')[2]}={flat[key]}" for key in varied)
        runs.append(PlannedRun(name.replace("/", "-"), settings))  # the name of a folder
    return runs


def _check_selection(selection: Selection, runs: Sequence[PlannedRun], fixed: Mapping[str, Any]) -> None:
    for key in selection.over:
        values = {run.settings.flat()[key] for run in runs}
        if len(values) == 1 and key not in fixed:
            raise SettingsError(
                f"select: over = {key!r}: the matrix has one value of it, {values.pop()!r}: give it several"
            )
    for run in runs:
        if not run.settings.data.validation:
            raise SettingsError(
                f"data.validation = 0 in {run.name}, and select: by = validation needs it in every run: set "
                "data.validation to the share of training images to choose by, 0.1 for instance"
            )
        if run.settings.seed in selection.seeds:
            raise SettingsError(
                f"select: seeds = {list(selection.seeds)}: {run.settings.seed} is a seed of the matrix too; choose by "
                "others, whose results are not reported"
            )


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {text!r}: write key=value, for instance --set train.lr=0.05")
    try:
        parsed = load_yaml(value) if value.strip() else ""
    except yaml.YAMLError:
        parsed = value
    return key.strip(), parsed


def _matrices(source: str, content: Mapping[str, Any]) -> list[Matrix]:
    """Return the matrix, or each one of a list."""
    matrices = content.get("matrix")
    if not isinstance(matrices, list):
        matrices = [matrices]
    if not matrices:
        raise SettingsError(
            f"{source}: `matrix: []` describes no run: list at least one, or leave `matrix:` out"
        )
    flat: list[Matrix] = [flatten(_mapping(source, {"matrix": matrix}, "matrix")) for matrix in matrices]
    for key, values in (item for matrix in flat for item in matrix.items()):
        if not isinstance(values, list) or not values:
            raise SettingsError(f"matrix: {key} = {values!r} must be a list of at least one value")
    return flat


def _mapping(source: str, content: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    value = content.get(part) or {}
    if not isinstance(value, Mapping):
        raise SettingsError(f"{source}: `{part}:` must hold settings, found {type(value).__name__}")
    return value
