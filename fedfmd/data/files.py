"""Reading npz files that may be damaged, and writing files that never are."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np


def read_npz(path: Path, *names: str) -> tuple[np.ndarray, ...]:
    """Read the named arrays of an npz file; pickled objects are never loaded.

    Raises:
        ValueError: the file is missing, damaged, not an npz file, or lacks one of the arrays.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise TypeError("a single array, not an archive of named arrays")
        with archive:
            arrays = {name: archive[name] for name in archive.files if name in names}
            held = ", ".join(archive.files) or "nothing"
    except Exception as error:  # a damaged zip raises BadZipFile, zlib.error, EOFError, ValueError, ...
        raise ValueError(
            f"{path}: not a readable npz file ({error}); write it anew with numpy.savez"
        ) from None
    for name in names:
        if name not in arrays:
            raise ValueError(f"{path}: has no array '{name}' (it holds {held}); it needs {', '.join(names)}")
    return tuple(arrays[name] for name in names)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error.

    Readers see the old file or the whole new one, never a part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid4().hex}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
