"""Is the mixture of kernels worth its bytes? FMDConv from a neutral start, with its parts left out, and with remedies.

    python experiments/studies/mixture.py --train cifar10_train.npz --test cifar10_test.npz --out mixture.csv

Centralised training of ResNet-8, width 0.5, by SGD (momentum 0.9, weight decay 5e-4, learning rate 0.1 with cosine,
batches of 64, crops and flips), τ going from 30 to its final value over the first third of the epochs. `--validation`
images are held out of the training images: remedies are chosen by them, and the test images only tell what the
chosen ones are worth. Each run ends with accuracies, kernel entropy and kernel information (see
`fedfmd.conv.AttentionRecord`), and is written to the CSV file as soon as it is done; runs that the file holds
already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from datetime import date
from functools import lru_cache
from itertools import product
from math import isnan
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from fedfmd.conv import DynamicConv2d, TemperatureSchedule, record_attention, set_temperature
from fedfmd.conv.attention import SharedAttention
from fedfmd.data import Dataset, ImageSet, load_dataset
from fedfmd.memory import keep_freed
from fedfmd.models import make_model
from fedfmd.runs.folder import environment
from fedfmd.seeds import derive_seed
from fedfmd.training import LocalSGD, evaluate, learning_rate, train

ARCH, WIDTH = "resnet8", 0.5
SGD = LocalSGD(lr=0.1, batch_size=64)
Change = Callable[[DynamicConv2d, int], None]
"""Remakes a layer, whose number in the network is given."""


class Branch(nn.Module):
    """A kernel attention on top of the published squeeze and head."""

    def __init__(self, published: nn.Module) -> None:
        super().__init__()
        self.squeeze, self.head = published.squeeze, published.head

    def logits(self, pooled: Tensor) -> Tensor:
        return self.head(F.relu(self.squeeze(pooled)))

    def forward(self, pooled: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        return {"kernel": self.weigh(F.softmax(self.logits(pooled) / temperature, dim=1))}

    def weigh(self, pi: Tensor) -> Tensor:
        return pi


class Fading(Branch):
    """One kernel per layer at first, which fades into the mixture (KernelWarehouse, ICML 2024)."""

    def __init__(self, published: nn.Module, kernel: int) -> None:
        super().__init__(published)
        one_hot = F.one_hot(torch.tensor(kernel % published.head.out_features), published.head.out_features)
        self.register_buffer("start", one_hot.float())
        self.register_buffer("share", torch.tensor(1.0))

    def weigh(self, pi: Tensor) -> Tensor:
        return self.share * self.start + (1 - self.share) * pi


class SumNormalised(Branch):
    """π = z/Σ|z|, which may be negative (KernelWarehouse), over a normalised squeeze; starts at 1/K."""

    def __init__(self, published: nn.Module) -> None:
        super().__init__(published)
        self.squeeze = nn.Sequential(self.squeeze, nn.BatchNorm1d(self.squeeze.out_features))
        nn.init.ones_(self.head.bias)

    def forward(self, pooled: Tensor, _temperature: Tensor) -> dict[str, Tensor]:
        z = self.logits(pooled)
        return {"kernel": z / z.abs().sum(1, keepdim=True).clamp_min(1e-6)}


class Sigmoids(Branch):
    """π = 2σ(z)/K: kernels don't compete (FDConv, CVPR 2025); starts at 1/K."""

    def forward(self, pooled: Tensor, _temperature: Tensor) -> dict[str, Tensor]:
        z = self.logits(pooled)
        return {"kernel": torch.sigmoid(z) * (2 / z.shape[1])}


class DropOut(Branch):
    """In training each sample does without each kernel with probability 1/4; the others share its weight."""

    def weigh(self, pi: Tensor) -> Tensor:
        if not self.training:
            return pi
        kept = pi * (torch.rand_like(pi) > 0.25) + 1e-6
        return kept / kept.sum(1, keepdim=True)


