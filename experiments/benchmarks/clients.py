"""Rounds of a few clients out of very many: whether they cost more than out of fewer, and what a run of many takes.

    python experiments/benchmarks/clients.py --out experiments/benchmarks/results/clients.csv

For each number of clients a real `fedfmd run` trains ResNet-8 FMDConv (K = 1) on random images, as many for every
client, on a fleet whose clients come and go by a trace. Set-up is what passes from the start of the process to its
first round, with an empty cache; rounds are told by the times in log.txt, from one to the next, without the first
ones, in which caches fill; `round_cpu_s` is the processor's time, which other work on the machine changes less. Memory
is looked at twice a second. `end_s` is from the last round to the process's end, in which it writes the run's page,
`report_s` what `fedfmd report` takes after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import fmean, median

import numpy as np
import psutil
import yaml
from common import about, family, pss_of, write_rows
from rich.console import Console
from rich.table import Table

CLASSES = 10
DAY_S = 86_400
SHORTEST_S, LONGEST_S = 4 * 3600, 16 * 3600
"""How long a client is there each day."""

TEST_IMAGES = 500
WARM_UP_ROUNDS = 2
LOOK_S = 0.5
FEDFMD = str(Path(sys.executable).with_name("fedfmd"))


@dataclass(frozen=True)
class Result:
    """What a run took: seconds, MB of memory in all its processes (what they share counts once), and KB of files."""

    clients: int
    clients_per_round: int
    images_per_client: int
    rounds: int
    workers: int
    setup_s: float
    round_s: float
    round_cpu_s: float
    first_ten_s: float
    last_ten_s: float
    peak_mb: int
    third_round_mb: int
    last_round_mb: int
    clients_form: str
    clients_kb: int
    page_kb: int
    folder_kb: int
    end_s: float
    report_s: float


def write_inputs(folder: Path, clients: int, images: int) -> None:
    """Write random images, which cost what others do, and a trace in which a client is there once a day."""
    rng = np.random.default_rng(0)
    for name, count in ("train", clients * images), ("test", TEST_IMAGES):
        pixels = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=pixels, labels=np.arange(count) % CLASSES)
    lines = ["client,start_s,end_s"]
    for client in range(clients):
        start = int(rng.integers(DAY_S))
        end = start + int(rng.integers(SHORTEST_S, LONGEST_S))
        windows = [(start, end)] if end <= DAY_S else [(0, end - DAY_S), (start, DAY_S)]
        lines += [f"{client},{opens},{closes}" for opens, closes in windows]
    (folder / "trace.csv").write_text("\n".join(lines) + "\n")


def experiment(options: argparse.Namespace, folder: Path, clients: int) -> dict[str, object]:
    return {
        "model": {"arch": "resnet8", "conv": "fmdconv", "kernels": 1},
        "data": {"dataset": "npz", "train": str(folder / "train.npz"), "test": str(folder / "test.npz")},
        "partition": {"scheme": "iid", "clients": clients},
        "train": {"lr": 0.001, "batch-size": options.images, "local-epochs": 1},
        "server": {
            "rounds": options.rounds,
            "clients-per-round": options.per_round,
            "csv-rows": options.csv_rows,
        },
        "fleet.trace": str(folder / "trace.csv"),
        "threads": 1,
    }


def measure(options: argparse.Namespace, folder: Path, clients: int) -> Result:
    """Make the run, look at its memory, and read its log and its files."""
    write_inputs(folder, clients, options.images)
    file, out = folder / "clients.yaml", folder / "run"
    file.write_text(yaml.safe_dump({"base": experiment(options, folder, clients)}))
    ours = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    began = time.time()
    memory, processor = watch(
        [FEDFMD, "run", str(file), "--out", str(out), "--workers", str(options.workers)], ours, out
    )
    ended = time.time()
    first, ends, last = moments(out / "log.txt")
    gaps = np.diff([first, *ends]).tolist()
    started = time.perf_counter()
    command = [FEDFMD, "report", str(out), "--out", str(folder / "report")]
    subprocess.run(command, env=ours, check=True, capture_output=True)
    report_s = time.perf_counter() - started
    table = next(path for path in (out / "clients.csv", out / "clients.parquet") if path.exists())
    return Result(
        clients=clients,
        clients_per_round=options.per_round,
        images_per_client=options.images,
        rounds=options.rounds,
        workers=options.workers,
        setup_s=round(first - began, 1),
        round_s=round(median(gaps[WARM_UP_ROUNDS:]), 3),
        round_cpu_s=round((processor[options.rounds] - processor[1]) / (options.rounds - 1), 3),
        first_ten_s=round(fmean(gaps[WARM_UP_ROUNDS:][:10]), 3),
        last_ten_s=round(fmean(gaps[WARM_UP_ROUNDS:][-10:]), 3),
        peak_mb=round(max(memory.values()) / 1e6),
        third_round_mb=round(memory[min(3, options.rounds)] / 1e6),
        last_round_mb=round(memory[options.rounds] / 1e6),
        clients_form=table.suffix[1:],
        clients_kb=kilobytes(table),
        page_kb=kilobytes(out / "report.html"),
        folder_kb=kilobytes(out),
        end_s=round(ended - last, 1),
        report_s=round(report_s, 1),
    )


def watch(
    command: list[str], ours: Mapping[str, str], out: Path
) -> tuple[dict[int, float], dict[int, float]]:
    """Run a command to its end; by round, returns its most bytes, and the processor's seconds at its start."""
    memory: dict[int, float] = {}
    processor: dict[int, float] = {}
    with (out.parent / "output.txt").open("w") as output:
        run = subprocess.Popen(command, env=ours, stdout=output, stderr=subprocess.STDOUT)
        process = psutil.Process(run.pid)
        while run.poll() is None:
            rows = out / "rounds.csv"
            current = max(1, rows.read_bytes().count(b"\n")) if rows.exists() else 0
            with suppress(psutil.NoSuchProcess):
                all_of_it = family(process)
                memory[current] = max(memory.get(current, 0), pss_of(all_of_it))
                processor.setdefault(current, sum(sum(part.cpu_times()[:2]) for part in all_of_it))
            time.sleep(LOOK_S)
    if run.returncode:
        sys.exit((out.parent / "output.txt").read_text())
    return filled(memory), filled(processor)


def filled(looks: Mapping[int, float]) -> dict[int, float]:
    """Give rounds in which nobody looked what was seen before them."""
    seen, known = dict[int, float](), 0.0
    for current in range(max(looks) + 1):
        known = seen[current] = looks.get(current, known)
    return seen


def moments(log: Path) -> tuple[float, list[float], float]:
    """Return when the first round began, when each round ended, and when the last line was written."""
    lines = log.read_text(encoding="utf-8").splitlines()
    times = [datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp() for line in lines]
    rounds = [when for line, when in zip(lines, times, strict=True) if " INFO round " in line]
    before = max(
        when
        for line, when in zip(lines, times, strict=True)
        if when <= rounds[0] and " INFO round " not in line
    )
    return before, rounds, times[-1]


def kilobytes(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return round(sum(file.stat().st_size for file in files) / 1000)


def main() -> None:
    options = parse_options()
    results = []
    for clients in options.clients:
        with tempfile.TemporaryDirectory(prefix="fedfmd-clients-") as scratch:
            results.append(asdict(measure(options, Path(scratch), clients)))
    table = Table("", *(f"{result['clients']:,} clients" for result in results))
    for name in list(results[0])[1:]:
        table.add_row(name, *(str(result[name]) for result in results))
    Console(width=120).print(table)
    write_rows(options.out, [about() | result for result in results], extend=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clients", type=int, nargs="+", default=[1000, 10_000])
    parser.add_argument(
        "--per-round", type=int, default=200, help="clients of a round; 0: all that are there"
    )
    parser.add_argument("--images", type=int, default=5, help="images of each client, which are one step")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--csv-rows", type=int, default=100_000, help="server.csv-rows; 0: in columns")
    parser.add_argument("--out", type=Path, default=Path("clients.csv"), help="CSV file to extend")
    return parser.parse_args()


if __name__ == "__main__":
    main()
