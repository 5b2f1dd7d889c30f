"""How fast an edge device's link to a server is, by iperf3 (https://software.es.net/iperf), which runs on both ends."""

from __future__ import annotations

import json
import subprocess

from fedfmd.errors import RunError, SettingsError

SECONDS = 5


def link_mbps(server: str) -> tuple[float, float]:
    """Measured rates from and to the server, `HOST` or `HOST:PORT`: (down, up) in 1e6 bit/s.

    Raises:
        SettingsError: iperf3 isn't installed here.
        RunError: the server doesn't answer; the text says how to start it.
    """
    return _rate(server, "--reverse"), _rate(server)


def _rate(server: str, *direction: str) -> float:
    host, _, port = server.partition(":")
    command = ["iperf3", "--client", host, "--json", "--time", str(SECONDS), *direction]
    try:
        done = subprocess.run(
            [*command, "--port", port] if port else command, capture_output=True, text=True, timeout=60
        )
        told = json.loads(done.stdout)
    except FileNotFoundError as error:
        raise SettingsError(
            "--server needs iperf3, which is not installed here: install it (apt install iperf3), "
            "or give the link's rates as --down-mbps and --up-mbps"
        ) from error
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        raise RunError(f"--server {server}: iperf3 gave no result: {error}") from error
    if "error" in told:
        raise RunError(f"--server {server}: {told['error']}; run `iperf3 --server` there")
    return float(told["end"]["sum_received"]["bits_per_second"]) / 1e6
