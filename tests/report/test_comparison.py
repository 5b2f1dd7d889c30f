import json

import numpy as np
import pytest

from fedfmd.cost import count
from fedfmd.errors import SettingsError
from fedfmd.models import make_model
from fedfmd.report.comparison import read_comparison
from fedfmd.report.selection import Selection


def test_a_run_is_read_with_all_its_files(runs):
    static, *_ = read_comparison([runs / "static-0"]).runs
    assert [row.accuracy for row in static.rounds] == [0.4, 0.7]
    assert [(row.round, row.status) for row in static.clients] == [
        (1, "ok"),
        (1, "late"),
        (2, "ok"),
        (2, "late"),
    ]
    assert static.label_counts.tolist() == [[5, 0, 2], [1, 7, 0]]
    assert static.environment["versions"]
    assert static.cost == count(make_model("resnet8", "static", 10, norm="group"), 16)


def test_optional_files_may_be_missing(write_run):
    (run,) = read_comparison([write_run("bare", [0.5, 0.6])]).runs
    assert (run.clients, run.label_counts, run.environment) == ((), None, {})


def test_a_network_is_counted_without_the_images_of_cifar(write_run):
    (run,) = read_comparison([write_run("cifar", [0.5, 0.6], **{"data.dataset": "cifar100"})]).runs
    assert run.cost == count(make_model("resnet8", "fmdconv", 100, norm="group"), 32)


def test_a_network_whose_images_are_elsewhere_has_no_cost(write_run):
    changes = {"data.dataset": "npz", "data.train": "gone.npz", "data.test": "gone.npz"}
    (run,) = read_comparison([write_run("npz", [0.5, 0.6], **changes)]).runs
    assert run.cost is None


def test_runs_are_named_by_what_differs_and_ordered_by_its_values(write_run, tmp_path):
    for conv in ("fmdconv", "static"):
        for alpha in (10.0, 0.5):
            for seed in (1, 0):
                changes = {"model.conv": conv, "partition.alpha": alpha, "seed": seed}
                write_run(f"{conv}-{alpha}-{seed}", [0.5, 0.6], **changes)
    runs = read_comparison([tmp_path]).runs
    assert [(run.label, run.seed) for run in runs] == [
        ("static, alpha 0.5", 0),
        ("static, alpha 0.5", 1),
        ("fmdconv, alpha 0.5", 0),
        ("fmdconv, alpha 0.5", 1),
        ("static, alpha 10", 0),
        ("static, alpha 10", 1),
        ("fmdconv, alpha 10", 0),
        ("fmdconv, alpha 10", 1),
    ]
    assert (runs[0].task, runs[0].variant) == ("alpha 0.5", "static")


def test_a_split_is_named_without_the_parameters_of_others(write_run, tmp_path):
    for alpha, scheme in ((0.5, "iid"), (0.3, "dirichlet")):
        write_run(scheme, [0.5, 0.6], **{"partition.scheme": scheme, "partition.alpha": alpha})
    tasks = [run.task for run in read_comparison([tmp_path]).runs]
    assert tasks == ["scheme dirichlet, alpha 0.3", "scheme iid"]


def test_settings_of_the_same_short_name_keep_their_whole_one(write_run, tmp_path):
    write_run("a", [0.5, 0.6], **{"temperature.rounds": 5})
    write_run("b", [0.5, 0.6, 0.7], rounds=3, **{"temperature.rounds": 6})
    first, second = read_comparison([tmp_path]).runs
    assert (first.label, second.label) == (
        "temperature.rounds 5, server.rounds 2",
        "temperature.rounds 6, server.rounds 3",
    )


def test_labels_of_many_settings_name_no_more_than_tells_runs_apart(write_run, tmp_path):
    first = {"train.lr": 0.1, "train.batch-size": 32, "server.momentum": 0.5, "model.width": 0.5}
    for conv, changes in (
        ("static", {}),
        ("fmdconv", {}),
        ("static", first | {"partition.alpha": 0.1, "data.image-size": 8}),
        ("fmdconv", first | {"partition.alpha": 0.1, "data.image-size": 8}),
    ):
        write_run(f"{conv}-{len(changes)}", [0.5, 0.6], **{"model.conv": conv} | changes)
    comparison = read_comparison([tmp_path])
    assert [run.label for run in comparison.runs] == [
        *("static, image-size 0", "fmdconv, image-size 0", "static, image-size 8", "fmdconv, image-size 8")
    ]
    left_out = ("model.width", "partition.alpha", "train.lr", "train.batch-size", "server.momentum")
    assert comparison.runs[0].unlabelled == left_out
    assert comparison.notes == (f"Labels are short: groups may differ in {', '.join(left_out)} as well.",)


