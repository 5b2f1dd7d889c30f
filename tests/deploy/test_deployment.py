"""Real edge devices, as `experiments/deploy` sets them up: TLS, keys, images of their own, no ray."""

import subprocess
import sys
import urllib.error
import urllib.request

import pytest
from flwr.cli.build import build_fab_from_disk

from fedfmd.engines.flower import descendants, end_processes, free_port
from fedfmd.version import __version__

pytestmark = pytest.mark.slow


def test_devices_train_together_and_strangers_stay_out(deployment):
    without_ray = subprocess.run(
        [sys.executable, "-c", "import ray"],
        env=deployment.environment("box0"),
        check=False,
        capture_output=True,
    )
    assert b"No module named 'ray'" in without_ray.stderr
    stranger = deployment.start_box("stranger")
    del deployment.processes["stranger"]
    plain = ["flower-supernode", "--insecure", "--superlink", deployment.address, "--max-retries", "1"]
    plain = deployment.launch("plain", [*plain, "--port", str(free_port())])

    run = deployment.submit("run")
    deployment.wait_for_rounds("run", 3)

    assert stranger.wait(60) != 0
    assert "[code: 2004] Failed to activate SuperNode" in deployment.log("stranger.log")
    assert plain.wait(60) != 0
    with pytest.raises((urllib.error.URLError, ConnectionError)):
        urllib.request.urlopen(f"http://{deployment.address}/health", timeout=10)

    rounds = deployment.rounds("run")
    assert [row.clients_ok for row in rounds] == [3, 3, 3]
    assert rounds[-1].accuracy > 0.5
    assert [(row.client, row.device, row.status) for row in deployment.clients("run")] == [
        (0, "pi-4", "ok"),
        (1, "pi-5", "ok"),
        (2, "jetson-nano", "ok"),
    ] * 3
    deployment.wait_for(lambda: deployment.status(run).startswith("finished"))
    assert deployment.status(run) == "finished:completed"


@pytest.fixture
def choosy(make_deployment, script, tmp_path):
    """A server, and box0, which runs only what `owner` has signed: fedfmd as it is here."""
    before = descendants()
    deployment = make_deployment(tmp_path)
    key, apps = tmp_path / "owner", tmp_path / "apps"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    apps.mkdir()
    (apps / "fedfmd.fab").write_bytes(build_fab_from_disk(deployment.repository))
    script("signed_apps").sign(key, "owner", apps / "fedfmd.fab")
    trusted = deployment.etc("box0") / "trusted.yaml"
    trusted.write_text(f"owner: {key.with_name('owner.pub').read_text()}")
    try:
        deployment.start_server()
        deployment.start_apps(apps)
        deployment.register("box0")
        deployment.start_box("box0", f"--trusted-entities '{trusted}'")
        yield deployment
    finally:
        end_processes(before)


def test_a_device_may_choose_to_run_signed_apps_only(choosy):
    alone = {"partition.clients": 1, "server.rounds": 1}
    unsigned = choosy.submit("unsigned", **alone, **{"server.node-timeout-s": 10})
    choosy.wait_for(lambda: "could not be verified" in choosy.log("box0.log"))
    assert "Start `flwr-clientapp` process" not in choosy.log("box0.app.log")
    choosy.wait_for(lambda: choosy.status(unsigned) == "finished:failed")

    signed = choosy.submit("signed", f"@fedfmd/fedfmd=={__version__}", **alone)
    choosy.wait_for(lambda: choosy.status(signed).startswith("finished"))
    assert choosy.status(signed) == "finished:completed"
    assert [row.clients_ok for row in choosy.rounds("signed")] == [1]
