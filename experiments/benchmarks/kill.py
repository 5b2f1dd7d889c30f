"""Runs that are killed at random times and go on, compared with runs that nothing happened to.

    python experiments/benchmarks/kill.py --kills 20 --out experiments/benchmarks/results/kill.csv

For each case a real `fedfmd run` is left alone once. Then the same command is started in a fresh folder, killed by
SIGKILL with all that it has started after a random share of that time, and given again, until it has come to its end;
and so on in further folders, until there were as many kills as asked for. At each end all files are compared with those
of the run that was left alone, but for the seconds that a machine needed, the random name of the run, and logs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import yaml
from common import write_rows
from rich.console import Console
from rich.table import Table

from fedfmd.runs import WALL_COLUMNS, latest_checkpoint

BASE = {
    "data.image-size": 8,
    "model.width": 0.25,
    "model.kernels": 2,
    "partition.clients": 4,
    "train.batch-size": 32,
    "train.local-epochs": 1,
    "fleet.devices": "pi-4",
}


@dataclass(frozen=True)
class Case:
    """What is run: changes of the base, a matrix, and further arguments of the command."""

    changes: dict[str, Any] = field(default_factory=dict)
    matrix: dict[str, list[Any]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


CASES = {
    "fedadam+kernels": Case({"server.strategy": "fedadam", "budget.policy": "kernels", "budget.kernels": 1}),
    "int8": Case({"transport.upload": "int8"}),
    "columns": Case({"server.csv-rows": 0}),
    "fedbuff": Case({"server.strategy": "fedbuff", "server.buffer": 2, "server.clients-per-round": 3}),
    "fedbn": Case({"server.strategy": "fedbn", "model.norm": "batch"}),
    "matrix": Case(matrix={"model.conv": ["static", "fmdconv"], "seed": [0, 1]}),
    "flwr": Case(arguments=("--engine", "flwr")),
}

NOT_COMPARED = frozenset({".lock", "log.txt", "superlink.log", "report.html"})
"""They tell the time, or the process."""


@dataclass(frozen=True)
class Trial:
    """A run that was killed so many times, after these seconds, and what differs at its end from one left alone."""

    case: str
    trial: int
    kills: int
    after_s: str
    differing: str


def write_experiment(case: Case, rounds: int, folder: Path) -> Path:
    path = folder / "experiment.yaml"
    content = {"base": BASE | {"server.rounds": rounds} | case.changes}
    path.write_text(yaml.safe_dump(content | ({"matrix": case.matrix} if case.matrix else {})))
    return path


def start(case: Case, file: Path, folder: Path) -> subprocess.Popen[bytes]:
    """Give the command; what it writes is below `folder`, the clients' states included."""
    folder.mkdir(exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "fedfmd",
        "run",
        str(file),
        "--out",
        str(folder / "run"),
        "--workers",
        "2",
    ]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, *case.arguments],
            env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache")},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        raise SystemExit(f"fedfmd run failed; see {folder / 'output.txt'}")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all below it at once, those with a session of their own too, as a power cut would."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=10)


def killed_until_it_ends(
    case: Case, file: Path, folder: Path, usual_s: float, most: int, chance: random.Random
) -> Iterator[float]:
    """Give the command again and again, until it comes to its end; the seconds after each of at most `most` kills."""
    kills = 0
    while True:
        process = start(case, file, folder)
        if kills == most:
            finish(process, folder)
            return
        after_s = chance.uniform(0, usual_s)
        try:
            process.wait(after_s)
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
            yield after_s
            continue
        finish(process, folder)
        return


def differences(folder: Path, other: Path) -> list[str]:
    """Names of what differs between the files of two folders with runs."""
    ours, theirs = (dict(_comparable(path)) for path in (folder, other))
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _comparable(folder: Path) -> Iterator[tuple[str, object]]:
    """Each file's name, and what is to be the same of it."""
    runs = [path.parent for path in folder.rglob("checkpoints")]
    for run in runs:
        for path in filter(Path.is_file, run.rglob("*")):
            if path.name not in NOT_COMPARED:
                yield str(path.relative_to(folder)), _content(path)
        last = latest_checkpoint(run / "checkpoints")
        states = folder / "cache" / "fedfmd" / "clients" / last.state["run"] if last else folder
        for path in states.glob("client-*/*") if last else ():
            yield f"{run.relative_to(folder)}: {path.relative_to(states)}", path.read_bytes()


def _content(path: Path) -> object:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {name: cell for name, cell in row.items() if name not in WALL_COLUMNS}
                for row in csv.DictReader(file)
            ]
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        return table.drop_columns([name for name in table.column_names if name in WALL_COLUMNS]).to_pylist()
    if (
        path.suffix == ".json" and path.parent.name == "checkpoints"
    ):  # with digests of rows that tell the time
        content = json.loads(path.read_text(encoding="utf-8"))
        state = {name: value for name, value in content["state"].items() if name != "run"}
        return content["round"], state
    return path.read_bytes()


def try_case(name: str, options: argparse.Namespace, scratch: Path, chance: random.Random) -> Iterator[Trial]:
    """Run a case, and kill it `options.kills` times in as many trials as it takes."""
    case, folder = CASES[name], scratch / name
    folder.mkdir()
    file = write_experiment(case, options.rounds, folder)
    began = time.monotonic()
    finish(start(case, file, folder / "alone"), folder / "alone")
    usual_s = time.monotonic() - began
    left, trial = options.kills, 0
    while left:
        trial += 1
        killed = folder / f"killed-{trial}"
        seconds = list(killed_until_it_ends(case, file, killed, usual_s, left, chance))
        left -= len(seconds)
        differing = differences(killed, folder / "alone")
        yield Trial(name, trial, len(seconds), " ".join(f"{s:.1f}" for s in seconds), " ".join(differing))


def table_of(trials: Sequence[Trial]) -> Table:
    table = Table("case", "runs", "kills", "identical", "differing")
    for name in dict.fromkeys(trial.case for trial in trials):
        own = [trial for trial in trials if trial.case == name]
        same = sum(not trial.differing for trial in own)
        kills = str(sum(trial.kills for trial in own))
        table.add_row(name, str(len(own)), kills, f"{same} of {len(own)}", " ".join(t.differing for t in own))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all runs left what they should."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="of each case")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--out", type=Path, help="CSV file with a row per run")
    options = parser.parse_args(arguments)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="fedfmd-kill-") as scratch:
        for name in options.cases:
            trials += try_case(name, options, Path(scratch), random.Random(f"{options.seed} {name}"))
            if options.out:
                write_rows(options.out, [asdict(trial) for trial in trials])
    Console().print(table_of(trials))
    return int(any(trial.differing for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
