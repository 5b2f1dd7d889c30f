import math
import re
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Message, MessageType
from flwr.common.serde import recorddict_to_proto

from fedfmd.algorithms.fedbn import norm_views
from fedfmd.build import build_model
from fedfmd.client.app import app
from fedfmd.client.host import Host
from fedfmd.client.round import run_assignments
from fedfmd.client.round import test_model as run_test
from fedfmd.client.state import ClientStates
from fedfmd.conv import CONVS, AttentionRecord, record_attention
from fedfmd.data import Dataset, ImageFormat, ImageSet
from fedfmd.edge import DEVICES, device_text, parse_device
from fedfmd.engines.inline import InlineGrid
from fedfmd.protocol.averaging import ExactMean
from fedfmd.protocol.compression import ROUNDINGS, UPLOADS, Upload, upload_bytes
from fedfmd.protocol.messages import (
    BY_ATTENTION,
    CONFIG,
    Assignment,
    Instruction,
    read_reply,
    read_scores,
    to_record,
    write_instruction,
    write_question,
    write_reply,
)
from fedfmd.protocol.state import bank_of, load, pack, parameter_names, payload_bytes
from fedfmd.settings import Settings
from fedfmd.training import compute_gradients, evaluate, evaluation_of, run_tests

BROKEN, POISONED = 8, 9


