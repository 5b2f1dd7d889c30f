"""The clients' rows of large runs in columns: a folder of Parquet files, one for each round, each written in one step.

A file is never changed, so that a crash leaves whole rounds. The folder is read as one table by whatever reads Parquet,
for instance `pandas.read_parquet`.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from fedfmd.errors import need
from fedfmd.runs.files import atomic_write
from fedfmd.runs.rows import CLIENT_COLUMNS, ClientRow, cell_text, rounded

if TYPE_CHECKING:
    import pyarrow

LIBRARY = "pyarrow"


def write_part(folder: Path, round: int, rows: Sequence[ClientRow]) -> None:
    """Write the rows of a round, floats with ten digits as in a CSV file; a file that is there is replaced.

    Raises:
        OSError: as in `atomic_write`.
    """
    import pyarrow.parquet

    columns = {name: [_value(getattr(row, name)) for row in rows] for name in CLIENT_COLUMNS}
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, _schema()), content, compression="zstd")
    folder.mkdir(exist_ok=True)
    atomic_write(folder / f"round-{round:05d}.parquet", content.getvalue())


def parts(folder: Path) -> dict[int, Path]:
    """Return the files by their rounds, in the order of these; none where there is no such folder."""
    found = {int(match[1]): path for path in folder.glob("*") if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


def read_parts(folder: Path) -> list[ClientRow]:
    """Read the rows of all rounds.

    Raises:
        ValueError: a file is damaged, or lacks a column; the text names it.
        SettingsError: the library that reads it is not installed.
    """
    return [row for path in parts(folder).values() for row in _read(path)]


_NAME = re.compile(r"round-(\d+)\.parquet")
_REQUIRED = [field.name for field in fields(ClientRow) if field.default is MISSING]


def _read(path: Path) -> list[ClientRow]:
    need(f"{path}", LIBRARY)
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(
            io.BytesIO(path.read_bytes())
        )  # by path, it would look for a data set
        known = [field for field in _schema() if field.name in table.column_names]
        table = table.select([field.name for field in known]).cast(pyarrow.schema(known))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    columns = {name: _values(table[name]) for name in table.column_names}
    for name in _REQUIRED:
        if name not in columns or None in columns[name]:
            raise ValueError(f"{path}, column {name}: {'a value' if name in columns else 'it'} is missing")
    return [
        ClientRow(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)
    ]


def _values(column: pyarrow.ChunkedArray) -> list[object]:
    """Return Python's values; equal texts are one object, as there may be a million."""
    values = column.to_pylist()
    return [value and sys.intern(value) for value in values] if column.type == "string" else values


def _value(value: object) -> object:
    if isinstance(value, float):
        return rounded(value)
    return cell_text(value) if isinstance(value, str) else value


def _schema() -> pyarrow.Schema:
    import pyarrow

    types = {int: pyarrow.int64(), float: pyarrow.float64(), str: pyarrow.string()}
    hints = get_type_hints(ClientRow)
    return pyarrow.schema(
        [(name, types[(*get_args(hints[name]), hints[name])[0]]) for name in CLIENT_COLUMNS]
    )
