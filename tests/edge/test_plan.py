import math
from dataclasses import replace

import pytest

from fedfmd.edge import (
    DEVICES,
    LINKS,
    POLICIES,
    Bandwidth,
    Budget,
    Client,
    Device,
    Workload,
    deal_out,
    plan_work,
    round_seconds,
)


def client(id: int, gflops: float, down_mbps: float, up_mbps: float) -> Client:
    device = Device(f"board-{id}", gflops, 2 * gflops, memory_gb=1, power_w=2, source="made up")
    return Client(id, device, Bandwidth(1e6 * down_mbps, 1e6 * up_mbps))


# Figures for the head: two epochs of batches of 10, 10 and 5 images at 1 GFLOP each, so 50 GFLOP;
# 1 MB down, 2 MB up.
WORKLOAD = Workload(
    images=25,
    batch_size=10,
    epochs=2,
    train_flops_per_image=10**9,
    infer_flops_per_image=10**9 // 4,
    down_bytes=10**6,
    up_bytes=2 * 10**6,
    memory_bytes=10**9,
)
CLIENTS = [
    client(0, gflops=10, down_mbps=8, up_mbps=4),  # 1 + 5 + 4 = 10 s
    client(1, gflops=5, down_mbps=16, up_mbps=16),  # 0.5 + 10 + 1 = 11.5 s
    client(2, gflops=1, down_mbps=8, up_mbps=8),  # 1 + 50 + 2 = 53 s
]


@pytest.mark.parametrize(
    ("policy", "deadline_s", "steps", "seconds", "status", "round_s"),
    [
        ("wait", None, [6, 6, 6], [10, 11.5, 53], "ok ok ok", 53),
        ("drop", None, [6, 6, 6], [10, 11.5, 53], "ok ok ok", 53),
        ("partial", None, [6, 6, 6], [10, 11.5, 53], "ok ok ok", 53),
        ("wait", 10.5, [6, 6, 6], [10, 11.5, 53], "ok ok ok", 53),
        ("drop", 10.5, [6, 6, 6], [10, 11.5, 53], "ok late late", 10.5),
        ("drop", 60, [6, 6, 6], [10, 11.5, 53], "ok ok ok", 53),
        # Client 1 has 9 s to compute: an epoch of 25 and two batches of 10. Client 2 has 7.5 s: none of 10.
        ("partial", 10.5, [6, 5, 1], [10, 10.5, 13], "ok ok late", 10.5),
        # Now client 2 has 20 s: two batches of 10; the third, of 5, would need 5 s more.
        ("partial", 24, [6, 6, 2], [10, 11.5, 23], "ok ok ok", 23),
        ("partial", 29, [6, 6, 3], [10, 11.5, 28], "ok ok ok", 28),
    ],
)
def test_a_round_of_three_devices_by_hand(policy, deadline_s, steps, seconds, status, round_s):
    budget = Budget(deadline_s, policy)
    plans = [plan_work(client, WORKLOAD, budget) for client in CLIENTS]
    assert [plan.steps for plan in plans] == steps
    assert [plan.total_s for plan in plans] == pytest.approx(seconds, abs=1e-3)
    assert [plan.status for plan in plans] == status.split()
    assert round_seconds(plans, budget) == pytest.approx(round_s, abs=1e-3)


def test_a_plan_counts_what_its_steps_cost():
    plan = plan_work(CLIENTS[1], WORKLOAD, Budget(10.5, "partial"))
    assert (plan.steps, plan.full_steps, plan.examples) == (5, 6, 45)
    assert plan.train_flops == 45 * 10**9
    assert (plan.down_s, plan.compute_s, plan.up_s) == pytest.approx((0.5, 9, 1))
    assert plan.energy_j == pytest.approx(2 * 10.5)
    assert plan.latency_s == pytest.approx(0.025)


def test_the_examples_of_cut_epochs_are_the_images_really_seen():
    assert [WORKLOAD.examples(steps) for steps in range(7)] == [0, 10, 20, 25, 35, 45, 50]
    assert replace(WORKLOAD, images=1).examples(1) == 1
    assert replace(WORKLOAD, images=20).examples(3) == 30


