import logging
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import psutil
import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp

from fedfmd.engines.forked import can_fork
from fedfmd.engines.inline import InlineGrid
from fedfmd.errors import RunError
from fedfmd.protocol.messages import from_record, to_record

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nodes are forked on Linux alone")


def client_app(answer):
    """An app whose reply to a query holds the records that `answer(message, context)` returns."""
    app = ClientApp()

    @app.query()
    def query(message, context):
        return Message(RecordDict(answer(message, context)), reply_to=message)

    return app


def forked(app, nodes=2):
    return InlineGrid(app, {}, [{"client": client} for client in range(nodes)], forked=True)


def ask(grid, content=None):
    nodes = grid.get_node_ids()
    return grid.send_and_receive(
        [Message(content or RecordDict(), node, MessageType.QUERY) for node in nodes]
    )


def told(replies):
    return [dict(reply.content["told"]) for reply in replies]


def test_every_node_is_a_process_of_one_thread_and_keeps_its_state():
    def count(message, context):
        seen = context.state.config_records.setdefault("seen", ConfigRecord({"n": 0}))
        seen["n"] += 1
        client = context.node_config["client"]
        return {
            "told": ConfigRecord(
                {"client": client, "n": seen["n"], "pid": os.getpid(), "cores": torch.get_num_threads()}
            )
        }

    with forked(client_app(count)) as grid:
        first, again = told(ask(grid)), told(ask(grid))
    assert [(node["client"], node["n"], node["cores"]) for node in first] == [(0, 1, 1), (1, 1, 1)]
    assert [(node["client"], node["n"]) for node in again] == [(0, 2), (1, 2)]
    assert [node["pid"] for node in first] == [node["pid"] for node in again]
    assert len({os.getpid(), *(node["pid"] for node in first)}) == 3


def test_a_node_has_what_was_loaded_before_the_first_message():
    loaded = []
    with forked(client_app(lambda message, context: {"told": ConfigRecord({"n": len(loaded)})})) as grid:
        loaded.append("images")
        assert told(ask(grid)) == [{"n": 1}, {"n": 1}]
        loaded.append("more")
        assert told(ask(grid)) == [{"n": 1}, {"n": 1}]


ARRAYS = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.int64(7),
    "nothing": np.zeros((0, 4), np.float32),
    "odd": np.arange(5, dtype=np.int8),
    "last": np.full((1000, 100), 0.5),
}


@pytest.mark.parametrize("names", [ARRAYS.keys(), ["nothing"], []])
def test_arrays_come_and_go_as_they_are(names):
    def echo(message, context):
        arrays = from_record(message.content["arrays"])
        return {"arrays": to_record({name: array + array for name, array in arrays.items()})}

    sent = {name: np.asarray(ARRAYS[name]) for name in names}
    with forked(client_app(echo)) as grid:
        replies = [
            from_record(reply.content["arrays"])
            for reply in ask(grid, RecordDict({"arrays": to_record(sent)}))
        ]
    for arrays in replies:
        assert arrays.keys() == sent.keys()
        for name, array in arrays.items():
            assert (array.dtype, array.shape) == (sent[name].dtype, sent[name].shape)
            assert np.array_equal(array, sent[name] + sent[name])
            assert not array.flags.writeable


def test_a_raising_node_becomes_a_reply_and_the_others_answer():
    def answer(message, context):
        if context.node_config["client"] == 0:
            raise RuntimeError("out of battery")
        return {"told": ConfigRecord({"client": 1})}

    with forked(client_app(answer)) as grid:
        failed, fine = ask(grid)
    assert failed.error.reason.endswith("RuntimeError: out of battery\n")
    assert told([fine]) == [{"client": 1}]


def test_what_a_node_logs_is_logged_here_once(caplog):
    def answer(message, context):
        logging.getLogger("fedfmd.client").warning(
            "client %d", context.node_config["client"], extra={"client": 1}
        )
        return {}

    with caplog.at_level(logging.DEBUG, "fedfmd"), forked(client_app(answer)) as grid:
        ask(grid)
    assert sorted(record.getMessage() for record in caplog.records) == ["client 0", "client 1"]
    assert all(record.client == 1 for record in caplog.records)


def test_the_death_of_a_node_is_told_and_the_others_end():
    def answer(message, context):
        if context.node_config["client"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    before = psutil.Process().children()
    with (
        pytest.raises(RunError, match=r"a node is gone, its process was killed.*fewer --workers"),
        forked(client_app(answer)) as grid,
    ):
        ask(grid)
    assert psutil.Process().children() == before


SCRIPT = """
import os, time
from flwr.app import Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from fedfmd.engines.inline import InlineGrid

app = ClientApp()

@app.query()
def query(message, context):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(60)

with InlineGrid(app, {}, [{}, {}], forked=True) as grid:
    grid.push_messages([Message(RecordDict(), node, MessageType.QUERY) for node in grid.get_node_ids()])
"""


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_nodes_end_with_the_process_that_forked_them(sign):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        nodes = [psutil.Process(int(process.stdout.readline())) for _ in range(2)]
        os.kill(process.pid, sign)
        process.wait(timeout=10)
        _, alive = psutil.wait_procs(nodes, timeout=10)
        assert not alive


@pytest.mark.parametrize(("device", "threads"), [("cpu", 2), ("cuda", 1)])
def test_nodes_are_not_forked_where_threads_would_be_lost(device, threads):
    assert not can_fork(torch.device(device), threads)


def test_nodes_are_forked_until_compiled_code_has_trained_in_the_process():
    script = """
        import torch
        from fedfmd.engines.forked import can_fork

        print(can_fork(torch.device("cpu"), 1))
        torch.compile(torch.nn.Linear(3, 3), backend="eager")(torch.zeros(2, 3)).sum().backward()
        print(can_fork(torch.device("cpu"), 1))
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (told.stdout.split(), told.stderr) == (["True", "False"], "")
