import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "deploy" / "certificates.sh"

pytestmark = pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="needs openssl and ssh-keygen"
)


def certificates(*arguments):
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture
def made(tmp_path):
    """A folder with certificates for two addresses and one box."""
    folder = tmp_path / "certificates"
    assert certificates(folder, "10.0.0.5,fed.example.org", "box0").returncode == 0
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_server_is_vouched_for_under_all_its_names(made):
    def openssl(*arguments):
        return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout

    assert openssl("verify", "-CAfile", made / "ca.crt", made / "server.pem").endswith("OK\n")
    told = openssl("x509", "-in", made / "server.pem", "-noout", "-ext", "subjectAltName")
    names = "DNS:localhost, IP Address:127.0.0.1, IP Address:10.0.0.5, DNS:fed.example.org"
    assert told.splitlines()[1].strip() == names


def test_secrets_are_their_owners_alone(made):
    public = {made / "ca.crt", made / "server.pem"}
    for path in content(made).keys() - public:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert (made / "boxes" / "box0.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert len((made / "superexec.secret").read_bytes()) == 32


def test_boxes_can_be_added_and_nothing_else_changes(made):
    before = content(made)
    assert certificates(made, "10.0.0.5", "box1").returncode == 0
    after = content(made)
    assert after.keys() - before.keys() == {made / "boxes" / "box1", made / "boxes" / "box1.pub"}
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("10.0.0.5", "box1", "box0"), "boxes/box0 exists: nothing was changed"),
        (("10.0.0.6", "box1"), "server.pem is not for 10.0.0.6: nothing was changed"),
        (("10.0.0.5", "../box1"), "box name '../box1': use letters"),
    ],
)
def test_nothing_is_overwritten(made, arguments, message):
    before = content(made)
    done = certificates(made, *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert content(made) == before


def test_without_arguments_it_says_how_it_is_used():
    done = certificates()
    assert done.returncode == 2
    assert "certificates.sh FOLDER SERVER" in done.stderr
