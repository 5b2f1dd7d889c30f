"""Local training and evaluation of one model on one set of images; knows nothing of Flower.

Training minimises any loss with any optimiser; evaluation always tells the cross entropy, so that runs compare.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfmd.conv import record_attention
from fedfmd.data import Dataset, Images, batches

SCHEDULES = ("constant", "cosine", "step")
PRECISIONS = ("float32", "bf16")
MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
TOP = 5
TEST_BATCH = 256
"""Images of a batch that a model is tested on. Tests are shared out by whole batches: so their result is the same."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits B × classes and labels B to their mean loss, a scalar."""

LOSSES: dict[str, Loss] = {"cross-entropy": F.cross_entropy}


def _sgd(parameters: Iterable[Any], how: LocalSGD) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=how.lr,
        momentum=how.momentum,
        weight_decay=how.weight_decay,
        nesterov=how.nesterov,
        fused=True,  # one pass over each array, without temporary copies
    )


def _adam(kind: type[torch.optim.Adam], parameters: Iterable[Any], how: LocalSGD) -> torch.optim.Optimizer:
    """Adam with PyTorch's β₂ and ε; the momentum is β₁."""
    return kind(parameters, lr=how.lr, betas=(how.momentum, 0.999), weight_decay=how.weight_decay, fused=True)


