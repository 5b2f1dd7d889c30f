"""Print in a page what a run of `run.sh` found, from its tables.

python experiments/gpu/summary.py runs/gpu
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import fit
from common import read_table

Rows = list[dict[str, str]]
MOST_FAULTS = 20


def check(rows: Rows) -> Iterator[str]:
    """Largest errors by kind and precision, and what did not pass."""
    for what, precision in dict.fromkeys((row["what"], row["precision"]) for row in rows):
        some = [r for r in rows if (r["what"], r["precision"]) == (what, precision)]
        largest = (max(float(row[name]) for row in some) for name in ("output", "gradient"))
        passed = sum(row["ok"] == "True" for row in some)
        output, gradient = (f"{error:.2g}" for error in largest)
        yield f"{what}, {precision}: {passed} of {len(some)} passed; largest errors {output} and {gradient}"
    faults = [row for row in rows if row["ok"] != "True"]
    names = ("what", "case", "conv", "kernels", "mixing", "precision", "output", "gradient", "worst", "note")
    for row in faults[:MOST_FAULTS]:
        yield "NOT PASSED: " + ", ".join(row[name] for name in names if row[name])
    if len(faults) > MOST_FAULTS:
        yield f"… and {len(faults) - MOST_FAULTS} more"


def layers(rows: Rows) -> Iterator[str]:
    """The ways of mixing by their speed."""
    yield from fit.lines(rows)
    yield from statuses(rows)


def networks(rows: Rows) -> Iterator[str]:
    """Milliseconds, ratios to the static network and memory."""
    names = ("arch", "batch", "precision", "format", "phase")
    for group, some in groupby(rows, lambda row: [row[name] for name in names]):
        yield ", ".join(group)
        for row in some:
            variant = f"{row['conv']} K={row['kernels']} {row['mixing']}"
            yield f"  {variant:<26}{row['ms']:>9} ms  ×{row['to_static']:<8}{row['peak_mb']:>9} MB  {row['status']}"


def faster(way: str, rows: Rows) -> Iterator[str]:
    """How much faster a step is when it is made in another way, and whether it is the same."""
    for row in rows:
        network = f"{row['arch']} {row['conv']} K={row['kernels']}, batch {row['batch']}, {row['precision']}"
        times = f"{row['step_ms']:>8} ms, {way} {row[f'{way}_ms']} (×{row['speed_up']})"
        yield f"{network:<46}{times}  {row['status']}"


def train(rows: Rows) -> Iterator[str]:
    """The last epoch of each network, or why there is none."""
    for (conv, kernels), some in groupby(rows, lambda row: (row["conv"], row["kernels"])):
        epochs = list(some)
        last = epochs[-1]
        seconds = sorted(float(row["seconds"]) for row in epochs if row["seconds"])
        if seconds:
            done = next(row for row in reversed(epochs) if row["seconds"])
            yield (
                f"{conv} K={kernels}: accuracy {done['accuracy']} after {done['epoch']} of {done['epochs']} epochs, "
                f"{seconds[len(seconds) // 2]:.2f} s an epoch, {done['peak_mb']} MB"
            )
        if last["status"] != "ok":
            yield f"{conv} K={kernels}: {last['status']}"


def statuses(rows: Rows) -> Iterator[str]:
    """How many rows are not ok, and why."""
    counts = Counter(row["status"] for row in rows)
    return (f"{count} times {status}" for status, count in counts.items() if status != "ok")


PARTS = {
    "check": check,
    "layers": layers,
    "networks": networks,
    "graphs": partial(faster, "replayed"),
    "compiled": partial(faster, "compiled"),
    "train": train,
}


def main(folder: Path) -> None:
    for name, lines in PARTS.items():
        path = folder / f"{name}.csv"
        if path.exists() and (rows := read_table(path)):
            print(f"== {name}: {rows[0]['device']}, PyTorch {rows[0]['torch']}, {rows[0]['date']}")
            print("\n".join(lines(rows)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
