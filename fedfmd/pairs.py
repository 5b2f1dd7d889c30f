"""Names with values in one line of text, `name:value, …`: what options look like in Flower's run config."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from fedfmd.strict_yaml import load_yaml


def join_pairs(values: Mapping[str, Any]) -> str:
    """Return a text of which `split_pairs` and `read_value` make the same values."""
    return ", ".join(f"{name}:{_text(value)}" for name, value in values.items())


def split_pairs(text: str) -> Iterator[tuple[str, str]]:
    """Yield names and values of `name:value, …`; lists, mappings and quoted texts may have commas of their own."""
    for part in filter(None, map(str.strip, _parts(text))):
        name, _, value = (word.strip() for word in part.partition(":"))
        yield name, value


def _parts(text: str) -> Iterator[str]:
    """Yield what stands between commas that are in no quotes, and in no list or mapping."""
    part, depth, quote, escaped = "", 0, "", False
    for char in text:
        if char == "," and not quote and not depth:
            yield part
            part = ""
            continue
        part += char
        if escaped:
            escaped = False
        elif quote:
            escaped = char == "\\" and quote == '"'
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        else:
            depth = max(0, depth + (char in "[{") - (char in "]}"))
    yield part


def read_value(text: str) -> Any:
    """Return what a value's text stands for: as JSON, or else as YAML, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return load_yaml(text)
    except yaml.YAMLError:
        return text


def _text(value: Any) -> str:
    """Return a scalar as it is written where that says the same, and anything else as JSON."""
    if isinstance(value, list | dict):
        return json.dumps(value)
    plain = str(value)
    pairs = list(split_pairs(f"name:{plain}"))
    if len(pairs) == 1 and type(read := read_value(pairs[0][1])) is type(value) and read == value:
        return plain
    return json.dumps(value)
