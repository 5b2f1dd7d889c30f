"""The units: which user each service has, and how much it may do, as systemd judges it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "experiments" / "deploy"
SERVICES = sorted(DEPLOY.glob("*.service"))
SUBMITTED_CODE = {"fedfmd-superexec.service", "fedfmd-clientapp@.service"}


def value(unit, key):
    text = unit.read_text().replace("\\\n", " ")
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_systemd_finds_little_exposure(unit):
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", unit]
    judged = subprocess.run(command, capture_output=True, text=True, check=False)
    if "unrecognized option" in judged.stderr:
        pytest.skip("needs systemd 250")
    assert judged.returncode == 0, judged.stdout.splitlines()[-1:] or judged.stderr


def test_submitted_code_runs_as_a_user_that_no_key_is_lent_to():
    assert {unit.name for unit in SERVICES if value(unit, "User") == ["fedfmd"]} == SUBMITTED_CODE
    for unit in SERVICES:
        if unit.name in SUBMITTED_CODE:
            assert value(unit, "SupplementaryGroups") == []
            assert not re.search(r"server\.key|/%i(\s|$)", "".join(value(unit, "ExecStart")))


def test_only_the_gate_listens_where_others_reach_it():
    listening = {unit.name for unit in SERVICES if "--host ${HOST}" in unit.read_text()}
    assert listening == {"fedfmd-gate.service"}
    for name in ("fedfmd-superlink.service", "fedfmd-supernode@.service"):
        assert "--host 127.0.0.1 " in (DEPLOY / name).read_text()
