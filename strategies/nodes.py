"""The nodes of a run: who is there, which clients each can host, and which it is given in a round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedfmd.build import Federation, device_in_run, known_devices
from fedfmd.data import ImageFormat
from fedfmd.edge import Device, WorkPlan, deal_out, parse_device
from fedfmd.errors import RunError
from fedfmd.flower_compat import answered_id, error_text, is_gone, message_id
from fedfmd.protocol.messages import read_hosted, write_question
from fedfmd.protocol.parsing import clean_text
from fedfmd.settings import Settings

POLL_S = 0.2
QUICK_POLL_S = 0.01
LATE_SHARE = 0.01
"""Short rounds are polled more often, so that a reply is noticed late by a small share of the time that it took."""

MAX_NAME = 80
"""Characters of a device's name."""

MAX_FAULTS = 2000
"""Characters of an error that names the nodes which were left out."""

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


Check = Callable[[Node], object]
"""Raises a ValueError that tells why a node can't be used."""


def meet_nodes(
    grid: Grid, images: ImageFormat, clients: int, timeout_s: float, least: int, check: Check = repr
) -> tuple[Node, ...]:
    """Ask every node what it hosts, in an order that does not depend on Flower's random node ids.

    Waits until a simulation's nodes are all there, or until all `clients` have an edge device of their own; after
    `timeout_s` it makes do with `least` of them. `images` tells what their own must be like. A node that refuses,
    can't be used, or claims another one's client is left out, with a warning; where nodes are edge devices, so is
    one that hosts any client.

    Raises:
        RunError: nodes are missing after `timeout_s`, or all of a simulation's refuse.
    """
    met: dict[int, Answer] = {}
    refused: dict[int, Answer] = {}
    deadline = time.monotonic() + timeout_s
    while True:
        online = set(grid.get_node_ids())
        met, refused = ({n: a for n, a in known.items() if n in online} for known in (met, refused))
        unknown = sorted(online - met.keys() - refused.keys())
        for answer in _query(grid, unknown, images, timeout_s, check):
            (refused if answer.fault else met)[answer.node.id] = answer
        objections = _objections([answer.node for answer in met.values()], clients)
        refused |= {node: replace(met.pop(node), fault=fault) for node, fault in objections.items()}
        for node in sorted(refused.keys() & (set(unknown) | objections.keys())):
            logger.warning("%s", refused[node])
        nodes = _in_order(answer.node for answer in met.values())
        workers = [answer for answer in (met | refused).values() if answer.node.client is None]
        peers = max((answer.peers for answer in workers), default=0)
        here = bool(workers) and len(workers) >= peers
        complete = len(nodes) == clients if are_edge_devices(nodes) else here
        if complete and nodes:
            return nodes
        if time.monotonic() > deadline or (peers and complete and len(refused) == len(workers)):
            if are_edge_devices(nodes) and len(nodes) >= least:
                return nodes
            raise RunError(_missing(nodes, refused.values(), clients, timeout_s))
        time.sleep(POLL_S)


def meet_again(
    known: Sequence[Node],
    grid: Grid,
    images: ImageFormat,
    clients: int,
    timeout_s: float,
    least: int,
    check: Check = repr,
) -> tuple[Node, ...]:
    """Find the edge devices that are there now: `known` ones that stayed, and those that came back or are new.

    A device that was restarted may have another id than before, and is taken as soon as Flower knows that its old
    self is gone. One that refuses, can't be used or claims another one's client is left out, with a warning.

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
        for answer in _query(grid, sorted(unknown), images, timeout_s, check):
            node = answer.node
            fault = answer.fault or _objection(node, present.values(), clients)
            if fault or node.client is None:
                logger.warning("%s", replace(answer, fault=fault))
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
            client = clients[node.client]
            try:
                device = _device_of(node, federation.settings, devices)
            except ValueError as error:
                raise RunError(str(Answer(node, fault=f"can't be used: {error}"))) from None
            clients[node.client] = replace(
                client, device=device, bandwidth=device.bandwidth(client.bandwidth)
            )
    return replace(federation, sizes=tuple(sizes), fleet=replace(federation.fleet, clients=tuple(clients)))


def check_device(settings: Settings) -> Check:
    """Return the check that an edge device's profile can be used in this run."""
    known = known_devices(settings)
    return lambda node: node.device and _device_of(node, settings, known)


