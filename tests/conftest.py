import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings as hypothesis_settings
from PIL import Image

from fedfmd.conv import native
from fedfmd.report.record import Run
from fedfmd.runs import ClientRow, EpochRow, RoundRow, RunFolder
from fedfmd.settings import Settings

TINY = {
    "data.image-size": 8,
    "model.width": 0.25,
    "model.kernels": 2,
    "partition.scheme": "iid",
    "partition.clients": 3,
    "train.batch-size": 64,
    "train.local-epochs": 1,
    "server.rounds": 1,
    "fleet.devices": "pi-4:2, pi-5:1",
    "budget.deadline-s": 0,
}


# Drawn examples are the same on each machine and in each run; some of them take long, for imports.
hypothesis_settings.register_profile("fedfmd", deadline=None, derandomize=True, max_examples=100)
hypothesis_settings.load_profile("fedfmd")


def pytest_configure(config):
    """Tests run side by side: one thread each."""
    if hasattr(config, "workerinput"):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Those that start Flower's processes run one after another, beside the others."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.xdist_group("processes"))


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """A cache of partitions for all tests, so that none reads or fills the user's."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield home


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory):
    """A cache that holds the mixing compiled for this machine; empty where there is no compiler."""
    home = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        if any(map(shutil.which, native.COMPILERS)):
            native.compile_native()
    native._library.cache_clear()
    return home


@pytest.fixture
def compiled_native(native_cache, monkeypatch):
    """For one test, the mixing is compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(native_cache))
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.fixture
def tiny_settings():
    """Makes settings of a run of a second: three clients with digits of 8 x 8 pixels; changes as dotted keys."""

    def make(**changes):
        return Settings.from_mapping(TINY | changes)

    return make


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An image folder of two classes, JPEGs of 24 × 32 pixels: 24 to train, 6 to test."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, images in (("train", 24), ("val", 6)):
        for place in range(images):
            path = root / part / "ab"[place % 2] / f"{place:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = rng.integers(0, 128, (3, 4, 3), np.uint8) + 127 * (place % 2)
            Image.fromarray(colours.astype(np.uint8)).resize((32, 24)).save(path)
    return root


@pytest.fixture
def write_yaml(tmp_path):
    """Writes an experiment file of the tiny settings; changes are the base's dotted keys."""

    def write(name="tiny", matrix=None, select=None, **changes):
        path = tmp_path / f"{name}.yaml"
        parts = {"base": TINY | changes, "matrix": matrix, "select": select}
        path.write_text(yaml.safe_dump({part: content for part, content in parts.items() if content}))
        return path

    return write


@pytest.fixture
def write_checkpoint(tiny_settings, tmp_path):
    """Writes a checkpoint of an untrained model of the tiny settings; changes as dotted keys."""
    from fedfmd.build import build_model
    from fedfmd.runs import save_checkpoint

    def write(**changes):
        settings = tiny_settings(**changes)
        state = build_model(settings, classes=10).state_dict()
        save_checkpoint(
            tmp_path, 7, state, {}, settings.flat(), class_names=[str(digit) for digit in range(10)]
        )
        return tmp_path / "round-00007.safetensors"

    return write


def round_row(number, accuracy, **changes):
    """A round of 10 virtual seconds, 1 GFLOP, 3 MB up and 2 MB down, and 500 J."""
    values = {
        "round": number,
        "virtual_s": 10.0 * number,
        "round_s": 10.0,
        "wall_s": 1.0,
        "loss": 1.0,
        "accuracy": accuracy,
        "best_accuracy": accuracy,
        "kernel_entropy": 0.9,
        "clients_ok": 2,
        "clients_late": 0,
        "clients_failed": 0,
        "train_flops": 10**9,
        "cum_train_flops": number * 10**9,
        "up_bytes": 3 * 10**6,
        "down_bytes": 2 * 10**6,
        "energy_j": 500.0,
        "latency_s": 0.002,
        "ies_train": 10 / accuracy if accuracy else None,
        "rcs_train": accuracy / 10 if accuracy else None,
        "ies_infer": 0.002 / accuracy if accuracy else None,
        "rcs_infer": accuracy / 0.002 if accuracy else None,
    }
    return RoundRow(**values | changes)


def client_row(number, client, accuracy, **changes):
    """A client's round: 1 s down, 3 s of computing and 2 s up."""
    values = {
        "round": number,
        "client": client,
        "device": "pi-4",
        "status": "ok",
        "examples": 100,
        "steps": 10,
        "kernels": 4,
        "train_flops": 10**9,
        "cum_train_flops": number * 10**9,
        "compute_s": 3.0,
        "down_s": 1.0,
        "up_s": 2.0,
        "total_s": 6.0,
        "up_bytes": 10**6,
        "down_bytes": 10**6,
        "energy_j": 20.0,
        "accuracy": accuracy,
    }
    return ClientRow(**values | changes)


def epoch_row(number, accuracy, **changes):
    """An epoch of 4 seconds, 1 GFLOP; 2 ms per image; in the top five as often again as half of the mistakes."""
    values = {
        "epoch": number,
        "wall_s": 4.0,
        "cum_wall_s": 4.0 * number,
        "lr": 0.1,
        "train_loss": 1.0,
        "train_accuracy": accuracy,
        "loss": 1.0,
        "accuracy": accuracy,
        "top5_accuracy": (1 + accuracy) / 2,
        "best_accuracy": accuracy,
        "kernel_entropy": 0.9,
        "train_flops": 10**9,
        "cum_train_flops": number * 10**9,
        "latency_s": 0.002,
        "ies_train": 4 / accuracy,
        "rcs_train": accuracy / 4,
        "ies_infer": 0.002 / accuracy,
        "rcs_infer": accuracy / 0.002,
    }
    return EpochRow(**values | changes)


