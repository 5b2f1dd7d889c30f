from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import fedfmd
from fedfmd.conv import CONVS, make_conv
from fedfmd.data import ImageFormat
from fedfmd.models import make_model
from fedfmd.wire import (
    BY_ATTENTION,
    Assignment,
    ClientResult,
    Instruction,
    Reply,
    bank_of,
    check_layout,
    first_non_finite,
    from_record,
    load,
    pack,
    parameter_names,
    payload_bytes,
    read_instruction,
    read_question,
    read_reply,
    to_record,
    trained_views,
    write_instruction,
    write_question,
    write_reply,
)

DYNAMIC = sorted(CONVS.keys() - {"static"})


def layer(conv):
    return nn.Sequential(OrderedDict(conv=make_conv(conv, 8, 16, 3, kernels=3, bias=True)))


@pytest.mark.parametrize("conv", DYNAMIC)
def test_a_bank_travels_as_one_array_per_kernel(conv):
    module = layer(conv)
    arrays = pack(module)
    assert {name for name in arrays if "bank" in name} == {
        f"conv.{bank}.{k}" for bank in ("bank", "bias_bank") for k in range(3)
    }
    for k in range(3):
        assert np.array_equal(arrays[f"conv.bank.{k}"], module.conv.bank[k].detach().numpy())
        assert arrays[f"conv.bias_bank.{k}"].shape == (16,)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("layer1.0.conv1.bank.2", ("layer1.0.conv1.bank", 2)),
        ("conv.bias_bank.10", ("conv.bias_bank", 10)),
        ("layer1.0.conv1.temperature", None),
        ("fc.weight", None),
    ],
)
def test_kernels_are_told_by_their_names(name, kernel):
    assert bank_of(name) == kernel


def test_an_upload_has_all_but_the_frozen_kernels():
    module = layer("fmdconv")
    sent = pack(module).keys() - trained_views(module, {"conv": (2, 0)}).keys()
    assert sent == {"conv.bank.1", "conv.bias_bank.1"}


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("conv", CONVS)
def test_a_model_comes_back_as_it_was(conv, norm):
    torch.manual_seed(0)
    sent, received = (make_model("resnet8", conv, 3, kernels=2, width=0.25, norm=norm) for _ in range(2))
    load(received, from_record(to_record(pack(sent))))
    ours = received.state_dict()
    for name, tensor in sent.state_dict().items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


def test_counters_and_scalars_keep_their_shape_and_type():
    arrays = from_record(to_record(pack(nn.BatchNorm2d(4)) | pack(layer("fmdconv"))))
    assert arrays["num_batches_tracked"].shape == arrays["conv.temperature"].shape == ()
    assert arrays["num_batches_tracked"].dtype == np.int64
    assert arrays["conv.temperature"].dtype == np.float32


def test_packed_arrays_do_not_follow_the_module():
    module = nn.Linear(2, 2)
    arrays = pack(module)
    before = arrays["weight"].copy()
    nn.init.zeros_(module.weight)
    assert np.array_equal(arrays["weight"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.bank.1": None}, "array conv.bank.1 is missing"),
        ({"conv.extra": np.zeros(2)}, "array conv.extra is not part of the model"),
        ({"conv.bank.2": np.zeros((8, 8, 3, 3))}, r"array conv.bank.2 has shape \(8, 8, 3, 3\)"),
        ({"conv.temperature": np.ones(1)}, r"array conv.temperature has shape \(1,\), the model's has \(\)"),
    ],
)
def test_a_wrong_layout_names_the_array(change, message):
    module = layer("fmdconv")
    before = pack(module)
    arrays = {name: array for name, array in (before | change).items() if array is not None}
    with pytest.raises(ValueError, match=message):
        load(module, arrays)
    assert all(np.array_equal(array, before[name]) for name, array in pack(module).items())


def test_arrays_in_another_order_are_the_same_layout():
    arrays = pack(nn.Linear(2, 3))
    check_layout(dict(reversed(arrays.items())), {"weight": (3, 2), "bias": (3,)})


