import pytest
import torch

from fedfmd.cost import count
from fedfmd.errors import SettingsError
from fedfmd.federation import build_dataset, build_federation, build_model, cache_dir, torch_device
from fedfmd.settings import Settings


def test_a_federation_fits_its_settings(tiny_settings):
    federation = build_federation(tiny_settings())
    assert federation.dataset.image_size == 8
    assert len(federation.partition.indices) == len(federation.fleet.clients) == 3
    assert federation.sizes == (479, 479, 479)  # 80 % of 1797 digits
    assert federation.fleet.counts == {"pi-4": 2, "pi-5": 1}
    assert federation.budget.deadline_s is None
    assert federation.cost == count(federation.model, 8)
    assert federation.payload_bytes == federation.cost.bytes
    assert federation.trained_kernels == 2


def test_a_workload_is_a_full_round(tiny_settings):
    federation = build_federation(tiny_settings(**{"train.local-epochs": 2}))
    workload = federation.workload(0)
    assert workload.images == 479
    assert workload.steps == 2 * 8  # batches of 64
    assert workload.train_flops_per_image == 3 * workload.infer_flops_per_image == federation.cost.train_flops
    assert workload.up_bytes == workload.down_bytes == federation.payload_bytes
    assert workload.memory_bytes == 12 * federation.cost.params + 64 * federation.cost.activation_bytes


def test_latency_is_the_mean_over_the_fleet(tiny_settings):
    federation = build_federation(tiny_settings())
    seconds = {
        c.device.name: federation.cost.flops / (c.device.infer_gflops * 1e9) for c in federation.fleet.clients
    }
    assert federation.mean_latency_s == pytest.approx((2 * seconds["pi-4"] + seconds["pi-5"]) / 3)


def test_a_static_model_has_one_kernel(tiny_settings):
    assert build_federation(tiny_settings(**{"model.conv": "static"})).trained_kernels == 1


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
        ({"partition.clients": 10_000}, "partition.clients = 10000 but the training set has 1437 images"),
        ({"data.image-size": 4}, "data.image-size = 4: digits need at least 8"),
        ({"data.dataset": "cifar10"}, "data.dir is not set"),
        (
            {"data.dataset": "npz", "data.train": "none.npz", "data.test": "none.npz"},
            "data.train = none.npz: no such file",
        ),
        ({"fleet.devices": "pi-44:3"}, "fleet.devices: unknown device 'pi-44'; did you mean 'pi-4'?"),
        ({"fleet.devices": "pi-4:2"}, "fleet.devices names 2 devices, partition.clients is 3"),
        ({"fleet.devices-file": "none.yaml"}, "none.yaml: cannot be read"),
        ({"device": "gpu"}, "device = 'gpu': must be auto, cpu, cuda or cuda:N"),
        ({"device": "cpu:x"}, "device = 'cpu:x': must be"),
    ],
)
def test_what_cannot_be_built_is_one_line(changes, message, tiny_settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=message) as error:
        build_federation(tiny_settings(**changes))
    assert "\n" not in str(error.value)


def test_a_missing_gpu_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="device = 'cuda:1' but PyTorch sees 0 GPUs here: use device=cpu"):
        torch_device(Settings(device="cuda:1"))
    assert torch_device(Settings(device="auto")) == torch.device("cpu")


def test_the_cache_is_where_the_desktop_wants_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "fedfmd"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "fedfmd"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path, tiny_settings):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SettingsError, match=f"data.dir = {tmp_path}/images"):
        build_dataset(tiny_settings(**{"data.dataset": "cifar10", "data.dir": "~/images"}))
