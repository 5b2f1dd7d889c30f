r"""Client updates per second, memory and start of fedfmd beside other simulators that do the same work.

    python experiments/benchmarks/simulator.py --pfl /path/to/pfl/bin/python --out simulator.csv
    python experiments/benchmarks/simulator.py --models all --cohorts 20 100 --repeats 3 …   # everything: hours

Every system trains the same network on shards, batches and steps of the same size, with the same optimiser, on
`--workers` processes (threads with fedfmd in process) of one core. All clients of a model take part in each round:

    bare          a plain PyTorch loop: a fresh network for each client, and nothing but training
    bare-kept     the same with one network, in processes that keep the memory that they free: the fastest loop there is
    flower        plain Flower: FedAvg as in its tutorial, on Ray, a message per client; nothing is tested
    fedfmd        `fedfmd run` in process: all rows, and a test and a checkpoint in each round
    fedfmd-quiet  the same with test and checkpoint in the last round only, which is left out
    fedfmd-ray    `fedfmd run --engine flwr`, as fedfmd
    pfl           pfl-research without metrics, by torchrun (`--pfl`: the Python that has it)
    pfl-metrics   pfl-research with its metrics: each client is tested before and after training

The systems take turns, in another order in each repeat. Right before and after each of them the bare loop that keeps
its network does a round, in processes that wait beside it, and what a system needs beyond a bare loop is told relative
to these two: so the machine's speed, which changes within minutes, cancels out. A round lasts from the end of the one
before to its own end, tests and files included; the first one is left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise, product
from pathlib import Path
from statistics import median, quantiles

import psutil
import yaml
from common import about, table_of, write_rows
from rich.console import Console

SIDES = Path(__file__).with_name("simulators")
sys.path.insert(0, str(SIDES))

from work import SGD, Work, times  # noqa: E402

import fedfmd  # noqa: E402

WARM_UP_ROUNDS = 1
SAMPLE_S = 0.5
TEST_IMAGES = 200
LIMIT_S = 1800.0
CONVS = {"static": ("static", 1), "fmdconv1": ("fmdconv", 1), "fmdconv4": ("fmdconv", 4)}
MODELS = {"cnn": Work("femnist_cnn:network", "static", 1, 28, images=50, batch=10)} | {
    f"{arch}-{name}": Work(arch, conv, kernels, 32, images=images, batch=10)
    for arch, images in (("resnet8", 50), ("resnet18", 10))
    for name, (conv, kernels) in CONVS.items()
}
MODELS |= {
    name: replace(MODELS[name], memory_format="channels-last") for name in ("cnn", "resnet8-static")
}  # pooling and small static networks are faster so, the others slower
SYSTEMS = ("bare", "bare-kept", "flower", "fedfmd", "fedfmd-quiet", "fedfmd-ray", "pfl", "pfl-metrics")


@dataclass(frozen=True)
class Run:
    """One start of a system.

    Attributes:
        first_s: seconds from the command to the end of the first round.
        rounds_s: seconds of the later rounds.
        bare_s: seconds of a round of the bare loop around it, the mean of before and after.
        peak: bytes, the most memory of all processes.
    """

    first_s: float
    rounds_s: tuple[float, ...]
    bare_s: float
    peak: int

    @property
    def round_s(self) -> float:
        return median(self.rounds_s)


@dataclass(frozen=True)
class Result:
    """What a system did in all repeats; `spread` is half the distance of the quartiles, as a share of the median."""

    work: Work
    runs: tuple[Run, ...]

    @property
    def rounds_s(self) -> list[float]:
        return [seconds for run in self.runs for seconds in run.rounds_s]

    @property
    def round_s(self) -> float:
        return median(self.rounds_s)

    @property
    def spread(self) -> float:
        low, _, high = quantiles(self.rounds_s, n=4) if len(self.rounds_s) > 1 else (self.round_s,) * 3
        return (high - low) / 2 / self.round_s

    @property
    def of_bare(self) -> float:
        """Speed relative to the bare loop around it."""
        return median(run.bare_s / run.round_s for run in self.runs)

    @property
    def beyond_bare_s(self) -> float:
        """Seconds of a worker for a client that the bare loop around it doesn't need."""
        beyond = median(run.round_s - run.bare_s for run in self.runs)
        return self.work.workers * beyond / self.work.clients

    @property
    def updates_per_s(self) -> float:
        return self.work.clients / self.round_s

    @property
    def client_s(self) -> float:
        """Seconds of a worker for a client."""
        return self.work.workers * self.round_s / self.work.clients

    @property
    def first_update_s(self) -> float:
        """Seconds from the command to the first client's update: those of the first round, less the other clients'."""
        return median(run.first_s for run in self.runs) - self.round_s + self.client_s

    @property
    def peak_mb(self) -> float:
        return median(run.peak for run in self.runs) / 1e6


