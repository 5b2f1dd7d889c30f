import json
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from fedfmd.edge import (
    DEVICES,
    LINKS,
    Bandwidth,
    Device,
    Factors,
    Link,
    Scope,
    Speed,
    device_row,
    device_text,
    load_devices,
    parse_device,
    read_own_device,
)

BOARD = "{train_gflops: 18.2, infer_gflops: 20, memory_gb: 2, power_w: 6, source: measured here}"


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_every_device_is_named_by_its_row_and_says_where_its_figures_come_from(device):
    assert DEVICES[device.name] is device
    assert len(device.source) > 20


def test_an_estimate_is_told_from_a_measurement():
    assert "train_gflops" not in DEVICES["jetson-nano"].estimate
    assert "train_gflops" in DEVICES["phone"].estimate


def test_a_users_file_adds_rows_and_replaces_rows(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"pi-4: {BOARD}\nmy-board: {BOARD}\n")
    devices = load_devices(file)
    assert devices["pi-4"].train_gflops == devices["my-board"].train_gflops == 18.2
    assert devices["pi-5"] == DEVICES["pi-5"]
    assert load_devices() == DEVICES


def test_a_row_may_say_how_well_convs_run_and_how_reliable_the_device_is(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"x: {BOARD[:-1]}, efficiency: {{fmdconv: 0.5}}, availability: 0.8, jitter: 0.2}}")
    device = load_devices(file)["x"]
    assert (device.availability, device.jitter) == (0.8, 0.2)
    for conv, rates in {"fmdconv": (9.1, 10), "static": (18.2, 20)}.items():
        running = device.running("resnet8", conv, 4)
        assert (running.train_gflops, running.infer_gflops) == rates


def test_training_and_inference_may_have_factors_of_their_own_for_some_numbers_of_kernels(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"x: {BOARD[:-1]}, efficiency: {{fmdconv/4: {{train: 0.5, infer: 0.25}}, dyconv: 0.8}}}}")
    assert load_devices(file)["x"].efficiency == {
        Scope("fmdconv", 4): Factors(0.5, 0.25),
        Scope("dyconv"): Factors(0.8, 0.8),
    }


@pytest.mark.parametrize(
    ("efficiency", "kernels", "factor"),
    [
        ({"fmdconv/4": 0.5, "fmdconv": 0.9, "fmdconv/1": 0.7}, 4, 0.5),  # exactly these
        ({"fmdconv/4": 0.5, "fmdconv": 0.9, "fmdconv/1": 0.7}, 2, 0.9),  # any number
        ({"fmdconv/4": 0.5, "fmdconv/1": 0.7}, 8, 0.5),  # the nearest,
        ({"fmdconv/16": 0.5, "fmdconv/2": 0.7}, 6, 0.5),  # by ratio: 16 / 6 < 6 / 2,
        ({"fmdconv/1": 0.7, "fmdconv/4": 0.5}, 2, 0.5),  # and of two as near the larger
        ({"odconv/4": 0.5, "static": 0.3}, 4, 1),
    ],
)
def test_which_factor_counts_for_k_kernels(efficiency, kernels, factor):
    device = Device("mine", 10, 20, 1, 1, "here", efficiency=efficiency)
    running = device.running("resnet8", "fmdconv", kernels)
    assert (running.train_gflops, running.infer_gflops) == (10 * factor, 20 * factor)


def test_a_models_speed_may_be_for_some_number_of_kernels_too():
    models = {"resnet8/fmdconv/1": Speed(8, 4), "resnet8/fmdconv/4": Speed(2, 1)}
    device = Device("mine", 10, 20, 1, 1, "here", models=models)
    rates = [device.running("resnet8", "fmdconv", kernels).train_gflops for kernels in (1, 3, 8)]
    assert rates == [8, 2, 2]


DEVICE = Device(
    "mine",
    train_gflops=20,
    infer_gflops=10,
    memory_gb=2,
    power_w=6,
    source="measured here",
    efficiency={"fmdconv": 0.5, "odconv/4": Factors(0.5, 0.25)},
    step_s=0.1,
    round_s=1,
    models={"resnet8/fmdconv": Speed(8, 4, step_s=0.02), "resnet18/odconv/2": Speed(6, 3)},
    down_mbps=50,
)


