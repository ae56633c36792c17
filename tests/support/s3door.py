"""A door in front of an S3 server: an HTTP proxy that knows what each request is for, and refuses, holds or damages.

What passes is passed on as it came, Host and signature included. Requests are told apart by what they are to a job::

    "part" "complete" "begin"     of an upload in parts
    "image"                       an image that goes in one request
    "manifest" "head"             the two that make a checkpoint of images
    "read"                        bytes of an image
    "other"                       the rest: listings, heads and manifests that are read, removals

Faults are set by coordinate: the n-th request of a kind from now on, or all of them from now on.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

WAIT = 120.0
"""Seconds for which a held request is waited for, and waits itself."""
_OWN = {"connection", "keep-alive", "expect", "transfer-encoding"}
_IMAGE = re.compile(r"/rank-\d+\.safetensors$")
_REFUSAL = b"<Error><Code>SlowDown</Code><Message>the door is shut</Message></Error>"


@dataclass(frozen=True)
class Asked:
    """One request. ``key`` with its bucket, as in the path."""

    method: str
    key: str
    query: Mapping[str, list[str]]

    @property
    def what(self) -> str:
        """What it is to a job; see the module's text."""
        image = _IMAGE.search(self.key) is not None
        match self.method, image:
            case "PUT", True:
                return "part" if "partNumber" in self.query else "image"
            case "POST", True:
                return "begin" if "uploads" in self.query else "complete"
            case "GET", True:
                return "read"
            case "PUT", False if "/manifests/" in self.key:
                return "manifest"
            case "PUT", False if self.key.endswith("/head.json"):
                return "head"
        return "other"


@dataclass
class Hold:
    """A request that stays where it is; ``deliver``: it is passed on even if its client is gone by then."""

    what: str
    number: int
    answered: bool
    where: Callable[[Asked], bool]
    deliver: bool
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    asked: Asked | None = None
    seen: int = 0

    def wait(self) -> Asked:
        """Until the request is held, and what it is."""
        assert self.reached.wait(WAIT), f"no {self.what} request number {self.number} came in {WAIT:.0f} s"
        assert self.asked is not None
        return self.asked


class Door:
    """``refusing``: kinds that are answered 503 ("all": every kind); ``flips``: requests in whose answers a byte is
    changed; ``seen``: how many of each kind came; ``refused``, ``flipped``: how many were."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self.refusing: frozenset[str] = frozenset()
        self.flips: Callable[[Asked], bool] = lambda _: False
        self.seen: Counter[str] = Counter()
        self.refused = self.flipped = 0
        self._holds: list[Hold] = []
        self._lock = threading.Lock()
        door = self

        class Handler(_Handler):
            owner = door

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        for hold in self._holds:
            hold.released.set()
        self._server.shutdown()
        self._server.server_close()

    @contextmanager
    def holding(
        self,
        what: str,
        number: int = 1,
        *,
        answered: bool = False,
        deliver: bool = False,
        where: Callable[[Asked], bool] = lambda _: True,
    ) -> Iterator[Hold]:
        """Hold the ``number``-th request of that kind from now on, of those that ``where`` is true of, until the block
        ends. ``answered``: the server has done it, its answer is held. Whose client is gone by then is dropped, unless
        ``deliver``: a request that was on its way when its sender died."""
        hold = Hold(what, number, answered, where, deliver)
        with self._lock:
            self._holds.append(hold)
        try:
            yield hold
        finally:
            hold.released.set()

    def come(self, asked: Asked) -> Hold | None:
        """Count a request; the hold that it runs into, if there is one."""
        with self._lock:
            self.seen[asked.what] += 1
            for hold in self._holds:
                if hold.what == asked.what and not hold.reached.is_set() and hold.where(asked):
                    hold.seen += 1
                    if hold.seen == hold.number:
                        hold.asked = asked
                        return hold
        return None

    def pass_on(self, asked: Asked, path: str, headers: http.client.HTTPMessage, body: bytes) -> _Answer:
        """The server's answer."""
        connection = http.client.HTTPConnection(*self._target, timeout=60)
        try:
            connection.putrequest(asked.method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name.lower() not in _OWN:
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            return _Answer(answer.status, answer.reason, list(answer.getheaders()), answer.read())
        finally:
            connection.close()


@dataclass(frozen=True)
class _Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes

    def damaged(self) -> _Answer:
        """With a byte in its middle changed."""
        body = bytearray(self.body)
        body[len(body) // 2] ^= 0xFF
        return replace(self, body=bytes(body))


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed, or cut off, is what tests are about."""


class _Handler(BaseHTTPRequestHandler):
    owner: Door
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        door = self.owner
        parts = urlsplit(self.path)
        asked = Asked(self.command, parts.path, parse_qs(parts.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hold = door.come(asked)
        if {asked.what, "all"} & door.refusing:
            door.refused += 1
            self._answer(_Answer(503, "Slow Down", [("Content-Length", str(len(_REFUSAL)))], _REFUSAL))
            return
        if hold is not None and not hold.answered and not self._held(hold):
            return
        answer = door.pass_on(asked, self.path, self.headers, body)
        if door.flips(asked) and answer.body:
            door.flipped += 1
            answer = answer.damaged()
        if hold is None or not hold.answered or self._held(hold):
            self._answer(answer)

    def _held(self, hold: Hold) -> bool:
        """Stay until released; False when it is to be dropped then."""
        hold.reached.set()
        assert hold.released.wait(WAIT), "nobody released it"
        return hold.deliver or not self._client_gone()

    def _client_gone(self) -> bool:
        """Whether the other end has closed: its bytes have all been read, so that more to read is the end."""
        self.connection.setblocking(False)
        try:
            return self.connection.recv(1) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.setblocking(True)

    def _answer(self, answer: _Answer) -> None:
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.headers:
            if name.lower() not in _OWN:
                self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in answer.headers):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve
