"""Time every way of mixing kernels, layer by layer, over the layers of ResNet-8, 20 and 18 on 32×32 images.

    python experiments/benchmarks/mixing.py --batch 1 8 32 128 --repeats 5 --out mixing.csv

The rule behind mixing="auto" is fitted to this table. A training step is the forward and backward pass of one
layer with its attentions, on one CPU thread, in process time. Each number is the median over repetitions, and
each repetition runs every way once, so that a slow moment of the machine meets all of them. Ratios are to a
static convolution and to one grouped convolution over the folded batch, the usual code. For ODConv,
"multiplied" is the reference implementation: B×K kernels under the spatial attention, then summed.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from common import about, write_rows
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fedfmd.conv import MIXINGS, DynamicConv2d, make_conv
from fedfmd.conv import mixing as ways
from fedfmd.conv.native import compile_native
from fedfmd.conv.plain import Geometry, fold_batch
from fedfmd.models import make_model

ARCHS = ("resnet8", "resnet20", "resnet18")
CONVS = ("fmdconv", "odconv")
IMAGE_SIZE = 32
WARM_UP = 1


@dataclass(frozen=True)
class Layer:
    """A 3×3 convolution and the size of its square input."""

    channels: int
    out_channels: int
    stride: int
    size: int

    def make(self, conv: str, mixing: str = "auto") -> nn.Module:
        return make_conv(conv, self.channels, self.out_channels, 3, self.stride, 1, mixing=mixing)


def layers_of(arch: str) -> Counter[Layer]:
    """The dynamic layers of a network, with how often each occurs."""
    layers: Counter[Layer] = Counter()

    def note(module: DynamicConv2d, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        layers[Layer(module.in_channels, module.out_channels, module.stride[0], inputs[0].shape[2])] += 1

    with torch.device("meta"):
        model = make_model(arch, "fmdconv", 10)
        for module in model.modules():
            if isinstance(module, DynamicConv2d):
                module.register_forward_hook(note)
        model(torch.empty(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    return layers


def multiplied(x: Tensor, bank: Tensor, pi: Tensor, spatial: Tensor | None, geometry: Geometry) -> Tensor:
    """The reference implementation of ODConv: every sample's K kernels, attended and then summed."""
    taps = x.new_ones(()) if spatial is None else spatial[:, None, None, None]
    kernels = pi[:, :, None, None, None, None] * taps * bank
    return fold_batch(x, kernels.sum(1), geometry)


def measure(layer: Layer, batch: int, repeats: int) -> dict[tuple[str, str, str], float]:
    """Median seconds by convolution, way and phase."""
    modules = {("static", ""): layer.make("static")}
    for conv in CONVS:
        dynamic = layer.make(conv)
        modules |= {(conv, mixing): dynamic for mixing in (*MIXINGS, ways.NATIVE, "multiplied")}
    del modules["fmdconv", "multiplied"]
    x = torch.randn(batch, layer.channels, layer.size, layer.size, requires_grad=True)
    seconds = defaultdict(list)
    for repetition in range(WARM_UP + repeats):
        for (conv, mixing), module in modules.items():
            module.mixing = mixing
            for phase, step in (("train", train), ("infer", infer)):
                taken = step(module, x)
                if repetition >= WARM_UP:
                    seconds[conv, mixing, phase].append(taken)
    return {key: median(values) for key, values in seconds.items()}


def train(module: nn.Module, x: Tensor) -> float:
    """Seconds of a forward and backward pass."""
    x.grad = None
    module.train().zero_grad()
    return timed(lambda: module(x).sum().backward())


def infer(module: nn.Module, x: Tensor) -> float:
    """Seconds of a forward pass."""
    module.eval()
    with torch.inference_mode():
        return timed(lambda: module(x))


def timed(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def chosen(layer: Layer, conv: str, batch: int) -> str:
    """What mixing="auto" chooses."""
    module = layer.make(conv)
    x = torch.empty(batch, layer.channels, layer.size, layer.size)
    return ways.choose_mixing(x, module.bank, module.geometry)


def rows(layer: Layer, batch: int, seconds: dict[tuple[str, str, str], float]) -> Iterator[dict[str, object]]:
    """One row per convolution, way and phase."""
    for (conv, mixing, phase), taken in seconds.items():
        grouped = seconds.get((conv, "grouped", phase))
        yield {
            **asdict(layer),
            "batch": batch,
            "phase": phase,
            "conv": conv,
            "mixing": mixing,
            "auto": conv != "static" and mixing == chosen(layer, conv, batch),
            "ms": round(1000 * taken, 3),
            "to_static": round(taken / seconds["static", "", phase], 3),
            "to_grouped": round(taken / grouped, 3) if grouped else "",
        }


def sums(table: list[dict[str, object]], archs: Iterable[str], batch: int) -> Iterator[tuple[str, ...]]:
    """Per network and phase, the ratio to static convolutions of its dynamic layers together."""
    for arch in archs:
        counts = layers_of(arch)
        for phase in ("train", "infer"):
            total: Counter[tuple[str, str]] = Counter()
            for row in table:
                layer = Layer(*(row[name] for name in ("channels", "out_channels", "stride", "size")))
                if row["batch"] == batch and row["phase"] == phase:
                    cost = counts[layer] * row["ms"]
                    total[row["conv"], row["mixing"]] += cost
                    if row["auto"]:
                        total[row["conv"], "auto"] += cost
            static = total.pop(("static", ""))
            for conv in CONVS:
                ratios = (
                    f"{total[conv, mixing] / static:.2f}" if (conv, mixing) in total else ""
                    for mixing in ("auto", *MIXINGS, ways.NATIVE, "multiplied")
                )
                yield (arch, str(batch), phase, conv, f"{static:.0f}", *ratios)


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    ways.PLAIN["multiplied"] = multiplied
    compile_native()
    layers = dict.fromkeys(layer for arch in options.arch for layer in layers_of(arch))
    table: list[dict[str, object]] = []
    for batch in options.batch:
        for layer in layers:
            table += rows(layer, batch, measure(layer, batch, options.repeats))
    write_rows(options.out, [about() | row for row in table])
    summary = Table(
        *("network", "batch", "phase", "conv", "static ms", "auto", *MIXINGS, ways.NATIVE, "multiplied"),
        title="Time of the dynamic layers, static = 1",
    )
    for batch in options.batch:
        for line in sums(table, options.arch, batch):
            summary.add_row(*line)
    Console(width=132).print(summary)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--arch", nargs="+", choices=ARCHS, default=ARCHS, help="networks whose layers are timed"
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=5, help="repetitions for each median")
    parser.add_argument("--out", type=Path, default=Path("mixing.csv"), help="CSV file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
