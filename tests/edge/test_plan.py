import math
from dataclasses import replace

import numpy as np
import pytest

from fedfmd.cost import Cost
from fedfmd.edge import (
    DEVICES,
    KERNEL_CHOICES,
    LINKS,
    POLICIES,
    Bandwidth,
    Budget,
    Client,
    Device,
    Workload,
    deal_out,
    keep_first,
    plan_work,
    round_seconds,
)


def client(id: int, gflops: float, down_mbps: float, up_mbps: float, memory_gb: float = 1) -> Client:
    device = Device(f"board-{id}", gflops, 2 * gflops, memory_gb, power_w=2, source="made up")
    return Client(id, device, Bandwidth(1e6 * down_mbps, 1e6 * up_mbps))


# Figures for the head. Training takes 3 GFLOP per image, 0.1 less for each of the four kernels that is frozen.
# The model is 1 MB, 0.2 MB of it for each kernel. Training holds 3 MB, 0.4 less for each frozen kernel, and
# 1 MB per image. Two epochs of batches of 10, 10 and 5 images make 50 images, so 150 GFLOP.
COST = Cost(
    params=250_000,
    bytes=10**6,
    macs_by_kind={"convolution": 500_000_000},
    activation_bytes=10**6,
    kernels=4,
    kernel_params=50_000,
    kernel_gradient_macs=50_000_000,
)
UPLOADS = (400_000, 600_000, 800_000, 10**6)
WORKLOAD = Workload(25, batch_size=10, epochs=2, cost=COST, payload_bytes=10**6, upload_bytes=UPLOADS)
CLIENTS = [
    client(0, gflops=30, down_mbps=8, up_mbps=4),  # 1 + 5 + 2 = 8 s
    client(1, gflops=15, down_mbps=16, up_mbps=16),  # 0.5 + 10 + 0.5 = 11 s
    client(2, gflops=3, down_mbps=8, up_mbps=8),  # 1 + 50 + 1 = 52 s
]
FULL, ALL = [6, 6, 6], [4, 4, 4]


def plans_for(budget: Budget, workload: Workload = WORKLOAD):
    return [plan_work(client, workload, budget) for client in CLIENTS]


