"""A SuperLink and boxes as `experiments/deploy` sets them up: its units' commands, on loopback, without ray."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import ssl
import string
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomli_w
import torch

from fedfmd.data import load_dataset
from fedfmd.engines.flower import descendants, end_processes, flwr_json, free_port
from fedfmd.flower_compat import flower_environment
from fedfmd.runs import read_clients, read_rounds
from fedfmd.settings import Settings

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "experiments" / "deploy"
BOXES = ("box0", "box1", "box2")
DEVICES = ("pi-4", "pi-5", "jetson-nano")
IMAGES_PER_BOX = 200
PATIENCE_S, RESTART_S = 600, 2

SETTINGS = {
    "data.image-size": 8,
    "model.width": 0.5,
    "model.kernels": 2,
    "model.norm": "batch",
    "partition.clients": 3,
    "partition.scheme": "iid",
    "train.local-epochs": 5,
    "temperature.rounds": 2,
    "fleet.devices": "pi-4",
    "budget.deadline-s": 0,
    "server.rounds": 3,
    "server.node-timeout-s": 300,
    "threads": 1,
}

NO_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")

sys.meta_path.insert(0, NoRay())
"""


class Deployment:
    """The processes of a server and of boxes with digits of their own; each writes a log into `folder`."""

    boxes = BOXES

    def __init__(
        self, folder: Path, on_disk: bool = False, sabotage: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.database = folder / "superlink.db" if on_disk else ":flwr-in-memory:"
        self.port = free_port()
        self.certificates = folder / "certificates"
        self.processes: dict[str, subprocess.Popen] = {}
        self.commands: dict[str, list[str]] = {}
        self.sabotage = sabotage or {}
        subprocess.run(
            [DEPLOY / "certificates.sh", self.certificates, "127.0.0.1", *BOXES, "stranger"],
            check=True,
            capture_output=True,
        )
        for box in (*BOXES, "stranger"):
            (self.certificates / "boxes" / box).replace(self.certificates / box)  # as on the box itself
        connection = {"address": self.address, "root-certificates": str(self.certificates / "ca.crt")}
        config = {"superlink": {"default": "boxes", "boxes": connection}}
        self.environment("user")
        (folder / "user" / "config.toml").write_text(tomli_w.dumps(config))
        train = load_dataset("digits", image_size=8).train
        for place, box in enumerate((*BOXES, "stranger")):
            own = train.subset(torch.arange(place * IMAGES_PER_BOX, (place + 1) * IMAGES_PER_BOX))
            pixels = own.images.permute(0, 2, 3, 1).numpy()
            np.savez(folder / f"{box}.npz", images=pixels, labels=own.labels.numpy())

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def environment(self, name: str) -> dict[str, str]:
        """The environment of a machine of its own, with its own home, without ray, and with its sabotage."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        (home / "sitecustomize.py").write_text(NO_RAY + self.sabotage.get(name, ""))
        path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
        return flower_environment(home) | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(home / "cache")}

    def start_server(self) -> None:
        server = {"HOST": "127.0.0.1", "PORT": self.port}
        self._start("superlink", "fedfmd-superlink.service", DATABASE=self.database, **server)
        self.wait_for(self.is_healthy)
        self._start("superexec", "fedfmd-superexec.service", **server)

    def is_healthy(self) -> bool:
        trust = ssl.create_default_context(cafile=self.certificates / "ca.crt")
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"https://{self.address}/health", timeout=5, context=trust).close()
            return True
        return False

    def register(self, box: str) -> None:
        key = self.certificates / "boxes" / f"{box}.pub"
        command = ["flwr", "supernode", "register", str(key), "boxes", "--name", box, "--format", "json"]
        assert flwr_json(command, self.environment("user"))["success"]

    def start_box(self, box: str) -> subprocess.Popen:
        client = BOXES.index(box) if box in BOXES else 0
        return self._start(
            box,
            "fedfmd-supernode@.service",
            SUPERLINK=self.address,
            PORT=free_port(),
            NODE_CONFIG=f'client={client} data="{self.folder / box}.npz" device="{DEVICES[client]}"',
        )

    def _start(self, name: str, unit: str, **variables: object) -> subprocess.Popen:
        """Start what a unit's ExecStart says, with these values of its variables."""
        text = (DEPLOY / unit).read_text().replace("\\\n", " ").replace("%i", name)
        program, *words = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])
        variables["CERTIFICATES"] = self.certificates
        arguments = [string.Template(word).substitute(variables) for word in words]
        self.commands[name] = [program, *arguments]
        self.processes[name] = self.launch(name, self.commands[name])
        return self.processes[name]

    def launch(self, name: str, command: list[str]) -> subprocess.Popen:
        """Start a program that lies beside this Python, on the machine `name`."""
        program, *arguments = command
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [Path(sys.executable).with_name(Path(program).name), *arguments],
                cwd=self.folder,
                env=self.environment(name),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def submit(self, name: str, **changes: object) -> str:
        """`flwr run` with the run folder `name`; the run's id."""
        settings = Settings.from_mapping(SETTINGS | changes | {"run-dir": str(self.folder / name)})
        file = self.folder / f"{name}.toml"
        file.write_text(tomli_w.dumps(settings.flat()))
        command = ["flwr", "run", str(REPOSITORY), "boxes", "-c", str(file), "--format", "json"]
        return str(flwr_json(command, self.environment("user"))["run-id"])

    def status(self, run: str) -> str:
        command = ["flwr", "ls", "boxes", "--run-id", run, "--format", "json"]
        return flwr_json(command, self.environment("user"))["runs"][0]["status"]

    def rounds(self, name: str) -> list:
        file = self.folder / name / "rounds.csv"
        return read_rounds(file) if file.exists() else []

    def clients(self, name: str) -> list:
        return read_clients(self.folder / name / "clients.csv")

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")

    def kill(self, name: str) -> None:
        """As a power cut: the process and all that it started, at once."""
        process = psutil.Process(self.processes.pop(name).pid)
        for victim in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        process.wait()

    def restart(self, *names: str) -> None:
        for name in names:
            self.processes[name] = self.launch(name, self.commands[name])

    def wait_for(self, what) -> None:
        """Wait until `what()` is true; as systemd does, start again what ends."""
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, f"waited in vain; see the logs in {self.folder}"
            time.sleep(RESTART_S)
            self.restart(*(name for name, process in self.processes.items() if process.poll() is not None))

    def wait_for_rounds(self, name: str, count: int) -> None:
        self.wait_for(lambda: len(self.rounds(name)) >= count)


@pytest.fixture
def deployment(tmp_path, request):
    """A server and its three boxes, registered and started; all is ended after the test.

    The SuperLink's state is in memory, or, with the parameter `on_disk`, in a file. `sabotage` has Python code
    that boxes of these names run before everything else.
    """
    before = descendants()
    deployment = Deployment(tmp_path, **getattr(request, "param", {}))
    try:
        deployment.start_server()
        for box in BOXES:
            deployment.register(box)
            deployment.start_box(box)
        yield deployment
    finally:
        end_processes(before)
    assert descendants() == before
