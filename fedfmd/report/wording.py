"""What displays and reports say of federated and of centralised runs, where the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """A cost that accuracy is drawn against and that groups are ranked for; `label` is what stands at the axis."""

    name: str
    unit: str
    label: str


@dataclass(frozen=True)
class Wording:
    """How one speaks of runs of one kind.

    Attributes:
        unit: what their rows are: rounds or epochs.
        figures: the fields of a `Group`, and `target` those of its `Target`, that such runs can have.
        costs: what runs spend, by its name in `fedfmd.report.costs`; the first one counts rounds or epochs.
        over: what `curves.png` shows, in a title.
        seconds: which seconds are meant.
        latency: which latency is meant.
        response: which times stand for the response time of IES and RCS.
    """

    unit: str
    figures: tuple[str, ...]
    target: tuple[str, ...]
    costs: Mapping[str, Axis]
    over: str
    seconds: str
    latency: str
    response: str


WORDINGS = {
    "federated": Wording(
        unit="round",
        figures=(
            *(
                "final",
                "best",
                "validation",
                "worst_clients",
                *("client_test", "client_test_spread", "client_test_worst"),
                *("personal_test", "personal_test_spread", "personal_test_worst"),
                "virtual_s",
                "gflops",
                "mb",
                "energy_kj",
                "cut",
            ),
            *("latency_ms", "ies_infer_ms", "rcs_infer", "ies_train_s", "rcs_train", "kernel_entropy"),
            "epsilon",
        ),
        target=("virtual_s", "gflops", "mb"),
        costs={
            "round": Axis("rounds", "rounds", "round"),
            "virtual_s": Axis("virtual time", "s", "virtual time (s)"),
            "mb": Axis("bytes", "MB", "bytes up and down (MB)"),
            "energy_kj": Axis("energy", "kJ", "energy of all clients (kJ)"),
            "gflops": Axis("compute", "GFLOPs", "training compute of all clients (GFLOPs)"),
        },
        over="rounds, time and compute",
        seconds="Seconds are those that the modelled devices and links would need: computing takes its multiply-"
        "accumulates at the rate that a device reaches with the convolution and its kernels, unless "
        "fleet.efficiency is none.",
        latency="modelled latency (mean over the fleet)",
        response="The response time is the latency per image, or in training the virtual seconds of the last round.",
    ),
    "centralised": Wording(
        unit="epoch",
        figures=(
            *("final", "best", "validation", "top5_final", "top5_best", "epoch_s", "train_s", "gflops"),
            *("latency_ms", "ies_infer_ms", "rcs_infer", "ies_train_s", "rcs_train", "kernel_entropy"),
        ),
        target=("train_s", "gflops"),
        costs={
            "round": Axis("epochs", "epochs", "epoch"),
            "train_s": Axis("time", "s", "training time (s)"),
            "gflops": Axis("compute", "GFLOPs", "training compute (GFLOPs)"),
        },
        over="epochs, time and compute",
        seconds="Seconds are those of training, measured on the machine that ran it, without evaluation.",
        latency="measured latency",
        response="The response time is the latency per image, or in training the seconds of the last epoch, as in "
        "the FMDConv paper.",
    ),
}
"""By kind of run."""
