"""How it is found out that a controller answers."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from outlast.config import ControllerConfig

ASK = """
import sys
from outlast.config import ControllerConfig
from outlast.controller.launch import _ask
config = ControllerConfig.model_validate_json(sys.argv[1])
print(_ask(config))
"""


class Answering(BaseHTTPRequestHandler):
    """A controller, or a proxy that refuses: ``asked`` has what it was asked, and with which token."""

    status = 200
    asked: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        type(self).asked.append((self.path, self.headers["Authorization"]))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps({"controller": "c1"}).encode())

    def log_message(self, *_: object) -> None:
        """In silence."""


@pytest.fixture
def servers() -> Iterator[list[HTTPServer]]:
    """A controller and a proxy."""
    kinds = [type("It", (Answering,), {"status": status, "asked": []}) for status in (200, 403)]
    made = [HTTPServer(("127.0.0.1", 0), kind) for kind in kinds]
    for one in made:
        threading.Thread(target=one.serve_forever, daemon=True).start()
    yield made
    for one in made:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy"])
def test_a_controller_is_asked_whatever_proxies_there_are(
    tmp_path: pathlib.Path, servers: list[HTTPServer], name: str
) -> None:
    """Its job's token goes to nobody else. In a process of its own, since the environment is read once."""
    controller, proxy = servers
    (tmp_path / "token").write_text("secret")
    config = {"job": {}, "name": "j", "dir": str(tmp_path), "namespace": "n", "token_file": str(tmp_path / "token")}
    where = {"host": "127.0.0.1", "port": controller.server_port, "controller": "c1"}
    known = ControllerConfig.model_validate(config)
    known.http_file.parent.mkdir(parents=True, exist_ok=True)
    known.http_file.write_text(json.dumps(where))
    done = subprocess.run(
        [sys.executable, "-c", ASK, known.model_dump_json()],
        env={name: f"http://127.0.0.1:{proxy.server_port}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout == "True\n", done.stderr
    assert proxy.RequestHandlerClass.asked == []  # type: ignore[attr-defined]
    assert controller.RequestHandlerClass.asked == [("/status", "Bearer secret")]  # type: ignore[attr-defined]
