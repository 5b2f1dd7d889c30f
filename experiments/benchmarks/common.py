"""What the benchmarks share: the rows that they write and show, and how much memory processes have."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path

import psutil
import torch
from rich.table import Table

from fedfmd.runs.folder import environment

Row = Mapping[str, object]


def about(device: str = "cpu") -> dict[str, object]:
    """When something was measured, on which processor or GPU, and with which PyTorch."""
    return {
        "date": date.today().isoformat(),
        "machine": environment()["machine"]["gpu" if device == "cuda" else "processor"],
        "torch": torch.__version__,
    }


def write_rows(path: Path, rows: Sequence[Row], extend: bool = False) -> None:
    """Write rows of the same columns to a CSV file, or after those that it has.

    Raises:
        SystemExit: the file has other columns.
    """
    with path.open("a+" if extend else "w+", encoding="utf-8", newline="") as file:
        file.seek(0)
        known = next(csv.reader(file), None)
        writer = csv.DictWriter(file, known or rows[0], lineterminator="\n")
        if known is None:
            writer.writeheader()
        elif set(known) != set(rows[0]):
            raise SystemExit(f"{path} has other columns: name another file by --out")
        writer.writerows(rows)


def table_of(rows: Sequence[Row], title: str | None = None) -> Table:
    """Return rows of the same columns as a table for the console."""
    table = Table(*(name.replace("_", " ") for name in rows[0]), title=title)
    for row in rows:
        table.add_row(*map(str, row.values()))
    return table


def pss_of(processes: Sequence[psutil.Process]) -> int:
    """Bytes of processes together, shared pages counted once; without those that are gone."""
    held = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            held += process.memory_full_info().pss
    return held


def family(root: psutil.Process) -> list[psutil.Process]:
    """Return a process and all below it; none if it is gone."""
    with suppress(psutil.NoSuchProcess):
        return [root, *root.children(recursive=True)]
    return []
