"""Time training steps and inference of whole networks, for every convolution and every way of mixing.

    python experiments/benchmarks/models.py --arch resnet18 --batch 8 32 --repeats 5 --out models.csv

The networks have the CIFAR stem and take 32×32 images. A training step is forward pass, loss, backward pass and
SGD with momentum; "update" is that last part alone, inference a forward pass in evaluation mode. Each step is
timed after an untimed one, which fills the caches; SGD is fused and memory stays with the process, as in fedfmd's
own training. Seconds are the median over repetitions, and so are ratios, each between two times of the same
repetition: a repetition runs every variant once, so that a slow moment of the machine meets all of them, and
every other one in reverse order.
On the CPU: one thread, process time. On a GPU, where there is one: CUDA events, in float32 (PyTorch's defaults:
TF32 in convolutions) and under bf16 autocast. Ratios are to the static network and to the same convolution mixed
by one grouped convolution over the folded batch, as in the published code; for ODConv, that code also multiplies
out all B×K kernels ("multiplied"). "auto" chooses among all ways, with the code that `fedfmd compile` makes;
"uncompiled" is auto without it.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median

import torch
from common import about, table_of, write_rows
from mixing import multiplied
from rich.console import Console
from torch import nn

from fedfmd.conv import CONVS, MIXINGS, DynamicConv2d
from fedfmd.conv import mixing as ways
from fedfmd.conv.native import compile_native, is_compiled
from fedfmd.memory import keep_freed
from fedfmd.models import MODELS, make_model

IMAGE_SIZE = 32
CLASSES = 10
PHASES = ("train", "update", "infer")
WARM_UP = 2
UNCOMPILED = "uncompiled"


@dataclass(frozen=True)
class Place:
    """Where and on what a variant is timed."""

    device: str
    precision: str
    arch: str
    batch: int

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class Variant:
    """A convolution with its number of kernels and its way of mixing them."""

    conv: str
    kernels: int
    mixing: str


STATIC = Variant("static", 1, "")


def variants(convs: list[str], kernels: int, mixings: list[str]) -> Iterator[Variant]:
    """The static network, then each convolution with one kernel and, for each way of mixing, with several."""
    yield STATIC
    for conv in convs:
        yield Variant(conv, 1, "auto")
        for mixing in mixings:
            if mixing != "multiplied" or conv == "odconv":
                yield Variant(conv, kernels, mixing)


def measure(place: Place, chosen: list[Variant], repeats: int) -> dict[tuple[Variant, str], list[float]]:
    """Seconds of each variant and phase by repetition; the variants of a convolution share one network."""
    steps = {
        (conv, kernels): make_steps(place, conv, kernels)
        for conv, kernels in dict.fromkeys((v.conv, v.kernels) for v in chosen)
    }
    seconds = defaultdict(list)
    for repetition in range(WARM_UP + repeats):
        for phase, variant in product(PHASES, chosen[:: (-1) ** repetition]):
            taken = steps[variant.conv, variant.kernels](phase, variant.mixing)
            if repetition >= WARM_UP:
                seconds[variant, phase].append(taken)
    return dict(seconds)


def make_steps(place: Place, conv: str, kernels: int) -> Callable[[str, str], float]:
    """A function that runs one step of a phase with a way of mixing and returns its seconds."""
    torch.manual_seed(0)
    model = make_model(place.arch, conv, CLASSES, kernels=kernels).to(place.device)
    dynamic = [layer for layer in model.modules() if isinstance(layer, DynamicConv2d)]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    images = torch.rand(place.batch, 3, IMAGE_SIZE, IMAGE_SIZE, device=place.device)
    labels = torch.randint(CLASSES, (place.batch,), device=place.device)
    seconds = cuda_seconds if place.device == "cuda" else cpu_seconds

    def differentiate() -> None:
        optimizer.zero_grad()
        with place.autocast():
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()

    def train() -> None:
        differentiate()
        optimizer.step()

    def infer() -> None:
        with torch.inference_mode(), place.autocast():
            model(images)

    def step(phase: str, mixing: str) -> float:
        ways.is_compiled = (lambda: False) if mixing == UNCOMPILED else is_compiled
        for layer in dynamic:
            layer.mixing = ways.AUTO if mixing == UNCOMPILED else mixing
        model.train(phase != "infer")
        first, run = {
            "train": (train, train),
            "update": (differentiate, optimizer.step),
            "infer": (infer, infer),
        }[phase]
        first()
        return seconds(run)

    return step


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def cuda_seconds(step: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def rows(place: Place, seconds: dict[tuple[Variant, str], list[float]]) -> Iterator[dict[str, object]]:
    """One row per variant and phase, with its ratios."""
    for (variant, phase), taken in seconds.items():
        grouped = seconds.get((replace(variant, mixing="grouped"), phase))
        yield {
            **asdict(place),
            "phase": phase,
            **asdict(variant),
            "ms": round(1000 * median(taken), 3),
            "to_static": ratio(taken, seconds[STATIC, phase]),
            "to_grouped": ratio(taken, grouped) if grouped else "",
        }


def ratio(seconds: list[float], others: list[float]) -> float:
    return round(median(one / other for one, other in zip(seconds, others, strict=True)), 3)


def print_table(place: Place, table_rows: list[dict[str, object]]) -> None:
    title = f"{place.arch}, batch {place.batch}, {place.device}, {place.precision}"
    own = [{name: row[name] for name in row if name not in asdict(place)} for row in table_rows]
    Console().print(table_of(own, title))


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    keep_freed()
    precisions = [("cpu", "float32")]
    if torch.cuda.is_available():
        precisions += [("cuda", "float32"), ("cuda", "bf16")]
    ways.PLAIN["multiplied"] = multiplied
    compile_native()
    chosen = list(variants(options.conv, options.kernels, options.mixing))
    options.out.unlink(missing_ok=True)
    for (device, precision), arch, batch in product(precisions, options.arch, options.batch):
        place = Place(device, precision, arch, batch)
        timed = list(rows(place, measure(place, chosen, options.repeats)))
        print_table(place, timed)
        write_rows(options.out, [about(device) | row for row in timed], extend=True)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dynamic = [conv for conv in CONVS if conv != STATIC.conv]
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["resnet8", "resnet18"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--conv", nargs="+", choices=dynamic, default=dynamic)
    mixings = [ways.AUTO, UNCOMPILED, *MIXINGS, ways.NATIVE, "multiplied"]
    parser.add_argument("--mixing", nargs="+", choices=mixings, default=mixings)
    parser.add_argument("--kernels", type=int, default=4, help="kernels per bank")
    parser.add_argument("--repeats", type=int, default=7, help="repetitions for each median")
    parser.add_argument("--out", type=Path, default=Path("models.csv"), help="CSV file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
