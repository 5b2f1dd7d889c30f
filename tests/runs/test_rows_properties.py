"""What holds for rows of any values: they come back from their files, and rounds from a log as well."""

from dataclasses import asdict, astuple, fields, replace
from typing import get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfmd.runs import (
    ClientRow,
    EpochRow,
    RoundRow,
    csv_text,
    parse_round_line,
    read_clients,
    read_epochs,
    read_rounds,
    round_line,
)

READERS = {RoundRow: read_rounds, ClientRow: read_clients, EpochRow: read_epochs}
FLOATS = st.floats().map(lambda value: float(f"{value:.10g}"))  # as many digits as files keep
VALUES = {
    int: st.integers(-(2**70), 2**70),
    float: FLOATS,
    int | None: st.none() | st.integers(0, 2**70),
    float | None: st.none() | FLOATS,
    str: st.text(st.characters(codec="utf-8") | st.sampled_from(",\"\n\r\t;'")),
}
NEEDED = {"device": "pi-4", "status": "ok"}


def rows(row_type):
    hints = get_type_hints(row_type)
    return st.builds(row_type, **{field.name: VALUES[hints[field.name]] for field in fields(row_type)})


def filled(row):
    """The row with something in each text that a file must have."""
    texts = {name: text for name, text in NEEDED.items() if not getattr(row, name, text).split()}
    return replace(row, **texts)


def one_line(row):
    """The row as a file keeps it, each text in one line."""
    texts = {name: " ".join(value.split()) for name, value in asdict(row).items() if isinstance(value, str)}
    return replace(row, **texts)


@pytest.mark.parametrize("row_type", READERS)
@settings(max_examples=50)
@given(data=st.data())
def test_rows_come_back_as_they_were_written(row_type, data, tmp_path_factory):
    written = [filled(row) for row in data.draw(st.lists(rows(row_type), max_size=3))]
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_bytes(csv_text([[f.name for f in fields(row_type)], *map(astuple, written)]).encode())
    assert repr(READERS[row_type](path)) == repr(
        [one_line(row) for row in written]
    )  # as text, for the sake of NaN


@given(row=rows(RoundRow), before=st.text(st.characters(exclude_characters="f")), after=st.text())
def test_a_round_comes_back_from_a_line_of_a_log(row, before, after):
    assert repr(parse_round_line(f"{before}{round_line(row)}{after}")) == repr(row)
