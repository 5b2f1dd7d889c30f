import os
from errno import ENOSPC

import pytest

from fedfmd.tracking import atomic_write


@pytest.mark.parametrize("content", ["τ = 1\n", b"\x00\xff"])
def test_a_file_gets_its_new_content_and_nothing_else_appears(tmp_path, content):
    file = tmp_path / "settings.yaml"
    file.write_text("old")
    atomic_write(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [file]


def test_on_a_full_disk_the_old_content_stays_and_the_error_says_what_to_do(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    file = tmp_path / "settings.yaml"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*settings\.yaml: No space left on device; free some space"
    ):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]