@pytest.fixture
def make_host():
    """Makes nodes that host clients 0 to 3 with 1, 11, 12 and 13 images, and two whose data is no good."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 3
    pixels = (torch.randint(60, (40, 3, 8, 8), generator=generator) + 90 * labels.view(-1, 1, 1, 1)).to(
        torch.uint8
    )
    images = ImageSet(pixels, labels)
    dataset = Dataset("shades", images, images, 3, ("a", "b", "c"), (0.5,) * 3, (0.25,) * 3, "none")

    def images_of(client):
        if client == BROKEN:
            raise OSError("the disk\nis gone")
        if client == POISONED:
            return ImageSet(torch.full((4, 3, 8, 8), math.nan), labels[:4])
        first, count = ((0, 1), (1, 11), (12, 12), (24, 13))[client]
        return images.subset(torch.arange(first, first + count))

    def make(conv="fmdconv", norm="batch", **changes):
        tiny = {"model.conv": conv, "model.norm": norm, "model.width": 0.25, "train.batch-size": 8, "seed": 3}
        settings = Settings.from_mapping(tiny | changes)
        return Host(settings, dataset, images_of, torch.device("cpu"))

    return make


def instruction(*clients, round=1, steps=3, batch_size=8, kernels=4, first_kernel=0, **how):
    work = (Assignment(client, steps, batch_size, kernels, first_kernel) for client in clients)
    return Instruction(round, 0.05, 20.0, tuple(work), **how)


def global_arrays(host):
    return pack(build_model(host.settings, host.dataset.classes))


def equal(arrays, others):
    return arrays.keys() == others.keys() and all(
        np.array_equal(arrays[name], others[name]) for name in arrays
    )


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("conv", ["static", "fmdconv", "odconv"])
def test_a_client_does_not_notice_who_was_trained_before_it(make_host, conv, norm):
    fresh, used = make_host(conv, norm), make_host(conv, norm)
    arrays = global_arrays(fresh)
    run_assignments(used, instruction(1, 3), arrays)
    run_assignments(used, instruction(POISONED), arrays)
    after_others = run_assignments(used, instruction(2), arrays)
    alone = run_assignments(fresh, instruction(2), arrays)
    assert equal(after_others.arrays, alone.arrays)
    assert after_others.results[0].loss == alone.results[0].loss


def test_the_reply_is_the_mean_of_the_clients_by_images(make_host):
    host = make_host()
    arrays = global_arrays(host)
    reply = run_assignments(host, instruction(1, 2, 3), arrays)
    mean = ExactMean(arrays, len(host.dataset.train))
    for client in (3, 1, 2):
        alone = run_assignments(host, instruction(client), arrays)
        assert alone.rest == {}
        mean.add(alone.arrays, alone.weight)
    assert equal(reply.arrays, mean.arrays())
    assert equal(reply.rest, mean.rest(mean.arrays()))
    assert [result.images for result in reply.results] == [11, 12, 13]
    assert reply.weight == 36
    assert reply.weights == dict.fromkeys(arrays, 36)


def test_failed_clients_are_reported_and_leave_no_trace_in_the_mean(make_host):
    host = make_host()
    arrays = global_arrays(host)
    reply = run_assignments(host, instruction(POISONED, 1, BROKEN, 2), arrays)
    assert equal(reply.arrays, run_assignments(host, instruction(1, 2), arrays).arrays)
    assert [result.ok for result in reply.results] == [False, True, False, True]
    poisoned, broken = reply.results[0], reply.results[2]
    assert poisoned.reason.startswith("the update has NaN or infinite values in conv1.weight")
    assert broken.reason == "OSError: the disk is gone"
    assert reply.weight == 23


def test_a_node_whose_clients_all_fail_sends_no_arrays(make_host):
    host = make_host()
    reply = run_assignments(host, instruction(BROKEN, POISONED), global_arrays(host))
    assert reply.arrays == {}
    assert reply.weight == 0
    assert not any(result.ok for result in reply.results)


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("conv", ["static", "fmdconv", "odconv"])
def test_a_client_with_a_single_image_trains(make_host, conv, norm):
    host = make_host(conv, norm)
    arrays = global_arrays(host)
    reply = run_assignments(host, instruction(0, steps=2), arrays)
    (result,) = reply.results
    assert result.ok
    assert (result.images, result.steps, result.examples) == (1, 2, 2)
    assert not np.array_equal(reply.arrays["fc.weight"], arrays["fc.weight"])


def kernels_in(arrays):
    """The places of the kernels that were sent, bank by bank."""
    places = {}
    for bank, place in filter(None, map(bank_of, arrays)):
        places.setdefault(bank, set()).add(place)
    return places


@pytest.mark.parametrize("conv", ["condconv", "dyconv", "odconv", "fmdconv"])
def test_a_client_sends_the_kernels_that_it_was_told_to_train(make_host, conv):
    host = make_host(conv)
    arrays = global_arrays(host)
    reply = run_assignments(host, instruction(1, kernels=2, first_kernel=3), arrays)
    assert all(places == {3, 0} for places in kernels_in(reply.arrays).values())
    frozen = {name: array for name, array in arrays.items() if name not in reply.arrays}
    assert payload_bytes(reply.arrays) == payload_bytes(arrays) - payload_bytes(frozen)
    assert len(kernels_in(arrays)) == len(kernels_in(reply.arrays))
    # the others are as they were in the model that trained
    assert equal({name: pack(host.model)[name] for name in frozen}, frozen)


def test_a_kernel_is_the_mean_of_the_clients_of_the_node_that_trained_it(make_host):
    host = make_host()
    arrays = global_arrays(host)
    work = [Assignment(1, 3, 8, 2, 0), Assignment(2, 3, 8, 2, 1), Assignment(3, 3, 8, 1, 1)]
    reply = run_assignments(host, Instruction(1, 0.05, 20.0, tuple(work)), arrays)
    alone = [run_assignments(host, Instruction(1, 0.05, 20.0, (w,)), arrays).arrays for w in work]
    bank = "layer1.0.conv1.bank"
    assert [reply.weights.get(f"{bank}.{place}") for place in range(4)] == [11, 11 + 12 + 13, 12, None]
    assert np.array_equal(reply.arrays[f"{bank}.0"], alone[0][f"{bank}.0"])
    np.testing.assert_allclose(
        reply.arrays[f"{bank}.1"],
        sum(w * state[f"{bank}.1"] for w, state in zip((11, 12, 13), alone, strict=True)) / 36,
        rtol=1e-4,
        atol=1e-6,
    )


def test_kernels_chosen_by_attention_are_as_many_in_every_bank_and_the_same_each_time(make_host):
    host = make_host()
    arrays = global_arrays(host)
    chosen = [
        run_assignments(host, instruction(client, kernels=2, first_kernel=BY_ATTENTION), arrays)
        for client in (1, 2, 1)
    ]
    assert {len(places) for places in kernels_in(chosen[0].arrays).values()} == {2}
    assert equal(chosen[0].arrays, chosen[2].arrays)


def test_looking_at_the_attention_leaves_no_trace_in_a_client_that_trains_all(make_host):
    host = make_host()
    arrays = global_arrays(host)
    told, free = (
        run_assignments(host, instruction(1, first_kernel=first), arrays) for first in (0, BY_ATTENTION)
    )
    assert equal(told.arrays, free.arrays)


def test_the_plan_sets_the_batch_size(make_host):
    host = make_host()
    (result,) = run_assignments(host, instruction(1, steps=3, batch_size=4), global_arrays(host)).results
    assert result.examples == 4 + 4 + 3  # of 11 images


def test_every_round_has_its_own_order(make_host):
    host = make_host()
    arrays = global_arrays(host)
    rounds = [run_assignments(host, instruction(1, round=r), arrays).arrays for r in (1, 2, 1)]
    assert equal(rounds[0], rounds[2])
    assert not equal(rounds[0], rounds[1])


def test_the_round_sets_the_temperature(make_host):
    host = make_host()
    reply = run_assignments(host, instruction(1), global_arrays(host))
    assert {float(a) for name, a in reply.arrays.items() if name.endswith(".temperature")} == {20.0}


def test_arrays_of_another_model_are_named(make_host):
    host = make_host("static")
    (result,) = run_assignments(host, instruction(1), global_arrays(make_host("fmdconv"))).results
    assert result.reason.startswith("ValueError: array layer1.0.conv1.")


def restored(reply, arrays):
    return {
        name: tensor.numpy() for name, tensor in Upload(reply.arrays, reply.scales).restored(arrays).items()
    }


def assert_close(arrays, others, atol=1e-6):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_allclose(array, others[name], rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize(
    ("momentum", "nesterov", "way"), [(0.0, False, 3), (0.5, False, 4.25), (0.5, True, 5.125)]
)
def test_fednova_divides_the_update_by_the_steps_that_momentum_makes_of_them(
    make_host, momentum, nesterov, way
):
    """Three steps with momentum 0.5 go 1 + 1.5 + 1.75 learning rates along one gradient, Nesterov's one more each."""
    train = {"train.momentum": momentum, "train.nesterov": nesterov}
    host, nova = make_host(**train), make_host(**train, **{"server.strategy": "fednova"})
    arrays = global_arrays(host)
    full, short = (run_assignments(h, instruction(1), arrays).arrays for h in (host, nova))
    parameters = parameter_names(host.model)
    expected = {
        name: arrays[name] + (array - arrays[name]) / way if name in parameters else array
        for name, array in full.items()
    }
    assert_close(short, expected)


