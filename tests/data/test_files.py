import numpy as np
import pytest

from fedfmd.data.files import read_npz, replacing


def test_reads_the_named_arrays_in_order(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3), y=np.ones(2), unused=np.zeros(1))
    y, x = read_npz(tmp_path / "a.npz", "y", "x")
    assert y.tolist() == [1, 1]
    assert x.tolist() == [0, 1, 2]


def test_never_unpickles(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{"not": "numbers"}], dtype=object))
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        read_npz(tmp_path / "a.npz", "x")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a readable npz file") as raised:
        read_npz(path, "x")
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_single_array_is_no_archive(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(ValueError, match="not an archive of named arrays"):
        read_npz(tmp_path / "a.npz", "x")


def test_replacing_puts_the_whole_file_in_place(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_replacing_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
