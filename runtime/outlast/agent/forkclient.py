"""The client of a forkserver: ask it for processes, be told when they end.

Call order: ``launch`` starts a server (or ``ForkClient.fork_server`` a further one), ``ForkClient`` connects to it.
Replies come on a reader thread, which also calls ``on_exit``, ``on_gone`` and ``on_terminating``: these must return
soon and must not call the client.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.agent.forkprotocol import DEFAULT_PRELOAD, ServerSetup, Spawn
from outlast.errors import RequestError, TransferError

_RETRY_S = 0.02


@dataclass(frozen=True)
class Exit:
    """A child's end: with ``code``, or by ``signal``. Nothing of its process group runs any more."""

    id: str
    pid: int
    code: int | None
    signal: int | None


@dataclass(frozen=True)
class Child:
    """A child that the server has. ``orphan``: its client is gone and it is being killed."""

    id: str
    pid: int
    lifetime: str
    role: str
    orphan: bool


@dataclass(frozen=True)
class ServerState:
    """What ``list`` tells. ``missing``: modules that could not be preloaded; ``threads`` must be 1."""

    pid: int
    threads: int
    missing: tuple[str, ...]
    children: tuple[Child, ...]


def launch(
    path: str,
    *,
    log: Path,
    preload: Sequence[str] = DEFAULT_PRELOAD,
    pid_dir: str = "",
    env: Mapping[str, str] | None = None,
    survive_parent: bool = False,
) -> subprocess.Popen[bytes]:
    """Start a forkserver that will listen at ``path``; it is up when a ``ForkClient`` can connect (seconds later).

    All its children share its hash seed, 0. Its output is appended to ``log``. ``env`` defaults to this process's.
    """
    command = [sys.executable, "-P", "-m", "outlast.agent.forkserver", "--socket", path, "--preload", ",".join(preload)]
    command += ["--pid-dir", pid_dir] if pid_dir else []
    command += ["--survive-parent"] if survive_parent else []
    environment = {**(os.environ if env is None else env), "PYTHONHASHSEED": "0"}
    with log.open("ab") as out:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
        )


class ForkClient:
    """One connection. Any thread may use it.

    ``on_exit`` is told of the ends of own children, and of all whose lifetime is the server's; ``on_gone`` once when
    the server is gone (not after ``close``); ``on_terminating``, after ``attend``, when the server was told to end,
    with the seconds that are left until it does. ``timeout`` (seconds) bounds connecting, also to a server that is
    still starting, and each request. Raises TransferError when the server cannot be reached.
    """

    def __init__(
        self,
        path: str,
        on_exit: Callable[[Exit], None] = lambda _: None,
        on_gone: Callable[[], None] = lambda: None,
        timeout: float = 30.0,
        on_terminating: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._path, self._timeout = path, timeout
        self._on_exit, self._on_gone, self._on_terminating = on_exit, on_gone, on_terminating
        self._sock = _connect(path, timeout)
        self._lock = threading.Lock()
        self._asked: dict[int, Future[dict[str, Any]]] = {}
        self._count = 0
        self._closed = False
        threading.Thread(target=self._read, name="outlast-forkclient", daemon=True).start()

    def spawn(self, spawn: Spawn) -> int:
        """Make a process; its pid. Raises RequestError when the server refuses, TransferError when it is gone."""
        return int(self._ask("spawn", **spawn.to_json())["pid"])

    def kill(self, child: str, number: int) -> None:
        """Signal a child's whole process group. Raises RequestError when there is no such child (any more)."""
        self._ask("kill", id=child, signal=int(number))

    def fork_server(self, setup: ServerSetup) -> int:
        """Make a further forkserver, which listens on return; its pid."""
        return int(self._ask("fork_server", **setup.to_json())["pid"])

    def state(self) -> ServerState:
        """What the server is and has."""
        reply = self._ask("list")
        children = tuple(Child(**child) for child in reply["children"])
        return ServerState(int(reply["pid"]), int(reply["threads"]), tuple(reply["missing"]), children)

    def attend(self, grace_s: float) -> None:
        """Be told when the server is told to end, and keep it going for up to ``grace_s`` then."""
        self._ask("attend", grace_s=grace_s)

    def shutdown(self) -> None:
        """End the server with all its children; ``on_gone`` is called when that has happened."""
        self._ask("shutdown")

    def close(self) -> None:
        """Disconnect: the server kills this client's children."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _ask(self, op: str, **fields: Any) -> dict[str, Any]:
        answer: Future[dict[str, Any]] = Future()
        with self._lock:
            self._count += 1
            number = self._count
            self._asked[number] = answer
            line = json.dumps({"op": op, "req": number, **fields}).encode() + b"\n"
            try:
                self._sock.sendall(line)
            except OSError as error:
                del self._asked[number]
                raise self._unreachable(str(error)) from error
        try:
            reply = answer.result(self._timeout)
        except FutureTimeout:
            self._asked.pop(number, None)
            raise self._unreachable(f"no answer to {op} within {self._timeout:g} s") from None
        if reply["op"] == "error":
            raise RequestError(f"forkserver: {reply['text']}")
        return reply

    def _unreachable(self, reason: str) -> TransferError:
        return TransferError(f"forkserver at {self._path}: {reason}")

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._sock.makefile("rb") as lines:
            for line in lines:
                self._handle(json.loads(line))
        with self._lock:
            waiting, self._asked = list(self._asked.values()), {}
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
        for answer in waiting:
            answer.set_exception(self._unreachable("it is gone"))
        if not self._closed:
            self._on_gone()

    def _handle(self, message: dict[str, Any]) -> None:
        if message["op"] == "exited":
            self._on_exit(Exit(message["id"], message["pid"], message["code"], message["signal"]))
            return
        if message["op"] == "terminating":
            self._on_terminating(float(message["seconds"]))
            return
        answer = self._asked.pop(message["req"], None)
        if answer is not None:
            answer.set_result(message)


def _connect(path: str, timeout: float) -> socket.socket:
    """Connect, trying again while there is no server yet."""
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.connect(path)
            return sock
        except (FileNotFoundError, ConnectionRefusedError) as error:
            sock.close()
            if time.monotonic() > deadline:
                raise TransferError(f"no forkserver at {path} within {timeout:g} s: {error.strerror}") from error
        time.sleep(_RETRY_S)
