import re

import pytest
import torch

from fedfmd.build import (
    build_compute,
    build_dataset,
    build_federation,
    build_fleet,
    build_model,
    build_partition,
    describe_network,
    placed,
    torch_device,
)
from fedfmd.conv import CONVS
from fedfmd.cost import count, frozen_bytes, training_memory
from fedfmd.edge import Budget
from fedfmd.errors import SettingsError
from fedfmd.protocol.state import bank_of, pack, parameter_names
from fedfmd.settings import Settings
from fedfmd.training import compute_gradients
from fedfmd.training.compiled import Compiled
from fedfmd.training.graphs import Graphs


def test_a_federation_fits_its_settings(tiny_settings):
    federation = build_federation(tiny_settings())
    assert federation.dataset.image_size == 8
    assert len(federation.partition.indices) == len(federation.fleet.clients) == 3
    assert federation.sizes == (479, 479, 479)  # 80 % of 1797 digits
    assert federation.fleet.counts == {"pi-4": 2, "pi-5": 1}
    assert federation.budget.deadline_s is None
    assert federation.cost == count(federation.model, 8)
    assert federation.payload_bytes == federation.cost.bytes
    assert federation.cost.kernels == 2


def test_validation_images_are_held_out_before_the_split(tiny_settings):
    whole, held = (build_federation(tiny_settings(**{"data.validation": share})) for share in (0, 0.1))
    assert (len(held.dataset.train), len(held.dataset.validation)) == (1437 - 144, 144)
    assert held.sizes == (431, 431, 431)
    assert sorted(image for own in held.partition.indices for image in own) == list(range(1437 - 144))
    again = build_partition(whole.settings, build_dataset(whole.settings))
    assert sum(again.sizes) == 1437  # the cache keeps both splits apart


def test_seeds_hold_other_images_out_of_the_same_loaded_ones(tiny_settings, monkeypatch):
    held = {"data.validation": 100, "data.image-size": 9}
    first = build_dataset(tiny_settings(**held))
    monkeypatch.setattr("fedfmd.build.load_dataset", None)  # nothing is loaded again
    second, again = (build_dataset(tiny_settings(seed=seed, **held)) for seed in (1, 0))
    assert again.fingerprint == first.fingerprint != second.fingerprint
    assert build_dataset(tiny_settings(**held | {"data.validation": 0})).validation is None


@pytest.mark.parametrize(("augment", "told"), [("auto", "crop"), ("none", "none")])
def test_the_log_tells_network_images_and_augmentation(tiny_settings, augment, told):
    federation = build_federation(tiny_settings(**{"data.augment": augment}))
    text = describe_network(federation.settings, federation.cost, federation.dataset)
    assert text.startswith("resnet8 with fmdconv (K=2), ")
    assert re.search(r", \d+\.\d k MACs per image, on digits", text)
    assert text.endswith(f" on digits at 8×8, augmentation {told}")


def test_a_workload_is_a_full_round(tiny_settings):
    federation = build_federation(tiny_settings(**{"train.local-epochs": 2}))
    workload = federation.workload(0)
    assert (workload.images, workload.batch_size, workload.epochs) == (479, 64, 2)
    assert workload.steps(64) == 2 * 8
    assert workload.cost == federation.cost
    assert workload.payload_bytes == federation.payload_bytes
    assert workload.upload_bytes == federation.upload_bytes


def test_what_frozen_kernels_save_is_what_they_weigh_on_the_wire(tiny_settings):
    federation = build_federation(tiny_settings(**{"model.kernels": 3}))
    arrays = pack(federation.model)
    second = [array for name, array in arrays.items() if (kernel := bank_of(name)) and kernel[1] == 1]
    weight = sum(array.nbytes for array in second)
    assert frozen_bytes(federation.cost, 2) == weight
    assert federation.upload_bytes == tuple(
        federation.payload_bytes - frozen * weight for frozen in (2, 1, 0)
    )


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(("upload", "number_bytes", "scale_bytes"), [("fp16", 2, 0), ("int8", 1, 8)])
def test_rounded_parameters_weigh_less_on_the_way_up(tiny_settings, conv, upload, number_bytes, scale_bytes):
    federation = build_federation(tiny_settings(**{"model.conv": conv, "transport.upload": upload}))
    arrays, parameters = pack(federation.model), parameter_names(federation.model)
    saved = sum((4 - number_bytes) * arrays[name].size - scale_bytes for name in parameters)
    assert federation.upload_bytes[-1] == federation.payload_bytes - saved
    assert len(federation.upload_bytes) == federation.cost.kernels


