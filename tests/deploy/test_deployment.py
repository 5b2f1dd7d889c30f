"""Real boxes, as `experiments/deploy` sets them up: TLS, keys, images of their own, no ray."""

import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from fedfmd.engines.flower import free_port

pytestmark = pytest.mark.slow


def test_boxes_train_together_and_strangers_stay_out(deployment):
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
