"""Writing files so that a crash leaves finished content behind, and a full disk a clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def atomic_write(path: Path, content: bytes | str) -> None:
    """Give `path` this content (text as UTF-8) in one step: a crash leaves all of it, or the old content.

    Raises:
        OSError: it can't be written, on a full disk for instance; the text names the file and the fix.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with _explained(path):
        try:
            with temporary.open("wb") as file:
                _write(file, content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def append(path: Path, content: str) -> None:
    """Append text as UTF-8; after a crash or an OSError only a first part of it may stand there.

    Raises:
        OSError: as in `atomic_write`.
    """
    with _explained(path), path.open("ab") as file:
        _write(file, content)


def _write(file: BinaryIO, content: bytes | str) -> None:
    """Write all of `content` and wait until it is on the disk."""
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}; free some space or choose another run-dir, "
            "then resume: finished rounds are kept"
        ) from error
