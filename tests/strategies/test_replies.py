import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, MetricRecord

from fedfmd.protocol.messages import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Reply,
    write_reply,
)
from fedfmd.protocol.parsing import MAX_TEXT
from strategies.replies import Terms, client_results, read_replies

START = {"w": np.array([1.0, 1.0], np.float32), "n": np.array(0)}


def work(client, kernels=1, first_kernel=0):
    return Assignment(client, 1, 10, kernels, first_kernel)


ASKED = {"5": [work(0), work(3)], "6": [work(1)]}
SENT = dict.fromkeys(ASKED, START)
TERMS = Terms(sizes=(10, 10, 10, 10), parameters={"w"})


def arrays(**changes):
    return {"w": np.array([1.0, 2.0], np.float32), "n": np.array(1)} | changes


def trained(client, **changes):
    values = {"images": 10, "steps": 1, "examples": 10, "loss": 1.0, "accuracy": 0.5, "wall_s": 0.1} | changes
    return ClientResult(client, **values)


def fine():
    return write_reply(Reply(arrays(), (trained(1),), {"w": 10, "n": 10}))


def node_5(sent, *results, **weights):
    weights = dict.fromkeys(sent, 20) | weights
    return write_reply(Reply(sent, results or (trained(0), trained(3)), weights))


def test_good_replies_come_back_in_the_order_of_the_messages(reply_of):
    answers = read_replies([reply_of(6, fine()), reply_of(5, node_5(arrays()))], ASKED, SENT, TERMS)
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
            "unusable reply: entry 0 images: Input should be greater than or equal to 0",
        ),
        (
            lambda: node_5(arrays(), trained(0), trained(3, accuracy=1.5)),
            "unusable reply: client 3 has loss 1.0 and accuracy 1.5",
        ),
        (
            lambda: node_5(arrays(), trained(0, loss=math.nan), trained(3)),
            "unusable reply: client 0 has loss nan and accuracy 0.5",
        ),
    ],
)
def test_a_broken_reply_fails_its_clients_and_no_others(reply_of, content, reason):
    answers = read_replies([reply_of(5, content()), reply_of(6, fine())], ASKED, SENT, TERMS)
    results = client_results(answers, ASKED)
    assert answers[0].reply is None
    assert [results[0].reason, results[3].reason] == [reason, reason]
    assert results[1] == trained(1)


def rounded(values, **scales):
    return write_reply(Reply(arrays(w=values), (trained(1),), {"w": 10, "n": 10}, scales))


def read_rounded(reply_of, upload, content):
    (_, answer) = read_replies([reply_of(6, content)], ASKED, SENT, replace(TERMS, upload=upload))
    return answer


@pytest.mark.parametrize(
    ("upload", "content", "expected"),
    [
        ("int8", lambda: rounded(np.array([2, -4], np.int8), w=0.5), [2.0, -1.0]),
        ("fp16", lambda: rounded(np.array([0.25, 1.0], np.float16)), [1.25, 2.0]),
        ("int8", lambda: rounded(np.array([0.25, 1.0], np.float32)), [0.25, 1.0]),  # the mean of several
    ],
)
def test_rounded_updates_are_added_to_what_was_sent(reply_of, upload, content, expected):
    reply = read_rounded(reply_of, upload, content()).reply
    assert reply.arrays["w"].tolist() == expected
    assert (reply.arrays["w"].dtype, reply.arrays["n"], reply.scales) == (np.float32, 1, {})


INT8, FP16 = np.ones(2, np.int8), np.ones(2, np.float16)


@pytest.mark.parametrize(
    ("upload", "content", "reason"),
    [
        ("int8", lambda: rounded(INT8), "it has scales for 0 arrays, and 1 in int8"),
        ("int8", lambda: rounded(INT8, w=1.0, n=2.0), "it has scales for 2 arrays, and 1 in int8"),
        (
            "fp16",
            lambda: rounded(FP16, w=1e30),
            "the record scales w: Input should be less than or equal to ",
        ),
        (
            "int8",
            lambda: rounded(INT8, w=math.inf),
            "the record scales w: Input should be less than or equal to ",
        ),
        ("int8", lambda: rounded(INT8, w=math.nan), "the record scales w: Input should be "),
        ("int8", lambda: rounded(INT8, w=0.0), "the record scales w: Input should be greater than 0"),
        ("int8", lambda: rounded(INT8, w=-1e30), "the record scales w: Input should be greater than 0"),
        (
            "int8",
            lambda: rounded(INT8, w=1000.0),
            "the record scales w: Input should be less than or equal to 515",
        ),
        ("int8", lambda: rounded(np.ones(1, np.int8), w=1.0), "array w has shape (1,), the model's has (2,)"),
        ("fp32", lambda: rounded(INT8, w=1.0), "array w is of type int8, the model's of float32"),
        ("int8", lambda: rounded(FP16), "array w is of type float16, the model's of float32"),
        (
            "fp16",
            lambda: write_reply(Reply(arrays(n=np.array(3, np.float16)), (trained(1),), {"w": 10, "n": 10})),
            "array n is of type float16, the model's of int64",
        ),
    ],
)
def test_rounded_updates_are_checked_too(reply_of, upload, content, reason):
    assert read_rounded(reply_of, upload, content()).reason.startswith(f"unusable reply: {reason}")


