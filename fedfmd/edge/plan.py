"""Budgets → work plans: what a client is asked to do in a round, and the virtual seconds and joules it needs.

A round is download, compute, upload, one after another (FedScale, arXiv:2105.11367). Clients that miss the
deadline are ignored, and a discarded round keeps the model (Bonawitz et al., arXiv:1902.01046); a client may do fewer
local steps (FedProx, arXiv:1812.06127), or train fewer kernels of each bank, a sub-model as FedRolex
(arXiv:2212.01548) rolls its windows over a layer.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from fedfmd.cost import Cost, training_flops, training_memory
from fedfmd.edge.fleet import Client

PROBE_IMAGES = 256
"""Images, at most, on which a client sees which kernels it uses most before it trains these."""

KERNEL_CHOICES = ("rotation", "attention")


@dataclass(frozen=True)
class Policy:
    """What becomes of clients that can't do all the work within the budget; by default their update is lost.

    Attributes:
        waits: the budget is ignored: the server waits for the slowest.
        fewer_steps: a client does as many local steps as fit, at least one.
        fewer_kernels: a client trains and uploads fewer kernels of each bank, at least one.
    """

    waits: bool = False
    fewer_steps: bool = False
    fewer_kernels: bool = False


POLICIES: dict[str, Policy] = {
    "wait": Policy(waits=True),
    "drop": Policy(),
    "partial": Policy(fewer_steps=True),
    "kernels": Policy(fewer_kernels=True),
    "partial+kernels": Policy(fewer_steps=True, fewer_kernels=True),
}


@dataclass(frozen=True)
class Workload:
    """One client's full round: its shard, the model, and what travels.

    Attributes:
        images: size of the shard, at least 1.
        batch_size: images per local step; an epoch's last batch may be smaller.
        epochs: local epochs, at least 1.
        cost: the model's.
        payload_bytes: of the whole model on the wire, which the client receives.
        upload_bytes: of what it sends back after training 1, 2, … kernels of each bank.
        states: numbers that the optimiser keeps for each parameter.
    """

    images: int
    batch_size: int
    epochs: int
    cost: Cost
    payload_bytes: int
    upload_bytes: Sequence[int]
    states: int = 1

    def largest_batch(self, memory_bytes: float, kernels: int) -> int:
        """Images per step that a device can hold, up to `batch_size`; 0 if not even one."""
        free = memory_bytes - training_memory(self.cost, 0, kernels, self.states)
        return max(0, min(self.batch_size, self.images, int(free // self.cost.activation_bytes)))

    def steps(self, batch_size: int) -> int:
        """Local steps of the full round."""
        return self.epochs * math.ceil(self.images / batch_size)

    def examples(self, steps: int, batch_size: int) -> int:
        """Images that the first `steps` steps process."""
        return examples_of(self.images, steps, batch_size)


def examples_of(images: int, steps: int, batch_size: int) -> int:
    """Images that so many steps on a shard process: an epoch's full batches come before its short one."""
    epochs, rest = divmod(steps, math.ceil(images / batch_size))
    return epochs * images + rest * batch_size


@dataclass(frozen=True)
class Budget:
    """What every client may spend in a round, None being no limit, and whom the server waits for.

    Attributes:
        deadline_s: virtual seconds from the start of a round until the server stops waiting.
        energy_j: joules.
        up_bytes: bytes of the upload.
        policy: a name of `POLICIES`, or that of a user's own.
        kernels: for policies with fewer kernels, how many of each bank; 0: as many as fit.
        kernel_choice: a name of `KERNEL_CHOICES`: in turn, or those that the client's images use most.
        over_select: how many times the wanted clients are asked; only the first updates count.
        min_reports: share of the wanted clients below which the round is discarded.
        choose: the policy of a user's own.
    """

    deadline_s: float | None = None
    energy_j: float | None = None
    up_bytes: int | None = None
    policy: str = "partial"
    kernels: int = 0
    kernel_choice: str = "rotation"
    over_select: float = 1.0
    min_reports: float = 0.0
    choose: Choose | None = None

    def __post_init__(self) -> None:
        for setting, value, known in (
            ("policy", self.policy, POLICIES),
            ("kernel-choice", self.kernel_choice, KERNEL_CHOICES),
        ):
            if value not in known and not (setting == "policy" and self.choose):
                raise ValueError(f"budget.{setting} = {value!r} is unknown; known: {', '.join(known)}")
        for setting, limit, unit in (
            ("deadline-s", self.deadline_s, "seconds"),
            ("energy-j", self.energy_j, "joules"),
            ("up-bytes", self.up_bytes, "bytes"),
        ):
            if limit is not None and not limit > 0:
                raise ValueError(f"budget.{setting} = {limit} must be a positive number of {unit}")

    @property
    def rules(self) -> Policy:
        """The policy's; one of a user's own waits for nobody."""
        return POLICIES.get(self.policy, Policy())

    def asked(self, wanted: int) -> int:
        """How many clients to select where `wanted` updates are."""
        return _share_of(self.over_select, wanted)

    def needed(self, wanted: int) -> int:
        """How many of `wanted` updates must arrive, at least one, or the round is discarded."""
        return max(1, _share_of(self.min_reports, wanted))


