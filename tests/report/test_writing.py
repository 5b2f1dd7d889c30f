import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from fedfmd.errors import SettingsError
from fedfmd.report.selection import Selection
from fedfmd.report.writing import FILES, PAGE, PAGES, page_names, write_page, write_report


@pytest.fixture(scope="module")
def report(finished_runs, tmp_path_factory):
    """The report on finished runs: its folder, summary and notes."""
    out = tmp_path_factory.mktemp("out") / "report"
    return out, *write_report([finished_runs], out)


def test_report_is_written_as_markdown_csv_picture_and_page(report):
    out, summary, notes = report
    assert notes == ()
    assert sorted(path.name for path in out.iterdir()) == sorted((*FILES, PAGES))
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "| fmdconv | 2 | 83.0 ± 4.2 | 85.0 ± 7.1 |" in text  # the best of 50, 80 and of 90, 86 %
    with (out / "report.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert (
        [line["label"] for line in lines]
        == [group.label for group in summary.groups]
        == ["static", "fmdconv"]
    )
    assert (lines[1]["final"], lines[1]["minus_static"], lines[1]["mb"]) == ("83", "8", "10")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (out / PAGE).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_the_table_is_what_the_csv_files_say(report, finished_runs):
    _, summary, _ = report
    for group in summary.groups:
        finals = []
        for seed in (0, 1):
            with (finished_runs / f"{group.label}-{seed}" / "rounds.csv").open() as file:
                *_, last = csv.DictReader(file)
            finals.append(100 * float(last["accuracy"]))
        assert group.final.mean == pytest.approx(sum(finals) / 2)
        assert group.final.std == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)


def test_the_table_of_centralised_runs_is_what_the_csv_files_say(centralised_runs, tmp_path):
    summary, _ = write_report([centralised_runs], tmp_path)
    assert "Accuracy over epochs" in (tmp_path / "report.md").read_text(encoding="utf-8")
    with (tmp_path / "report.csv").open() as file:
        lines = {line["label"]: line for line in csv.DictReader(file)}
    for label, line in lines.items():
        rows = []
        for seed in (0, 1):
            with (centralised_runs / f"{label}-{seed}" / "epochs.csv").open() as file:
                rows.append(list(csv.DictReader(file)))
        for figure, per_seed in {
            "final": [100 * float(own[-1]["accuracy"]) for own in rows],
            "top5_best": [100 * max(float(row["top5_accuracy"]) for row in own) for own in rows],
            "epoch_s": [sum(float(row["wall_s"]) for row in own) / len(own) for own in rows],
            "ies_train_s": [float(own[-1]["wall_s"]) / float(own[-1]["accuracy"]) for own in rows],
        }.items():
            assert float(line[figure]) == pytest.approx(sum(per_seed) / 2, rel=1e-5)
    assert {group.label for group in summary.groups} == set(lines)


def test_unfinished_runs_are_named_in_every_text_and_the_target_may_be_asked_for(runs, write_run, tmp_path):
    write_run("half", [0.5], seed=7)
    summary, (note,) = write_report([runs], tmp_path / "report", target=85)
    assert [group.target.reached for group in summary.groups] == [0, 1]
    assert "half (1 of 2 rounds)" in note
    for name in ("report.md", PAGE):
        assert note in (tmp_path / "report" / name).read_text(encoding="utf-8")


@pytest.fixture
def tried(write_run):
    """Two convolutions at two learning rates each, of which validation and test images prefer different ones."""
    for conv, lr, validation, test in (
        ("static", 0.1, 0.7, 0.8),
        ("static", 0.02, 0.8, 0.6),
        ("fmdconv", 0.1, 0.9, 0.7),
        ("fmdconv", 0.02, 0.6, 0.9),
    ):
        for seed in (0, 1):
            changes = {"model.conv": conv, "train.lr": lr, "seed": seed, "data.validation": 0.1}
            accuracies = [0.5, test + seed / 50]
            folder = write_run(f"{conv}-{lr}-{seed}", accuracies, validation=[0.5, validation], **changes)
    return folder.parent


@pytest.mark.parametrize("stored", [True, False])
def test_variants_are_compared_at_the_values_that_validation_chose(stored, tried, tmp_path):
    selection = Selection(("train.lr",))
    if stored:
        selection.write(tried)
    summary, notes = write_report([tried], tmp_path / "report", selection=None if stored else selection)
    assert notes == ()
    assert [(group.label, group.chosen) for group in summary.groups] == [
        ("static", "train.lr=0.02"),
        ("fmdconv", "train.lr=0.1"),
    ]
    static, fmdconv = summary.groups
    assert (static.final.mean, fmdconv.final.mean) == (pytest.approx(61), pytest.approx(71))
    assert (fmdconv.difference.pairs, fmdconv.difference.mean) == (
        2,
        pytest.approx(10),
    )  # over learning rates
    text = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert "| runs | train.lr | seeds | validation % | chosen |" in text
    assert "| static | 0.02 | 2 | 80.0 ± 0.0 | chosen |\n| static | 0.1 | 2 | 70.0 ± 0.0 |  |\n" in text
    page = (tmp_path / "report" / PAGE).read_text(encoding="utf-8")
    assert "What was tried" in page
    assert "Each at its own train.lr, chosen by the validation accuracy (see What was tried)." in page


def test_packed_runs_keep_what_is_to_be_chosen(tried, tmp_path):
    selection = Selection(("train.lr",))
    write_report([tried], tmp_path / "report", pack=tmp_path / "packed", selection=selection)
    summary, _ = write_report([tmp_path / "packed"], tmp_path / "again")
    assert [group.chosen for group in summary.groups] == ["train.lr=0.02", "train.lr=0.1"]


def test_without_a_selection_every_value_is_a_group(tried, tmp_path):
    summary, _ = write_report([tried], tmp_path / "report")
    assert len(summary.groups) == 4
    assert "What was tried" not in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")


def test_a_run_gets_its_own_page(runs):
    folder = runs / "static-0"
    write_page(folder)
    assert "resnet8 with static on digits" in (folder / PAGE).read_text(encoding="utf-8")


def test_the_page_links_to_a_page_of_each_run_beside_it(report):
    out, _, _ = report
    links = re.findall(rf'href="({PAGES}/[^"]+)"', (out / PAGE).read_text(encoding="utf-8"))
    assert len(links) == len(set(links)) == 4
    for link, seed in zip(links, (0, 1, 0, 1), strict=True):
        text = (out / link).read_text(encoding="utf-8")
        assert f"seed {seed}</h1>" in text
        assert f'href="../{PAGE}"' in text
        assert 'src="bokeh.min.js"' in text
    assert len(list((out / PAGES).iterdir())) == 5  # and the script that they share


def test_names_of_pages_can_stand_in_an_address(make_run):
    names = ["a" * 300, "#?%/<b>", "b c", "b-c"]
    runs = [replace(make_run([0.5]), folder=Path("runs") / name) for name in names]
    pages = page_names(runs)
    assert len({page.lower() for page in pages}) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9=.+-]+\.html", page) and len(page) < 100 for page in pages)


@pytest.mark.parametrize("target", [math.nan, 0.0, 101.0])
def test_a_target_is_a_percentage(target, tmp_path):
    with pytest.raises(SettingsError, match=r"--target .* is no accuracy in percent"):
        write_report([tmp_path], tmp_path, target=target)