def command(system: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """What starts a system on the work in the folder, and leaves the times there."""
    given = [str(folder / "work.json"), str(folder / "times.txt")]
    match system:
        case "bare" | "bare-kept":
            return [
                sys.executable,
                str(SIDES / "bare.py"),
                *given,
                "kept" if system == "bare-kept" else "fresh",
            ]
        case "flower":
            return [sys.executable, str(SIDES / "plain_flower.py"), *given]
        case "pfl" | "pfl-metrics":
            torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={options.workers}"]
            side = [str(SIDES / "pfl_research.py"), *given, *(["metrics"] if system == "pfl-metrics" else [])]
            return [options.pfl, *torchrun, *side]
        case _:
            fedfmd = [str(Path(sys.executable).with_name("fedfmd")), "run", str(folder / f"{system}.yaml")]
            engine = "flwr" if system == "fedfmd-ray" else "inline"
            return [
                *fedfmd,
                "--engine",
                engine,
                "--workers",
                str(options.workers),
                "--out",
                str(folder / "run"),
            ]


def experiment(work: Work, folder: Path, quiet: bool) -> dict[str, object]:
    """The same work as settings of fedfmd."""
    rounds = work.rounds + quiet  # one more, which tests and is left out
    every = rounds if quiet else 1
    return {
        "model": {"arch": work.arch, "conv": work.conv, "kernels": work.kernels},
        "data": {"dataset": "npz", "train": work.data, "test": str(folder / "test.npz"), "augment": "none"},
        "partition": {"scheme": "iid", "clients": work.clients},
        "train": {
            "lr": SGD.keywords["lr"],
            "momentum": SGD.keywords["momentum"],
            "nesterov": SGD.keywords["nesterov"],
            "weight-decay": SGD.keywords["weight_decay"],
            "batch-size": work.batch,
            "memory-format": work.memory_format,
            "local-epochs": 1,
            "schedule": "constant",
        },
        "server": {"rounds": rounds, "evaluate-every": every, "checkpoint-every": every},
        "fleet.devices": "jetson-nano:100%",
        "threads": 1,
    }


def prepare(work: Work, folder: Path) -> Work:
    """Write what the systems read; returns the work with its data."""
    work = replace(work, data=str(work.make_data(folder / "train.npz", work.clients)))
    replace(work, images=TEST_IMAGES).make_data(folder / "test.npz", clients=1)
    work.write(folder / "work.json")
    for system in ("fedfmd", "fedfmd-quiet", "fedfmd-ray"):
        settings = experiment(work, folder, quiet=system == "fedfmd-quiet")
        (folder / f"{system}.yaml").write_text(yaml.safe_dump({"base": settings}))
    return work


def surroundings() -> dict[str, str]:
    """The environment of all systems: a thread for each process, and the way to the networks."""
    ours = str(Path(fedfmd.__file__).parents[1])  # pfl-research may have an environment without fedfmd
    paths = os.pathsep.join(filter(None, (str(SIDES), ours, os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "FLWR_TELEMETRY_ENABLED": "0"}


@contextmanager
def bare_loop(folder: Path) -> Iterator[Callable[[], float]]:
    """A bare loop that waits beside the systems; returns what has it do a round, and the seconds of that."""
    command = [sys.executable, str(SIDES / "bare.py"), str(folder / "work.json"), "-", "kept"]
    with subprocess.Popen(
        command, env=surroundings(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        given, told = process.stdin, process.stdout

        def do_round() -> float:
            print(file=given, flush=True)
            return float(told.readline())

        do_round()  # warms up
        yield do_round


def measure(
    system: str, work: Work, options: argparse.Namespace, folder: Path, bare_round: Callable[[], float]
) -> Run:
    """Start a system, watch its memory, and read when its rounds were over."""
    (folder / "times.txt").unlink(missing_ok=True)
    shutil.rmtree(folder / "run", ignore_errors=True)
    before = bare_round()
    with (folder / "output.txt").open("w") as output:
        started = time.time()
        process = psutil.Popen(
            command(system, options, folder), env=surroundings(), stdout=output, stderr=subprocess.STDOUT
        )
        peak = watch(process, started + LIMIT_S)
    bare_s = (before + bare_round()) / 2
    over = list(times(folder / "times.txt")) or logged(folder / "run" / "log.txt")
    if process.returncode or len(over) != work.rounds + (system == "fedfmd-quiet"):
        sys.exit(f"{system} failed:\n{(folder / 'output.txt').read_text()[-5000:]}")
    rounds = [end - start for start, end in pairwise(over[: work.rounds])]
    return Run(over[0] - started, tuple(rounds[WARM_UP_ROUNDS - 1 :]), bare_s, peak)


def watch(process: psutil.Popen, deadline: float) -> int:
    """The most resident memory of a process and all below it, until it ends; pages that they share count for each."""
    peak = 0
    while process.poll() is None:
        memory = 0
        with suppress(psutil.NoSuchProcess):
            for part in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    memory += part.memory_info().rss
        peak = max(peak, memory)
        if time.time() > deadline:
            for part in [*process.children(recursive=True), process]:
                with suppress(psutil.NoSuchProcess):
                    part.kill()
        time.sleep(SAMPLE_S)
    return peak


def logged(log: Path) -> list[float]:
    """When fedfmd's rounds were over, by its log, in seconds since 1970."""
    lines = (line.split(" ", 3) for line in log.read_text().splitlines()) if log.exists() else ()
    return [
        datetime.strptime(f"{day} {hour}", "%Y-%m-%d %H:%M:%S,%f").timestamp()
        for day, hour, _, text in (line for line in lines if len(line) == 4)
        if text.startswith("round ")
    ]


def rows(results: dict[tuple[str, int, str], Result]) -> Iterable[dict[str, object]]:
    """A row for each model, cohort and system."""
    for (model, cohort, system), result in results.items():
        yield {
            "model": model,
            "model_mb": round(sum(4 * p.numel() for p in result.work.network().parameters()) / 1e6, 1),
            "clients": cohort,
            "images": result.work.images,
            "batch": result.work.batch,
            "workers": result.work.workers,
            "system": system,
            "repeats": len(result.runs),
            "rounds": len(result.rounds_s),
            "updates_per_s": round(result.updates_per_s, 2),
            "spread_percent": round(100 * result.spread, 1),
            "percent_of_bare": round(100 * result.of_bare, 1),
            "ms_beyond_bare": round(1000 * result.beyond_bare_s, 1),
            "peak_rss_mb": round(result.peak_mb),
            "first_update_s": round(result.first_update_s, 1),
        }


def main() -> None:
    options = parse_options()
    console = Console(width=200)
    systems = [system for system in options.systems if options.pfl or not system.startswith("pfl")]
    if left_out := [system for system in options.systems if system not in systems]:
        console.print(f"without {' and '.join(left_out)}: --pfl names the Python that has pfl-research")
    runs: dict[tuple[str, int, str], list[Run]] = {}
    works: dict[tuple[str, int], Work] = {}
    for repeat in range(options.repeats):
        turn = repeat % len(systems)
        for model, cohort in product(options.models, options.cohorts):
            work = replace(MODELS[model], clients=cohort, rounds=options.rounds, workers=options.workers)
            with tempfile.TemporaryDirectory(prefix="fedfmd-simulator-") as scratch:
                folder = Path(scratch)
                work = works[model, cohort] = prepare(work, folder)
                with bare_loop(folder) as bare_round:
                    for system in [*systems[turn:], *systems[:turn]]:
                        run = measure(system, work, options, folder, bare_round)
                        runs.setdefault((model, cohort, system), []).append(run)
                        told = f"{run.round_s:.2f} s a round, the bare loop {run.bare_s:.2f} s"
                        console.print(f"{repeat + 1}: {model}, {cohort} clients, {system}: {told}")
    order = product(options.models, options.cohorts, systems)
    measured = list(rows({key: Result(works[key[:2]], tuple(runs[key])) for key in order}))
    console.print(table_of(measured))
    write_rows(options.out, [about() | row for row in measured], extend=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["cnn", "resnet8-fmdconv4", "resnet18-static"])
    parser.add_argument("--cohorts", nargs="+", type=int, default=[20], help="clients of a round")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS[:-1]))
    parser.add_argument(
        "--pfl", default="", metavar="PYTHON", help="Python that has pfl-research 0.6 and PyTorch"
    )
    parser.add_argument(
        "--rounds", type=int, default=4, help="of each start, the first of which doesn't count"
    )
    parser.add_argument("--repeats", type=int, default=2, help="starts of each system")
    parser.add_argument("--workers", type=int, default=2, help="cores")
    parser.add_argument("--quick", action="store_true", help="only to see that all of it works")
    parser.add_argument("--out", type=Path, default=Path("simulator.csv"), help="CSV file to extend")
    options = parser.parse_args()
    if options.quick:
        options.models, options.cohorts, options.rounds, options.repeats = ["cnn"], [6], 3, 1
    if "all" in options.models:
        options.models = list(MODELS)
    if unknown := [model for model in options.models if model not in MODELS]:
        parser.error(f"--models {' '.join(unknown)}: choose from all, {', '.join(MODELS)}")
    if options.rounds <= WARM_UP_ROUNDS or options.repeats < 1:
        parser.error(f"--rounds must be more than {WARM_UP_ROUNDS}, --repeats at least 1")
    return options


if __name__ == "__main__":
    main()
