"""Budgets → work plans: what a client is asked to do in a round, and the virtual seconds and joules it needs.

A round is download, compute, upload, one after another (FedScale, arXiv:2105.11367); clients that miss the
deadline are ignored (Bonawitz et al., arXiv:1902.01046) or do fewer local steps (FedProx, arXiv:1812.06127).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from fedfmd.edge.fleet import Client

PROBE_IMAGES = 256
"""Images, at most, on which a client sees which kernels it uses most before it trains these."""


@dataclass(frozen=True)
class Workload:
    """One client's full round, as counted from its shard and from the model.

    Attributes:
        images: size of the shard, at least 1.
        batch_size: images per local step; an epoch's last batch may be smaller.
        epochs: local epochs, at least 1.
        train_flops_per_image: FLOPs of forward and backward.
        infer_flops_per_image: FLOPs of forward.
        down_bytes: what the client receives.
        up_bytes: what it sends back.
        memory_bytes: what training holds at once (parameters, gradients, optimiser, activations).
    """

    images: int
    batch_size: int
    epochs: int
    train_flops_per_image: int
    infer_flops_per_image: int
    down_bytes: int
    up_bytes: int
    memory_bytes: int

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch, the short last one included."""
        return math.ceil(self.images / self.batch_size)

    @property
    def steps(self) -> int:
        """Local steps of the full round."""
        return self.epochs * self.steps_per_epoch

    def examples(self, steps: int) -> int:
        """Images that the first `steps` steps process: an epoch's full batches come before its short one."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.images + rest * self.batch_size


@dataclass(frozen=True)
class Budget:
    """What every client may spend in a round.

    Attributes:
        deadline_s: virtual seconds from the start of a round until the server stops waiting; None: no limit.
        policy: a name of `POLICIES`: what happens to clients that can't do all the work by the deadline.
    """

    deadline_s: float | None = None
    policy: str = "partial"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"budget.policy = {self.policy!r} is unknown; known: {', '.join(POLICIES)}")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"budget.deadline-s = {self.deadline_s} must be a positive number of seconds")


@dataclass(frozen=True)
class WorkPlan:
    """What a client is asked to do in a round, and what that costs on its device and link.

    Attributes:
        client: who is asked.
        steps: local steps to do; 0 if the client is unfit.
        full_steps: local steps of a round without limits.
        examples: images that these steps process.
        train_flops: FLOPs of these steps.
        down_s, compute_s, up_s: virtual seconds.
        energy_j: joules, at the device's power under load all the time: an upper bound for the transfers.
        latency_s: virtual seconds of inference for one image.
        status: `ok`; `late`: it works, but its update comes after the deadline and is lost; `unfit`: its
            device can't hold the training, so it isn't asked.
        reason: why it is not `ok`.
    """

    client: Client
    steps: int
    full_steps: int
    examples: int
    train_flops: int
    down_s: float
    compute_s: float
    up_s: float
    energy_j: float
    latency_s: float
    status: Literal["ok", "late", "unfit"] = "ok"
    reason: str = ""

    @property
    def total_s(self) -> float:
        """Virtual seconds from the start of the round until the server has the update."""
        return self.down_s + self.compute_s + self.up_s


Policy = Callable[[Client, Workload, float], WorkPlan]
"""(client, its full workload, deadline in seconds or inf) → plan."""


def _wait(client: Client, workload: Workload, _deadline_s: float) -> WorkPlan:
    """All the work; the server waits for the slowest."""
    return _work(client, workload, workload.steps)


def _drop(client: Client, workload: Workload, deadline_s: float) -> WorkPlan:
    """All the work; a late update is lost."""
    return _judged(_work(client, workload, workload.steps), deadline_s)


def _partial(client: Client, workload: Workload, deadline_s: float) -> WorkPlan:
    """As many steps as fit, at least one; if not even that fits, the update is lost."""
    in_time = bisect_right(
        range(1, workload.steps + 1), deadline_s, key=lambda steps: _work(client, workload, steps).total_s
    )
    return _judged(_work(client, workload, max(1, in_time)), deadline_s)


POLICIES: dict[str, Policy] = {"wait": _wait, "drop": _drop, "partial": _partial}


def plan_work(client: Client, workload: Workload, budget: Budget) -> WorkPlan:
    """Fit a client's round into its budget and predict what it costs."""
    device = client.device
    if workload.memory_bytes > device.memory_gb * 1e9:
        return replace(
            _work(client, workload, 0),
            down_s=0.0,
            up_s=0.0,
            energy_j=0.0,
            status="unfit",
            reason=f"client {client.id} ({device.name}, {device.memory_gb:g} GB) can't hold the "
            f"{workload.memory_bytes / 1e9:.3g} GB of training: use a smaller model or train.batch-size",
        )
    deadline_s = math.inf if budget.deadline_s is None else budget.deadline_s
    return POLICIES[budget.policy](client, workload, deadline_s)


def _work(client: Client, workload: Workload, steps: int) -> WorkPlan:
    """The plan of `steps` steps, whatever the budget."""
    device, bandwidth = client.device, client.bandwidth
    examples = workload.examples(steps)
    train_flops = examples * workload.train_flops_per_image
    down_s = workload.down_bytes * 8 / bandwidth.down_bps
    compute_s = train_flops / (device.train_gflops * 1e9)
    up_s = workload.up_bytes * 8 / bandwidth.up_bps
    return WorkPlan(
        client=client,
        steps=steps,
        full_steps=workload.steps,
        examples=examples,
        train_flops=train_flops,
        down_s=down_s,
        compute_s=compute_s,
        up_s=up_s,
        energy_j=device.power_w * (down_s + compute_s + up_s),
        latency_s=workload.infer_flops_per_image / (device.infer_gflops * 1e9),
    )


def _judged(plan: WorkPlan, deadline_s: float) -> WorkPlan:
    """The plan, marked late if it doesn't meet the deadline."""
    if plan.total_s <= deadline_s:
        return plan
    client = plan.client
    reason = (
        f"client {client.id} ({client.device.name}) needs {plan.total_s:.3f} s "
        f"for {plan.steps} of {plan.full_steps} steps, budget.deadline-s is {deadline_s:g}"
    )
    return replace(plan, status="late", reason=reason)


def round_seconds(plans: Iterable[WorkPlan], budget: Budget) -> float:
    """Virtual seconds of a round: until the slowest update is there, or the deadline if one is late."""
    seconds = 0.0
    for plan in plans:
        if plan.status == "late" and budget.deadline_s is not None:
            return budget.deadline_s
        if plan.status == "ok":
            seconds = max(seconds, plan.total_s)
    return seconds


def deal_out(plans: Iterable[WorkPlan], nodes: int) -> list[list[WorkPlan]]:
    """Deal plans out to `nodes` workers so that all are busy equally long; each list is ordered by client id.

    Longest processing time first (Graham, 1969). A worker does the plan's FLOPs at its own speed, so they are
    what its time follows, not the virtual seconds of the modelled device.
    """
    hands: list[list[WorkPlan]] = [[] for _ in range(nodes)]
    loads = [0] * nodes
    for plan in sorted(plans, key=lambda plan: (-plan.train_flops, plan.client.id)):
        node = loads.index(min(loads))
        hands[node].append(plan)
        loads[node] += plan.train_flops
    return [sorted(hand, key=lambda plan: plan.client.id) for hand in hands]
