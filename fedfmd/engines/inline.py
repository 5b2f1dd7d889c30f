"""Flower's Grid inside one process: no Ray, no SuperLink, nodes with fixed ids, replies in order.

Nodes are threads, or processes forked from this one. Two threads of small models keep two cores busy, as PyTorch lets
go of Python's lock while it computes, but they wait for each other in between; two processes don't.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedfmd.engines.forked import ForkedNode
from fedfmd.flower_compat import (
    SERVER_ID,
    Run,
    answer,
    empty_run,
    node_config,
    serve,
    set_identity,
    set_message_id,
)
from fedfmd.memory import keep_freed

RUN_ID = 1
FIRST_NODE_ID = 1000


class InlineGrid(Grid):
    """A grid whose nodes are calls of one ClientApp, made when messages are pushed.

    `node_configs` holds one node's config each, as SuperNodes would have it. Each node has a thread of its
    own, in which PyTorch uses `threads` cores. With `forked` it has a process of its own, of one core, which starts
    with the first message and what is loaded then. Use as a context manager, or `close` it.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, bool | int | float | str],
        node_configs: Sequence[Mapping[str, bool | int | float | str]],
        threads: int = 1,
        forked: bool = False,
    ) -> None:
        set_identity(RUN_ID, SERVER_ID)
        self._run = empty_run(RUN_ID)
        self._nodes: dict[int, Callable[[Message], Message]] = {
            node_id: partial(
                answer,
                client_app,
                context=Context(RUN_ID, node_id, dict(config), RecordDict(), dict(run_config)),
            )
            for node_id, config in enumerate(node_configs, FIRST_NODE_ID)
        }
        self._forks, self._forked = forked, list[ForkedNode]()
        self._replies: dict[str, Message] = {}
        self._pushed = 0
        # One pool per node: a node's messages always meet the same thread, and so the same cached model.
        self._threads = {
            node_id: ThreadPoolExecutor(1, f"node-{node_id}", torch.set_num_threads, (threads,))
            for node_id in self._nodes
        }

    def __enter__(self) -> InlineGrid:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(wait=kind is not KeyboardInterrupt)

    def close(self, wait: bool = True) -> None:
        """End the nodes; `wait` until what their threads do is done."""
        for node in self._forked:
            node.close()
        for pool in self._threads.values():
            pool.shutdown(wait, cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Set the run that `run` tells of."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """Return all nodes; they are there from the start."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the ClientApp on each message, all nodes at the same time.

        Raises:
            RunError: a node's process died.
        """
        if self._forks and not self._forked:
            self._fork()
        pending = {}
        for message in messages:
            self._pushed += 1
            message_id = f"message-{self._pushed}"
            set_message_id(message, message_id)
            node_id = message.metadata.dst_node_id
            pending[message_id] = self._threads[node_id].submit(self._nodes[node_id], message)
        self._replies |= {message_id: future.result() for message_id, future in pending.items()}
        return list(pending)

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull; a node is never waited for, so `timeout` cannot pass."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _fork(self) -> None:
        self._forked = [ForkedNode(node) for node in self._nodes.values()]
        self._nodes = dict(zip(self._nodes, self._forked, strict=True))


def run_inline(
    server_app: ServerApp,
    client_app: ClientApp,
    run_config: Mapping[str, bool | int | float | str],
    workers: int = 1,
    threads: int = 1,
    forked: bool = False,
) -> None:
    """Run the apps in this process, on `workers` nodes of `threads` cores each that host any client.

    They are processes of their own if they are `forked`; `fedfmd.engines.forked.can_fork` says where they can be.
    """
    keep_freed()
    node_configs = [node_config(rank, workers) for rank in range(workers)]
    with InlineGrid(client_app, run_config, node_configs, threads, forked) as grid:
        serve(server_app, grid, Context(RUN_ID, SERVER_ID, {}, RecordDict(), dict(run_config)))
