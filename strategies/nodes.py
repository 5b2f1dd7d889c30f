"""The nodes of a run: who is there, which clients each can host, and which it is given in a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfmd.build import Federation, device_in_run, known_devices
from fedfmd.data import ImageFormat
from fedfmd.edge import Device, WorkPlan, deal_out, parse_device
from fedfmd.errors import RunError
from fedfmd.flower_compat import answered_id, error_text, is_gone, message_id
from fedfmd.protocol.messages import CONFIG, write_question
from fedfmd.settings import Settings

POLL_S = 0.2
QUICK_POLL_S = 0.01
LATE_SHARE = 0.01
"""Short rounds are polled more often, so that a reply is noticed late by a small share of the time that it took."""

logger = logging.getLogger("fedfmd")


@dataclass(frozen=True)
class Node:
    """A Flower node: a worker of a simulation hosts any client, an edge device its own `client` alone.

    `images` and `device` (which may be "") are what an edge device says of itself; `profile` is the device that its own
    file describes, if it has one.
    """

    id: int
    rank: int
    client: int | None
    images: int
    device: str
    profile: Device | None = None


@dataclass(frozen=True)
class Answer:
    """What a node says of itself, of how many nodes it knows, and why it can't take part, if so."""

    node: Node
    peers: int = 0
    fault: str = ""

    def __str__(self) -> str:
        """Return the node as a person knows it, with its fault."""
        client = self.node.client
        name = f"node {self.node.id}" if client is None else f"the edge device of client {client}"
        return f"{name} {self.fault}"


def meet_nodes(
    grid: Grid, images: ImageFormat, clients: int, timeout_s: float, least: int
) -> tuple[Node, ...]:
    """Ask every node what it hosts, in an order that does not depend on Flower's random node ids.

    Waits until a simulation's nodes are all there, or until all `clients` have an edge device of their own; after
    `timeout_s` it makes do with `least` of them. `images` tells what their own must be like.

    Raises:
        RunError: nodes are missing after `timeout_s`, refuse, or claim the same client.
    """
    met: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout_s
    while True:
        unknown = [node_id for node_id in grid.get_node_ids() if node_id not in met]
        for answer in _query(grid, unknown, images, timeout_s):
            if answer.fault:
                raise RunError(str(answer))
            met[answer.node.id] = answer
        nodes = _in_order(answer.node for answer in met.values())
        if _complete(nodes, max((answer.peers for answer in met.values()), default=0), clients):
            return nodes
        if time.monotonic() > deadline:
            if are_edge_devices(nodes) and len(nodes) >= least:
                return nodes
            raise RunError(
                f"{len(nodes)} of the nodes for partition.clients = {clients} came within "
                f"server.node-timeout-s = {timeout_s:g}: start the missing ones or wait longer"
            )
        time.sleep(POLL_S)


def meet_again(
    known: Sequence[Node], grid: Grid, images: ImageFormat, clients: int, timeout_s: float, least: int
) -> tuple[Node, ...]:
    """Find the edge devices that are there now: `known` ones that stayed, and those that came back or are new.

    A device that was restarted may have another id than before. One that refuses is left out, with a warning.

    Raises:
        RunError: fewer than `least` are there after `timeout_s`.
    """
    present = {node.client: node for node in known if node.client is not None}
    before = set(present)
    refused: set[int] = set()
    deadline = time.monotonic() + timeout_s
    while True:
        online = set(grid.get_node_ids())
        present = {client: node for client, node in present.items() if node.id in online}
        unknown = online - refused - {node.id for node in present.values()}
        for answer in _query(grid, sorted(unknown), images, timeout_s):
            node = answer.node
            if answer.fault or node.client is None or node.client not in range(clients):
                logger.warning(
                    "%s", answer if answer.fault else f"node {node.id} is no edge device of this run"
                )
                refused.add(node.id)
            else:
                present[node.client] = node
        if len(present) >= least:
            for client in sorted(before ^ present.keys()):
                logger.warning(
                    "the edge device of client %d is %s",
                    client,
                    "there again" if client in present else "gone",
                )
            return _in_order(present.values())
        if time.monotonic() > deadline:
            raise RunError(
                f"{len(present)} of {clients} edge devices are there after server.node-timeout-s = {timeout_s:g}, and "
                f"server.max-failed-share lets no fewer than {least} go on: start the others, then run again"
            )
        time.sleep(POLL_S)


def on_edge_devices(federation: Federation, nodes: Sequence[Node]) -> Federation:
    """Put the edge devices' own numbers of images and profiles in the place of the simulated ones.

    One that names no profile keeps the one that the fleet gives its client; links stay modelled, unless the
    profile has its own.

    Raises:
        RunError: an edge device names an unknown device.
    """
    sizes, clients = list(federation.sizes), list(federation.fleet.clients)
    devices = known_devices(federation.settings)
    for node in nodes:
        if node.client is None:
            continue
        sizes[node.client] = node.images
        if node.device:
            client, device = clients[node.client], _device_of(node, federation.settings, devices)
            clients[node.client] = replace(
                client, device=device, bandwidth=device.bandwidth(client.bandwidth)
            )
    return replace(federation, sizes=tuple(sizes), fleet=replace(federation.fleet, clients=tuple(clients)))


