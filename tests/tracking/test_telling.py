import json
import logging

import numpy as np
import pytest

from fedfmd.engines.centralised import prepare_centralised
from fedfmd.errors import RunError, SettingsError
from fedfmd.runs import save_checkpoint
from fedfmd.settings import Settings
from fedfmd.tracking import Callback, numbers

OWN = "own:Listener"


def what(listener):
    return [event[0] for event in listener.heard]


def test_a_callback_hears_the_start_each_round_with_its_clients_and_the_end(do_rounds, make_listener):
    listener = make_listener()
    folder = do_rounds(OWN, 1, 2)
    (_, run), (_, row, clients), _, (_, end) = listener.heard
    assert (run.name, run.folder, run.told) == ("run-a", folder.path, 0)
    assert run.settings.tracking.loggers == (OWN,)
    assert row.accuracy == 0.1
    assert [(client.round, client.client, client.accuracy) for client in clients] == [
        (1, 0, 0.5),
        (1, 1, 0.7),
    ]
    assert (end.error, end.pictures, end.checkpoint) == ("", (), None)
    assert what(listener) == ["started", 1, 2, "ended"]


def test_pictures_and_the_newest_model_come_at_the_end(open_run, make_listener):
    listener = make_listener()
    context, do = open_run(OWN)
    with context:
        folder = do(1, 2)
        (folder.path / "partition.png").touch()
        for number in (1, 2):
            save_checkpoint(folder.checkpoints, number, {"w": np.zeros(2)}, {}, {})
    end = listener.heard[-1][1]
    assert end.pictures == (folder.path / "partition.png",)
    assert end.checkpoint == folder.checkpoints / "round-00002.safetensors"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RunError("it diverged"), "it diverged"),
        (ValueError("no"), "ValueError: no"),
        (KeyboardInterrupt(), "it was stopped"),
    ],
)
def test_an_early_end_is_told_with_its_reason(error, told, do_rounds, make_listener):
    listener = make_listener()
    with pytest.raises(type(error)):
        do_rounds(OWN, 1, 1, error=error)
    assert listener.heard[-1][1].error == told


@pytest.mark.parametrize("killed", [True, False])
def test_a_run_that_goes_on_tells_each_round_once(killed, do_rounds, make_listener):
    """Rounds 3 and 4 are done again, as the checkpoint was that of round 2."""
    listener = make_listener()
    do_rounds(OWN, 1, 4, killed=killed)
    do_rounds(OWN, 3, 6)
    assert [event for event in what(listener) if isinstance(event, int)] == [1, 2, 3, 4, 5, 6]
    first, second = (event[1] for event in listener.heard if event[0] == "started")
    assert (first.told, second.told) == (0, 4)
    assert first.id == second.id


def test_runs_have_different_ids(open_run, make_listener):
    listener = make_listener()
    for _ in range(2):
        context, do = open_run(OWN)
        with context:
            (do(1, 1).path / "tracking.json").unlink()
    first, second = (event[1].id for event in listener.heard if event[0] == "started")
    assert first != second


def test_who_comes_later_is_told_the_rounds_before_first(do_rounds, make_listener):
    do_rounds("", 1, 3)
    listener = make_listener()
    do_rounds(OWN, 3, 4)
    assert what(listener) == ["started", 1, 2, 3, 4, "ended"]
    assert [len(event[2]) for event in listener.heard[1:5]] == [2] * 4
    assert listener.heard[1][1].accuracy == 0.1


@pytest.mark.parametrize("moment", ["started", 2, "ended"])
def test_one_that_fails_is_warned_of_once_and_costs_nothing(moment, do_rounds, make_listener, caplog):
    failing, other = make_listener(deaf=(moment,)), make_listener("Other")
    with caplog.at_level(logging.WARNING, "fedfmd"):
        folder = do_rounds(f"{OWN}, own:Other", 1, 4)
    assert caplog.messages == [
        "own:Listener is told no more, and the run goes on without it: the network is gone"
    ]
    assert what(failing) == {"started": [], 2: ["started", 1], "ended": ["started", 1, 2, 3, 4]}[moment]
    assert what(other) == ["started", 1, 2, 3, 4, "ended"]
    assert len(folder.rounds.read_text().splitlines()) == 5


