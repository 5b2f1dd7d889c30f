"""Tell which way of mixing is fastest where, from the times of `layers.py`: what a rule for `auto` is fitted to.

python experiments/gpu/fit.py runs/gpu/layers.csv
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean

from common import read_table

KINDS = ("conv", "precision", "phase")
PLACES = ("channels", "size", "batch")


def times_of(rows: list[dict[str, str]]) -> dict[tuple[str, ...], dict[tuple[str, ...], dict[str, float]]]:
    """Milliseconds by way of mixing, for each kind and place."""
    times = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["mixing"] and row["ms"]:
            kind, place = (tuple(row[name] for name in names) for names in (KINDS, PLACES))
            times[kind][place][row["mixing"]] = float(row["ms"])
    return times


def lines(rows: list[dict[str, str]]) -> Iterator[str]:
    """Per kind and place all ways, the fastest first; then what each way alone would cost in all places."""
    for kind, places in times_of(rows).items():
        yield ", ".join(kind)
        for (channels, size, batch), ms in places.items():
            ways = sorted(ms, key=ms.get)
            order = "  ".join(f"{way} {ms[way] / ms[ways[0]]:.2f}" for way in ways)
            yield f"  {channels}×{size}×{size}, batch {batch}: {ms[ways[0]]:.3f} ms  {order}"
        alone = sorted(means(places).items(), key=lambda item: item[1])
        yield "  everywhere: " + "  ".join(f"{way} {ratio:.2f}" for way, ratio in alone)


def means(places: Mapping[tuple[str, ...], Mapping[str, float]]) -> dict[str, float]:
    """The mean ratio to the fastest of each way that ran in all places."""
    ways = set.intersection(*(set(ms) for ms in places.values()))
    return {way: geometric_mean(ms[way] / min(ms.values()) for ms in places.values()) for way in ways}


if __name__ == "__main__":
    print("\n".join(lines(read_table(Path(sys.argv[1])))))