@pytest.mark.parametrize(
    ("arch", "conv", "speed"),
    [
        ("resnet8", "fmdconv", Speed(8, 4, 0.02, 0)),
        ("resnet18", "fmdconv", Speed(10, 5, 0.1, 1)),
        ("resnet8", "static", Speed(20, 10, 0.1, 1)),
    ],
    ids=["its own speed", "by conv", "at the full rates"],
)
def test_the_speed_on_a_model_is_the_most_special_one_that_the_row_has(arch, conv, speed):
    running = DEVICE.running(arch, conv, 4)
    assert Speed(running.train_gflops, running.infer_gflops, running.step_s, running.round_s) == speed
    assert running.running(arch, conv, 4) == running


def test_a_device_may_have_a_link_of_its_own_in_each_direction():
    assert DEVICE.bandwidth(Bandwidth(1e6, 2e6)) == Bandwidth(50e6, 2e6)
    assert DEVICES["pi-4"].bandwidth(Bandwidth(1e6, 2e6)) == Bandwidth(1e6, 2e6)


def write_devices(path, *devices):
    path.write_text(yaml.safe_dump({device.name: device_row(device) for device in devices}))
    return path


@pytest.mark.parametrize("device", [DEVICE, *DEVICES.values()], ids=lambda device: device.name)
def test_a_device_survives_a_file_and_a_message(device, tmp_path):
    assert read_own_device(write_devices(tmp_path / "box.yaml", device)) == device
    assert parse_device(device_text(device), "message") == device


def laughs(depth):
    """A device file whose few aliases stand for 10^depth words."""
    names = "abcdefghij"[: depth + 1]
    words = f"&a [{','.join('x' * 10)}]"
    nested = ", ".join(f"{n}: &{n} [{','.join([f'*{p}'] * 10)}]" for p, n in pairwise(names))
    return f"x: {{source: {words}, {nested}}}"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (laughs(8), "cannot be read: Expecting value"),
        ("[" * 60_000, "cannot be read: it is nested too deeply"),
        ('{"x": ' * 10_000, "cannot be read: it is nested too deeply"),
        ('{"x": ' + "9" * 5000 + "}", "integer"),
        ('{"x": {"train_gflops": NaN}}', "row 'x', key 'train_gflops'"),
        ("[]", "must hold one row per name"),
        ("{}", "holds 0 devices"),
    ],
    ids=["aliases", "lists", "mappings", "digits", "nan", "list", "none"],
)
def test_a_text_that_a_client_sent_cannot_blow_up(text, fault):
    with pytest.raises(ValueError, match=fault) as error:
        parse_device(text, "its device file")
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(("key", "value"), [("train_gflops", 1e-300), ("memory_gb", 1e30), ("step_s", 1e300)])
def test_no_device_can_stop_the_virtual_clock(key, value):
    row = device_row(DEVICES["pi-4"]) | {key: value}
    with pytest.raises(ValueError, match=key):
        parse_device(json.dumps({"snail": row}), "message")


def test_a_row_says_nothing_that_goes_without_saying():
    assert list(device_row(Device("mine", 1, 2, 3, 4, "here"))) == [
        "train_gflops",
        "infer_gflops",
        "memory_gb",
        "power_w",
        "source",
    ]