OWN = {"server.strategy": "fedbn"}


@pytest.fixture
def states(tmp_path, monkeypatch):
    """The folder of the clients' states, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fedfmd" / "clients"


def kept_by(folder, client, before_round):
    own = ClientStates(folder).load(client, before_round).own
    return {name: tensor.numpy() for name, tensor in own.items()}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_clients_go_on_with_their_own_normalisation(make_host, states, norm):
    """With a learning rate of nearly 0, a client's second round ends with the parameters of its first."""
    host = make_host(norm=norm, **OWN)
    arrays = global_arrays(host)
    run_assignments(host, instruction(1, 2, run="own"), arrays)
    first = {c: kept_by(states / "own", c, before_round=2) for c in (1, 2)}
    assert not equal(first[1], first[2])
    still = replace(instruction(1, 2, round=2, run="own"), lr=1e-12)
    run_assignments(host, still, arrays)
    kept = {c: ClientStates(states / "own").load(c, before_round=3).own for c in (1, 2)}
    for client, other in ((1, 2), (2, 1)):
        for name, array in first[client].items():
            if name.endswith((".weight", ".bias")):
                np.testing.assert_allclose(kept[client][name], array, rtol=1e-6, atol=still.lr)
        assert not torch.equal(kept[client]["bn1.weight"], kept[other]["bn1.weight"])
        if norm == "batch":
            assert kept[client]["bn1.num_batches_tracked"] == 6
            assert not torch.equal(kept[client]["bn1.running_mean"], kept[other]["bn1.running_mean"])


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_clients_of_one_node_do_not_notice_each_other(make_host, states, norm):
    """The second rounds of two clients are the same on one node and on two."""
    together, *apart = (make_host(norm=norm, **OWN) for _ in range(3))
    arrays = global_arrays(together)
    for round in (1, 2):
        run_assignments(together, instruction(1, 2, round=round, run="together"), arrays)
        for client, host in enumerate(apart, start=1):
            run_assignments(host, instruction(client, round=round, run="apart"), arrays)
    for client in (1, 2):
        one, two = (ClientStates(states / run).load(client, 3).own for run in ("together", "apart"))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("clients", [(1,), (1, 2)])
