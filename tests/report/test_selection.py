import json
from dataclasses import replace

import pytest

from fedfmd.errors import SettingsError
from fedfmd.report.selection import Selection, Trial, choose, stored_selection

LR = Selection(("train.lr",))


@pytest.mark.parametrize(
    ("values", "selection"),
    [
        ({"over": "train.lr", "by": "validation"}, LR),
        (
            {"over": ["train.lr", "train.momentum"], "by": "validation", "seeds": [100]},
            Selection(("train.lr", "train.momentum"), (100,)),
        ),
    ],
)
def test_a_selection_is_read_from_its_part_of_the_file(values, selection, tmp_path):
    assert Selection.from_mapping(values) == selection
    selection.write(tmp_path / "runs")
    assert stored_selection([tmp_path, tmp_path / "runs"]) == selection
    assert stored_selection([tmp_path]) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["train.lr"], r"select = \['train.lr'\]: must hold `over:` and `by: validation`"),
        ({"over": "train.lr", "by": "validation", "best": 1}, "may hold `seeds:`, nothing else"),
        ({"over": "train.lr"}, "select: by = None: must be validation; nothing is chosen on test images"),
        ({"over": "train.lr", "by": "accuracy"}, "select: by = 'accuracy': must be validation"),
        ({"by": "validation"}, "select: over = None: must be a setting, or a list"),
        ({"over": [], "by": "validation"}, r"select: over = \[\]: must be a setting, or a list"),
        (
            {"over": "train.rl", "by": "validation"},
            "select: over = 'train.rl': .* nearest setting is train.lr",
        ),
        ({"over": "seed", "by": "validation"}, "select: over = 'seed': nothing that can be chosen"),
        ({"over": "train.lr", "by": "validation", "seeds": 7}, "select: seeds = 7: must be a list of whole"),
        ({"over": "train.lr", "by": "validation", "seeds": [True]}, r"select: seeds = \[True\]: must be"),
    ],
)
def test_what_cannot_be_selected_is_one_line(values, message):
    with pytest.raises(SettingsError, match=message):
        Selection.from_mapping(values)


def test_folders_of_several_selections_are_refused_and_damaged_files_named(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    LR.write(first)
    replace(LR, seeds=(1,)).write(second)
    with pytest.raises(
        SettingsError, match=r"first/select.json and .*second/select.json differ: report on each"
    ):
        stored_selection([first, second])
    (first / "select.json").write_text("{")
    with pytest.raises(SettingsError, match=r"first/select.json: .*: mend or delete it"):
        stored_selection([first])


@pytest.fixture
def run(make_run):
    """Makes a run of `conv` with this validation accuracy in its last round, whose test accuracy says the opposite."""

    def make(conv, lr, seed, validation):
        changes = {"model.conv": conv, "train.lr": lr, "seed": seed}
        return make_run([0.5, 1 - validation], validation=[0.99, validation], **changes)

    return make


def described(runs):
    return [(run.conv, run.settings.train.lr, run.seed) for run in runs]


def test_each_variant_is_reported_at_its_own_best_value_by_mean_validation_accuracy(run):
    runs = [
        run("static", 0.1, 0, 0.5),
        run("static", 0.1, 1, 0.875),  # the best single seed, but not the best mean
        run("static", 0.02, 0, 0.75),
        run("static", 0.02, 1, 0.75),
        run("fmdconv", 0.1, 0, 0.625),
        run("fmdconv", 0.02, 0, 0.5),
    ]
    reported, choice, notes = choose(runs, LR)
    assert described(reported) == [("static", 0.02, 0), ("static", 0.02, 1), ("fmdconv", 0.1, 0)]
    assert choice.trials == (
        Trial("static", (0.02,), {0: 75, 1: 75}, chosen=True),
        Trial("static", (0.1,), {0: 50, 1: 87.5}, chosen=False),
        Trial("fmdconv", (0.02,), {0: 50}, chosen=False),
        Trial("fmdconv", (0.1,), {0: 62.5}, chosen=True),
    )
    assert notes == []


def test_values_with_different_seeds_are_named(run):
    runs = [run("static", 0.1, 0, 0.5), run("static", 0.1, 1, 0.5), run("static", 0.02, 0, 0.75)]
    reported, _, (note,) = choose(runs, LR)
    assert described(reported) == [("static", 0.02, 0)]
    assert note == "Values were tried with different seeds, so that their means are of unequal runs: static."


def test_of_equal_values_the_lowest_is_chosen(run):
    reported, *_ = choose([run("static", 0.1, 0, 0.5), run("static", 0.02, 0, 0.5)], LR)
    assert described(reported) == [("static", 0.02, 0)]


def test_seeds_that_choose_are_not_reported(run):
    runs = [
        run("static", 0.1, 100, 0.5),
        run("static", 0.02, 100, 0.75),
        run("static", 0.02, 0, 0.25),  # has no say
        run("static", 0.1, 0, 0.875),  # not chosen
        run("fmdconv", 0.1, 100, 0.5),
    ]
    reported, choice, (note,) = choose(runs, Selection(("train.lr",), (100,)))
    assert described(reported) == [("static", 0.02, 0)]
    assert [trial.accuracies for trial in choice.trials] == [{100: 75}, {100: 50}, {100: 50}]
    assert note == "Left out, because no run of a chosen value is finished: fmdconv."


def test_until_others_have_run_the_runs_that_choose_are_reported(run):
    runs = [run("static", 0.1, 100, 0.5), run("static", 0.02, 100, 0.75)]
    reported, _, notes = choose(runs, Selection(("train.lr",), (100,)))
    assert described(reported) == [("static", 0.02, 100)]
    assert notes == []
    with pytest.raises(SettingsError, match=r"select: seeds = \[7\]: no finished run has one of them"):
        choose(runs, Selection(("train.lr",), (7,)))


def test_runs_without_validation_images_are_refused(run, make_run):
    with pytest.raises(
        SettingsError, match=r"data.validation = 0 in run: choosing train.lr by validation needs"
    ):
        choose([run("static", 0.1, 0, 0.5), make_run([0.5])], LR)


def test_the_file_is_what_people_write(tmp_path):
    Selection(("train.lr",), (100,)).write(tmp_path)
    content = json.loads((tmp_path / "select.json").read_text())
    assert content == {"over": ["train.lr"], "by": "validation", "seeds": [100]}