def _share_of(share: float, count: int) -> int:
    """Return the share of a number, rounded up, but not for what binary fractions add: 1.1 · 10 are 11."""
    return math.ceil(round(share * count, 9))


@dataclass(frozen=True, kw_only=True)
class WorkPlan:
    """What a client is asked to do in a round, and what that costs on its device and link.

    Attributes:
        client: who is asked.
        latency_s: virtual seconds of inference for one image.
        kernels: kernels of each bank to train; the others stay frozen.
        batch_size: images per step, as many as the device can hold.
        steps: local steps to do; 0 if the client is unfit.
        full_steps, full_kernels: local steps and kernels of a round without limits; 0 if the client is unfit.
        examples: images that these steps process.
        train_flops: FLOPs of these steps, and of finding the kernels that its images use most.
        down_bytes, up_bytes: what it receives and sends.
        down_s, compute_s, up_s: virtual seconds.
        status: `ok`; `late`: it works, but its update is lost, as it comes too late or costs more than the
            budget; `unfit`: its device can't hold the training, so it isn't asked.
        reason: why it is not `ok`.
    """

    client: Client
    latency_s: float
    kernels: int = 0
    batch_size: int = 0
    steps: int = 0
    full_steps: int = 0
    full_kernels: int = 0
    examples: int = 0
    train_flops: int = 0
    down_bytes: int = 0
    up_bytes: int = 0
    down_s: float = 0.0
    compute_s: float = 0.0
    up_s: float = 0.0
    status: Literal["ok", "late", "unfit"] = "ok"
    reason: str = ""

    @property
    def is_cut(self) -> bool:
        """Whether the client does fewer steps, or trains fewer kernels, than without limits."""
        return self.steps < self.full_steps or self.kernels < self.full_kernels

    @property
    def total_s(self) -> float:
        """Virtual seconds from the start of the round until the server has the update."""
        return self.down_s + self.compute_s + self.up_s

    @property
    def energy_j(self) -> float:
        """Joules, at the device's power under load all the time: an upper bound for the transfers."""
        return self.client.device.power_w * self.total_s


Make = Callable[..., WorkPlan]
"""From steps and kernels, by default all that are possible, to the plan for them, at the device's nominal speed."""

Choose = Callable[[dict[str, Any]], object]
"""A policy of a user's own: gets `full`, the plan without limits, `plan`, a `Make`, and the client's `client`,
`workload` and `budget`; returns one of the plans."""


def plan_work(client: Client, workload: Workload, budget: Budget, speed: float = 1.0) -> WorkPlan:
    """Fit a client's round into its budget and predict what it costs.

    The plan is made for the device's nominal speed, as nobody foresees the round's. It is timed and judged at
    `speed` times that, so that a plan that fitted may come late.

    Of all that fits, the plan has the most images × kernels, and the most kernels among equals. If nothing
    fits, it has the fewest steps and kernels that the policy allows. A policy of a user's own chooses the plan, which
    is then judged as any other.

    Raises:
        ValueError: it chooses something else than one of the client's plans.
    """
    policy, device = budget.rules, client.device
    memory_bytes = device.memory_gb * 1e9
    counts = _kernel_counts(workload, budget)
    batches = {kernels: size for kernels in counts if (size := workload.largest_batch(memory_bytes, kernels))}
    if not batches:
        needed = training_memory(workload.cost, 1, counts[0], workload.states)
        return WorkPlan(
            client=client,
            latency_s=_latency(client, workload),
            status="unfit",
            reason=f"client {client.id} ({device.name}, {device.memory_gb:g} GB) can't hold the "
            f"{needed / 1e9:.3g} GB of training on single images: use a smaller model",
        )
    if budget.choose:
        best = _chosen(budget.choose, client, workload, budget, batches)
    else:
        plans = [_most_steps(client, workload, budget, kernels, size) for kernels, size in batches.items()]
        fitting = [plan for plan in plans if not _excess(plan, budget)]
        best = max(fitting, key=lambda plan: (plan.examples * plan.kernels, plan.kernels), default=plans[0])
    timed = replace(best, compute_s=best.compute_s / speed)
    if policy.waits or not (excess := _excess(timed, budget)):
        return timed
    return replace(timed, status="late", reason=f"client {client.id} ({device.name}) {excess}")


def _kernel_counts(workload: Workload, budget: Budget) -> Sequence[int]:
    """Return the numbers of kernels that a client may train, in rising order."""
    everything = range(1, workload.cost.kernels + 1)
    if budget.choose:
        return everything
    if not budget.rules.fewer_kernels:
        return everything[-1:]
    return [budget.kernels] if budget.kernels else everything


