"""Making sure that no rank of a node lives any more, nor one that an agent before this one left behind."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from outlast.agent.forkclient import ForkClient
from outlast.agent.ranks import Ranks
from outlast.errors import RequestError

_ROLE = "rank-"


@dataclass
class Clearing:
    """Ranks were killed; ``then`` is to be called once their ends are confirmed, or at ``deadline`` without.

    ``leftovers`` are forkserver's children of earlier agents, child -> rank; their ends are not told, but asked for.
    """

    ranks: Ranks | None
    forks: ForkClient
    procs: int
    deadline: float
    then: Callable[[frozenset[int]], None]
    leftovers: dict[str, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Kill them all."""
        if self.ranks is not None:
            self.ranks.kill()
        self.leftovers = self._leftovers()
        for child in self.leftovers:
            with contextlib.suppress(RequestError):  # gone between the question and the order
                self.forks.kill(child, signal.SIGKILL)

    def unconfirmed(self) -> frozenset[int]:
        """The local ranks whose ends are not confirmed yet."""
        if self.leftovers:
            self.leftovers = self._leftovers()
        living = [rank.rank for rank in self.ranks.alive()] if self.ranks is not None else []
        return frozenset(rank % self.procs for rank in (*living, *self.leftovers.values()))

    def _leftovers(self) -> dict[str, int]:
        own = {rank.child for rank in self.ranks.members.values()} if self.ranks is not None else set()
        children = self.forks.state().children
        return {
            child.id: int(child.role.removeprefix(_ROLE))
            for child in children
            if child.role.startswith(_ROLE) and child.id not in own
        }
