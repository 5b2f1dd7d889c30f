"""Reading the nodes' replies: which clients succeeded, which failed and why, which arrays can be used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedfmd.kernels import rotation
from fedfmd.wire import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Reply,
    bank_of,
    check_layout,
    first_non_finite,
    read_reply,
)

Asked = Mapping[int, Sequence[Assignment]]
"""What each node was asked to do, by its id."""


@dataclass(frozen=True)
class NodeReply:
    """One node's share of a round. Where `reply` is None, all its clients failed for `reason`."""

    node: int
    reply: Reply | None
    reason: str = ""


def read_replies(
    messages: Iterable[Message],
    asked: Asked,
    shapes: Mapping[str, tuple[int, ...]],
) -> list[NodeReply]:
    """Check every reply against what its node was asked; one entry per node, in that order.

    `shapes` is the model's layout on the wire. A reply that is missing, broken or not finite fails all
    clients of its node.
    """
    answers = {message.metadata.src_node_id: message for message in messages}
    # Flower answers for a vanished node in its own name, so such an error has no node of ours as source.
    strays = [message for node, message in answers.items() if node not in asked]
    unheard = error_text(strays[0]) if strays else "no reply within server.round-timeout-s"
    return [
        _read(node, answers[node], work, shapes) if node in answers else NodeReply(node, None, unheard)
        for node, work in asked.items()
    ]


def client_results(replies: Iterable[NodeReply], asked: Asked) -> dict[int, ClientResult]:
    """One result per client that was asked to train."""
    results = {}
    for node_reply in replies:
        for assignment in asked[node_reply.node]:
            results[assignment.client] = ClientResult(
                assignment.client, 0, 0, 0, float("nan"), float("nan"), float("nan"), node_reply.reason
            )
        if node_reply.reply is not None:
            results |= {result.client: result for result in node_reply.reply.results}
    return results


def _read(
    node: int, message: Message, work: Sequence[Assignment], shapes: Mapping[str, tuple[int, ...]]
) -> NodeReply:
    if message.has_error():
        return NodeReply(node, None, error_text(message))
    try:
        reply = read_reply(message.content)
        _check(reply, work, shapes)
    except (KeyError, TypeError, ValueError) as error:
        return NodeReply(node, None, f"unusable reply: {error}")
    return NodeReply(node, reply)


def _check(reply: Reply, work: Sequence[Assignment], shapes: Mapping[str, tuple[int, ...]]) -> None:
    answered = sorted(result.client for result in reply.results)
    if answered != (clients := sorted(assignment.client for assignment in work)):
        raise ValueError(f"it speaks of clients {answered}, asked were {clients}")
    for result in reply.results:
        if result.ok and not (result.images > 0 and math.isfinite(result.loss) and 0 <= result.accuracy <= 1):
            raise ValueError(
                f"client {result.client} has {result.images} images, loss {result.loss} and accuracy {result.accuracy}"
            )
    trained = {result.client: result.images for result in reply.results if result.ok}
    if bool(reply.arrays) != bool(trained):
        raise ValueError("it must have arrays if, and only if, a client succeeded")
    if not trained:
        return
    _check_arrays(reply, [(a, trained[a.client]) for a in work if a.client in trained], shapes)
    if broken := first_non_finite(reply.arrays):
        raise ValueError(f"NaN or infinite values in {broken}")


def _check_arrays(
    reply: Reply, work: Sequence[tuple[Assignment, int]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare layout and weights with what the clients that succeeded were asked to train, on their images.

    Which kernels a client took by attention is unknown, but in each bank as many as it was asked for.
    """
    total = sum(images for _, images in work)
    banks: dict[str, list[str]] = {}
    for name in shapes:
        if kernel := bank_of(name):
            banks.setdefault(kernel[0], []).append(name)
    least = dict.fromkeys(shapes, total)
    for names in banks.values():
        for place, name in enumerate(names):
            least[name] = sum(images for a, images in work if place in _named(a, len(names)))
    check_layout(reply.arrays, shapes, optional=[name for name, weight in least.items() if not weight])
    for name in reply.arrays:
        if not least[name] <= reply.weights[name] <= total:
            raise ValueError(
                f"array {name} stands for {reply.weights[name]} images, must be {least[name]} to {total}"
            )
    for bank, names in banks.items():
        weight = sum(reply.weights.get(name, 0) for name in names)
        if weight != (expected := sum(images * a.kernels for a, images in work)):
            raise ValueError(f"the kernels of {bank} stand for {weight} images, not for {expected}")


def _named(assignment: Assignment, kernels: int) -> tuple[int, ...]:
    """The places in a bank of the kernels that the client was told to train; none if it chose them."""
    if assignment.first_kernel == BY_ATTENTION and assignment.kernels < kernels:
        return ()
    return rotation(assignment.first_kernel, assignment.kernels, kernels)


def error_text(message: Message) -> str:
    """The last line of an error's reason: Ray and Flower put whole tracebacks there."""
    lines = message.error.reason.strip().splitlines()
    return lines[-1].strip() if lines else f"error code {message.error.code}"
