import math

import numpy as np
import pytest

from fedfmd.protocol.messages import BY_ATTENTION, Assignment, ClientResult, Reply, write_reply
from strategies.replies import client_results, read_replies

START = {"w": np.array([1.0, 1.0], np.float32), "n": np.array(0)}


def work(client, kernels=1, first_kernel=0):
    return Assignment(client, 1, 10, kernels, first_kernel)


ASKED = {"5": [work(0), work(3)], "6": [work(1)]}
SENT = dict.fromkeys(ASKED, START)


def arrays(**changes):
    return {"w": np.array([1.0, 2.0], np.float32), "n": np.array(3)} | changes


def trained(client, **changes):
    values = {"images": 10, "steps": 1, "examples": 10, "loss": 1.0, "accuracy": 0.5, "wall_s": 0.1} | changes
    return ClientResult(client, **values)


def fine():
    return write_reply(Reply(arrays(), (trained(1),), {"w": 10, "n": 10}))


def node_5(sent, *results, **weights):
    weights = dict.fromkeys(sent, 20) | weights
    return write_reply(Reply(sent, results or (trained(0), trained(3)), weights))


def test_good_replies_come_back_in_the_order_of_the_messages(reply_of):
    answers = read_replies([reply_of(6, fine()), reply_of(5, node_5(arrays()))], ASKED, SENT)
    assert [answer.request for answer in answers] == ["5", "6"]
    assert [answer.reply.weight for answer in answers] == [20, 10]
    assert all(result.ok for result in client_results(answers, ASKED).values())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: node_5({"w": np.zeros(2)}), "unusable reply: array n is missing"),
        (lambda: node_5(arrays(x=np.zeros(2))), "unusable reply: array x is not part of the model"),
        (
            lambda: node_5(arrays(w=np.zeros(3))),
            "unusable reply: array w has shape (3,), the model's has (2,)",
        ),
        (
            lambda: node_5(arrays(w=np.array([0, math.nan], np.float32))),
            "unusable reply: NaN or infinite values in w",
        ),
        (
            lambda: node_5(arrays(w=np.array([0, math.inf], np.float32))),
            "unusable reply: NaN or infinite values in w",
        ),
        (
            lambda: node_5(arrays(), trained(0)),
            "unusable reply: it speaks of clients [0], asked were [0, 3]",
        ),
        (
            lambda: node_5(arrays(), trained(0), trained(0)),
            "unusable reply: it speaks of clients [0, 0], asked were [0, 3]",
        ),
        (
            lambda: node_5({}),
            "unusable reply: it must have arrays if, and only if, a client succeeded",
        ),
        (
            lambda: node_5(arrays(), trained(0, reason="no data"), trained(3, reason="no data")),
            "unusable reply: it must have arrays if, and only if, a client succeeded",
        ),
        (
            lambda: node_5(arrays(), w=19),
            "unusable reply: array w stands for 19 images, must be 20 to 20",
        ),
        (
            lambda: node_5(arrays(), trained(0, images=-5), trained(3)),
            "unusable reply: client 0 has -5 images, loss 1.0 and accuracy 0.5",
        ),
        (
            lambda: node_5(arrays(), trained(0), trained(3, accuracy=1.5)),
            "unusable reply: client 3 has 10 images, loss 1.0 and accuracy 1.5",
        ),
        (
            lambda: node_5(arrays(), trained(0, loss=math.nan), trained(3)),
            "unusable reply: client 0 has 10 images, loss nan and accuracy 0.5",
        ),
    ],
)
def test_a_broken_reply_fails_its_clients_and_no_others(reply_of, content, reason):
    answers = read_replies([reply_of(5, content()), reply_of(6, fine())], ASKED, SENT)
    results = client_results(answers, ASKED)
    assert answers[0].reply is None
    assert [results[0].reason, results[3].reason] == [reason, reason]
    assert results[1] == trained(1)


def rounded(values, **scales):
    return write_reply(Reply(arrays(w=values), (trained(1),), {"w": 10, "n": 10}, scales))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: rounded(np.array([2, -4], np.int8), w=0.5), [2.0, -1.0]),
        (lambda: rounded(np.array([0.25, 1.0], np.float16)), [1.25, 2.0]),
    ],
)
def test_rounded_updates_are_added_to_what_was_sent(reply_of, content, expected):
    answers = read_replies([reply_of(6, content())], ASKED, SENT)
    reply = answers[1].reply
    assert reply.arrays["w"].tolist() == expected
    assert (reply.arrays["w"].dtype, reply.arrays["n"], reply.scales) == (np.float32, 3, {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: rounded(np.ones(2, np.int8)), "array w of type torch.int8 can't be added to torch.float32"),
        (lambda: rounded(np.ones(2, np.int8), w=math.inf), "NaN or infinite values in w"),
        (
            lambda: rounded(np.ones(1, np.int8), w=1.0),
            "array w has shape (1,), the model's has (2,)",
        ),
    ],
)
def test_rounded_updates_are_checked_too(reply_of, content, reason):
    (_, answer) = read_replies([reply_of(6, content())], ASKED, SENT)
    assert answer.reason == f"unusable reply: {reason}"


