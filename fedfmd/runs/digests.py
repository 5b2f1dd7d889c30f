"""Digests of files, by which a checkpoint knows the files that belong to it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 20


@dataclass(frozen=True)
class Digest:
    """The size in bytes and the SHA-256 of a file, or of its first part."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path, size: int | None = None) -> Digest:
        """Read a file, or its first `size` bytes.

        Raises:
            OSError: it can't be read.
        """
        left = path.stat().st_size if size is None else size
        total, found = left, hashlib.sha256()
        with path.open("rb") as file:
            while left and (chunk := file.read(min(left, CHUNK))):
                found.update(chunk)
                left -= len(chunk)
        return cls(total - left, found.hexdigest())

    def check(self, path: Path, *, grows: bool = False) -> None:
        """Refuse a file that isn't the one of the digest; one that `grows` may have gone on after its end.

        Raises:
            ValueError: it is another one; the text names it.
            OSError: it can't be read.
        """
        if Digest.of(path, self.size if grows else None) != self:
            raise ValueError(f"{path} is not as the run wrote it")
