"""Where an injected fault stops a rank: before named steps it asks the gate and obeys the answer.

The gate belongs to ``trainctl run``; it performs the fault, perhaps on this very process, before it answers.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


class InjectedError(RuntimeError):
    """The exception that a ``rank-error`` fault raises in the script."""


class FaultGate:
    """Asked at every boundary, connects only before steps that faults name."""

    def __init__(self, path: str, steps: frozenset[int], identity: Mapping[str, Any]) -> None:
        self._path, self._steps, self._identity = path, steps, dict(identity)
        self._socket: socket.socket | None = None

    @classmethod
    def from_environment(cls, identity: Mapping[str, Any]) -> FaultGate | None:
        path = os.environ.get("OUTLAST_FAULT_GATE")
        steps = frozenset(json.loads(os.environ.get("OUTLAST_FAULT_STEPS", "[]")))
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(path, steps, {**identity, "world": world}) if path and steps else None

    def pass_step(self, step: int) -> None:
        """Wait until the gate lets this rank do ``step``. Raises InjectedError when the fault is an error."""
        if step not in self._steps:
            return
        answer = self._ask(step)
        if "slow" in answer:
            command = [
                sys.executable,
                "-P",
                "-m",
                "outlast.rank.slowdown",
                str(os.getpid()),
                str(float(answer["slow"])),
            ]
            subprocess.Popen(command, stdin=subprocess.DEVNULL)
        if "raise" in answer:
            raise InjectedError(str(answer["raise"]))

    def _ask(self, step: int) -> dict[str, Any]:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(120)
            self._socket.connect(self._path)
        self._socket.sendall(json.dumps({**self._identity, "step": step}).encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            piece = self._socket.recv(4096)
            if not piece:
                return {}  # the run is ending: the gate is gone, and so is this rank in a moment
            answer += piece
        return dict(json.loads(answer))
