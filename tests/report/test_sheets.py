import io
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from fedfmd.report.costs import rank
from fedfmd.report.selection import Choice, Selection, Trial
from fedfmd.report.sheets import (
    flat_row,
    make_sheets,
    markdown,
    ranked_sheet,
    rows_sheet,
    runs_sheet,
    terminal_tables,
)
from fedfmd.report.statistics import summarise
from fedfmd.report.wording import WORDINGS


@pytest.fixture
def summary(make_run):
    """Static with 70 and 80 %, fmdconv with 80 and 86 %: paired differences of 10 and 6 points."""
    return summarise(
        [
            make_run([accuracy], seed=seed, clients=clients, **{"model.conv": conv})
            for conv, seed, accuracy, clients in (
                ("static", 0, 0.7, (0.9, 0.5)),
                ("static", 1, 0.8, (0.9, 0.7)),
                ("fmdconv", 0, 0.8, ()),
                ("fmdconv", 1, 0.86, ()),
            )
        ]
    )


def lines(sheet):
    return dict(zip(sheet.columns, zip(*sheet.lines, strict=True), strict=True))


def test_the_cells_are_the_statistics_with_their_units(summary):
    accuracy, _, target, cost, network, scores = map(lines, make_sheets(summary))
    assert accuracy == {
        "runs": ("static", "fmdconv"),
        "seeds": ("2", "2"),
        "final %": ("75.0 ± 7.1", "83.0 ± 4.2"),
        "best %": ("75.0 ± 7.1", "83.0 ± 4.2"),
        "worst clients %": ("60.0 ± 14.1", "–"),
    }
    assert target["reached"] == ("1 of 2", "2 of 2")
    assert target["virtual s"] == ("10.0", "10.0 ± 0.0")
    assert cost["MB"] == ("5.00 ± 0.00", "5.00 ± 0.00")
    assert cost["on the front in"] == ("–", "time, FLOPs, bytes, latency")
    assert network["latency ms"] == ("2.000", "2.000")
    assert network["kernel entropy"] == ("0.9000", "0.9000")
    assert scores["IES ms"] == ("2.679", "2.413")  # 2 ms / 70 and 80 %, 2 ms / 80 and 86 %
    assert "parameters" not in network  # nobody knows them


def test_centralised_runs_have_their_own_columns(make_centralised):
    runs = [
        make_centralised([0.5, accuracy], seed=seed, **{"model.conv": conv})
        for conv, accuracies in (("static", (0.7, 0.8)), ("fmdconv", (0.8, 0.86)))
        for seed, accuracy in enumerate(accuracies)
    ]
    summary = summarise(runs)
    accuracy, _, target, cost, network, scores = map(lines, make_sheets(summary))
    assert accuracy == {
        "runs": ("static", "fmdconv"),
        "seeds": ("2", "2"),
        "final %": ("75.0 ± 7.1", "83.0 ± 4.2"),
        "best %": ("75.0 ± 7.1", "83.0 ± 4.2"),
        "top-5 %": ("87.5 ± 3.5", "91.5 ± 2.1"),
        "best top-5 %": ("87.5 ± 3.5", "91.5 ± 2.1"),
    }
    assert tuple(target) == ("runs", "reached", "train s", "GFLOPs")
    assert target["train s"] == ("8.00", "8.00 ± 0.00")
    assert cost["s per epoch"] == ("4.00 ± 0.00", "4.00 ± 0.00")
    assert cost["on the front in"] == ("–", "time, FLOPs, latency")
    assert tuple(network) == ("runs", "latency ms", "kernel entropy")
    assert scores["IES train s"] == ("5.357", "4.826")  # 4 s / 70 and 80 %, 4 s / 80 and 86 %
    assert "Until the first epoch" in make_sheets(summary)[2].caption
    assert flat_row(summary.groups[0], 75)["top5_final"] == pytest.approx(87.5)


@pytest.mark.parametrize(("epsilon", "shown"), [(3.14159, "3.142"), (float("inf"), "∞")])
def test_the_privacy_of_private_runs_stands_beside_their_accuracy(make_run, epsilon, shown):
    run = make_run([0.5, 0.6])
    last = replace(run.rounds[-1], epsilon=epsilon)
    private = replace(run, rounds=(*run.rounds[:-1], last), variant="private")
    sheet = make_sheets(summarise([run, private]))[0]
    assert dict(zip(lines(sheet)["runs"], lines(sheet)["ε"], strict=True))["private"] == shown
    assert "ε: differential privacy" in sheet.caption


