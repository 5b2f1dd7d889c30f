"""What displays and reports say of federated and of centralised runs, where the two differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """How one speaks of runs of one kind.

    Attributes:
        unit: what their rows are: rounds or epochs.
        figures: the fields of a `Group`, and `target` those of its `Target`, that such runs can have.
        curves: columns of the runs' rows that accuracy is drawn against; like the next two, with labels. The
            first one counts rounds or epochs.
        fronts: costs of a group that its accuracy is weighed against.
        scores: fields of a group with IES and RCS.
        over: what the curves show, in a title.
        seconds: which seconds are meant.
        latency: which latency is meant.
        response: which times stand for the response time of IES and RCS.
    """

    unit: str
    figures: tuple[str, ...]
    target: tuple[str, ...]
    curves: Mapping[str, str]
    fronts: Mapping[str, str]
    scores: Mapping[str, str]
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
        curves={
            "round": "round",
            "virtual_s": "virtual time (s)",
            "cum_train_flops": "training compute of all clients (FLOP)",
        },
        fronts={
            "virtual_s": "virtual time of the run (s)",
            "gflops": "training compute of the run (GFLOPs)",
            "mb": "bytes up and down in the run (MB)",
            "latency_ms": "modelled latency per image (ms)",
        },
        scores={
            "ies_infer_ms": "IES, inference (ms) – lower is better",
            "rcs_infer": "RCS, inference (correct/s) – higher is better",
            "ies_train_s": "IES, training round (s) – lower is better",
            "rcs_train": "RCS, training round (1/s) – higher is better",
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
        curves={
            "epoch": "epoch",
            "cum_wall_s": "training time (s)",
            "cum_train_flops": "training compute (FLOP)",
        },
        fronts={
            "train_s": "training time of the run (s)",
            "gflops": "training compute of the run (GFLOPs)",
            "latency_ms": "measured latency per image (ms)",
        },
        scores={
            "ies_infer_ms": "IES, inference (ms) – lower is better",
            "rcs_infer": "RCS, inference (correct/s) – higher is better",
            "ies_train_s": "IES, training epoch (s) – lower is better",
            "rcs_train": "RCS, training epoch (1/s) – higher is better",
        },
        over="epochs, time and compute",
        seconds="Seconds are those of training, measured on the machine that ran it, without evaluation.",
        latency="measured latency",
        response="The response time is the latency per image, or in training the seconds of the last epoch, as in "
        "the FMDConv paper.",
    ),
}
"""By kind of run."""
