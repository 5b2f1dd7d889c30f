"""Is the mixture of kernels alive? FMDConv in the paper's form, with its parts left out, and with remedies.

    python experiments/studies/mixture.py --train cifar10_train_10k.npz --test cifar10_test_2k.npz \
        --seeds 0 1 2 --epochs 24 --out mixture.csv

Centralised training of ResNet-8 by SGD (momentum 0.9, weight decay 5e-4, learning rate 0.1 with cosine, batches
of 64, crops and flips), τ going from 30 to its final value over the first third of the epochs. Each run ends
with accuracy, kernel entropy and kernel information on the test images (see `fedfmd.conv.AttentionRecord`), and
is written to the CSV file as soon as it is done; runs that the file holds already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import product
from math import isnan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedfmd.conv import DynamicConv2d, TemperatureSchedule, record_attention, set_temperature
from fedfmd.data import Dataset, load_dataset
from fedfmd.models import make_model
from fedfmd.seeds import derive_seed
from fedfmd.tracking.folder import environment
from fedfmd.training import LocalSGD, evaluate, learning_rate, train

ARCH = "resnet8"
SGD = LocalSGD(lr=0.1, batch_size=64)
Change = Callable[[DynamicConv2d], None]


def normalise_squeeze(layer: DynamicConv2d) -> None:
    """BatchNorm in the squeeze of the kernel attention, as the other squeeze has it."""
    attention = layer.attention["kernel"]
    attention.squeeze = nn.Sequential(attention.squeeze, nn.BatchNorm1d(attention.squeeze.out_features))


def spread_kernels(layer: DynamicConv2d) -> None:
    """√K times larger kernels: as far apart as their mean, not each of them, has Kaiming's variance."""
    with torch.no_grad():
        layer.bank.mul_(layer.kernels**0.5)


class SumNormalised(nn.Module):
    """π = z/Σ|z| of KernelWarehouse (Li & Yao, ICML 2024), over a normalised squeeze; starts at 1/K."""

    def __init__(self, squeeze: nn.Linear, head: nn.Linear) -> None:
        super().__init__()
        self.squeeze, self.norm, self.head = squeeze, nn.BatchNorm1d(squeeze.out_features), head
        nn.init.ones_(head.bias)

    def forward(self, pooled: Tensor, _temperature: Tensor) -> dict[str, Tensor]:
        z = self.head(F.relu(self.norm(self.squeeze(pooled))))
        return {"kernel": z / z.abs().sum(1, keepdim=True).clamp_min(1e-6)}


def sum_normalise(layer: DynamicConv2d) -> None:
    attention = layer.attention["kernel"]
    layer.attention["kernel"] = SumNormalised(attention.squeeze, attention.head)


@dataclass(frozen=True)
class Variant:
    """A network and how its attentions are trained."""

    conv: str = "fmdconv"
    kernels: int = 4
    final_temperature: float = 1.0
    annealed: bool = True
    changes: tuple[Change, ...] = ()
    kernel_attention: dict[str, float] = field(default_factory=dict)
    """What the parameters of squeeze and softmax do otherwise: weight_decay, and lr as a factor."""

    def build(self, classes: int) -> nn.Module:
        model = make_model(ARCH, self.conv, classes, kernels=self.kernels)
        for layer in model.modules():
            if isinstance(layer, DynamicConv2d):
                for change in self.changes:
                    change(layer)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        apart = {
            parameter
            for layer in model.modules()
            if isinstance(layer, DynamicConv2d)
            for parameter in layer.attention["kernel"].parameters()
        }
        common = [parameter for parameter in model.parameters() if parameter not in apart]
        options = {"weight_decay": SGD.weight_decay, "lr": 1.0} | self.kernel_attention
        return [
            {"params": common, "factor": 1.0},
            {"params": list(apart), "weight_decay": options["weight_decay"], "factor": options["lr"]},
        ]


