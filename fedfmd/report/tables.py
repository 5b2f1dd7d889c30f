"""Tables on the terminal: what each convolution costs, and who has which images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from fedfmd.build import build_model
from fedfmd.conv import CONVS
from fedfmd.cost import count, latency
from fedfmd.data import Dataset, Partition
from fedfmd.settings import Settings

if TYPE_CHECKING:
    from fedfmd.calibration import Timing

MAX_CLASS_COLUMNS = 20
PREFIXES = {"G": 1e9, "M": 1e6, "k": 1e3}

Row = dict[str, Any]


def cost_rows(settings: Settings, classes: int, image_size: int, measure: bool) -> list[Row]:
    """Count the settings' network with each convolution, for one image; `measure` times this machine too.

    Raises:
        SettingsError: such a network can't be built.
    """
    rows = []
    for conv in CONVS:
        model = build_model(
            Settings.from_mapping(settings.flat() | {"model.conv": conv}), classes, image_size
        )
        cost = count(model, image_size)
        row = {
            "conv": conv,
            "params": cost.params,
            "macs": cost.macs,
            "macs_by_kind": cost.macs_by_kind,
            "train_flops": cost.train_flops,
            "bytes": cost.bytes,
            "activation_bytes": cost.activation_bytes,
        }
        rows.append(row | {"latency_s": latency(model, image_size)} if measure else row)
    return rows


def cost_table(rows: Sequence[Row], title: str) -> Table:
    """One column per convolution; MACs and bytes are for one image."""
    table = Table("", title=title, box=box.SIMPLE)
    for row in rows:
        table.add_column(row["conv"], justify="right", no_wrap=True)
    lines = {"parameters": [si(row["params"]) for row in rows], "MACs": [si(row["macs"]) for row in rows]}
    kinds = dict.fromkeys(kind for row in rows for kind in row["macs_by_kind"])
    lines |= {f"  {kind}": [si(row["macs_by_kind"].get(kind, 0)) for row in rows] for kind in kinds}
    lines["training FLOPs"] = [si(row["train_flops"]) for row in rows]
    lines["model"] = [si(row["bytes"], "B") for row in rows]
    lines["activations"] = [si(row["activation_bytes"], "B") for row in rows]
    if "latency_s" in rows[0]:
        lines["latency"] = [f"{1000 * row['latency_s']:.2f} ms" for row in rows]
    for label, cells in lines.items():
        table.add_row(label, *cells)
    return table


def partition_rows(partition: Partition, dataset: Dataset) -> list[Row]:
    """Each client's number of images, in all and of each class."""
    counts = partition.label_counts(dataset.train.labels, dataset.classes).tolist()
    return [
        {
            "client": client,
            "images": sum(own),
            "classes": sum(number > 0 for number in own),
            "images_by_class": dict(zip(dataset.class_names, own, strict=True)),
        }
        for client, own in enumerate(counts)
    ]


def partition_table(rows: Sequence[Row], title: str) -> Table:
    """One line per client; the columns of the classes are left out where there are more than 20."""
    names = list(rows[0]["images_by_class"])
    shown = names if len(names) <= MAX_CLASS_COLUMNS else []
    table = Table("client", "images", "classes", *shown, title=title, box=box.SIMPLE, padding=(0, 0, 0, 1))
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        table.add_row(*(str(row[key]) for key in ("client", "images", "classes")), *_class_cells(row, shown))
    return table


def timing_table(timings: Sequence[Timing], title: str) -> Table:
    """One line per network and batch size, in milliseconds per image."""
    table = Table("network", "conv", title=title, box=box.SIMPLE)
    for heading in ("K", "batch", "training ms", "inference ms"):
        table.add_column(heading, justify="right")
    for t in timings:
        numbers = (str(t.kernels), str(t.batch_size), f"{1000 * t.train_s:.2f}", f"{1000 * t.infer_s:.2f}")
        table.add_row(t.arch, t.conv, *numbers)
    return table


def show(
    rows: Sequence[Mapping[str, Any]] | Mapping[str, Any],
    table: RenderableType,
    as_json: bool,
    console: Console,
) -> None:
    """Print the rows for a program, or the table for a person."""
    if as_json:
        console.out(json.dumps(rows, indent=1), highlight=False)
    else:
        console.print(table)


def _class_cells(row: Row, names: Sequence[str]) -> list[str]:
    return [str(row["images_by_class"][name] or "·") for name in names]


def si(value: float, unit: str = "") -> str:
    """Four digits with an SI prefix, such as `11.20 M`."""
    for prefix, factor in PREFIXES.items():
        if value >= factor:
            return f"{value / factor:#.4g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()
