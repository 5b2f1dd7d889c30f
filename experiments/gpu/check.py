"""Compare what a GPU computes with the CPU in float64: layers, whole steps, batches and runs.

    python experiments/gpu/check.py --out runs/gpu

Layers: every convolution with 1 and 4 kernels, every way of mixing, every precision; the error is ‖a − b‖/‖b‖ of
the output, and the largest one of a gradient. The CPU mixes kernels by one grouped convolution, the usual code.
Steps: ResNet-8's logits, and what one step of SGD changes in the model. Runs: losses of `train` and `evaluate`.
Rows go to check.csv, one by one. The status is 1 if an error is above its limit or a case fails.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from common import (
    OUT_OF_TIME,
    PRECISIONS,
    Deadline,
    Table,
    device_of,
    free,
    parser,
    placed,
    precisions_of,
    set_mixing,
    synthetic,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parameters_to_vector

from fedfmd.conv import CONVS, MIXINGS, make_conv
from fedfmd.conv.mixing import AUTO
from fedfmd.data import Dataset, batches
from fedfmd.models import make_model
from fedfmd.training import PRECISIONS as PRECISION_SETTINGS
from fedfmd.training import Evaluation, LocalSGD, TrainResult, evaluate, train

REFERENCE = "grouped"
KERNELS = (1, 4)
TEMPERATURE = 3.0  # low enough for kernels to weigh differently
RUN_STEPS = 30

# Largest errors that pass, of outputs and of gradients: a few times those of the CPU, for TF32 those of fp16, which
# has as many digits. In a step, a ReLU whose input changes sign by rounding changes gradients by far more than that.
LIMITS = {
    ("layer", "fp32"): (1e-5, 3e-4),
    ("layer", "tf32"): (5e-3, 2e-2),
    ("layer", "bf16"): (2e-2, 6e-2),
    ("step", "fp32"): (1e-4, 1e-2),
    ("step", "tf32"): (1e-2, 2e-1),
    ("step", "bf16"): (5e-2, 5e-1),
    ("batches", "fp32"): (1e-5, 0.0),
    ("run", "float32"): (5e-2, 5e-2),
    ("run", "bf16"): (1e-1, 1e-1),
}

Values = Mapping[str, Tensor]
"""What a case computes, in float64 on the CPU: "output" and the gradients or changes by name."""

Errors = tuple[float, dict[str, float]]
"""Of the output, and of all else by name."""


@dataclass(frozen=True)
class Shape:
    """A convolution and its images."""

    channels: int = 16
    out_channels: int = 24
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: int = 12
    batch: int = 6
    channels_last: bool = False


SHAPES = {
    "3x3": Shape(),
    "one image": Shape(batch=1),
    "strided": Shape(stride=(2, 2)),
    "1x1": Shape(kernel=(1, 1), padding=(0, 0)),
    "uneven": Shape(kernel=(5, 3), stride=(2, 1), padding=(2, 0), dilation=(1, 2)),
    "grouped": Shape(groups=4),
    "depthwise": Shape(channels=16, out_channels=16, groups=16),
    "channels last": Shape(channels_last=True),
    "wide": Shape(channels=256, out_channels=512, stride=(2, 2), size=8),  # several blocks and tiles
}


@dataclass(frozen=True)
class Case:
    """One comparison: what is compared, and how to find the errors of outputs and of gradients by name."""

    what: str
    case: str
    conv: str
    kernels: int
    mixing: str
    precision: str
    errors: Callable[[], Errors]


def relative(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖; 0 where both are 0."""
    off = float((actual - expected).norm())
    return off and off / float(expected.norm())


def compare(actual: Values, expected: Values) -> Errors:
    """Return the error of the output, and those of all else by name."""
    if actual.keys() != expected.keys():
        raise ValueError(f"values of {sorted(actual.keys() ^ expected.keys())} on one side only")
    errors = {name: relative(actual[name], value) for name, value in expected.items()}
    return errors.pop("output"), errors


