"""A SuperLink and edge devices as `experiments/deploy` sets them up: its units' commands, on loopback, without ray."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import ssl
import string
import subprocess
import sys
import time
import tomllib
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
    """The processes of a server and of edge devices with digits of their own; each writes a log into `folder`.

    What a machine has in /etc/fedfmd, here it has in a folder "etc …", whose name has a space. A process is called
    as its service on the server, as its device, or, for what runs submitted code there, "box0.app".
    """

    boxes, repository = BOXES, REPOSITORY

    def __init__(
        self, folder: Path, on_disk: bool = False, sabotage: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.database = folder / "superlink.db" if on_disk else ":flwr-in-memory:"
        self.port, self.control_port, self.apps_port = free_port(), free_port(), free_port()
        self.processes: dict[str, subprocess.Popen] = {}
        self.commands: dict[str, list[str]] = {}
        self.sabotage = sabotage or {}
        self._make_certificates()
        self.environment("user")
        self.connect("boxes", self.control_port)
        train = load_dataset("digits", image_size=8).train
        for place, box in enumerate((*BOXES, "stranger")):
            own = train.subset(torch.arange(place * IMAGES_PER_BOX, (place + 1) * IMAGES_PER_BOX))
            pixels = own.images.permute(0, 2, 3, 1).numpy()
            np.savez(folder / f"{box}.npz", images=pixels, labels=own.labels.numpy())

    def _make_certificates(self) -> None:
        """As the README tells: each machine makes its keys, and only public things travel."""
        ca, server = self.etc("ca"), self.etc("server")
        self.certificates("ca", ca)
        self.certificates("server", server)
        self.certificates("sign", ca, server / "server.csr", "127.0.0.1")
        for box in (*BOXES, "stranger"):
            self.certificates("device", self.etc(box), box)
        for machine in ("server", *BOXES, "stranger"):
            shutil.copy(ca / "ca.crt", self.etc(machine))

    def certificates(self, *arguments: object) -> None:
        subprocess.run([DEPLOY / "certificates.sh", *arguments], check=True, capture_output=True)

    def etc(self, machine: str) -> Path:
        return self.folder / f"etc {machine}"

    def connect(self, name: str, port: int) -> None:
        """Let the user's `flwr` reach a port of the server by this name."""
        file = self.folder / "user" / "config.toml"
        config = tomllib.loads(file.read_text()) if file.exists() else {"superlink": {"default": name}}
        trust = str(self.etc("server") / "ca.crt")
        config["superlink"][name] = {"address": f"127.0.0.1:{port}", "root-certificates": trust}
        file.write_text(tomli_w.dumps(config))

    @property
    def address(self) -> str:
        """The devices' port."""
        return f"127.0.0.1:{self.port}"

    def environment(self, machine: str) -> dict[str, str]:
        """The environment of a machine of its own, with its own home, without ray, and with its sabotage."""
        home = self.folder / machine
        home.mkdir(exist_ok=True)
        (home / "sitecustomize.py").write_text(NO_RAY + self.sabotage.get(machine, ""))
        path = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH")])])
        return flower_environment(home) | {
            "PYTHONPATH": path,
            "XDG_CACHE_HOME": str(home / "cache"),
            "FLWR_SUPERGRID_API_URL": f"http://127.0.0.1:{self.apps_port}/v1",
        }

    def start_server(self, superexec: bool = True) -> None:
        server = {"HOST": "127.0.0.1", "PORT": self.port, "CONTROL_PORT": self.control_port}
        server |= {"CERTIFICATES": self.etc("server"), "DATABASE": self.database}
        self._start("superlink", "fedfmd-superlink.service", **server)
        self.wait_for(self.is_healthy)
        self._start("gate", "fedfmd-gate.service", **server)
        if superexec:
            self._start("superexec", "fedfmd-superexec.service", **server)

    def start_apps(self, folder: Path) -> None:
        """Serve the signed apps of a folder."""
        self._start("apps", "fedfmd-apps.service", APPS=folder, APPS_PORT=self.apps_port)

    def is_healthy(self) -> bool:
        trust = ssl.create_default_context(cafile=self.etc("server") / "ca.crt")
        with contextlib.suppress(urllib.error.URLError, OSError):
            url = f"https://127.0.0.1:{self.control_port}/health"
            urllib.request.urlopen(url, timeout=5, context=trust).close()
            return True
        return False

    def flwr(self, *words: object) -> dict:
        """What a user's `flwr` command answers."""
        command = ["flwr", *map(str, words), "--format", "json"]
        return flwr_json(command, self.environment("user"))

    def register(self, box: str) -> None:
        key = self.etc(box) / f"{box}.pub"
        assert self.flwr("supernode", "register", key, "boxes", "--name", box)["success"]

    def start_box(self, box: str, options: str = "") -> subprocess.Popen:
        client = BOXES.index(box) if box in BOXES else 0
        settings = {
            "SUPERLINK": self.address,
            "PORT": free_port(),
            "CERTIFICATES": self.etc(box),
            "NODE_CONFIG": f'client={client} data="{self.folder / box}.npz" device="{DEVICES[client]}"',
            "OPTIONS": options,
        }
        process = self._start(box, "fedfmd-supernode@.service", **settings)
        if box in BOXES:
            self._start(f"{box}.app", "fedfmd-clientapp@.service", **settings)
        return process

    def _start(self, name: str, unit: str, **variables: object) -> subprocess.Popen:
        """Start what a unit's ExecStart says, with these values of its variables."""
        text = (DEPLOY / unit).read_text().replace("\\\n", " ").replace("%i", name.partition(".")[0])
        text = text.replace("/opt/fedfmd/src", shlex.quote(str(REPOSITORY)))
        program, *words = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)[1])
        arguments = []
        for word in words:
            value = string.Template(word).substitute(variables)
            # As systemd: $NAME alone is any number of words, ${NAME} is one.
            arguments += shlex.split(value) if re.fullmatch(r"\$\w+", word) else [value]
        self.commands[name] = [program, *arguments]
        self._launch_again(name)
        return self.processes[name]

    def _launch_again(self, name: str) -> None:
        self.processes[name] = self.launch(name, self.commands[name])

    def launch(self, name: str, command: list[str]) -> subprocess.Popen:
        """Start a program that lies beside this Python, on the machine of that name."""
        program, *arguments = command
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [Path(sys.executable).with_name(Path(program).name), *arguments],
                cwd=self.folder,
                env=self.environment(name.partition(".")[0]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def submit(self, name: str, app: object = REPOSITORY, **changes: object) -> str:
        """`flwr run` with the run folder `name`; the run's id."""
        settings = Settings.from_mapping(SETTINGS | changes | {"run-dir": str(self.folder / name)})
        file = self.folder / f"{name}.toml"
        file.write_text(tomli_w.dumps(settings.flat()))
        return str(self.flwr("run", app, "boxes", "-c", file)["run-id"])

    def status(self, run: str) -> str:
        return self.flwr("ls", "boxes", "--run-id", run)["runs"][0]["status"]

    def rounds(self, name: str) -> list:
        file = self.folder / name / "rounds.csv"
        return read_rounds(file) if file.exists() else []

    def clients(self, name: str) -> list:
        return read_clients(self.folder / name / "clients.csv")

    def log(self, name: str) -> str:
        return (self.folder / name).read_text(errors="replace")

    def services(self, machine: str) -> list[str]:
        return [name for name in self.commands if name.partition(".")[0] == machine]

    def running(self, machine: str) -> list[psutil.Process]:
        """The processes of a machine's services, and all that they started."""
        found = []
        for name in self.services(machine):
            with contextlib.suppress(KeyError, psutil.NoSuchProcess):
                process = psutil.Process(self.processes[name].pid)
                found += [process, *process.children(recursive=True)]
        return found

    def kill(self, machine: str) -> None:
        """As a power cut: all that runs there, at once."""
        victims = self.running(machine)
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(victims)
        for name in self.services(machine):
            self.processes.pop(name, None)

    def restart(self, *machines: str) -> None:
        for machine in machines:
            for name in self.services(machine):
                self._launch_again(name)

    def wait_for(self, what) -> None:
        """Wait until `what()` is true; as systemd does, start again what ends."""
        deadline = time.monotonic() + PATIENCE_S
        while not what():
            assert time.monotonic() < deadline, f"waited in vain; see the logs in {self.folder}"
            time.sleep(RESTART_S)
            for name in [name for name, process in self.processes.items() if process.poll() is not None]:
                self._launch_again(name)

    def wait_for_rounds(self, name: str, count: int) -> None:
        self.wait_for(lambda: len(self.rounds(name)) >= count)


@pytest.fixture(scope="session")
def make_deployment():
    return Deployment


@pytest.fixture
def script():
    """A function that imports one of the scripts of `experiments/deploy`."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, DEPLOY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def deployment(tmp_path, request):
    """A server and its three edge devices, registered and started; all is ended after the test.

    The SuperLink's state is in memory, or, with the parameter `on_disk`, in a file. `sabotage` has Python code
    that devices of these names run before everything else.
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
