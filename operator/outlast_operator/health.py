"""The operator's HTTP for probes and Prometheus: plain servers, each on a thread of its own.

``/healthz`` fails, with the reasons, when a thread has ended or hangs: the kubelet then starts the container again.
``/readyz`` fails until all caches are filled. ``/metrics`` is on a port of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, start_http_server

Check = Callable[[], Sequence[str]]
"""What is wrong, in words; nothing: all is well."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int, checks: dict[str, Check]) -> None:
        super().__init__(("", port), _Handler)
        self.checks = checks


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10.0

    def do_GET(self) -> None:
        check = self.server.checks.get(self.path.partition("?")[0])
        if check is None:
            self._answer(404, "there is /healthz and /readyz\n")
            return
        wrong = check()
        self._answer(503 if wrong else 200, "".join(f"{line}\n" for line in wrong) or "ok\n")

    def log_message(self, format: str, *args: object) -> None:
        """Probes are not logged."""

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve_health(port: int, healthy: Check, ready: Check) -> int:
    """Serve both checks; the port (``port`` 0: one that is free). Raises OSError when it is taken."""
    server = _Server(port, {"/healthz": healthy, "/readyz": ready})
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    return int(server.server_address[1])


def serve_metrics(port: int, registry: CollectorRegistry) -> int:
    """Serve the registry; the port. Raises OSError when it is taken."""
    server, _ = start_http_server(port, registry=registry)
    return int(server.server_address[1])
