"""A line to a server that stalls, breaks and becomes slow when told: toxiproxy where the lab has it, else our own."""

from __future__ import annotations

import http.client
import json
import pathlib
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from urllib.parse import urlsplit

from support.stores import Proxy, lab_assets

START_S = 10.0
NAME = "line"


class Line(Protocol):
    """One at a time of: ``stall`` (what is sent vanishes, nothing comes back), ``reset`` (each connection is reset),
    ``cut`` (each ends after so many bytes towards the server), ``slow`` (bytes a second towards it); ``clear``."""

    url: str

    def stall(self) -> None: ...

    def reset(self) -> None: ...

    def cut(self, after: int) -> None: ...

    def slow(self, rate: int) -> None: ...

    def clear(self) -> None: ...


@contextmanager
def line_to(endpoint: str, folder: pathlib.Path) -> Iterator[Line]:
    """A line to ``endpoint``; toxiproxy's log goes to ``folder``."""
    assets = lab_assets()
    server = assets / "toxiproxy-server" if assets is not None else None
    if server is None or not server.exists():
        proxy = Proxy(endpoint)
        try:
            yield ProxyLine(proxy)
        finally:
            proxy.close()
        return
    port = free_port()
    with (folder / "toxiproxy.log").open("w") as log:
        process = subprocess.Popen([server, "-host", "127.0.0.1", "-port", str(port)], stdout=log, stderr=log)
    try:
        yield ToxiproxyLine(port, endpoint)
    finally:
        process.terminate()
        process.wait(10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class ToxiproxyLine:
    """Toxics by toxiproxy's HTTP API (Shopify/toxiproxy, README "HTTP API")."""

    def __init__(self, port: int, endpoint: str) -> None:
        self._port = port
        parts = urlsplit(endpoint)
        own = free_port()
        self.url = f"http://127.0.0.1:{own}"
        self._wait()
        upstream = f"{parts.hostname}:{parts.port or 80}"
        self._ask("POST", "/proxies", {"name": NAME, "listen": f"127.0.0.1:{own}", "upstream": upstream})

    def stall(self) -> None:
        self._add("timeout", timeout=0)

    def reset(self) -> None:
        self._add("reset_peer", timeout=0)

    def cut(self, after: int) -> None:
        self._add("limit_data", bytes=after)

    def slow(self, rate: int) -> None:
        self._add("bandwidth", rate=max(1, rate // 1000))

    def clear(self) -> None:
        for toxic in self._ask("GET", f"/proxies/{NAME}/toxics"):
            self._ask("DELETE", f"/proxies/{NAME}/toxics/{toxic['name']}")

    def _add(self, kind: str, **attributes: int) -> None:
        toxic = {"name": kind, "type": kind, "stream": "upstream", "toxicity": 1.0, "attributes": attributes}
        self._ask("POST", f"/proxies/{NAME}/toxics", toxic)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                self._ask("GET", "/version")
                return
            except OSError:
                assert time.monotonic() < deadline, f"toxiproxy did not answer in {START_S:.0f} s"
                time.sleep(0.05)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
        try:
            connection.request(method, path, None if body is None else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read()
            assert answer.status < 300, f"toxiproxy: {method} {path}: {answer.status} {content!r}"
            return json.loads(content) if content.startswith((b"{", b"[")) else content.decode()
        finally:
            connection.close()


class ProxyLine:
    """The same by a `Proxy`."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self.url = proxy.url

    def stall(self) -> None:
        self._proxy.mode = "stall"

    def reset(self) -> None:
        self.cut(0)

    def cut(self, after: int) -> None:
        self._proxy.after = after
        self._proxy.mode = "cut"

    def slow(self, rate: int) -> None:
        self._proxy.rate = rate
        self._proxy.mode = "slow"

    def clear(self) -> None:
        self._proxy.mode = "pass"