def test_the_cost_tells_how_much_work_was_cut(make_run):
    summary = summarise([replace(make_run([0.5]), cut=37.5)])
    sheet = make_sheets(summary)[2]
    assert lines(sheet)["cut %"] == ("37.5",)
    assert "Cut: share of the clients' full work" in sheet.caption
    assert flat_row(summary.groups[0], 50)["cut"] == pytest.approx(37.5)


def test_only_columns_that_are_there_are_explained(summary, make_run):
    assert "Worst clients: mean" in make_sheets(summary)[0].caption
    alone = make_sheets(summarise([make_run([0.5])]))
    assert alone[0].columns == ("runs", "seeds", "final %", "best %")
    assert alone[0].caption == (
        "Test accuracy, mean ± standard deviation over seeds. Best: the highest of all rounds; without validation "
        "images that is a choice by the test images."
    )


def test_differences_to_static_are_shown_before_and_after_the_correction(make_run):
    accuracies = {"static": (0.6, 0.6), "fmdconv": (0.7, 0.702), "condconv": (0.61, 0.64)}
    runs = [
        make_run([accuracy], seed=seed, **{"model.conv": conv})
        for conv, own in accuracies.items()
        for seed, accuracy in enumerate(own)
    ]
    _, differences, *_ = make_sheets(summarise(runs))
    assert lines(differences) == {
        "runs": ("fmdconv", "condconv"),
        "pairs": ("2", "2"),
        "minus static": ("+10.1", "+2.5"),
        "95 % interval": ("[+8.8, +11.4]", "[-16.6, +21.6]"),  # 12.706 * 0.1 / 2, 12.706 * 3 / 2
        "p": ("0.006", "0.344"),  # t = 101 and 5 / 3 with one degree of freedom
        "Holm's p": ("0.013", "0.344"),
        "holds": ("yes", "no"),
    }
    assert "Holm's p-value is corrected for all 2, and a difference holds where it is at most 0.05." in (
        differences.caption
    )


def test_accuracy_on_validation_images_has_a_column(make_run):
    accuracy, *_ = make_sheets(summarise([make_run([0.9, 0.7], validation=[0.5, 0.8])]))
    assert lines(accuracy) == {
        "runs": ("fmdconv",),
        "seeds": ("1",),
        "validation %": ("80.0",),
        "final %": ("70.0",),
        "best %": ("70.0",),
    }
    assert "Best: that of the round with the highest validation accuracy." in accuracy.caption


def test_what_was_tried_is_the_last_table(make_run):
    choice = Choice(
        Selection(("train.lr", "model.norm"), (100, 101)),
        (
            Trial("static", (0.02, "group"), {100: 70.0, 101: 80.0}, chosen=True),
            Trial("static", (1.0, "batch"), {100: 60.0}, chosen=False),
        ),
    )
    accuracy, *_, tried = make_sheets(summarise([make_run([0.5])], choice=choice))
    assert "own train.lr, model.norm, chosen by the validation accuracy of seeds 100, 101" in accuracy.caption
    assert lines(tried) == {
        "runs": ("static", "static"),
        "train.lr": ("0.02", "1"),
        "model.norm": ("group", "batch"),
        "seeds": ("2", "1"),
        "validation %": ("75.0 ± 7.1", "60.0"),
        "chosen": ("chosen", ""),
    }


def test_the_target_is_explained(summary, make_run):
    assert "75.0 % (the lowest mean of the final accuracies)" in make_sheets(summary)[2].caption
    asked = make_sheets(summarise([make_run([0.5])], 90))[1]
    assert "90.0 % (as asked)" in asked.caption
    assert lines(asked)["virtual s"] == ("not reached",)


def test_a_network_that_is_always_wrong_has_an_infinite_score(make_run):
    run = make_run([0.5])
    object.__setattr__(run.rounds[-1], "ies_infer", float("inf"))
    summary = summarise([run])
    assert lines(make_sheets(summary)[4])["IES ms"] == ("∞",)
    assert flat_row(summary.groups[0], 50)["ies_infer_ms"] == "inf"


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("kind", ["federated", "centralised"])
def test_tables_fit_a_terminal_with_all_names_and_numbers(kind, width, make_run, make_centralised):
    names = [f"fmdconv, attentions input,kernel,output, alpha 0.{place}" for place in range(3)]
    make = partial(make_run, clients=[0.1]) if kind == "federated" else make_centralised
    make = partial(make, validation=[0.5])
    runs = [make([0.5], variant=name, seed=seed) for name in names for seed in (0, 1)]
    runs += [make([0.6 + 0.3 * seed], seed=seed, **{"model.conv": "static"}) for seed in (0, 1)]
    for sheet in make_sheets(summarise(runs)):
        console = Console(file=io.StringIO(), width=width)
        tables = terminal_tables(sheet, console)
        console.print(*tables)
        text = console.file.getvalue()
        assert all(len(line) <= width for line in text.splitlines())
        names = Counter(word for line in sheet.lines for word in line[0].split())
        assert all(text.split().count(word) >= len(tables) * number for word, number in names.items())
        shown = [column.header for table in tables for column in table.columns[1:]]
        assert all(cell in text for line in sheet.lines for cell in line[1:])  # no number is broken
        assert shown == list(sheet.columns[1:])