def test_the_settings_may_replace_what_devices_say(tiny_settings, tmp_path):
    board = "{train_gflops: 8, infer_gflops: 4, memory_gb: 1, power_w: 1, source: me, jitter: 0.3"
    file = tmp_path / "devices.yaml"
    file.write_text(f"mine: {board}, availability: 0.9, efficiency: {{fmdconv: 0.5}}}}")
    own = {"fleet.devices": "mine", "fleet.devices-file": str(file)}

    def device(**changes):
        return build_federation(tiny_settings(**own | changes)).fleet.clients[0].device

    assert (device().availability, device().jitter, device().train_gflops) == (0.9, 0.3, 4)
    assert device(**{"model.conv": "static"}).train_gflops == 8
    assert device(**{"fleet.efficiency": "none"}).train_gflops == 8
    changed = device(**{"fleet.availability": 0.5, "fleet.jitter": 0.1})
    assert (changed.availability, changed.jitter) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("clients", "counts"),
    [
        (10, {"jetson-nano": 3, "pi-4": 4, "pi-5": 3}),
        (8, {"jetson-nano": 2, "pi-4": 3, "pi-5": 3}),  # 3.2, 2.4 and 2.4: a tie goes to the first
        (1, {"pi-4": 1}),
    ],
)
def test_the_default_fleet_fits_any_number_of_clients(clients, counts):
    settings = Settings.from_mapping({"partition.clients": clients})
    assert build_fleet(settings, [1] * clients).counts == counts


def test_the_fastest_device_may_follow_the_images(tiny_settings):
    settings = {
        "partition.scheme": "dirichlet",
        "partition.alpha": 0.5,
        "fleet.devices": "pi-4:2, jetson-nano:1",
    }
    for assignment, extreme in (("size", max), ("inverse", min)):
        federation = build_federation(tiny_settings(**settings | {"fleet.assignment": assignment}))
        (fast,) = (c.id for c in federation.fleet.clients if c.device.name == "jetson-nano")
        assert federation.sizes[fast] == extreme(federation.sizes)


def test_limits_of_0_are_none(tiny_settings):
    assert build_federation(tiny_settings()).budget == Budget(policy="wait")
    limits = {"budget.policy": "drop", "budget.deadline-s": 3, "budget.energy-j": 4, "budget.up-bytes": 5}
    budget = build_federation(tiny_settings(**limits)).budget
    assert (budget.deadline_s, budget.energy_j, budget.up_bytes) == (3, 4, 5)


def test_latency_is_the_mean_over_the_fleet(tiny_settings):
    federation = build_federation(tiny_settings())
    seconds = {
        c.device.name: federation.cost.flops / (c.device.infer_gflops * 1e9) for c in federation.fleet.clients
    }
    assert federation.mean_latency_s == pytest.approx((2 * seconds["pi-4"] + seconds["pi-5"]) / 3)


def test_initial_weights_depend_on_the_seed_alone(tiny_settings):
    def weights(seed):
        return build_model(tiny_settings(seed=seed), classes=10).state_dict()

    torch.manual_seed(0)
    first, drawn = weights(1), torch.rand(1)
    torch.manual_seed(0)
    assert drawn == torch.rand(1)  # the caller's random numbers stay as they are
    torch.testing.assert_close(weights(1), first, rtol=0, atol=0)
    assert not torch.equal(weights(2)["conv1.weight"], first["conv1.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition.clients": 10_000}, "partition.clients = 10000 "),
        ({"data.image-size": 4}, "data.image-size = 4: "),
        ({"data.validation": 1437}, "data.validation = 1437: would hold out 1,437 of 1,437 training images"),
        (
            {"data.validation": 0.9, "partition.min-images": 50},
            "data.validation = 0.9 leaves 144 training images, and partition.clients = 3 with "
            "partition.min-images = 50 need 150: hold out at most 1,287",
        ),
        ({"data.dataset": "cifar10"}, "data.dir "),
        (
            {"data.dataset": "npz", "data.train": "none.npz", "data.test": "none.npz"},
            "data.train = none.npz: ",
        ),
        ({"fleet.devices": "pi-44:3"}, "fleet.devices: "),
        ({"fleet.devices": "pi-4:2"}, "fleet.devices "),
        ({"fleet.devices-file": "none.yaml"}, "none.yaml: cannot be read"),
        ({"fleet.trace": "none.csv"}, "fleet.trace = none.csv: cannot be read"),
        ({"device": "gpu"}, "device = 'gpu': must be auto, cpu, cuda or cuda:N"),
        ({"device": "cpu:x"}, "device = 'cpu:x': must be"),
    ],
)
def test_what_cannot_be_built_is_one_line(changes, message, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message) as error:
        build_federation(tiny_settings(**changes))
    assert "\n" not in str(error.value)


