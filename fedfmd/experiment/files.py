"""Experiment files: ``base`` settings and a ``matrix`` of variations, read into the runs that they describe."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedfmd.errors import SettingsError
from fedfmd.settings import Settings, flatten

PARTS = ("base", "matrix")


@dataclass(frozen=True)
class Cell:
    """One run of an experiment; `name` tells what differs from the other cells, "" if there is one only."""

    name: str
    settings: Settings


@dataclass(frozen=True)
class Experiment:
    """An experiment file, expanded."""

    name: str
    cells: tuple[Cell, ...]


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a YAML file; `overrides` are ``key=value`` texts that win over the file's base.

    Raises:
        SettingsError: no such file, no YAML, an unknown part or setting, or a value that can't be used.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the experiment file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, Mapping) or not content.keys() <= set(PARTS):
        found = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise SettingsError(f"{path} must hold `base:` and may hold `matrix:`, found {found}")
    base = flatten(_mapping(path, content, "base")) | dict(map(_override, overrides))
    matrix = flatten(_mapping(path, content, "matrix"))
    return Experiment(path.stem, tuple(_expand(base, matrix)))


def _expand(base: Mapping[str, Any], matrix: Mapping[str, Any]) -> list[Cell]:
    """Every combination of the matrix's values, the last key varying fastest."""
    for key, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise SettingsError(f"matrix: {key} = {values!r} must be a list of at least one value")
    cells = []
    for values in itertools.product(*matrix.values()):
        varied = dict(zip(matrix, values, strict=True))
        name = ",".join(f"{key.rpartition('.')[2]}={value}" for key, value in varied.items())
        cells.append(Cell(name, Settings.from_mapping(dict(base) | varied)))
    return cells


def _override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SettingsError(f"--set {text!r}: write key=value, for instance --set train.lr=0.05")
    try:
        parsed = yaml.safe_load(value) if value.strip() else ""
    except yaml.YAMLError:
        parsed = value
    return key.strip(), parsed


def _mapping(path: Path, content: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    value = content.get(part) or {}
    if not isinstance(value, Mapping):
        raise SettingsError(f"{path}: `{part}:` must hold settings, found {type(value).__name__}")
    return value
