"""Checkpoints: the arrays and the state that a run needs to go on as if it had never stopped.

`round-00010.safetensors` holds the global model, `round-00010.state.safetensors` further arrays of the
strategy, and `round-00010.json` the rest, written last: without it a checkpoint was never finished. It also holds
the digests of the other two, of the run's records up to this round, and of itself: what has changed since is not
taken for what the run wrote. Checkpoints of fedfmd 0.1 have no digests, and are taken as they are.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from fedfmd.errors import RunError, SettingsError
from fedfmd.runs.digests import Digest
from fedfmd.runs.files import atomic_write, save_tensors

FORMAT_VERSION = 1
"""Of the files of models; to be raised when an older fedfmd would misread a new file."""

HEADER = "checkpoint"

log = logging.getLogger(__name__)

Arrays = Mapping[str, torch.Tensor | np.ndarray]


@dataclass(frozen=True)
class Header:
    """What a model's file says of itself.

    Attributes:
        settings: those of its run, {} if it holds none.
        class_names: the classes in the order of the model's logits; () where the file doesn't tell, as those made
            before they had a version.
    """

    settings: dict[str, Any]
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Format:
    version: int


_parse_format = TypeAdapter(_Format).validate_json
_parse_header = TypeAdapter(Header).validate_json
_parse_values = TypeAdapter(dict[str, Any]).validate_json
_check_digests = TypeAdapter(dict[str, Digest]).validate_python


@dataclass(frozen=True)
class Checkpoint:
    """What `save_checkpoint` was given, arrays as tensors on the CPU, the rest as JSON keeps it."""

    round: int
    arrays: dict[str, torch.Tensor]
    state: dict[str, Any]
    settings: dict[str, Any]
    extra_arrays: dict[str, torch.Tensor] = field(default_factory=dict)


def save_checkpoint(
    folder: Path,
    round: int,
    arrays: Arrays,
    state: Mapping[str, Any],
    settings: Mapping[str, Any],
    extra_arrays: Arrays | None = None,
    keep: int = 2,
    class_names: Sequence[str] = (),
    records: Iterable[Path] = (),
) -> None:
    """Save the checkpoint of a round; of the folder's other ones only the newest `keep - 1` before it stay.

    Args:
        folder: a run's folder of checkpoints.
        round: the round that has just been finished.
        arrays: the global model by the names of its state dict, of any shape and dtype.
        state: what else a resume needs, as JSON knows it; NaN and infinities are kept.
        settings: what the run was started with, as JSON knows it; kept in the model's file, which can thus be
            used on its own.
        extra_arrays: arrays of the strategy, such as momentum.
        keep: number of checkpoints to keep, this one included.
        class_names: the classes in the order of the model's logits; kept in the model's file.
        records: files of the run that belong to the checkpoint as they are now; later they may only grow.

    Raises:
        OSError: the files can't be written, on a full disk for instance; earlier checkpoints stay usable.
    """
    mark = folder / f"round-{round:05d}.json"
    mark.unlink(missing_ok=True)
    _prune(folder, round - 1, max(1, keep - 1))  # first, so that the disk needs no room for one more
    model, further = mark.with_suffix(".safetensors"), mark.with_suffix(".state.safetensors")
    _save_arrays(model, arrays, settings, class_names)
    if extra_arrays:
        _save_arrays(further, extra_arrays, {})
    content = {
        "round": round,
        "extra_arrays": bool(extra_arrays),
        "state": dict(state),
        "files": _digests(folder, [model, further] if extra_arrays else [model]),
        "records": _digests(folder, records),
    }
    atomic_write(mark, json.dumps(content | {"sha256": _own_digest(content)}, indent=1))
    _prune(folder, round, keep)


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint that is as the run wrote it; None if there is none.

    One that is not is skipped with a warning that names the file.

    Raises:
        SettingsError: a newer version of fedfmd wrote it.
        RunError: there are checkpoints, and none can be used.
    """
    fault = ""
    for mark in _marks(folder):
        try:
            content = _verified(mark)
            arrays, header = _load(mark.with_suffix(".safetensors"))
            extra = _load(mark.with_suffix(".state.safetensors"))[0] if content["extra_arrays"] else {}
            return Checkpoint(content["round"], arrays, content["state"], header.settings, extra)
        except SettingsError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            fault = f"{mark} is broken: {error}"
            log.warning("%s; it is skipped", fault)
    if fault:
        raise RunError(
            f"no checkpoint can be used: {fault}. Put the file back as it was, or delete the run's folder to start "
            "again"
        )
    return None