class WithLoss(torch.autograd.Function):
    """Hand a tensor through, and add a loss to that of the training."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


class Informative(Branch):
    """A loss of −λ times what the image tells of the kernel: each image decided, all kernels used alike."""

    strength = 0.1

    def weigh(self, pi: Tensor) -> Tensor:
        if not self.training:
            return pi
        entropy = torch.special.entr(pi + 1e-9)
        information = torch.special.entr(pi.mean(0) + 1e-9).sum() - entropy.sum(1).mean()
        return WithLoss.apply(pi, -self.strength * information)


def kernel_attention(branch: Callable[..., nn.Module], numbered: bool = False) -> Change:
    """The change that replaces the kernel attention."""

    def change(layer: DynamicConv2d, number: int) -> None:
        published = layer.attention["kernel"]
        layer.attention["kernel"] = branch(published, number) if numbered else branch(published)

    return change


def normalise_squeeze(layer: DynamicConv2d, _number: int) -> None:
    """BatchNorm in the squeeze of the kernel attention, as the other squeeze has it."""
    attention = layer.attention["kernel"]
    attention.squeeze = nn.Sequential(attention.squeeze, nn.BatchNorm1d(attention.squeeze.out_features))


def kaiming_kernel_head(layer: DynamicConv2d, _number: int) -> None:
    """The published start, of the kernel attention alone."""
    nn.init.kaiming_normal_(layer.attention["kernel"].head.weight, mode="fan_out", nonlinearity="relu")


def noisy_copies(layer: DynamicConv2d, _number: int) -> None:
    """All kernels start as the first one, plus a tenth of noise."""
    with torch.no_grad():
        first = layer.bank[0].clone()
        layer.bank.copy_(first + 0.1 * first.std() * torch.randn_like(layer.bank))


def orthogonal_kernels(layer: DynamicConv2d, _number: int) -> None:
    """The kernels start orthogonal to each other, with the norms that they have."""
    with torch.no_grad():
        flat = layer.bank.flatten(1)
        directions = nn.init.orthogonal_(torch.empty_like(flat))
        layer.bank.copy_((directions * flat.norm(dim=1, keepdim=True)).view_as(layer.bank))


def add_spatial(layer: DynamicConv2d, _number: int) -> None:
    """ODConv's spatial attention beside those of input and output."""
    if (taps := layer.kernel_size[0] * layer.kernel_size[1]) == 1:
        return
    published = layer.attention["shared"]
    sizes = {name: head.out_features for name, head in published.heads.items()} | {"spatial": taps}
    channels = published.squeeze.in_features
    shared = SharedAttention(channels, sizes, 0.0, "batch")
    for last in shared.last_layers:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    nn.init.kaiming_normal_(shared.squeeze.weight, mode="fan_out", nonlinearity="relu")
    layer.attention["shared"] = shared


class Doubled(nn.Module):
    """2σ for input and output: both are 1 at the start."""

    def __init__(self, published: nn.Module) -> None:
        super().__init__()
        self.published = published

    def forward(self, pooled: Tensor, temperature: Tensor) -> dict[str, Tensor]:
        return {name: 2 * value for name, value in self.published(pooled, temperature).items()}


def double_sigmoids(layer: DynamicConv2d, _number: int) -> None:
    layer.attention["shared"] = Doubled(layer.attention["shared"])


def enlarge_bank(layer: DynamicConv2d, _number: int) -> None:
    """Make up for the sigmoids' 1/2 · 1/2 in the kernels."""
    with torch.no_grad():
        layer.bank.mul_(4)


