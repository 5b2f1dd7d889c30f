import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedfmd.cost import count
from fedfmd.errors import SettingsError
from fedfmd.models import make_model
from fedfmd.report.comparison import read_comparison
from fedfmd.report.packed import MANIFEST, read_packed, write_packed
from fedfmd.report.statistics import client_accuracies
from fedfmd.report.writing import FILES, write_report


def contents(folder, *names):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in files if not names or path.name in names
    }


@pytest.fixture
def packed(finished_runs, tmp_path):
    """The finished runs, packed, to change."""
    folder = tmp_path / "packed"
    write_packed(read_comparison([finished_runs]).read, folder)
    return folder


def test_packed_runs_are_read_as_they_were(packed, finished_runs):
    for old, new in zip(read_comparison([finished_runs]).runs, read_comparison([packed]).runs, strict=True):
        assert new.folder == packed / old.folder.name
        assert (new.label, new.settings, new.rounds) == (old.label, old.settings, old.rounds)
        assert (new.environment, new.cost) == (old.environment, old.cost)
        assert np.array_equal(new.label_counts, old.label_counts)


@pytest.mark.parametrize("kind", ["finished_runs", "centralised_runs"])
def test_a_report_on_packed_runs_is_the_one_on_their_folders(kind, request, tmp_path):
    shutil.copytree(request.getfixturevalue(kind), tmp_path / "runs")
    out = tmp_path / "out"
    write_report([tmp_path / "runs"], out, target=75, pack=tmp_path / "packed")
    shutil.rmtree(tmp_path / "runs")
    write_report([tmp_path / "packed"], tmp_path / "again", target=75)
    assert contents(out) == contents(tmp_path / "again")
    assert set(FILES) < set(contents(out))  # and the pages of the runs


def test_runs_that_a_report_leaves_out_are_packed_too(write_run, tmp_path):
    write_run("whole", [0.5, 0.6])
    write_run("twin", [0.5, 0.6])
    write_run("half", [0.5], seed=1)
    write_run("begun", [], optional=True, seed=2)
    runs = tmp_path / "runs"
    _, notes = write_report([runs], tmp_path / "out", pack=tmp_path / "packed")
    assert len(notes) == 2
    assert read_comparison([tmp_path / "packed"]).notes == notes
    assert [run.folder.name for run in read_packed(tmp_path / "packed")] == ["begun", "half", "twin", "whole"]


def test_of_the_clients_it_keeps_what_a_report_reads(make_run, tmp_path):
    run = make_run([0.5, 0.6, 0.7], clients=(0.3, 0.9))
    first, second = run.clients
    absent = [replace(first, round=number, client=7, accuracy=0.1 * number) for number in (1, 2)]
    late = [replace(second, round=1), replace(second, round=3, accuracy=None, status="late")]
    run = replace(run, clients=(absent[0], late[0], absent[1], first, late[1]))
    write_packed([run], tmp_path)
    (kept,) = read_packed(tmp_path)
    assert kept.clients == (late[0], absent[1], first, late[1])
    assert sorted(client_accuracies(kept.clients)) == sorted(client_accuracies(run.clients))


def test_equal_runs_make_equal_files(packed, finished_runs, tmp_path):
    before = contents(packed)
    assert set(before) == {"rounds.csv", "clients.csv", MANIFEST}
    shutil.copytree(finished_runs, tmp_path / "copy")
    write_packed(read_comparison([tmp_path / "copy"]).read, tmp_path / "again")
    assert contents(tmp_path / "again") == before
    write_packed(read_comparison([packed]).read, packed)
    assert contents(packed) == before


def test_runs_packed_beside_their_folders_count_once(runs):
    write_packed(read_comparison([runs]).read, runs)
    comparison = read_comparison([runs])
    assert len(comparison.read) == 4
    assert comparison.notes == ()


def test_runs_packed_below_their_folders_count_once_and_are_packed_anew(runs, write_run, tmp_path):
    packed = runs / "packed"
    write_report([runs], tmp_path / "out", pack=packed)
    before = contents(packed)
    _, notes = write_report([runs], tmp_path / "out", pack=packed)
    assert (notes, contents(packed)) == ((), before)
    shutil.rmtree(runs / "static-1")
    shutil.rmtree(runs / "static-0")
    write_run("static-0", [0.4, 0.75], optional=True, **{"model.conv": "static", "seed": 0})
    summary, notes = write_report([runs], tmp_path / "out", pack=packed)
    assert summary.groups[0].final.mean == pytest.approx((75 + 80) / 2)  # the folder's, and the packed one's
    assert notes == ("Left out, because another run has the same settings: static-0.",)
    assert [run.rounds[-1].accuracy for run in read_packed(packed)] == [0.8, 0.86, 0.8, 0.75]


