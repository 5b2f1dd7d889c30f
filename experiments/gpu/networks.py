"""Time training steps and inference of whole networks on a GPU, for every way of mixing, against static ones.

    python experiments/gpu/networks.py --out runs/gpu

The networks have the CIFAR stem and take 32×32 images. A training step is forward pass, loss, backward pass and
SGD with momentum; inference is a forward pass in evaluation mode. peak_mb is what a network needs by itself:
parameters, momentum, gradients, activations and temporary tensors. Rows go to networks.csv. The status is 1 if a
variant fails, other than for lack of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
from common import PRECISIONS, Deadline, Failure, Table, device_of, free, parser, precisions_of, set_mixing
from timing import columns, race
from torch.nn.functional import cross_entropy

from fedfmd.conv import MIXINGS
from fedfmd.conv.mixing import AUTO
from fedfmd.models import make_model
from fedfmd.training import LocalSGD

IMAGE_SIZE, CLASSES = 32, 10
PHASES = ("train", "infer")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Group:
    """A network and what it is timed on: one race."""

    arch: str
    batch: int
    precision: str
    format: str


@dataclass(frozen=True)
class Variant:
    """A convolution with its number of kernels and its way of mixing them."""

    conv: str
    kernels: int
    mixing: str


STATIC = Variant("static", 1, "")
VARIANTS = (  # in the order in which they are worth knowing, should the time end
    STATIC,
    Variant("fmdconv", 1, AUTO),  # nothing is mixed
    *(Variant(conv, kernels, AUTO) for conv, kernels in (("fmdconv", 4), ("odconv", 1), ("odconv", 4))),
    *(Variant(conv, 4, mixing) for mixing, conv in product(MIXINGS, ("fmdconv", "odconv"))),
    *(Variant("odconv", 1, mixing) for mixing in MIXINGS),
)


def groups(toy: bool, device: str) -> list[Group]:
    """Return the races, the most telling first."""
    precisions = precisions_of(device, "fp32" if toy else "tf32", "bf16")
    if toy:
        return [Group("resnet8", 2, precision, "channels_last") for precision in precisions]
    large = [
        Group("resnet18", batch, precision, form)
        for form, batch, precision in product(FORMATS, (128, 32), precisions)
    ]
    small = [Group("resnet8", 32, precision, "contiguous") for precision in precisions]
    return [*small, *large]


class Network:
    """A network with its optimiser and a batch on the device."""

    def __init__(self, group: Group, conv: str, kernels: int, device: str) -> None:
        torch.manual_seed(0)
        layout = FORMATS[group.format]
        with torch.device(device):
            self.model = make_model(group.arch, conv, CLASSES, kernels=kernels).to(memory_format=layout)
            images = torch.rand(group.batch, 3, IMAGE_SIZE, IMAGE_SIZE)
            self.labels = torch.randint(CLASSES, (group.batch,))
        self.images = images.to(memory_format=layout)
        self.optimiser = LocalSGD(lr=1e-3).optimiser(self.model.parameters())
        self.precision, self.device = PRECISIONS[group.precision], device

    def step(self, phase: str, mixing: str) -> None:
        set_mixing(self.model, mixing)
        self.model.train(phase == "train")
        if phase == "infer":
            with torch.inference_mode(), self.precision.autocast(self.device):
                self.model(self.images)
            return
        self.optimiser.zero_grad()
        with self.precision.autocast(self.device):
            loss = cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()

    def own_bytes(self, phase: str) -> int:
        """What stays between steps; momentum is as large as the parameters."""
        copies = 2 if phase == "train" else 1
        return copies * size(self.model.parameters()) + size(self.model.buffers())


def size(tensors: object) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def steps_of(networks: dict[tuple[str, int], Network]) -> dict[tuple[Variant, str], Callable[[], object]]:
    """Return a step by variant and phase; the ways of mixing share the network of a convolution."""
    return {
        (variant, phase): lambda v=variant, phase=phase: networks[v.conv, v.kernels].step(phase, v.mixing)
        for phase, variant in product(PHASES, VARIANTS)
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    device, deadline = device_of(options), Deadline.after(options.seconds)
    failed = 0
    todo = groups(options.toy, device)
    with Table(options.out / "networks.csv", device) as table:
        for index, group in enumerate(todo):
            made = {
                key: Network(group, *key, device)
                for key in dict.fromkeys((v.conv, v.kernels) for v in VARIANTS)
            }
            with PRECISIONS[group.precision].flags():
                timings = race(steps_of(made), device, deadline.share(len(todo) - index))
            for (variant, phase), timing in timings.items():
                own = made[variant.conv, variant.kernels].own_bytes(phase)
                row = asdict(group) | {"phase": phase} | asdict(variant)
                table.append(row | columns(timing, timings[STATIC, phase], own))
                failed += isinstance(timing.status, Failure)
            del made
            free(device)
    print(f"networks: {len(todo)} groups, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
