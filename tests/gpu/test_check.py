"""The comparison with float64, on the CPU: what is right passes, what is wrong is found and named."""

from collections import Counter

import pytest
import torch

from fedfmd.conv import mixing as ways


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the part on some of the cases; returns its status and rows."""

    def run(cases):
        check, common = script("check"), script("common")
        monkeypatch.setattr(check, "all_cases", lambda toy, device: cases(check))
        status = check.main(["--toy", "--out", str(tmp_path)])
        return status, common.read_table(tmp_path / "check.csv")

    return run


def strided_layers(check):
    return check.layer_cases({"strided": check.replace(check.SHAPES["strided"], size=6, batch=2)}, "cpu")


def test_every_convolution_way_and_precision_passes(run):
    status, rows = run(strided_layers)
    assert status == 0
    assert {row["ok"] for row in rows} == {"True"}
    assert Counter(row["conv"] for row in rows) == {"static": 2} | dict.fromkeys(
        ("condconv", "dyconv", "odconv", "fmdconv"), 2 * 2 * (1 + len(ways.MIXINGS))
    )


def test_a_wrong_way_is_found(run, monkeypatch):
    def rounded(*operands):
        return 1.01 * ways.outputs(*operands)

    monkeypatch.setitem(ways.PLAIN, "inputs", rounded)
    status, rows = run(strided_layers)
    assert status == 1
    wrong = [row for row in rows if row["ok"] == "False"]
    assert {row["mixing"] for row in wrong} == {"inputs"}
    assert {row["conv"] for row in wrong if row["precision"] == "fp32" and row["kernels"] == "4"} == {
        "condconv",
        "dyconv",
        "odconv",
        "fmdconv",
    }


def test_a_way_that_fails_is_a_row_and_the_next_case_runs(run, monkeypatch):
    def broken(*_operands):
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(ways.PLAIN, "inputs", broken)
    status, rows = run(strided_layers)
    assert status == 1
    notes = {row["note"] for row in rows if row["ok"] == "False"}
    assert notes == {"failed: RuntimeError: no kernel image"}
    assert rows[-1]["mixing"] == "blocked"
    assert rows[-1]["ok"] == "True"


def test_nan_never_passes(run, monkeypatch):
    monkeypatch.setitem(ways.PLAIN, "inputs", lambda *operands: ways.outputs(*operands) * torch.nan)
    _, rows = run(strided_layers)
    assert {row["mixing"] for row in rows if row["ok"] == "False"} == {"inputs"}


def test_steps_batches_and_runs(run):
    def cases(check):
        dataset = script_dataset(check)
        yield from (c for c in check.step_cases(8, 4, "cpu") if c.conv in ("static", "fmdconv"))
        yield from check.batch_cases(dataset, "cpu")
        yield from (c for c in check.run_cases(dataset, "cpu") if c.conv == "static")

    def script_dataset(check):
        return check.synthetic(96, 40, size=8)

    status, rows = run(cases)
    assert [row for row in rows if row["ok"] == "False"] == []
    assert status == 0
    assert set(Counter(row["what"] for row in rows)) == {"step", "batches", "run"}