def test_unfinished_runs_are_left_out_and_named(write_run, tmp_path):
    write_run("whole", [0.5, 0.6])
    write_run("half", [0.5], seed=1)
    (write_run("started", [], optional=True, seed=2) / "clients.csv").unlink(missing_ok=True)
    comparison = read_comparison([tmp_path])
    assert [run.folder.name for run in comparison.runs] == ["whole"]
    assert comparison.notes == ("Unfinished runs, left out: started (no round), half (1 of 2 rounds).",)


def test_where_no_run_is_finished_they_are_compared_and_this_is_said(write_run, tmp_path):
    write_run("half", [0.5])
    comparison = read_comparison([tmp_path])
    assert [run.folder.name for run in comparison.runs] == ["half"]
    assert comparison.notes == (
        "Unfinished runs, compared as far as they are, because no run is finished: half (1 of 2 rounds).",
    )


def test_a_second_run_of_the_same_settings_is_left_out_and_named(write_run, tmp_path):
    write_run("a", [0.5, 0.6])
    write_run("b", [0.5, 0.6])
    comparison = read_comparison([tmp_path, tmp_path / "runs"])
    assert [run.folder.name for run in comparison.runs] == ["a"]
    assert comparison.notes == ("Left out, because another run has the same settings: b.",)


def test_settings_that_a_convolution_does_not_heed_neither_name_nor_tell_apart_its_runs(write_run, tmp_path):
    for conv in ("static", "dyconv"):
        for kernels in (1, 4):
            settings = {"model.conv": conv, "model.kernels": kernels, "temperature.initial": 10.0 * kernels}
            write_run(f"{conv}-{kernels}", [0.5, 0.6], **settings)
    comparison = read_comparison([tmp_path])
    assert [run.variant for run in comparison.runs] == [
        "static",
        "dyconv, kernels 1, initial 10",
        "dyconv, kernels 4, initial 40",
    ]
    assert comparison.notes == ("Left out, because another run has the same settings: static-4.",)


def test_runs_of_own_code_that_is_not_here_are_compared_by_all_their_settings(write_run, tmp_path):
    own = {
        "model.conv": "elsewhere:Conv",
        "partition.scheme": "elsewhere:split",
        "data.dataset": "elsewhere:images",
    }
    own |= {
        "model.arch": "elsewhere:make",
        "train.loss": "elsewhere:loss",
        "budget.policy": "elsewhere:policy",
    }
    for kernels in (1, 2):
        write_run(
            f"own-{kernels}", [0.5, 0.6], **own | {"model.kernels": kernels, "partition.alpha": kernels}
        )
    first, second = read_comparison([tmp_path / "runs"]).runs
    assert (first.variant, first.task, first.cost) == ("kernels 1", "alpha 1", None)
    assert (second.variant, second.task) == ("kernels 2", "alpha 2")


def test_a_run_that_met_its_limit_is_finished(write_run, tmp_path):
    write_run("met", [0.5, 0.6], rounds=9, **{"server.stop-at": "accuracy=0.6"})
    write_run("not", [0.5, 0.6], rounds=9, seed=1, **{"server.stop-at": "accuracy=0.7"})
    comparison = read_comparison([tmp_path / "runs"])
    assert [run.folder.name for run in comparison.runs] == ["met"]
    assert comparison.notes == ("Unfinished runs, left out: not (2 of 9 rounds).",)


def test_runs_of_different_code_are_compared_but_named(runs):
    path = runs / "static-0" / "environment.json"
    path.write_text('{"commit": "0123456789abcdef"}')
    (note,) = read_comparison([runs]).notes
    assert note.startswith("The runs come from different code: commits 0123456789ab")


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(SettingsError, match=rf"^no such folder: {tmp_path / 'none'}$"):
        read_comparison([tmp_path, tmp_path / "none"])