@dataclass(frozen=True)
class LocalSGD:
    """How a model is trained: by SGD with (Nesterov's) momentum and weight decay, unless `make` is another optimiser.

    With "bf16" precision the forward pass runs under autocast; weights and updates stay float32. Batches lie in memory
    as `memory_format` says (https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html). `proximal`
    is FedProx's μ (Li et al., MLSys 2020): the loss gets μ/2 ‖w − w₀‖², w₀ being the weights at the start.
    `clip_norm` is the L2 norm to which longer gradients of a step, that of this term included, are scaled down; 0
    is none. `make` gets the parameters and this; `OPTIMISERS` has some.
    """

    lr: float
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    batch_size: int = 32
    precision: str = "float32"
    memory_format: torch.memory_format = torch.contiguous_format
    proximal: float = 0.0
    clip_norm: float = 0.0
    loss: Loss = F.cross_entropy
    make: Callable[[Iterable[Any], LocalSGD], torch.optim.Optimizer] = _sgd

    def optimiser(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """PyTorch's optimiser of these parameters, or groups of parameters with options of their own."""
        return self.make(parameters, self)

    def states(self) -> int:
        """Return how many numbers the optimiser keeps for each parameter, after a step on one: 1 is momentum."""
        parameter = nn.Parameter(torch.zeros(2, 3))
        optimiser = self.optimiser([parameter])
        parameter.grad = torch.ones_like(parameter)
        optimiser.step()
        kept = optimiser.state[parameter].values()
        return sum(isinstance(value, Tensor) and value.shape == parameter.shape for value in kept)


OPTIMISERS: dict[str, Callable[[Iterable[Any], LocalSGD], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": partial(_adam, torch.optim.Adam),
    "adamw": partial(_adam, torch.optim.AdamW),
}


@dataclass(frozen=True)
class Tally:
    """What training has met up to a step: how many steps and images, the sum of their losses, and how many were right.

    The sums are float32, as they are kept on the device.
    """

    steps: int = 0
    examples: int = 0
    loss_sum: float = 0.0
    hits: float = 0.0


START = Tally()

Compute = Callable[[nn.Module, LocalSGD, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From a model, how it is trained, inputs and labels to loss and logits, detached; parameters get their gradients."""


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
class BatchTest:
    """What a model made of a batch of images: their number, and sums over them, from which an `Evaluation` follows."""

    images: int
    loss: float
    hits: float
    top_hits: float
    kernel_entropy: float


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


def scheduled_rate(lr: float, schedule: str, done: int, length: int, warmup: int = 0) -> float:
    """Return the learning rate after `done` of `length` rounds or epochs.

    In the first `warmup` of them it rises by lr / (warmup + 1) each, as Goyal et al. (arXiv:1706.02677) have it; the
    schedule takes the others.
    """
    if done < warmup:
        return lr * (done + 1) / (warmup + 1)
    return learning_rate(lr, schedule, (done - warmup) / (length - warmup))


def compute_gradients(
    model: Callable[[Tensor], Tensor], sgd: LocalSGD, inputs: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute a batch's loss and logits, and add its gradients to those of the parameters."""
    with torch.autocast(inputs.device.type, torch.bfloat16, enabled=sgd.precision == "bf16"):
        logits = model(inputs.contiguous(memory_format=sgd.memory_format))
        loss = sgd.loss(logits, labels)
    loss.backward()
    return loss.detach(), logits.detach()


def train(
    model: nn.Module,
    images: Images,
    dataset: Dataset,
    sgd: LocalSGD,
    steps: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    optimiser: torch.optim.Optimizer | None = None,
    since: Tally = START,
    after_step: Callable[[Callable[[], Tally]], None] | None = None,
    compute: Compute = compute_gradients,
) -> TrainResult:
    """Take `steps` steps on batches of `images`, passing over them as often as needed.

    `dataset` tells how images are normalised and augmented; `generator` draws order and augmentation. What the model
    itself draws, as dropout does, comes from PyTorch's own generators: these start each step from the seed of
    `generator` and the step's number, and are afterwards as they were.
    An `optimiser` given goes on from its state; without one, momentum starts from zero. The result's loss is the one
    that was minimised, `LocalSGD.loss`.

    `after_step` is called with what tells the tally so far; a GPU is waited for only when that is called. With model
    and optimiser as they were then, and with the same generator as at the start, the steps `since` a tally are those
    that were to follow. `compute` is what computes gradients, such as `fedfmd.training.compiled.Compiled`.
    """
    model.train()
    optimiser = optimiser or sgd.optimiser(model.parameters())
    start = [parameter.detach().clone() for parameter in _parameters(optimiser)] if sgd.proximal else []
    done, examples = since.steps, since.examples
    on_gpu = torch.device(device).type == "cuda"
    totals = torch.tensor([since.loss_sum, since.hits], device=device)

    def tally() -> Tally:
        return Tally(done, examples, *totals.tolist())

    with (
        torch.random.fork_rng([device] if on_gpu else []),
        closing(_endless(images, dataset, sgd.batch_size, generator, device, skip=done)) as passes,
    ):
        for inputs, labels in islice(passes, steps - done):
            torch.default_generator.manual_seed(generator.initial_seed() + done)
            if on_gpu:  # torch.manual_seed would do both, and formats a stack wherever there is no GPU
                torch.cuda.manual_seed(generator.initial_seed() + done)
            optimiser.zero_grad()
            loss, logits = compute(model, sgd, inputs, labels)
            if sgd.proximal:
                _pull(_parameters(optimiser), start, sgd.proximal)
            if sgd.clip_norm:
                nn.utils.clip_grad_norm_(_parameters(optimiser), sgd.clip_norm)
            optimiser.step()
            done, examples = done + 1, examples + len(labels)
            totals += _loss_and_hits(loss * len(labels), logits, labels)
            if after_step:
                after_step(tally)
    met = tally()
    return TrainResult(steps, examples, met.loss_sum / examples, met.hits / examples)


def evaluate_on_both(
    model: nn.Module, dataset: Dataset, device: torch.device | str = "cpu"
) -> tuple[Evaluation, Evaluation | None]:
    """Evaluate on the test images, and on the validation images if there are any."""
    tested = evaluate(model, dataset.test, dataset, device=device)
    if dataset.validation is None:
        return tested, None
    return tested, evaluate(model, dataset.validation, dataset, device=device)


def evaluate(
    model: nn.Module,
    images: Images,
    dataset: Dataset,
    batch_size: int = TEST_BATCH,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Loss, accuracies and kernel entropy of the model in evaluation mode."""
    return evaluation_of(run_tests(model, images, dataset, batch_size, device))


@torch.inference_mode()
def run_tests(
    model: nn.Module,
    images: Images,
    dataset: Dataset,
    batch_size: int = TEST_BATCH,
    device: torch.device | str = "cpu",
) -> list[BatchTest]:
    """Test the model in evaluation mode, batch by batch."""
    model.eval()
    sums: list[Tensor] = []
    sizes: list[int] = []
    entropies: list[float] = []
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
            sums.append(torch.cat([loss_and_hits, _top_hits(logits, labels)]))
            sizes.append(len(labels))
            entropies.append(record.kernel_entropy() * len(labels))
    found = torch.stack(sums).tolist() if sums else []
    return [
        BatchTest(size, loss, hits, top_hits, entropy)
        for size, (loss, hits, top_hits), entropy in zip(sizes, found, entropies, strict=True)
    ]


def evaluation_of(tests: Sequence[BatchTest]) -> Evaluation:
    """Return the means over the images of all batches, whose order doesn't matter."""
    images = sum(test.images for test in tests)
    loss, hits, top_hits, entropy = (
        math.fsum(getattr(test, name) for test in tests) / images
        for name in ("loss", "hits", "top_hits", "kernel_entropy")
    )
    return Evaluation(loss, hits, entropy, top_hits)


def batches_of_part(images: int, part: int, parts: int) -> list[range]:
    """Return the places of the images in each batch of one of `parts` of a test, which have whole batches."""
    batches = [range(first, min(first + TEST_BATCH, images)) for first in range(0, images, TEST_BATCH)]
    return batches[part * len(batches) // parts : (part + 1) * len(batches) // parts]


def part_of(images: Images, part: int, parts: int) -> Images:
    """Return the images of one of `parts` of a test."""
    batches = batches_of_part(len(images), part, parts)
    return images.subset(torch.arange(batches[0].start, batches[-1].stop) if batches else torch.arange(0))


def _parameters(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimiser.param_groups for parameter in group["params"]]


def _pull(parameters: Iterable[Tensor], start: Iterable[Tensor], proximal: float) -> None:
    """Add the gradient of FedProx's term, μ (w − w₀)."""
    for parameter, origin in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - origin, alpha=proximal)


def _endless(
    images: Images,
    dataset: Dataset,
    batch_size: int,
    generator: torch.Generator,
    device: torch.device | str,
    skip: int,
) -> Generator[tuple[Tensor, Tensor], None, None]:
    """Yield shuffled batches, epoch after epoch, without the first `skip`."""
    of_a_pass = math.ceil(len(images) / batch_size)
    while True:
        left_out = min(skip, of_a_pass)
        skip -= left_out
        yield from batches(
            images,
            batch_size,
            generator=generator,
            augment=dataset.augment,
            mean=dataset.mean,
            std=dataset.std,
            device=device,
            skip=left_out,
        )


def _top_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are among the `TOP` most probable classes, as one number; NaN if there are no others."""
    if logits.shape[1] <= TOP:
        return logits.new_full((1,), math.nan)
    return (logits.topk(TOP).indices == labels[:, None]).sum()[None]


def _loss_and_hits(loss_sum: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return torch.stack([loss_sum, (logits.argmax(1) == labels).sum()])
