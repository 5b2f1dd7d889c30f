import math
from dataclasses import replace
from fractions import Fraction
from statistics import fmean, median, stdev

import pytest

from fedfmd.edge import DEVICES, LINKS, Bandwidth, Client, Device, Fleet, Trace, make_fleet, parse_fleet

HALF = Fraction(1, 2)
WIFI = LINKS["wifi"]


@pytest.mark.parametrize(
    ("spec", "amounts"),
    [
        ("pi-4:4, jetson-nano:4,phone : 2", {"pi-4": 4, "jetson-nano": 4, "phone": 2}),
        ("pi-4:50%, phone:50%", {"pi-4": HALF, "phone": HALF}),
        ("pi-4:0.5, phone:50%", {"pi-4": HALF, "phone": HALF}),
        ("pi-4", {"pi-4": Fraction(1)}),
        ("pi-4:33%, pi-5:33%, phone:33%", dict.fromkeys(["pi-4", "pi-5", "phone"], Fraction(1, 3))),
        ({"pi-4": 4, "phone": 2}, {"pi-4": 4, "phone": 2}),
        ({"pi-4": 0.5, "phone": "50%"}, {"pi-4": HALF, "phone": HALF}),
    ],
)
def test_a_fleet_is_read_as_counts_or_as_shares(spec, amounts):
    assert parse_fleet(spec) == amounts


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        ("pi-4:1, phone:50%", "counts only or shares only"),
        ("pi-4:50%, phone:40%", "sum to 0.9"),
        ("pi-4, phone", "sum to 2"),
        ("pi-4:many", "'many'"),
        ("pi-4:0", "'0'"),
        ("pi-4:-3", "'-3'"),
        ("pi-4:", "''"),
        ("pi-4:1, pi-4:2", "twice"),
        ({"pi-4": True}, "'True'"),
        ({}, "counts only or shares only"),
    ],
)
def test_a_wrong_fleet_names_the_setting_and_the_fault(spec, named):
    with pytest.raises(ValueError, match=r"fleet\.devices") as error:
        parse_fleet(spec)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("spec", "clients", "counts"),
    [
        ("pi-4:4, phone:2", 6, {"phone": 2, "pi-4": 4}),
        ("pi-4:50%, phone:30%, pi-5:20%", 10, {"phone": 3, "pi-4": 5, "pi-5": 2}),
        ("pi-4:50%, phone:30%, pi-5:20%", 4, {"phone": 1, "pi-4": 2, "pi-5": 1}),  # 2, 1.2, 0.8
        ("pi-4:50%, phone:50%", 3, {"phone": 1, "pi-4": 2}),  # a tie goes to the first
        ("pi-4:0.29, phone:0.71", 100, {"phone": 71, "pi-4": 29}),
        ("pi-4:90%, phone:10%", 2, {"pi-4": 2}),
    ],
)
def test_shares_are_rounded_by_largest_remainder(spec, clients, counts):
    assert make_fleet(spec, clients, WIFI, seed=0).counts == counts


def test_counts_must_sum_to_the_clients():
    with pytest.raises(ValueError, match=r"fleet\.devices names 6 devices, partition\.clients is 10"):
        make_fleet("pi-4:4, phone:2", 10, WIFI, seed=0)


def test_an_unknown_device_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="'jetson-nanno'; did you mean 'jetson-nano'"):
        make_fleet("jetson-nanno:4", 4, WIFI, seed=0)


def test_a_fleet_can_hold_devices_of_the_users_own():
    mine = Device("mine", 1, 1, 1, 1, source="measured")
    assert make_fleet("mine", 3, WIFI, seed=0, devices=DEVICES | {"mine": mine}).counts == {"mine": 3}


def test_the_seed_decides_which_client_is_which():
    fleets = [make_fleet("pi-4:10, phone:10", 20, WIFI, seed) for seed in (0, 0, 1)]
    assert fleets[0] == fleets[1] != fleets[2]
    assert [client.id for client in fleets[0].clients] == list(range(20))


def test_links_change_neither_with_the_devices_nor_with_the_number_of_clients():
    few = make_fleet("pi-4", 5, WIFI, seed=3)
    many = make_fleet("phone:50%, pi-5:50%", 50, WIFI, seed=3)
    assert [c.bandwidth for c in few.clients] == [c.bandwidth for c in many.clients[:5]]


def test_a_device_brings_its_own_link_and_leaves_the_others_theirs():
    wired = Device("wired", 1, 1, 1, 1, source="measured", down_mbps=900, up_mbps=800)
    plain = make_fleet("pi-4", 6, WIFI, seed=3)
    mixed = make_fleet("pi-4:3, wired:3", 6, WIFI, seed=3, devices=DEVICES | {"wired": wired})
    for client, other in zip(mixed.clients, plain.clients, strict=True):
        own = client.device.name == "wired"
        assert client.bandwidth == (Bandwidth(900e6, 800e6) if own else other.bandwidth)


