"""What settings there are: the meaning, the allowed values and the default of each, from the typed model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedfmd.algorithms import ALGORITHMS
from fedfmd.errors import SettingsError, nearest_of
from fedfmd.settings import Scalar, Settings

TYPES = {"boolean": "true or false", "integer": "whole number", "number": "number", "string": "text"}
"""Types of JSON schema in words."""

BOUNDS = {
    ("minimum", "ge"): "at least",
    ("exclusiveMinimum", "gt"): "above",
    ("maximum", "le"): "at most",
    ("exclusiveMaximum", "lt"): "below",
}
"""What JSON schema calls a bound, and what pydantic calls it where a validator comes before the bound."""

STRATEGIES = {"server.strategy": {"enum": [*ALGORITHMS, "module:Class"]}}
"""What the schema doesn't tell, because the names are checked where the algorithms are."""


@dataclass(frozen=True)
class Setting:
    """A setting by its dotted key.

    Attributes:
        key: such as `train.lr`.
        meaning: in a sentence or two.
        allowed: what its value may be, in words.
        choices: all values, where it has a few.
        default: its value where nobody sets it.
    """

    key: str
    meaning: str
    allowed: str
    choices: tuple[str, ...]
    default: Scalar


def all_settings() -> list[Setting]:
    """Return every setting, in the order of the model."""
    defaults = Settings().flat()
    return [
        Setting(
            key,
            " ".join(schema.get("description", "").split()),
            _allowed(schema),
            _choices(schema),
            defaults[key],
        )
        for key, schema in _schemas()
    ]


def find_settings(word: str) -> list[Setting]:
    """Return the settings whose key, meaning or allowed values hold `word`, in upper or lower case.

    Raises:
        SettingsError: there is none; it suggests the word of theirs that looks most like it.
    """
    texts = {
        setting: f"{setting.key} {setting.meaning} {setting.allowed}".lower() for setting in all_settings()
    }
    found = [setting for setting, text in texts.items() if word.lower() in text]
    if not found:
        known = {known.strip(".,:;()") for text in texts.values() for known in text.split()}
        raise SettingsError(
            f"no setting tells of {word!r}; the nearest word is {nearest_of(word, sorted(known))!r}"
        )
    return found


def settings_table(settings: Sequence[Setting]) -> Table:
    """Return a table with a line per setting."""
    table = Table(box=box.SIMPLE, padding=(0, 1), show_edge=False)
    table.add_column("setting", no_wrap=True)
    table.add_column("default", max_width=14, overflow="fold")
    table.add_column("meaning and allowed values")
    for setting in settings:
        meaning = Group(Text(setting.meaning), Text(setting.allowed, style="dim"))
        table.add_row(Text(setting.key), Text(_text(setting.default)), meaning)
    return table


def _schemas() -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Return the key and the JSON schema of each setting."""
    schema = Settings.model_json_schema()
    for name, content in schema["properties"].items():
        section = content.get("$ref", "").rpartition("/")[2]
        if not section:
            yield name, content
            continue
        for inner, own in schema["$defs"][section]["properties"].items():
            key = f"{name}.{inner}"
            yield key, own | STRATEGIES.get(key, {})


def _choices(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the values of a schema that lists them."""
    return tuple(schema.get("enum", ())) or (("true", "false") if schema["type"] == "boolean" else ())


def _allowed(schema: Mapping[str, Any]) -> str:
    """Tell which values a schema allows."""
    if "enum" in schema:
        return ", ".join(schema["enum"])
    if "items" in schema:
        return f"one or more of {_allowed(schema['items'])}"
    return " ".join([TYPES[schema["type"]], " and ".join(_bounds(schema))]).strip()


def _bounds(schema: Mapping[str, Any]) -> Iterable[str]:
    for names, text in BOUNDS.items():
        for name in names:
            if name in schema:
                yield f"{text} {schema[name]:g}"


def _text(value: Scalar) -> str:
    """Return a value as one writes it in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
