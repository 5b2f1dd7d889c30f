"""Training on all images: a row per epoch, and one for each network that was not trained."""

import pytest


@pytest.fixture
def run(script, monkeypatch, tmp_path):
    """Runs the part on a few images; returns its status and rows."""

    def run(*arguments, images=64, **patches):
        train, common = script("train"), script("common")
        for name, value in patches.items():
            monkeypatch.setattr(train, name, value)
        monkeypatch.setattr(train, "synthetic", lambda *_, **__: common.synthetic(images, 16, size=8))
        status = train.main(["--toy", "--out", str(tmp_path), "--batch-size", "32", *arguments])
        return status, common.read_table(tmp_path / "train.csv")

    return run


def test_each_epoch_is_a_row(run):
    status, rows = run("--networks", "static-1", "fmdconv-2", "--epochs", "2")
    assert status == 0
    assert [(row["conv"], row["kernels"], row["epoch"], row["status"]) for row in rows] == [
        (conv, kernels, epoch, "ok")
        for conv, kernels in (("static", "1"), ("fmdconv", "2"))
        for epoch in "12"
    ]
    assert [row["temperature"] for row in rows] == ["", "", "30.0", "27.1"]
    assert [float(row["lr"]) for row in rows[:2]] == pytest.approx([0.2, 0.1])


def test_a_network_that_can_not_end_in_time_is_listed(run):
    seconds = {"static": 1.0, "odconv": 1e6}
    status, rows = run(
        *("--networks", "odconv-1", "static-1", "--epochs", "1"),
        predicted_seconds=lambda plan, conv, kernels: seconds[conv],
    )
    assert status == 0
    assert rows[0]["status"].startswith("not run: needs about 1000000 s, 1")
    assert (rows[1]["conv"], rows[1]["epoch"], rows[1]["status"]) == ("static", "1", "ok")


def test_a_network_that_fails_does_not_stop_the_next(run):
    status, rows = run("--networks", "magic-1", "static-1", "--epochs", "1", images=32)
    assert status == 1
    assert rows[0]["status"].startswith("failed: ValueError: conv = 'magic' is unknown")
    assert rows[-1]["status"] == "ok"


def test_training_that_diverges_has_failed(run):
    status, rows = run("--networks", "static-1", "--epochs", "3", "--lr", "1e30")
    assert status == 1
    assert "the training loss is nan" in rows[-1]["status"]
