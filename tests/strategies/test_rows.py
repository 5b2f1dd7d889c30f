import math
from dataclasses import asdict, replace

import pytest

from fedfmd.cost import Cost
from fedfmd.edge import Bandwidth, Budget, Client, Device, Fleet, plan_work
from fedfmd.protocol.messages import ClientResult
from fedfmd.runs import ClientRow, RoundRow
from fedfmd.training import Evaluation
from strategies.rows import client_rows, round_row

FAST = Device("fast", train_gflops=10, infer_gflops=5, memory_gb=1, power_w=20, source="")
SLOW = Device("slow", train_gflops=1, infer_gflops=0.5, memory_gb=1, power_w=5, source="")
TINY = replace(SLOW, name="tiny", memory_gb=1e-6)
LINK = Bandwidth(down_bps=8e6, up_bps=4e6)
MODEL = Cost(
    params=1000,
    bytes=4000,
    macs_by_kind={"convolution": 500_000_000},
    activation_bytes=1000,
    kernels=3,
    kernel_params=50_000,
    kernel_gradient_macs=10_000_000,
)
MEGABYTE = 1_000_000
BEFORE = (10**9, 2 * 10**9, 3 * 10**9)


@pytest.fixture
def federation(make_federation):
    """Two fast clients with 10 and 30 images, a slow one with 20, who have 50 s for two epochs in tens."""
    settings = {"train.batch-size": 10, "train.local-epochs": 2, "model.conv": "fmdconv", "model.kernels": 3}
    return replace(
        make_federation(settings),
        fleet=fleet(FAST, SLOW, FAST),
        sizes=(10, 20, 30),
        cost=MODEL,
        budget=Budget(50.0, policy="drop"),
        payload_bytes=MEGABYTE,
        upload_bytes=(MEGABYTE // 2, MEGABYTE * 3 // 4, MEGABYTE),
    )


def fleet(*devices):
    return Fleet(tuple(Client(id, device, LINK) for id, device in enumerate(devices)))


def plan(federation):
    return [
        plan_work(client, federation.workload(client.id), federation.budget)
        for client in federation.fleet.clients
    ]


def result(client, reason="", latency_s=math.nan):
    return ClientResult(client, 10, 2, 20, 1.25, 0.5, 0.1, reason, 0.9, 0.4, math.nan, latency_s)


def rows_of(federation, results, trips=None):
    return client_rows(7, plan(federation), results, {0: 0, 2: 1}, BEFORE, trips or {})


@pytest.fixture
def clients(federation):
    """Client 0 succeeds, client 1 is late, client 2 fails."""
    return rows_of(federation, {0: result(0), 2: result(2, "OSError: no disk")})


def test_a_trained_client_by_hand(clients):
    expected = ClientRow(
        round=7,
        client=0,
        node=0,
        device="fast",
        status="ok",
        examples=20,
        steps=2,
        kernels=3,
        train_flops=60 * 10**9,  # 20 images of 3 (training) x 2 (FLOPs per MAC) x 0.5 G MACs
        cum_train_flops=61 * 10**9,
        compute_s=6.0,  # at 10 GFLOP/s
        down_s=1.0,  # 8 Mbit at 8 Mbit/s
        up_s=2.0,
        total_s=9.0,
        wall_s=0.1,
        up_bytes=MEGABYTE,
        down_bytes=MEGABYTE,
        energy_j=180.0,  # 9 s at 20 W
        loss=1.25,
        accuracy=0.5,
        latency_s=0.2,  # 1 GFLOP at 5 GFLOP/s
        ies=0.4,
        rcs=2.5,
        kernel_entropy=0.9,
        input_attention=0.4,
        output_attention=None,  # the operator has none
    )
    assert asdict(clients[0]) == pytest.approx(asdict(expected))


def test_a_real_edge_devices_row_has_measured_seconds(federation):
    results = {0: result(0, latency_s=0.3), 2: result(2, "OSError: no disk")}
    ok, _, failed = rows_of(federation, results, {0: 5.5, 2: 5.5})
    assert (ok.wall_s, ok.measured_transfer_s, ok.measured_latency_s) == (0.1, pytest.approx(5.4), 0.3)
    assert (failed.measured_transfer_s, failed.measured_latency_s) == (None, None)


def test_a_late_client_costs_but_has_no_results(clients):
    late = clients[1]
    assert (late.status, late.node, late.examples, late.energy_j) == (
        "late",
        None,
        40,
        pytest.approx(123 * 5),
    )
    assert "needs 123.000 s for 4 of 4 steps" in late.reason
    assert [late.loss, late.accuracy, late.wall_s, late.ies, late.rcs, late.kernel_entropy] == [None] * 6
    assert late.cum_train_flops == 122 * 10**9


def test_a_failed_client_keeps_its_reason_and_costs(clients):
    failed = clients[2]
    assert (failed.status, failed.reason, failed.node) == ("failed", "OSError: no disk", 1)
    assert failed.energy_j == pytest.approx(21 * 20)
    assert [failed.loss, failed.accuracy, failed.ies, failed.rcs, failed.kernel_entropy] == [None] * 5


def test_a_client_whose_edge_device_went_while_it_was_at_work_failed(federation):
    gone = rows_of(federation, {0: result(0)})[2]
    assert (gone.status, gone.reason, gone.node, gone.loss) == ("failed", "its edge device has gone", 1, None)


def test_an_unfit_client_costs_nothing(federation):
    unfit = rows_of(replace(federation, fleet=fleet(TINY, SLOW, FAST)), {})[0]
    assert unfit.status == "unfit"
    assert "can't hold" in unfit.reason
    assert [unfit.steps, unfit.kernels, unfit.train_flops, unfit.up_bytes, unfit.down_bytes] == [0] * 5
    assert [unfit.energy_j, unfit.total_s] == [0, 0]
    assert unfit.cum_train_flops == BEFORE[0]


def test_a_client_that_trains_some_kernels_sends_less(federation):
    budget = Budget(policy="kernels", kernels=1)
    row = rows_of(replace(federation, budget=budget), {0: result(0)})[0]
    assert (row.kernels, row.down_bytes) == (1, MEGABYTE)
    assert row.up_bytes == MEGABYTE // 2
    assert row.train_flops == 20 * (3 * 10**9 - 2 * 2 * 10_000_000)
    assert row.up_s == pytest.approx(2 * 0.5)


def make_round(federation, clients, accuracy=0.8, kernel_entropy=0.9, discarded=False, validation=None):
    return round_row(
        7,
        clients,
        Evaluation(0.5, accuracy, kernel_entropy),
        validation,
        federation,
        round_s=50.0,
        clients_cut=2,
        discarded=discarded,
        temperature=12.0,
        virtual_s=100.0,
        best_accuracy=0.85,
        cum_train_flops=sum(BEFORE),
        wall_s=3.0,
    )


def test_the_round_by_hand(federation, clients):
    expected = RoundRow(
        round=7,
        virtual_s=150.0,
        round_s=50.0,
        wall_s=3.0,
        loss=0.5,
        accuracy=0.8,
        best_accuracy=0.85,
        temperature=12.0,
        kernel_entropy=0.9,
        clients_ok=1,
        clients_late=1,
        clients_failed=1,
        train_flops=360 * 10**9,
        cum_train_flops=366 * 10**9,
        up_bytes=3 * MEGABYTE,
        down_bytes=3 * MEGABYTE,
        energy_j=180.0 + 615.0 + 420.0,
        latency_s=0.8,  # mean of 0.2, 2 and 0.2 s
        ies_train=62.5,
        rcs_train=0.016,
        ies_infer=1.0,
        rcs_infer=1.0,
        clients_cut=2,
    )
    assert asdict(make_round(federation, clients)) == pytest.approx(asdict(expected))


def test_a_round_has_what_the_validation_images_say(federation, clients):
    row = make_round(federation, clients, validation=Evaluation(0.25, 0.9, 0.8))
    assert (row.validation_loss, row.validation_accuracy) == (0.25, 0.9)
    assert (row.loss, row.accuracy, row.kernel_entropy) == (0.5, 0.8, 0.9)


@pytest.mark.parametrize(("discarded", "status"), [(False, "ok"), (True, "discarded")])
def test_a_round_says_whether_it_was_discarded(federation, clients, discarded, status):
    assert make_round(federation, clients, discarded=discarded).status == status


def test_unfit_clients_count_as_failed(federation):
    small = replace(federation, fleet=fleet(TINY, TINY, FAST))
    row = make_round(small, rows_of(small, {2: result(2)}))
    assert (row.clients_ok, row.clients_late, row.clients_failed) == (1, 0, 2)


def test_a_model_without_a_mixture_has_no_kernel_entropy(federation, clients):
    assert make_round(federation, clients, kernel_entropy=math.nan).kernel_entropy is None


def test_a_model_that_is_never_right(federation, clients):
    row = make_round(federation, clients, accuracy=0.0)
    assert (row.ies_train, row.rcs_train, row.best_accuracy) == (math.inf, 0, 0.85)
