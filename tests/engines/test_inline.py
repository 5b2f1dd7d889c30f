import threading

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedfmd.engines.inline import InlineGrid, run_inline
from fedfmd.flower_compat import empty_run


def client_app(answer):
    """An app whose reply to a query holds what `answer(message, context)` returns."""
    app = ClientApp()

    @app.query()
    def query(message, context):
        return Message(RecordDict({"told": ConfigRecord(answer(message, context))}), reply_to=message)

    return app


def ask(grid, *nodes):
    return grid.send_and_receive([Message(RecordDict(), node, MessageType.QUERY) for node in nodes])


def told(replies):
    return [dict(reply.content["told"]) for reply in replies]


def test_every_node_answers_with_its_own_config_in_the_order_of_the_messages():
    app = client_app(
        lambda message, context: {"client": context.node_config["client"], "lr": context.run_config["lr"]}
    )
    with InlineGrid(app, {"lr": 0.5}, [{"client": 4}, {"client": 7}]) as grid:
        first, second = grid.get_node_ids()
        replies = ask(grid, second, first)
        assert told(replies) == [{"client": 7, "lr": 0.5}, {"client": 4, "lr": 0.5}]
        assert [reply.metadata.src_node_id for reply in replies] == [second, first]


def test_a_node_keeps_its_state():
    def count(message, context):
        seen = context.state.config_records.setdefault("seen", ConfigRecord({"n": 0}))
        seen["n"] += 1
        return {"n": seen["n"]}

    with InlineGrid(client_app(count), {}, [{}, {}]) as grid:
        first, second = grid.get_node_ids()
        assert told(ask(grid, first) + ask(grid, first) + ask(grid, second)) == [{"n": 1}, {"n": 2}, {"n": 1}]


def test_a_raising_node_becomes_a_reply_and_the_others_answer():
    def answer(message, context):
        if context.node_config["client"] == 0:
            raise RuntimeError("out of battery")
        return {"client": 1}

    with InlineGrid(client_app(answer), {}, [{"client": 0}, {"client": 1}]) as grid:
        failed, fine = ask(grid, *grid.get_node_ids())
        assert failed.has_error()
        assert failed.error.reason.endswith("RuntimeError: out of battery\n")
        assert failed.metadata.src_node_id == grid.get_node_ids()[0]
        assert not fine.has_error()


def test_two_nodes_work_at_the_same_time():
    together = threading.Barrier(2)  # passed by two threads that wait at once, else broken after the timeout
    app = client_app(lambda message, context: {"place": together.wait(timeout=10)})
    with InlineGrid(app, {}, [{}, {}]) as grid:
        assert sorted(answer["place"] for answer in told(ask(grid, *grid.get_node_ids()))) == [0, 1]


def test_a_node_stays_on_its_thread_with_its_cores():
    app = client_app(
        lambda message, context: {"thread": threading.get_ident(), "cores": torch.get_num_threads()}
    )
    with InlineGrid(app, {}, [{}, {}], threads=1) as grid:
        first, second = grid.get_node_ids()
        a, b, again = told(ask(grid, first, second) + ask(grid, first))
        assert a == again
        assert a["thread"] != b["thread"]
        assert a["cores"] == b["cores"] == 1


def test_threads_end_with_the_grid():
    def nodes():
        return [thread for thread in threading.enumerate() if thread.name.startswith("node-")]

    with InlineGrid(client_app(lambda message, context: {"n": 1}), {}, [{}, {}]) as grid:
        ask(grid, *grid.get_node_ids())
        assert len(nodes()) == 2
    assert not nodes()


def test_a_reply_is_pulled_once():
    with InlineGrid(client_app(lambda message, context: {"n": 1}), {}, [{}]) as grid:
        message = grid.create_message(RecordDict(), MessageType.QUERY, grid.get_node_ids()[0], "1")
        ids = grid.push_messages([message])
        (reply,) = grid.pull_messages(ids)
        assert reply.metadata.reply_to_message_id == ids[0]
        assert grid.pull_messages(ids) == []


def test_the_grid_tells_of_its_run():
    with InlineGrid(client_app(lambda message, context: {}), {}, [{}]) as grid:
        grid.set_run(empty_run(5))
        assert grid.run.run_id == 5


@pytest.mark.parametrize("workers", [1, 3])
def test_run_inline_gives_the_server_its_config_and_workers(workers):
    server_app, seen = ServerApp(), []

    @server_app.main()
    def main(grid, context):
        seen.append(dict(context.run_config))
        seen.extend(told(ask(grid, *grid.get_node_ids())))

    run_inline(server_app, client_app(lambda message, context: context.node_config), {"seed": 3}, workers)
    assert seen == [
        {"seed": 3},
        *({"partition-id": rank, "num-partitions": workers} for rank in range(workers)),
    ]


def test_an_error_of_the_server_reaches_the_caller_and_ends_the_threads():
    server_app = ServerApp()

    @server_app.main()
    def main(grid, context):
        ask(grid, *grid.get_node_ids())
        raise ValueError("no way on")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no way on"):
        run_inline(server_app, client_app(lambda message, context: {}), {}, 2)
    assert threading.active_count() == before