@pytest.mark.parametrize("deadline_s", [3.5, 13, 13.001, 24, 37, 38, 52.999, 53, 100])
def test_partial_does_the_most_steps_that_fit(deadline_s):
    plan = plan_work(CLIENTS[2], WORKLOAD, Budget(deadline_s, "partial"))
    fitting = [steps for steps in range(1, 7) if 1 + WORKLOAD.examples(steps) + 2 <= deadline_s]
    assert plan.steps == max(fitting, default=1)
    assert (plan.status == "ok") == bool(fitting)


@pytest.mark.parametrize("policy", ["drop", "partial"])
def test_a_late_client_says_who_it_is_and_what_it_needs(policy):
    plan = plan_work(CLIENTS[2], WORKLOAD, Budget(3, policy))
    assert plan.energy_j == pytest.approx(2 * plan.total_s)
    for part in ("client 2", "board-2", f"{plan.total_s:.3f} s", "budget.deadline-s is 3"):
        assert part in plan.reason


@pytest.mark.parametrize("policy", POLICIES)
def test_a_device_without_the_memory_is_unfit_and_not_asked(policy):
    budget = Budget(30, policy)
    plan = plan_work(CLIENTS[0], replace(WORKLOAD, memory_bytes=10**9 + 1), budget)
    assert plan.status == "unfit"
    assert "client 0 (board-0, 1 GB)" in plan.reason
    assert (plan.steps, plan.examples, plan.train_flops, plan.total_s, plan.energy_j) == (0, 0, 0, 0, 0)
    assert round_seconds([plan], budget) == 0


def test_communication_can_outweigh_computing():
    """ResNet-18 with the CIFAR stem (0.5564 GMAC) on 500 images: slow boards compute, fast ones upload."""
    workload = Workload(500, 32, 1, int(6 * 0.5564e9), int(2 * 0.5564e9), 44_700_000, 44_700_000, 10**9)
    link = LINKS["wifi"].sample(0.5)
    pi, nano = (
        plan_work(Client(0, DEVICES[name], link), workload, Budget()) for name in ("pi-4", "jetson-nano")
    )
    assert pi.compute_s == pytest.approx(104.3, abs=0.1)
    assert nano.compute_s == pytest.approx(14.5, abs=0.1)
    assert nano.up_s == pi.up_s == pytest.approx(13.6, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"deadline_s": -1.0}, "budget.deadline-s = -1"),
        ({"deadline_s": 0.0}, "budget.deadline-s = 0"),
        ({"deadline_s": math.nan}, "budget.deadline-s = nan"),
        ({"policy": "hope"}, "budget.policy = 'hope' is unknown; known: wait, drop, partial"),
    ],
)
def test_an_impossible_budget_is_refused(arguments, named):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Budget(**arguments)
    assert named in str(error.value)


def plans_of(*images: int):
    return [
        plan_work(replace(CLIENTS[0], id=id), replace(WORKLOAD, images=n), Budget())
        for id, n in enumerate(images)
    ]


@pytest.mark.parametrize(
    ("images", "nodes", "dealt"),
    [
        ([5, 4, 3, 3, 3], 2, [[0, 3], [1, 2, 4]]),  # 5, 4, then 4+3, 5+3, 7+3
        ([1, 2, 3, 4], 2, [[0, 3], [1, 2]]),
        ([1, 1, 1, 1], 2, [[0, 2], [1, 3]]),
        ([7, 1], 1, [[0, 1]]),
        ([7], 3, [[0], [], []]),
        ([], 2, [[], []]),
    ],
)
def test_plans_are_dealt_so_that_nodes_are_busy_equally_long(images, nodes, dealt):
    hands = deal_out(plans_of(*images), nodes)
    assert [[plan.client.id for plan in hand] for hand in hands] == dealt


def test_the_deal_does_not_depend_on_the_order_of_the_plans():
    plans = plans_of(9, 9, 2, 5, 5, 5, 7)
    assert deal_out(plans, 3) == deal_out(reversed(plans), 3)