@pytest.mark.parametrize(
    ("policy", "deadline_s", "steps", "kernels", "seconds", "status", "round_s"),
    [
        ("wait", None, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        ("drop", None, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        ("partial", None, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        ("kernels", None, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        ("partial+kernels", None, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        ("wait", 10.5, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        ("drop", 10.5, FULL, ALL, [8, 11, 52], "ok late late", 10.5),
        ("drop", 60, FULL, ALL, [8, 11, 52], "ok ok ok", 52),
        # Client 1 has 9.5 s to compute, at 0.2 s per image: 47 images, thus an epoch of 25 and two batches of
        # 10. Client 2 has 8.5 s, at 1 s per image: no batch of 10; its first would be there after 1 + 10 + 1 s.
        ("partial", 10.5, [6, 5, 1], ALL, [8, 10, 12], "ok ok late", 10.5),
        # Client 2 has 22 s: two batches of 10; the third, of 5, would need 3 s more.
        ("partial", 24, [6, 6, 2], ALL, [8, 11, 22], "ok ok ok", 22),
        ("partial", 27, [6, 6, 3], ALL, [8, 11, 27], "ok ok ok", 27),
        # Client 1 with 3 kernels: 0.5 + 50 · 2.9 / 15 + 0.4 = 10.567 s; with 2: 0.5 + 50 · 2.8 / 15 + 0.3 s.
        # Client 2 with 1 kernel: 1 + 50 · 2.7 / 3 + 0.4 s.
        ("kernels", 10.5, FULL, [4, 2, 1], [8, 10.1333, 46.4], "ok ok late", 10.5),
        ("kernels", 47, FULL, [4, 4, 1], [8, 11, 46.4], "ok ok ok", 46.4),
        # Client 1: 45 images by 4 kernels are more than 50 by 2. Client 2: a batch of 10 fits with one kernel
        # alone, 1 + 10 · 2.7 / 3 + 0.4 s; with two it takes 1 + 10 · 2.8 / 3 + 0.6 = 10.933 s.
        ("partial+kernels", 10.5, [6, 5, 1], [4, 4, 1], [8, 10, 10.4], "ok ok ok", 10.4),
        ("partial+kernels", 10, [6, 5, 1], [4, 4, 1], [8, 10, 10.4], "ok ok late", 10),
    ],
)
def test_a_round_of_three_devices_by_hand(policy, deadline_s, steps, kernels, seconds, status, round_s):
    budget = Budget(deadline_s, policy=policy)
    plans = plans_for(budget)
    assert [plan.steps for plan in plans] == steps
    assert [plan.kernels for plan in plans] == kernels
    assert [plan.total_s for plan in plans] == pytest.approx(seconds, abs=1e-3)
    assert [plan.status for plan in plans] == status.split()
    assert round_seconds(plans, budget, wanted=3) == pytest.approx(round_s, abs=1e-3)


@pytest.mark.parametrize(
    ("deadline_s", "steps", "compute_s"),
    [
        (None, 6, 5 + 6 * 0.25 + 0.5),  # 150 GFLOP at 30 GFLOP/s, six steps, one round
        (9.25, 5, 4.5 + 5 * 0.25 + 0.5),  # 45 images, and 3 s of transfers
        (9.2, 4, 3.5 + 4 * 0.25 + 0.5),
    ],
)
def test_steps_and_rounds_may_take_time_beside_their_flops(deadline_s, steps, compute_s):
    slow = replace(CLIENTS[0], device=replace(CLIENTS[0].device, step_s=0.25, round_s=0.5))
    plan = plan_work(slow, WORKLOAD, Budget(deadline_s))
    assert plan.steps == steps
    assert plan.compute_s == pytest.approx(compute_s)


@pytest.mark.parametrize(
    ("limits", "policy", "steps", "kernels", "status", "round_s"),
    [
        # At 2 W, 20 J are 10 s. Client 1 has 9 s for 45 images; client 2 has 8 s for none of 10.
        ({"energy_j": 20}, "drop", FULL, ALL, "ok late late", 52),
        ({"energy_j": 20}, "partial", [6, 5, 1], ALL, "ok ok late", 12),
        ({"energy_j": 20, "deadline_s": 11}, "partial", [6, 5, 1], ALL, "ok ok late", 11),
        ({"energy_j": 20, "deadline_s": 9}, "partial", [6, 4, 1], ALL, "ok ok late", 9),
        # 0.7 MB are two kernels and what is no kernel.
        ({"up_bytes": 700_000}, "drop", FULL, ALL, "late late late", 52),
        ({"up_bytes": 700_000}, "partial", [1, 1, 1], ALL, "late late late", 12),
        ({"up_bytes": 700_000}, "kernels", FULL, [2, 2, 2], "ok ok ok", 48.2667),
        ({"up_bytes": 700_000, "deadline_s": 10}, "partial+kernels", [6, 5, 1], [2, 2, 1], "ok ok late", 10),
        ({"up_bytes": 300_000}, "kernels", FULL, [1, 1, 1], "late late late", 46.4),
        ({"up_bytes": 300_000, "energy_j": 1, "deadline_s": 1}, "wait", FULL, ALL, "ok ok ok", 52),
    ],
)
def test_joules_and_bytes_limit_a_plan_as_the_deadline_does(limits, policy, steps, kernels, status, round_s):
    budget = Budget(policy=policy, **limits)
    plans = plans_for(budget)
    assert [plan.steps for plan in plans] == steps
    assert [plan.kernels for plan in plans] == kernels
    assert [plan.status for plan in plans] == status.split()
    assert round_seconds(plans, budget, wanted=3) == pytest.approx(round_s, abs=1e-3)


def test_a_plan_counts_what_its_steps_cost():
    plan = plan_work(CLIENTS[1], WORKLOAD, Budget(10.5))
    assert (plan.steps, plan.full_steps, plan.batch_size, plan.examples) == (5, 6, 10, 45)
    assert plan.train_flops == 135 * 10**9
    assert (plan.down_s, plan.compute_s, plan.up_s) == pytest.approx((0.5, 9, 0.5))
    assert (plan.down_bytes, plan.up_bytes) == (10**6, 10**6)
    assert plan.energy_j == pytest.approx(2 * 10)
    assert plan.latency_s == pytest.approx(1 / 30)


@pytest.mark.parametrize(("kernels", "flops", "up_bytes"), [(1, 135e9, 400_000), (3, 145e9, 800_000)])
def test_the_number_of_kernels_may_be_fixed(kernels, flops, up_bytes):
    plan = plan_work(CLIENTS[1], WORKLOAD, Budget(policy="kernels", kernels=kernels))
    assert (plan.kernels, plan.train_flops, plan.up_bytes) == (kernels, flops, up_bytes)
    assert plan.down_bytes == 10**6


def test_looking_at_the_attention_costs_a_forward_pass_over_some_images():
    """25 images of 1 GFLOP, at 30 GFLOP/s; 300 GFLOP would be 10 s, but no more than 256 images are looked at."""
    budget = Budget(policy="kernels", kernels=2, kernel_choice="attention")
    rotating = replace(budget, kernel_choice="rotation")
    for images, probed in ((25, 25), (300, 256)):
        workload = replace(WORKLOAD, images=images)
        plan, cheaper = (plan_work(CLIENTS[1], workload, choice) for choice in (budget, rotating))
        assert plan.train_flops == cheaper.train_flops + probed * 10**9
        assert plan.compute_s == pytest.approx(cheaper.compute_s + probed / 30)


def test_who_trains_all_kernels_need_not_look_at_the_attention():
    plans = [plan_work(CLIENTS[1], WORKLOAD, Budget(kernel_choice=choice)) for choice in KERNEL_CHOICES]
    assert plans[0] == plans[1]


def test_the_examples_of_cut_epochs_are_the_images_really_seen():
    assert [WORKLOAD.examples(steps, 10) for steps in range(7)] == [0, 10, 20, 25, 35, 45, 50]
    assert [WORKLOAD.examples(steps, 25) for steps in range(3)] == [0, 25, 50]
    assert replace(WORKLOAD, images=1).examples(1, 1) == 1


@pytest.mark.parametrize("deadline_s", [3.5, 12, 12.001, 22, 27, 37, 51.999, 52, 100])
def test_partial_does_the_most_steps_that_fit(deadline_s):
    plan = plan_work(CLIENTS[2], WORKLOAD, Budget(deadline_s, policy="partial"))
    fitting = [steps for steps in range(1, 7) if 1 + WORKLOAD.examples(steps, 10) + 1 <= deadline_s]
    assert plan.steps == max(fitting, default=1)
    assert (plan.status == "ok") == bool(fitting)


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"wait"}))
def test_a_late_client_says_who_it_is_and_what_it_needs(policy):
    plan = plan_work(CLIENTS[2], WORKLOAD, Budget(2, policy=policy))
    steps = f"{plan.total_s:.3f} s for {plan.steps} of 6 steps"
    assert plan.reason == f"client 2 (board-2) needs {steps}, budget.deadline-s is 2"
    assert plan.energy_j == pytest.approx(2 * plan.total_s)


@pytest.mark.parametrize(
    ("limits", "needs"), [({"energy_j": 50.0}, "104.000 J"), ({"up_bytes": 5000}, "1000000 bytes up")]
)
def test_the_broken_limit_is_named(limits, needs):
    reason = plan_work(CLIENTS[2], WORKLOAD, Budget(policy="drop", **limits)).reason
    assert f"needs {needs} for 6 of 6 steps, budget." in reason


@pytest.mark.parametrize(
    ("policy", "memory_mb", "kernels", "batch_size", "full_steps"),
    [
        ("partial", 13, 4, 10, 6),
        ("partial", 12.9, 4, 9, 6),
        ("partial", 8.5, 4, 5, 10),
        ("partial", 4, 4, 1, 50),
        ("kernels", 3.9, 3, 1, 50),  # 3 - 0.4 + 1 MB
        ("kernels", 2.8, 1, 1, 50),  # 3 - 1.2 + 1 MB
    ],
)
def test_a_small_device_takes_smaller_batches_and_then_fewer_kernels(
    policy, memory_mb, kernels, batch_size, full_steps
):
    small = client(0, 30, 8, 4, memory_gb=memory_mb / 1000)
    plan = plan_work(small, WORKLOAD, Budget(policy=policy))
    assert (plan.status, plan.kernels, plan.batch_size) == ("ok", kernels, batch_size)
    assert (plan.steps, plan.full_steps, plan.examples) == (full_steps, full_steps, 50)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_device_that_cannot_hold_a_single_image_is_unfit_and_not_asked(policy):
    budget = Budget(30, policy=policy)
    plan = plan_work(client(0, 30, 8, 4, memory_gb=0.0027), WORKLOAD, budget)
    assert plan.status == "unfit"
    assert "client 0 (board-0, 0.0027 GB) can't hold the 0.00" in plan.reason
    assert (plan.steps, plan.examples, plan.train_flops, plan.total_s, plan.energy_j) == (0, 0, 0, 0, 0)
    assert (plan.up_bytes, plan.down_bytes, plan.kernels) == (0, 0, 0)
    assert round_seconds([plan], budget, wanted=1) == 0


def test_nobody_foresees_the_speed_of_a_round():
    """Client 1's plan of 45 images fits 10.5 s, 9 s of them computing; it needs 18 at half its speed."""
    budget = Budget(10.5, policy="partial")
    usual, slow, fast = (plan_work(CLIENTS[1], WORKLOAD, budget, speed) for speed in (1, 0.5, 2))
    assert [plan.steps for plan in (usual, slow, fast)] == [5, 5, 5]
    assert [plan.total_s for plan in (usual, slow, fast)] == pytest.approx([10, 19, 5.5])
    assert [plan.status for plan in (usual, slow, fast)] == ["ok", "late", "ok"]
    assert slow.energy_j == pytest.approx(38)
    assert "needs 19.000 s for 5 of 6 steps, budget.deadline-s is 10.5" in slow.reason
    assert plan_work(CLIENTS[1], WORKLOAD, Budget(10.5, policy="wait"), 0.5).status == "ok"


@pytest.mark.parametrize(
    ("policy", "deadline_s", "cut"),
    [
        ("wait", 10.5, [False, False, False]),
        ("drop", 10.5, [False, False, False]),  # work in vain is done in full
        ("partial", 10.5, [False, True, True]),
        ("kernels", 10.5, [False, True, True]),
        ("partial+kernels", 47, [False, False, True]),
    ],
)
def test_a_plan_tells_whether_its_work_was_cut(policy, deadline_s, cut):
    assert [plan.is_cut for plan in plans_for(Budget(deadline_s, policy=policy))] == cut


def test_smaller_batches_are_no_cut_and_an_unfit_client_has_no_work_to_cut():
    for memory_mb in (8.5, 2.7):
        small = client(0, 30, 8, 4, memory_gb=memory_mb / 1000)
        assert not plan_work(small, WORKLOAD, Budget(policy="partial")).is_cut


def test_a_late_client_may_be_lucky():
    plan = plan_work(CLIENTS[1], WORKLOAD, Budget(10.5, policy="drop"), speed=2)
    assert (plan.status, plan.total_s) == ("ok", pytest.approx(6))


@pytest.mark.parametrize(
    ("wanted", "status", "round_s"), [(1, "ok late late", 8), (2, "ok ok late", 11), (3, "ok ok ok", 52)]
)
def test_of_more_clients_than_wanted_the_first_count(wanted, status, round_s):
    budget = Budget(policy="wait")
    plans = keep_first(plans_for(budget), wanted)
    assert [plan.status for plan in plans] == status.split()
    assert all(f"{wanted} updates came earlier" in plan.reason for plan in plans if plan.status == "late")
    assert round_seconds(plans, budget, wanted) == pytest.approx(round_s)


def test_the_deadline_is_waited_for_only_if_updates_are_missing():
    budget = Budget(10.5, policy="drop")  # client 0 is there after 8 s, the others are late
    for wanted, seconds in ((1, 8), (2, 10.5)):
        assert round_seconds(keep_first(plans_for(budget), wanted), budget, wanted) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("share", "wanted", "asked"), [(1.0, 10, 10), (1.3, 10, 13), (1.1, 10, 11), (1.25, 3, 4)]
)
def test_over_selection_rounds_up(share, wanted, asked):
    assert Budget(over_select=share).asked(wanted) == asked


@pytest.mark.parametrize(("share", "wanted", "needed"), [(0, 10, 1), (0.8, 10, 8), (0.75, 3, 3), (1, 7, 7)])
def test_a_round_needs_its_share_of_reports_and_at_least_one(share, wanted, needed):
    assert Budget(min_reports=share).needed(wanted) == needed


def test_communication_can_outweigh_computing():
    """ResNet-18 with the CIFAR stem (0.5564 GMAC) on 500 images: slow boards compute, fast ones upload."""
    cost = Cost(11_174_000, 44_700_000, {"convolution": 556_400_000}, activation_bytes=10**7)
    workload = Workload(500, 32, 1, cost, payload_bytes=44_700_000, upload_bytes=[44_700_000])
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
        ({"energy_j": 0.0}, "budget.energy-j = 0.0 must be a positive number of joules"),
        ({"up_bytes": -1}, "budget.up-bytes = -1 must be a positive number of bytes"),
        ({"policy": "hope"}, "budget.policy = 'hope' is unknown; known: wait, drop, partial"),
        ({"kernel_choice": "x"}, "budget.kernel-choice = 'x' is unknown; known: rotation, attention"),
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


def choosing(choose, deadline_s=None):
    return Budget(deadline_s=deadline_s, policy="mine:choose", choose=choose)


def test_a_policy_of_ones_own_chooses_each_plan():
    def choose(told):
        full, plan = told["full"], told["plan"]
        assert full == plan() == plan(6, 4)
        assert told["workload"] is WORKLOAD
        return full if told["client"].id == 0 else plan(steps=2, kernels=told["client"].id)

    plans = plans_for(choosing(choose, 24))
    assert [(p.steps, p.kernels, p.status) for p in plans] == [(6, 4, "ok"), (2, 1, "ok"), (2, 2, "ok")]
    assert [p.is_cut for p in plans] == [False, True, True]
    assert plans[1].up_bytes == UPLOADS[0]


def test_a_plan_that_was_chosen_is_judged_as_any_other():
    assert [p.status for p in plans_for(choosing(lambda told: told["full"], 10.5))] == ["ok", "late", "late"]


def test_a_policy_may_choose_numbers_of_numpy():
    chosen = plans_for(choosing(lambda told: told["plan"](steps=np.int64(2), kernels=np.int64(3))))[0]
    assert (type(chosen.steps), type(chosen.kernels), type(chosen.up_bytes)) == (int, int, int)
    assert (chosen.steps, chosen.kernels) == (2, 3)


def test_what_was_chosen_costs_what_it_costs():
    """A policy can't make a plan cheaper than its steps and kernels are."""
    cheap = plans_for(choosing(lambda told: replace(told["full"], compute_s=0.0)))
    assert [p.total_s for p in cheap] == [8, 11, 52]


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (
            lambda told: None,
            "budget.policy = 'mine:choose' must return a plan, full or plan.*returned a NoneType",
        ),
        (lambda told: told["plan"](steps=0), "steps = 0: must be a whole number from 1 to 6"),
        (lambda told: told["plan"](steps=2.5), "steps = 2.5: must be a whole number from 1 to 6"),
        (
            lambda told: told["plan"](kernels=5),
            "kernels = 5: must be a whole number from 1 to 4 for client 0",
        ),
    ],
)
def test_a_policy_that_chooses_no_plan_is_refused(choose, message):
    with pytest.raises(ValueError, match=message):
        plans_for(choosing(choose))


def test_an_optimiser_with_more_states_leaves_room_for_fewer_images():
    """Of 10 MB, plain SGD's 2 copies take 2 and leave 8 images, two moments 4 and leave 6."""
    small = client(0, gflops=30, down_mbps=8, up_mbps=4, memory_gb=0.01)
    sizes = [plan_work(small, replace(WORKLOAD, states=states), Budget()).batch_size for states in (0, 1, 2)]
    assert sizes == [8, 7, 6]
