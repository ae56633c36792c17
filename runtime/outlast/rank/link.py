"""The rank's connection to its node's agent: newline-delimited JSON over a Unix socket.

A reader thread sorts what arrives into a mailbox; sending never waits for the agent's answer. When the agent is gone
the rank goes on until its forkserver ends it; nothing here raises into the training loop.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from outlast.errors import TransferError


class NoLink:
    """The link of a process that no agent started: messages go nowhere."""

    def send(self, op: str, **fields: Any) -> None:  # noqa: ARG002 (the signature of AgentLink.send)
        return None


class AgentLink:
    """A connected link. The reader thread fills ``permits``, ``aborted`` and ``proceeded`` (generations as text) under
    ``lock`` and notifies ``news``, as does whoever changes something else that its waiters look at."""

    def __init__(self, path: str, timeout_s: float = 30.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(path)
        except OSError as error:
            raise TransferError(f"this rank cannot reach its node's agent at {path}: {error}") from error
        self._socket.settimeout(None)
        self._sending = threading.Lock()
        self._restore = threading.Event()
        self._restore_message: dict[str, Any] = {}
        self.lock = threading.Lock()
        self.permits: list[dict[str, Any]] = []
        self.aborted: set[str] = set()
        self.proceeded: set[str] = set()
        self.news = threading.Condition(self.lock)
        self.on_abort: list[Callable[[str], None]] = []
        self.on_permit: list[Callable[[dict[str, Any]], None]] = []
        threading.Thread(target=self._read, name="outlast-link", daemon=True).start()

    def send(self, op: str, **fields: Any) -> None:
        line = json.dumps({"op": op, **fields}, separators=(",", ":")).encode() + b"\n"
        with self._sending, contextlib.suppress(OSError):  # a dead agent means that this rank is about to be ended
            self._socket.sendall(line)

    def wait_restore(self, timeout_s: float) -> dict[str, Any]:
        """The agent's answer to ``hello``: what to restore from. Raises TransferError after ``timeout_s``."""
        if not self._restore.wait(timeout_s):
            text = f"the agent has not said within {timeout_s:.0f} s what to restore from"
            raise TransferError(f"{text}: the job's events say what nodes wait for")
        return self._restore_message

    def take_permits(self, step: int) -> list[dict[str, Any]]:
        """Remove and return the permits for ``step`` and for steps that have passed."""
        if not self.permits:
            return []
        with self.lock:
            due = [permit for permit in self.permits if permit["step"] <= step]
            self.permits = [permit for permit in self.permits if permit["step"] > step]
        return due

    def _read(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("rb") as lines:
            for line in lines:
                self._handle(json.loads(line))

    def _handle(self, message: dict[str, Any]) -> None:
        match message["op"]:
            case "permit":
                with self.news:
                    self.aborted.discard(message["generation"])  # at the last boundary the same comes again
                    self.permits.append(message)
                    self.news.notify_all()
                for announce in self.on_permit:
                    announce(message)
            case "abort":
                with self.news:
                    self.aborted.add(message["generation"])
                    self.permits = [p for p in self.permits if p["generation"] != message["generation"]]
                    self.news.notify_all()
                for callback in self.on_abort:
                    callback(message["generation"])
            case "proceed":
                with self.news:
                    self.proceeded.add(message["generation"])
                    self.news.notify_all()
            case "restore":
                self._restore_message = message
                self._restore.set()


def error_fields(error: BaseException) -> dict[str, Any]:
    """What an ``error`` message carries: type, message, traceback and when."""
    import traceback

    return {
        "type": type(error).__qualname__,
        "message": str(error)[:4000],
        "traceback": "".join(traceback.format_exception(error))[-16000:],
        "time": time.time(),
    }


def write_error_file(error: BaseException) -> None:
    """torchelastic's error file (TORCHELASTIC_ERROR_FILE), so that launchers name the first error."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    fields = error_fields(error)
    extra = {"py_callstack": fields["traceback"], "timestamp": str(int(fields["time"]))}
    with contextlib.suppress(OSError), open(path, "w") as file:
        json.dump({"message": {"message": f"{fields['type']}: {fields['message']}", "extraInfo": extra}}, file)