def test_one_that_failed_hears_what_it_missed_when_the_run_goes_on(do_rounds, make_listener):
    make_listener(deaf=(2,))
    do_rounds(OWN, 1, 4)
    listener = make_listener()
    do_rounds(OWN, 5, 6)
    assert what(listener) == ["started", 2, 3, 4, 5, 6, "ended"]


def test_without_callbacks_a_run_keeps_nothing(do_rounds):
    assert not (do_rounds("", 1, 1).path / "tracking.json").exists()


def test_a_damaged_record_is_one_line(do_rounds, make_listener):
    make_listener()
    folder = do_rounds(OWN, 1, 1)
    (folder.path / "tracking.json").write_text('{"who": 1}')
    with pytest.raises(SettingsError, match=r"tracking\.json is damaged .*delete it"):
        do_rounds(OWN, 2, 2)


def test_a_row_is_its_numbers(make_run, make_centralised):
    (row,) = make_run([0.5], **{"model.conv": "static"}).rounds
    values = numbers(row)
    assert (values["accuracy"], values["clients_ok"]) == (0.5, 2.0)
    assert not values.keys() & {"round", "status", "validation_loss"}
    (epoch,) = make_centralised([0.5]).rounds
    assert numbers(epoch)["train_accuracy"] == 0.5
    assert "epoch" not in numbers(epoch)


def test_a_class_that_derives_from_callback_needs_only_some_methods(
    do_rounds, make_listener, monkeypatch, caplog
):
    make_listener()

    rounds = []

    class Few(Callback):
        def round_ended(self, row, clients):
            rounds.append(row.round)

    monkeypatch.setattr("own.Few", Few, raising=False)
    do_rounds("own:Few", 1, 2)
    assert rounds == [1, 2]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        (
            "tensorbord",
            r"tracking\.loggers = 'tensorbord': must be one of .*, or module:Class of your own; .*'tensorboard'\?",
        ),
        (
            "nowhere:Mine",
            r"tracking\.loggers = 'nowhere:Mine' can't be imported .*beside the experiment file",
        ),
        (":Mine", r"tracking\.loggers = ':Mine' can't be imported"),
        ("math:pi", r"tracking\.loggers = 'math:pi' must be a class with the methods run_started, "),
        (
            "pathlib:Path",
            r"tracking\.loggers = 'pathlib:Path' must be a class with the methods run_started, ",
        ),
    ],
)
def test_what_is_no_callback_is_refused_before_any_work(loggers, message, tiny_settings, tmp_path):
    from fedfmd.server_app import prepare

    federated = tiny_settings(**{"tracking.loggers": loggers}).in_folder(tmp_path / "run")
    for check, settings in (
        (prepare, federated),
        (prepare_centralised, federated.model_copy(update={"kind": "centralised"})),
    ):
        with pytest.raises(SettingsError, match=message):
            check(settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_library_is_named_with_its_extra(name, monkeypatch, tmp_path):
    monkeypatch.setattr("fedfmd.errors.find_spec", lambda module: None)
    settings = Settings.from_mapping({"kind": "centralised", "tracking.loggers": name})
    with pytest.raises(
        SettingsError, match=rf"^tracking\.loggers = '{name}' needs {name}: pip install 'fedfmd\[{name}\]'$"
    ):
        prepare_centralised(settings.in_folder(tmp_path / "run"))


def test_the_record_tells_how_far_each_one_is(do_rounds, make_listener):
    make_listener(deaf=(3,))
    make_listener("Other")
    folder = do_rounds(f"{OWN}, own:Other", 1, 4)
    assert json.loads((folder.path / "tracking.json").read_text())["told"] == {OWN: 2, "own:Other": 4}


def test_nobody_listens_after_the_end(make_listener, open_run):
    listener = make_listener()
    context, do = open_run(OWN)
    with context:
        do(1, 1)
    do(2, 2)
    assert what(listener) == ["started", 1, "ended"]