def npy(header, version=1):
    text = header.encode().ljust(117 if version == 1 else 115) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(2 * version, "little") + text + bytes(8)


def of_shape(shape, descr="'<f4'"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


TEBIBYTE = of_shape(f"({2**38},)")


def with_array(data):
    content = fine()
    content["arrays"]["w"] = Array("float32", (2,), "numpy.ndarray", data)
    return content


def with_record(name, record):
    content = fine()
    del content[name]
    content[name] = record
    return content


def with_list(name, values):
    """Its column moved to the texts, which may hold anything."""
    content = fine()
    del content["metrics"][name]
    content["config"][name] = values
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: with_array(npy("(")), "an array is no .npy file of numbers"),
        (lambda: with_array(npy("{'descr")), "an array is no .npy file of numbers"),
        (lambda: with_array(npy(TEBIBYTE)), "an array of shape (274877906944,) and type float32 has 8 bytes"),
        (lambda: with_array(npy(TEBIBYTE, version=2)), "an array is no .npy file of numbers"),
        (lambda: with_array(npy(of_shape("(2,)", "'|O'"))), "an array is no .npy file of numbers"),
        (lambda: with_array(npy(of_shape("(2,)", "'<i16'"))), "an array has numbers of an unknown type"),
        (
            lambda: with_array(npy(of_shape("(2,)", "'>f4'"))),
            "array w is of type >f4, the model's of float32",
        ),
        (
            lambda: with_array(npy(of_shape("(2,)", "'<u4'"))),
            "array w is of type uint32, the model's of float32",
        ),
        (lambda: with_array(b""), "an array is no .npy file of numbers"),
        (
            lambda: with_record("metrics", ConfigRecord({"a": 1})),
            "the record metrics is of type ConfigRecord",
        ),
        (lambda: with_record("arrays", MetricRecord()), "the record arrays is of type MetricRecord"),
        (
            lambda: with_record("weights", MetricRecord({"w": [10]})),
            "the record weights w: Input should be a valid",
        ),
        (lambda: with_record("weights", MetricRecord({"w": 10})), "its weights are not those of its arrays"),
        (lambda: with_list("images", ["ten"]), "entry 0 images: Input should be a valid integer"),
        (lambda: with_list("accuracy", [True]), "entry 0 accuracy: Input should be a valid number"),
        (lambda: with_list("loss", 3.0), "the list loss: Input should be a valid list"),
        (lambda: with_list("steps", [1, 1]), "its lists have 1 to 2 entries"),
        (
            lambda: with_record("config", ConfigRecord({"reason": [5]})),
            "entry 0 reason: Input should be a valid string",
        ),
    ],
)
def test_any_reply_is_data(reply_of, content, reason):
    (other, answer) = read_replies(
        [reply_of(5, node_5(arrays())), reply_of(6, content())], ASKED, SENT, TERMS
    )
    assert answer.reason.startswith(f"unusable reply: {reason}")
    assert other.reply is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": 11}, "client 1 speaks of 11 images, must be 10"),
        ({"steps": 9}, "client 1 speaks of 9 steps, must be 1"),
        ({"examples": 9}, "client 1 speaks of 9 examples, must be 10"),
        ({"examples": 10**15}, "entry 0 examples: Input should be less than or equal to"),
        ({"wall_s": -1.0}, "entry 0 wall_s: Value error, must not be negative"),
        ({"loss": 1e30}, "entry 0 loss: Value error, must lie within"),
        ({"kernel_entropy": math.inf}, "entry 0 kernel_entropy: Value error, must lie within"),
    ],
)
def test_claims_are_held_against_the_plan(reply_of, changes, reason):
    claimed = trained(1, **changes)
    content = write_reply(Reply(arrays(), (claimed,), dict.fromkeys(START, claimed.images)))
    (_, answer) = read_replies([reply_of(6, content)], ASKED, SENT, TERMS)
    assert answer.reason.startswith(f"unusable reply: {reason}")


BUFFERS = START | {"var": np.array([0.5, 2.0], np.float32), "temperature": np.array(30, np.float32)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"var": np.array([0.0, 9.0], np.float32)}, ""),
        ({"var": np.array([0.5, -1e-3], np.float32)}, "the running variance var is negative"),
        ({"temperature": np.array(-30, np.float32)}, "temperature is -30, and training doesn't change it"),
        ({"temperature": np.array(29, np.float32)}, "temperature is 29, and training doesn't change it"),
        ({"n": np.array(-1)}, "the counter n went from 0 to -1 in 1 steps"),
        ({"n": np.array(2)}, "the counter n went from 0 to 2 in 1 steps"),
        ({"w": np.array([1, 3e38], np.float32)}, "values beyond 1e+18 in w"),
    ],
)
def test_numbers_are_such_as_training_makes(reply_of, changes, reason):
    terms = replace(TERMS, fixed={"temperature"}, variances={"var"})
    content = write_reply(Reply(BUFFERS | changes, (trained(1),), dict.fromkeys(BUFFERS, 10)))
    (answer,) = read_replies([reply_of(6, content)], {"6": [work(1)]}, {"6": BUFFERS}, terms)
    assert answer.reason == (reason and f"unusable reply: {reason}")