def layer_cases(shapes: Mapping[str, Shape], device: str) -> Iterator[Case]:
    for (name, shape), (conv, kernels) in product(shapes.items(), networks()):
        torch.manual_seed(0)
        layer = make_conv(
            *(conv, shape.channels, shape.out_channels, shape.kernel, shape.stride, shape.padding),
            *(shape.dilation, shape.groups),
            kernels=kernels,
            temperature=TEMPERATURE,
            mixing=REFERENCE,
        )
        for parameter in layer.parameters():
            if parameter.dim() == 1:  # biases start at zero
                nn.init.normal_(parameter, 0.5, 0.3)
        # Numbers that bf16 has, so that only what the layer rounds is compared.
        x = torch.randn(shape.batch, shape.channels, shape.size, shape.size).bfloat16().float()
        weights = torch.randn_like(layer(x)).bfloat16()
        expected = layer_values(layer, x, weights, shape, "fp32", "cpu", torch.double)
        mixings = [""] if conv == "static" else [AUTO, *MIXINGS]
        for mixing, precision in product(mixings, precisions_of(device, *PRECISIONS)):
            given = replaced_mixing(layer, mixing), x, weights, shape, precision, device
            yield Case(
                "layer", name, conv, kernels, mixing, precision, partial(off, layer_values, given, expected)
            )


def replaced_mixing(layer: nn.Module, mixing: str) -> nn.Module:
    """Return a copy of the layer that mixes in that way."""
    layer = copy.deepcopy(layer)
    set_mixing(layer, mixing)
    return layer


def off(values: Callable[..., Values], given: tuple[Any, ...], expected: Values) -> Errors:
    """Compute values, and return their errors."""
    return compare(values(*given), expected)


def layer_values(
    layer: nn.Module,
    x: Tensor,
    weights: Tensor,
    shape: Shape,
    precision: str,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Values:
    """Return output and gradients of Σ weights · layer(x)."""
    layer, x = copy.deepcopy(layer).to(device, dtype), x.to(device, dtype, copy=True)
    if shape.channels_last:
        layer, x = (it.to(memory_format=torch.channels_last) for it in (layer, x))
    x.requires_grad_()
    with PRECISIONS[precision].flags():
        with PRECISIONS[precision].autocast(device):
            y = layer(x)
        y.backward(weights.to(device, y.dtype))
    gradients = {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return on_cpu({"output": y, "input": x.grad} | gradients)


def step_cases(size: int, batch: int, device: str) -> Iterator[Case]:
    images, labels = torch.randn(batch, 3, size, size), torch.arange(batch) % 10
    for conv, kernels in networks():
        torch.manual_seed(0)
        model = make_model("resnet8", conv, 10, kernels=kernels, temperature=TEMPERATURE)
        expected = step_values(model, images, labels, "fp32", "cpu", torch.double)
        for precision in precisions_of(device, *PRECISIONS):
            given = model, images, labels, precision, device
            yield Case(
                "step", "resnet8", conv, kernels, AUTO, precision, partial(off, step_values, given, expected)
            )


def step_values(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    precision: str,
    device: str,
    dtype: torch.dtype = torch.float32,
) -> Values:
    """Return the logits, and what a step of SGD changes: all parameters as one vector, and all buffers.

    One by one, some gradients are 0 but for rounding: those of a bias before a normalisation.
    """
    model = copy.deepcopy(model).to(device, dtype).train()
    before = states(model)
    optimiser = LocalSGD(lr=0.1, nesterov=True).optimiser(model.parameters())
    with PRECISIONS[precision].flags():
        with PRECISIONS[precision].autocast(device):
            logits = model(images.to(device, dtype))
            loss = cross_entropy(logits, labels.to(device))
        loss.backward()
        optimiser.step()
    after = states(model)
    return on_cpu({"output": logits}) | {name: after[name] - before[name] for name in after}


def states(model: nn.Module) -> Values:
    """Return the model's parameters and its buffers, each as one vector."""
    kinds = {"parameters": model.parameters(), "buffers": model.buffers()}
    return on_cpu({name: parameters_to_vector(t.detach() for t in kind) for name, kind in kinds.items()})


def batch_cases(dataset: Dataset, device: str) -> Iterator[Case]:
    for place in dict.fromkeys(("cpu", device)):
        given = placed(dataset, place)
        yield Case(
            "batches", f"images on {place}", "", 0, "", "fp32", partial(pass_errors, dataset, given, device)
        )


def pass_errors(dataset: Dataset, given: Dataset, device: str) -> Errors:
    """Compare a pass on the device with one on the CPU."""
    inputs, labels = one_pass(given, device)
    expected, expected_labels = one_pass(dataset, "cpu")
    return relative(inputs, expected), {"labels": float(not torch.equal(labels, expected_labels))}


def one_pass(dataset: Dataset, device: str) -> tuple[Tensor, Tensor]:
    """Return the inputs and labels of a pass made on the device, with augmentation."""
    generator = torch.Generator().manual_seed(0)
    passed = batches(
        dataset.train,
        32,
        generator=generator,
        augment=dataset.augment,
        mean=dataset.mean,
        std=dataset.std,
        device=device,
    )
    inputs, labels = zip(*passed, strict=True)
    return torch.cat(inputs).cpu().double(), torch.cat(labels).cpu()


def run_cases(dataset: Dataset, device: str) -> Iterator[Case]:
    for conv, precision in product(("static", "odconv", "fmdconv"), PRECISION_SETTINGS):
        case = partial(run_errors, dataset, conv, precision, device)
        yield Case("run", f"resnet8, {RUN_STEPS} steps", conv, 4, AUTO, precision, case)


def run_errors(dataset: Dataset, conv: str, precision: str, device: str) -> Errors:
    """Compare the losses of a run on the device with those on the CPU; it must have learnt something."""
    before, trained, after = one_run(dataset, conv, precision, device)
    _, expected_trained, expected_after = one_run(dataset, conv, precision, "cpu")
    if not after.loss < before.loss:
        raise ValueError(f"the loss went from {before.loss:.4f} to {after.loss:.4f}: nothing learnt")
    training = abs(trained.loss / expected_trained.loss - 1)
    return abs(after.loss / expected_after.loss - 1), {"training loss": training}


def one_run(
    dataset: Dataset, conv: str, precision: str, device: str
) -> tuple[Evaluation, TrainResult, Evaluation]:
    """Evaluate, train and evaluate, with PyTorch's switches as they are in a run of the project."""
    torch.manual_seed(0)
    model = make_model("resnet8", conv, dataset.classes, width=0.5, norm="group").to(device)
    here = placed(dataset, device)
    test = partial(evaluate, model, here.test, here, device=device)
    sgd = LocalSGD(lr=0.02, batch_size=32, precision=precision)
    generator = torch.Generator().manual_seed(0)
    return test(), train(model, here.train, here, sgd, RUN_STEPS, generator, device), test()


def networks() -> Iterator[tuple[str, int]]:
    """Every convolution with its numbers of kernels."""
    return ((conv, kernels) for conv in CONVS for kernels in ((1,) if conv == "static" else KERNELS))


def on_cpu(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", torch.double, copy=True) for name, value in values.items()}


def row_of(case: Case, deadline: Deadline) -> dict[str, object]:
    """Run a case; a failure is a row too."""
    limits = LIMITS[case.what, case.precision]
    output, worst, gradient, note = math.nan, "", math.nan, ""
    if deadline.passed:
        note = f"{OUT_OF_TIME}, nor was what follows"
    else:
        try:
            output, errors = case.errors()
            # NaN is larger than all numbers here
            worst, gradient = max(errors.items(), key=lambda e: math.inf if math.isnan(e[1]) else e[1])
        except Exception as error:  # the next cases may pass
            note = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return {
        "what": case.what,
        "case": case.case,
        "conv": case.conv,
        "kernels": case.kernels or "",
        "mixing": case.mixing,
        "precision": case.precision,
        "output": f"{output:.3g}",
        "gradient": f"{gradient:.3g}",
        "worst": worst,
        "output_limit": limits[0],
        "gradient_limit": limits[1],
        "ok": output <= limits[0] and gradient <= limits[1],
        "note": note,
    }


def all_cases(toy: bool, device: str) -> Iterator[Case]:
    shapes = {name: replace(s, size=8, batch=min(s.batch, 3)) for name, s in SHAPES.items() if name != "wide"}
    yield from layer_cases(shapes if toy else SHAPES, device)
    yield from step_cases(*((16, 8) if toy else (32, 32)), device)
    dataset = synthetic(256, 128, size=16)
    yield from batch_cases(dataset, device)
    yield from run_cases(dataset, device)


def main(arguments: list[str] | None = None) -> int:
    options = parser(__doc__).parse_args(arguments)
    device, deadline = device_of(options), Deadline.after(options.seconds)
    counts = {True: 0, False: 0}
    with Table(options.out / "check.csv", device) as table:
        for case in all_cases(options.toy, device):
            row = row_of(case, deadline)
            table.append(row)
            counts[row["ok"]] += 1
            if deadline.passed and row["note"]:
                break
    free(device)
    print(f"check: {counts[True]} cases passed, {counts[False]} did not")
    return int(counts[False] > 0)


if __name__ == "__main__":
    sys.exit(main())