def test_devices_and_links_are_dealt_independently():
    fleet = make_fleet("pi-4:500, phone:500", 1000, WIFI, seed=0)
    good = [client.device.name for client in fleet.clients if client.bandwidth.down_bps > 34.5e6]
    assert 450 < len(good) < 550  # half of the clients are above the median,
    assert 0.4 < good.count("pi-4") / len(good) < 0.6  # whatever device they have


@pytest.mark.parametrize(
    ("assignment", "names"),
    [
        ("size", ["pi-4", "jetson-nano", "pi-4", "pi-5"]),
        ("inverse", ["jetson-nano", "pi-4", "pi-5", "pi-4"]),
    ],
)
def test_the_fastest_devices_go_to_most_or_to_fewest_images(assignment, names):
    fleet = make_fleet(
        "pi-4:2, jetson-nano:1, pi-5:1", 4, WIFI, seed=0, assignment=assignment, sizes=[10, 40, 20, 30]
    )
    assert [client.device.name for client in fleet.clients] == names


def test_clients_of_equal_size_are_dealt_at_random():
    fleets = [
        make_fleet("pi-4:9, pi-5:1", 10, WIFI, seed, assignment="size", sizes=[7] * 10) for seed in range(20)
    ]
    assert len({[c.device.name for c in fleet.clients].index("pi-5") for fleet in fleets}) > 4


def test_links_do_not_depend_on_the_assignment():
    by_size = make_fleet("pi-4:2, pi-5:1", 3, WIFI, seed=0, assignment="size", sizes=[1, 2, 3])
    assert [c.bandwidth for c in by_size.clients] == [
        c.bandwidth for c in make_fleet("pi-4", 3, WIFI, 0).clients
    ]


def fleet_of(count, seed=0, trace=None, **device):
    profile = replace(DEVICES["pi-4"], **device)
    clients = tuple(Client(id, profile, Bandwidth(1, 1)) for id in range(count))
    return Fleet(clients, seed, trace or Trace())


def test_all_are_there_unless_their_device_or_the_trace_says_otherwise():
    assert fleet_of(3).present(1, 0.0) == [0, 1, 2]


def test_a_device_is_there_with_its_probability():
    fleet = fleet_of(1000, availability=0.3)
    there = [set(fleet.present(server_round, 0.0)) for server_round in (1, 2)]
    assert all(250 < len(clients) < 350 for clients in there)
    assert 60 < len(there[0] & there[1]) < 120  # rounds are independent


def test_who_is_there_depends_on_seed_and_round_and_not_on_the_others():
    assert fleet_of(50, availability=0.5).present(3, 0.0) == fleet_of(50, availability=0.5).present(3, 9.0)
    few = fleet_of(20, availability=0.5).present(3, 0.0)
    assert [c for c in fleet_of(50, availability=0.5).present(3, 0.0) if c < 20] == few
    assert fleet_of(20, seed=1, availability=0.5).present(3, 0.0) != few


def test_for_devices_that_are_always_up_nothing_is_drawn(monkeypatch):
    """Ten thousand generators of random numbers take a third of a second in each round."""
    monkeypatch.setattr(Fleet, "_draw", None)
    assert fleet_of(50, availability=1.0).present(3, 0.0) == list(range(50))


def test_the_trace_says_who_is_there_at_a_time():
    fleet = fleet_of(3, trace=Trace({0: ((0, 10),), 2: ((5, 20),)}, period_s=20))
    assert [fleet.present(1, time) for time in (0.0, 7.0, 12.0)] == [[0, 1], [0, 1, 2], [1, 2]]


def test_an_empty_round_lasts_until_the_next_window_or_as_long_as_a_retry():
    closed = Trace({0: ((30, 40),), 1: ((50, 60),)}, period_s=60)
    assert fleet_of(2, trace=closed).idle_seconds(10.0, retry_s=5.0) == 20
    assert fleet_of(2, trace=closed).idle_seconds(35.0, retry_s=5.0) == 5
    assert fleet_of(2).idle_seconds(10.0, retry_s=5.0) == 5


def test_speeds_are_log_normal_with_median_1():
    fleet = fleet_of(2000, jitter=0.5)
    speeds = [fleet.speed(1, client) for client in fleet.clients]
    assert median(speeds) == pytest.approx(1, abs=0.05)
    assert stdev(math.log(speed) for speed in speeds) == pytest.approx(0.5, abs=0.03)
    assert fmean(fleet.speed(2, c) / fleet.speed(1, c) == 1 for c in fleet.clients) == 0


def test_a_steady_device_has_its_nominal_speed():
    fleet = fleet_of(5)
    assert [fleet.speed(1, client) for client in fleet.clients] == [1] * 5
