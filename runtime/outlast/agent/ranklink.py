"""The agent's end of its ranks' connections: a Unix socket, newline-delimited JSON.

The ranks' end is ``outlast.rank.link``. There is one such server for each attempt, at a path of its own: a rank of
another attempt cannot reach it. A rank says ``hello`` first; what comes before is nobody's and ends the connection, and
so does a second hello of a rank that is still connected. Messages are handed on in order, from one thread.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outlast.agent.accepting import Acceptor

Message = dict[str, Any]

LONGEST_LINE = 16 << 20
"""More than any message of a rank."""

_CREDENTIALS = struct.Struct("3i")


@dataclass(eq=False)
class _Connection:
    sock: socket.socket
    pid: int
    rank: int | None = None
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)


class RankLink:
    """Serves the ranks of one attempt at ``path`` (107 bytes at most) from its construction to ``close``.

    ``on_message(rank, message)`` gets everything, ``hello`` too (with ``pid`` as the kernel knows it);
    ``on_closed(rank)`` comes after a connected rank's last message. Both are called on the link's thread and must
    return soon. Raises OSError when it cannot listen.
    """

    def __init__(
        self, path: Path, on_message: Callable[[int, Message], None], on_closed: Callable[[int], None]
    ) -> None:
        self._path, self._on_message, self._on_closed = path, on_message, on_closed
        self._lock = threading.Lock()
        self._ranks: dict[int, _Connection] = {}
        self._selector = selectors.DefaultSelector()
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        path.chmod(0o600)
        self._listener.listen(64)
        self._acceptor = Acceptor(self._listener, "the ranks' link")
        self._woken, self._waker = socket.socketpair()
        for sock in (self._listener, self._woken, self._waker):
            sock.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wake)
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="outlast-ranklink", daemon=True)
        self._thread.start()

    def send(self, rank: int, message: Message) -> bool:
        """Queue a message to a rank; whether that rank is connected."""
        line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            connection = self._ranks.get(rank)
            if connection is None:
                return False
            connection.outbox += line
        self._nudge()
        return True

    def close(self) -> None:
        """Disconnect all ranks and remove the socket. Not to be called from a callback."""
        self._closing = True
        self._nudge()
        self._thread.join()
        self._path.unlink(missing_ok=True)

    def _nudge(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake already; closed: there is nobody to wake
            self._waker.send(b"x")

    def _serve(self) -> None:
        while not self._closing:
            for key, mask in self._selector.select():
                if isinstance(key.data, _Connection):
                    self._turn(key.data, mask)
                else:
                    key.data()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._waker.close()
        self._selector.close()

    def _accept(self) -> None:
        sock = self._acceptor.accept()
        if sock is None:
            return
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        connection = _Connection(sock, int(_CREDENTIALS.unpack(credentials)[0]))
        self._selector.register(sock, selectors.EVENT_READ, connection)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._woken.recv(4096)
        with self._lock:
            waiting = [connection for connection in self._ranks.values() if connection.outbox]
        for connection in waiting:
            self._turn(connection, selectors.EVENT_WRITE)

    def _turn(self, connection: _Connection, mask: int) -> None:
        if connection.sock.fileno() < 0:
            return
        try:
            if mask & selectors.EVENT_WRITE:
                self._flush(connection)
            if mask & selectors.EVENT_READ:
                self._read(connection)
        except (ConnectionError, ValueError, KeyError, TypeError):
            self._drop(connection)

    def _flush(self, connection: _Connection) -> None:
        with self._lock:
            with contextlib.suppress(BlockingIOError):
                while connection.outbox:
                    del connection.outbox[: connection.sock.send(connection.outbox)]
            left = bool(connection.outbox)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if left else 0)
        self._selector.modify(connection.sock, events, connection)

    def _read(self, connection: _Connection) -> None:
        data = connection.sock.recv(1 << 16)
        if not data:
            raise ConnectionResetError
        connection.inbox += data
        while (end := connection.inbox.find(b"\n")) >= 0:
            message = json.loads(bytes(connection.inbox[:end]))
            del connection.inbox[: end + 1]
            self._take(connection, message)
        if len(connection.inbox) > LONGEST_LINE:
            raise ValueError("a line without an end")

    def _take(self, connection: _Connection, message: Message) -> None:
        if connection.rank is None:
            if message["op"] != "hello":
                raise ValueError(f"{message['op']!r} before hello")
            rank = int(message["rank"])
            with self._lock:
                if rank in self._ranks:
                    raise ValueError(f"rank {rank} is connected already")
                self._ranks[rank] = connection
            connection.rank = rank
            message["pid"] = connection.pid
        assert connection.rank is not None
        self._on_message(connection.rank, message)

    def _drop(self, connection: _Connection) -> None:
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if connection.rank is not None:
            with self._lock:
                del self._ranks[connection.rank]
            self._on_closed(connection.rank)
