import pytest

from fedfmd.build import build_federation
from fedfmd.engines.centralised import prepare_centralised
from fedfmd.errors import SettingsError
from fedfmd.experiment import load_experiment
from fedfmd.experiment.estimate import (
    Estimate,
    RunEstimate,
    Speed,
    estimate_experiment,
    estimate_run,
    estimate_table,
    measure_speed,
)
from fedfmd.experiment.run import Layout, Task, place_runs

TRAIN, TEST = 1437, 360
"""Digits to train on, 479 for each of three clients, and to test on."""

SPEED = Speed(train_s=0.01, test_s=0.001)


@pytest.fixture
def estimate(tiny_settings):
    """Estimates a run of two rounds of two epochs on one node, of which `done` are finished; it may have `stopped`."""

    def estimate(done=0, nodes=1, stopped="", **changes):
        settings = tiny_settings(**{"server.rounds": 2, "train.local-epochs": 2} | changes)
        layout = Layout(runs=1, nodes=nodes, cores=1)
        return estimate_run(Task("a", settings, done, stopped), build_federation(settings), SPEED, layout)

    return estimate


def test_a_run_costs_its_images_times_what_an_image_costs(estimate):
    run = estimate()
    assert (run.name, run.rounds, run.done) == ("a", 2, 0)
    assert run.train_flops == 2 * 2 * TRAIN * 3 * 2 * run.macs
    assert run.wall_s == pytest.approx(2 * (2 * TRAIN * 0.01 + TEST * 0.001))


@pytest.mark.parametrize(
    ("changes", "asked", "trained"),
    [
        ({"server.clients-per-round": 2}, 2, 2),
        ({"server.clients-per-round": 2, "budget.over-select": 1.5}, 3, 2),
        ({"server.strategy": "fedbuff", "server.buffer": 1}, 1, 1),
        ({"budget.deadline-s": 1e-6, "budget.policy": "drop"}, 3, 0),
    ],
    ids=["two of three", "over-selection", "fedbuff", "all late"],
)
def test_those_asked_compute_and_those_that_count_take_time(estimate, changes, asked, trained):
    run = estimate(**changes)
    assert run.train_flops == 2 * 2 * asked * 479 * 3 * 2 * run.macs
    assert run.wall_s == pytest.approx(2 * (2 * trained * 479 * 0.01 + TEST * 0.001))


def test_validation_images_are_evaluated_and_not_trained_on(estimate):
    run = estimate(**{"data.validation": 237})
    assert run.wall_s == pytest.approx(2 * (2 * (TRAIN - 237) * 0.01 + (TEST + 237) * 0.001))


def test_after_the_trials_only_one_value_of_each_variant_is_counted(write_yaml):
    file = write_yaml(
        matrix={"model.conv": ["static", "fmdconv"], "train.lr": [0.1, 0.2, 0.3], "seed": [0, 1]},
        select={"over": "train.lr", "by": "validation", "seeds": [7]},
        **{"data.validation": 0.1},
    )
    names = [run.name for run in estimate_experiment(load_experiment(file), None, "inline", 1).runs]
    assert len(names) == 2 * 3 + 2 * 2
    assert names[6:8] == ["conv=static,seed=0,lr=0.1 or as chosen", "conv=static,seed=1,lr=0.1 or as chosen"]


def test_centralised_training_passes_over_all_images(write_centralised):
    experiment = load_experiment(write_centralised())
    (task,) = place_runs(experiment, None)
    run = estimate_run(task, prepare_centralised(task.settings), SPEED, Layout(1, 2, 1))
    assert run.train_flops == 2 * TRAIN * 3 * 2 * run.macs
    assert run.wall_s == pytest.approx(2 * (TRAIN * 0.01 + TEST * 0.001))


def test_only_what_is_left_takes_time_and_nodes_share_it(estimate):
    assert estimate(done=1).wall_s == pytest.approx(estimate().wall_s / 2)
    assert estimate(done=2).wall_s == 0
    assert estimate(done=1, stopped="accuracy=0.9").wall_s == 0
    assert estimate(nodes=2).wall_s == pytest.approx(estimate().wall_s / 2)  # training and tests


def runs(*seconds):
    return tuple(RunEstimate(f"seed={n}", 5, 0, 1000, 10, 10**9, s) for n, s in enumerate(seconds))


@pytest.mark.parametrize(
    ("seconds", "workers", "expected"),
    [((3, 1, 1), 1, 5), ((3, 1, 1), 2, 3), ((1, 1, 3), 2, 4), ((3, 1), 8, 3)],
)
def test_workers_take_the_runs_in_turn(seconds, workers, expected):
    assert Estimate(runs(*seconds), workers).wall_s == expected


def test_the_table_has_a_line_per_run_and_the_totals():
    table = estimate_table(Estimate(runs(90, 7200), 1), "study")
    assert [list(column.cells) for column in table.columns] == [
        ["seed=0", "seed=1"],
        ["5", "5"],
        ["0", "0"],
        ["1,000", "1,000"],
        ["1", "1"],
        ["90 s", "2.0 h"],
    ]
    assert [column.footer for column in table.columns] == ["2, 1 at a time", "10", "0", "", "2", "2.0 h"]


def test_a_network_of_several_runs_is_timed_once(write_yaml, tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(
        "fedfmd.experiment.estimate.measure_speed",
        lambda federation, threads: timed.append((federation.settings.model.conv, threads)) or SPEED,
    )
    file = write_yaml(matrix={"model.conv": ["static", "fmdconv"], "seed": [0, 1]})
    before = set(tmp_path.iterdir())
    estimate = estimate_experiment(load_experiment(file), tmp_path / "out", "inline", workers=2)
    assert timed == [("static", 1), ("fmdconv", 1)]
    assert estimate.workers == 2
    assert [cell["cell"] for cell in estimate.as_json()["cells"]] == [
        "conv=static,seed=0",
        "conv=static,seed=1",
        "conv=fmdconv,seed=0",
        "conv=fmdconv,seed=1",
    ]
    assert set(tmp_path.iterdir()) == before


def test_an_impossible_run_is_refused(write_yaml):
    with pytest.raises(SettingsError, match=r"^fleet\.devices "):
        estimate_experiment(load_experiment(write_yaml(**{"partition.clients": 4})), None, "inline", 1)


def test_training_an_image_takes_longer_than_testing_it(tiny_settings):
    federation = build_federation(tiny_settings(**{"data.image-size": 32, "model.width": 1}))
    speed = measure_speed(federation, threads=1)
    assert speed.train_s > speed.test_s > 0
