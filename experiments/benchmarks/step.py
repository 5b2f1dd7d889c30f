"""What two choices bring to a training step on the CPU: memory that stays with the process, and fused SGD.

    python experiments/benchmarks/step.py --out experiments/benchmarks/results/step-cpu.csv

Each network is trained on random images on one thread, once as PyTorch does it by default and once with each choice
more, each in a process of its own; seconds are the median of the process's time for a step.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from common import about, table_of, write_rows
from rich.console import Console
from torch.nn.functional import cross_entropy

from fedfmd.memory import keep_freed
from fedfmd.models import MODELS, make_model

CLASSES = 10
WARM_UP_STEPS = 2
CHOICES = {"default": (False, False), "kept": (True, False), "kept, fused": (True, True)}


def main() -> None:
    options = parse_options()
    rows = [
        compare(arch, conv, batch, options.steps)
        for arch, conv, batch in product(options.arch, options.conv, options.batch)
    ]
    Console(width=120).print(table_of(rows))
    write_rows(options.out, [about() | row for row in rows])


def compare(arch: str, conv: str, batch: int, steps: int) -> dict[str, object]:
    """Seconds of a step with each choice, and their ratios to the first."""
    seconds = {}
    for name, (kept, fused) in CHOICES.items():
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds[name] = pool.submit(step_seconds, arch, conv, batch, steps, kept, fused).result()
    ratios = {f"{name}, ratio": round(s / seconds["default"], 3) for name, s in list(seconds.items())[1:]}
    return (
        {"arch": arch, "conv": conv, "batch": batch} | {k: round(s, 4) for k, s in seconds.items()} | ratios
    )


def step_seconds(arch: str, conv: str, batch: int, steps: int, kept: bool, fused: bool) -> float:
    torch.set_num_threads(1)
    if kept:
        keep_freed()
    model = make_model(arch, conv, CLASSES, norm="batch")
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
    images, labels = torch.randn(batch, 3, 32, 32), torch.arange(batch) % CLASSES
    seconds = [one_step(model, sgd, images, labels) for _ in range(WARM_UP_STEPS + steps)]
    return median(seconds[WARM_UP_STEPS:])


def one_step(
    model: torch.nn.Module, sgd: torch.optim.SGD, images: torch.Tensor, labels: torch.Tensor
) -> float:
    started = time.process_time()
    sgd.zero_grad()
    cross_entropy(model(images), labels).backward()
    sgd.step()
    return time.process_time() - started


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["resnet20", "resnet18"])
    parser.add_argument("--conv", nargs="+", default=["static", "fmdconv"])
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 128])
    parser.add_argument("--steps", type=int, default=8, help="that are measured")
    parser.add_argument("--out", type=Path, default=Path("step-cpu.csv"), help="CSV file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