def test_a_ranking_tells_the_budget_and_what_each_spent(summary):
    axis = WORDINGS["federated"].costs["virtual_s"]
    names = {group: group.label.upper() for group in summary.groups}
    sheet = ranked_sheet(rank(summary.groups, "virtual_s", 75), axis, 75, names)
    assert lines(sheet) == {
        "runs": ("FMDCONV", "STATIC"),
        "% at 10 s": ("83.0 ± 4.2", "75.0 ± 7.1"),
        "final %": ("83.0 ± 4.2", "75.0 ± 7.1"),
        "s in all": ("10", "10"),
        "s to 75.0 %": ("10.0 ± 0.0", "10.0 (1 of 2)"),
        "minus static": ("+8.0", "–"),
        "on the front": ("yes", ""),
    }
    assert sheet.caption.startswith("The test accuracy that each had reached for 10 s, the least")


def test_runs_are_listed_with_what_each_spent(summary):
    sheet = runs_sheet(summary.groups, WORDINGS["federated"].costs)
    assert sheet.columns == ("runs", "seed", "final %", "rounds", "s", "MB", "kJ", "GFLOPs")
    assert sheet.lines[-1] == ("fmdconv", "1", "86.0", "1", "10", "5", "0.500", "1")


def test_rows_of_a_file_stand_under_its_columns_without_empty_ones(make_run):
    sheet = rows_sheet("Clients", "", make_run([0.5], clients=[0.25, None]).clients, "client")
    columns = lines(sheet)
    assert sheet.columns[:3] == ("client", "round", "device")
    assert (columns["train_flops"], columns["accuracy"]) == (("1,000,000,000",) * 2, ("0.25", "–"))
    assert "reason" not in columns


def test_what_labels_leave_out_has_a_table_of_its_own(make_run):
    runs = [
        replace(make_run([0.5], variant=f"lr {lr}", **{"train.lr": lr}), unlabelled=("train.lr",))
        for lr in (0.1, 0.2)
    ]
    *_, beyond = make_sheets(summarise(runs))
    assert lines(beyond) == {"runs": ("lr 0.1", "lr 0.2"), "train.lr": ("0.1", "0.2")}


def test_markdown_is_a_table_under_its_title(summary):
    text = markdown(make_sheets(summary)[2])
    assert text.startswith("### To reach 75.0 %\n\nUntil the first round")
    assert "| runs | reached | virtual s | GFLOPs | MB |\n| --- | ---: | ---: | ---: | ---: |\n" in text
    assert "| static | 1 of 2 | 10.0 | 1.00 | 5.00 |\n" in text


def test_a_row_holds_all_figures(summary):
    row = flat_row(summary.groups[1], summary.target)
    assert (row["label"], row["seeds"], row["rounds"]) == ("fmdconv", 2, 1)
    assert (row["final"], row["minus_static"], row["minus_static_pairs"]) == (
        pytest.approx(83),
        pytest.approx(8),
        2,
    )
    assert (row["target"], row["target_reached"], row["mb"]) == (pytest.approx(75), 2, 5)
    assert (row["worst_clients"], row["params"]) == (None, None)


def test_tests_of_clients_have_a_table_where_there_are_any(summary, make_run):
    assert "Clients' own test images" not in [sheet.title for sheet in make_sheets(summary)]
    run = make_run([0.5], clients=[0.9, 0.9])
    rows = tuple(
        replace(row, test_accuracy=value) for row, value in zip(run.clients, (0.4, 0.6), strict=True)
    )
    tested = summarise([replace(run, clients=rows)])
    sheet = make_sheets(tested)[1]
    assert sheet.title == "Clients' own test images"
    assert lines(sheet) == {
        "runs": ("fmdconv",),
        "mean %": ("50.0",),
        "spread": ("14.1",),
        "worst tenth %": ("40.0",),
    }
    assert "Own: of" not in sheet.caption
    row = flat_row(tested.groups[0], 50)
    assert (row["client_test"], row["personal_test"]) == (pytest.approx(50), None)
