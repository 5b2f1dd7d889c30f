"""Reading the nodes' replies: which clients succeeded, which failed and why, which arrays can be used."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from flwr.app import Message
from torch import Tensor

from fedfmd.edge import examples_of
from fedfmd.errors import one_line
from fedfmd.flower_compat import answered_id, error_text
from fedfmd.protocol.averaging import is_beyond, largest, rest_shape, suspects_of, value_limit
from fedfmd.protocol.compression import ROUNDINGS, Upload
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Reply,
    read_reply,
)
from fedfmd.protocol.parsing import MAX_NUMBER, clean_text
from fedfmd.protocol.state import Arrays, bank_of, check_layout
from fedfmd.training.partial import rotation

Asked = Mapping[str, Sequence[Assignment]]
"""What each message asked its node to do, by the message's id."""

logger = logging.getLogger("fedfmd")


@dataclass(frozen=True)
class Terms:
    """What the replies of a run are held against, beside what their messages asked.

    Attributes:
        sizes: the images that each client trains on, by the server's partition or as its edge device announced.
        parameters: names of the arrays that are trained, which may be rounded; all others are buffers.
        upload: the type that they are rounded to, one of `fedfmd.protocol.compression.UPLOADS`.
        private: names of the arrays that stay on the clients.
        fixed: names of the buffers that training leaves as they are.
        variances: names of the buffers that can't be negative.
    """

    sizes: Sequence[int]
    parameters: Collection[str]
    upload: str = "fp32"
    private: Collection[str] = ()
    fixed: Collection[str] = ()
    variances: Collection[str] = ()


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
    terms: Terms,
) -> list[NodeReply]:
    """Check every reply against what its message asked; one entry per message sent, in that order.

    `received` holds the arrays that each message carried. They tell the model's layout on the wire, and rounded
    updates are added to them. A reply that is missing or broken, or claims what can't be, fails all clients of its
    node. One to a message of another round is left out.
    """
    answers = {answered_id(message): message for message in messages}
    if strangers := len(answers.keys() - asked.keys()):
        logger.warning("%d replies to messages of other rounds are left out", strangers)
    unheard = "no reply within server.round-timeout-s"
    return [
        _read(request, answers[request], work, received[request], terms)
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


def _read(
    request: str, message: Message, work: Sequence[Assignment], received: Arrays, terms: Terms
) -> NodeReply:
    if message.has_error():
        return NodeReply(request, None, clean_text(error_text(message)) or "its node failed")
    try:
        reply = read_reply(message.content)
        _check_clients(reply, work, terms)
        _check_arrays(reply, work, received, terms)
        restored = Upload(reply.arrays, reply.scales).restored(received)
        _check_values(restored, received, max(assignment.steps for assignment in work), terms)
    except ValueError as error:
        return NodeReply(request, None, clean_text(f"unusable reply: {error}"))
    except Exception as error:  # whatever a client sends, it must not end the run
        return NodeReply(request, None, clean_text(f"unusable reply: {one_line(error)}"))
    arrays = {name: tensor.numpy() for name, tensor in restored.items()}
    return NodeReply(request, replace(reply, arrays=arrays, scales={}))


def _check_clients(reply: Reply, work: Sequence[Assignment], terms: Terms) -> None:
    """Compare what the clients say of themselves with what they were asked, and with what is known of them."""
    answered = sorted(result.client for result in reply.results)
    if answered != (clients := sorted(assignment.client for assignment in work)):
        raise ValueError(f"it speaks of clients {answered}, asked were {clients}")
    asked = {assignment.client: assignment for assignment in work}
    for result in reply.results:
        if result.ok:
            _check_client(result, asked[result.client], terms.sizes[result.client])


def _check_client(result: ClientResult, asked: Assignment, images: int) -> None:
    """Compare what a client says of itself with what it was asked to do, on so many images."""
    expected = (images, asked.steps, examples_of(images, asked.steps, asked.batch_size))
    claimed = (result.images, result.steps, result.examples)
    for name, value, known in zip(("images", "steps", "examples"), claimed, expected, strict=True):
        if value != known:
            raise ValueError(f"client {result.client} speaks of {value} {name}, must be {known}")
    if not (math.isfinite(result.loss) and 0 <= result.accuracy <= 1):
        raise ValueError(f"client {result.client} has loss {result.loss} and accuracy {result.accuracy}")


def _check_arrays(reply: Reply, work: Sequence[Assignment], received: Arrays, terms: Terms) -> None:
    """Compare the arrays with what the clients that succeeded were asked to send."""
    trained = {result.client: result.images for result in reply.results if result.ok}
    if bool(reply.arrays) != bool(trained):
        raise ValueError("it must have arrays if, and only if, a client succeeded")
    if trained:
        if kept := reply.arrays.keys() & set(terms.private):
            raise ValueError(f"array {min(kept)} is one that stays on the client")
        shapes = {name: array.shape for name, array in received.items() if name not in terms.private}
        _check_weights(reply, [(a, trained[a.client]) for a in work if a.client in trained], shapes)
        _check_types(reply, received, terms)
        _check_rest(reply, len(work))


def _check_rest(reply: Reply, clients: int) -> None:
    """Compare what makes the mean of several clients exact with their arrays."""
    for name, array in reply.rest.items():
        if clients == 1 or name not in reply.arrays or array.shape != rest_shape(reply.arrays[name]):
            raise ValueError(f"the rest {name} is not of one of its means")
        if array.dtype.kind != "i":
            raise ValueError(f"the rest {name} is of type {array.dtype}, must be of whole numbers")


def _check_types(reply: Reply, received: Arrays, terms: Terms) -> None:
    """Compare the types of the numbers, and what int8 arrays are scaled by, with the way to round updates."""
    rounded = ROUNDINGS[terms.upload].dtype if terms.upload in ROUNDINGS else None
    for name, array in reply.arrays.items():
        own = received[name].dtype
        if array.dtype != own and not (array.dtype == rounded and name in terms.parameters):
            raise ValueError(f"array {name} is of type {array.dtype}, the model's of {own}")
    scaled = {
        name for name in terms.parameters if name in reply.arrays and reply.arrays[name].dtype == np.int8
    }
    if reply.scales.keys() != scaled:
        raise ValueError(f"it has scales for {len(reply.scales)} arrays, and {len(scaled)} in int8")


def _check_values(restored: Mapping[str, Tensor], received: Arrays, steps: int, terms: Terms) -> None:
    """Refuse numbers that no training makes of those received: counters may rise by so many steps at most."""
    filled = {name: values for name, values in restored.items() if values.numel()}
    floats = {name: values for name, values in filled.items() if values.is_floating_point()}
    counters = {name: values for name, values in filled.items() if name not in floats}
    for name, values in counters.items():
        least, most = (int(number) for number in values.aminmax())
        start = int(received[name].min())
        if least < start or most > int(received[name].max()) + steps:
            raise ValueError(f"the counter {name} went from {start} to {most} in {steps} steps")
    for name, values in suspects_of(floats).items():
        if not (size := largest(values)) <= MAX_NUMBER:
            what = "NaN or infinite values" if not math.isfinite(size) else f"values beyond {MAX_NUMBER:g}"
            raise ValueError(f"{what} in {name}")
        if is_beyond(size, received[name]):
            raise ValueError(f"values beyond {value_limit(received[name]):g} in {name}")
    for name in sorted(floats.keys() & terms.variances):
        if float(floats[name].min()) < 0:
            raise ValueError(f"the running variance {name} is negative")
    for name in sorted(floats.keys() & terms.fixed):
        if not np.array_equal(floats[name].numpy(), received[name]):
            raise ValueError(f"{name} is {float(floats[name].max()):g}, and training doesn't change it")


def _check_weights(
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
    by_place = {kernels: _images_by_place(work, kernels) for kernels in set(map(len, banks.values()))}
    for names in banks.values():
        least |= zip(names, by_place[len(names)], strict=True)
    check_layout(reply.arrays, shapes, optional=[name for name, weight in least.items() if not weight])
    if reply.weights.keys() != reply.arrays.keys():
        raise ValueError("its weights are not those of its arrays")
    for name in reply.arrays:
        if not least[name] <= reply.weights[name] <= total:
            raise ValueError(
                f"array {name} stands for {reply.weights[name]:g} images, must be {least[name]} to {total}"
            )
    for bank, names in banks.items():
        weight = sum(reply.weights.get(name, 0) for name in names)
        if weight != (expected := sum(images * min(a.kernels, len(names)) for a, images in work)):
            raise ValueError(f"the kernels of {bank} stand for {weight:g} images, not for {expected}")


def _images_by_place(work: Sequence[tuple[Assignment, int]], kernels: int) -> list[int]:
    """Return the images behind each kernel of a bank, of the clients that were told to train it."""
    images = [0] * kernels
    for assignment, own in work:
        for place in _named(assignment, kernels):
            images[place] += own
    return images


def _named(assignment: Assignment, kernels: int) -> tuple[int, ...]:
    """Return the places in a bank of the kernels that the client was told to train; none if it chose them."""
    if assignment.first_kernel == BY_ATTENTION and assignment.kernels < kernels:
        return ()
    return rotation(assignment.first_kernel, assignment.kernels, kernels)
