"""Flower's Grid inside one process: no Ray, no SuperLink, nodes with fixed ids, replies in order."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_ID = 1
FIRST_NODE_ID = 1000
RAISED = 2  # Flower's error code for a ClientApp that raised


class InlineGrid(Grid):
    """A grid whose nodes are calls of one ClientApp, made when a message is pushed.

    `node_configs` holds one node's config each, as SuperNodes would have it.
    """

    def __init__(
        self,
        client_app: ClientApp,
        run_config: Mapping[str, bool | int | float | str],
        node_configs: Iterable[Mapping[str, bool | int | float | str]],
    ) -> None:
        # A Message reads its sender from this process-wide identity, which Flower's own engines set too.
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = RUN_ID, 1, SERVER_ID
        self._client_app = client_app
        self._run = Run.create_empty(RUN_ID)
        self._contexts = {
            node_id: Context(RUN_ID, node_id, dict(node_config), RecordDict(), dict(run_config))
            for node_id, node_config in enumerate(node_configs, FIRST_NODE_ID)
        }
        self._replies: dict[str, Message] = {}
        self._pushed = 0

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
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Run the ClientApp on each message, in order."""
        ids = []
        for message in messages:
            self._pushed += 1
            message_id = f"message-{self._pushed}"
            message.metadata.__dict__["_message_id"] = message_id
            self._replies[message_id] = self._answer(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to these messages, each once."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push and pull; a node is never waited for, so `timeout` cannot pass."""
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception:  # as Flower does: a node's fault is a reply, not the end of the run
            return Message(Error(RAISED, traceback.format_exc()), reply_to=message)


def run_inline(
    server_app: ServerApp,
    client_app: ClientApp,
    run_config: Mapping[str, bool | int | float | str],
    nodes: int = 1,
) -> None:
    """Run the apps in this process, on `nodes` nodes that host any client."""
    node_configs = [{"partition-id": rank, "num-partitions": nodes} for rank in range(nodes)]
    grid = InlineGrid(client_app, run_config, node_configs)
    server_app(grid, Context(RUN_ID, SERVER_ID, {}, RecordDict(), dict(run_config)))
