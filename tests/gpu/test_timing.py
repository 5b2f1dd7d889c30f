"""Races: medians of what runs, and the reason of what does not."""

import torch


def test_what_fails_says_why_and_the_others_are_timed(script):
    def without_memory():
        raise torch.OutOfMemoryError("tried to allocate 100 GiB")

    def broken():
        raise RuntimeError("no engine\nlong explanation")

    timing, common = script("timing"), script("common")
    steps = {"fine": lambda: None, "large": without_memory, "broken": broken}
    timings = timing.race(steps, "cpu", common.Deadline.after(60))
    assert {name: t.status for name, t in timings.items()} == {
        "fine": "ok",
        "large": "out of memory",
        "broken": "failed: RuntimeError: no engine",
    }
    assert timings["fine"].ms >= 0
    assert timings["large"].ms is None
    columns = timing.columns(timings["large"], timings["fine"])
    assert columns == {"ms": "", "to_static": "", "peak_mb": "", "repeats": 0, "status": "out of memory"}


def test_after_the_deadline_nothing_is_started(script):
    timing, common = script("timing"), script("common")
    timings = timing.race({"late": lambda: 1 / 0}, "cpu", common.Deadline.after(-1))
    assert timings["late"].status == "not run: out of time"


def test_a_long_step_is_run_once(script, monkeypatch):
    timing, common = script("timing"), script("common")
    monkeypatch.setattr(timing, "LONG_S", 0.0)
    calls = []
    timings = timing.race({"long": lambda: calls.append(1)}, "cpu", common.Deadline.after(60))
    assert len(calls) == len(timings["long"].seconds) == 1


def test_the_fit_orders_ways_by_their_time(script):
    fit = script("fit")
    common = {"conv": "fmdconv", "precision": "bf16", "phase": "train", "channels": "64", "size": "32"}
    ms = {("32", "grouped"): "2", ("32", "outputs"): "1", ("128", "grouped"): "8", ("128", "outputs"): "1"}
    rows = [common | {"batch": b, "mixing": m, "ms": value} for (b, m), value in ms.items()]
    rows += [
        common | {"batch": "32", "mixing": "", "ms": "0.5"},
        common | {"batch": "32", "mixing": "inputs", "ms": ""},
    ]
    assert list(fit.lines(rows)) == [
        "fmdconv, bf16, train",
        "  64×32×32, batch 32: 1.000 ms  outputs 1.00  grouped 2.00",
        "  64×32×32, batch 128: 1.000 ms  outputs 1.00  grouped 8.00",
        "  everywhere: outputs 1.00  grouped 4.00",
    ]
