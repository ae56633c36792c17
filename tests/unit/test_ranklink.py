"""The agent's end of its ranks' connections, where descriptors are short."""

from __future__ import annotations

import json
import os
import queue
import resource
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from outlast.agent.ranklink import Message, RankLink


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process has no descriptor left for a while."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(name) for name in os.listdir("/proc/self/fd")) + 4  # noqa: PTH208
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        while True:
            try:
                taken.append(os.dup(0))
            except OSError:
                break
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in taken:
            os.close(descriptor)


def test_ranks_connect_once_there_are_descriptors_again(capfd: pytest.CaptureFixture[str]) -> None:
    heard: queue.Queue[tuple[int, Message]] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="ol-") as folder:
        path = Path(folder) / "r.sock"
        link = RankLink(path, lambda rank, message: heard.put((rank, message)), lambda rank: None)
        with socket.socket(socket.AF_UNIX) as early, socket.socket(socket.AF_UNIX) as late:
            early.connect(str(path))
            early.sendall(json.dumps({"op": "hello", "rank": 0}).encode() + b"\n")
            assert heard.get(timeout=10)[0] == 0
            with no_descriptors():
                late.connect(str(path))
                late.sendall(json.dumps({"op": "hello", "rank": 1}).encode() + b"\n")
                time.sleep(0.3)
                early.sendall(b'{"op": "still here"}\n')
                assert heard.get(timeout=10) == (0, {"op": "still here"})
                assert heard.empty()
            assert heard.get(timeout=10)[0] == 1
        link.close()
    assert capfd.readouterr().err.count("accepts no connections for now") == 1
