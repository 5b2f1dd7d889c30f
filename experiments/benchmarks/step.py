"""What three choices bring to a training step on the CPU: memory that stays with the process, fused SGD, compiled code.

    python experiments/benchmarks/step.py --out experiments/benchmarks/results/step-cpu.csv

Each network is trained on random images on one thread, as PyTorch does it by default and with each choice more, each in
a process of its own. The processes take turns: a repetition is some steps of each, and seconds are the median of the
processes' time for a step. `first_s` are the seconds of the first step of compiled code, compiling included.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from common import about, table_of, write_rows
from rich.console import Console

from fedfmd.memory import keep_freed
from fedfmd.models import MODELS, make_model
from fedfmd.training import LocalSGD, compute_gradients
from fedfmd.training.compiled import Compiled

CLASSES = 10
WARM_UP_STEPS = 2
CHOICES = {
    "default": (False, False, False),
    "kept": (True, False, False),
    "kept, fused": (True, True, False),
    "kept, fused, compiled": (True, True, True),
}


def main() -> None:
    options = parse_options()
    rows = [
        compare(options, arch, conv, kernels, batch)
        for arch, conv, batch in product(options.arch, options.conv, options.batch)
        for kernels in ([1] if conv == "static" else options.kernels)
    ]
    Console(width=140).print(table_of(rows))
    write_rows(options.out, [about() | row for row in rows])


def compare(options: argparse.Namespace, arch: str, conv: str, kernels: int, batch: int) -> dict[str, object]:
    """Seconds of a step with each choice, and their ratios to the first."""
    seconds: dict[str, list[float]] = {name: [] for name in CHOICES}
    context = get_context("spawn")
    with ExitStack() as stack:
        ask = {}
        for name, chosen in CHOICES.items():
            ask[name], other = context.Pipe()
            network = (arch, conv, kernels, options.width)
            process = context.Process(target=answer, args=(other, network, batch, *chosen), daemon=True)
            process.start()
            stack.callback(process.join)
            stack.callback(ask[name].send, 0)
        first_s = {name: ask[name].recv() for name in CHOICES}
        for name in list(CHOICES) * options.repeats:
            ask[name].send(options.steps)
            seconds[name] += ask[name].recv()
    medians = {name: median(taken) for name, taken in seconds.items()}
    return (
        {"arch": arch, "width": options.width, "conv": conv, "kernels": kernels, "batch": batch}
        | {name: round(s, 4) for name, s in medians.items()}
        | {f"{name}, ratio": round(s / medians["default"], 3) for name, s in list(medians.items())[1:]}
        | {"first_s": round(first_s["kept, fused, compiled"], 1)}
    )


def answer(
    connection: Connection,
    network: tuple[str, str, int, float],
    batch: int,
    kept: bool,
    fused: bool,
    compiled: bool,
) -> None:
    """Send the seconds of the first step, and then those of as many more as are asked for, until none are."""
    torch.set_num_threads(1)
    if kept:
        keep_freed()
    arch, conv, kernels, width = network
    model = make_model(arch, conv, CLASSES, kernels=kernels, width=width, norm="batch")
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % CLASSES
    compute = Compiled() if compiled else compute_gradients

    def step() -> None:
        sgd.zero_grad()
        compute(model, LocalSGD(lr=0.01, batch_size=batch), images, labels)
        sgd.step()

    started = time.perf_counter()
    step()
    connection.send(time.perf_counter() - started)
    for _ in range(WARM_UP_STEPS):
        step()
    while steps := connection.recv():
        connection.send([process_seconds(step) for _ in range(steps)])


def process_seconds(step: Callable[[], None]) -> float:
    started = time.process_time()
    step()
    return time.process_time() - started


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["resnet20", "resnet18"])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--conv", nargs="+", default=["static", "fmdconv"])
    parser.add_argument("--kernels", nargs="+", type=int, default=[4])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--steps", type=int, default=4, help="of each repetition")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("step-cpu.csv"), help="CSV file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
