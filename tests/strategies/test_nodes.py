import json
import re
from dataclasses import replace

import pytest
from flwr.app import ConfigRecord, Error, Message, MessageType, MetricRecord, RecordDict

import strategies.nodes
from fedfmd.data import ImageFormat
from fedfmd.edge import Device, Speed, device_text, plan_work
from fedfmd.engines.inline import InlineGrid
from fedfmd.errors import RunError
from strategies.nodes import (
    Node,
    assign,
    check_device,
    empty,
    exchange,
    meet_again,
    meet_nodes,
    on_edge_devices,
    reachable,
)

FIGURES = {"train_gflops": 1e-300, "infer_gflops": 1, "memory_gb": 1, "power_w": 1, "source": "me"}
SLOWEST = json.dumps({"snail": FIGURES})
IMAGES = ImageFormat(("cat", "dog"), 8, (0.5,) * 3, (0.25,) * 3, "none")


@pytest.fixture(autouse=True)
def _poll_fast(monkeypatch):
    monkeypatch.setattr(strategies.nodes, "POLL_S", 0.01)


def worker(rank, nodes):
    return {"rank": rank, "nodes": nodes}


def edge_device(client, **told):
    return {"client": client, "rank": client, "images": 10} | told


def meet(grid, clients, timeout_s=1.0, least=None):
    return meet_nodes(grid, IMAGES, clients, timeout_s, least or clients)


def test_nodes_come_in_the_order_of_their_ranks(make_grid):
    nodes = meet(make_grid([worker(2, 3), worker(0, 3), worker(1, 3)]), 10, 1)
    assert [(node.rank, node.client) for node in nodes] == [(0, None), (1, None), (2, None)]
    assert [node.id for node in nodes] == [1001, 1002, 1000]


def test_edge_devices_tell_what_they_have(make_grid):
    nodes = meet(make_grid([edge_device(1, device="pi-5", images=7), edge_device(0)]), 2, 1)
    assert nodes == (Node(1001, 0, 0, 10, ""), Node(1000, 1, 1, 7, "pi-5"))


@pytest.mark.parametrize(
    "configs", [[worker(0, 3), worker(1, 3), worker(2, 3)], [edge_device(0), edge_device(1), edge_device(2)]]
)
def test_nodes_that_come_late_are_waited_for(make_grid, monkeypatch, configs):
    grid = make_grid(configs)
    looks = iter(range(10))
    monkeypatch.setattr(grid, "get_node_ids", lambda: InlineGrid.get_node_ids(grid)[: next(looks)])
    assert len(meet(grid, 3, 5)) == 3
    assert next(looks) == 4


@pytest.mark.parametrize(
    ("configs", "came"),
    [([], 0), ([worker(0, 2)], 1), ([edge_device(0), edge_device(1)], 2)],
    ids=["none", "worker", "devices"],
)
def test_missing_nodes_are_an_error_after_the_wait(make_grid, configs, came):
    with pytest.raises(
        RunError, match=rf"^{came} of the nodes for partition\.clients = 3 .*node-timeout-s = 0\.05"
    ):
        meet(make_grid(configs), 3, 0.05)


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        (
            [edge_device(0), edge_device(1, error="no file x.npz")],
            "the edge device of client 1 refuses: no file x.npz",
        ),
        (
            [edge_device(0), edge_device(2), edge_device(2)],
            "client 2 is there already, as node 1001: node 1002 is left out",
        ),
        ([edge_device(0), edge_device(3)], "client 3 is none of this run's, whose partition.clients = 3"),
        ([edge_device(0), worker(0, 1)], "node 1001 hosts any client, and others are edge devices: give all"),
        (
            [edge_device(0), edge_device(1, images=0)],
            "the edge device of client 1 can't be used: it has no images",
        ),
        ([{"client": "first"}], "node 1000 could not start: .*first"),
        ([worker(0, 1) | {"error": "unknown key clients = 0"}], "node 1000 refuses: unknown key clients = 0"),
    ],
)
def test_nodes_that_cannot_be_used_are_named(make_grid, configs, message):
    with pytest.raises(RunError, match=message):
        meet(make_grid(configs), 3, 0.05)


def test_a_simulation_whose_workers_all_refuse_ends_at_once(make_grid):
    refusing = [worker(rank, 2) | {"error": "no data"} for rank in range(2)]
    with pytest.raises(RunError, match="node 1000 refuses: no data; node 1001 refuses: no data"):
        meet(make_grid(refusing), 3, 600)


