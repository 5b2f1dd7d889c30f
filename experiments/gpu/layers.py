"""Time every way of mixing on the layers of ResNet-18, for the rule of `mixing="auto"` on a GPU.

    python experiments/gpu/layers.py --out runs/gpu

A training step is the forward and backward pass of one layer with its attentions, inference the forward pass.
Rows go to layers.csv; `fit.py` tells which way is fastest where. The status is 1 if a way fails, other than for
lack of memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product

import torch
from common import PRECISIONS, Deadline, Failure, Table, device_of, free, parser, precisions_of, set_mixing
from timing import columns, race

from fedfmd.conv import MIXINGS, make_conv

CONVS = ("fmdconv", "odconv")
STATIC = ("static", "")
PHASES = ("train", "infer")


@dataclass(frozen=True)
class Group:
    """A 3×3 layer that keeps channels and size, and what it is timed on: one race."""

    channels: int
    size: int
    batch: int
    precision: str


LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))


def groups(toy: bool, device: str) -> list[Group]:
    layers, batch_sizes = (((8, 8),), (4,)) if toy else (LAYERS, (32, 128))
    precisions = precisions_of(device, "fp32" if toy else "tf32", "bf16")
    return [Group(*layer, *rest) for *rest, layer in product(batch_sizes, precisions, layers)]


def steps_of(group: Group, device: str) -> dict[tuple[str, str, str], Callable[[], object]]:
    """Return a step by convolution, way of mixing and phase; the ways of a convolution share one layer."""
    torch.manual_seed(0)
    x = torch.randn(group.batch, group.channels, group.size, group.size, device=device, requires_grad=True)
    weights = torch.randn_like(x)
    precision = PRECISIONS[group.precision]
    layers = {
        conv: make_conv(conv, group.channels, group.channels, 3, padding=1).to(device)
        for conv in (STATIC[0], *CONVS)
    }

    def step(conv: str, mixing: str, phase: str) -> None:
        layer = layers[conv].train(phase == "train")
        set_mixing(layer, mixing)
        with precision.autocast(device), torch.inference_mode(phase == "infer"):
            y = layer(x)
        if phase == "train":
            y.backward(weights.to(y.dtype))
            x.grad = None
            layer.zero_grad()

    variants = [STATIC, *product(CONVS, MIXINGS)]
    return {
        (*variant, phase): lambda key=(*variant, phase): step(*key)
        for phase, variant in product(PHASES, variants)
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    device, deadline = device_of(options), Deadline.after(options.seconds)
    failed = 0
    todo = groups(options.toy, device)
    with Table(options.out / "layers.csv", device) as table:
        for index, group in enumerate(todo):
            with PRECISIONS[group.precision].flags():
                timings = race(steps_of(group, device), device, deadline.share(len(todo) - index))
            for (conv, mixing, phase), timing in timings.items():
                names = {"phase": phase, "conv": conv, "mixing": mixing}
                table.append(asdict(group) | names | columns(timing, timings[*STATIC, phase]))
                failed += isinstance(timing.status, Failure)
            free(device)
    print(f"layers: {len(todo)} groups, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
