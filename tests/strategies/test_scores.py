"""Testing a new model on the nodes: how it is shared out, and what their answers are held against."""

import math
from dataclasses import replace

import pytest
import torch

from fedfmd.data import Dataset, ImageSet
from fedfmd.protocol.messages import Assignment, ClientScore, Reply, Scores, write_reply, write_scores
from fedfmd.training import BatchTest
from strategies.nodes import Node
from strategies.scores import NodeTest, model_scores, plan_tests


def work(client):
    return Assignment(client, 1, 10, 1)


ASKED = {"5": NodeTest(10, (work(0), work(3))), "6": NodeTest(11, (work(1),))}
PARTS = {
    "5": NodeTest(10, part=0, parts=2, test=(256,), validation=(256, 256)),
    "6": NodeTest(11, (work(1),), part=1, parts=2, test=(256, 44)),
}


def images(count):
    return ImageSet(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.zeros(count, dtype=torch.long))


def dataset(test, validation=0):
    held_out = images(validation) if validation else None
    return Dataset("none", images(1), images(test), 2, ("a", "b"), (0.5,) * 3, (0.5,) * 3, "none", held_out)


def workers(count):
    return [Node(10 + rank, rank, None, 0, "") for rank in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_workers_share_all_images_out_by_whole_batches(count):
    planned = plan_tests(workers(count), {}, dataset(1000, 600))
    assert [size for part in planned for size in part.test] == [256, 256, 256, 232]
    assert [size for part in planned for size in part.validation] == [256, 256, 88]
    assert {part.parts for part in planned} == {count}
    assert max(len(part.test) for part in planned) == math.ceil(4 / count)


@pytest.mark.parametrize(
    "nodes", [workers(1), [Node(10, 0, 0, 50, "pi-4"), Node(11, 1, 1, 50, "pi-4")]], ids=["one", "devices"]
)
def test_one_worker_and_edge_devices_leave_the_runs_images_to_the_server(nodes):
    assert plan_tests(nodes, {}, dataset(1000)) == []
    assert plan_tests(nodes, {10: [work(0)]}, dataset(1000)) == [NodeTest(10, (work(0),))]


def test_a_single_batch_is_not_worth_a_message():
    assert plan_tests(workers(2), {}, dataset(256, 100)) == []
    assert len(plan_tests(workers(2), {}, dataset(257))) == 2


def batch(size, hits=1.0):
    return BatchTest(size, 2.0, hits, math.nan, 0.5)


def of_5(**changes):
    return write_scores(replace(Scores((), [batch(256)], [batch(256), batch(256)]), **changes))


def of_6():
    return write_scores(Scores([ClientScore(1, 1.0, 0.5)], [batch(256), batch(44)]))


def test_parts_come_back_as_one(reply_of):
    shared, scores, missing = model_scores([reply_of(6, of_6()), reply_of(5, of_5())], PARTS)
    assert [test.images for test in shared.test] == [256, 256, 44]
    assert [test.images for test in shared.validation] == [256, 256]
    assert (scores[1].test_loss, scores[1].test_accuracy, missing) == (1.0, 0.5, "")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"test": []}, "its batches of test images are not those of its part"),
        ({"validation": [batch(256), batch(255)]}, "its batches of validation images are not those of"),
        ({"test": [batch(256, hits=257.0)]}, "257 hits in a batch of test images"),
        ({"test": [batch(256, hits=math.nan)]}, "nan hits in a batch of test images"),
        ({"clients": [ClientScore(2)]}, "it speaks of clients [2], asked were []"),
    ],
)
def test_parts_that_cannot_be_are_missing(changes, reason, reply_of):
    _, scores, missing = model_scores([reply_of(5, of_5(**changes)), reply_of(6, of_6())], PARTS)
    assert reason in missing
    assert not scores[1].reason  # the other node's client has its score


def test_scores_come_back_by_client(reply_of):
    sent = [ClientScore(3, 0.5, 0.75, 0.25, 1.0), ClientScore(0)]
    _, scores, missing = model_scores([reply_of(5, write_scores(Scores(sent)))], {"5": ASKED["5"]})
    assert scores[3] == sent[0]
    assert math.isnan(scores[0].test_loss)
    assert not scores[0].reason
    assert not missing


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            lambda: write_scores(Scores([ClientScore(0)])),
            "unusable reply: it speaks of clients [0], asked were [0, 3]",
        ),
        (
            lambda: write_scores(Scores([ClientScore(0), ClientScore(3), ClientScore(1)])),
            "unusable reply: it speaks of cl",
        ),
        (
            lambda: write_scores(Scores([ClientScore(0), ClientScore(3, 1.0, 1.5)])),
            "client 3 has test loss 1.0 and accuracy",
        ),
        (
            lambda: write_scores(Scores([ClientScore(0), ClientScore(3, -1.0, 0.5)])),
            "client 3 has test loss -1.0 and accur",
        ),
        (
            lambda: write_scores(Scores([ClientScore(0), ClientScore(3, math.nan, 0.5)])),
            "client 3 has test loss nan and ac",
        ),
        (
            lambda: write_scores(Scores([ClientScore(0), ClientScore(3, math.inf, 0.5)])),
            "test_loss: Value error, must lie w",
        ),
        (
            lambda: write_scores(Scores([ClientScore(0), ClientScore(3, 1.0, 0.5, 1.0, -0.1)])),
            "client 3 has personal test loss 1.0 and accuracy -0.1",
        ),
        (lambda: write_reply(Reply({}, ())), "unusable reply: the list test_loss: Input should"),
    ],
)
def test_scores_that_cannot_be_are_refused(content, reason, reply_of):
    fine = write_scores(Scores([ClientScore(1, 1.0, 0.5)]))
    _, scores, _ = model_scores([reply_of(5, content()), reply_of(6, fine)], ASKED)
    assert (scores[1].test_accuracy, scores[1].reason) == (0.5, "")
    for client in (0, 3):
        assert reason in scores[client].reason
        assert math.isnan(scores[client].test_accuracy)


def test_nodes_without_an_answer_cost_their_clients_their_scores(reply_of):
    _, scores, missing = model_scores([reply_of.error(5, "it died\x1b[2J")], ASKED)
    assert scores[0].reason == "unusable reply: it died"
    assert scores[1].reason == "no reply within server.round-timeout-s"
    assert missing == scores[0].reason


def test_a_score_keeps_a_clients_own_reason(reply_of):
    content = write_scores(Scores([ClientScore(1, reason="=1+1\n")]))
    _, scores, _ = model_scores([reply_of(6, content)], {"6": ASKED["6"]})
    assert scores[1].reason == "'=1+1"
