"""Reading the nodes' replies: which clients succeeded, which failed and why, which arrays can be used."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message

from fedfmd.flower_compat import answered_id, error_text
from fedfmd.protocol.compression import Upload
from fedfmd.protocol.messages import BY_ATTENTION, Assignment, ClientResult, Reply, read_reply
from fedfmd.protocol.state import Arrays, bank_of, check_layout, first_non_finite
from fedfmd.training.partial import rotation

Asked = Mapping[str, Sequence[Assignment]]
"""What each message asked its node to do, by the message's id."""


@dataclass(frozen=True)
class NodeReply:
    """The answer to one message. Where `reply` is None, all clients that it asked failed for `reason`."""

    request: str
    reply: Reply | None
    reason: str = ""


def read_replies(
    messages: Iterable[Message],
    asked: Asked,
    received: Mapping[str, Arrays],
) -> list[NodeReply]:
    """Check every reply against what its message asked; one entry per message sent, in that order.

    `received` holds the arrays that each message carried. They tell the model's layout on the wire, and rounded
    updates are added to them. A reply that is missing, broken or not finite fails all clients of its node.
    """
    answers = {answered_id(message): message for message in messages}
    unheard = "no reply within server.round-timeout-s"
    return [
        _read(request, answers[request], work, received[request])
        if request in answers
        else NodeReply(request, None, unheard)
        for request, work in asked.items()
    ]


def client_results(replies: Iterable[NodeReply], asked: Asked) -> dict[int, ClientResult]:
    """One result per client that was asked to train."""
    results = {}
    for node_reply in replies:
        for assignment in asked[node_reply.request]:
            results[assignment.client] = ClientResult(
                assignment.client, 0, 0, 0, float("nan"), float("nan"), float("nan"), node_reply.reason
            )
        if node_reply.reply is not None:
            results |= {result.client: result for result in node_reply.reply.results}
    return results


def _read(request: str, message: Message, work: Sequence[Assignment], received: Arrays) -> NodeReply:
    if message.has_error():
        return NodeReply(request, None, error_text(message))
    try:
        reply = read_reply(message.content)
        _check(reply, work, {name: array.shape for name, array in received.items()})
        restored = Upload(reply.arrays, reply.scales).restored(received)
        if broken := first_non_finite(restored):
            raise ValueError(f"NaN or infinite values in {broken}")
    except (KeyError, TypeError, ValueError) as error:
        return NodeReply(request, None, f"unusable reply: {error}")
    arrays = {name: tensor.numpy() for name, tensor in restored.items()}
    return NodeReply(request, replace(reply, arrays=arrays, scales={}))


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
    if trained:
        _check_arrays(reply, [(a, trained[a.client]) for a in work if a.client in trained], shapes)


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
    """Return the places in a bank of the kernels that the client was told to train; none if it chose them."""
    if assignment.first_kernel == BY_ATTENTION and assignment.kernels < kernels:
        return ()
    return rotation(assignment.first_kernel, assignment.kernels, kernels)
