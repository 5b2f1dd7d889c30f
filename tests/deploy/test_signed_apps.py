"""Apps that are signed, and handed to the SuperLink in Flower Hub's place."""

import json
import subprocess
import threading
import zipfile
from functools import partial
from http.server import ThreadingHTTPServer

import pytest
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.superlink.servicer.control import control_handlers
from flwr.supernode.start_client_internal import _verify_fab

MANIFEST = """
[project]
name = "digits"
version = "{version}"

[tool.flwr.app]
publisher = "lab"
"""


@pytest.fixture
def apps(script):
    return script("signed_apps")


@pytest.fixture
def key(tmp_path):
    """The private key of whoever vouches for apps; its public one lies beside it."""
    path = tmp_path / "owner key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


def public(key):
    return key.with_name(f"{key.name}.pub").read_text()


@pytest.fixture
def make_app(tmp_path):
    folder = tmp_path / "apps"
    folder.mkdir()

    def make(version="0.1.0", code="print()"):
        path = folder / f"lab.digits.{version}.{len(list(folder.iterdir()))}.fab"
        with zipfile.ZipFile(path, "w") as bundle:
            bundle.writestr("pyproject.toml", MANIFEST.format(version=version))
            bundle.writestr("code.py", code)
        return path

    return make


@pytest.fixture
def fetch(apps, tmp_path, monkeypatch):
    """What a SuperLink gets for an app's id: its bytes, and who signed them."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(apps.Apps, tmp_path / "apps"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}/v1"
    monkeypatch.setattr(control_handlers, "FLWR_SUPERGRID_API_URL", hub)
    yield lambda app: Fab("", *control_handlers._get_remote_fab(None, app)[:2])
    server.shutdown()
    server.server_close()


def test_devices_run_what_a_key_that_they_trust_has_signed(apps, key, make_app, fetch):
    app = make_app()
    apps.sign(key, "owner", app)
    fab = fetch("@lab/digits")
    assert fab.content == app.read_bytes()
    assert fab.verifications["valid_license"]
    assert _verify_fab(fab, {"owner": public(key)})
    assert not _verify_fab(fab, {"somebody else": public(key)})


def test_a_changed_app_has_no_signature(apps, key, make_app, fetch):
    app = make_app()
    apps.sign(key, "owner", app)
    with zipfile.ZipFile(app, "a") as bundle:
        bundle.writestr("more.py", "print()")
    assert not _verify_fab(fetch("@lab/digits"), {"owner": public(key)})


def test_the_app_that_was_signed_last_is_served_and_each_version(apps, key, make_app, fetch, monkeypatch):
    old, new, later = make_app(), make_app("0.2.0"), make_app("0.2.0", "print(1)")
    for second, app in enumerate((old, new, later)):
        monkeypatch.setattr(apps.time, "time", lambda second=second: 1_700_000_000 + second)
        apps.sign(key, "owner", app)
    assert fetch("@lab/digits").content == later.read_bytes()
    assert fetch("@lab/digits==0.1.0").content == old.read_bytes()


@pytest.mark.parametrize("wanted", ["@lab/digits==0.9.0", "@lab/letters"])
def test_what_nobody_signed_is_not_served(apps, key, make_app, fetch, wanted):
    apps.sign(key, "owner", make_app())
    make_app("0.9.0")
    with pytest.raises(FlowerError):
        fetch(wanted)


def test_a_signature_lies_beside_its_app(apps, key, make_app):
    app = make_app()
    file = apps.sign(key, "owner", app)
    assert file == app.with_name(f"{app.name}.json")
    assert json.loads(file.read_text()).keys() == {"public_key_id", "signed_at", "signature"}


def test_what_cannot_be_signed_is_named(apps, key, make_app, tmp_path):
    ecdsa = tmp_path / "ecdsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-N", "", "-f", ecdsa], check=True)
    with pytest.raises(SystemExit, match="is no Ed25519 key: make one by ssh-keygen -t ed25519"):
        apps.sign(ecdsa, "owner", make_app())
    with pytest.raises(SystemExit, match="missing"):
        apps.sign(tmp_path / "missing", "owner", make_app())
    with pytest.raises(SystemExit, match="is no app that flwr build has made"):
        apps.sign(key, "owner", ecdsa)
