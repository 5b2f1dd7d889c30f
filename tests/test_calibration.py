import math
from dataclasses import replace
from importlib import metadata
from itertools import pairwise

import pytest
import torch

from fedfmd import calibration
from fedfmd.build import build_federation
from fedfmd.calibration import FASTEST_GFLOPS, Measurement, Round, Timing, fit_speed, make_device
from fedfmd.cost import Cost
from fedfmd.edge import DEVICES, Factors, Scope, Speed, plan_work, read_devices
from fedfmd.errors import RunError, SettingsError

TINY = {"model.width": 0.25}
COST = Cost(
    params=1, bytes=4, macs_by_kind={"convolution": 500_000_000}, activation_bytes=1
)  # 3 GFLOP per image
TRUE = {"static": Speed(30, 8, step_s=0.02, round_s=0.5), "fmdconv": Speed(10, 4, step_s=0.3, round_s=1.5)}


def seconds(speed, gflops, steps, batch_size):
    return speed.round_s + steps * speed.step_s + steps * batch_size * gflops / speed.train_gflops


def rounds(speed, kinds=((1, 1), (9, 1), (1, 16), (4, 16))):
    return [Round(steps, size, seconds(speed, 3, steps, size)) for steps, size in kinds]


@pytest.mark.parametrize("speed", [*TRUE.values(), Speed(20, 8), Speed(20, 8, step_s=0.1)])
def test_rounds_tell_rate_and_fixed_seconds_apart(speed):
    fit = fit_speed(rounds(speed), COST, infer_gflops=8)
    assert (fit.train_gflops, fit.infer_gflops) == pytest.approx((speed.train_gflops, 8))
    assert (fit.step_s, fit.round_s) == pytest.approx((speed.step_s, speed.round_s), abs=1e-9)


@pytest.mark.parametrize(
    ("turn", "seconds"),
    [((9, 1, 3, 1, 2), (2, 1)), ((9, 4, 3, 1, 2), (3, 2)), ((9, 1, 3, 2, 2), (3, 2))],
    ids=["quiet", "its short round held up", "the static one's"],
)
def test_the_seconds_of_steps_alone_are_never_negative(turn, seconds):
    assert calibration._steps_alone(turn) == seconds


def test_no_part_is_negative_where_a_batch_is_as_quick_as_an_image():
    fit = fit_speed([Round(1, 1, 0.2), Round(5, 1, 1.0), Round(1, 16, 0.19), Round(5, 16, 0.95)], COST, 8)
    assert fit.train_gflops == pytest.approx(FASTEST_GFLOPS)
    assert fit.step_s == pytest.approx(0.195, rel=0.01)
    assert fit.round_s >= 0


def measurement(arch, conv, train_gflops, infer_gflops=8.0, kernels=1, factors=(1, 1)):
    timings = tuple(Timing(arch, conv, kernels, size, 3 / train_gflops, 0.1) for size in (1, 16))
    speed = Speed(2 * train_gflops, infer_gflops, 0.123456, 0.25)
    return Measurement(timings, COST, speed, Factors(*factors))


def test_a_device_by_hand():
    measured = [
        measurement("resnet8", "static", 10, infer_gflops=4),
        measurement("resnet8", "fmdconv", 5, kernels=4, factors=(0.5, 0.9)),
        measurement("resnet18", "static", 40, infer_gflops=9),
        measurement("resnet18", "fmdconv", 5, kernels=4, factors=(0.125, 0.4)),
        measurement("resnet18", "fmdconv", 5, kernels=1, factors=(0.9, 0.8)),
    ]
    device = make_device("mine", measured, "here", memory_gb=2, power_w=6, up_mbps=30)
    assert (device.name, device.memory_gb, device.power_w, device.source) == ("mine", 2, 6, "here")
    assert (device.train_gflops, device.infer_gflops) == (20, 6)  # geometric means of 10 and 40, 4 and 9
    assert device.efficiency == {
        Scope("static"): Factors(1, 1),
        Scope("fmdconv", 4): Factors(0.25, 0.6),  # geometric means of 1/2 and 1/8, 0.9 and 0.4
        Scope("fmdconv", 1): Factors(0.9, 0.8),
    }
    assert device.models[Scope("resnet8/fmdconv", 4)] == Speed(10, 8, 0.1235, 0.25)
    assert list(map(str, device.models)) == [
        "resnet8/static",
        "resnet8/fmdconv/4",
        "resnet18/static",
        "resnet18/fmdconv/4",
        "resnet18/fmdconv/1",
    ]
    assert (device.down_mbps, device.up_mbps, device.estimate) == (None, 30, ())


def test_watts_that_nobody_gives_are_those_of_the_most_similar_device():
    device = make_device("mine", [measurement("resnet8", "static", 17)], "here", memory_gb=2)
    assert device.power_w == DEVICES["pi-4"].power_w
    assert device.estimate == ("power_w",)
    assert device.source == "here; watts of pi-4, whose rate is the nearest"


def test_static_networks_are_always_measured_and_nothing_twice():
    convs = ["fmdconv", "static", "fmdconv"]
    networks = calibration.models_of(["resnet18", "resnet8"], convs, [4, 1, 4], TINY)
    assert [(n.model.arch, n.model.conv, n.model.kernels) for n in networks] == [
        ("resnet18", "static", 4),
        ("resnet18", "fmdconv", 4),
        ("resnet18", "fmdconv", 1),
        ("resnet8", "static", 4),
        ("resnet8", "fmdconv", 4),
        ("resnet8", "fmdconv", 1),
    ]
    assert {n.model.width for n in networks} == {0.25}


