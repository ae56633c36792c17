"""A keeper whose transfers to and from its store stop where a test wants them to.

``python -m support.gates GATE -`` is ``outlast.checkpoint.serving`` whose tier asks at the Unix socket GATE before a
transfer begins ("begin"), whenever the store asks whether to go on ("piece", counted from 1) and after it has ended
("end"). A `Gate` answers, or does not, until the test says so.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

from outlast.checkpoint.tier import StoreTier
from outlast.snapshot.keeper import KeeperConfig, read_config, run
from outlast.snapshot.stored import TransferLimits

WAIT = 30.0


class GatedTier:
    """A StoreTier that passes a gate at each point."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._tier = StoreTier()

    def upload(self, url: str, key: str, data: memoryview, limits: TransferLimits) -> None:
        self._pass("begin", 1)
        self._tier.upload(url, key, data, self._gated(limits))
        self._pass("end", 1)

    def fetch(self, url: str, key: str, target: memoryview, limits: TransferLimits) -> None:
        self._pass("begin", 1)
        self._tier.fetch(url, key, target, self._gated(limits))
        self._pass("end", 1)

    def trouble(self) -> str | None:
        return self._tier.trouble()

    def _gated(self, limits: TransferLimits) -> TransferLimits:
        numbers = count(1)

        def cancelled() -> bool:
            self._pass("piece", next(numbers))
            return limits.cancelled()

        return replace(limits, cancelled=cancelled)

    def _pass(self, point: str, number: int) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(self._path)
            sock.sendall(json.dumps([point, number]).encode() + b"\n")
            sock.recv(1)


class Gate:
    """The test's end. Everything passes, but what is held."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._held: list[object] | None = None
        self._reached, self._released = threading.Event(), threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()

    @contextmanager
    def holding(self, point: str, number: int = 1) -> Iterator[None]:
        """Let the first that comes to this point stay there until the block ends; the block begins at once."""
        self._reached.clear()
        self._released.clear()
        self._held = [point, number]
        try:
            yield
        finally:
            self._held = None
            self._released.set()

    def wait(self) -> None:
        """Until somebody is held."""
        assert self._reached.wait(WAIT), f"nobody came to {self._held}"

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with sock:
            if json.loads(sock.makefile().readline()) == self._held and not self._reached.is_set():
                self._reached.set()
                assert self._released.wait(WAIT), "nobody released it"
            try:
                sock.sendall(b"x")
            except OSError:  # killed while it waited
                return


def in_thread(work: Callable[[], object]) -> Callable[[], object]:
    """Begin ``work``; what is returned waits for its result, or the exception that it raised."""
    results: list[object] = []

    def attempt() -> None:
        try:
            results.append(work())
        except Exception as error:  # noqa: BLE001
            results.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()

    def wait() -> object:
        thread.join(WAIT)
        assert results, f"still running after {WAIT} s"
        return results[0]

    return wait


if __name__ == "__main__":
    run(KeeperConfig.from_json(read_config(sys.argv[1:])), GatedTier(sys.argv[1]))