def rows(accuracies, validation=None):
    return [
        round_row(number, accuracy, validation_accuracy=held)
        for number, (accuracy, held) in enumerate(
            zip(accuracies, validation or [None] * len(accuracies), strict=True), start=1
        )
    ]


CENTRALISED = {
    "kind": "centralised",
    "data.image-size": 8,
    "model.width": 0.25,
    "model.kernels": 2,
    "train.batch-size": 128,
    "train.epochs": 2,
    "threads": 1,  # tests run side by side
}


@pytest.fixture
def write_centralised(tmp_path):
    """Writes an experiment file of centralised training of a second; changes as the base's dotted keys."""

    def write(**changes):
        path = tmp_path / "centralised.yaml"
        base = CENTRALISED | changes
        path.write_text(yaml.safe_dump({"kind": base.pop("kind"), "base": base}))
        return path

    return write


@pytest.fixture
def make_run():
    """Makes a finished run of these accuracies and, in its last round, of these clients' accuracies."""

    def make(accuracies, clients=(), task="", variant="", validation=None, **changes):
        settings = Settings.from_mapping({"server.rounds": len(accuracies)} | changes)
        last = [client_row(len(accuracies), client, accuracy) for client, accuracy in enumerate(clients)]
        return Run(
            Path("run"),
            settings,
            tuple(rows(accuracies, validation)),
            tuple(last),
            task=task,
            variant=variant or settings.model.conv,
        )

    return make


@pytest.fixture
def make_centralised():
    """Makes a finished centralised run of these accuracies."""

    def make(accuracies, task="", variant="", validation=None, **changes):
        settings = Settings.from_mapping({"kind": "centralised", "train.epochs": len(accuracies)} | changes)
        epochs = tuple(
            epoch_row(row.round, row.accuracy, validation_accuracy=row.validation_accuracy)
            for row in rows(accuracies, validation)
        )
        return Run(Path("run"), settings, epochs, task=task, variant=variant or settings.model.conv)

    return make


def write_epochs(path, accuracies, epochs=2, **changes):
    folder = RunFolder(path)
    settings = {"kind": "centralised", "train.epochs": epochs} | changes
    folder.write_settings(Settings.from_mapping(settings).kept())
    for number, accuracy in enumerate(accuracies, start=1):
        folder.append_epoch(epoch_row(number, accuracy))
    return folder.path


@pytest.fixture
def write_centralised_run(tmp_path):
    """Writes a centralised run folder of two epochs, or as many as there are accuracies."""

    def write(name, accuracies, **changes):
        return write_epochs(tmp_path / "runs" / name, accuracies, **changes)

    return write


@pytest.fixture(scope="session")
def centralised_runs(tmp_path_factory):
    """Two seeds of static (final 70, 80 %) and of fmdconv (80, 86 %), two epochs each; to read."""
    folder = tmp_path_factory.mktemp("centralised") / "runs"
    for conv, seed, accuracies in (
        ("static", 0, (0.4, 0.7)),
        ("static", 1, (0.5, 0.8)),
        ("fmdconv", 0, (0.5, 0.8)),
        ("fmdconv", 1, (0.9, 0.86)),
    ):
        write_epochs(folder / f"{conv}-{seed}", accuracies, **{"model.conv": conv, "seed": seed})
    return folder


def write_folder(path, accuracies, optional=False, rounds=2, validation=None, **changes):
    folder = RunFolder(path)
    folder.write_settings(Settings.from_mapping({"server.rounds": rounds} | changes).kept())
    for row in rows(accuracies, validation):
        clients = [
            client_row(row.round, 0, 0.5),
            client_row(row.round, 1, None, status="late", reason="slow", total_s=60.0, up_s=56.0),
        ]
        folder.append_round(row, clients if optional else [])
    if optional:
        folder.write_environment()
        np.savez(folder.path / "partition.npz", label_counts=np.array([[5, 0, 2], [1, 7, 0]]))
    else:
        folder.clients.unlink(missing_ok=True)
    return folder.path


@pytest.fixture
def write_run(tmp_path):
    """Writes a run folder of two rounds, or as many as there are accuracies, with or without optional files."""

    def write(name, accuracies, **changes):
        return write_folder(tmp_path / "runs" / name, accuracies, **changes)

    return write


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory):
    """Two seeds of static (final 70, 80 %) and of fmdconv (80, 86 %), two rounds each, with all files; to read."""
    folder = tmp_path_factory.mktemp("finished") / "runs"
    for conv, seed, accuracies in (
        ("static", 0, (0.4, 0.7)),
        ("static", 1, (0.5, 0.8)),
        ("fmdconv", 0, (0.5, 0.8)),
        ("fmdconv", 1, (0.9, 0.86)),
    ):
        changes = {"model.conv": conv, "seed": seed}
        write_folder(folder / f"{conv}-{seed}", accuracies, optional=True, **changes)
    return folder


@pytest.fixture
def runs(finished_runs, tmp_path):
    """A copy of the finished runs, to change."""
    return Path(shutil.copytree(finished_runs, tmp_path / "runs"))
