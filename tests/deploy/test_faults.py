"""Faults of a deployment, tried with processes that are killed; no finished round may be lost."""

import os
import shutil
import signal
import subprocess

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults]

DIVERGES = """
import torch

step = torch.optim.SGD.step

def diverge(self, closure=None):
    step(self, closure)
    for group in self.param_groups:
        for parameter in group["params"]:
            parameter.data.fill_(float("nan"))

torch.optim.SGD.step = diverge
"""
FLATTENS = """
import torch

numpy = torch.Tensor.numpy
torch.Tensor.numpy = lambda self, **options: numpy(self, **options).reshape(-1)
"""


def status_of(deployment, client):
    return [row.status for row in deployment.clients("run") if row.client == client]


def test_an_edge_device_that_dies_costs_its_update_and_may_come_back(deployment):
    deployment.submit("run", **{"server.rounds": 60})
    deployment.wait_for_rounds("run", 1)

    deployment.kill("box2")
    deployment.wait_for(lambda: "the edge device of client 2 is gone" in deployment.log("run/log.txt"))
    assert "failed" in status_of(deployment, 2)
    reasons = {row.reason for row in deployment.clients("run") if row.status == "failed"}
    assert any("heartbeat" in reason for reason in reasons)

    deployment.restart("box2")
    deployment.wait_for(lambda: "the edge device of client 2 is there again" in deployment.log("run/log.txt"))
    before = len(status_of(deployment, 2))
    deployment.wait_for(lambda: "ok" in status_of(deployment, 2)[before:])
    assert [row.round for row in deployment.rounds("run")] == list(
        range(1, len(deployment.rounds("run")) + 1)
    )


def test_a_run_ends_when_too_few_edge_devices_are_left_and_is_resumed(deployment):
    settings = {"server.rounds": 60, "server.checkpoint-every": 1, "server.node-timeout-s": 60}
    run = deployment.submit("run", **settings)
    deployment.wait_for_rounds("run", 2)
    for box in ("box1", "box2"):
        deployment.kill(box)
    deployment.wait_for(lambda: deployment.status(run) == "finished:failed")
    assert "server.max-failed-share" in deployment.log("run/log.txt")
    finished = [row for row in deployment.rounds("run") if row.clients_ok == 3]

    deployment.restart("box1", "box2")
    deployment.submit("run", **settings, resume=True)
    deployment.wait_for_rounds("run", len(finished) + 3)
    assert deployment.rounds("run")[: len(finished)] == finished
    assert deployment.rounds("run")[-1].clients_ok == 3


@pytest.mark.parametrize("deployment", [{"on_disk": True}], indirect=True)
def test_a_run_goes_on_when_its_superlink_and_gate_are_killed(deployment):
    run = deployment.submit("run", **{"server.rounds": 4})
    deployment.wait_for_rounds("run", 1)
    for service in ("superlink", "gate"):
        deployment.kill(service)
    deployment.restart("superlink", "gate")
    deployment.wait_for_rounds("run", 4)
    assert [row.round for row in deployment.rounds("run")] == [1, 2, 3, 4]
    deployment.wait_for(lambda: deployment.status(run) == "finished:completed")


def test_a_run_is_resumed_after_everything_was_killed(deployment):
    deployment.submit("run", **{"server.rounds": 4, "server.checkpoint-every": 1})
    deployment.wait_for_rounds("run", 2)
    finished = deployment.rounds("run")[:2]
    for machine in ("superlink", "gate", "superexec", *deployment.boxes):
        deployment.kill(machine)

    deployment.restart("superlink")
    deployment.wait_for(deployment.is_healthy)
    deployment.restart("gate", "superexec", *deployment.boxes)
    for box in deployment.boxes:
        deployment.register(box)
    deployment.submit("run", **{"server.rounds": 4, "server.checkpoint-every": 1, "resume": True})
    deployment.wait_for_rounds("run", 4)
    assert deployment.rounds("run")[:2] == finished
    assert "going on after round" in deployment.log("run/log.txt")


def test_an_edge_device_that_is_too_slow_for_a_round_is_left_behind(deployment):
    deployment.submit("run", **{"server.rounds": 60, "server.round-timeout-s": 45})
    deployment.wait_for_rounds("run", 1)
    stopped = deployment.running("box1")
    for process in stopped:
        os.kill(process.pid, signal.SIGSTOP)
    slow = "no reply within server.round-timeout-s"
    deployment.wait_for(lambda: slow in {row.reason for row in deployment.clients("run") if row.client == 1})
    for process in stopped:
        os.kill(process.pid, signal.SIGCONT)
    before = len(status_of(deployment, 1))
    deployment.wait_for(lambda: "ok" in status_of(deployment, 1)[before:])


@pytest.mark.parametrize(
    ("deployment", "reason"),
    [({"sabotage": {"box2": DIVERGES}}, "NaN or infinite"), ({"sabotage": {"box2": FLATTENS}}, "shape")],
    indirect=["deployment"],
    ids=["NaN", "wrong shapes"],
)
def test_an_edge_device_whose_updates_are_useless_fails_alone(deployment, reason):
    deployment.submit("run")
    deployment.wait_for_rounds("run", 3)
    assert status_of(deployment, 0) == status_of(deployment, 1) == ["ok"] * 3
    assert status_of(deployment, 2) == ["failed"] * 3
    assert all(reason in row.reason for row in deployment.clients("run") if row.client == 2)
    assert deployment.rounds("run")[-1].accuracy > 0.5


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB under the run folder."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_is_resumed_after_the_disk_was_full(small_disk, deployment):
    settings = {"server.rounds": 4, "server.checkpoint-every": 1}
    run = deployment.submit("run", **settings)
    deployment.wait_for_rounds("run", 1)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    deployment.wait_for(lambda: deployment.status(run) == "finished:failed")
    first, *others = deployment.rounds("run")
    assert len(others) < 3

    filler.unlink()
    deployment.submit("run", **settings, resume=True)
    deployment.wait_for_rounds("run", 4)
    assert deployment.rounds("run")[0] == first
    assert [row.round for row in deployment.rounds("run")] == [1, 2, 3, 4]