def test_a_simulation_goes_on_with_the_workers_that_it_has(make_grid):
    nodes = meet(make_grid([worker(0, 2) | {"error": "no data"}, worker(1, 2)]), 3, 600)
    assert [node.id for node in nodes] == [1001]


STRANGE = [
    ({"client": 5.5}, "node 1003 can't be used: its answer client: .*integer"),
    ({"client": -2}, "node 1003 can't be used: its answer client"),
    ({"images": "ten"}, "node 1003 can't be used: its answer images: .*integer"),
    ({"images": 2**62}, "node 1003 can't be used: its answer images: .*1000000000000"),
    ({"rank": [1, 2]}, "node 1003 can't be used: its answer rank: .*integer"),
    ({"device": b"pi-4"}, "node 1003 can't be used: its answer device: .*string"),
    ({"profile": "x" * 10**5}, "node 1003 can't be used: its answer profile: .*65536"),
    (
        {"client": 2, "error": "\x1b[2J\x1b]0;x\x07=cmd()\n" + "x" * 5_000_000},
        "client 2 refuses: '=cmd.. x{200,300}…$",
    ),
    ({"client": 2, "profile": "x: &a [1]"}, "client 2 can't be used: its device file: cannot be read"),
    ({"client": 2, "profile": "[" * 60_000}, "client 2 can't be used: its device file: cannot be read"),
    ({"client": 2, "profile": '{"=1+1": {}}'}, "client 2 can't be used: its device file: row '=1.1'"),
    ({"client": 2, "device": "toaster"}, "client 2 can't be used: .* unknown device 'toaster'"),
    ({"client": 2, "device": "box.yaml", "profile": SLOWEST}, "client 2 can't be used: .*train_gflops"),
    ({"client": 1}, "the edge device of client 1 is there already, as node 1001: node 1003 is left out"),
    ({"client": 99}, "the edge device of client 99 is none of this run's"),
]


@pytest.mark.parametrize(("told", "fault"), STRANGE)
def test_one_nodes_strange_answer_leaves_the_others_at_work(make_grid, caplog, told, fault, tiny_settings):
    grid = make_grid(
        [edge_device(0), edge_device(1), edge_device(2), {}], answers={1003: {"images": 9} | told}
    )
    nodes = meet_nodes(grid, IMAGES, 3, 5.0, 3, check_device(tiny_settings()))
    assert [node.id for node in nodes] == [1000, 1001, 1002]
    (warning,) = caplog.messages
    assert re.search(fault, warning)
    assert len(warning) < 500
    assert warning.isprintable()


@pytest.mark.parametrize("record", ["missing", "of metrics"])
def test_an_answer_without_its_record_is_no_answer(make_grid, caplog, record):
    content = RecordDict({"config": MetricRecord({"client": 2})} if record == "of metrics" else {})
    meet(make_grid([edge_device(0), edge_device(1), {}], answers={1002: content}), 2)
    assert re.search("node 1002 can't be used: the record config is ", caplog.text)


def test_a_newcomer_does_not_take_the_place_of_an_edge_device_that_is_there(come_and_go, caplog):
    there = [0, 1]
    grid = come_and_go([edge_device(0), edge_device(1), edge_device(1, images=99)], there)
    known = meet(grid, clients=2)
    there.append(2)
    assert meet_again(known, grid, IMAGES, 2, 1.0, least=2) == known
    assert "client 1 is there already, as node 1001: node 1002 is left out" in caplog.text


def test_a_resumed_run_makes_do_with_some_of_its_edge_devices(make_grid):
    nodes = meet(make_grid([edge_device(2), edge_device(0)]), clients=3, timeout_s=0.05, least=2)
    assert [node.client for node in nodes] == [0, 2]


@pytest.fixture
def come_and_go(make_grid, monkeypatch):
    """Makes a grid on which those edge devices are there that `there`, a list that may be changed, names by place."""

    def make(configs, there):
        grid = make_grid(configs)
        monkeypatch.setattr(grid, "get_node_ids", lambda: [1000 + place for place in there])
        return grid

    return make


def test_edge_devices_that_go_and_come_back_are_noticed(come_and_go, caplog):
    there = [0, 1]
    grid = come_and_go([edge_device(0), edge_device(1), edge_device(1, images=9)], there)
    known = meet(grid, clients=2)

    there.remove(1)
    left = meet_again(known, grid, IMAGES, 2, 1.0, least=1)
    assert [node.client for node in left] == [0]
    there.append(2)
    back = meet_again(left, grid, IMAGES, 2, 1.0, least=1)
    assert back == (known[0], Node(1002, 1, 1, 9, ""))

    assert [record.message for record in caplog.records] == [
        "the edge device of client 1 is gone",
        "the edge device of client 1 is there again",
    ]


