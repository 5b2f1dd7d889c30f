"""What the benchmarks share: rows in files, and memory."""

import os

import psutil
import pytest


@pytest.fixture(scope="module")
def common(script):
    return script("common")


def test_rows_are_written_anew_or_after_those_that_are_there(common, tmp_path):
    file = tmp_path / "rows.csv"
    common.write_rows(file, [{"a": 1, "b": "x, y"}])
    common.write_rows(file, [{"b": 3, "a": 2}], extend=True)  # in the file's order
    assert file.read_text() == 'a,b\n1,"x, y"\n2,3\n'
    common.write_rows(file, [{"c": 1}])
    assert file.read_text() == "c\n1\n"


def test_rows_of_other_columns_are_not_put_below(common, tmp_path):
    file = tmp_path / "rows.csv"
    common.write_rows(file, [{"a": 1}])
    with pytest.raises(SystemExit, match=r"rows\.csv has other columns: name another file by --out"):
        common.write_rows(file, [{"b": 1}], extend=True)
    assert file.read_text() == "a\n1\n"


def test_memory_is_that_of_all_processes_that_live(common):
    gone = psutil.Popen(["true"])
    gone.wait()
    me = psutil.Process(os.getpid())
    assert common.pss_of([me, gone]) > 10_000_000
    assert me in common.family(me)
    assert common.family(gone) == []
