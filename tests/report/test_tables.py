import io
import json

import pytest
from rich.console import Console

from fedfmd.build import build_dataset, build_partition
from fedfmd.conv import CONVS
from fedfmd.cost import count
from fedfmd.models import make_model
from fedfmd.report.tables import cost_rows, cost_table, partition_rows, partition_table, show


@pytest.fixture
def printed():
    """Shows rows and their table on a terminal of 80 columns; gives the text."""

    def printed(rows, table, as_json=False):
        console = Console(file=io.StringIO(), width=80)
        show(rows, table, as_json, console)
        return console.file.getvalue()

    return printed


def test_costs_are_those_of_the_network_with_each_convolution(tiny_settings):
    rows = cost_rows(tiny_settings(), classes=10, image_size=8, measure=False)
    assert [row["conv"] for row in rows] == list(CONVS)
    for row in rows:
        cost = count(make_model("resnet8", row["conv"], 10, kernels=2, norm="group", width=0.25), 8)
        assert row == {
            "conv": row["conv"],
            "params": cost.params,
            "macs": cost.macs,
            "macs_by_kind": cost.macs_by_kind,
            "train_flops": cost.train_flops,
            "bytes": cost.bytes,
            "activation_bytes": cost.activation_bytes,
        }


def test_costs_are_a_column_per_convolution(tiny_settings, printed):
    row = {
        "conv": "static",
        "params": 11_173_962,
        "macs": 555_422_720,
        "macs_by_kind": {"convolution": 555_417_600, "linear": 5120},
        "train_flops": 3_332_536_320,
        "bytes": 44_735_000,
        "activation_bytes": 640,
        "latency_s": 0.01234,
    }
    text = printed([row], cost_table([row], "title"))
    assert [line.split(maxsplit=1) for line in text.splitlines() if line.strip()][3:] == [
        ["parameters", "11.17 M  "],
        ["MACs", "555.4 M  "],
        ["convolution", "555.4 M  "],
        ["linear", "5.120 k  "],
        ["training", "FLOPs    3.333 G  "],
        ["model", "44.73 MB  "],
        ["activations", "640 B  "],
        ["latency", "12.34 ms  "],
    ]


def test_latency_is_measured_when_asked(tiny_settings, printed):
    rows = cost_rows(tiny_settings(), classes=10, image_size=8, measure=True)
    assert all(row["latency_s"] > 0 for row in rows)
    lines = printed(rows, cost_table(rows, "")).splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert all(name in "".join(lines[:3]) for name in CONVS)
    assert sum("ms" in line for line in lines) == 1


def test_a_partition_is_a_row_per_client(tiny_settings, printed):
    settings = tiny_settings(**{"partition.scheme": "pathological", "partition.clients": 10})
    dataset = build_dataset(settings)
    rows = partition_rows(build_partition(settings, dataset), dataset)
    assert [row["client"] for row in rows] == list(range(10))
    assert sum(row["images"] for row in rows) == len(dataset.train)
    assert {row["classes"] for row in rows} == {2}
    assert all(sum(row["images_by_class"].values()) == row["images"] for row in rows)
    lines = printed(rows, partition_table(rows, "")).splitlines()
    header, first = lines[1].split(), lines[3].split()
    assert header == ["client", "images", "classes", *"0123456789"]
    assert first[:3] == ["0", str(rows[0]["images"]), "2"]
    assert first[3:].count("·") == 8


def test_many_classes_have_no_columns(printed):
    row = {"client": 0, "images": 100, "classes": 100, "images_by_class": {f"c{n}": 1 for n in range(100)}}
    assert printed([row], partition_table([row], "")).split()[:3] == ["client", "images", "classes"]
    assert "c0" not in printed([row], partition_table([row], ""))


def test_json_holds_the_rows(printed):
    rows = [{"conv": "static", "params": 10**12, "text": "[bold]" + "long " * 30}]
    assert json.loads(printed(rows, None, as_json=True)) == rows
