"""A forkserver's socket, and one client of it: JSON lines in and out, without ever waiting."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def listen(path: str) -> socket.socket:
    """A listening Unix socket that only this user can use. Raises OSError (its path may have 107 bytes)."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    Path(path).unlink(missing_ok=True)
    listener.bind(path)
    Path(path).chmod(0o600)
    listener.listen(64)
    listener.setblocking(False)
    return listener


@dataclass(eq=False)
class Connection:
    """``grace_s``: how long the client needs once the server is told to end; None: it does not want to know."""

    sock: socket.socket
    grace_s: float | None = None
    _inbox: bytearray = field(default_factory=bytearray)
    _outbox: bytearray = field(default_factory=bytearray)

    @property
    def waiting(self) -> bool:
        """Whether there is something to send for which the socket has no room yet."""
        return bool(self._outbox)

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. Raises ConnectionError at the end, ValueError for what is no message."""
        data = self.sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        self._inbox += data
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = rest
        return [json.loads(line) for line in lines]

    def put(self, message: dict[str, Any]) -> None:
        """Queue a message and send what there is room for. That the client is gone is noticed when reading."""
        self._outbox += json.dumps(message, separators=(",", ":")).encode() + b"\n"
        try:
            self.flush()
        except ConnectionError:
            self._outbox.clear()

    def flush(self) -> None:
        """Send what there is room for. Raises ConnectionError."""
        try:
            while self._outbox:
                del self._outbox[: self.sock.send(self._outbox)]
        except BlockingIOError:
            pass
