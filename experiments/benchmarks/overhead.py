r"""Memory of a federated run, process by process, and what it costs beyond a bare training loop.

    python experiments/benchmarks/overhead.py --clients 1000 --per-round 100 --images 50 --rounds 20
    python experiments/benchmarks/overhead.py --arch resnet18 --norm batch --clients 20 --images 16 --rounds 12 \
        --test-images 10

and each again with `--engine flwr` and `--bare-memory kept`.

A real `fedfmd run` trains on random images, with all metrics on, on `--workers` nodes of one thread. In odd rounds
its processes are sampled every three seconds: resident memory, and PSS in which shared pages count once. Looking
takes time, so that the time is the median of even rounds. The bare loop trains the same batches with the same network
and augmentation in as many processes of one thread, and nothing else: no messages, averages, evaluation, rows or
files. It runs before and after, so that a change in the machine's speed shows. The first rounds, in which caches fill,
are left out.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median

import numpy as np
import psutil
import torch
import yaml
from common import about, family, table_of, write_rows
from rich.console import Console

from fedfmd.data import load_dataset
from fedfmd.memory import keep_freed
from fedfmd.models import MODELS, make_model
from fedfmd.training import LocalSGD, train

CLASSES = 10
KERNELS = 4
BATCH_SIZE = 16
LEARNING_RATE = 0.001  # labels are random: only the time counts
WARM_UP_ROUNDS = 3
SAMPLE_S = 3.0
BARE_REPEATS = 3
WORKING = {"inline": ("fedfmd",), "flwr": ("flwr-simulation", "ray::ClientAppActor")}
"""The programs that are server and workers; the others launch them, pass messages on or watch."""


@dataclass(frozen=True)
class Sample:
    """One look at one process."""

    round: int
    pid: int
    name: str
    rss: int
    pss: int


def write_images(path: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % CLASSES)


def experiment(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """The settings of the run: clients of equal size, whole fleets of one device."""
    return {
        "model": {"arch": options.arch, "conv": options.conv, "kernels": KERNELS, "norm": options.norm},
        "data": {"dataset": "npz", "train": str(folder / "train.npz"), "test": str(folder / "test.npz")},
        "partition": {"scheme": "iid", "clients": options.clients},
        "train": {"lr": LEARNING_RATE, "batch-size": BATCH_SIZE, "local-epochs": 1},
        "server": {"rounds": options.rounds, "clients-per-round": options.per_round, "checkpoint-every": 1},
        "fleet.devices": "jetson-nano:100%",
        "budget": {"policy": "wait", "deadline-s": 0},
        "threads": 1,
    }


def watch_run(options: argparse.Namespace, folder: Path) -> tuple[list[Sample], list[dict[str, str]]]:
    """Run fedfmd; its processes' memory over time, and its rounds."""
    file, out = folder / "overhead.yaml", folder / "run"
    file.write_text(yaml.safe_dump({"base": experiment(options, folder)}))
    command = [str(Path(sys.executable).with_name("fedfmd")), "run", str(file), "--out", str(out)]
    command += ["--engine", options.engine, "--workers", str(options.workers)]
    samples = []
    with (folder / "output.txt").open("w") as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while run.poll() is None:
            current = len(read_rows(out / "rounds.csv")) + 1
            if current % 2:
                samples += look(psutil.Process(run.pid), current)
            time.sleep(SAMPLE_S)
    if run.returncode:
        sys.exit((folder / "output.txt").read_text())
    return samples, read_rows(out / "rounds.csv")


def look(root: psutil.Process, current: int) -> list[Sample]:
    """Each process's memory in the current round."""
    samples = []
    for process in family(root):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            memory = process.memory_full_info()
            samples.append(Sample(current, process.pid, program(process), memory.rss, memory.pss))
    return samples


def program(process: psutil.Process) -> str:
    """The program's name, for Python's the script's."""
    words = [Path(word).name for word in process.cmdline()] or [process.name()]
    name = words[1] if len(words) > 1 and words[0].startswith("python") else words[0]
    return name.removesuffix(".run")  # a Ray actor's, while it works


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def bare_seconds(options: argparse.Namespace, folder: Path) -> float:
    """Seconds that a bare loop needs for the batches of one round."""
    clients = options.per_round or options.clients
    shares = [len(part) for part in np.array_split(range(clients), options.workers)]
    seconds = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for repeat in range(BARE_REPEATS + 1):  # the first one loads libraries and warms up
            jobs = [pool.submit(train_bare, options, folder, share if repeat else 1) for share in shares]
            seconds.append(max(job.result() for job in jobs))
    return median(seconds[1:])


def train_bare(options: argparse.Namespace, folder: Path, clients: int) -> float:
    torch.set_num_threads(1)
    if options.bare_memory == "kept":
        keep_freed()
    dataset = load_dataset("npz", train=folder / "train.npz", test=folder / "test.npz")
    model = make_model(options.arch, options.conv, CLASSES, kernels=KERNELS, norm=options.norm)
    shard = dataset.train.subset(torch.arange(options.images))
    sgd = LocalSGD(lr=LEARNING_RATE, batch_size=BATCH_SIZE)
    steps = -(-options.images // BATCH_SIZE)
    started = time.perf_counter()
    for client in range(clients):
        train(model, shard, dataset, sgd, steps, torch.Generator().manual_seed(client))
    return time.perf_counter() - started


def memory_rows(samples: list[Sample]) -> list[dict[str, object]]:
    """Peak resident memory of each process by round, for those that lived through the measured rounds."""
    peaks: dict[tuple[int, str], dict[int, int]] = defaultdict(dict)
    for sample in samples:
        rounds = peaks[sample.pid, sample.name]
        rounds[sample.round] = max(rounds.get(sample.round, 0), sample.rss)
    last = max(sample.round for sample in samples) - 1  # what follows it is the report
    rows = []
    for (_, name), rounds in peaks.items():
        measured = [peak for number, peak in rounds.items() if WARM_UP_ROUNDS < number <= last]
        if len(measured) > 1:
            spread = (max(measured) - min(measured)) / 2 / fmean(measured)
            rows.append(
                {
                    "process": name,
                    "MB after warm-up": round(measured[0] / 1e6),
                    "MB in the last": round(measured[-1] / 1e6),
                    "most": round(max(measured) / 1e6),
                    "± %": round(100 * spread, 1),
                }
            )
    return rows


def total_pss(samples: Iterable[Sample]) -> int:
    """Most memory of the processes together, shared pages counted once."""
    totals: dict[int, int] = defaultdict(int)
    moment, seen = 0, set[int]()
    for sample in samples:  # a process seen again starts the next look
        if sample.pid in seen:
            moment, seen = moment + 1, set()
        seen.add(sample.pid)
        totals[moment] += sample.pss
    return max(totals.values())


def main() -> None:
    options = parse_options()
    console = Console(width=120)
    with tempfile.TemporaryDirectory(prefix="fedfmd-overhead-") as scratch:
        folder = Path(scratch)
        write_images(folder / "train.npz", options.clients * options.images)
        write_images(folder / "test.npz", options.test_images)
        before = bare_seconds(options, folder)
        samples, rounds = watch_run(options, folder)
        after = bare_seconds(options, folder)
    wall = median(float(row["wall_s"]) for row in rounds[WARM_UP_ROUNDS:] if int(row["round"]) % 2 == 0)
    bare = (before + after) / 2
    clients = options.per_round or options.clients
    working = [sample for sample in samples if sample.name in WORKING[options.engine]]
    processes = memory_rows(samples)
    console.print(table_of(processes))
    result = about() | {
        **{name: getattr(options, name) for name in ("engine", "workers", "arch", "conv", "clients")},
        "clients_per_round": clients,
        "images_per_client": options.images,
        "test_images": options.test_images,
        "rounds": options.rounds,
        "round_s": round(wall, 3),
        "bare_memory": options.bare_memory,
        "bare_before_s": round(before, 3),
        "bare_after_s": round(after, 3),
        "beyond_bare": round(1 - bare / wall, 4),
        "ms_beyond_per_client": round(1000 * options.workers * (wall - bare) / clients, 1),
        "peak_pss_mb": round(total_pss(samples) / 1e6),
        "of_server_and_workers_mb": round(total_pss(working) / 1e6),
        "largest_drift_percent": max(row["± %"] for row in processes),
    }
    console.print(result)
    write_rows(options.out, [result], extend=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=("inline", "flwr"), default="inline")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arch", choices=MODELS, default="resnet8")
    parser.add_argument("--conv", default="fmdconv")
    parser.add_argument("--norm", choices=("batch", "group"), default="group")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--per-round", type=int, default=0, help="clients of a round; 0: all")
    parser.add_argument("--images", type=int, default=50, help="images of each client")
    parser.add_argument(
        "--test-images", type=int, default=200, help="the server evaluates on them each round"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--bare-memory",
        choices=("default", "kept"),
        default="default",
        help="kept: the bare loop keeps what it frees too, as fedfmd's processes do",
    )
    parser.add_argument("--out", type=Path, default=Path("overhead.csv"), help="CSV file to extend")
    return parser.parse_args()


if __name__ == "__main__":
    main()