@pytest.mark.parametrize("upload", UPLOADS)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_sends_nothing_of_what_it_keeps(make_host, states, norm, upload, clients):
    host = make_host(norm=norm, **OWN, **{"transport.upload": upload})
    arrays = global_arrays(host)
    reply = run_assignments(host, instruction(*clients, run="own"), arrays)
    kept = kept_by(states / "own", 1, before_round=2).keys()
    assert kept == norm_views(host.model).keys()
    assert reply.arrays.keys() == reply.weights.keys() == arrays.keys() - kept
    assert not reply.scales.keys() & kept


@pytest.mark.parametrize("how", [{"model.norm": "batch"}, {"transport.upload": "int8"}])
def test_a_resumed_round_is_the_same_again(make_host, states, how):
    host = make_host(**OWN | how)
    arrays = global_arrays(host)
    rounds = [
        run_assignments(host, instruction(1, 2, round=r, run="own"), arrays).arrays for r in (1, 2, 3, 2, 3)
    ]
    assert equal(rounds[1], rounds[3])
    assert equal(rounds[2], rounds[4])
    assert not equal(rounds[1], rounds[2])


def test_a_failed_client_keeps_what_it_had(make_host, states):
    host = make_host(**OWN)
    run_assignments(host, instruction(POISONED, BROKEN, run="own"), global_arrays(host))
    assert not list(states.rglob("*.safetensors"))


@pytest.mark.parametrize("changes", [OWN, {"transport.upload": "int8"}])
def test_clients_can_keep_nothing_without_a_name_of_the_run(make_host, states, changes):
    host = make_host(**changes)
    (result,) = run_assignments(host, instruction(1), global_arrays(host)).results
    assert result.reason.startswith("ValueError: run = '' must name the run")


@pytest.mark.parametrize("kernels", [4, 2])
@pytest.mark.parametrize("upload", ROUNDINGS)
def test_a_client_alone_sends_what_it_rounded(make_host, states, upload, kernels):
    nova = {"server.strategy": "fednova"}
    exact, host = make_host(**nova), make_host(**nova, **{"transport.upload": upload})
    arrays = global_arrays(host)
    work = instruction(1, kernels=kernels, run="rounded")
    reply = run_assignments(host, work, arrays)
    full = run_assignments(exact, work, arrays)
    assert reply.weights == full.weights
    parameters = parameter_names(host.model)
    for name, array in restored(reply, arrays).items():
        if name in parameters:
            assert reply.arrays[name].dtype == {"fp16": np.float16, "int8": np.int8}[upload]
            largest = np.abs(full.arrays[name] - arrays[name]).max()
            step = {"fp16": 2**-24, "int8": 2e-8}[upload]  # fp16's smallest
            np.testing.assert_allclose(array, full.arrays[name], rtol=1e-6, atol=largest / 253 + step / 2)
        else:
            assert np.array_equal(array, full.arrays[name])
    bytes_sent = sum(array.nbytes for array in reply.arrays.values()) + 8 * len(reply.scales)
    assert bytes_sent == upload_bytes(full.arrays, upload, parameters)


@pytest.mark.parametrize("upload", UPLOADS)
def test_a_node_averages_what_its_clients_would_send(make_host, states, upload):
    host = make_host(**{"transport.upload": upload})
    arrays = global_arrays(host)
    for round in (1, 2):  # in the second one, clients have something left over
        together = run_assignments(host, instruction(1, 2, round=round, run="together"), arrays)
        mean = ExactMean(arrays, len(host.dataset.train))
        for client in (1, 2):
            alone = run_assignments(host, instruction(client, round=round, run="apart"), arrays)
            mean.add(restored(alone, arrays), alone.weight)
        assert together.scales == {}
        assert equal(together.arrays, mean.arrays())


def test_a_broken_update_is_refused_before_it_is_rounded(make_host, states):
    host = make_host(**{"transport.upload": "int8"})
    reply = run_assignments(host, instruction(POISONED, run="rounded"), global_arrays(host))
    assert "conv1.weight" in reply.results[0].reason
    assert reply.arrays == reply.scales == {}


