"""What a client sends is data: it is held against declared types and limits before anything is made of it.

Whatever is wrong with it is a ValueError, in one short printable line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

MAX_TEXT = 300
"""Characters of a client's text that logs, tables and messages show."""

MAX_WHOLE = 10**12
"""Larger than any number of images, steps or nodes."""

MAX_NUMBER = 1e18
"""Larger than any weight or measured value: the square of more would leave the range of float32."""

MAX_ROWS = 100_000
"""Clients of a message."""

_TERMINAL = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]?|\][^\x07\x1b]*(\x07|\x1b\\)?)")
_FORMULA = ("=", "+", "-", "@")


def clean_text(text: str, limit: int = MAX_TEXT) -> str:
    """Return one printable line of at most `limit` characters, which neither a terminal nor a spreadsheet obeys.

    Terminal sequences go, other control characters and white space become single spaces, and a quote stands
    before what a spreadsheet would take for a formula (OWASP, CSV injection).
    """
    visible = _TERMINAL.sub("", text[: 10 * limit])
    line = " ".join("".join(c if c.isprintable() else " " for c in visible).split())
    if line.startswith(_FORMULA):
        line = f"'{line}"
    return line if len(line) <= limit and len(text) <= 10 * limit else f"{line[: limit - 1]}…"


def _no_more(value: float) -> float:
    """Refuse infinities and absurd values; NaN stands for what does not exist."""
    if abs(value) > MAX_NUMBER:
        raise ValueError(f"must lie within ±{MAX_NUMBER:g}")
    return value


def _not_negative(value: float) -> float:
    if value < 0:
        raise ValueError("must not be negative")
    return value


Whole = Annotated[int, Field(strict=True, ge=0, le=MAX_WHOLE)]
Weight = Annotated[float, Field(strict=True, ge=0, le=MAX_WHOLE, allow_inf_nan=False)]
Measure = Annotated[float, Field(strict=True), AfterValidator(_no_more)]
Seconds = Annotated[Measure, AfterValidator(_not_negative)]
Text = Annotated[str, Field(strict=True), AfterValidator(clean_text)]

T = TypeVar("T")
Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)


def record_of(content: RecordDict, name: str, kind: type[Record]) -> Record:
    """Return a record of a message.

    Raises:
        ValueError: it is missing, or of another type.
    """
    record = content.get(name)
    if not isinstance(record, kind):
        found = "missing" if record is None else f"of type {type(record).__name__}"
        raise ValueError(f"the record {name} is {found}, must be of type {kind.__name__}")
    return record


def parse(kind: Any, value: object, what: str) -> Any:
    """Return a value of a declared type; `what` names it in the error.

    Raises:
        ValueError: it is none.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = " ".join(str(part) for part in (what, *first["loc"]))
        raise ValueError(clean_text(f"{place}: {first['msg']}")) from None


def rows_of(columns: Mapping[str, object], kind: type[T]) -> list[T]:
    """Return the rows, objects of a dataclass, of which each column lists one field.

    Raises:
        ValueError: a column is missing, too long or shorter than others, or a value is not of its field's type.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]  # T is a dataclass
    lists = [parse(list[Any], columns.get(name), f"the list {name}") for name in names]
    lengths = {len(values) for values in lists}
    if len(lengths) > 1 or max(lengths) > MAX_ROWS:
        raise ValueError(f"its lists have {min(lengths)} to {max(lengths)} entries")
    return [
        parse(kind, dict(zip(names, values, strict=True)), f"entry {place}")
        for place, values in enumerate(zip(*lists, strict=True))
    ]


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
