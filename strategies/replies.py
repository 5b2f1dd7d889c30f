"""Reading the nodes' replies: which clients succeeded, which failed and why, which arrays can be used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedfmd.wire import ClientResult, Reply, check_layout, first_non_finite, read_reply


@dataclass(frozen=True)
class NodeReply:
    """One node's share of a round. Where `reply` is None, all its clients failed for `reason`."""

    node: int
    reply: Reply | None
    reason: str = ""


def read_replies(
    messages: Iterable[Message],
    asked: Mapping[int, Sequence[int]],
    shapes: Mapping[str, tuple[int, ...]],
) -> list[NodeReply]:
    """Check every reply against what its node was asked (node id → clients); one entry per node, in that order.

    `shapes` is the model's layout on the wire. A reply that is missing, broken or not finite fails all
    clients of its node.
    """
    answers = {message.metadata.src_node_id: message for message in messages}
    # Flower answers for a vanished node in its own name, so such an error has no node of ours as source.
    strays = [message for node, message in answers.items() if node not in asked]
    unheard = error_text(strays[0]) if strays else "no reply within server.round-timeout-s"
    return [
        _read(node, answers[node], clients, shapes) if node in answers else NodeReply(node, None, unheard)
        for node, clients in asked.items()
    ]


def client_results(
    replies: Iterable[NodeReply], asked: Mapping[int, Sequence[int]]
) -> dict[int, ClientResult]:
    """One result per client that was asked to train."""
    results = {}
    for node_reply in replies:
        for client in asked[node_reply.node]:
            results[client] = ClientResult(
                client, 0, 0, 0, float("nan"), float("nan"), float("nan"), node_reply.reason
            )
        if node_reply.reply is not None:
            results |= {result.client: result for result in node_reply.reply.results}
    return results


def _read(
    node: int, message: Message, clients: Sequence[int], shapes: Mapping[str, tuple[int, ...]]
) -> NodeReply:
    if message.has_error():
        return NodeReply(node, None, error_text(message))
    try:
        reply = read_reply(message.content)
        _check(reply, clients, shapes)
    except (KeyError, TypeError, ValueError) as error:
        return NodeReply(node, None, f"unusable reply: {error}")
    return NodeReply(node, reply)


def _check(reply: Reply, clients: Sequence[int], shapes: Mapping[str, tuple[int, ...]]) -> None:
    answered = [result.client for result in reply.results]
    if sorted(answered) != sorted(clients):
        raise ValueError(f"it speaks of clients {sorted(answered)}, asked were {sorted(clients)}")
    for result in reply.results:
        if result.ok and not (result.images > 0 and math.isfinite(result.loss) and 0 <= result.accuracy <= 1):
            raise ValueError(
                f"client {result.client} has {result.images} images, loss {result.loss} and accuracy {result.accuracy}"
            )
    if (reply.arrays is None) == any(result.ok for result in reply.results):
        raise ValueError("it must have arrays if, and only if, a client succeeded")
    if reply.arrays is None:
        return
    check_layout(reply.arrays, shapes)
    if broken := first_non_finite(reply.arrays):
        raise ValueError(f"NaN or infinite values in {broken}")


def error_text(message: Message) -> str:
    """The last line of an error's reason: Ray and Flower put whole tracebacks there."""
    lines = message.error.reason.strip().splitlines()
    return lines[-1].strip() if lines else f"error code {message.error.code}"
