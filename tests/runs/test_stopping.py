from dataclasses import replace

import pytest

from fedfmd.runs import EpochRow, RoundRow, RunFolder, parse_stop, stop_reason, stopped_by


def row(number, **values):
    """A round of 10 virtual seconds, 3 MB up and 2 MB down, and 500 J, whose model was not tested."""
    spent = {"up_bytes": 3 * 10**6, "down_bytes": 2 * 10**6, "energy_j": 500.0}
    work = {
        "train_flops": 1,
        "cum_train_flops": number,
        "clients_ok": 1,
        "clients_late": 0,
        "clients_failed": 0,
    }
    times = {"virtual_s": 10.0 * number, "round_s": 10.0, "wall_s": 1.0}
    return RoundRow(round=number, **work, **times | spent | values)


def rows(rounds, **last):
    return [*map(row, range(1, rounds)), row(rounds, **last)]


def reason(text, rows):
    return stop_reason(parse_stop(text), rows)


@pytest.mark.parametrize(
    ("limit", "before", "after"),
    [("seconds=30", 2, 3), ("mb=10", 1, 2), ("joules=1001", 2, 3), ("accuracy=0.9, seconds=20", 1, 2)],
)
def test_a_run_ends_after_the_round_in_which_it_has_spent_so_much(limit, before, after):
    assert not reason(limit, rows(before))
    assert reason(limit, rows(after))


def test_accuracy_is_that_on_validation_images_and_on_test_images_only_without_any():
    assert not reason("accuracy=0.9", rows(2, accuracy=0.95, validation_accuracy=0.89))
    held = reason("accuracy=0.9", rows(2, accuracy=0.2, validation_accuracy=0.9))
    assert held == "validation accuracy 0.9 has reached server.stop-at accuracy=0.9"
    tested = reason("accuracy=0.9", rows(2, accuracy=0.95))
    assert tested.startswith("accuracy on the test images, without any validation images, 0.95 has reached")
    assert not reason("accuracy=0.9", [row(1, accuracy=0.95), row(2)])  # the last model was not tested


def test_of_several_limits_the_first_that_is_met_is_told():
    assert "mb=10" in reason("seconds=40, mb=10, joules=1000", rows(2))
    assert not reason("", rows(2))
    assert not reason("seconds=1", [])


def test_centralised_training_has_seconds_of_training():
    times = {
        "wall_s": 4.0,
        "latency_s": 1.0,
        "ies_train": 1.0,
        "rcs_train": 1.0,
        "ies_infer": 1.0,
        "rcs_infer": 1.0,
    }
    work = {"lr": 0.1, "train_loss": 1.0, "train_accuracy": 0.5, "loss": 1.0, "best_accuracy": 0.5}
    epoch = EpochRow(epoch=1, cum_wall_s=4.0, accuracy=0.5, train_flops=1, cum_train_flops=1, **times, **work)
    assert not reason("seconds=8", [epoch])
    assert reason("seconds=8, accuracy=0.9", [epoch, replace(epoch, epoch=2, cum_wall_s=8.0)])


def test_what_the_files_tell_is_what_counts(tmp_path):
    """Files have ten digits: a run that goes on from them sees the same as one that never stopped."""
    folder = RunFolder(tmp_path)
    nearly = [row(1), row(2, virtual_s=20 - 1e-12)]
    for one in nearly:
        folder.append_round(one, [])
    limits = parse_stop("seconds=20")
    assert stop_reason(limits, nearly) == stopped_by(tmp_path, limits, 2) != ""
    assert stopped_by(tmp_path, limits, 1) == stopped_by(tmp_path, {}, 2) == ""
    assert stopped_by(tmp_path / "none", limits, 0) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "'accuracy' must be name=value, such as accuracy=0.95"),
        ("acuracy=0.9", "'acuracy' must be one of accuracy, seconds, mb, joules; did you mean 'accuracy'"),
        ("mb=ten", "mb = 'ten' must be a number"),
        ("accuracy=95", "accuracy = 95 must be above 0 and at most 1"),
        ("seconds=0", "seconds = 0 must be above 0"),
        ("seconds=nan", "seconds = nan must be above 0"),
        ("mb=1, mb=2", "mb is given twice"),
    ],
)
def test_a_limit_that_cannot_be_met_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_stop(text)