def _chosen(
    choose: Choose, client: Client, workload: Workload, budget: Budget, batches: Mapping[int, int]
) -> WorkPlan:
    """Return the plan that a policy of a user's own chooses; `batches` has the batch size by number of kernels."""

    def plan(steps: int | None = None, kernels: int | None = None) -> WorkPlan:
        held = max(batches) if kernels is None else _whole("kernels", kernels, max(batches), client)
        most = workload.steps(batches[held])
        taken = most if steps is None else _whole("steps", steps, most, client)
        return _work(client, workload, budget, held, batches[held], taken)

    chosen = choose({"full": plan(), "plan": plan, "client": client, "workload": workload, "budget": budget})
    if not isinstance(chosen, WorkPlan):
        raise ValueError(
            f"budget.policy = {budget.policy!r} must return a plan, full or plan(steps, kernels), and returned "
            f"a {type(chosen).__name__}"
        )
    return plan(chosen.steps, chosen.kernels)


def _whole(name: str, value: object, most: int, client: Client) -> int:
    """Return a number that a policy chose, which may be NumPy's, as Python's own, which rows and messages hold."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not 1 <= value <= most:
        raise ValueError(
            f"{name} = {value}: must be a whole number from 1 to {most} for client {client.id} ({client.device.name})"
        )
    return int(value)


def _most_steps(
    client: Client, workload: Workload, budget: Budget, kernels: int, batch_size: int
) -> WorkPlan:
    """Return the plan for so many kernels: all steps, or those that fit where the policy allows fewer, at least one."""

    def plan(steps: int) -> WorkPlan:
        return _work(client, workload, budget, kernels, batch_size, steps)

    full = workload.steps(batch_size)
    if not budget.rules.fewer_steps:
        return plan(full)
    fitting = bisect_left(range(1, full + 1), True, key=lambda steps: bool(_excess(plan(steps), budget)))
    return plan(max(1, fitting))


def _work(
    client: Client, workload: Workload, budget: Budget, kernels: int, batch_size: int, steps: int
) -> WorkPlan:
    """Return what this work costs, at the device's nominal speed."""
    device, bandwidth, cost = client.device, client.bandwidth, workload.cost
    examples = workload.examples(steps, batch_size)
    train_flops = examples * training_flops(cost, kernels)
    probed = budget.kernel_choice == "attention" and kernels < cost.kernels
    probe_flops = min(workload.images, PROBE_IMAGES) * cost.flops if probed else 0
    up_bytes = workload.upload_bytes[kernels - 1]
    return WorkPlan(
        client=client,
        latency_s=_latency(client, workload),
        kernels=kernels,
        batch_size=batch_size,
        steps=steps,
        full_steps=workload.steps(batch_size),
        full_kernels=cost.kernels,
        examples=examples,
        train_flops=train_flops + probe_flops,
        down_bytes=workload.payload_bytes,
        up_bytes=up_bytes,
        down_s=workload.payload_bytes * 8 / bandwidth.down_bps,
        compute_s=train_flops / (device.train_gflops * 1e9)
        + probe_flops / (device.infer_gflops * 1e9)
        + steps * device.step_s
        + device.round_s,
        up_s=up_bytes * 8 / bandwidth.up_bps,
    )


def _latency(client: Client, workload: Workload) -> float:
    return workload.cost.flops / (client.device.infer_gflops * 1e9)


def _excess(plan: WorkPlan, budget: Budget) -> str:
    """Return the first limit that the plan breaks and what it needs instead; "" if it keeps them all."""
    for setting, need, limit, unit in (
        ("deadline-s", plan.total_s, budget.deadline_s, "s"),
        ("energy-j", plan.energy_j, budget.energy_j, "J"),
        ("up-bytes", plan.up_bytes, budget.up_bytes, "bytes up"),
    ):
        if limit is not None and need > limit:
            shown = f"{need:.3f}" if isinstance(need, float) else str(need)
            return f"needs {shown} {unit} for {plan.steps} of {plan.full_steps} steps, budget.{setting} is {limit:g}"
    return ""


def keep_first(plans: Iterable[WorkPlan], wanted: int) -> list[WorkPlan]:
    """Return the plans, all but the first `wanted` that finish in time being late."""
    plans = list(plans)
    finishing = sorted((p for p in plans if p.status == "ok"), key=lambda p: (p.total_s, p.client.id))
    surplus = {plan.client.id for plan in finishing[wanted:]}
    reason = f"{wanted} updates came earlier (budget.over-select)"
    return [
        replace(plan, status="late", reason=reason) if plan.client.id in surplus else plan for plan in plans
    ]


def round_seconds(plans: Iterable[WorkPlan], budget: Budget, wanted: int) -> float:
    """Virtual seconds of a round: until `wanted` updates are there, or all clients are ready or out of time."""
    plans, deadline_s = list(plans), budget.deadline_s or math.inf
    in_time = [plan.total_s for plan in plans if plan.status == "ok"]
    if len(in_time) < wanted:
        in_time += [min(plan.total_s, deadline_s) for plan in plans if plan.status == "late"]
    return max(in_time, default=0.0)


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