def test_how_much_was_cut_is_kept(write_run, tmp_path):
    write_run("run", [0.5, 0.6], optional=True)
    (run,) = read_comparison([tmp_path / "runs"]).read
    write_packed([replace(run, cut=12.5)], tmp_path / "packed")
    (packed,) = read_packed(tmp_path / "packed")
    assert packed.cut == 12.5
    text = (tmp_path / "packed" / MANIFEST).read_text()
    (tmp_path / "packed" / MANIFEST).write_text(text.replace('"cut": 12.5', '"cut": null'))
    assert read_packed(tmp_path / "packed")[0].cut is None  # its rows, a part of all, don't tell


def test_packed_runs_are_compared_with_those_whose_images_lie_in_folders(write_run, tmp_path):
    images = {
        "data.dataset": "npz",
        "data.train": "/home/somebody/train.npz",
        "data.test": "/home/somebody/test.npz",
    }
    for seed in (0, 1):
        write_run(f"static-{seed}", [0.5, 0.6 + seed / 10], **images | {"model.conv": "static", "seed": seed})
    write_report([tmp_path / "runs"], tmp_path / "out", pack=tmp_path / "packed")
    shutil.rmtree(tmp_path / "runs")
    for seed in (0, 1):
        write_run(f"fmdconv-{seed}", [0.5, 0.7 + seed / 20], **images | {"seed": seed})
    summary, _ = write_report([tmp_path / "runs", tmp_path / "packed"], tmp_path / "out")
    assert [group.label for group in summary.groups] == ["static", "fmdconv"]
    assert summary.groups[1].difference.mean == pytest.approx(7.5)


def test_the_tables_have_every_row_after_the_name_of_its_run(packed, finished_runs):
    header, *lines = (packed / "rounds.csv").read_text().splitlines()
    own = [
        (finished_runs / name / "rounds.csv").read_text().splitlines() for name in ("fmdconv-0", "static-1")
    ]
    assert header == f"run,{own[0][0]}"
    assert lines[:2] == [f"fmdconv-0,{line}" for line in own[0][1:]]
    assert lines[-2:] == [f"static-1,{line}" for line in own[1][1:]]


def test_the_manifest_tells_once_what_runs_have_in_common(packed):
    manifest = json.loads((packed / MANIFEST).read_text())
    assert manifest["settings"]["server.rounds"] == 2
    assert manifest["runs"][0] == {
        "name": "fmdconv-0",
        "rounds": 2,
        "clients": 2,
        "settings": {"model.conv": "fmdconv", "seed": 0},
        "environment": 0,
        "split": 0,
        "network": 0,
        "cut": pytest.approx(-122.2, abs=0.1),  # of 15 images and 100 that its clients say they trained on
    }
    assert (len(manifest["environments"]), len(manifest["networks"])) == (1, 2)
    assert manifest["splits"] == [["5 0 2", "1 7 0"]]


def test_the_manifest_tells_no_folders(write_run, tmp_path):
    changes = {
        "data.dataset": "npz",
        "data.train": "/home/somebody/train.npz",
        "data.test": "/home/somebody/t.npz",
    }
    write_run("run", [0.5, 0.6], **changes)
    write_packed(read_comparison([tmp_path / "runs"]).read, tmp_path / "packed")
    assert "somebody" not in (tmp_path / "packed" / MANIFEST).read_text()
    assert read_packed(tmp_path / "packed")[0].settings.data.train == "train.npz"


def test_a_network_is_known_where_its_images_are_not(write_run, tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4))
    images = str(tmp_path / "images.npz")
    write_run("run", [0.5, 0.6], **{"data.dataset": "npz", "data.train": images, "data.test": images})
    write_packed(read_comparison([tmp_path / "runs"]).read, tmp_path / "packed")
    (tmp_path / "images.npz").unlink()
    (run,) = read_comparison([tmp_path / "packed"]).runs
    assert run.cost == count(make_model("resnet8", "fmdconv", 4, norm="group"), 8)


