"""What a whole run tells while it goes on, for tests that act by it: events, steps, pids. Each wait has a deadline."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil

from outlast.agent.pidfiles import node_pids

LIMIT_S = 120.0
LOOK_S = 0.02
Event = dict[str, Any]


class Story:
    """Of the run in ``folder`` (its --dir), which may not be there yet."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.seen = 0
        """Events that were waited for are behind this place in the log; ``next`` looks beyond it."""

    def events(self) -> list[Event]:
        return [json.loads(line) for line in self._lines("events.jsonl")]

    def next(self, kind: str, holds: Callable[[Event], bool] = lambda _: True, limit_s: float = LIMIT_S) -> Event:
        """Wait for the next event of that kind, and of which ``holds`` is true."""
        deadline = time.monotonic() + limit_s
        while True:
            for place, event in enumerate(self.events()[self.seen :], self.seen + 1):
                if event["kind"] == kind and holds(event):
                    self.seen = place
                    return event
            assert time.monotonic() < deadline, f"no {kind} came in {limit_s:.0f} s, after: " + "; ".join(
                e["kind"] for e in self.events()[-12:]
            )
            time.sleep(LOOK_S)

    def committed(self, beyond: int = -1, limit_s: float = LIMIT_S) -> int:
        """Wait for the next checkpoint of a step beyond that one; its step."""
        event = self.next("checkpoint-committed", lambda event: event["fields"]["step"] > beyond, limit_s)
        return int(event["fields"]["step"])

    def step(self) -> int:
        """The newest step whose loss was reported; -1 before the first."""
        rows = [json.loads(line) for line in self._lines("metrics.jsonl")]
        return max((int(row["step"]) for row in rows if "loss" in row), default=-1)

    def reach(self, step: int, limit_s: float = LIMIT_S) -> None:
        """Wait until that step's loss was reported."""
        deadline = time.monotonic() + limit_s
        while (here := self.step()) < step:
            assert time.monotonic() < deadline, f"step {step} did not come in {limit_s:.0f} s: stands at {here}"
            time.sleep(LOOK_S)

    def pid(self, seat: int, role: str) -> int:
        """The process that has that role in the node of a seat."""
        given = [event for event in self.events() if "seats" in event["fields"]]
        node = given[-1]["fields"]["seats"][seat]
        known = json.loads((self._folder / "control" / "nodes.json").read_text())["nodes"]
        (folder,) = [config["socket_dir"] for config in known if config["node"] == node]
        return node_pids(pathlib.Path(folder))[role]

    def controller(self) -> int:
        """The controller's process."""
        return int(json.loads((self._folder / "control" / "http.json").read_text())["pid"])

    def supervisor(self) -> int:
        """The run's supervisor."""
        (pid,) = [
            process.pid
            for process in psutil.process_iter(["cmdline"])
            if "outlast.local.supervisor" in (process.info["cmdline"] or ())
            and str(self._folder) in process.info["cmdline"]
        ]
        return int(pid)

    def kill_keeper(self, seat: int) -> None:
        """SIGKILL the keeper of a seat's node."""
        os.kill(self.pid(seat, "keeper"), signal.SIGKILL)

    def _lines(self, name: str) -> list[str]:
        """Whole lines only: the last one may be being written."""
        path = self._folder / name
        return path.read_text().splitlines()[: path.read_text().count("\n")] if path.exists() else []


@contextmanager
def meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do ``act`` in a thread while the block runs; its failure is the block's."""
    with ThreadPoolExecutor(1) as pool:
        acting: Future[None] = pool.submit(act)
        yield
        acting.result(LIMIT_S)
