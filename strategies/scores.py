"""Testing a new model on the nodes: who tests it on what, and what their answers say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message

from fedfmd.data import Dataset
from fedfmd.errors import one_line
from fedfmd.flower_compat import answered_id, error_text
from fedfmd.protocol.messages import Assignment, ClientScore, Scores, read_scores
from fedfmd.protocol.parsing import clean_text
from fedfmd.training import BatchTest, batches_of_part
from strategies.nodes import Node, are_edge_devices


@dataclass(frozen=True)
class NodeTest:
    """What a node tests the model on.

    Attributes:
        node: its id.
        clients: those whose images it tests on, each one's own.
        part, parts: its part of the run's test and validation images, of so many; none of 0.
        test, validation: the sizes of the batches in that part.
    """

    node: int
    clients: tuple[Assignment, ...] = ()
    part: int = 0
    parts: int = 0
    test: tuple[int, ...] = ()
    validation: tuple[int, ...] = ()


def plan_tests(
    nodes: Sequence[Node], clients: Mapping[int, Sequence[Assignment]], dataset: Dataset
) -> list[NodeTest]:
    """Return what each node tests on, those that have nothing to do left out.

    `clients` are those of each node, by its id, that test on images of their own. Several workers of a simulation share
    the run's images out by whole batches, so that their number changes no result.
    """
    counts = len(dataset.test), len(dataset.validation or ())
    most = max(len(batches_of_part(count, 0, 1)) for count in counts)
    parts = 0 if are_edge_devices(nodes) or min(len(nodes), most) < 2 else len(nodes)
    planned = []
    for part, node in enumerate(nodes):
        work = NodeTest(node.id, tuple(clients.get(node.id, ())))
        if parts:
            test, validation = (tuple(map(len, batches_of_part(count, part, parts))) for count in counts)
            work = replace(work, part=part, parts=parts, test=test, validation=validation)
        planned.append(work)
    return [work for work in planned if work.clients or work.test or work.validation]


def model_scores(
    messages: Iterable[Message], asked: Mapping[str, NodeTest]
) -> tuple[Scores, dict[int, ClientScore], str]:
    """Check the replies to the messages that had nodes test the model; `asked` tells of each by its id.

    Returns what all parts say of the run's images together, a score of each client, and why the first reply that is
    missing is. One that is missing or broken, or claims what can't be, costs all clients of its node their scores: they
    get one with the reason.
    """
    answers = {answered_id(message): message for message in messages}
    clients: dict[int, ClientScore] = {}
    test: list[BatchTest] = []
    validation: list[BatchTest] = []
    missing = ""
    for request, work in asked.items():
        reason = "no reply within server.round-timeout-s"
        if request in answers:
            try:
                scores = _scores(answers[request], work)
                clients |= {score.client: score for score in scores.clients}
                test += scores.test
                validation += scores.validation
                continue
            except Exception as error:  # whatever a client sends, it must not end the run
                known = isinstance(error, ValueError)
                reason = clean_text(f"unusable reply: {error if known else one_line(error)}")
        clients |= {a.client: ClientScore(a.client, reason=reason) for a in work.clients}
        missing = missing or reason
    return Scores((), test, validation), clients, missing


def _scores(message: Message, work: NodeTest) -> Scores:
    """Return the scores of a node.

    Raises:
        ValueError: the node failed, or they are not those of what it was asked, or no such models' can be.
    """
    if message.has_error():
        raise ValueError(error_text(message) or "its node failed")
    scores = read_scores(message.content)
    clients = sorted(assignment.client for assignment in work.clients)
    if (answered := sorted(score.client for score in scores.clients)) != clients:
        raise ValueError(f"it speaks of clients {answered}, asked were {clients}")
    for score in scores.clients:
        _check_score("", score.client, score.test_loss, score.test_accuracy)
        _check_score("personal ", score.client, score.personal_test_loss, score.personal_test_accuracy)
    for what, found, sizes in (
        ("test", scores.test, work.test),
        ("validation", scores.validation, work.validation),
    ):
        if tuple(batch.images for batch in found) != sizes:
            raise ValueError(f"its batches of {what} images are not those of its part")
        if wrong := [batch.hits for batch in found if not 0 <= batch.hits <= batch.images]:
            raise ValueError(f"{wrong[0]:g} hits in a batch of {what} images")
    return scores


def _check_score(which: str, client: int, loss: float, accuracy: float) -> None:
    """Refuse what no model has: both are NaN, or the loss is not negative and the accuracy in [0, 1]."""
    if math.isnan(loss) and math.isnan(accuracy):
        return
    if not (0 <= loss < math.inf and 0 <= accuracy <= 1):
        raise ValueError(f"client {client} has {which}test loss {loss} and accuracy {accuracy}")
