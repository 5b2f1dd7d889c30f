import contextlib
from dataclasses import replace

import numpy as np
import pytest

import strategies.buffered
from fedfmd.build import build_federation
from fedfmd.edge import WorkPlan
from fedfmd.edge.devices import DEVICES, Bandwidth
from fedfmd.edge.fleet import Client
from fedfmd.protocol.state import pack
from fedfmd.runs import RunFolder, read_clients, read_rounds
from strategies import make_strategy
from strategies.buffered import Flight, fill_buffer

SECONDS = {0: 1.0, 1: 2.5, 2: 4.0, 3: 4.0}  # what a flight of each client takes
ASYNCHRONOUS = {
    "server.strategy": "fedbuff",
    "server.buffer": 2,
    "server.clients-per-round": 2,
    "server.rounds": 4,
    "partition.clients": 4,
    "fleet.devices": "pi-4:2, jetson-nano:2",
}


def flight(number, version, start_s, client, status="ok"):
    plan = WorkPlan(
        client=Client(client, DEVICES["pi-4"], Bandwidth(1e6, 1e6)),
        latency_s=0.0,
        compute_s=SECONDS[client],
        status=status,
    )
    return Flight(number, version, start_s, start_s + SECONDS[client], plan)


def starter(version, order, first=4):
    """Starts the clients of `order`, one after another, as flights `first`, `first` + 1, …"""
    waiting = list(order)

    def start(now, busy):
        taken = {other.plan.client.id for other in busy}
        if not waiting or waiting[0] in taken:
            return None
        number = first + len(order) - len(waiting)
        return flight(number, version, now, waiting.pop(0))

    return start


def story(flights):
    return [(f.number, f.plan.client.id, f.version, f.end_s) for f in flights]


def test_the_order_of_events_by_hand():
    """Clients 0, 1 and 2 start at 0 s; client 3 takes the place of 0, which is back after 1 s.

    Client 1 lands at 2.5 s and fills the buffer of two: the server steps, and nobody has taken its place yet.
    """
    start = starter(0, [3])
    landed, working, now = fill_buffer([flight(n, 0, 0.0, n - 1) for n in (1, 2, 3)], 2, start)
    assert story(landed) == [(1, 0, 0, 1.0), (2, 1, 0, 2.5)]
    assert story(working) == [(3, 2, 0, 4.0), (4, 3, 0, 5.0)]
    assert now == 2.5
    # the next buffer: client 0 started at 2.5 s on the new version overtakes those that are at work
    working.append(flight(5, 1, 2.5, 0))
    landed, working, now = fill_buffer(working, 2, starter(1, [1], first=6))
    assert story(landed) == [(5, 0, 1, 3.5), (3, 2, 0, 4.0)]
    assert story(working) == [(4, 3, 0, 5.0), (6, 1, 1, 6.0)]
    assert now == 4.0


def test_landings_at_the_same_time_are_in_the_order_of_the_starts():
    landed, _, _ = fill_buffer([flight(2, 0, 0.0, 3), flight(1, 0, 0.0, 2)], 2, lambda now, busy: None)
    assert [f.number for f in landed] == [1, 2]


def test_a_late_client_lands_without_filling_the_buffer():
    late = flight(1, 0, 0.0, 0, status="late")
    landed, working, now = fill_buffer([late, flight(2, 0, 0.0, 1)], 1, starter(0, [2], first=3))
    assert [f.number for f in landed] == [1, 2]
    assert story(working) == [(3, 2, 0, 5.0)]
    assert now == 2.5


def test_where_nobody_is_left_the_buffer_stays_short():
    landed, working, now = fill_buffer([flight(1, 0, 0.0, 0)], 3, lambda now, busy: None)
    assert (len(landed), working, now) == (1, [], 1.0)
    assert fill_buffer([], 3, lambda now, busy: None) == ([], [], 0.0)


@pytest.fixture
def run(make_federation, make_grid, tmp_path):
    def run(name="run", **changes):
        strategy = make_strategy(make_federation(ASYNCHRONOUS | changes), RunFolder(tmp_path / name))
        strategy.before = pack(strategy.federation.model)
        strategy.run(make_grid())
        return strategy

    return run


