"""Whatever a client replies, only that client fails.

Valid replies of a small model, one fault or a few in each. `FEDFMD_FUZZ=10000` tries so many instead of a few.
"""

import math
import os
from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fedfmd.algorithms import ALGORITHMS, Update
from fedfmd.conv import make_conv
from fedfmd.edge import examples_of
from fedfmd.engines.inline import InlineGrid
from fedfmd.flower_compat import set_message_id
from fedfmd.protocol.compression import UPLOADS, Upload, round_update
from fedfmd.protocol.messages import (
    Assignment,
    ClientResult,
    Hosted,
    Reply,
    read_hosted,
    read_reply,
    write_hosted,
    write_reply,
)
from fedfmd.protocol.parsing import MAX_TEXT
from fedfmd.protocol.state import (
    first_non_finite,
    fixed_names,
    pack,
    parameter_names,
    shared_arrays,
    variance_names,
)
from strategies.aggregation import aggregate
from strategies.nodes import _answer
from strategies.replies import Terms, client_results, read_replies

EXAMPLES = int(os.environ.get("FEDFMD_FUZZ", "120"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES < 1000,
    database=None,
    suppress_health_check=list(HealthCheck),
)

MODEL = nn.Sequential(
    OrderedDict(conv=make_conv("dyconv", 2, 2, 1, kernels=2), norm=nn.BatchNorm2d(2), fc=nn.Linear(2, 3))
)
PARAMETERS = parameter_names(MODEL)
SENT = pack(MODEL)
IMAGES = (20, 30)
WORK = {"0": [Assignment(0, 3, 8, 2)], "1": [Assignment(1, 3, 8, 2)]}


def terms(upload):
    return Terms(IMAGES, PARAMETERS, upload, (), fixed_names(MODEL), variance_names(MODEL))


@cache
def valid(client, upload):
    """What the client would reply: every parameter a little larger, three steps more on the counters."""
    for name, array in shared_arrays(MODEL).items():
        array[...] = SENT[name] + (0.01 if name in PARAMETERS else 3 if array.dtype.kind == "i" else 0)
    trained = pack(MODEL)
    sent = Upload(trained)
    if upload != "fp32":
        tensors = {name: torch.as_tensor(array) for name, array in trained.items()}
        sent, _ = round_update(tensors, SENT, {}, upload, PARAMETERS)
    images = IMAGES[client]
    result = ClientResult(client, images, 3, examples_of(images, 3, 8), 1.0, 0.5, 0.1)
    arrays = {name: np.asarray(array) for name, array in sent.arrays.items()}
    return Reply(arrays, (result,), dict.fromkeys(arrays, images), dict(sent.scales))


NUMBERS = st.one_of(
    st.sampled_from(
        [0, -1, 1, 2**31, 2**62, -(2**62), 1e-320, 1e30, 1e308, math.inf, -math.inf, math.nan, 0.5]
    ),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
)
TEXTS = st.one_of(
    st.sampled_from(
        ["", "=1+1", "\x1b[2J", "\x1b]0;x\x07", "\r\n", "x" * 10_000, "\u202e", "arrays", "fc.weight"]
    ),
    st.text(max_size=50),
)
DESCRIPTIONS = [
    "<f4",
    ">f4",
    "<f2",
    "<f8",
    "|i1",
    "<i8",
    "<u8",
    "|O",
    "<U9",
    "<c8",
    "<i16",
    "(",
    "'",
    "<f4', 'x",
]
SHAPES = [
    "()",
    "(1,)",
    "(2, 2)",
    f"({2**38},)",
    f"(0, {10**17})",
    "(-1,)",
    "(1e3,)",
    "(((",
    "(True,)",
    "1" * 400,
]
RECORDS = ["arrays", "weights", "scales", "metrics", "config"]


def damage_bytes(draw, data):
    """Flip, cut, or repeat some bytes, or change the header's text."""
    hows = ["flip", "cut", "more", "header", "version", "anything"]
    how = draw(st.sampled_from(hows)) if data else "anything"
    if how == "flip":
        place = draw(st.integers(0, len(data) - 1))
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if how == "cut":
        return data[: draw(st.integers(0, len(data) - 1))]
    if how == "more":
        return data + data[-draw(st.integers(1, 200)) :]
    if how == "version":
        return data[:6] + draw(st.binary(min_size=2, max_size=4)) + data[8:]
    if how == "anything":
        return draw(st.binary(max_size=200))
    descr, columns = draw(st.sampled_from(DESCRIPTIONS)), draw(st.sampled_from(["True", "False", "0"]))
    shape = draw(st.sampled_from(SHAPES))
    text = f"{{'descr': '{descr}', 'fortran_order': {columns}, 'shape': {shape}, }}".encode()
    text = text.ljust(-(-(len(text) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data[-draw(st.integers(1, 64)) :]


def damage(draw, content):
    """Change one thing of a reply's content."""
    name = draw(st.sampled_from(RECORDS))
    record = content.get(name)
    how = draw(st.sampled_from(["drop", "retype", "rename", "entry", "entry", "entry", "values", "values"]))
    if how == "drop" or record is None:
        content.pop(name, None)
    elif how == "retype":
        del content[name]
        content[name] = draw(st.sampled_from([ArrayRecord(), MetricRecord(), ConfigRecord({"reason": "x"})]))
    elif how == "rename":
        del content[name]
        content[draw(TEXTS)] = record
    elif not record:
        record[draw(TEXTS)] = Array(np.ones(2, np.float32)) if isinstance(record, ArrayRecord) else 1.0
    else:
        entry = draw(st.sampled_from(sorted(record)))
        damage_entry(draw, record, entry, how)


def damage_entry(draw, record, entry, how):
    value = record[entry]
    if how == "entry":
        del record[entry]
        if draw(st.booleans()):
            record[draw(TEXTS)] = value
    elif isinstance(value, Array):
        dtype = draw(st.sampled_from([value.dtype, "int8", "", "object"]))
        record[entry] = Array(dtype, value.shape, value.stype, damage_bytes(draw, bytes(value.data)))
    elif isinstance(record, MetricRecord):
        number = draw(NUMBERS)
        record[entry] = [number] * draw(st.integers(0, 3)) if isinstance(value, list) else number
    else:
        texts = draw(st.lists(st.one_of(TEXTS), max_size=3))
        record[entry] = draw(st.sampled_from([texts, draw(TEXTS), draw(NUMBERS), b"\xff", True]))


def reply_message(request_id, content):
    request = Message(RecordDict(), 7, MessageType.TRAIN)
    set_message_id(request, request_id)
    return Message(content, reply_to=request)


@pytest.fixture(scope="module", autouse=True)
def identity():
    """What Flower's messages need of the process; a grid gives it."""
    with InlineGrid(ClientApp(), {}, []):
        yield


@FUZZ
@given(data=st.data())
def test_a_mutated_reply_fails_its_client_or_is_as_good_as_any(data, tiny_settings):
    draw = data.draw
    upload = draw(st.sampled_from(UPLOADS))
    honest, mutated = (write_reply(valid(client, upload)) for client in (0, 1))
    for _ in range(draw(st.integers(1, 3))):
        damage(draw, mutated)
    with suppress(ValueError):  # no other kind there may be
        read_reply(mutated)
    received = dict.fromkeys(WORK, SENT)
    messages = [reply_message("0", honest), reply_message("1", mutated)]
    answers = read_replies(messages, WORK, received, terms(upload))
    results = client_results(answers, WORK)
    assert results[0].ok
    assert results[1].reason.isprintable()
    assert len(results[1].reason) <= MAX_TEXT
    assert results[1].ok == (answers[1].reply is not None and bool(answers[1].reply.arrays))
    updates = [
        Update(a.reply.arrays, a.reply.weights, tuple(r for r in a.reply.results if r.ok), SENT)
        for a in answers
        if a.reply is not None and a.reply.arrays
    ]
    name = draw(st.sampled_from(["fedavg", "fedavg", "krum", "krum", "fedmedian"]))
    algorithm = ALGORITHMS[name](tiny_settings())
    new, _ = aggregate(algorithm, algorithm.init(), 1, updates, SENT, PARAMETERS)
    assert first_non_finite(new) is None
    assert {n: (a.dtype, a.shape) for n, a in new.items()} == {n: (a.dtype, a.shape) for n, a in SENT.items()}
    for variance in variance_names(MODEL):
        assert (new[variance] >= 0).all()
    if not results[1].ok:
        alone, _ = aggregate(algorithm, algorithm.init(), 1, updates[:1], SENT, PARAMETERS)
        assert all(np.array_equal(new[n], alone[n]) for n in SENT)


@FUZZ
@given(
    changes=st.dictionaries(
        st.sampled_from(sorted(vars(Hosted()))),
        st.one_of(
            NUMBERS, TEXTS, st.binary(max_size=9), st.lists(st.integers(0, 9), max_size=3), st.booleans()
        ),
        max_size=3,
    ),
    dropped=st.sampled_from([None, *vars(Hosted())]),
)
def test_a_mutated_answer_is_a_node_or_a_fault(changes, dropped):
    content = write_hosted(replace(Hosted(), client=1, images=10))
    for key, value in changes.items():
        content["config"][key] = value
    content["config"].pop(dropped, None)
    with suppress(ValueError):  # no other kind there may be
        read_hosted(content)
    answer = _answer(1, reply_message("1", content), repr)
    assert answer.fault or (answer.node.client is None or answer.node.images > 0)
    assert str(answer).isprintable()
    assert len(str(answer)) < 2 * MAX_TEXT
