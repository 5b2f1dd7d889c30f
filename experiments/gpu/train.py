"""Train ResNet-18 on all of CIFAR-10 on a GPU, epoch by epoch: static, FMDConv and ODConv with 1 and 4 kernels.

    python experiments/gpu/train.py --data FOLDER --out runs/gpu

FOLDER holds cifar10_train.npz and cifar10_test.npz. Forward passes run under bf16 autocast; images stay on the GPU
as uint8. Before a run starts, some steps are timed: a run that can't end before the deadline is not started but
listed, so that no run is shorter than asked for. Rows go to train.csv, one by one: an epoch each, or a network
that was not trained, with the reason. The status is 1 if a run fails.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from common import OUT_OF_TIME, Deadline, Failure, Table, device_of, free, parser, placed, synthetic
from torch import nn

from fedfmd.conv import TemperatureSchedule, has_temperature, set_temperature
from fedfmd.data import Dataset, load_dataset
from fedfmd.models import make_model
from fedfmd.seeds import derive_seed
from fedfmd.training import LocalSGD, evaluate, learning_rate, train

NETWORKS = (("static", 1), ("fmdconv", 4), ("fmdconv", 1), ("odconv", 1), ("odconv", 4))
TEMPERATURE = TemperatureSchedule()
SCHEDULE = "cosine"
WARM_UP_STEPS, TIMED_STEPS = 5, 10
MARGIN = 1.1  # of the time that a run may take


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    dataset: Dataset
    device: str
    arch: str
    epochs: int
    sgd: LocalSGD
    mixing: str
    channels_last: bool
    seed: int

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return math.ceil(len(self.dataset.train) / self.sgd.batch_size)

    def model(self, conv: str, kernels: int) -> nn.Module:
        """Return the network, whose initial weights depend on the seed alone."""
        torch.manual_seed(derive_seed(self.seed, "model"))
        options = {"kernels": kernels, "mixing": self.mixing, "temperature": TEMPERATURE.initial}
        model = make_model(self.arch, conv, self.dataset.classes, **options).to(self.device)
        return model.to(memory_format=torch.channels_last) if self.channels_last else model


def predicted_seconds(plan: Plan, conv: str, kernels: int) -> float:
    """Time some steps and an evaluation of another network of the same kind, and return those of a whole run."""
    model, generator = plan.model(conv, kernels), torch.Generator().manual_seed(0)
    for steps in (WARM_UP_STEPS, TIMED_STEPS):
        started = time.perf_counter()
        train(model, plan.dataset.train, plan.dataset, plan.sgd, steps, generator, plan.device)
        step_s = (time.perf_counter() - started) / steps
    started = time.perf_counter()
    evaluate(model, plan.dataset.test, plan.dataset, device=plan.device)
    return MARGIN * plan.epochs * (plan.steps * step_s + time.perf_counter() - started)


def run(plan: Plan, conv: str, kernels: int) -> Iterator[dict[str, object]]:
    """Train a network, and return the columns of each epoch."""
    dataset, device = plan.dataset, plan.device
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = plan.model(conv, kernels)
    optimiser = plan.sgd.optimiser(model.parameters())
    for epoch in range(1, plan.epochs + 1):
        lr = learning_rate(plan.sgd.lr, SCHEDULE, (epoch - 1) / plan.epochs)
        for group in optimiser.param_groups:
            group["lr"] = lr
        temperature = TEMPERATURE.at(epoch - 1)
        set_temperature(model, temperature)
        generator = torch.Generator().manual_seed(derive_seed(plan.seed, "epoch", epoch))
        started = time.perf_counter()
        trained = train(model, dataset.train, dataset, plan.sgd, plan.steps, generator, device, optimiser)
        seconds = time.perf_counter() - started
        if not math.isfinite(trained.loss):
            raise FloatingPointError(f"epoch {epoch}: the training loss is {trained.loss}")
        tested = evaluate(model, dataset.test, dataset, device=device)
        peak = torch.cuda.max_memory_allocated() / 1e6 if device == "cuda" else None
        yield {
            "epoch": epoch,
            "seconds": f"{seconds:.3f}",
            "evaluation_s": f"{time.perf_counter() - started - seconds:.3f}",
            "peak_mb": "" if peak is None else round(peak, 1),
            "lr": f"{lr:.5g}",
            "temperature": temperature if has_temperature(model) else "",
            "train_loss": f"{trained.loss:.5f}",
            "train_accuracy": f"{trained.accuracy:.5f}",
            "loss": f"{tested.loss:.5f}",
            "accuracy": f"{tested.accuracy:.5f}",
            "kernel_entropy": "" if math.isnan(tested.kernel_entropy) else f"{tested.kernel_entropy:.4f}",
        }


COLUMNS = (
    *("epoch", "seconds", "evaluation_s", "peak_mb", "lr", "temperature"),
    *("train_loss", "train_accuracy", "loss", "accuracy", "kernel_entropy"),
)


def rows(plan: Plan, conv: str, kernels: int, deadline: Deadline) -> Iterator[dict[str, object]]:
    """Return a row per epoch, or one that says why there is none."""
    nothing = dict.fromkeys(COLUMNS, "")
    if deadline.passed:
        yield nothing | {"status": OUT_OF_TIME}
        return
    try:
        needed = predicted_seconds(plan, conv, kernels)
        if needed > deadline.left:
            status = f"not run: needs about {needed:.0f} s, {max(0, deadline.left):.0f} s are left"
            yield nothing | {"status": status}
            return
        for columns in run(plan, conv, kernels):
            yield columns | {"status": "ok"}
    except Exception as error:  # the other networks may do
        yield nothing | {"status": Failure(error)}
    free(plan.device)


def plan_of(options: argparse.Namespace) -> Plan:
    device = device_of(options)
    if options.toy:
        dataset = synthetic(512, 256, size=16)
    else:
        paths = [options.data / f"cifar10_{split}.npz" for split in ("train", "test")]
        dataset = load_dataset("npz", train=paths[0], test=paths[1])
    sgd = LocalSGD(options.lr, nesterov=True, batch_size=options.batch_size, precision="bf16")
    return Plan(
        placed(dataset, device),
        device,
        "resnet8" if options.toy else "resnet18",
        options.epochs or (2 if options.toy else 15),
        sgd,
        options.mixing,
        options.channels_last,
        options.seed,
    )


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    given = parser(__doc__)
    given.add_argument("--data", type=Path, default=Path(), help="folder of the npz files")
    given.add_argument(
        "--networks", nargs="+", default=[f"{c}-{k}" for c, k in NETWORKS], help="CONV-KERNELS"
    )
    given.add_argument("--epochs", type=int, help="of each run; 15 unless given, 2 of toys")
    given.add_argument("--batch-size", type=int, default=512)
    given.add_argument("--lr", type=float, default=0.2)
    given.add_argument("--mixing", default="auto", help="as in make_model")
    given.add_argument("--channels-last", action="store_true", help="memory format of the networks")
    given.add_argument("--seed", type=int, default=0)
    return given.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    deadline = Deadline.after(options.seconds)
    plan = plan_of(options)
    failed = 0
    with Table(options.out / "train.csv", plan.device) as table:
        for network in options.networks:
            conv, _, kernels = network.partition("-")
            names = {
                "arch": plan.arch,
                "conv": conv,
                "kernels": kernels,
                "batch_size": plan.sgd.batch_size,
                "epochs": plan.epochs,
            }
            for row in rows(plan, conv, int(kernels), deadline):
                table.append(names | row)
                failed += isinstance(row["status"], Failure)
                print(network, row["epoch"], row["seconds"], row["accuracy"], row["status"], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
