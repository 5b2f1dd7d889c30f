"""Calibrate this machine, simulate rounds of it, and compare the seconds predicted with those measured.

    python experiments/benchmarks/calibration.py --out experiments/benchmarks/results/calibration.csv

Each network is measured as `fedfmd calibrate` does it, on single images and in batches of 16. Then two clients on
this device train it on random images for some rounds, in this process, with other batch sizes too. The predicted
seconds are `compute_s` of clients.csv, the measured ones the median of its `wall_s`.
"""

from __future__ import annotations

import argparse
import logging
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch
from common import about, table_of, write_rows
from rich.console import Console

from fedfmd import calibration
from fedfmd.client_app import app as client_app
from fedfmd.conv import CONVS
from fedfmd.engines.inline import run_inline
from fedfmd.models import MODELS
from fedfmd.runs import RunFolder, read_clients
from fedfmd.server_app import app as server_app
from fedfmd.settings import Settings

CLASSES = 10
IMAGE_SIZE = 32
MEASURED_BATCH = 16
KERNELS = 4
CLIENTS = 2
IMAGES = 56  # per client: an epoch's last batch of 16 is a short one
ROUNDS = 3


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    logging.getLogger("flwr").setLevel(logging.WARNING)
    logging.getLogger("fedfmd").addHandler(logging.NullHandler())  # so that the runs don't log to the console
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_profile(folder / "box.yaml", options.arch, options.conv)
        for split, images in (("train", CLIENTS * IMAGES), ("test", CLASSES)):
            write_images(folder / f"{split}.npz", images)
        rows = [
            check(folder, arch, conv, batch, options.threads)
            for arch, conv, batch in product(options.arch, options.conv, options.batch)
        ]
    write_rows(options.out, [about() | row for row in rows])
    Console().print(table_of(rows))


def write_profile(path: Path, archs: list[str], convs: list[str]) -> None:
    networks = calibration.models_of(archs, convs, [KERNELS], {})
    measured = [calibration.measure(network, CLASSES, IMAGE_SIZE, [MEASURED_BATCH]) for network in networks]
    memory_gb = calibration.total_memory_gb(torch.device("cpu"))
    box = calibration.make_device("box", measured, "this machine", memory_gb=memory_gb)
    calibration.write_devices(path, {"box": box})


def write_images(path: Path, images: int) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(images, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(images) % CLASSES)


def check(folder: Path, arch: str, conv: str, batch: int, threads: int) -> dict[str, object]:
    """Run a simulation of this machine on this machine."""
    run = RunFolder(folder / f"{arch}-{conv}-{batch}")
    settings = Settings.from_mapping(
        {
            "model": {"arch": arch, "conv": conv, "kernels": KERNELS},
            "data": {"dataset": "npz", "train": f"{folder}/train.npz", "test": f"{folder}/test.npz"},
            "partition": {"scheme": "iid", "clients": CLIENTS},
            "train": {"batch-size": batch, "local-epochs": 1, "lr": 1e-3},
            "fleet": {"devices": "box", "devices-file": f"{folder}/box.yaml"},
            "budget.deadline-s": 0,
            "server.rounds": ROUNDS,
        }
    )
    run_inline(server_app, client_app, settings.in_folder(run.path).flat(), threads=threads)
    clients = read_clients(run.clients)
    predicted_s, measured_s = clients[0].compute_s, median(row.wall_s for row in clients)
    return {
        "threads": threads,
        "arch": arch,
        "conv": conv,
        "batch": batch,
        "steps": clients[0].steps,
        "predicted_s": round(predicted_s, 4),
        "measured_s": round(measured_s, 4),
        "ratio": round(predicted_s / measured_s, 3),
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", choices=MODELS, default=["resnet8", "resnet18"])
    parser.add_argument("--conv", nargs="+", choices=CONVS, default=["static", "fmdconv"])
    parser.add_argument("--batch", nargs="+", type=int, default=[8, 16], help="batch sizes to simulate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("calibration.csv"), help="CSV file to write")
    return parser.parse_args()


if __name__ == "__main__":
    main()