@pytest.mark.parametrize(("upload", "share"), [("fp16", 1 / 2), ("int8", 1 / 4)])
def test_rounded_messages_are_smaller(make_host, states, upload, share):
    sizes = {}
    for name in ("fp32", upload):
        host = make_host(**{"transport.upload": name, "model.width": 1.0})
        reply = run_assignments(host, instruction(0, steps=1, run="rounded"), global_arrays(host))
        sizes[name] = recorddict_to_proto(write_reply(reply)).ByteSize()
    assert share < sizes[upload] / sizes["fp32"] < share + 0.04  # names and shapes are as long as before


@pytest.mark.parametrize("conv", CONVS)
def test_a_client_tells_what_its_attentions_were(make_host, conv):
    host = make_host(conv)
    (result,) = run_assignments(host, instruction(1, steps=2), global_arrays(host)).results
    told = {
        "kernel": not math.isnan(result.kernel_entropy),
        "input": 0 < result.input_attention < 1,
        "output": 0 < result.output_attention < 1,
    }
    has = {"static": (), "condconv": ("kernel",), "dyconv": ("kernel",)}.get(conv, tuple(told))
    assert told == {name: name in has for name in told}


def test_attentions_are_those_of_the_last_eight_steps(make_host):
    host = make_host()
    with record_attention(host.model) as record:
        (result,) = run_assignments(host, instruction(1, steps=11), global_arrays(host)).results
    last = AttentionRecord({name: list(values)[-8:] for name, values in record.values.items()})
    assert {len(values) for values in last.values.values()} == {8}
    assert result.kernel_entropy == last.kernel_entropy() != record.kernel_entropy()
    assert result.input_attention == last.mean("input")
    assert result.output_attention == last.mean("output")


@pytest.fixture
def own_data(tmp_path):
    path = tmp_path / "own_data.npz"
    np.savez(path, images=np.zeros((7, 8, 8, 3), np.uint8), labels=np.arange(7))
    return str(path)


def ask(settings, node_config, content=None, kind=MessageType.QUERY):
    with InlineGrid(app, settings.flat(), [node_config]) as grid:
        message = Message(content or write_question(IMAGES), grid.get_node_ids()[0], kind)
        (reply,) = grid.send_and_receive([message])
        assert not reply.has_error()
        return reply.content


IMAGES = ImageFormat(tuple("0123456789"), 8, (0.5,) * 3, (0.25,) * 3, "none")


def test_a_worker_says_that_it_hosts_any_client(tiny_settings):
    told = ask(tiny_settings(), {"partition-id": 1, "num-partitions": 4})[CONFIG]
    assert dict(told) == {
        "client": -1,
        "rank": 1,
        "nodes": 4,
        "device": "",
        "profile": "",
        "images": 0,
        "error": "",
    }


def test_an_edge_device_tells_its_client_images_and_device(tiny_settings, own_data):
    told = ask(tiny_settings(), {"client": 2, "data": own_data, "device": "pi-5"})[CONFIG]
    mine = {"client": 2, "rank": 2, "nodes": 0, "device": "pi-5", "profile": "", "images": 7, "error": ""}
    assert dict(told) == mine


@pytest.fixture
def device_file(tmp_path):
    path = tmp_path / "box.yaml"
    path.write_text(device_text(DEVICES["pi-4"]))
    return path


def test_an_edge_device_tells_the_device_in_its_own_file(tiny_settings, own_data, device_file):
    told = ask(tiny_settings(), {"client": 2, "data": own_data, "device": str(device_file)})[CONFIG]
    assert told["error"] == ""
    assert parse_device(told["profile"], "message") == DEVICES["pi-4"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        ("mine: {watts: 3}", "row 'mine', key 'train_gflops'"),
        ("{}", "holds 0 devices"),
    ],
)
def test_an_edge_device_whose_device_file_is_broken_says_why_it_refuses(
    tiny_settings, own_data, device_file, content, reason
):
    device_file.unlink() if content is None else device_file.write_text(content)
    told = ask(tiny_settings(), {"client": 2, "data": own_data, "device": str(device_file)})[CONFIG]
    assert told["error"].startswith(f"{device_file}: {reason}")


def test_an_edge_device_without_data_says_why_it_refuses(tiny_settings):
    told = ask(tiny_settings(), {"client": 0, "data": "nowhere.npz"})[CONFIG]
    assert told["images"] == 0
    assert told["error"].startswith("nowhere.npz: no such file")