def test_what_stays_on_the_client_must_not_come(reply_of):
    terms = replace(TERMS, private={"n"})
    kept = write_reply(Reply({"w": arrays()["w"]}, (trained(1),), {"w": 10}))
    for content, reason in ((fine(), "unusable reply: array n is one that stays on the client"), (kept, "")):
        (answer,) = read_replies([reply_of(6, content)], {"6": [work(1)]}, {"6": START}, terms)
        assert answer.reason == reason


def test_a_reply_to_a_message_of_another_round_is_left_out(reply_of, caplog):
    late = write_reply(Reply(arrays(w=np.array([9, 9], np.float32)), (trained(1),), {"w": 10, "n": 10}))
    answers = read_replies([reply_of(6, fine()), reply_of(4, late)], ASKED, SENT, TERMS)
    assert answers[1].reply.arrays["w"].tolist() == [1, 2]
    assert "1 replies to messages of other rounds are left out" in caplog.messages


@pytest.mark.parametrize("kind", ["reason", "error"])
def test_texts_are_cleaned_and_cut(reply_of, kind):
    text = "\x1b[31m=HYPERLINK(1)\x1b[0m\r\u202e" + "x" * 5_000_000
    failed = write_reply(Reply({}, (trained(1, reason=text),)))
    reply = reply_of(6, failed) if kind == "reason" else reply_of.error(6, text)
    reason = client_results(read_replies([reply], ASKED, SENT, TERMS), ASKED)[1].reason
    assert reason.startswith("'=HYPERLINK(1)" if kind == "reason" else "x")
    assert len(reason) == MAX_TEXT
    assert reason.isprintable()


def test_a_reply_without_records_is_broken(reply_of):
    content = fine()
    del content["metrics"]
    (_, answer) = read_replies([reply_of(6, content)], ASKED, SENT, TERMS)
    assert answer.reason.startswith("unusable reply")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Traceback:\n  line 3\nRuntimeError: no memory\n", "RuntimeError: no memory"),
        ("", "error code 2"),
    ],
)
def test_an_error_keeps_its_last_line(reply_of, text, reason):
    answers = read_replies([reply_of.error(5, text), reply_of(6, fine())], ASKED, SENT, TERMS)
    results = client_results(answers, ASKED)
    assert [results[client].reason for client in (0, 3, 1)] == [reason, reason, ""]


def test_a_missing_reply_is_a_timeout(reply_of):
    results = client_results(read_replies([reply_of(6, fine())], ASKED, SENT, TERMS), ASKED)
    assert results[0].reason == results[3].reason == "no reply within server.round-timeout-s"
    assert results[1].ok


def test_flower_answers_for_a_vanished_node_in_its_own_name(reply_of):
    flower = reply_of.error(5, "Node Unavailable")
    flower.metadata.__dict__["_src_node_id"] = 1
    results = client_results(read_replies([flower, reply_of(6, fine())], ASKED, SENT, TERMS), ASKED)
    assert results[0].reason == results[3].reason == "Node Unavailable"
    assert results[1].ok


def test_clients_that_failed_on_their_node_keep_their_reason(reply_of):
    content = node_5(arrays(), trained(0), trained(3, reason="OSError: no disk", loss=math.nan), w=10, n=10)
    results = client_results(
        read_replies([reply_of(5, content), reply_of(6, fine())], ASKED, SENT, TERMS), ASKED
    )
    assert [results[client].reason for client in (0, 3, 1)] == ["", "OSError: no disk", ""]


# Four clients with 1, 2, 4 and 8 images share a node and a bank of four kernels.
BANK = {f"fc.bank.{place}": START["w"] for place in range(4)}


def kernels_reply(weights, failed=()):
    results = [
        trained(client, images=2**client, examples=2**client, reason="no power" if client in failed else "")
        for client in range(4)
    ]
    weights = {f"fc.bank.{place}": weight for place, weight in weights.items()}
    weights["w"] = sum(result.images for result in results if result.ok)
    sent = {name: np.zeros(2, np.float32) for name in weights}
    return write_reply(Reply(sent, tuple(results), weights))


def reason_of(reply_of, content, first_kernels):
    asked = {"5": [work(client, 2, first) for client, first in enumerate(first_kernels)]}
    terms = Terms(sizes=(1, 2, 4, 8), parameters={"w", *BANK})
    (answer,) = read_replies([reply_of(5, content)], asked, {"5": {"w": START["w"]} | BANK}, terms)
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