def test_a_reply_without_records_is_broken(reply_of):
    content = fine()
    del content["metrics"]
    (_, answer) = read_replies([reply_of(6, content)], ASKED, SENT)
    assert answer.reason.startswith("unusable reply")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Traceback:\n  line 3\nRuntimeError: no memory\n", "RuntimeError: no memory"),
        ("", "error code 2"),
    ],
)
def test_an_error_keeps_its_last_line(reply_of, text, reason):
    answers = read_replies([reply_of.error(5, text), reply_of(6, fine())], ASKED, SENT)
    results = client_results(answers, ASKED)
    assert [results[client].reason for client in (0, 3, 1)] == [reason, reason, ""]


def test_a_missing_reply_is_a_timeout(reply_of):
    results = client_results(read_replies([reply_of(6, fine())], ASKED, SENT), ASKED)
    assert results[0].reason == results[3].reason == "no reply within server.round-timeout-s"
    assert results[1].ok


def test_flower_answers_for_a_vanished_node_in_its_own_name(reply_of):
    flower = reply_of.error(5, "Node Unavailable")
    flower.metadata.__dict__["_src_node_id"] = 1
    results = client_results(read_replies([flower, reply_of(6, fine())], ASKED, SENT), ASKED)
    assert results[0].reason == results[3].reason == "Node Unavailable"
    assert results[1].ok


def test_clients_that_failed_on_their_node_keep_their_reason(reply_of):
    content = node_5(arrays(), trained(0), trained(3, reason="OSError: no disk", loss=math.nan), w=10, n=10)
    results = client_results(read_replies([reply_of(5, content), reply_of(6, fine())], ASKED, SENT), ASKED)
    assert [results[client].reason for client in (0, 3, 1)] == ["", "OSError: no disk", ""]


# Four clients with 1, 2, 4 and 8 images share a node and a bank of four kernels.
BANK = {f"fc.bank.{place}": START["w"] for place in range(4)}


def kernels_reply(weights, failed=()):
    results = [
        trained(client, images=2**client, reason="no power" if client in failed else "")
        for client in range(4)
    ]
    weights = {f"fc.bank.{place}": weight for place, weight in weights.items()}
    weights["w"] = sum(result.images for result in results if result.ok)
    sent = {name: np.zeros(2, np.float32) for name in weights}
    return write_reply(Reply(sent, tuple(results), weights))


def reason_of(reply_of, content, first_kernels):
    asked = {"5": [work(client, 2, first) for client, first in enumerate(first_kernels)]}
    (answer,) = read_replies([reply_of(5, content)], asked, {"5": {"w": START["w"]} | BANK})
    return answer.reason


@pytest.mark.parametrize(
    ("weights", "failed", "reason"),
    [
        ({0: 1 + 4, 1: 1 + 2, 2: 2, 3: 4}, [3], ""),
        ({0: 1, 1: 1 + 2, 2: 2}, [2, 3], ""),  # kernel 3 was asked only of clients that failed
        ({0: 5, 1: 3, 2: 2}, [3], "array fc.bank.3 is missing"),
        ({0: 3, 1: 5, 2: 2, 3: 4}, [3], "array fc.bank.0 stands for 3 images, must be 5 to 7"),
        ({0: 5, 1: 3, 2: 3, 3: 4}, [3], "the kernels of fc.bank stand for 15 images, not for 14"),
    ],
)
def test_kernels_in_rotation_must_be_those_asked_for(reply_of, weights, failed, reason):
    """Clients 0, 1 and 2 train kernels 0 and 1, 1 and 2, 3 and 0; client 3 fails."""
    assert reason_of(reply_of, kernels_reply(weights, failed), [0, 1, 3, 2]) == (
        reason and f"unusable reply: {reason}"
    )


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ({0: 15, 3: 15}, ""),
        ({0: 1, 1: 14, 2: 7, 3: 8}, ""),
        ({0: 15}, "the kernels of fc.bank stand for 15 images, not for 30"),
        ({0: 16, 1: 14}, "array fc.bank.0 stands for 16 images, must be 0 to 15"),
    ],
)
def test_kernels_chosen_by_attention_must_be_as_many_as_asked_for(reply_of, weights, reason):
    assert reason_of(reply_of, kernels_reply(weights), [BY_ATTENTION] * 4) == (
        reason and f"unusable reply: {reason}"
    )