def test_a_restarted_edge_device_takes_the_place_of_its_old_self(come_and_go):
    there = [0, 1]
    grid = come_and_go([edge_device(0), edge_device(1), edge_device(1)], there)
    known = meet(grid, clients=2)
    there[:] = [0, 2]
    assert [node.id for node in meet_again(known, grid, IMAGES, 2, 1.0, least=2)] == [1000, 1002]


@pytest.mark.parametrize(
    ("stranger", "warning"),
    [
        (edge_device(1, error="no file x.npz"), "the edge device of client 1 refuses: no file x.npz"),
        ({"client": "first"}, "node 1002 could not start: .*first"),
        (worker(0, 2), "node 1002 hosts any client, and others are edge devices"),
        (edge_device(2), "the edge device of client 2 is none of this run's, whose partition.clients = 2"),
    ],
)
def test_strangers_that_cannot_be_used_are_left_out(come_and_go, caplog, stranger, warning):
    there = [0, 1]
    grid = come_and_go([edge_device(0), edge_device(1), stranger], there)
    known = meet(grid, clients=2)
    there[:] = [0, 2]
    assert [node.client for node in meet_again(known, grid, IMAGES, 2, 1.0, least=1)] == [0]
    assert re.match(warning, caplog.records[0].message)


def test_too_few_edge_devices_end_the_run_after_the_wait(come_and_go):
    there = [0, 1]
    grid = come_and_go([edge_device(0), edge_device(1)], there)
    known = meet(grid, clients=2)
    there.clear()
    with pytest.raises(
        RunError, match=r"0 of 2 edge devices .*node-timeout-s = 0\.05.*max-failed-share .* 1 go on"
    ):
        meet_again(known, grid, IMAGES, 2, 0.05, least=1)


def test_clients_are_reachable_if_a_node_can_train_them():
    assert reachable([Node(5, 0, 2, 10, ""), Node(6, 1, 0, 20, "")], [0, 1, 2]) == [0, 2]
    assert reachable([Node(5, 0, None, 0, "")], [0, 1, 2]) == [0, 1, 2]


def test_edge_devices_bring_their_own_images_and_devices(make_federation):
    simulated = make_federation()
    devices = (Node(5, 0, 0, 7, "pi-5"), Node(6, 1, 1, 8, ""), Node(7, 2, 2, 9, "jetson-nano"))
    federation = on_edge_devices(simulated, devices)
    assert federation.sizes == (7, 8, 9)
    assert federation.fleet.counts == {"jetson-nano": 1, "pi-4": 1, "pi-5": 1}
    assert federation.fleet.clients[1] == simulated.fleet.clients[1]
    assert [federation.workload(client).images for client in range(3)] == [7, 8, 9]
    for ours, theirs in zip(federation.fleet.clients, simulated.fleet.clients, strict=True):
        assert ours.bandwidth == theirs.bandwidth


def test_workers_change_nothing(make_federation):
    federation = make_federation()
    assert on_edge_devices(federation, (Node(5, 0, None, 0, ""),)) == federation


def test_an_edge_device_may_have_a_device_of_the_devices_file(make_federation, tmp_path):
    file = tmp_path / "devices.yaml"
    file.write_text("toaster: {train_gflops: 1, infer_gflops: 2, memory_gb: 3, power_w: 4, source: me}")
    federation = on_edge_devices(
        make_federation({"fleet.devices-file": str(file)}), (Node(5, 0, 0, 7, "toaster"),)
    )
    assert federation.fleet.clients[0].device.power_w == 4


def test_an_edge_device_with_an_unknown_device_is_named(make_federation):
    with pytest.raises(
        RunError,
        match=r"client 2 can't be used: it has the unknown device 'toaster': .*pi-4.*fleet\.devices-file",
    ):
        on_edge_devices(make_federation(), (Node(5, 2, 2, 7, "toaster"),))


TOASTER = Device("toaster", 3, 2, 1, 4, "me", models={"resnet8/static": Speed(7, 6, 0.5, 0.25)}, down_mbps=80)