DEEP = {"model.arch": "resnet18", "model.width": 0.125, "model.norm": "batch"}
"""The maps of its last stage are 1×1 on images of 8×8."""


def test_a_last_batch_of_one_image_is_refused_where_batch_norm_cannot_train_on_it(tiny_settings):
    message = (
        "train.batch-size = 2 leaves 3 of 3 clients a last batch of one image: the network fails in training on a "
        "batch of 1×3×8×8: ValueError: Expected more than 1 value per channel.*; take another batch size, or "
        "model.norm=group"
    )
    with pytest.raises(SettingsError, match=message):
        build_federation(tiny_settings(**DEEP, **{"train.batch-size": 2}))


def test_memory_may_cut_batches_to_such_that_leave_one_image(tiny_settings, tmp_path):
    wanted = DEEP | {"train.batch-size": 3}
    cost = build_federation(tiny_settings(**wanted)).cost
    memory_gb = training_memory(cost, 2, cost.kernels, 1) * 1.0001 / 1e9
    (tmp_path / "devices.yaml").write_text(
        f"box: {{train_gflops: 8, infer_gflops: 4, memory_gb: {memory_gb}, power_w: 1, source: made up}}"
    )
    small = {"fleet.devices": "box:3", "fleet.devices-file": str(tmp_path / "devices.yaml")}
    with pytest.raises(
        SettingsError, match="batch-size = 3, cut to 2 by the memory of a device, leaves 3 of 3"
    ):
        build_federation(tiny_settings(**wanted, **small))


@pytest.mark.parametrize(
    "changes", [{"train.batch-size": 3}, {"model.norm": "group"}, {"model.arch": "resnet8"}]
)
def test_other_last_batches_are_trained_on(changes, tiny_settings):
    build_federation(tiny_settings(**DEEP | {"train.batch-size": 2} | changes))


def test_a_missing_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="device = 'cuda:1' but PyTorch sees 0 GPUs here: use device=cpu"):
        torch_device(Settings(device="cuda:1"))
    assert torch_device(Settings(device="auto")) == torch.device("cpu")


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, tiny_settings):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SettingsError, match=f"data.dir = {tmp_path}/images"):
        build_dataset(tiny_settings(**{"data.dataset": "cifar10", "data.dir": "~/images"}))


@pytest.mark.parametrize(("free", "moved"), [(4.1, True), (3.9, False)])
def test_images_lie_on_a_gpu_that_has_room_for_them(tiny_settings, monkeypatch, free, moved):
    dataset = build_dataset(tiny_settings(**{"data.validation": 100}))
    needed = sum(images.nbytes for images in (dataset.train, dataset.test, dataset.validation))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (free * needed, 80e9))
    here = placed(dataset, torch.device("meta"))  # a device like any other, whose memory nobody sees
    assert {part.device.type == "meta" for part in (here.train, here.test, here.validation)} == {moved}
    assert len(here.validation) == 100
    assert placed(dataset, torch.device("cpu")) is dataset


def test_streamed_images_stay_where_they_are(image_folder):
    options = {"data.dataset": "imagefolder", "data.dir": str(image_folder), "data.streaming": "always"}
    dataset = build_dataset(Settings.from_mapping(options))
    assert placed(dataset, torch.device("meta")) is dataset


def test_a_network_is_compiled_if_asked_for():
    settings = Settings.from_mapping({"train.torch-compile": True})
    assert isinstance(build_compute(settings, torch.device("cpu")), Compiled)


@pytest.mark.parametrize(
    ("graphs", "device", "replayed"), [(True, "cuda", True), (False, "cuda", False), (True, "cpu", False)]
)
def test_only_a_gpu_replays_graphs_and_only_if_asked_to(monkeypatch, graphs, device, replayed):
    monkeypatch.setattr("fedfmd.build.capture_on_gpu", lambda _device: None)
    settings = Settings.from_mapping({"train.cuda-graphs": graphs, "device": "auto"})
    compute = build_compute(settings, torch.device(device))
    assert isinstance(compute, Graphs) == replayed
    assert (compute is compute_gradients) != replayed