def _device_of(node: Node, settings: Settings, known: Mapping[str, Device]) -> Device:
    if node.profile:
        return device_in_run(settings, node.profile)
    if node.device in known:
        return known[node.device]
    raise RunError(
        f"the edge device of client {node.client} has the unknown device {node.device!r}: give its --node-config "
        f"one of {', '.join(known)}, or a YAML file of its own, or add it to fleet.devices-file"
    )


def assign(
    nodes: Sequence[Node], plans: Sequence[WorkPlan], separate: bool = False
) -> list[tuple[int, list[WorkPlan]]]:
    """Give each client of the round to a node: node id and plans, one entry per message that is to be sent.

    Edge devices get their own client; workers are dealt clients so that all are busy equally long. A message holds
    all that a node has to do, or a single client if the updates are needed separately.
    """
    if are_edge_devices(nodes):
        hands = [[plan for plan in plans if plan.client.id == node.client] for node in nodes]
    else:
        hands = deal_out(plans, len(nodes))
    dealt = [(node.id, hand) for node, hand in zip(nodes, hands, strict=True) if hand]
    return [(node, [plan]) for node, hand in dealt for plan in hand] if separate else dealt


def exchange(
    grid: Grid, messages: Iterable[Message], timeout_s: float
) -> tuple[list[Message], dict[str, float]]:
    """Send the messages and gather their replies, until all are there or the time is over.

    As Flower's `send_and_receive`, but it also tells after how many seconds each reply was there, by the id of
    the message that it answers.
    """
    started = time.monotonic()
    passed = 0.0
    waiting = {pushed for pushed in grid.push_messages(messages) if pushed}
    replies: list[Message] = []
    seconds: dict[str, float] = {}
    while waiting and passed < timeout_s:
        came = list(grid.pull_messages(waiting))
        replies += came
        answered = {answered_id(message) for message in came}
        passed = time.monotonic() - started
        seconds |= dict.fromkeys(answered, passed)
        waiting -= answered
        if waiting:
            time.sleep(min(POLL_S, QUICK_POLL_S + LATE_SHARE * passed))
    return replies, seconds


def empty(messages: Iterable[Message]) -> None:
    """Let go of the messages' contents: Flower's engine holds on to messages that it has done with."""
    for message in messages:
        if message.has_content():
            message.content = RecordDict()


def reachable(nodes: Iterable[Node], clients: Iterable[int]) -> list[int]:
    """Those of the clients that have a node: an edge device has its own, a worker takes any."""
    hosted = {node.client for node in nodes}
    return [client for client in clients if client in hosted or None in hosted]


def are_edge_devices(nodes: Iterable[Node]) -> bool:
    """Whether the nodes are edge devices, each with its own client."""
    return any(node.client is not None for node in nodes)


def _query(grid: Grid, node_ids: Sequence[int], images: ImageFormat, timeout_s: float) -> list[Answer]:
    """Ask the nodes and return their answers; those that don't answer, or are gone by now, are left out."""
    messages = [Message(write_question(images), node_id, MessageType.QUERY) for node_id in node_ids]
    if not messages:
        return []
    replies = grid.send_and_receive(messages, timeout=timeout_s)
    asked = {message_id(message): message.metadata.dst_node_id for message in messages}
    return [_answer(asked[answered_id(reply)], reply) for reply in replies if not is_gone(reply)]


def _answer(node_id: int, reply: Message) -> Answer:
    if reply.has_error():
        return Answer(Node(node_id, 0, None, 0, ""), fault=f"could not start: {error_text(reply)}")
    config: dict[str, Any] = dict(reply.content.config_records[CONFIG])
    client = None if config["client"] < 0 else config["client"]
    fault = f"refuses: {config['error']}" if config["error"] else ""
    try:
        profile = parse_device(config["profile"], "its device file") if config["profile"] else None
    except ValueError as error:  # the device could read it: its version of fedfmd is another one
        profile, fault = None, f"can't be used: {error}"
    node = Node(node_id, config["rank"], client, config["images"], config["device"], profile)
    return Answer(node, config["nodes"], fault)


def _in_order(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(sorted(nodes, key=lambda node: (node.rank, node.id)))


def _complete(nodes: Sequence[Node], peers: int, clients: int) -> bool:
    hosted = [node.client for node in nodes if node.client is not None]
    if 0 < len(hosted) < len(nodes):
        raise RunError(
            "some nodes are edge devices and some host any client: give all a client=N in --node-config, or none"
        )
    if len(set(hosted)) < len(hosted):
        raise RunError(f"two edge devices say that they are client {max(hosted, key=hosted.count)}")
    if any(client not in range(clients) for client in hosted):
        raise RunError(
            f"an edge device says that it is client {max(hosted)}, but partition.clients = {clients}"
        )
    return len(hosted) == clients if hosted else bool(nodes) and len(nodes) >= peers
