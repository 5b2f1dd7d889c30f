"""Sign apps, so that devices run no other code, and hand signed apps to a SuperLink.

A SuperNode with ``--trusted-entities`` runs an app only if one of the keys named there has signed it. A SuperLink asks
Flower Hub for signatures, at the address FLWR_SUPERGRID_API_URL; `serve` answers in its place, on the loopback::

    flwr build --app /opt/fedfmd/src
    python signed_apps.py sign ~/.ssh/fedfmd owner fedfmd.fedfmd.0-1-0.1234abcd.fab
    python signed_apps.py serve /srv/fedfmd-apps --port 8002
    flwr run @fedfmd/fedfmd==0.1.0 boxes

Who serves an app needn't be trusted: devices check the signature themselves.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
import tomllib
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedfmd.flower_compat import HUB_CALL, message_to_sign

SIGNATURE = ".json"
"""What a signature's file has after the name of its app."""


def sign(key: Path, name: str, app: Path) -> Path:
    """Write the signature of an app, a .fab file, beside it; `name` is what devices call the key.

    Raises:
        SystemExit: the key is no Ed25519 key without a password, or the app no .fab file.
    """
    try:
        private = load_ssh_private_key(key.read_bytes(), None)
    except (OSError, TypeError, ValueError) as error:
        raise SystemExit(f"{key}: {error}") from None
    if not isinstance(private, Ed25519PrivateKey):
        raise SystemExit(f"{key} is no Ed25519 key: make one by ssh-keygen -t ed25519")
    identity(app)
    signed_at = int(time.time())
    signature = private.sign(message_to_sign(app.read_bytes(), signed_at))
    text = base64.urlsafe_b64encode(signature).decode()
    file = app.with_name(app.name + SIGNATURE)
    file.write_text(json.dumps({"public_key_id": name, "signed_at": signed_at, "signature": text}))
    return file


def identity(app: Path) -> tuple[str, str]:
    """Return an app's id and version, as its manifest tells.

    Raises:
        SystemExit: it is no .fab file.
    """
    try:
        with zipfile.ZipFile(app) as bundle:
            manifest = tomllib.loads(bundle.read("pyproject.toml").decode())
        project = manifest["project"]
        return f"@{manifest['tool']['flwr']['app']['publisher']}/{project['name']}", project["version"]
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{app} is no app that flwr build has made: {error}") from None


def newest(folder: Path, app_id: str, version: str | None) -> tuple[Path, dict[str, Any]] | None:
    """Return the app of this id and version that was signed last, and its signature; None: there is none."""
    found = []
    for file in folder.glob(f"*.fab{SIGNATURE}"):
        app = file.with_name(file.name.removesuffix(SIGNATURE))
        its_id, its_version = identity(app)
        if its_id == app_id and version in (None, its_version):
            found.append((app, json.loads(file.read_text())))
    return max(found, key=lambda each: each[1]["signed_at"], default=None)


class Apps(BaseHTTPRequestHandler):
    """Answers a SuperLink that asks for an app, and then for its bytes."""

    def __init__(self, folder: Path, *arguments: Any) -> None:
        self.folder = folder
        super().__init__(*arguments)

    def do_POST(self) -> None:
        """Tell where an app is, and who has signed it."""
        found = None
        if self.path == HUB_CALL:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = newest(self.folder, asked["app_id"], asked["app_version"])
        if found is None:
            self.reply(404, json.dumps({"detail": {"available_app_versions": []}}).encode())
            return
        app, signature = found
        host, port = self.server.server_address[:2]
        told = {"fab_url": f"http://{host}:{port}/{app.name}", "verifications": [signature]}
        self.reply(200, json.dumps(told).encode())

    def do_GET(self) -> None:
        """Send the app of that name."""
        for app in self.folder.glob("*.fab"):
            if self.path == f"/{app.name}":
                self.reply(200, app.read_bytes())
                return
        self.reply(404, b"")

    def reply(self, status: int, content: bytes) -> None:
        """Send one answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def parse_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    signing = commands.add_parser("sign", help="write FAB.json, the app's signature")
    signing.add_argument("key", type=Path, help="private key, by ssh-keygen -t ed25519, without a password")
    signing.add_argument("name", help="what devices call the key in their trusted.yaml")
    signing.add_argument("fab", type=Path, help="the app, made by flwr build")
    serving = commands.add_parser("serve", help="hand signed apps to a SuperLink of this machine")
    serving.add_argument("folder", type=Path)
    serving.add_argument("--port", type=int, required=True)
    return parser.parse_args()


def main() -> None:
    """Sign one app, or serve a folder of signed ones until a signal ends it."""
    options = parse_options()
    if options.command == "sign":
        print(sign(options.key, options.name, options.fab))
    else:
        ThreadingHTTPServer(("127.0.0.1", options.port), partial(Apps, options.folder)).serve_forever()


if __name__ == "__main__":
    main()
