import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "deploy" / "certificates.sh"

pytestmark = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs openssl and ssh-keygen"
)


def certificates(*arguments, **variables):
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment)


def done(*arguments, **variables):
    """What it said; it must not have failed."""
    called = certificates(*arguments, **variables)
    assert called.returncode == 0, called.stderr
    return called.stdout


def openssl(*arguments):
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def machines(tmp_path):
    """The CA, a server and a device, whose folders have a space in their names."""
    ca, server, device = (tmp_path / f"etc {machine}" for machine in ("ca", "server", "device"))
    done("ca", ca)
    done("server", server)
    done("sign", ca, server / "server.csr", "10.0.0.5,fed.example.org")
    done("device", device, "box0")
    shutil.copy(ca / "ca.crt", server)
    return ca, server, device


@pytest.fixture
def fake_tools(tmp_path):
    """A function that puts shell scripts before the real tools; what it returns is the PATH with them."""

    def put(**scripts):
        folder = tmp_path / "fake tools"
        folder.mkdir()
        for name, lines in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{lines}\n")
            (folder / name).chmod(0o755)
        return f"{folder}{os.pathsep}{os.environ['PATH']}"

    return put


def test_each_private_key_is_where_it_is_used_and_nowhere_else(machines):
    ca, server, device = machines
    assert names(ca) == {"ca.key", "ca.crt"}
    assert names(server) == {"ca.crt", "server.key", "server.csr", "server.pem", "superexec.secret"}
    assert names(device) == {"box0", "box0.pub", "box0.secret"}


def test_the_server_is_vouched_for_under_all_its_names(machines):
    ca, server, _ = machines
    assert openssl("verify", "-x509_strict", "-CAfile", ca / "ca.crt", server / "server.pem").endswith("OK\n")
    told = openssl("x509", "-in", server / "server.pem", "-noout", "-ext", "subjectAltName")
    expected = "DNS:localhost, IP Address:127.0.0.1, IP Address:10.0.0.5, DNS:fed.example.org"
    assert told.splitlines()[1].strip() == expected


def test_secrets_are_their_owners_alone(machines):
    public = {"ca.crt", "server.pem", "server.csr", "box0.pub"}
    for folder in machines:
        for path in content(folder):
            mode = 0o644 if path.name in public else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == mode, path
    _, server, device = machines
    assert (device / "box0.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert len((server / "superexec.secret").read_bytes()) == 32


def test_root_owns_what_is_lent_to_services(tmp_path, fake_tools):
    log = tmp_path / "chown.log"
    path = fake_tools(id="echo 0", getent="exit 0", chown=f'echo "$@" >>"{log}"')
    done("server", tmp_path / "server", PATH=path)
    done("device", tmp_path / "device", "box0", PATH=path)
    lent = {
        tmp_path / "server" / "server.key": "root:fedfmd-link",
        tmp_path / "server" / "superexec.secret": "root:fedfmd",
        tmp_path / "device" / "box0": "root:fedfmd-link",
        tmp_path / "device" / "box0.secret": "root:fedfmd",
    }
    given = log.read_text().splitlines()
    for file, owner in lent.items():
        assert f"{owner} {file}" in given
        assert f"root:root {file.parent}" in given
        assert stat.S_IMODE(file.stat().st_mode) == 0o640
        assert stat.S_IMODE(file.parent.stat().st_mode) == 0o755


def test_a_missing_group_is_named_and_root_keeps_the_key(tmp_path, fake_tools):
    path = fake_tools(id="echo 0", getent="exit 2", chown="exit 0")
    called = certificates("server", tmp_path / "server", PATH=path)
    assert called.returncode == 0
    assert "there is no group fedfmd-link" in called.stderr
    assert stat.S_IMODE((tmp_path / "server" / "server.key").stat().st_mode) == 0o600


def test_called_again_it_changes_nothing(machines):
    before = [content(folder) for folder in machines]
    ca, server, device = machines
    assert "ca.crt: kept" in done("ca", ca)
    assert "server.key: kept" in done("server", server)
    assert "server.pem: kept" in done("sign", ca, server / "server.csr", "10.0.0.5")
    assert "box0: kept" in done("device", device, "box0")
    assert [content(folder) for folder in machines] == before


def test_certificates_are_renewed_for_the_same_keys(machines):
    ca, server, _ = machines
    before = content(server) | content(ca)
    soon = {"RENEW_DAYS": 800, "DAYS": 1000, "CA_DAYS": 5000}
    assert certificates("check", server, **soon).returncode == 0
    soon = {"RENEW_DAYS": 4000, "DAYS": 4500, "CA_DAYS": 5000}
    called = certificates("check", server, **soon)
    assert called.returncode == 1
    assert "server.pem ends on" in called.stderr

    done("ca", ca, **soon)
    done("sign", ca, server / "server.csr", "10.0.0.5", **soon)
    for path in (ca / "ca.crt", server / "server.pem"):
        assert path.with_name(f"{path.name}.old").read_bytes() == before[path] != path.read_bytes()
        assert openssl("x509", "-in", path, "-noout", "-pubkey") == openssl(
            "x509", "-in", f"{path}.old", "-noout", "-pubkey"
        )
    for path in (ca / "ca.key", server / "server.key", server / "superexec.secret"):
        assert path.read_bytes() == before[path]
    # Until each machine has the new certificates, the old ones go with them.
    openssl("verify", "-CAfile", ca / "ca.crt", server / "server.pem.old")
    openssl("verify", "-CAfile", ca / "ca.crt.old", server / "server.pem")


def test_check_looks_at_what_is_there(machines, tmp_path):
    ca, server, device = machines
    assert done("check", ca).startswith(f"{ca}/ca.crt: valid until")
    assert done("check", server).count("valid until") == 2
    called = certificates("check", device)
    assert called.returncode == 1
    assert "has neither ca.crt nor server.pem" in called.stderr

    done("ca", tmp_path / "another")
    shutil.copy(tmp_path / "another" / "ca.crt", server)
    called = certificates("check", server)
    assert called.returncode == 1
    assert "server.pem is from" in called.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("sign", "{ca}", "{server}/server.csr", "10.0.0.6"), "server.pem is not for 10.0.0.6: nothing was"),
        (("sign", "{server}", "{server}/server.csr", "10.0.0.5"), "ca.key is missing: sign where the CA is"),
        (("sign", "{ca}", "{server}/another.csr", "10.0.0.5"), "another.csr can't be read"),
        (("sign", "{ca}", "{server}/server.pem", "10.0.0.5"), "checking {server}/server.pem failed"),
        (("sign", "{ca}", "{server}/server.csr", "a=b"), "server 'a=b': give names or IP addresses"),
        (("ca", "{server}"), "has ca.crt but no ca.key: the CA is elsewhere"),
        (("device", "{device}", "../box1"), "device name '../box1': use letters"),
    ],
)
def test_nothing_is_overwritten(machines, arguments, message):
    folders = dict(zip(("ca", "server", "device"), machines, strict=True))
    before = [content(folder) for folder in machines]
    called = certificates(*(argument.format(**folders) for argument in arguments))
    assert called.returncode == 1
    assert message.format(**folders) in called.stderr
    assert [content(folder) for folder in machines] == before
    assert not list(machines[1].glob(".new*"))