def _device_of(node: Node, settings: Settings, known: Mapping[str, Device]) -> Device:
    if node.profile:
        return device_in_run(settings, node.profile)
    if node.device in known:
        return known[node.device]
    raise ValueError(
        f"it has the unknown device {node.device!r}: give its --node-config one of {', '.join(known)}, or a YAML file "
        "of its own, or add it to fleet.devices-file"
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


def _query(
    grid: Grid, node_ids: Sequence[int], images: ImageFormat, timeout_s: float, check: Check
) -> list[Answer]:
    """Ask the nodes and return their answers; those that don't answer, or are gone by now, are left out."""
    messages = [Message(write_question(images), node_id, MessageType.QUERY) for node_id in node_ids]
    if not messages:
        return []
    replies = grid.send_and_receive(messages, timeout=timeout_s)
    asked = {message_id(message): message.metadata.dst_node_id for message in messages}
    return [
        _answer(asked[answered_id(reply)], reply, check)
        for reply in replies
        if answered_id(reply) in asked and not is_gone(reply)
    ]


def _answer(node_id: int, reply: Message, check: Check) -> Answer:
    unknown = Node(node_id, 0, None, 0, "")
    if reply.has_error():
        return Answer(unknown, fault=f"could not start: {clean_text(error_text(reply))}")
    try:
        hosted = read_hosted(reply.content)
    except ValueError as error:
        return Answer(unknown, fault=clean_text(f"can't be used: {error}"))
    client = None if hosted.client < 0 else hosted.client
    node = Node(node_id, hosted.rank, client, hosted.images, hosted.device)
    if hosted.error:
        return Answer(node, hosted.nodes, fault=f"refuses: {hosted.error}")
    try:
        if client is not None and not hosted.images:
            raise ValueError("it has no images")
        if hosted.profile:
            node = replace(node, profile=_named(parse_device(hosted.profile, "its device file")))
        check(node)
    except ValueError as error:  # the device could read its profile: its version of fedfmd is another one
        return Answer(node, hosted.nodes, fault=clean_text(f"can't be used: {error}"))
    return Answer(node, hosted.nodes)


def _named(device: Device) -> Device:
    """Return a device whose name tables and logs can show."""
    if clean_text(device.name, MAX_NAME) != device.name:
        raise ValueError(
            f"its device file: the name {clean_text(device.name, MAX_NAME)!r} must be printable, of at most "
            f"{MAX_NAME} characters, and not begin like a formula"
        )
    return device


def _in_order(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(sorted(nodes, key=lambda node: (node.rank, node.id)))


def _objections(nodes: Sequence[Node], clients: int) -> dict[int, str]:
    """Return why nodes can't be used together with those before them, by their ids; workers are no edge devices."""
    if not are_edge_devices(nodes):
        return {}
    objections: dict[int, str] = {}
    fine: list[Node] = []
    for node in nodes:
        if fault := _objection(node, fine, clients):
            objections[node.id] = fault
        else:
            fine.append(node)
    return objections


def _objection(node: Node, present: Iterable[Node], clients: int) -> str:
    """Return why a node can't be one of the edge devices of a run; "" if it can."""
    if node.client is None:
        return "hosts any client, and others are edge devices: give all a client=N in --node-config, or none"
    if node.client >= clients:
        return f"is none of this run's, whose partition.clients = {clients}"
    if twins := [other.id for other in present if other.client == node.client]:
        return f"is there already, as node {twins[0]}: node {node.id} is left out"
    return ""


def _missing(nodes: Sequence[Node], refused: Iterable[Answer], clients: int, timeout_s: float) -> str:
    faults = "; ".join(str(answer) for answer in refused)
    return (
        f"{len(nodes)} of the nodes for partition.clients = {clients} came within "
        f"server.node-timeout-s = {timeout_s:g}: start the missing ones or wait longer"
        f"{f'. Left out: {clean_text(faults, MAX_FAULTS)}' if faults else ''}"
    )