def test_runs_of_different_machines_are_compared_but_their_seconds_are_not(runs):
    known = json.loads((runs / "static-0" / "environment.json").read_text())
    known["machine"] |= {"processor": "Raspberry Pi 5", "capability": "DEFAULT", "cores": 4, "gpu": None}
    (runs / "static-0" / "environment.json").write_text(json.dumps(known))
    (note,) = read_comparison([runs]).notes
    assert note.startswith("Measured seconds don't compare, as the machines differ: ")
    assert "Raspberry Pi 5 (DEFAULT), 4 cores" in note


def test_a_centralised_run_is_read_with_its_epochs(write_centralised_run):
    (run,) = read_comparison([write_centralised_run("central", [0.5, 0.6])]).runs
    assert [(row.epoch, row.accuracy) for row in run.rounds] == [(1, 0.5), (2, 0.6)]
    assert run.finished


def test_an_unfinished_centralised_run_is_told_in_epochs(write_centralised_run):
    (note,) = read_comparison([write_centralised_run("central", [0.5])]).notes
    assert note.endswith("because no run is finished: central (1 of 2 epochs).")


def test_federated_and_centralised_runs_are_not_compared(write_run, write_centralised_run, tmp_path):
    write_run("fed", [0.5, 0.6])
    write_centralised_run("central", [0.5, 0.6])
    with pytest.raises(
        SettingsError, match=r"runs of different kinds .*central is centralised, .*fed is fed"
    ):
        read_comparison([tmp_path])


def test_links_to_runs_are_followed_and_each_run_is_read_once(runs, tmp_path):
    choice = tmp_path / "choice"
    choice.mkdir()
    for link in ("one", "two"):
        (choice / link).symlink_to(runs / "static-0")
        (choice / f"back-{link}").symlink_to(choice)
    (run,) = read_comparison([choice]).runs
    assert run.folder == runs / "static-0"


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(SettingsError, match="no run with a finished round below"):
        read_comparison([tmp_path])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rounds.csv", "round\nx\n", r"rounds\.csv, line 1: no column virtual_s"),
        ("rounds.csv", "twice", r"rounds\.csv: row 2 is of 1: a row is missing, or there twice"),
        ("partition.npz", "", r"partition\.npz: "),
        ("environment.json", "{", r"static-0/environment\.json is damaged"),
        ("environment.json", "[]", r"environment\.json is damaged \(it holds \[\], no mapping\)"),
        ("settings.yaml", "train: {lr: fast}", r"static-0/settings\.yaml: train\.lr = 'fast'"),
    ],
)
def test_a_damaged_file_is_one_line(name, content, message, runs):
    path = runs / "static-0" / name
    if content == "twice":
        header, first, _ = path.read_text().splitlines()
        content = f"{header}\n{first}\n{first}\n"
    path.write_text(content)
    with pytest.raises(SettingsError, match=message):
        read_comparison([runs])


@pytest.mark.parametrize("counts", [[1, 2], [[0.5, 1]], [[1, 2]]], ids=["flat", "halves", "one client"])
def test_label_counts_are_whole_numbers_for_every_client(counts, runs):
    path = runs / "static-0" / "partition.npz"
    path.unlink()
    np.savez(path, label_counts=np.array(counts))
    with pytest.raises(
        SettingsError, match=r"partition\.npz: label_counts is .*: it must hold whole numbers"
    ):
        read_comparison([runs])


def test_a_selection_below_the_named_folder_is_for_the_runs_beside_it(write_run, tmp_path):
    runs = tmp_path / "runs"
    for lr, validation in ((0.1, 0.6), (0.2, 0.7)):
        changes = {"train.lr": lr, "data.validation": 0.1}
        write_run(f"study/lr={lr}", [0.5, 0.9], validation=[0.5, validation], **changes)
    Selection(("train.lr",)).write(runs / "study")
    assert [run.settings.train.lr for run in read_comparison([runs]).runs] == [0.2]
    write_run("other", [0.5, 0.9], **{"model.conv": "static"})
    with pytest.raises(
        SettingsError, match=r"study/select\.json chooses train\.lr for the runs beside it, but not"
    ):
        read_comparison([runs])