def test_another_key_is_not_given_the_servers_certificate(machines):
    ca, server, _ = machines
    (server / "server.key").unlink()
    (server / "server.csr").unlink()
    done("server", server)
    called = certificates("sign", ca, server / "server.csr", "10.0.0.5")
    assert called.returncode == 1
    assert "server.pem is for another key" in called.stderr


def test_a_step_that_fails_is_named_with_its_reason_and_leaves_nothing(tmp_path, fake_tools):
    path = fake_tools(openssl="echo 'no random numbers left' >&2; exit 1")
    called = certificates("ca", tmp_path / "ca", PATH=path)
    assert called.returncode == 1
    assert called.stderr == "certificates.sh: making ca.key failed: no random numbers left\n"
    assert names(tmp_path / "ca") == set()


@pytest.mark.parametrize("days", ["soon", "0", "-1", "1.5"])
def test_days_are_a_number(tmp_path, days):
    called = certificates("ca", tmp_path / "ca", CA_DAYS=days)
    assert called.returncode == 1
    assert f"CA_DAYS={days}: give a number of days" in called.stderr


def test_for_a_trial_all_of_it_is_made_at_once_and_devices_are_added(tmp_path):
    folder = tmp_path / "trial"
    done(folder, "10.0.0.5,fed.example.org", "box0")
    before = content(folder)
    assert {path.name for path in before} == {
        *("ca.key", "ca.crt", "server.key", "server.csr", "server.pem", "superexec.secret"),
        *("box0", "box0.pub", "box0.secret"),
    }
    done(folder, "10.0.0.5", "box1", "box0")
    after = content(folder)
    added = {folder / "boxes" / name for name in ("box1", "box1.pub", "box1.secret")}
    assert after.keys() - before.keys() == added
    assert before.items() <= after.items()


@pytest.mark.parametrize("arguments", [(), ("ca",), ("sign", "a", "b"), ("device", "a"), ("check", "a", "b")])
def test_without_its_arguments_it_says_how_it_is_used(arguments):
    called = certificates(*arguments)
    assert called.returncode == 2
    assert "certificates.sh sign FOLDER REQUEST SERVER" in called.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SCRIPT], check=True)
