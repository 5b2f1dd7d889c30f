"""Compare training that is replayed from CUDA graphs with kernels that are launched one by one: numbers and time.

    python experiments/gpu/graphs.py --out runs/gpu
    python experiments/gpu/graphs.py --out runs/gpu --compiled

Both train the same network from the same start on the same batches, images on the GPU. `loss` is the mean loss while
training, whose relative difference must stay below `LIMIT`: cuDNN may add up in another order. Rows go to graphs.csv;
the first steps, in which graphs are captured, are not in `step_ms`. With --compiled, training by the code that
torch.compile makes takes the place of graphs, and rows go to compiled.csv. The status is 1 if a network fails or
differs.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from itertools import product

import torch
from common import (
    OUT_OF_TIME,
    Deadline,
    Failure,
    Table,
    device_of,
    free,
    parser,
    placed,
    synchronise,
    synthetic,
)

from fedfmd.data import Dataset
from fedfmd.models import make_model
from fedfmd.training import PRECISIONS, Compute, LocalSGD, compute_gradients, train
from fedfmd.training.compiled import Compiled
from fedfmd.training.graphs import LAUNCHED, Graphs, capture_on_gpu

LIMIT = 2e-2
STEPS, WARM_UP = 50, LAUNCHED + 2
CONVS = (("static", 1), ("fmdconv", 1), ("fmdconv", 4), ("odconv", 1), ("odconv", 4))


@dataclass(frozen=True)
class Case:
    """A network, and how it is trained."""

    arch: str
    conv: str
    kernels: int
    batch: int
    precision: str


def cases(toy: bool) -> list[Case]:
    """Return the comparisons, the most telling first."""
    if toy:
        return [Case("resnet8", "fmdconv", 4, 2, "float32")]
    shapes = product(("resnet8", "resnet18"), PRECISIONS)
    return [Case(arch, *conv, 32, precision) for arch, precision in shapes for conv in CONVS]


def trained(case: Case, compute: Compute, dataset: Dataset, steps: int, device: str) -> tuple[float, float]:
    """Return the mean loss while training, and the milliseconds of a step."""
    torch.manual_seed(0)
    model = make_model(case.arch, case.conv, dataset.classes, kernels=case.kernels, norm="group").to(device)
    sgd = LocalSGD(lr=0.01, batch_size=case.batch, precision=case.precision)
    optimiser = sgd.optimiser(model.parameters())

    def go_on(steps: int, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed)
        return train(
            model, dataset.train, dataset, sgd, steps, generator, device, optimiser, compute=compute
        ).loss

    go_on(WARM_UP, seed=0)
    synchronise(device)
    started = time.perf_counter()
    loss = go_on(steps, seed=1)
    synchronise(device)
    return loss, 1000 * (time.perf_counter() - started) / steps


def replaying(device: str) -> Compute:
    """Compute gradients from graphs; a toy has none, and launches."""
    return compute_gradients if device == "cpu" else Graphs(capture_on_gpu(torch.device(device)))


def compiling(device: str) -> Compute:
    """Compute gradients by compiled code; a toy's network is traced, and its graph run as it is."""
    return Compiled("eager" if device == "cpu" else "inductor")


WAYS = {"replayed": replaying, "compiled": compiling}
"""What is compared with kernels that are launched one by one."""


def compared(case: Case, way: str, dataset: Dataset, steps: int, device: str) -> dict[str, object]:
    """Return the columns of a row."""
    loss, step_ms = trained(case, compute_gradients, dataset, steps, device)
    other, other_ms = trained(case, WAYS[way](device), dataset, steps, device)
    off = abs(other / loss - 1)
    status = "ok" if off <= LIMIT else f"failed: losses differ by {off:.2g}"
    figures = f"{step_ms:.4g}", f"{other_ms:.4g}", f"{step_ms / other_ms:.2f}", f"{loss:.6g}", f"{other:.6g}"
    return dict(zip(names(way), (*figures, status), strict=True))


def names(way: str) -> tuple[str, ...]:
    """Return the columns' names."""
    return "step_ms", f"{way}_ms", "speed_up", "loss", f"{way}_loss", "status"


def main(arguments: list[str] | None = None) -> int:
    asked = parser(__doc__)
    asked.add_argument("--compiled", action="store_true", help="compare compiled code in the place of graphs")
    options = asked.parse_args(arguments)
    device, deadline = device_of(options), Deadline.after(options.seconds)
    part, way = ("compiled", "compiled") if options.compiled else ("graphs", "replayed")
    size, steps = (8, 4) if options.toy else (32, STEPS)
    dataset = placed(synthetic(64 * size, 40, size=size), device)
    failed, todo = 0, cases(options.toy)
    with Table(options.out / f"{part}.csv", device) as table:
        for case in todo:
            columns: dict[str, object] = dict.fromkeys(names(way), "")
            try:
                columns |= (
                    {"status": OUT_OF_TIME}
                    if deadline.passed
                    else compared(case, way, dataset, steps, device)
                )
            except Exception as error:  # the others may do
                columns["status"] = Failure(error)
            table.append(asdict(case) | columns)
            failed += str(columns["status"]).startswith("failed")
            free(device)
    print(f"{part}: {len(todo)} networks, {failed} failures")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