def test_rounds_follow_the_clock_and_fast_clients_come_more_often(run):
    strategy = run(**{"train.local-epochs": 40})
    rounds, clients = read_rounds(strategy.folder.rounds), read_clients(strategy.folder.clients)
    assert [row.clients_ok for row in rounds] == [2, 2, 2, 2]
    times = [row.virtual_s for row in rounds]
    assert times == sorted(times)
    assert rounds[-1].virtual_s == pytest.approx(sum(row.round_s for row in rounds))
    assert len({row.client for row in clients if row.round == 1}) == 2
    nano = sum(row.device == "jetson-nano" for row in clients)
    assert nano > len(clients) / 2


def test_an_update_counts_less_the_older_it_is(run, monkeypatch):
    """A stub client c adds c + 1 to the arrays it began with; each update fills the buffer on its own."""
    steps = []

    def spy(flights, size, start):
        result = fill_buffer(flights, size, start)
        steps.append(result[0])
        return result

    monkeypatch.setattr(strategies.buffered, "fill_buffer", spy)
    strategy = run(**{"server.buffer": 1, "server.staleness": 1.0, "server.rounds": 6})
    growth = sum((f.plan.client.id + 1) / (1 + version - f.version) for version, (f,) in enumerate(steps))
    assert any(version > f.version for version, (f,) in enumerate(steps))
    state, start = strategy.federation.model.fc.bias, strategy.before["fc.bias"]
    np.testing.assert_allclose(state.detach(), start + growth, rtol=1e-5)


def test_a_flight_for_which_nobody_is_there_is_tried_anew(run):
    """Each client is there in a third of all draws, so that one draw in five finds none of the four."""
    changes = {"fleet.devices": "pi-4", "fleet.availability": 1 / 3, "server.buffer": 1, "server.rounds": 30}
    rows = read_rounds(run(**changes).folder.rounds)
    assert sum(row.clients_ok == 0 for row in rows) in range(1, 15)
    assert rows[-1].virtual_s > rows[-2].virtual_s or rows[-1].clients_ok


def test_clients_that_land_at_once_take_no_time_below_zero(run, monkeypatch):
    """The clock, a sum of seconds, may be a rounding error ahead of the second landing."""
    landings = []

    def at_once(flights, size, start):
        landed, working, now = fill_buffer(flights, size, start)
        landings.append(np.nextafter(landings[0], 0) if landings else now)
        return landed, working, landings[-1]

    monkeypatch.setattr(strategies.buffered, "fill_buffer", at_once)
    strategy = run(**{"server.buffer": 1, "server.rounds": 2})
    assert read_rounds(strategy.folder.rounds)[1].round_s == 0


def test_a_resumed_run_knows_the_devices_of_clients_that_were_at_work(tiny_settings, make_grid, tmp_path):
    """What edge devices are and hold, they say themselves; the fleet of the settings would take longer."""
    settings = tiny_settings(**ASYNCHRONOUS | {"model.conv": "static", "train.local-epochs": 2})
    devices = [{"client": client, "device": "pi-5"} for client in range(4)]

    def go_on(name, rounds):
        strategy = make_strategy(build_federation(settings), RunFolder(tmp_path / name))

        def behave(client, number):
            if strategy.progress.round == rounds:
                raise SystemExit
            return ""

        with contextlib.suppress(SystemExit):
            strategy.run(make_grid(devices, behave))
        return [replace(row, wall_s=0.0) for row in read_rounds(strategy.folder.rounds)]

    whole = go_on("whole", 4)
    assert len(go_on("resumed", 2)) == 2
    assert go_on("resumed", 4) == whole


def test_running_variances_stay_positive(run):
    strategy = run(**{"model.norm": "batch", "server.rounds": 6})
    variances = [b for n, b in strategy.federation.model.named_buffers() if n.endswith("running_var")]
    assert all((variance > 0).all() for variance in variances)
