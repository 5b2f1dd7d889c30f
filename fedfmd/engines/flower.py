"""A ``flwr run`` of our own: private SuperLink, caller's folder, streamed log, true result, no leftovers.

Plain ``flwr run`` shares a background SuperLink between all runs of the machine, writes relative paths
below the folder where that was first started, and exits 0 when the ServerApp failed. Here the SuperLink
lives as long as the run, and whatever it leaves behind is adopted by this process and ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import tomli_w

from fedfmd.engines.cluster import Cluster
from fedfmd.errors import RunError, need
from fedfmd.flower_compat import (
    Json,
    connection_config,
    flower_environment,
    health_url,
    log_command,
    run_command,
    run_state,
    state_command,
    submitted_run,
    superlink_command,
)
from fedfmd.version import __version__

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
STARTUP_S = 60.0
POLL_S = 0.5
GRACE_S = 5.0
TAIL_LINES = 25


def run_flower(
    run_config: Mapping[str, bool | int | float | str],
    workers: int,
    folder: Path,
    on_line: Callable[[str], None],
    cluster: Cluster | None = None,
) -> None:
    """Run the apps through Flower's simulation on `workers` Ray actors, one CPU each: here, or on a cluster.

    Logs go line by line to `on_line`; the SuperLink's own log is kept as ``superlink.log`` in `folder`.

    Raises:
        SettingsError: Ray is missing.
        RunError: Flower can't start, or the ServerApp failed.
    """
    need("--engine flwr", "ray")
    before = descendants()
    _adopt_orphans()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fedfmd-flwr-") as scratch:
        home, app = Path(scratch) / "home", Path(scratch) / "fedfmd"
        port = free_port()
        environment = flower_environment(home, cluster.address if cluster else "")
        _write_connection(home, port)
        _stage_app(app, run_config)
        try:
            superlink = _start_superlink(port, folder / "superlink.log", environment)
            _wait_until_healthy(superlink, port, folder / "superlink.log")
            run_id = _submit(run_command(app, workers, cluster.gpus if cluster else None), environment)
            _stream(run_id, environment, on_line)
            _check_status(run_id, environment)
        finally:
            end_processes(before)


def _write_connection(home: Path, port: int) -> None:
    home.mkdir(parents=True)
    (home / "config.toml").write_text(tomli_w.dumps(connection_config(port)))


def _stage_app(app: Path, run_config: Mapping[str, bool | int | float | str]) -> None:
    """Write the app that Flower bundles: our two packages and a manifest, wherever they are installed."""
    import strategies

    for source in (Path(__file__).parents[1], Path(strategies.__path__[0])):
        shutil.copytree(source, app / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    manifest = {
        "project": {"name": "fedfmd", "version": __version__, "license": "Apache-2.0"},
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "fedfmd",
                    "fab-include": ["fedfmd/**/*.py", "fedfmd/**/*.yaml", "strategies/**/*.py"],
                    "components": {
                        "serverapp": "fedfmd.server_app:app",
                        "clientapp": "fedfmd.client_app:app",
                    },
                    "config": dict(run_config),
                }
            }
        },
    }
    (app / "pyproject.toml").write_text(tomli_w.dumps(manifest))


def _start_superlink(port: int, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    with log.open("wb") as stream:
        # A session of its own: Ctrl-C reaches us alone, and we end the rest in order.
        return subprocess.Popen(
            superlink_command(port),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_until_healthy(superlink: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + STARTUP_S
    while time.monotonic() < deadline:
        if superlink.poll() is not None:
            raise RunError(f"the SuperLink ended at once: {_tail(log.read_text(errors='replace'))}")
        try:
            with urllib.request.urlopen(health_url(port), timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise RunError(f"the SuperLink did not answer within {STARTUP_S:g} s; see {log}")


def _submit(command: list[str], environment: Mapping[str, str]) -> str:
    run_id, refusal = submitted_run(flwr_json(command, environment))
    if not run_id:
        raise RunError(f"flwr run was refused: {refusal}")
    return run_id


def _stream(run_id: str, environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
    """Pass the run's log on until the run has ended."""
    process = subprocess.Popen(
        log_command(run_id),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        on_line(line.rstrip("\n"))
    process.wait()


def _check_status(run_id: str, environment: Mapping[str, str]) -> None:
    """Raise unless the run finished; Flower's own exit status doesn't tell."""
    while not (state := run_state(flwr_json(state_command(run_id), environment))).ended:
        time.sleep(POLL_S)
    if not state.completed:
        raise RunError(f"Flower says {state.text}")


def flwr_json(command: list[str], environment: Mapping[str, str]) -> Json:
    """Return what a ``flwr`` command with ``--format json`` answers.

    Raises:
        RunError: it answers something else.
    """
    done = subprocess.run(
        command,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    try:
        answer: Json = json.loads(done.stdout)
        return answer
    except json.JSONDecodeError:
        raise RunError(f"{' '.join(command[:2])} failed: {_tail(done.stdout + done.stderr)}") from None


def _adopt_orphans() -> None:
    """Become the parent of descendants whose parent ends first (Linux), as Ray's helpers' do."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_processes(before: set[psutil.Process]) -> None:
    """Terminate, then kill, every process below this one that was not there before."""
    for act in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
        started = descendants() - before
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                act(process)
        psutil.wait_procs(started, timeout=GRACE_S)


def descendants() -> set[psutil.Process]:
    """All processes that this one, or one of them, started."""
    return set(psutil.Process().children(recursive=True))


def free_port() -> int:
    """Find a port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])
