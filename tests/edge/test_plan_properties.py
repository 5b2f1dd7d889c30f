"""What holds for the work plans of any device, workload and budget."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfmd.cost import Cost, training_flops
from fedfmd.edge import KERNEL_CHOICES, POLICIES, Bandwidth, Budget, Client, Device, Workload, plan_work

MANY = 10**9
LIMITS = ("deadline_s", "energy_j", "up_bytes")


@st.composite
def clients(draw):
    device = Device(
        "board",
        train_gflops=draw(st.floats(1, 50)),
        infer_gflops=draw(st.floats(1, 50)),
        memory_gb=draw(st.floats(0.002, 0.03)),  # from none at all to a full batch
        power_w=draw(st.floats(0.5, 10)),
        source="made up",
        step_s=draw(st.floats(0, 0.5)),
        round_s=draw(st.floats(0, 2)),
    )
    return Client(0, device, Bandwidth(draw(st.floats(2e5, 4e6)), draw(st.floats(2e5, 4e6))))


@st.composite
def workloads(draw):
    kernels = draw(st.integers(1, 4))
    cost = Cost(
        params=250_000,
        bytes=10**6,
        macs_by_kind={"convolution": 500_000_000},
        activation_bytes=10**6,
        kernels=kernels,
        kernel_params=50_000 if kernels > 1 else 0,
        kernel_gradient_macs=draw(st.integers(0, 100_000_000)) if kernels > 1 else 0,
    )
    return Workload(
        images=draw(st.integers(1, 40)),
        batch_size=draw(st.integers(1, 16)),
        epochs=draw(st.integers(1, 3)),
        cost=cost,
        payload_bytes=10**6,
        upload_bytes=[10**6 - 200_000 * (kernels - trained) for trained in range(1, kernels + 1)],
    )


budgets = st.builds(
    Budget,
    deadline_s=st.none() | st.floats(1, 60),
    energy_j=st.none() | st.floats(1, 500),
    up_bytes=st.none() | st.integers(10**5, 10**6),
    policy=st.sampled_from(sorted(POLICIES)),
    kernel_choice=st.sampled_from(KERNEL_CHOICES),
)


def keeps(budget, *spent):
    return all(
        getattr(budget, limit) is None or need <= getattr(budget, limit)
        for limit, need in zip(LIMITS, spent, strict=True)
    )


@pytest.mark.parametrize("limit", LIMITS)
@given(client=clients(), workload=workloads(), budget=budgets, less=st.integers(10**5, 10**6))
def test_a_larger_budget_never_gives_less(limit, client, workload, budget, less):
    """Less is half of the budget, or a limit where there is none."""
    allowed = getattr(budget, limit)
    tight = replace(budget, **{limit: max(allowed // 2, 1) if allowed else less / 10**4})
    small, large = plan_work(client, workload, tight), plan_work(client, workload, budget)
    policy = POLICIES[budget.policy]
    assert (small.status == "unfit") == (large.status == "unfit")  # a matter of memory
    if small.status == "ok":
        assert large.status == "ok"
        assert large.examples * large.kernels >= small.examples * small.kernels
        if not policy.fewer_kernels:
            assert large.steps >= small.steps
        if not policy.fewer_steps:
            assert large.kernels >= small.kernels
    if policy.waits:
        assert small == large


@given(client=clients(), workload=workloads(), budget=budgets)
def test_a_plan_keeps_all_limits_unless_it_is_late_or_waited_for(client, workload, budget):
    plan = plan_work(client, workload, budget)
    kept = keeps(budget, plan.total_s, plan.energy_j, plan.up_bytes)
    if plan.status == "ok":
        assert kept or budget.policy == "wait"
    if plan.status == "late":
        assert not kept
    assert bool(plan.reason) == (plan.status != "ok")


@given(client=clients(), workload=workloads(), budget=budgets)
def test_of_all_that_fits_a_plan_has_the_most_work(client, workload, budget):
    """Every number of steps and kernels that the policy allows is tried; seconds are counted by the definition."""
    policy, device = POLICIES[budget.policy], client.device
    most = 0
    for kernels in range(1 if policy.fewer_kernels else workload.cost.kernels, workload.cost.kernels + 1):
        batch = workload.largest_batch(device.memory_gb * 1e9, kernels)
        if not batch:
            continue
        sizes = [min(batch, workload.images - start) for start in range(0, workload.images, batch)]
        sizes *= workload.epochs
        up_bytes = workload.upload_bytes[kernels - 1]
        probed = budget.kernel_choice == "attention" and kernels < workload.cost.kernels
        for steps in range(1 if policy.fewer_steps else len(sizes), len(sizes) + 1):
            images = sum(sizes[:steps])
            seconds = (
                8 * workload.payload_bytes / client.bandwidth.down_bps
                + 8 * up_bytes / client.bandwidth.up_bps
                + images * training_flops(workload.cost, kernels) / device.train_gflops / 1e9
                + probed * workload.images * workload.cost.flops / device.infer_gflops / 1e9
                + steps * device.step_s
                + device.round_s
            )
            seconds *= 1 + 1e-9  # for its rounding
            spent = (seconds, device.power_w * seconds, up_bytes)
            if keeps(budget, *spent):
                most = max(most, images * kernels)
    plan = plan_work(client, workload, budget)
    if most and not policy.waits:
        assert plan.status == "ok"
        assert plan.examples * plan.kernels >= most