@pytest.fixture
def clock(monkeypatch):
    """Rounds of training take as long as the true speeds say, the first two of each batch size ten times that."""
    warm = []

    def train(host, arrays, work):
        model = host.settings.model
        gflops = calibration.count(host.model, 8).train_flops / 1e9
        warm.append((model.conv, work.batch_size))
        slow = 10 if warm.count(warm[-1]) <= 2 else 1
        return slow * seconds(TRUE[model.conv], gflops, work.steps, work.batch_size)

    monkeypatch.setattr(calibration, "_train", train)
    monkeypatch.setattr(calibration, "latency", lambda model, image_size, repeats, batch=1: 0.5 / batch)


def test_a_simulation_of_a_calibrated_device_predicts_its_rounds(clock, tiny_settings, tmp_path):
    networks = calibration.models_of(["resnet8"], ["fmdconv"], [2], TINY)
    measured = [calibration.measure(network, 10, 8, [16]) for network in networks]
    device = make_device("mine", measured, "here", memory_gb=2)
    calibration.write_devices(tmp_path / "box.yaml", {"mine": device})
    for conv, true in TRUE.items():
        mine = {"fleet.devices": "mine", "fleet.devices-file": str(tmp_path / "box.yaml"), "model.conv": conv}
        federation = build_federation(tiny_settings(**mine))
        for batch_size in (3, 16, 64):
            workload = replace(federation.workload(0), images=5 * batch_size, batch_size=batch_size)
            plan = plan_work(federation.fleet.clients[0], workload, federation.budget)
            expected = seconds(true, federation.cost.train_flops / 1e9, plan.steps, batch_size)
            assert plan.steps == 5
            assert plan.compute_s == pytest.approx(expected, rel=1e-3)
            assert plan.latency_s == pytest.approx(0.5, rel=1e-3)


def test_factors_are_rates_relative_to_the_static_networks(clock):
    static, dynamic = calibration.models_of(["resnet8"], ["fmdconv"], [2], TINY)
    base, measured = (calibration.measure(network, 10, 8, [16]) for network in (static, dynamic))
    assert base.factors == Factors(1, 1)
    rates = [
        m.cost.train_flops / (true.step_s + 16 * m.cost.train_flops / 1e9 / true.train_gflops)  # of a step
        for m, true in ((base, TRUE["static"]), (measured, TRUE["fmdconv"]))
    ]
    assert measured.factors.train == pytest.approx(rates[1] / rates[0])
    assert measured.factors.infer == pytest.approx(measured.cost.flops / base.cost.flops)  # as many seconds


def test_timings_are_seconds_per_image_by_batch_size(clock):
    (network,) = calibration.models_of(["resnet8"], [], [2], TINY)
    timings = calibration.measure(network, 10, 8, [16, 4]).timings
    assert [(t.arch, t.conv, t.kernels, t.batch_size) for t in timings] == [
        ("resnet8", "static", 1, size) for size in (1, 4, 16)
    ]
    assert [t.infer_s for t in timings] == [0.5, 0.125, 0.03125]
    assert all(small.train_s > large.train_s for small, large in pairwise(timings))


def test_an_edge_device_is_measured_by_training_on_it(monkeypatch):
    monkeypatch.setattr(calibration, "ROUND_S", 0)
    _, network = calibration.models_of(["resnet8"], ["fmdconv"], [2], TINY)
    measured = calibration.measure(network, 10, 8, [4], repeats=1)
    assert all(t.train_s > 0 and t.infer_s > 0 for t in measured.timings)
    assert measured.scope == Scope("fmdconv", 2)
    assert measured.speed.train_gflops > 0
    assert measured.factors.train > 0


def test_a_network_that_cannot_be_trained_is_named(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fedfmd.client.round.train", fail)
    (network,) = calibration.models_of(["resnet8"], [], [2], TINY)
    with pytest.raises(RunError, match="resnet8 with static, batch 1: RuntimeError: out of memory"):
        calibration.measure(network, 10, 8, [4])


def test_memory_is_that_of_the_machine():
    assert math.log10(calibration.total_memory_gb(torch.device("cpu"))) == pytest.approx(1.5, abs=2.5)


def test_a_row_is_replaced_and_others_are_kept(tmp_path):
    path = tmp_path / "box.yaml"
    calibration.write_devices(path, {name: DEVICES[name] for name in ("pi-4", "pi-5")})
    rows = calibration.other_rows(path, "pi-5")
    assert rows == {"pi-4": DEVICES["pi-4"]}
    calibration.write_devices(path, rows | {"pi-5": replace(DEVICES["phone"], name="pi-5")})
    assert read_devices(path)["pi-5"].power_w == DEVICES["phone"].power_w
    assert calibration.other_rows(tmp_path / "new.yaml", "pi-5") == {}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("my box", "box.yaml", "", "--name 'my box': use letters"),
        ("pi:4", "box.yaml", "", "--name 'pi:4': use letters"),
        ("box", "box.yaml", "pi-4: {watts: 3}", "--out .*box.yaml: row 'pi-4', key 'train_gflops'"),
        ("box", "nowhere/box.yaml", None, "--out .*nowhere/box.yaml: give a file in a folder"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path, name, file, content, message
):
    if content is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(SettingsError, match=message):
        calibration.other_rows(tmp_path / file, name)


def test_the_source_says_what_was_measured():
    (network,) = calibration.models_of(["resnet8"], [], [3], {})
    source = calibration.source_of(network, [1, 3], 32, [16, 4])
    assert f"torch {metadata.version('torch')};" in source
    assert "K=1, 3, group normalisation, 32×32 images, batches of 1, 4, 16" in source