@dataclass(frozen=True)
class Variant:
    """A network and how its attentions are trained."""

    conv: str = "fmdconv"
    kernels: int = 4
    start: str = "neutral"
    final_temperature: float = 1.0
    shape: str = "linear"
    changes: tuple[Change, ...] = ()
    kernel_attention: dict[str, float] = field(default_factory=dict)
    """What the parameters of the kernel attention do otherwise: weight_decay, and lr as a factor."""

    def build(self, classes: int) -> nn.Module:
        options = {"kernels": self.kernels, "attention_init": self.start, "width": WIDTH}
        model = make_model(ARCH, self.conv, classes, **options)
        layers = [layer for layer in model.modules() if isinstance(layer, DynamicConv2d)]
        for number, layer in enumerate(layers):
            for change in self.changes:
                change(layer, number)
        return model

    def parameter_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameters, those of the kernel attention apart if they are trained otherwise."""
        apart = {
            parameter
            for layer in model.modules()
            if isinstance(layer, DynamicConv2d) and self.kernel_attention
            for parameter in layer.attention["kernel"].parameters()
        }
        common = [parameter for parameter in model.parameters() if parameter not in apart]
        options = {"weight_decay": SGD.weight_decay, "lr": 1.0} | self.kernel_attention
        own = {"params": list(apart), "weight_decay": options["weight_decay"], "factor": options["lr"]}
        return [{"params": common, "factor": 1.0}, *([own] if apart else [])]


VARIANTS = {
    "static": Variant("static"),
    "K=1": Variant(kernels=1),
    "K=4": Variant(),
    "K=4, kernel head Kaiming": Variant(changes=(kaiming_kernel_head,)),
    "K=4, τ geometric": Variant(shape="geometric"),
    "K=4, τ to 0.4": Variant(final_temperature=0.4),
    "K=4, one-hot start": Variant(changes=(kernel_attention(Fading, numbered=True),)),
    "K=4, signed z/Σ|z|": Variant(changes=(kernel_attention(SumNormalised),)),
    "K=4, 2σ/K per kernel": Variant(changes=(kernel_attention(Sigmoids),)),
    "K=4, copies plus noise": Variant(changes=(noisy_copies,)),
    "K=4, orthogonal kernels": Variant(changes=(orthogonal_kernels,)),
    "K=4, kernel drop-out": Variant(changes=(kernel_attention(DropOut),)),
    "K=4, information term": Variant(changes=(kernel_attention(Informative),)),
    "K=4, kernel attention 10x rate": Variant(kernel_attention={"lr": 10.0, "weight_decay": 0.0}),
    "K=4, normalised squeeze": Variant(changes=(normalise_squeeze,)),
    "K=4, normalised squeeze, τ to 0.4": Variant(changes=(normalise_squeeze,), final_temperature=0.4),
    "K=4, spatial": Variant(changes=(add_spatial,)),
    "K=1, spatial": Variant(kernels=1, changes=(add_spatial,)),
    "ODConv K=1": Variant("odconv", kernels=1),
    "ODConv K=4": Variant("odconv"),
    "K=4, 2·sigmoid": Variant(changes=(double_sigmoids,)),
    "K=4, kernels × 4": Variant(changes=(enlarge_bank,)),
    "K=1, 2·sigmoid": Variant(kernels=1, changes=(double_sigmoids,)),
    "K=1, kernels × 4": Variant(kernels=1, changes=(enlarge_bank,)),
    "K=4, all heads Kaiming": Variant(start="kaiming"),
    "K=1, all heads Kaiming": Variant(kernels=1, start="kaiming"),
}


@dataclass(frozen=True)
class Data:
    """Where the images are, how many are trained on (0: all that are left), and how many are held out."""

    train: Path
    test: Path
    images: int
    validation: int


@lru_cache(maxsize=1)
def load(data: Data) -> tuple[Dataset, ImageSet]:
    """The data set without the images held out, and these; which ones depends on nothing but their number."""
    dataset = load_dataset("npz", train=data.train, test=data.test)
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: data.validation], order[data.validation :]
    chosen = dataset.train.subset(rest[: data.images or None])
    return replace(dataset, train=chosen), dataset.train.subset(held_out)


def run(name: str, seed: int, epochs: int, data: Data) -> dict[str, float]:
    """Train one network; its figures on the images held out and on the test images."""
    torch.set_num_threads(1)
    keep_freed()
    variant, (dataset, held_out) = VARIANTS[name], load(data)
    torch.manual_seed(derive_seed(seed, "model"))
    generator = torch.Generator().manual_seed(derive_seed(seed, "batches"))
    model = variant.build(dataset.classes)
    fading = [module for module in model.modules() if isinstance(module, Fading)]
    steps, warm = -(-len(dataset.train) // SGD.batch_size), max(1, epochs // 3)
    schedule = TemperatureSchedule(final=variant.final_temperature, steps=warm, shape=variant.shape)
    optimiser = SGD.optimiser(variant.parameter_groups(model))
    started = time.perf_counter()
    for epoch in range(epochs):
        set_temperature(model, schedule.at(epoch))
        for module in fading:
            module.share.fill_(max(0.0, 1 - epoch / warm))
        for group in optimiser.param_groups:
            group["lr"] = group["factor"] * learning_rate(SGD.lr, "cosine", epoch / epochs)
        trained = train(model, dataset.train, dataset, SGD, steps, generator, optimiser=optimiser)
    validated = evaluate(model, held_out, dataset)
    with record_attention(model) as record:
        tested = evaluate(model, dataset.test, dataset)
    return {
        "validation_accuracy": validated.accuracy,
        "accuracy": tested.accuracy,
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
    figures = ("validation_accuracy", "accuracy", "train_accuracy", "kernel_entropy", "kernel_information")
    groups = defaultdict(list)
    for row in rows:
        groups[row["variant"], row["images"], row["epochs"]].append(row)
    table = Table("variant", "images", "epochs", "seeds", *figures)
    for name, group in groups.items():
        cells = (spread([float(row[figure]) for row in group]) for figure in figures)
        table.add_row(*name, str(len(group)), *cells)
    Console(width=150).print(table)


def spread(values: list[float]) -> str:
    if any(map(isnan, values)):  # without a mixture
        return "–"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def planned(options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    def key(row: dict[str, str]) -> tuple[str, ...]:
        return row["variant"], row["seed"], row["epochs"], row["images"]

    done = {key(row) for row in read(options.out)}
    for seed, name in product(options.seeds, options.variants):
        if (name, str(seed), str(options.epochs), str(options.images)) not in done:
            yield name, seed


def main() -> None:
    options = parse_options()
    machine = environment()["machine"]
    about = {
        "date": date.today().isoformat(),
        "machine": machine["processor"],
        "threads": 1,
        "torch": torch.__version__,
    }
    data = Data(options.train, options.test, options.images, options.validation)
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        jobs = {
            pool.submit(run, name, seed, options.epochs, data): (name, seed)
            for name, seed in planned(options)
        }
        for job in as_completed(jobs):
            name, seed = jobs[job]
            row = {"variant": name, "seed": seed, "epochs": options.epochs, "images": options.images}
            row |= {figure: round(value, 5) for figure, value in job.result().items()} | about
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
    parser.add_argument(
        "--images", type=int, default=0, help="how many to train on; 0: all but those held out"
    )
    parser.add_argument("--validation", type=int, default=5000, help="how many training images to hold out")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("mixture.csv"), help="CSV file to extend")
    return parser.parse_args()


if __name__ == "__main__":
    main()