def test_an_edge_device_may_bring_its_own_device(make_grid, make_federation):
    told = {"device": "/srv/box.yaml", "profile": device_text(TOASTER)}
    nodes = meet_nodes(
        make_grid([edge_device(0, **told), edge_device(1), edge_device(2)]),
        IMAGES,
        clients=3,
        timeout_s=1,
        least=3,
    )
    assert [node.profile for node in nodes] == [TOASTER, None, None]
    simulated = make_federation({"model.conv": "static", "fleet.jitter": 0.3}).fleet.clients[0]
    client = on_edge_devices(
        make_federation({"model.conv": "static", "fleet.jitter": 0.3}), nodes
    ).fleet.clients[0]
    assert client.device == replace(
        TOASTER, train_gflops=7, infer_gflops=6, step_s=0.5, round_s=0.25, models={}, jitter=0.3
    )
    assert client.bandwidth == replace(simulated.bandwidth, down_bps=80e6)


def test_an_edge_device_whose_device_the_server_cannot_read_is_named(make_grid):
    grid = make_grid(
        [edge_device(0, device="box.yaml", profile='{"x": {"watts": 3}}'), edge_device(1), edge_device(2)]
    )
    with pytest.raises(
        RunError, match=r"the edge device of client 0 can't be used: its device file: row 'x', .*'watts'"
    ):
        meet_nodes(grid, IMAGES, clients=3, timeout_s=0.05, least=3)


@pytest.fixture
def plans(make_federation):
    """Plans of three clients with 30, 20 and 10 images."""
    federation = replace(make_federation({"train.batch-size": 10}), sizes=(30, 20, 10))
    return [
        plan_work(federation.fleet.clients[c], federation.workload(c), federation.budget) for c in range(3)
    ]


def hands(nodes, plans, separate=False):
    return [(node, [plan.client.id for plan in hand]) for node, hand in assign(nodes, plans, separate)]


def test_workers_are_busy_equally_long(plans):
    assert hands([Node(5, 0, None, 0, ""), Node(6, 1, None, 0, "")], plans) == [(5, [0]), (6, [1, 2])]


def test_workers_without_work_get_no_message(plans):
    assert hands([Node(5, 0, None, 0, ""), Node(6, 1, None, 0, "")], plans[1:2]) == [(5, [1])]


def test_edge_devices_get_their_own_client_if_it_was_picked(plans):
    devices = [Node(5, 0, 2, 10, ""), Node(6, 1, 1, 20, ""), Node(7, 2, 0, 30, "")]
    assert hands(devices, plans[1:]) == [(5, [2]), (6, [1])]


def test_a_message_holds_one_client_where_updates_are_needed_separately(plans):
    workers = [Node(5, 0, None, 0, ""), Node(6, 1, None, 0, "")]
    assert hands(workers, plans, separate=True) == [(5, [0]), (6, [1]), (6, [2])]


def test_an_exchange_ends_when_all_replies_are_there_and_tells_when_each_was(make_grid, monkeypatch):
    grid = make_grid([worker(0, 2), worker(1, 2)])
    first, second = (Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids())
    looks = iter(range(10))

    def pull(ids):
        """The first reply at the first look, both at the fourth."""
        early = set(ids) & {first.metadata.message_id}
        return InlineGrid.pull_messages(grid, early if next(looks) < 3 else ids)

    monkeypatch.setattr(grid, "pull_messages", pull)
    replies, seconds = exchange(grid, [first, second], timeout_s=5)
    assert [reply.metadata.src_node_id for reply in replies] == grid.get_node_ids()
    assert next(looks) == 4
    early, late = (seconds[message.metadata.message_id] for message in (first, second))
    assert 0 < early < late - 3 * strategies.nodes.POLL_S / 2


def test_an_exchange_waits_no_longer_than_it_may(make_grid, monkeypatch):
    grid = make_grid([worker(0, 1)])
    monkeypatch.setattr(grid, "pull_messages", lambda ids: [])
    message = Message(RecordDict(), grid.get_node_ids()[0], MessageType.QUERY)
    assert exchange(grid, [message], timeout_s=0.05) == ([], {})


def test_an_exchange_of_nothing_is_over_at_once(make_grid):
    assert exchange(make_grid([]), [], timeout_s=60) == ([], {})


def test_messages_can_be_emptied_and_errors_stay():
    question = Message(RecordDict({"config": ConfigRecord({"a": 1})}), 1000, MessageType.QUERY)
    failed = Message(Error(2, "no data"), reply_to=question)
    empty([question, failed])
    assert not question.content
    assert failed.error.reason == "no data"
