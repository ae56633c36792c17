"""Ranks' logs on their way into the job's store, when an attempt has ended on this node. Nothing waits for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from outlast import messages as m
from outlast.agent.attempt_record import AttemptRecord
from outlast.agent.forkclient import Exit, ForkClient
from outlast.agent.forkprotocol import Spawn
from outlast.agent.pidfiles import node_pids
from outlast.agent.reactor import Reactor
from outlast.api import TrainingJob
from outlast.checkpoint.manifest import job_url
from outlast.clock import Clock
from outlast.config import NodeConfig
from outlast.errors import RequestError, TransferError
from outlast.joblogs import log_file
from outlast.snapshot.identity import Attempt

ROLE = "logs"
"""What the roles of such processes begin with (``outlast.agent.pidfiles``): who ends a node may wait for them."""
PATIENCE_S = 10.0
"""How long a node that leaves waits for its ranks' logs."""

_POLL_S = 0.1
SETTLE_S = 30.0
"""How long whoever ends a node after the job's end waits for them."""
_PROGRAM = "outlast.checkpoint.shipping:main"


def under_way(sockets: Path) -> bool:
    """Whether logs of the node with this folder for sockets are on their way."""
    return any(role.startswith(ROLE) for role in node_pids(sockets))


class Shipping:
    """One node's. All methods are called on the reactor's thread."""

    def __init__(
        self,
        config: NodeConfig,
        job: TrainingJob,
        forks: ForkClient,
        reactor: Reactor,
        emit: Callable[[m.Event], None],
        clock: Clock,
    ) -> None:
        self._config, self._job, self._forks = config, job, forks
        self._reactor, self._emit, self._clock = reactor, emit, clock
        self._under_way: set[str] = set()

    def ship(self, attempt: Attempt, seat: int) -> None:
        """Have the logs of the seat's ranks put into the store, if the job has one."""
        if self._job.spec.checkpoint is None:
            return
        spawn = self._spawn(attempt, seat)
        if spawn.id in self._under_way:
            return
        with contextlib.suppress(RequestError, TransferError):  # an agent before began it, or the node is ending
            self._forks.spawn(spawn)
            self._under_way.add(spawn.id)

    def ship_last(self, record: AttemptRecord) -> None:
        """Those of the attempt that an agent before this one started: it has ended with that agent."""
        if record.started is not None and record.seat is not None:
            self.ship(record.started, record.seat)

    def ended(self, exit_: Exit) -> None:
        """The forkserver told of a child's end."""
        if not exit_.id.startswith(f"{ROLE}-"):
            return
        self._under_way.discard(exit_.id)
        if exit_.code != 0:
            self._complain(int(exit_.id.removeprefix(f"{ROLE}-")), self._reason(exit_))

    def when_done(self, act: Callable[[], None]) -> None:
        """``act`` when nothing is under way any more, or after ``PATIENCE_S``."""
        deadline = self._clock.monotonic() + PATIENCE_S

        def look() -> None:
            if self._under_way and self._clock.monotonic() < deadline:
                self._reactor.after(_POLL_S, look)
            else:
                act()

        look()

    def _spawn(self, attempt: Attempt, seat: int) -> Spawn:
        config, spec, meta = self._config, self._job.spec, self._job.metadata
        assert spec.checkpoint is not None
        procs, number = spec.workers.procs_per_worker, attempt.number
        ranks = range(seat * procs, (seat + 1) * procs)
        logs = [[rank, str(Path(config.log_dir) / log_file(number, rank))] for rank in ranks]
        return Spawn(
            id=f"{ROLE}-{number}",
            kind="call",
            target=_PROGRAM,
            args=(job_url(spec.checkpoint.url, meta.namespace, meta.name), number, logs, seat == 0),
            env=config.env,
            cwd=config.cwd,
            stdout=str(self._log),
            stderr=str(self._log),
            lifetime="server",
            threads=1,
            role=f"{ROLE}-{number}",
        )

    @property
    def _log(self) -> Path:
        return Path(self._config.log_dir) / f"shipping.{self._config.node}.log"

    def _reason(self, exit_: Exit) -> str:
        try:
            lines = self._log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        if exit_.signal is not None:
            return f"the process that put them there was ended by signal {exit_.signal}"
        return lines[-1] if lines else f"the process that put them there ended with {exit_.code}"

    def _complain(self, attempt: int, reason: str) -> None:
        text = f"logs of attempt {attempt} on {self._config.node} are not in the store: {reason}"
        self._emit(m.Note(self._config.node, None, "logs-not-stored", text))
