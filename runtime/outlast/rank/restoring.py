"""A rank's restore as a whole: images found, objects loaded, and what is left to be set before the first step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlast.protect import rng
from outlast.protect.leaves import Collector
from outlast.protect.reload import reload
from outlast.protect.resize import OnResize, differing_states
from outlast.protect.shards import Shards
from outlast.rank.link import AgentLink
from outlast.rank.sources import Restore, open_shards, telling_failures


@dataclass(frozen=True)
class Restored:
    """``session``: the session's own state; ``resized``: another number of ranks wrote it; ``source``: where from."""

    session: Mapping[str, Any]
    resized: bool
    source: str

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.session["step"])

    @property
    def seed(self) -> int:
        """What generators are derived from whenever the world changes."""
        return rng.seed_of(self.session["rng"])

    def set_generators(self, rank: int, world: int) -> None:
        """As they were, or derived for this world."""
        if self.resized:
            rng.derive(self.seed, self.step, rank, world)
        else:
            rng.restore(self.session["rng"])


def restore(
    link: AgentLink, message: Mapping[str, Any], collector: Collector, on_resize: OnResize | None, rank: int, world: int
) -> Restored:
    """Load what a ``restore`` message with a plan says. Raises StateError, and what reading images raises; the agent is
    told of what the job can do without.
    """
    plan = Restore.of(message)
    with telling_failures(plan, link), open_shards(plan, rank, world) as shards:
        session = reload(collector, shards, on_resize)
        if shards.resized and on_resize is None and rank == 0:
            _tell_of_differences(link, collector, shards)
        return Restored(session, shards.resized, plan.source(rank))


def _tell_of_differences(link: AgentLink, collector: Collector, shards: Shards) -> None:
    names = differing_states(collector, shards)
    if names:
        text = (
            f"{', '.join(names)}: each of the {shards.world} old ranks had a state of its own, and every rank goes on "
            "with rank 0's (run.protect(on_resize=...) can choose)"
        )
        link.send("note", kind="per-rank-state", text=text)