def test_optional_arrays_may_be_missing_but_not_misshapen():
    shapes = {"a": (2,), "b": (3,)}
    check_layout({"a": np.zeros(2)}, shapes, optional=["b"])
    with pytest.raises(ValueError, match=r"array b has shape \(1,\), the model's has \(3,\)"):
        check_layout({"a": np.zeros(2), "b": np.zeros(1)}, shapes, optional=["b"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_array_that_is_not_finite_is_named(value):
    arrays = {"a": np.zeros(3), "n": np.array(7), "b": np.array([0, value, 1]), "c": np.array([value])}
    assert first_non_finite(arrays) == "b"


def test_large_but_finite_arrays_are_finite():
    assert first_non_finite({"a": np.full(4, np.finfo(np.float32).max)}) is None


def test_payload_is_what_the_values_need():
    assert payload_bytes({"w": np.zeros((2, 3), np.float32), "n": np.array(1)}) == 2 * 3 * 4 + 8


IMAGES = ImageFormat(("cat", "dog"), 32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1), True)


@pytest.mark.parametrize(
    "how", [{}, {"normalised": True}, {"local_norm": True, "run": "a-3"}, {"images": IMAGES}]
)
def test_an_instruction_comes_back_with_its_arrays(how):
    work = Assignment(7, 12, 32, 4), Assignment(2, 1, 8, 1, BY_ATTENTION)
    instruction = Instruction(4, 0.05, 21.5, work, **how)
    read, arrays = read_instruction(write_instruction(instruction, to_record({"w": np.arange(3.0)})))
    assert read == instruction
    assert np.array_equal(arrays["w"], np.arange(3.0))


def test_a_question_tells_the_version_and_the_images():
    assert read_question(write_question(IMAGES)) == (fedfmd.__version__, IMAGES)


def test_a_reply_comes_back_and_weighs_what_its_trained_clients_do():
    results = (
        ClientResult(3, 100, 4, 64, 1.5, 0.25, 0.1),
        ClientResult(5, 40, 0, 0, 2.0, 0.5, 0.2, "ValueError: no data"),
        ClientResult(8, 10, 1, 10, 0.5, 0.75, 0.3),
    )
    reply = read_reply(write_reply(Reply({"w": np.arange(3.0)}, results, {"w": 110})))
    assert reply.results == results
    assert reply.weight == 110
    assert reply.weights == {"w": 110}
    assert np.array_equal(reply.arrays["w"], np.arange(3.0))


def test_a_single_clients_reply_may_be_rounded_with_scales():
    sent = {"w": np.array([127, -3], np.int8), "v": np.array([0.5], np.float16), "n": np.array(4)}
    client = ClientResult(3, 100, 4, 64, 1.5, 0.25, 0.1, "", 0.9, 0.5, 0.25)
    reply = read_reply(write_reply(Reply(sent, (client,), dict.fromkeys(sent, 100), {"w": 0.02})))
    assert reply.scales == {"w": 0.02}
    assert {name: array.dtype for name, array in reply.arrays.items()} == {
        name: array.dtype for name, array in sent.items()
    }
    assert reply.results == (client,)


def test_parameters_are_what_is_no_buffer():
    module = nn.Sequential(OrderedDict(conv=make_conv("dyconv", 4, 4, 3, kernels=2), bn=nn.BatchNorm2d(4)))
    names = parameter_names(module)
    assert {"conv.bank.0", "conv.bank.1", "conv.bias_bank.0", "bn.weight"} < names
    assert pack(module).keys() - names == {
        "conv.temperature",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
    }


def test_a_reply_without_a_trained_client_has_no_arrays():
    failed = ClientResult(0, 0, 0, 0, 0.0, 0.0, 0.1, "RuntimeError: broken")
    reply = read_reply(write_reply(Reply({}, (failed,))))
    assert reply == Reply({}, (failed,))
    assert reply.weight == 0
