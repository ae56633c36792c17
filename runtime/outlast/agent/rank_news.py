"""What ranks say and how they end, told to the controller."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

from outlast import messages as m
from outlast.agent.oom import MemoryKills
from outlast.agent.rank_messages import Speaker, error_of, event_of
from outlast.agent.ranklink import Message
from outlast.agent.ranks import Rank, Ranks
from outlast.agent.reactor import Reactor
from outlast.clock import Clock

ERROR_GRACE_S = 5.0
"""How long a rank that reported an exception may take to end by itself."""

_LAST_WORDS_S = 0.3
"""How long a dead rank's connection is waited for to be read to its end."""

Send = Callable[[dict[str, Any]], None]
"""Takes a message as JSON (``messages.to_json``, or ``Metrics`` and ``Info``, which are the driver's); never blocks."""


class RankNews:
    """One node's reporter. All methods are called on the reactor's thread. That a rank was killed is no news."""

    def __init__(self, node: str, reactor: Reactor, send: Send, clock: Clock, kills: MemoryKills) -> None:
        self._node, self._reactor, self._send, self._clock = node, reactor, send, clock
        self._kills = kills

    def exited(self, ranks: Ranks, rank: Rank) -> None:
        """The forkserver told of a rank's end; it is reported after the rank's last words."""
        why = self._kills.why(self._clock.monotonic())
        if rank.exit is not None and rank.exit.signal == signal.SIGKILL and not rank.killed:
            rank.why = why
        if rank.connected:
            self._reactor.after(_LAST_WORDS_S, lambda: self._report_once(ranks, rank))
        else:
            self._report_once(ranks, rank)

    def disconnected(self, ranks: Ranks, number: int) -> None:
        """All that a rank said has been read."""
        rank = ranks.members.get(number)
        if rank is not None:
            rank.connected = False
            if rank.exit is not None:
                self._report_once(ranks, rank)

    def said(self, ranks: Ranks, number: int, said: Message) -> None:
        """A rank sent a message."""
        rank = ranks.members.get(number)
        if rank is None or (ranks.ending and said.get("op") != "error"):
            return
        try:
            self._take(ranks, rank, said)
        except (KeyError, ValueError, TypeError) as error:
            text = f"rank {number} sent {said.get('op')!r} that cannot be read: {error!r}"
            self._emit(m.Note(self._node, number, "bad-message", text))

    def last_words(self, ranks: Ranks) -> None:
        """Before killed ranks are forgotten: tell of those that had failed by themselves; one may be the cause."""
        for rank in ranks.members.values():
            failed = rank.error is not None or rank.files.error.exists() or not rank.killed
            if rank.exit is not None and not rank.told and failed:
                rank.told = True
                self._report(ranks, rank)

    def failed_to_start(self, start: m.Start, error: Exception) -> None:
        """The node's ranks could not be made: as if the first had ended with that."""
        now = self._clock.wall()
        text = f"the ranks could not be started on {self._node}: {error}"
        told = m.ErrorInfo(now, type(error).__name__, text)
        self._emit(m.RankExited(self._node, start.attempt, start.seat * start.procs, error=told, time=now))

    def repeat(self, ranks: Ranks) -> None:
        """Tell a new controller which ranks are ready, and which are done."""
        for rank in ranks.members.values():
            if rank.ready is not None:
                self._emit(rank.ready)
            if rank.told:
                self._report(ranks, rank)

    def _emit(self, event: m.Event) -> None:
        self._send(m.to_json(event))

    def _report_once(self, ranks: Ranks, rank: Rank) -> None:
        if not rank.told and not ranks.ending:
            rank.told = True
            self._report(ranks, rank)

    def _report(self, ranks: Ranks, rank: Rank) -> None:
        for event in rank.end(self._node, ranks.attempt, self._clock.wall()):
            self._emit(event)

    def _take(self, ranks: Ranks, rank: Rank, said: Message) -> None:
        match said["op"]:
            case "hello":
                rank.connected, rank.speaker_pid = True, int(said["pid"])
                if ranks.restore is not None:
                    ranks.link.send(rank.rank, ranks.restore)
            case "step":
                rank.step(said)
                self._take_metrics(ranks, rank, said)
            case "error":
                rank.error = error_of(said)
                self._reactor.after(ERROR_GRACE_S, lambda: None if rank.exit else ranks.kill_one(rank))
            case "done":
                rank.done = said
                self._take_environment(rank, said)
        event = event_of(Speaker(self._node, ranks.attempt, rank.rank), said)
        if isinstance(event, m.RankReady):
            rank.ready = event
        if event is not None:
            self._emit(event)

    def _take_metrics(self, ranks: Ranks, rank: Rank, said: Message) -> None:
        """Every step's numbers of rank 0 go to the log of metrics, the first local rank's latest with heartbeats."""
        values, total = dict(said.get("metrics") or {}), said.get("total")
        ranks.total = int(total) if total is not None else ranks.total
        if rank.local_rank == 0:
            ranks.metrics = values
        if rank.rank == 0:
            told = {"attempt": str(ranks.attempt), "rank": 0, "step": rank.steps, "total": total, "metrics": values}
            self._send({"type": "Metrics", "node": self._node, **told})

    def _take_environment(self, rank: Rank, said: Message) -> None:
        if rank.rank == 0 and said.get("environment"):
            fields = {"environment": said["environment"]}
            self._send({"type": "Info", "node": self._node, "fields": fields})
