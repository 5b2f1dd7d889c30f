import dataclasses
import pickle
from collections import OrderedDict
from io import BytesIO

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from torch import nn

import fedfmd
from fedfmd.conv import CONVS, make_conv
from fedfmd.data import ImageFormat
from fedfmd.models import make_model
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
from fedfmd.protocol.state import (
    WireState,
    bank_of,
    check_layout,
    fill,
    first_non_finite,
    load,
    pack,
    parameter_names,
    payload_bytes,
    trained_views,
    wire_views,
)

DYNAMIC = sorted(CONVS.keys() - {"static"})


def npy(array):
    """A .npy file."""
    file = BytesIO()
    np.save(file, array)
    return file.getvalue()


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
    sent = pack(module).keys() - trained_views(wire_views(module), {"conv": (2, 0)}).keys()
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


class Counting(nn.Module):
    """Replaces a buffer in each forward pass, and has one that isn't kept."""

    def __init__(self):
        super().__init__()
        self.linear = self.again = nn.Linear(2, 2)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("scratch", torch.zeros(5), persistent=False)

    def forward(self, x):
        self.seen = self.seen + len(x)
        return self.again(x)


class Foreign(nn.Linear):
    """Makes its state dict in a way of its own."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}kernel"] = self.weight.detach()


@pytest.mark.parametrize(
    "make",
    [
        lambda: make_model("resnet8", "odconv", 3, kernels=2, width=0.25, norm="batch"),
        lambda: nn.Sequential(Counting(), nn.BatchNorm1d(2)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
        lambda: nn.Sequential(Foreign(2, 3), nn.Linear(3, 2)),
    ],
    ids=["resnet", "counting", "parametrised", "foreign"],
)
def test_a_state_looked_up_once_is_the_one_that_is_looked_up_anew(make):
    module = make()
    state = WireState(module)
    for _ in range(2):
        looked_up, anew = state.views(), wire_views(module)
        assert list(looked_up) == list(anew)
        assert all(looked_up[name].data_ptr() == view.data_ptr() for name, view in anew.items())
        assert all(looked_up[name].shape == view.shape for name, view in anew.items())
        with torch.no_grad():
            module(torch.rand(4, 3, 8, 8) if hasattr(module, "conv1") else torch.rand(4, 2))


def test_a_state_looked_up_once_asks_no_module_again(monkeypatch):
    """A client's part of a round: finding a hundred arrays takes as long as a step on a few images."""
    state = WireState(layer("fmdconv"))
    monkeypatch.setattr(nn.Module, "state_dict", None)
    monkeypatch.setattr(nn.Module, "named_modules", None)
    fill(state.views(), {name: np.ones(view.shape, np.float32) for name, view in state.views().items()})
    assert all(bool((view == 1).all()) for view in state.views().values())


def test_counters_and_scalars_keep_their_shape_and_type():
    arrays = from_record(to_record(pack(nn.BatchNorm2d(4)) | pack(layer("fmdconv"))))
    assert arrays["num_batches_tracked"].shape == arrays["conv.temperature"].shape == ()
    assert arrays["num_batches_tracked"].dtype == np.int64
    assert arrays["conv.temperature"].dtype == np.float32


def some_arrays():
    generator = np.random.default_rng(0)
    return {
        "matrix": generator.normal(size=(3, 4)).astype(np.float32),
        "by columns": np.asfortranarray(generator.normal(size=(3, 4))),
        "every second": np.arange(10, dtype=np.int8)[::2],
        "scalar": np.array(7),
        "half": np.ones((2, 1, 2), np.float16),
        "empty": np.zeros((0, 3), np.int64),
    }


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(ours[name], array)


def test_flower_reads_our_arrays_and_we_read_flowers():
    arrays = some_arrays()
    same({name: array.numpy() for name, array in to_record(arrays).items()}, arrays)
    same(from_record(ArrayRecord({name: Array(array) for name, array in arrays.items()})), arrays)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_records_can_be_pickled(protocol):
    same(from_record(pickle.loads(pickle.dumps(to_record(some_arrays()), protocol))), some_arrays())


def test_pickled_records_share_the_numbers_if_the_pickler_can():
    buffers = []
    text = pickle.dumps(to_record(some_arrays()), protocol=5, buffer_callback=buffers.append)
    shared = [bytearray(buffer.raw()) for buffer in buffers]
    arrays = from_record(pickle.loads(text, buffers=shared))
    same(arrays, some_arrays())
    for buffer in shared:
        buffer[-4:] = b"\xff\xff\xff\xff"
    assert np.isnan(arrays["matrix"][-1, -1])


def test_received_arrays_share_the_messages_memory_and_cannot_be_changed():
    record = to_record(some_arrays())
    (first, again) = (from_record(record)["matrix"] for _ in range(2))
    assert np.shares_memory(first, again)
    with pytest.raises(ValueError, match="read-only"):
        first[:] = 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no array at all", "an array is no .npy file of numbers"),
        (npy(np.arange(3.0))[:-1], r"an array of shape \(3,\) and type float64 has 23 bytes"),
        (npy(np.arange(3.0)) + b"x", r"an array of shape \(3,\) and type float64 has 25 bytes"),
        (npy(np.array([None])), "an array is no .npy file of numbers"),
    ],
)
def test_a_damaged_array_is_refused(content, message):
    record = ArrayRecord({"w": Array("float64", (3,), "numpy.ndarray", content)})
    with pytest.raises(ValueError, match=message):
        from_record(record)


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


IMAGES = ImageFormat(("cat", "dog"), 32, (0.5, 0.4, 0.3), (0.25, 0.2, 0.1), "crop+flip")


@pytest.mark.parametrize("how", [{}, {"run": "a-3"}, {"images": IMAGES}])
def test_an_instruction_comes_back_with_its_arrays(how):
    work = Assignment(7, 12, 32, 4), Assignment(2, 1, 8, 1, BY_ATTENTION)
    instruction = Instruction(4, 0.05, 21.5, work, **how)
    read, arrays = read_instruction(write_instruction(instruction, to_record({"w": np.arange(3.0)})))
    assert read == instruction
    assert np.array_equal(arrays["w"], np.arange(3.0))


def test_a_question_tells_the_version_and_the_images():
    assert read_question(write_question(IMAGES)) == (fedfmd.__version__, IMAGES)


@pytest.mark.parametrize(("kept", "augment"), [(True, "crop+flip"), (False, "none")])
def test_a_question_of_an_older_server_says_whether_to_augment(kept, augment):
    content = write_question(IMAGES)
    content["images"]["augment"] = kept
    assert read_question(content)[1] == dataclasses.replace(IMAGES, augment=augment)


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
