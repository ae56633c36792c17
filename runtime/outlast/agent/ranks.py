"""The ranks of one attempt on one node: made together, watched, ended together."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from outlast import messages as m
from outlast.agent.forkclient import Exit, ForkClient
from outlast.agent.rank_process import RankFiles, link_path, rank_spawn, read_error_file
from outlast.agent.ranklink import Message, RankLink
from outlast.agent.stacks import Subject
from outlast.api import TrainingJob
from outlast.config import NodeConfig
from outlast.errors import RequestError
from outlast.snapshot.identity import Attempt


@dataclass
class Rank:
    """One rank, as far as the agent knows it. ``pid`` is the child's, ``speaker_pid`` that of who connected (another
    one when a shell script starts the training); ``killed``: it was ended from here; ``why``: what is known
    of its end beside that; ``told``: its end has been reported.
    """

    rank: int
    local_rank: int
    child: str
    pid: int
    listens: bool
    files: RankFiles
    speaker_pid: int | None = None
    connected: bool = False
    steps: int | None = None
    seconds: float | None = None
    own_seconds: float | None = None
    ready: m.RankReady | None = None
    error: m.ErrorInfo | None = None
    done: dict[str, Any] | None = None
    exit: Exit | None = None
    killed: bool = False
    why: str = ""
    told: bool = False

    def step(self, said: Mapping[str, Any]) -> None:
        """Take note of a finished step. One after the last means that the script trains on: it is not done."""
        self.done = None
        self.steps, self.seconds = int(said["step"]), float(said["seconds"])
        self.own_seconds = float(said.get("own_seconds", said["seconds"]))

    def end(self, node: str, attempt: Attempt, now: float) -> list[m.Event]:
        """How to report its end. A rank that was done is done, however its process ended then."""
        exit_ = self.exit
        assert exit_ is not None
        if self.done is None and exit_.code != 0:
            error = self.error or read_error_file(self.files.error, now)
            died = m.RankExited(node, attempt, self.rank, exit_.code, exit_.signal, error, now, self.steps, self.why)
            return [died]
        done = self.done or {}
        events: list[m.Event] = []
        if exit_.code != 0:
            how = f"with {exit_.code}" if exit_.signal is None else f"by signal {exit_.signal}"
            events.append(m.Note(node, self.rank, "late-exit", f"rank {self.rank} was done but ended {how}"))
        steps = int(done.get("steps", self.steps or 0))
        return [*events, m.RankDone(node, attempt, self.rank, str(done.get("digest", "")), steps)]


OnMessage = Callable[["Ranks", int, Message], None]
OnClosed = Callable[["Ranks", int], None]


@dataclass
class Ranks:
    """One attempt's ranks on this node. ``ending``: they are being killed, their ends are nobody's news.
    ``restore``: what they may load, once that is known.

    Call order: ``Ranks.open``, ``spawn``, then ``kill`` and, once all ``alive`` are gone or given up, ``close``.
    """

    instruction: m.Start
    link: RankLink
    forks: ForkClient
    members: dict[int, Rank] = field(default_factory=dict)
    restore: Message | None = None
    ending: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    total: int | None = None

    @classmethod
    def open(
        cls, config: NodeConfig, instruction: m.Start, forks: ForkClient, on_message: OnMessage, on_closed: OnClosed
    ) -> Ranks:
        """Listen for them. Raises OSError when the node's folder for sockets is gone or its path too long."""
        made: list[Ranks] = []
        link = RankLink(
            link_path(config, instruction),
            lambda rank, message: on_message(made[0], rank, message),
            lambda rank: on_closed(made[0], rank),
        )
        made.append(cls(instruction, link, forks))
        return made[0]

    def spawn(self, config: NodeConfig, job: TrainingJob) -> None:
        """Make them. Raises TransferError when the forkserver is gone, RequestError when it refuses."""
        for local_rank in range(self.instruction.procs):
            self._spawn(config, job, local_rank)

    def _spawn(self, config: NodeConfig, job: TrainingJob, local_rank: int) -> None:
        start = self.instruction
        rank = start.seat * start.procs + local_rank
        files = RankFiles.of(config, start, rank)
        files.error.unlink(missing_ok=True)
        spawn = rank_spawn(config, job, start, local_rank)
        pid = self.forks.spawn(spawn)
        self.members[rank] = Rank(rank, local_rank, spawn.id, pid, spawn.kind != "exec", files)

    @property
    def attempt(self) -> Attempt:
        return self.instruction.attempt

    def alive(self) -> list[Rank]:
        """Those whose end the forkserver has not told of."""
        return [rank for rank in self.members.values() if rank.exit is None]

    def well(self) -> bool:
        """Whether all run, or are done."""
        return not self.ending and all(rank.exit is None or rank.done is not None for rank in self.members.values())

    def take_exit(self, exit_: Exit) -> Rank | None:
        """Take note of a child's end; the rank that it was, None when it was none of these."""
        rank = next((rank for rank in self.members.values() if rank.child == exit_.id), None)
        if rank is not None:
            rank.exit = exit_
            rank.killed = self.ending and exit_.signal == signal.SIGKILL
        return rank

    def load(self, restore: Message) -> None:
        """Let them load: those that have said hello, the others when they do, each once."""
        self.restore = restore
        for rank in self.members.values():
            if rank.connected:
                self.link.send(rank.rank, restore)

    def kill(self) -> None:
        """SIGKILL all that live, with everything in their process groups."""
        self.ending = True
        for rank in self.alive():
            self.kill_one(rank)

    def kill_one(self, rank: Rank) -> None:
        """SIGKILL one; its end is reported as any other."""
        with contextlib.suppress(RequestError):  # it has ended, and the news of it is on its way
            self.forks.kill(rank.child, signal.SIGKILL)

    def close(self) -> None:
        """Disconnect and forget their files."""
        self.link.close()
        for rank in self.members.values():
            rank.files.error.unlink(missing_ok=True)

    def heartbeat(self, node: str) -> m.Heartbeat:
        """How far they are."""
        members = self.members.values()
        return m.Heartbeat(
            node=node,
            attempt=self.attempt,
            steps={rank.rank: rank.steps for rank in members if rank.steps is not None},
            step_seconds={rank.rank: rank.seconds for rank in members if rank.seconds is not None},
            own_seconds={rank.rank: rank.own_seconds for rank in members if rank.own_seconds is not None},
            metrics=dict(self.metrics),
            total=self.total,
        )

    def subjects(self) -> list[Subject]:
        """Those that live, for a look at their stacks."""
        return [Subject(r.rank, r.speaker_pid or r.pid, r.files.log, r.listens) for r in self.alive()]
