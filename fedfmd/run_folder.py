"""Opens the folder of a run: a new one, or that of the same run and the same code, which then goes on."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from fedfmd.build import build_dataset, own_sources
from fedfmd.errors import SettingsError
from fedfmd.runs import (
    CHECKPOINTS,
    Digest,
    RoundRow,
    RunFolder,
    code_digest,
    environment,
    kept_settings,
    latest_round,
    read_environment,
    round_line,
)
from fedfmd.settings import Settings, read_settings
from fedfmd.start import start_file
from fedfmd.tracking import tracked

logger = logging.getLogger("fedfmd")

DIGITS_DEPEND_ON = {
    "torch": ("versions", "torch"),
    "processor": ("machine", "processor"),
    "vector instructions": ("machine", "capability"),
    "compiled mixing": ("machine", "native_mixing"),
}
"""What last digits follow beside settings and code, and where environment.json has it."""

INPUTS = {
    "weights": "started from other weights",
    "devices": "had other devices",
    "trace": "had another trace",
}
"""What a run reads from files, by its name in environment.json, and what is said of one that read something else."""


@contextmanager
def open_run_folder(settings: Settings) -> Iterator[RunFolder]:
    """Open the folder ``run-dir``, or a new one below ``runs/`` if that is empty; log to it, and tell callbacks of it.

    No other process can open it meanwhile.

    Raises:
        SettingsError: as `run_path` and `tracked`, or the folder can't be made, or another process holds it.
    """
    with ExitStack() as stack:
        try:
            folder = RunFolder(run_path(settings), settings.clients_in_columns)
            stack.enter_context(folder.held())
            _check(settings, folder.path)  # again: a run may have begun and ended here meanwhile
        except ValueError as error:
            raise SettingsError(str(error)) from error
        earlier = read_environment(folder.path) if latest_round(folder.checkpoints) else {}
        images = build_dataset(settings).fingerprint
        if earlier.get("images", images) != images:
            raise SettingsError(
                f"run-dir = {folder.path} holds a run that had other images than data.dataset = "
                f"{settings.data.dataset} has now: name another folder, or delete this one to start again"
            )
        inputs = {name: digest for name, (_, digest) in _inputs(settings).items()}
        folder.write_environment(*own_sources(settings), images=images, **inputs)
        folder.write_settings(settings.kept())  # last: where it stands, the other does too
        stack.enter_context(_logging_to(folder))
        if changed := _changed(earlier, read_environment(folder.path)):
            logger.warning(
                "this machine is not as it was (%s): the last digits may not be those of a run in one go",
                changed,
            )
        stack.enter_context(tracked(settings, folder))
        yield folder


def run_path(settings: Settings) -> Path:
    """Return the run's folder, once it is clear that no other run is kept there.

    Raises:
        SettingsError: the folder holds a run that has other settings or code, or that is not to be resumed.
    """
    path = Path(settings.run_dir).expanduser() if settings.run_dir else _new_path(settings)
    _check(settings, path)
    return path


def _check(settings: Settings, path: Path) -> None:
    known, kept = path / "settings.yaml", kept_settings(path / CHECKPOINTS)
    told = [read_settings(known)] if known.exists() else []
    told += [Settings.from_mapping(kept, str(path / CHECKPOINTS))] if kept else []
    for earlier in told:
        _check_same(settings, earlier, path)
    if told:
        _check_origin(settings, path)


def _new_path(settings: Settings) -> Path:
    name = f"{settings.data.dataset}-{settings.model.arch}-{settings.model.conv}-{settings.digest()}"
    candidates = (Path("runs") / f"{name}{suffix}" for suffix in itertools.chain([""], _suffixes()))
    return next(path for path in candidates if settings.resume or not path.exists())


def _suffixes() -> Iterator[str]:
    return (f"-{number}" for number in itertools.count(2))


def _check_same(settings: Settings, earlier: Settings, path: Path) -> None:
    if not settings.resume:
        raise SettingsError(f"run-dir = {path} holds a run: set resume=true to go on, or name another folder")
    if settings.digest() != earlier.digest():
        now, before = settings.flat(), earlier.flat()
        changed = ", ".join(
            f"{key} was {before[key]!r}, is {value!r}"
            for key, value in now.items()
            if before[key] != value and key not in Settings.NEUTRAL
        )
        raise SettingsError(
            f"run-dir = {path} holds a run with other settings ({changed}): name another folder"
        )


def _check_origin(settings: Settings, path: Path) -> None:
    """Refuse another code, or another content of the run's files, than the folder's environment.json tells of."""
    own = own_sources(settings)
    try:
        earlier = read_environment(path)
    except ValueError as error:
        raise SettingsError(f"{error}: name another folder") from None
    if earlier.get("code") != code_digest(*own):
        raise SettingsError(
            f"run-dir = {path} holds a run of other code ({_code(earlier)}; now {_code(environment(*own))}): "
            "name another folder, or delete this one to start again"
        )
    for name, (file, digest) in _inputs(settings).items():
        if earlier.get(name, digest) != digest:
            raise SettingsError(
                f"run-dir = {path} holds a run that {INPUTS[name]} than {file} has now: name another folder, or delete "
                "this one to start again"
            )


def _changed(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Tell what differs between two environments that last digits depend on; "" where nothing is known to."""
    return ", ".join(
        f"{name} was {earlier[part][key]}, is {now[part].get(key)}"
        for name, (part, key) in DIGITS_DEPEND_ON.items()
        if key in earlier.get(part, {}) and earlier[part][key] != now[part].get(key)
    )


def _inputs(settings: Settings) -> dict[str, tuple[Path, str]]:
    """Return the files that a run works with beside its images, and their digests, by their names in `INPUTS`."""
    fleet = settings.fleet
    named = {"weights": start_file(settings), "devices": fleet.devices_file, "trace": fleet.trace}
    files = {name: Path(path).expanduser() for name, path in named.items() if path}
    try:
        return {name: (file, Digest.of(file).sha256[:12]) for name, file in files.items()}
    except OSError as error:
        raise SettingsError(f"cannot read {error.filename}: {error.strerror}") from None


def _code(facts: Mapping[str, Any]) -> str:
    """Return the code that an environment.json tells of."""
    version = facts.get("versions", {}).get("fedfmd", "unknown")
    commit, code = facts.get("commit"), facts.get("code", "unknown")
    return f"fedfmd {version}, {f'commit {commit[:12]}, ' if commit else ''}sources {code}"


@contextmanager
def _logging_to(folder: RunFolder) -> Iterator[None]:
    """Write the log to the folder, and to the console unless somebody shows it already.

    Why a run ends early is for the folder's log alone: the engine tells the console.
    """
    handlers: list[logging.Handler] = [folder.log_handler()]
    if not logger.handlers:
        handlers.append(_ConsoleHandler(sys.stdout))
    level = logger.level
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    for handler in handlers:
        handler.setLevel(logging.INFO)
        logger.addHandler(handler)
    try:
        yield
    except Exception as error:
        why = (logger.name, logging.ERROR, __file__, 0, "the run ends: %s", (error,), None)
        handlers[0].handle(logger.makeRecord(*why))
        raise
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.flush()
        handlers[0].close()
        logger.setLevel(level)


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Lines for a person, and one that programs can read (``flwr log``) after each round."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        row = getattr(record, "round_row", None)
        return f"{text}\n{round_line(row)}" if isinstance(row, RoundRow) else text
