"""Writing files so that a crash leaves finished content behind, and a full disk a clear error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EIO
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def atomic_write(path: Path, content: bytes | str) -> None:
    """Give `path` this content (text as UTF-8) in one step: a crash leaves all of it, or the old content.

    Raises:
        OSError: it can't be written, on a full disk for instance; the text names the file and the fix.
    """
    with _replacing(path) as temporary:
        temporary.write_bytes(_encoded(content))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a .safetensors file in one step, as `atomic_write` does.

    Contiguous tensors on the CPU are not copied, but for those whose memory an earlier name has: tied parameters.

    Raises:
        OSError: as in `atomic_write`.
    """
    on_cpu: dict[str, Tensor] = {}
    written: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        on_cpu[name] = plain.clone() if memory in written else plain
        written.add(memory)
    with _replacing(path) as temporary:
        try:
            save_file(on_cpu, temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(EIO, str(error)) from error


def append(path: Path, content: str) -> None:
    """Append text as UTF-8; after a crash or an OSError only a first part of it may stand there.

    Raises:
        OSError: as in `atomic_write`.
    """
    with _explained(path), path.open("ab") as file:
        file.write(_encoded(content))
        file.flush()
        os.fsync(file.fileno())


def _encoded(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write; it takes that one's place once all of it is on the disk."""
    temporary = path.with_name(f".{path.name}.partial")
    with _explained(path):
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}; free some space or choose another run-dir, "
            "then resume: finished rounds are kept"
        ) from error
