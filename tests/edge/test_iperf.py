import json

import pytest

from fedfmd.edge import link_mbps
from fedfmd.errors import RunError, SettingsError


@pytest.fixture
def iperf3(tmp_path, monkeypatch):
    """Puts a program `iperf3` on the path, alone, that prints this text and adds its arguments to a file."""

    def install(up, down):
        program = tmp_path / "iperf3"
        program.write_text(
            f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
case "$*" in *--reverse*) echo '{down}';; *) echo '{up}';; esac
"""
        )
        program.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path))
    return install


def result(bits_per_second):
    return json.dumps({"end": {"sum_received": {"bits_per_second": bits_per_second}}})


@pytest.mark.parametrize(("server", "port"), [("lab", ""), ("lab:5202", " --port 5202")])
def test_both_directions_are_measured_at_the_receiver(iperf3, tmp_path, server, port):
    iperf3(up=result(20e6), down=result(90.5e6))
    assert link_mbps(server) == (90.5, 20)
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"--client lab --json --time 5{direction}{port}" for direction in (" --reverse", "")
    ]


def test_a_server_that_does_not_answer_is_named(iperf3):
    iperf3(up="", down='{"error": "unable to connect"}')
    with pytest.raises(RunError, match="--server lab: unable to connect; run `iperf3 --server` there"):
        link_mbps("lab")


def test_a_result_that_is_none_is_an_error(iperf3):
    iperf3(up="", down="")
    with pytest.raises(RunError, match="--server lab: iperf3 gave no result: "):
        link_mbps("lab")


def test_without_iperf3_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"needs iperf3.*--down-mbps and --up-mbps"):
        link_mbps("lab")