def test_runs_are_named_by_as_much_of_their_folders_as_tells_them_apart(write_run, tmp_path):
    for name in ("a/seed=0", "b/seed=0", "b/seed=1"):
        write_run(name, [0.5, 0.6], seed=int(name[-1]), **{"model.kernels": 2 + (name[0] == "b")})
    write_packed(read_comparison([tmp_path]).read, tmp_path / "packed")
    runs = read_packed(tmp_path / "packed")
    names = [run.folder.relative_to(tmp_path / "packed").as_posix() for run in runs]
    assert names == ["a/seed=0", "b/seed=0", "b/seed=1"]


def test_a_runs_own_folder_is_not_overwritten(runs):
    folder = runs / "static-0"
    before = contents(folder, "rounds.csv", "clients.csv")
    with pytest.raises(SettingsError, match=r"--pack .*static-0 is the folder of a run"):
        write_report([folder], folder, pack=folder)
    assert contents(folder, "rounds.csv", "clients.csv") == before


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            "rounds.csv",
            "static-1,2,20",
            "static-1,2,soon",
            r"rounds\.csv, line 9, column virtual_s: .*number",
        ),
        ("rounds.csv", "static-1,2", "static-3,2", r"rounds\.csv, line 9, column run: 'static-3' is none"),
        ("rounds.csv", "run,round", "name,round", r"rounds\.csv, line 2, column run: None is none"),
        ("clients.csv", "fmdconv-0,2", "gone,2", r"clients\.csv, line 2, column run: 'gone' is none"),
        (MANIFEST, '"runs": [', '"runs": [,', r"runs\.json, line \d+: Expecting value"),
        (
            MANIFEST,
            '"format": 1',
            '"format": 2',
            r"runs\.json: format 2 is unknown, this fedfmd reads 1: take",
        ),
        (MANIFEST, '"split": 0', '"split": "no"', r"runs\.json, runs\.0\.split: .*valid integer"),
        (MANIFEST, '"split": 0', '"split": 1', r"runs\.json: splits, environments or networks: .*range"),
        (MANIFEST, "5 0 2", "5 x 2", r"runs\.json: splits, environments or networks: .*'x'"),
        (MANIFEST, '"static-1"', '"static-0"', r"runs\.json: the run 'static-0' stands there twice"),
        (
            MANIFEST,
            '"model.width"',
            '"model.size"',
            r"runs\.json, run 'fmdconv-0': unknown setting model\.size",
        ),
    ],
)
def test_a_damaged_file_is_one_line_that_names_the_place(name, old, new, message, packed):
    path = packed / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SettingsError, match=message) as error:
        read_comparison([packed])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["rounds.csv", "clients.csv"])
def test_a_table_that_is_cut_off_is_noticed(name, packed):
    path = packed / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        SettingsError, match=rf"{name}: \d rows of the run 'static-1', but runs\.json tells of \d"
    ):
        read_comparison([packed])


@pytest.mark.parametrize("name", ["rounds.csv", "clients.csv", MANIFEST])
def test_a_file_that_is_no_text_is_named(name, packed):
    (packed / name).write_bytes(b"\x9c\xff\n" * 5)
    with pytest.raises(SettingsError, match=rf"{name}.*: no text"):
        read_comparison([packed])


def test_a_missing_table_is_named(packed):
    (packed / "clients.csv").unlink()
    with pytest.raises(SettingsError, match=r"clients\.csv: no such file, but runs\.json tells of it"):
        read_comparison([packed])


@pytest.mark.parametrize(
    ("train", "kept"),
    [
        (["/home/me/one.npz", "/home/me/two.npz"], ["one.npz", "two.npz"]),
        (["/home/me/one.npz", "/home/me/one.npz"], ["one.npz", "one.npz"]),
        (
            ["/first/one.npz", "/second/one.npz"],
            ["/first/one.npz", "/second/one.npz"],
        ),  # else they were the same
    ],
)
def test_a_pack_tells_no_folders_where_names_tell_the_runs_apart(train, kept, make_run, tmp_path):
    runs = [
        replace(make_run([0.5], seed=seed, **{"data.train": path}), folder=Path(str(seed)))
        for seed, path in enumerate(train)
    ]
    write_packed(runs, tmp_path)
    assert [run.settings.data.train for run in read_packed(tmp_path)] == kept
