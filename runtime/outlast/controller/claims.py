"""The claim of the job's checkpoints by the living attempt, and what they are. Pure.

::

    ask -> Claim -> Claimed        checkpoints may be restored and committed
                 -> ClaimFailed    unavailable, denied: go on without; Claimed may come later
                                   lost to another controller: the job is over

A store that does not answer holds a restart back for ``patience.claim_s`` and no longer, unless nothing is left in
memory: then to begin without it would be to begin anew. It is waited for then, but not one that denies.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from outlast.messages.events import Claimed, ClaimFailed
from outlast.messages.instructions import Claim, Instruction
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.stored import StoredCheckpoint

MOST = 8
"""Checkpoints that are known at most: as many as a claim is answered with."""


class Claims:
    """``stored``: the checkpoints that may be restored, newest first, those of other jobs last; None until the store
    was heard. ``excluded``: generations that turned out to be damaged. ``denied``: why the store refuses the claim, ""
    while it does not. ``enabled`` False: the job has no store.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.stored: tuple[StoredCheckpoint, ...] | None = None if enabled else ()
        self.excluded: set[Generation] = set()
        self.claimed: Attempt | None = None
        self.denied = ""
        self._asked: Attempt | None = None
        self._wait_until = -math.inf

    def ask(self, attempt: Attempt, now: float, patience_s: float) -> list[Instruction]:
        """Claim for ``attempt``, and wait for the answer for so long."""
        if not self.enabled:
            return []
        self._asked, self.claimed, self._wait_until, self.denied = attempt, None, now + patience_s, ""
        return [Claim(attempt)]

    def pending(self, now: float) -> bool:
        """Whether an answer is worth waiting for."""
        return self.enabled and self.claimed is None and now < self._wait_until

    @property
    def unknown(self) -> bool:
        """Whether there may be checkpoints that nobody has heard of yet."""
        return self.stored is None

    def current(self, event: Claimed | ClaimFailed) -> bool:
        """Whether it answers the newest claim."""
        return self.enabled and event.attempt == self._asked

    def take(self, event: Claimed) -> None:
        """The claim is ours. While it is not known what another job lends, what was known of that before counts: there
        are none of this job's own."""
        self.claimed, self.denied = event.attempt, event.unseen if event.denied else ""
        if event.unseen:
            self.stored = tuple(known for known in self.stored or () if known.foreign) or None
            return
        self.stored = tuple(found for found in event.stored if found.generation not in self.excluded or found.foreign)

    def fail(self, denied: str = "") -> None:
        """The store does not answer, or denies: wait for it no longer."""
        self._wait_until, self.denied = -math.inf, denied

    def add(self, checkpoint: StoredCheckpoint) -> None:
        """A checkpoint was committed."""
        others = [known for known in self.stored or () if known.generation != checkpoint.generation]
        own = [known for known in others if not known.foreign]
        self.stored = (checkpoint, *own[: MOST - 1])

    def forget(self, generations: Collection[Generation]) -> None:
        """They are not in the store any more."""
        if self.stored is not None:
            self.stored = tuple(known for known in self.stored if known.foreign or known.generation not in generations)

    def exclude(self, generation: Generation) -> StoredCheckpoint | None:
        """Never restore it again; returns it when it was in the store. After the last that another job lends the store
        has to be heard anew: to begin without any is not what was asked for."""
        found = next((known for known in self.stored or () if known.generation == generation), None)
        self.excluded.add(generation)
        if self.stored is not None:
            left = tuple(known for known in self.stored if known is not found)
            self.stored = None if found is not None and found.foreign and not left else left
        return found

    @property
    def newest(self) -> StoredCheckpoint | None:
        """The newest checkpoint of this job's own."""
        own = (known for known in self.stored or () if not known.foreign)
        return max(own, key=lambda known: known.generation, default=None)

    def holds_step(self, step: int) -> bool:
        """Whether there is a checkpoint of this job's own that was taken after so many steps."""
        return any(known.generation.step == step for known in self.stored or () if not known.foreign)