def test_an_edge_device_needs_no_data_set_of_the_runs(tiny_settings, own_data, tmp_path):
    elsewhere = {"data.dataset": "npz", "data.train": "/server/train.npz", "data.test": "/server/test.npz"}
    settings = tiny_settings(**elsewhere, **{"data.image-size": 0})
    assert ask(settings, {"client": 0, "data": own_data})[CONFIG]["images"] == 7


@pytest.mark.parametrize(
    ("wanted", "node_config", "error"),
    [
        ({"class_names": tuple("abc")}, {}, r"own_data\.npz: label 6 "),
        (
            {"image_size": 32},
            {},
            r"own_data\.npz: images of 8×8 pixels, the run's have 32×32: .*data\.image-size=32",
        ),
        ({}, {"devise": "pi-5"}, r"unknown key devise = 'pi-5'; the nearest one is device"),
        ({}, {"device-backend": "gpu"}, r"^device-backend = 'gpu': "),
        ({}, {"device-backend": "cuda:7"}, r"device-backend = 'cuda:7' .* sees 0 GPUs .*device-backend=cpu"),
    ],
)
def test_an_edge_device_that_does_not_fit_says_why(
    tiny_settings, own_data, monkeypatch, wanted, node_config, error
):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    settings = tiny_settings(**{"data.image-size": 0})
    question = write_question(replace(IMAGES, **wanted))
    told = ask(settings, {"client": 0, "data": own_data} | node_config, question)[CONFIG]
    assert re.search(error, told["error"])
    assert told["images"] == 0


def test_an_edge_device_refuses_a_server_of_another_version(tiny_settings, own_data):
    question = write_question(IMAGES)
    question[CONFIG]["version"] = "9.9.9"
    told = ask(tiny_settings(), {"client": 0, "data": own_data}, question)[CONFIG]
    assert re.fullmatch(
        r"this edge device has fedfmd .*, the server 9\.9\.9: install the same .*", told["error"]
    )


def test_an_edge_device_trains_on_its_own_images(tiny_settings, own_data):
    model = build_model(tiny_settings(), classes=10)
    work = write_instruction(instruction(1, steps=1, images=IMAGES), to_record(pack(model)))
    reply = read_reply(ask(tiny_settings(), {"client": 1, "data": own_data}, work, MessageType.TRAIN))
    assert [(r.client, r.images, r.reason) for r in reply.results] == [(1, 7, "")]
    load(model, reply.arrays)


@pytest.mark.parametrize(
    ("node_config", "measured"), [({"client": 1}, True), ({}, False)], ids=["edge device", "worker"]
)
def test_only_an_edge_device_measures_inference(tiny_settings, node_config, measured):
    model = build_model(tiny_settings(), classes=10)
    work = write_instruction(instruction(1, steps=1), to_record(pack(model)))
    (result,) = read_reply(ask(tiny_settings(), node_config, work, MessageType.TRAIN)).results
    assert (result.latency_s > 0) == measured


HELD = {"partition.test-share": 0.25}


def test_a_client_holds_the_same_images_out_in_every_round_and_never_trains_on_them(make_host):
    host, all_of = make_host(**HELD), make_host()
    for client, sizes in {0: (1, 0), 1: (8, 3), 2: (9, 3), 3: (10, 3)}.items():
        trained, held, whole = host.images_of(client), host.tests_of(client), all_of.images_of(client)
        assert (len(trained), len(held)) == sizes
        both = torch.cat([trained.images, held.images]).flatten(1).tolist()
        assert sorted(both) == sorted(whole.images.flatten(1).tolist())
        assert torch.equal(make_host(**HELD).tests_of(client).images, held.images)
    assert not torch.equal(make_host(seed=4, **HELD).tests_of(3).images, host.tests_of(3).images)
    assert len(all_of.tests_of(3)) == 0
    assert run_assignments(host, instruction(1, 3), global_arrays(host)).weight == 18