FIXED = 34.0
VARIANTS = {
    "static": Variant("static"),
    "one kernel": Variant(kernels=1),
    "annealed": Variant(),
    "fixed temperature": Variant(annealed=False),
    "final temperature 0.2": Variant(final_temperature=0.2),
    "no weight decay": Variant(kernel_attention={"weight_decay": 0.0}),
    "10x learning rate": Variant(kernel_attention={"lr": 10.0}),
    "spread kernels": Variant(changes=(spread_kernels,)),
    "normalised squeeze": Variant(changes=(normalise_squeeze,)),
    "normalised squeeze, final temperature 0.2": Variant(changes=(normalise_squeeze,), final_temperature=0.2),
    "normalised squeeze, 10x learning rate": Variant(
        changes=(normalise_squeeze,), kernel_attention={"lr": 10.0, "weight_decay": 0.0}
    ),
    "sum-normalised": Variant(changes=(sum_normalise,)),
}


def run(variant: Variant, dataset: Dataset, epochs: int, seed: int) -> dict[str, float]:
    """Train one network; its figures on the test images."""
    torch.manual_seed(derive_seed(seed, "model"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    model = variant.build(dataset.classes)
    steps = -(-len(dataset.train) // SGD.batch_size)
    schedule = TemperatureSchedule(final=variant.final_temperature, steps=epochs // 3)
    if not variant.annealed:
        schedule = TemperatureSchedule(initial=FIXED, shape="constant")
    groups = variant.parameter_groups(model)
    optimiser = SGD.optimiser(groups)
    best, started = 0.0, time.perf_counter()
    for epoch in range(epochs):
        set_temperature(model, schedule.at(epoch))
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * learning_rate(SGD.lr, "cosine", epoch / epochs)
        trained = train(model, dataset.train, dataset, SGD, steps, generator, optimiser=optimiser)
        with record_attention(model) as record:
            tested = evaluate(model, dataset.test, dataset)
        best = max(best, tested.accuracy)
    return {
        "accuracy": tested.accuracy,
        "best_accuracy": best,
        "loss": tested.loss,
        "train_accuracy": trained.accuracy,
        "kernel_entropy": tested.kernel_entropy,
        "kernel_information": record.kernel_information(),
        "seconds": time.perf_counter() - started,
    }


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def print_table(rows: list[dict[str, str]]) -> None:
    """Mean ± standard deviation over the seeds."""
    figures = ("accuracy", "best_accuracy", "train_accuracy", "kernel_entropy", "kernel_information")
    groups = defaultdict(list)
    for row in rows:
        groups[row["variant"], row["epochs"]].append(row)
    table = Table("variant", "epochs", "seeds", *figures)
    for name, group in groups.items():
        cells = (spread([float(row[figure]) for row in group]) for figure in figures)
        table.add_row(*name, str(len(group)), *cells)
    Console(width=140).print(table)


def spread(values: list[float]) -> str:
    if any(map(isnan, values)):  # without a mixture
        return "–"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def planned(options: argparse.Namespace) -> Iterator[tuple[int, str]]:
    done = {(row["variant"], int(row["seed"]), int(row["epochs"])) for row in read(options.out)}
    for seed, name in product(options.seeds, options.variants):
        if (name, seed, options.epochs) not in done:
            yield seed, name


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    dataset = load_dataset("npz", train=options.train, test=options.test)
    machine = environment()["machine"]
    about = {
        "date": date.today().isoformat(),
        "machine": machine["processor"],
        "threads": options.threads,
        "torch": torch.__version__,
    }
    for seed, name in planned(options):
        figures = run(VARIANTS[name], dataset, options.epochs, seed)
        row = {"variant": name, "seed": seed, "epochs": options.epochs}
        row |= {figure: round(value, 5) for figure, value in figures.items()} | about
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
    print_table(read(options.out))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True, help="npz file with images and labels")
    parser.add_argument("--test", type=Path, required=True, help="npz file with images and labels")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("mixture.csv"), help="CSV file to extend")
    return parser.parse_args()


if __name__ == "__main__":
    main()