def test_an_edge_device_has_one_device(tmp_path):
    with pytest.raises(
        ValueError, match=r"two\.yaml: holds 2 devices, an edge device's own file must hold one"
    ):
        read_own_device(write_devices(tmp_path / "two.yaml", DEVICE, DEVICES["pi-4"]))


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_built_in_devices_are_always_there_and_steady(device):
    assert (device.availability, device.jitter) == (1, 0)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_built_in_devices_run_dynamic_convolutions_slower_by_an_estimate(device):
    assert "efficiency" in device.estimate
    assert device.running("resnet8", "static", 4).train_gflops == device.train_gflops
    measured = {scope.name for scope in device.efficiency}
    assert measured >= {"condconv", "dyconv", "odconv", "fmdconv"}
    for conv in measured:
        few, many = (device.running("resnet8", conv, kernels) for kernels in (1, 4))
        assert many.train_gflops <= few.train_gflops < device.train_gflops
        assert many.infer_gflops < device.infer_gflops


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES.keys())
def test_built_in_devices_need_time_for_flops_alone_and_have_the_fleets_link(device):
    assert (device.models, device.step_s, device.round_s) == ({}, 0, 0)
    assert (device.down_mbps, device.up_mbps) == (None, None)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (f"x: {BOARD.replace('18.2', '-1')}", ["'x'", "'train_gflops'", "-1"]),
        (f"x: {BOARD.replace('18.2', '0')}", ["'x'", "'train_gflops'", "0"]),
        (f"x: {BOARD.replace('18.2', '.inf')}", ["'x'", "'train_gflops'", "inf"]),
        (f"x: {BOARD.replace('18.2', 'fast')}", ["'x'", "'train_gflops'", "fast"]),
        (f"x: {BOARD.replace('18.2', 'true')}", ["'x'", "'train_gflops'", "True"]),
        (f"x: {BOARD.replace('power_w', 'watts')}", ["'x'", "'watts'", "power_w"]),
        (f"x: {BOARD.replace('power_w: 6, ', '')}", ["'x'", "'power_w'", "required"]),
        (f"x: {BOARD[:-1]}, estimate: [colour]}}", ["'x'", "'estimate'", "colour"]),
        (
            f"x: {BOARD[:-1]}, efficiency: {{fmdcnv: 0.5}}}}",
            ["'x'", "'efficiency'", "did you mean 'fmdconv'"],
        ),
        (f"x: {BOARD[:-1]}, efficiency: {{fmdconv: 0}}}}", ["'x'", "'efficiency'", "greater than 0"]),
        (f"x: {BOARD[:-1]}, efficiency: {{fmdconv/0: 1}}}}", ["'x'", "'efficiency'", "'fmdconv/0' needs"]),
        (f"x: {BOARD[:-1]}, efficiency: {{fmdconv/x: 1}}}}", ["'x'", "'efficiency'", "'fmdconv/x'"]),
        (f"x: {BOARD[:-1]}, efficiency: {{fmdconv: {{train: 1}}}}}}", ["'x'", "'efficiency'"]),
        (f"x: {BOARD[:-1]}, availability: 0}}", ["'x'", "'availability'", "greater than 0"]),
        (f"x: {BOARD[:-1]}, availability: 1.1}}", ["'x'", "'availability'", "less than or equal to 1"]),
        (f"x: {BOARD[:-1]}, jitter: -0.1}}", ["'x'", "'jitter'", "greater than or equal to 0"]),
        (f"x: {BOARD[:-1]}, step_s: -1}}", ["'x'", "'step_s'", "greater than or equal to 0"]),
        (f"x: {BOARD[:-1]}, up_mbps: 0}}", ["'x'", "'up_mbps'", "greater than 0"]),
        (
            f"x: {BOARD[:-1]}, models: {{resnet8/fmdcnv: {{train_gflops: 1, infer_gflops: 1}}}}}}",
            ["'x'", "'models'", "did you mean 'resnet8/fmdconv'"],
        ),
        (f"x: {BOARD[:-1]}, models: {{resnet8/fmdconv: {{train_gflops: 1}}}}}}", ["'x'", "infer_gflops"]),
        ("x: 3", ["'x'", "3"]),
        ("just text", ["just text"]),
        ("x: {", ["cannot be read"]),
    ],
)
def test_a_wrong_file_is_refused_in_one_line_that_names_file_row_and_key(tmp_path, text, named):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.yaml") as error:
        load_devices(file)
    assert all(part in str(error.value) for part in named)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.yaml: cannot be read"):
        load_devices(Path("nowhere.yaml"))


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS.keys())
def test_a_link_runs_from_its_minimum_through_its_median_to_its_maximum(link):
    rates = [link.sample(u / 10) for u in range(11)]
    assert [rate.down_bps for rate in rates] == sorted(rate.down_bps for rate in rates)
    for u, place in ((0, 0), (5, 1), (10, 2)):
        assert rates[u].down_bps == pytest.approx(1e6 * link.down_mbps[place])
        assert rates[u].up_bps == pytest.approx(1e6 * link.up_mbps[place])


def test_between_two_quantiles_a_link_is_log_linear():
    link = Link("lab", down_mbps=(1, 100, 10_000), up_mbps=(4, 4, 16), source="made up")
    assert link.sample(0.25) == Bandwidth(down_bps=10e6, up_bps=4e6)
    assert link.sample(0.75) == Bandwidth(down_bps=1000e6, up_bps=8e6)


def test_a_fixed_link_is_exact_and_the_same_for_all():
    assert {LINKS["broadband"].sample(u) for u in (0.0, 0.1, 0.5, 0.9)} == {Bandwidth(100e6, 20e6)}


def test_the_quantiles_of_a_link_must_not_fall():
    with pytest.raises(ValueError, match="must not fall"):
        Link("lab", down_mbps=(3, 2, 1), up_mbps=(1, 1, 1), source="made up")
