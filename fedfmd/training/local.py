"""Local training and evaluation of one model on one set of images; knows nothing of Flower."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfmd.conv import record_attention
from fedfmd.data import Dataset, ImageSet, batches

SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("float32", "bf16")
TOP = 5


@dataclass(frozen=True)
class LocalSGD:
    """The client's optimiser: SGD with (Nesterov's) momentum and weight decay.

    With "bf16" precision the forward pass runs under autocast; weights and updates stay float32. `proximal`
    is FedProx's μ (Li et al., MLSys 2020): the loss gets μ/2 ‖w − w₀‖², w₀ being the weights at the start.
    """

    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    batch_size: int = 32
    precision: str = "float32"
    proximal: float = 0.0

    def optimiser(self, parameters: Iterable[Any]) -> torch.optim.SGD:
        """PyTorch's optimiser of these parameters, or groups of parameters with options of their own."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.nesterov,
            fused=True,  # one pass over each array, without temporary copies
        )


@dataclass(frozen=True)
class TrainResult:
    """Means over the images processed, as met while training."""

    steps: int
    examples: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Evaluation:
    """Means over the images; `kernel_entropy` is H(π)/ln K (see `fedfmd.conv.record_attention`).

    `top5_accuracy`: the label is among the five most probable classes; NaN with five classes or fewer.
    """

    loss: float
    accuracy: float
    kernel_entropy: float
    top5_accuracy: float = math.nan


@dataclass(frozen=True)
class Best:
    """The model that did best so far: its test `accuracy`, and the accuracy that it was `chosen_by`."""

    accuracy: float = 0.0
    chosen_by: float = -math.inf

    @property
    def known_accuracy(self) -> float | None:
        """Its test accuracy; None if no model was evaluated yet."""
        return self.accuracy if self.chosen_by > -math.inf else None

    def or_later(self, tested: Evaluation | None, validated: Evaluation | None) -> Best:
        """Return the better one of this and a later model, this one if that was not evaluated.

        The better one is better on the validation images, on the test images if there are no others.
        """
        if tested is None:
            return self
        later = Best(tested.accuracy, (validated or tested).accuracy)
        return later if later.chosen_by > self.chosen_by else self


def learning_rate(lr: float, schedule: str, progress: float) -> float:
    """Learning rate after a share `progress` in [0, 1) of the rounds or epochs.

    "step" divides by 10 at 30, 60 and 90 % of the way, as the FMDConv paper does on ImageNet.
    """
    if schedule == "constant":
        return lr
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule == "step":
        return lr * 0.1 ** sum(progress >= milestone for milestone in (0.3, 0.6, 0.9))
    raise ValueError(f"train.schedule = {schedule!r}: must be one of {', '.join(SCHEDULES)}")


def train(
    model: nn.Module,
    images: ImageSet,
    dataset: Dataset,
    sgd: LocalSGD,
    steps: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    optimiser: torch.optim.Optimizer | None = None,
) -> TrainResult:
    """Run `steps` batches of SGD on `images`, passing over them as often as needed.

    `dataset` tells how images are normalised and augmented; `generator` draws order and augmentation.
    An `optimiser` given goes on from its state; without one, as on a client, momentum starts from zero.
    """
    model.train()
    optimiser = optimiser or sgd.optimiser(model.parameters())
    start = [parameter.detach().clone() for parameter in _parameters(optimiser)] if sgd.proximal else []
    examples = 0
    totals = torch.zeros(2, device=device)
    for inputs, labels in islice(_endless(images, dataset, sgd.batch_size, generator, device), steps):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=sgd.precision == "bf16"):
            logits = model(inputs)
            loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        if sgd.proximal:
            _pull(_parameters(optimiser), start, sgd.proximal)
        optimiser.step()
        examples += len(labels)
        totals += _loss_and_hits(loss.detach() * len(labels), logits.detach(), labels)
    loss_sum, hits = totals.tolist()
    return TrainResult(steps, examples, loss_sum / examples, hits / examples)


def evaluate_on_both(
    model: nn.Module, dataset: Dataset, device: torch.device | str = "cpu"
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate on the test images, and on the validation images if there are any."""
    tested = evaluate(model, dataset.test, dataset, device=device)
    if dataset.validation is None:
        return tested, None
    return tested, evaluate(model, dataset.validation, dataset, device=device)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    dataset: Dataset,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Loss, accuracies and kernel entropy of the model in evaluation mode."""
    model.eval()
    totals, entropy = torch.zeros(3, device=device), 0.0
    with record_attention(model, last=1) as record:  # of all images, attentions would outgrow the model
        for inputs, labels in batches(
            images,
            batch_size,
            generator=None,
            augment="none",
            mean=dataset.mean,
            std=dataset.std,
            device=device,
        ):
            logits = model(inputs)
            loss_and_hits = _loss_and_hits(F.cross_entropy(logits, labels, reduction="sum"), logits, labels)
            totals += torch.cat([loss_and_hits, _top_hits(logits, labels)])
            entropy += record.kernel_entropy() * len(labels)
    loss, accuracy, top, entropy = (total / len(images) for total in (*totals.tolist(), entropy))
    return Evaluation(loss, accuracy, entropy, top)


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _pull(parameters: Iterable[Tensor], start: Iterable[Tensor], proximal: float) -> None:
    """Add the gradient of FedProx's term, μ (w − w₀)."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=proximal)


def _endless(
    images: ImageSet,
    dataset: Dataset,
    batch_size: int,
    generator: torch.Generator,
    device: torch.device | str,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, epoch after epoch."""
    while True:
        yield from batches(
            images,
            batch_size,
            generator=generator,
            augment=dataset.augment,
            mean=dataset.mean,
            std=dataset.std,
            device=device,
        )


def _top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are among the `TOP` most probable classes, as one number; NaN if there are no others."""
    if logits.shape[1] <= TOP:
        return logits.new_full((1,), math.nan)
    return (logits.topk(TOP).indices == labels[:, None]).sum()[None]


def _loss_and_hits(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([loss_sum, (logits.argmax(1) == labels).sum()])