def latest_round(folder: Path) -> int:
    """Return the round of the checkpoint that `latest_checkpoint` would load; 0 if there is none."""
    for mark in _marks(folder):
        try:
            return int(_verified(mark)["round"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 0


def latest_model(folder: Path) -> Path | None:
    """Return the file of the newest checkpoint's model, which is not read; None if there is none."""
    return next((mark.with_suffix(".safetensors") for mark in _marks(folder)), None)


def kept_settings(folder: Path) -> dict[str, Any] | None:
    """Read the settings in the newest checkpoint whose model can be read; None if there is none.

    Raises:
        SettingsError: a newer version of fedfmd wrote it.
    """
    for mark in _marks(folder):
        try:
            return read_header(mark.with_suffix(".safetensors")).settings
        except SettingsError:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def load_model(path: Path) -> tuple[dict[str, torch.Tensor], Header]:
    """Load the arrays of a checkpoint's .safetensors file, and what it says of itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not the one of the checkpoint that it lies in.
        SettingsError: a newer version of fedfmd wrote it.
    """
    mark = path.with_suffix(".json")
    if mark.exists() and (listed := _listed(mark, _read_mark(mark), "files").get(path.name)):
        listed.check(path)
    return _load(path)


def read_header(path: Path) -> Header:
    """Read what a checkpoint's .safetensors file says of itself, without its arrays.

    Raises:
        As `load_model`, but for changes that leave a readable file.
    """
    with _opened(path) as file:
        return _header(path, file.metadata())


def check_format(path: Path, version: int) -> None:
    """Refuse a file of a format that is newer than this code.

    Raises:
        SettingsError: it is.
    """
    if version > FORMAT_VERSION:
        raise SettingsError(
            f"{path} has format {version}, and this fedfmd reads formats up to {FORMAT_VERSION}: "
            "install the version of fedfmd that wrote it, or a newer one"
        )


def _load(path: Path) -> tuple[dict[str, torch.Tensor], Header]:
    with _opened(path) as file:
        header = _header(path, file.metadata())
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 - no mapping


def _marks(folder: Path) -> list[Path]:
    """Return the files that finish checkpoints, newest first."""
    return sorted(folder.glob("round-*.json"), key=_round, reverse=True)


def _verified(mark: Path) -> dict[str, Any]:
    """Read a checkpoint's JSON file, once it is clear that all its files are as they were.

    Raises:
        ValueError, KeyError, TypeError, OSError: a file is missing or has changed.
    """
    content = _read_mark(mark)
    if "sha256" in content and content.pop("sha256") != _own_digest(content):
        raise ValueError("it is not as the run wrote it")
    for name, listed in _listed(mark, content, "files").items():
        listed.check(mark.parent / name)
    for name, listed in _listed(mark, content, "records").items():
        listed.check(mark.parent / name, grows=True)
    return content


def _read_mark(mark: Path) -> dict[str, Any]:
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{mark} is damaged: it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"{mark} is damaged: it holds no values by name")
    return content


def _listed(mark: Path, content: Mapping[str, Any], part: str) -> dict[str, Digest]:
    """Return the digests that a checkpoint's JSON file lists in this part of it."""
    with _damaged(mark):
        return _check_digests(content.get(part, {}))


def _digests(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the digests of files, by their paths from the folder."""
    return {Path(os.path.relpath(path, folder)).as_posix(): asdict(Digest.of(path)) for path in paths}


def _own_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


@contextmanager
def _damaged(path: Path) -> Iterator[None]:
    """Turn what pydantic says of a file's content into one line."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "header"
        raise ValueError(f"{path} is damaged: {place}: {first['msg']}") from None


def _header(path: Path, metadata: Mapping[str, str] | None) -> Header:
    """Read the metadata; before version 1 there was no more than the settings."""
    texts = metadata or {}
    with _damaged(path):
        if HEADER not in texts:
            return Header(_parse_values(texts.get("settings", "{}")))
        check_format(path, _parse_format(texts[HEADER]).version)
        return _parse_header(texts[HEADER])


def _save_arrays(
    path: Path, arrays: Arrays, settings: Mapping[str, Any], class_names: Sequence[str] = ()
) -> None:
    """Write a .safetensors file.

    The header has a single text, because safetensors orders several at random: equal runs write equal files.
    """
    tensors = {name: torch.as_tensor(array) for name, array in arrays.items()}
    content = {"version": FORMAT_VERSION, "settings": dict(settings), "class_names": list(class_names)}
    save_tensors(path, tensors, {HEADER: json.dumps(content)})


def _prune(folder: Path, round: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `round`: later ones belong to a course given up."""
    rounds = sorted((r for r in map(_round, folder.glob("round-*.json")) if r <= round), reverse=True)
    files = [path for path in folder.iterdir() if _round(path) not in {-1, *rounds[:keep]}]
    for path in sorted(files, key=lambda path: path.suffix != ".json"):
        path.unlink()


def _round(path: Path) -> int:
    """Return the round that a checkpoint's file belongs to, -1 for any other file."""
    match = re.match(r"\.?round-(\d+)\.", path.name)
    return int(match[1]) if match else -1
