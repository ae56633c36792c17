"""Runs the node's keeper and talks to it: a child of the forkserver, so that it outlives the agent.

A new agent finds the keeper of the one before by the forkserver's list and the keeper's info file; a keeper that ended
is started again. ``call`` blocks, so it belongs in a worker thread; it waits for a keeper that is just being restarted.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.agent.forkclient import Exit, ForkClient
from outlast.agent.forkprotocol import Spawn
from outlast.agent.rank_process import isolate_of
from outlast.api import TrainingJob
from outlast.clock import Clock
from outlast.config import NodeConfig
from outlast.errors import RequestError, TransferError
from outlast.messages.events import Address
from outlast.snapshot.wire import KeeperClient

KEEPER = "keeper"
READY_S = 20.0
"""How long a keeper may take to listen."""

ABSENT_S = 60.0
"""How long a call waits for a keeper that is being started."""

_PLAIN = "outlast.snapshot.keeper:main"
_DURABLE = "outlast.checkpoint.serving:main"
"""With an object tier, for a job that has checkpoints."""

_POLL_S = 0.005
_NEWS_S = 0.5
_LEAST_S = 0.05
_SHORT_LIFE_S = 2.0
_LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True)
class Serving:
    """A keeper that listens."""

    pid: int
    address: Address


class KeeperHost:
    """The keeper of one node.

    Call order: ``obtain`` once; then ``call`` from any thread, and ``ended`` when the forkserver tells of its end,
    after which ``obtain`` starts another; ``close``.
    """

    def __init__(self, config: NodeConfig, job: TrainingJob, forks: ForkClient, clock: Clock) -> None:
        self._config, self._forks, self._clock = config, forks, clock
        limits = (job.spec.snapshot.max_memory, None if config.share is None else config.share.bytes)
        self._max_memory = min((limit for limit in limits if limit is not None), default=None)
        self._program = _PLAIN if job.spec.checkpoint is None else _DURABLE
        self._info = Path(config.socket_dir) / "keeper.json"
        self._token = Path(config.token_file).read_text().strip()
        self._serving: Serving | None = None
        self._changed = threading.Condition()
        self._calls: set[KeeperClient] = set()
        self._began = clock.monotonic()
        self._pause = 0.0
        self._closed = False

    @property
    def serving(self) -> Serving | None:
        """The keeper, None while there is none."""
        return self._serving

    def obtain(self) -> Serving:
        """Find the keeper that runs, or start one, and wait until it listens.

        Raises TransferError when it does not within READY_S, RequestError when the forkserver refuses.
        """
        time.sleep(self._pause)
        pid = self._running() or self._spawn()
        deadline = self._clock.monotonic() + READY_S
        while (address := self._read_info(pid)) is None:
            if self._closed or self._clock.monotonic() > deadline:
                raise TransferError(f"the keeper of {self._config.node} (pid {pid}) does not listen; see {self._log}")
            if self._running() != pid:
                raise TransferError(f"the keeper of {self._config.node} ended before it listened; see {self._log}")
            time.sleep(_POLL_S)
        with self._changed:
            self._serving = Serving(pid, address)
            self._changed.notify_all()
        return self._serving

    def ended(self, exit_: Exit) -> bool:
        """Take note of a keeper's end; whether it was the one that served."""
        with self._changed:
            was = self._serving is not None and self._serving.pid == exit_.pid
            if was:
                self._serving = None
                self._changed.notify_all()
        lived = self._clock.monotonic() - self._began
        self._pause = min(max(2 * self._pause, 0.1), _LONGEST_PAUSE_S) if lived < _SHORT_LIFE_S else 0.0
        return was

    def call(self, op: str, *, timeout: float, again: bool = True, **args: Any) -> dict[str, Any]:
        """One operation. With ``again`` it is repeated when the keeper ended meanwhile (it must bear that).

        Raises what the keeper raises; TransferError after ``timeout`` seconds, or when there is no keeper for ABSENT_S.
        """
        deadline = self._clock.monotonic() + timeout
        while True:
            left = deadline - self._clock.monotonic()
            serving = self._wait_serving(min(left, ABSENT_S))
            try:
                with self._connected(serving, max(left, _LEAST_S)) as client:
                    return client.call(op, **args)
            except TransferError:
                if not again or not self._has_ended(serving):
                    raise

    def close(self) -> None:
        """Let every wait end, also those for answers. The keeper goes on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            for client in self._calls:
                client.shutdown()

    @contextmanager
    def _connected(self, serving: Serving, seconds: float) -> Iterator[KeeperClient]:
        with KeeperClient(*serving.address, self._token, seconds) as client:
            with self._changed:
                self._calls.add(client)
                if self._closed:
                    client.shutdown()
            try:
                yield client
            finally:
                with self._changed:
                    self._calls.discard(client)

    @property
    def _log(self) -> Path:
        return Path(self._config.log_dir) / f"keeper.{self._config.node}.log"

    def _wait_serving(self, seconds: float) -> Serving:
        with self._changed:
            if not self._changed.wait_for(lambda: self._serving is not None or self._closed, max(seconds, 0.0)):
                raise TransferError(f"{self._config.node} has no keeper just now; see {self._log}")
            if self._serving is None:
                raise TransferError(f"the agent of {self._config.node} is ending")
            return self._serving

    def _has_ended(self, serving: Serving) -> bool:
        """Whether that keeper is gone; the forkserver tells of it a moment after its connections break."""
        with self._changed:
            return self._changed.wait_for(lambda: self._serving is not serving, _NEWS_S) and not self._closed

    def _running(self) -> int | None:
        return next((child.pid for child in self._forks.state().children if child.id == KEEPER), None)

    def _read_info(self, pid: int) -> Address | None:
        try:
            info = json.loads(self._info.read_text())
        except (OSError, ValueError):
            return None
        return (str(info["host"]), int(info["port"])) if info.get("pid") == pid else None

    def _spawn(self) -> int:
        config = self._config
        keeper = {  # the fields of outlast.snapshot.keeper.KeeperConfig; importing that costs an agent 0.4 s
            "node": config.node,
            "memory_dir": config.memory_dir,
            "host": config.host,
            "token": self._token,
            "info_path": str(self._info),
            "max_memory": self._max_memory,
        }
        self._began = self._clock.monotonic()
        spawn = Spawn(
            id=KEEPER,
            kind="call",
            target=self._program,
            args=(keeper,),
            env=config.env,
            cwd=config.cwd,
            stdout=str(self._log),
            stderr=str(self._log),
            lifetime="server",
            threads=1,
            isolate=isolate_of(config),
            role=KEEPER,
        )
        return self._forks.spawn(spawn)


Report = Callable[[Serving | None], None]


class KeeperWatch:
    """Keeps a keeper running: a thread that starts another whenever it is told of an end.

    ``report`` is called on that thread: with None when the keeper was lost, with what serves when there is one (again).
    """

    def __init__(self, host: KeeperHost, report: Report, complain: Callable[[str], None]) -> None:
        self._host, self._report, self._complain = host, report, complain
        self._exits: list[Exit | None] = [None]
        self._wake = threading.Event()
        self._wake.set()
        self._closed = False
        threading.Thread(target=self._watch, name="outlast-keeper-watch", daemon=True).start()

    def ended(self, exit_: Exit) -> None:
        """The forkserver told of a keeper's end."""
        self._exits.append(exit_)
        self._wake.set()

    def close(self) -> None:
        """Start no other keeper any more."""
        self._closed = True
        self._wake.set()

    def _watch(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            while self._exits:
                exit_ = self._exits.pop(0)
                if exit_ is not None and self._host.ended(exit_):
                    self._report(None)
            self._obtain()

    def _obtain(self) -> None:
        try:
            self._report(self._host.obtain())
        except (TransferError, RequestError) as error:
            if not self._closed:
                self._complain(str(error))
                self._wake.set()
