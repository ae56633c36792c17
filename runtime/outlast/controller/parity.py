"""The protection of one generation: which redundancy groups still make its parity, retried until all have it.

A group is asked as a whole, since each member encodes some stripes of every other; it is asked again when one of them
failed, after a growing pause, and not while the keeper of one of them is down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from outlast.controller.membership import Membership
from outlast.messages.instructions import Encode, Instruction
from outlast.snapshot.identity import Generation
from outlast.snapshot.placement import Group

MOST_TRIES = 5
FIRST_PAUSE_S = 0.25
LONGEST_PAUSE_S = 30.0
COMPLAIN_EVERY_S = 60.0


@dataclass
class _Work:
    """One group's encoding. ``waiting``: nodes that were asked and have not answered; ``due_at``: until when they may,
    or, when none is waiting, when to ask.
    """

    group: Group
    targets: tuple[int, ...] | None
    waiting: set[str] = field(default_factory=set)
    failure: str | None = None
    tries: int = 0
    due_at: float = 0.0

    def settle(self, now: float) -> None:
        """Nobody is waited for any more, and somebody failed: try again later."""
        self.waiting.clear()
        self.due_at = now + min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(self.tries - 1, 10))


class ParityRound:
    """Encodes ``generation`` in all groups. ``lengths``: rank -> image length; ``targets``: the members of each group
    that lack parity (None: all of all groups); ``forever``: failing often is no reason to stop.
    """

    def __init__(
        self,
        generation: Generation,
        slot: int,
        members: Membership,
        placed: Sequence[Group],
        lengths: Mapping[int, int],
        targets: Mapping[Group, tuple[int, ...]] | None = None,
        *,
        forever: bool = False,
    ) -> None:
        self._most_tries = math.inf if forever else MOST_TRIES
        self.generation, self.slot = generation, slot
        self._members, self._lengths = members, lengths
        self._procs = len(lengths) // max(1, len(members.seats))
        wanted = [group for group in placed if group.parity > 0 and (targets is None or group in targets)]
        self._work = [_Work(group, targets[group] if targets is not None else None) for group in wanted]
        self._of_node = {members.seats[seat]: i for i, work in enumerate(self._work) for seat in work.group.seats}
        self._open = set(range(len(self._work)))
        self._complain_at = 0.0

    @property
    def done(self) -> bool:
        """Whether every group has its parity."""
        return not self._open

    @property
    def hopeless(self) -> str | None:
        """Why a group that was asked too often failed; None while there is hope."""
        spent = (work for work in self._unfinished() if work.tries >= self._most_tries and not work.waiting)
        return next((work.failure or "no answer in time" for work in spent), None)

    def complaint(self, now: float) -> str | None:
        """What people are to know of a group that was asked often and still has no parity, once a minute."""
        if now < self._complain_at:
            return None
        failed = (work for work in self._unfinished() if work.tries >= MOST_TRIES and work.failure and not work.waiting)
        work = next(failed, None)
        if work is None:
            return None
        self._complain_at = now + COMPLAIN_EVERY_S
        return f"seats {list(work.group.seats)} have no parity after {work.tries} tries: {work.failure}"

    def due(self, now: float, patience_s: float) -> list[Instruction]:
        """Ask the groups whose turn has come; those that have not answered in time have failed."""
        asked: list[Instruction] = []
        for work in self._unfinished():
            if work.due_at > now:
                continue
            if work.waiting:
                work.failure = f"no answer in time from {', '.join(sorted(work.waiting))}"
                work.settle(now)
            elif work.tries < self._most_tries and self._keepers_up(work):
                asked += self._ask(work, now + patience_s)
        return asked

    def encoded(self, node: str, now: float) -> None:
        """A member's parity is sealed."""
        self._answer(node, None, now)

    def failed(self, node: str, reason: str, now: float) -> None:
        """A member could not encode, or its keeper died over it."""
        self._answer(node, reason, now)

    def retry_now(self, node: str, now: float) -> None:
        """A keeper is back: its group need not wait for the end of its pause."""
        index = self._of_node.get(node)
        if index in self._open and not self._work[index].waiting:
            self._work[index].due_at = now

    def _unfinished(self) -> list[_Work]:
        return [self._work[index] for index in sorted(self._open)]

    def _answer(self, node: str, failure: str | None, now: float) -> None:
        index = self._of_node.get(node)
        if index is None or index not in self._open or node not in self._work[index].waiting:
            return
        work = self._work[index]
        work.waiting.discard(node)
        work.failure = work.failure or failure
        if work.waiting:
            return
        if work.failure is None:
            self._open.discard(index)
        else:
            work.settle(now)

    def _keepers_up(self, work: _Work) -> bool:
        names = (self._members.seats[seat] for seat in work.group.seats)
        return all(self._members.nodes[name].keeper_up for name in names)

    def _ask(self, work: _Work, deadline: float) -> list[Instruction]:
        group, procs = work.group, self._procs
        names = [self._members.seats[seat] for seat in group.seats]
        peers = tuple(self._members.nodes[name].keeper for name in names)
        lengths = tuple(
            tuple(self._lengths[seat * procs + local_rank] for seat in group.seats) for local_rank in range(procs)
        )
        work.waiting, work.failure, work.due_at = set(names), None, deadline
        work.tries += 1
        return [
            Encode(name, self.generation, self.slot, group.seats, group.parity, i, lengths, peers, targets=work.targets)
            for i, name in enumerate(names)
        ]
