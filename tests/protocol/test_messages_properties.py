"""What holds for any arrays and messages on their way through Flower's records and back."""

import math

import numpy as np
import pytest
import torch
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from torch import nn

from fedfmd.conv import CONVS, make_conv
from fedfmd.data import ImageFormat
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Instruction,
    Reply,
    from_record,
    read_instruction,
    read_question,
    read_reply,
    to_record,
    write_instruction,
    write_question,
    write_reply,
)
from fedfmd.protocol.parsing import MAX_NUMBER, MAX_WHOLE, clean_text
from fedfmd.protocol.state import load, pack

TYPES = ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool")
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
COUNTS = st.integers(0, 2**63 - 1)
FLOATS = st.floats()
ARRAYS = st.sampled_from(TYPES).flatmap(
    lambda dtype: numpy_st.arrays(
        dtype, numpy_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3)
    )
)
STATES = st.dictionaries(TEXTS.filter(bool), ARRAYS, max_size=4)


def exact(arrays):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in arrays.items()}


def sent(content):
    """What arrives of it through gRPC."""
    return recorddict_from_proto(recorddict_to_proto(content))


@given(arrays=STATES)
def test_arrays_come_back_bit_for_bit(arrays):
    assert exact(from_record(to_record(arrays))) == exact(arrays)


@given(arrays=st.lists(ARRAYS.filter(np.size), max_size=4))
def test_a_models_buffers_of_any_type_come_back_bit_for_bit(arrays):
    model, other = nn.Module(), nn.Module()
    for place, array in enumerate(arrays):
        model.register_buffer(f"buffer{place}", torch.from_numpy(array.copy()))
        other.register_buffer(f"buffer{place}", torch.zeros(array.shape, dtype=torch.as_tensor(array).dtype))
    load(other, from_record(to_record(pack(model))))
    assert exact(pack(other)) == exact({f"buffer{place}": array for place, array in enumerate(arrays)})


@pytest.mark.parametrize("conv", CONVS)
@settings(max_examples=15)
@given(data=st.data())
def test_a_layer_of_any_size_comes_back_bit_for_bit(conv, data):
    options = {"bias": data.draw(st.booleans())}
    if conv != "static":
        options["kernels"] = data.draw(st.integers(1, 5))
    size = [data.draw(st.integers(1, 9)) for _ in range(2)] + [data.draw(st.sampled_from([1, 3]))]
    layer, other = (make_conv(conv, *size, **options) for _ in range(2))
    load(other, from_record(to_record(pack(layer))))
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in layer.state_dict().items())


IMAGES = st.builds(
    ImageFormat,
    class_names=st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
    image_size=st.integers(1, 512),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0, 1)] * 3),
    augment=st.sampled_from(["none", "crop", "crop+flip"]),
)
ASSIGNMENTS = st.builds(
    Assignment, COUNTS, COUNTS, COUNTS, COUNTS, first_kernel=st.just(BY_ATTENTION) | COUNTS
)
INSTRUCTIONS = st.builds(
    Instruction,
    round=COUNTS,
    lr=FLOATS,
    temperature=FLOATS,
    assignments=st.lists(ASSIGNMENTS, max_size=3).map(tuple),
    run=TEXTS,
    images=st.none() | IMAGES,
)
WHOLE = st.integers(0, MAX_WHOLE)
MEASURES = st.just(math.nan) | st.floats(-MAX_NUMBER, MAX_NUMBER)
SECONDS = st.just(math.nan) | st.floats(0, MAX_NUMBER)
RESULTS = st.builds(
    ClientResult,
    *[WHOLE] * 4,
    *[MEASURES] * 2,
    SECONDS,
    reason=TEXTS.map(clean_text),
    kernel_entropy=MEASURES,
    input_attention=MEASURES,
    output_attention=MEASURES,
    latency_s=SECONDS,
)


@given(instruction=INSTRUCTIONS, arrays=STATES)
def test_an_instruction_arrives_as_it_was(instruction, arrays):
    read, received = read_instruction(sent(write_instruction(instruction, to_record(arrays))))
    assert repr(read) == repr(instruction)  # as text, for the sake of NaN
    assert exact(received) == exact(arrays)


@given(images=IMAGES)
def test_a_question_arrives_as_it_was(images):
    assert read_question(sent(write_question(images)))[1] == images


@given(
    arrays=STATES,
    results=st.lists(RESULTS, max_size=3),
    weight=st.floats(0, MAX_WHOLE),
    scale=st.floats(1e-30, 516),
)
def test_a_reply_arrives_as_it_was(arrays, results, weight, scale):
    weights, scales = dict.fromkeys(arrays, weight), dict.fromkeys(list(arrays)[:1], scale)
    reply = read_reply(sent(write_reply(Reply(arrays, tuple(results), weights, scales))))
    assert repr(reply.results) == repr(tuple(results))
    assert (reply.weights, repr(reply.scales)) == (weights, repr(scales))
    assert exact(reply.arrays) == exact(arrays)
