"""``trainctl`` as a person has it: a process with arguments, an environment, two outputs and a status."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    status: int
    out: str
    err: str


@dataclass(frozen=True)
class Trainctl:
    """Runs it with ``variables`` (KUBECONFIG among them) in ``folder``."""

    variables: Mapping[str, str]
    folder: str = "."
    limit_s: float = 60.0

    def __call__(self, *arguments: str, given: str | None = None) -> Done:
        done = subprocess.run(
            _command(arguments),
            input=given,
            capture_output=True,
            text=True,
            timeout=self.limit_s,
            env=self.environment(),
            cwd=self.folder,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def ok(self, *arguments: str, given: str | None = None) -> str:
        """Its output; an AssertionError unless it ended with 0."""
        done = self(*arguments, given=given)
        assert done.status == 0, f"trainctl {' '.join(arguments)}: {done}"
        return done.out

    def start(self, *arguments: str) -> Running:
        """Begin it, to see what it writes meanwhile."""
        return Running(
            subprocess.Popen(
                _command(arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=self.environment(),
                cwd=self.folder,
            )
        )

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(os.path.abspath(place) for place in sys.path if place)  # noqa: PTH100 (no links resolved)
        return {**self.variables, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", "trainctl", *arguments]


class Running:
    """One that goes on. Use as a context: it is ended at the end."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(10)

    @property
    def errors(self) -> str:
        return "".join(self._errors)

    def until(self, what: str, seen: Callable[[str], bool], within_s: float = 30.0) -> str:
        """The first further line of which ``seen`` is true."""
        deadline = time.monotonic() + within_s
        while True:
            try:
                line = self._queue.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                line = None
            assert line is not None, f"{what}: not within {within_s:g} s; said: {self.lines}, {self.errors}"
            self.lines.append(line)
            if seen(line):
                return line

    def end(self, within_s: float = 30.0) -> int:
        """Its status, once it has ended by itself; what it wrote is in ``lines``."""
        status = self.process.wait(within_s)
        while (line := self._queue.get(timeout=5)) is not None:
            self.lines.append(line)
        assert "Traceback" not in self.errors, self.errors
        return status

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors.extend(self.process.stderr)