def test_clients_test_the_global_model_on_what_they_hold_out(make_host):
    host = make_host(**HELD)
    arrays = global_arrays(host)
    run_assignments(host, instruction(3), arrays)  # what was trained before is gone
    scores = run_test(host, instruction(1, 3, 0, steps=0), arrays).clients
    model = build_model(host.settings, host.dataset.classes)
    for score, client in zip(scores, (1, 3), strict=False):
        expected = evaluate(model, host.tests_of(client), host.dataset)
        assert (score.client, score.reason) == (client, "")
        assert score.test_loss == pytest.approx(expected.loss, rel=1e-5)
        assert score.test_accuracy == pytest.approx(expected.accuracy)
        assert math.isnan(score.personal_test_accuracy)
    assert math.isnan(scores[2].test_accuracy)  # a single image can't be spared


def test_a_client_whose_images_are_gone_costs_the_others_no_score(make_host):
    host = make_host(**HELD)
    broken, fine = run_test(host, instruction(BROKEN, 1), global_arrays(host)).clients
    assert broken.reason == "OSError: the disk is gone"
    assert fine.reason == ""


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_fedbn_clients_test_the_model_with_their_own_layers_too(make_host, states, norm):
    host = make_host(norm=norm, **OWN, **HELD)
    arrays = global_arrays(host)
    first, _ = run_test(host, instruction(1, 2, round=1, run="own"), arrays).clients
    assert math.isnan(first.personal_test_loss)  # it has none before it has trained
    run_assignments(host, instruction(1, 2, steps=20, run="own"), arrays)
    one, two = run_test(host, instruction(1, 2, round=2, run="own"), arrays).clients
    for score, client in ((one, 1), (two, 2)):
        model = build_model(host.settings, host.dataset.classes)
        assert score.test_loss == pytest.approx(
            evaluate(model, host.tests_of(client), host.dataset).loss, rel=1e-5
        )
        with torch.no_grad():
            for name, tensor in ClientStates(states / "own").load(client, 2).own.items():
                norm_views(model)[name].copy_(tensor)
        personal = evaluate(model, host.tests_of(client), host.dataset)
        assert score.personal_test_loss == pytest.approx(personal.loss, rel=1e-5) != score.test_loss


def test_nodes_share_a_test_out_and_its_result_is_that_of_one(make_host, monkeypatch):
    monkeypatch.setattr("fedfmd.training.local.TEST_BATCH", 16)
    monkeypatch.setattr("fedfmd.client.round.run_tests", partial(run_tests, batch_size=16))
    host = make_host()  # 40 images to test on
    arrays = global_arrays(host)
    parts = [run_test(host, instruction(part=part, parts=2), arrays) for part in (0, 1)]
    assert [[test.images for test in part.test] for part in parts] == [[16], [16, 8]]
    assert all(part.clients == () and part.validation == () for part in parts)
    whole = evaluate(host.model, host.dataset.test, host.dataset, batch_size=16)
    together = evaluation_of([*parts[1].test, *parts[0].test])
    assert asdict(together) == pytest.approx(asdict(whole), rel=0, nan_ok=True)  # bit for bit
    assert run_test(host, instruction(), arrays).test == ()


def test_an_edge_device_tests_on_its_own_images(tiny_settings, own_data):
    settings = tiny_settings(**HELD)
    assert ask(settings, {"client": 1, "data": own_data})[CONFIG]["images"] == 5  # of 7 images 2 are held out
    model = build_model(settings, classes=10)
    work = write_instruction(instruction(1, images=IMAGES), to_record(pack(model)))
    (score,) = read_scores(ask(settings, {"client": 1, "data": own_data}, work, MessageType.EVALUATE)).clients
    assert (score.client, score.reason) == (1, "")
    assert score.test_accuracy in (0, 0.5, 1)


def test_gradients_of_all_kernels_are_computed_as_the_host_says(make_host, monkeypatch):
    computed = []

    def compute(*given):
        computed.append(1)
        return compute_gradients(*given)

    monkeypatch.setattr("fedfmd.client.host.build_compute", lambda _settings, _device: compute)
    host = make_host()
    run_assignments(host, instruction(1, 2, steps=3), global_arrays(host))
    assert len(computed) == 6
    run_assignments(host, instruction(1, 2, kernels=2), global_arrays(host))  # some kernels need hooks
    assert len(computed) == 6
    static = make_host(**{"model.conv": "static", "model.kernels": 4})  # of which it has none
    run_assignments(static, instruction(1, 2, steps=3, kernels=1), global_arrays(static))
    assert len(computed) == 12
