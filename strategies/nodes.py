"""The nodes of a run: who is there, which clients each can host, and which it is given in a round."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, RecordDict
from flwr.app.message_type import MessageType
from flwr.serverapp import Grid

from fedfmd.edge import Device, WorkPlan, deal_out, parse_device
from fedfmd.errors import RunError
from fedfmd.federation import Federation, device_in_run, known_devices
from fedfmd.settings import Settings
from fedfmd.wire import CONFIG
from strategies.replies import error_text

POLL_S = 0.2


@dataclass(frozen=True)
class Node:
    """A Flower node: a worker of a simulation hosts any client, a real box its own `client` alone.

    `images` and `device` (which may be "") are what a box says of itself; `profile` is the device that its own
    file describes, if it has one.
    """

    id: int
    rank: int
    client: int | None
    images: int
    device: str
    profile: Device | None = None


def meet_nodes(grid: Grid, clients: int, timeout_s: float) -> tuple[Node, ...]:
    """Ask every node what it hosts, in an order that does not depend on Flower's random node ids.

    Waits until a simulation's nodes are all there, or until all `clients` have a box of their own.

    Raises:
        RunError: nodes are missing after `timeout_s`, refuse, or claim the same client.
    """
    met: dict[int, tuple[Node, int]] = {}
    deadline = time.monotonic() + timeout_s
    while True:
        unknown = [node_id for node_id in grid.get_node_ids() if node_id not in met]
        met |= _query(grid, unknown, timeout_s)
        nodes = sorted((node for node, _ in met.values()), key=lambda node: (node.rank, node.id))
        if _complete(nodes, max((peers for _, peers in met.values()), default=0), clients):
            return tuple(nodes)
        if time.monotonic() > deadline:
            raise RunError(
                f"{len(nodes)} of the nodes for partition.clients = {clients} came within "
                f"server.node-timeout-s = {timeout_s:g}: start the missing ones or wait longer"
            )
        time.sleep(POLL_S)


def on_boxes(federation: Federation, nodes: Sequence[Node]) -> Federation:
    """Put the boxes' own numbers of images and devices in the place of the simulated ones.

    A box that names no device keeps the one that the fleet gives its client; links stay modelled, unless the
    box's device has its own.

    Raises:
        RunError: a box names an unknown device.
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
        f"the box of client {node.client} has the unknown device {node.device!r}: give its --node-config "
        f"one of {', '.join(known)}, or a YAML file of its own, or add it to fleet.devices-file"
    )


def assign(
    nodes: Sequence[Node], plans: Sequence[WorkPlan], separate: bool = False
) -> list[tuple[int, list[WorkPlan]]]:
    """Give each client of the round to a node: node id and plans, one entry per message that is to be sent.

    Boxes get their own client; workers are dealt clients so that all are busy equally long. A message holds
    all that a node has to do, or a single client if the updates are needed separately.
    """
    if has_boxes(nodes):
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
    waiting = {message_id for message_id in grid.push_messages(messages) if message_id}
    replies: list[Message] = []
    seconds: dict[str, float] = {}
    while waiting and time.monotonic() - started < timeout_s:
        came = list(grid.pull_messages(waiting))
        replies += came
        answered = {message.metadata.reply_to_message_id for message in came}
        seconds |= dict.fromkeys(answered, time.monotonic() - started)
        waiting -= answered
        if waiting:
            time.sleep(POLL_S)
    return replies, seconds


def has_boxes(nodes: Iterable[Node]) -> bool:
    """Whether the nodes are real boxes, each with its own client."""
    return any(node.client is not None for node in nodes)


def _query(grid: Grid, node_ids: Sequence[int], timeout_s: float) -> dict[int, tuple[Node, int]]:
    """What the nodes say of themselves, and how many peers each knows of."""
    messages = [Message(RecordDict(), node_id, MessageType.QUERY) for node_id in node_ids]
    if not messages:
        return {}
    met = {}
    for reply in grid.send_and_receive(messages, timeout=timeout_s):
        if reply.has_error():
            raise RunError(f"a node could not start: {error_text(reply)}")
        config, node_id = reply.content[CONFIG], reply.metadata.src_node_id
        if config["error"]:
            raise RunError(f"the box of client {config['client']} refuses: {config['error']}")
        client = None if config["client"] < 0 else config["client"]
        profile = _read_profile(config["profile"], client)
        node = Node(node_id, config["rank"], client, config["images"], config["device"], profile)
        met[node_id] = node, config["nodes"]
    return met


def _read_profile(text: str, client: int | None) -> Device | None:
    try:
        return parse_device(text, "its device file") if text else None
    except ValueError as error:  # the box could read it: its version of fedfmd is another one
        raise RunError(f"the box of client {client} can't be used: {error}") from error


def _complete(nodes: Sequence[Node], peers: int, clients: int) -> bool:
    hosted = [node.client for node in nodes if node.client is not None]
    if 0 < len(hosted) < len(nodes):
        raise RunError(
            "some nodes are boxes and some host any client: give all a client=N in --node-config, or none"
        )
    if len(set(hosted)) < len(hosted):
        raise RunError(f"two boxes say that they are client {max(hosted, key=hosted.count)}")
    if any(client not in range(clients) for client in hosted):
        raise RunError(f"a box says that it is client {max(hosted)}, but partition.clients = {clients}")
    return len(hosted) == clients if hosted else bool(nodes) and len(nodes) >= peers
