"""Taking over from a controller that died: what joined nodes say decides whether their ranks go on undisturbed."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from outlast.controller.job import Job
from outlast.controller.phases import Phase
from outlast.controller.progress import Progress
from outlast.controller.recovery import Restored, seat_groups, unprotected
from outlast.controller.settings import MachineConfig
from outlast.controller.snapshots import SnapshotCycle
from outlast.messages.events import Joined, RankDone, RankExited, RankReady
from outlast.messages.instructions import Stop
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import HeldImage, Inventory
from outlast.snapshot.placement import Group


@dataclass
class Gathering:
    """What the nodes said when they joined, and what their ranks have said since."""

    joined: dict[str, Joined] = field(default_factory=dict)
    last_join: float = 0.0
    said: dict[str, list[RankReady | RankDone]] = field(default_factory=dict)

    def add(self, event: Joined, now: float) -> None:
        """A node joined."""
        self.joined[event.node] = event
        self.said[event.node] = []
        self.last_join = now

    def hear(self, event: RankReady | RankDone | RankExited) -> None:
        """A rank of a joined node is ready, or has ended, well or not."""
        joined = self.joined.get(event.node)
        if joined is None or joined.attempt != event.attempt:
            return
        if isinstance(event, RankExited):
            self.joined[event.node] = replace(joined, running=False)
        else:
            self.said[event.node].append(event)

    def keep(self, alive: Container[str]) -> None:
        """Forget who is not alive any more."""
        self.joined = {name: event for name, event in self.joined.items() if name in alive}

    def running(self, config: MachineConfig) -> tuple[Attempt, dict[int, str]] | None:
        """The attempt that runs on all seats, with their nodes; None when there is no such attempt."""
        by_attempt: dict[Attempt, dict[int, str]] = {}
        for event in self.joined.values():
            if event.running and event.attempt is not None and event.seat is not None:
                by_attempt.setdefault(event.attempt, {})[event.seat] = event.node
        if not by_attempt:
            return None
        newest = max(by_attempt)
        seats = by_attempt[newest]
        whole = set(seats) == set(range(config.replicas))
        return (newest, dict(sorted(seats.items()))) if whole else None

    def history(self) -> bool:
        """Whether anything was ever started: then nodes that are still to come may hold what is needed."""
        return any(event.best_seen_attempt or event.attempt or event.held for event in self.joined.values())

    def complete(self, config: MachineConfig) -> bool:
        """Whether nobody else is expected to bring a part of the state."""
        if any(event.running for event in self.joined.values()):
            return False
        if len(self.joined) >= config.replicas + config.spares:
            return True
        held = {image.seat for event in self.joined.values() for image in event.held if image.kind == "shard"}
        return held == set(range(config.replicas))

    def restart_count(self) -> int:
        """The most restarts that any node was told of."""
        return max((event.restart_count for event in self.joined.values()), default=0)


def newest_whole(held: Mapping[int, Sequence[HeldImage]], placed: Sequence[Group], procs: int) -> Restored | None:
    """The newest generation of which every seat's node says that it holds all of its ranks' images.

    ``held``: what the keepers of the seats say, unverified. It is treated like one that was restored: protected again
    before its slot's neighbour is written, since the controller that died may not have come to that.
    """
    images: dict[Generation, dict[int, HeldImage]] = {}
    for seat, own in held.items():
        for image in own:
            if image.kind == "shard" and image.seat == seat and image.local_rank < procs:
                images.setdefault(image.generation, {})[seat * procs + image.local_rank] = image
    whole = [generation for generation, ranks in images.items() if len(ranks) == len(held) * procs]
    if not whole:
        return None
    newest = max(whole)
    ranks = images[newest]
    inventories = {seat: Inventory("", tuple(own)) for seat, own in held.items()}
    targets = unprotected(newest, inventories, placed, procs)
    return Restored(newest, ranks[0].slot, {rank: image.length for rank, image in ranks.items()}, targets)


def gathered(job: Job, gathering: Gathering, now: float) -> None:
    """Begin, or go on with what outlived another controller, once enough nodes are here."""
    gathering.keep(job.members.alive)
    running = gathering.running(job.config)
    if running is not None:
        _adopt(job, gathering, *running, now)
        return
    enough = len(job.members.alive) >= job.config.replicas
    settled = now - gathering.last_join >= job.config.patience.settle_s
    if enough and (settled or not gathering.history() or gathering.complete(job.config)):
        job.restart_count = gathering.restart_count()
        job.begin_attempt(now)


def _adopt(job: Job, gathering: Gathering, attempt: Attempt, seats: dict[int, str], now: float) -> None:
    """The ranks of ``attempt`` run: let them."""
    job.attempt, job.restart_count = attempt, gathering.restart_count()
    job.story.last_attempt = attempt.number
    job.members.seat_all(seats)
    job.progress = Progress(now)
    placed = seat_groups(job.config, job.members, seats)
    held = {seat: gathering.joined[name].held for seat, name in seats.items()}
    restored = newest_whole(held, placed, job.config.procs)
    job.cycle = SnapshotCycle(job.config, job.members, attempt, placed, restored, job.totals, adopted=True)
    job.emit("adopted", f"attempt {attempt.number} goes on under a new controller", attempt=attempt.number)
    job.enter(Phase.RUNNING, now)
    job.story.running(0, now)
    job.load_again_at = now + job.config.patience.settle_s
    job.out += [Stop(name, attempt) for name, node in job.members.alive.items() if node.seat is None]
    for event in (event for name in seats.values() for event in gathering.said[name]):
        if isinstance(event, RankDone):
            job.rank_done(event.rank, event.digest, event.steps, now)
        else:
            job.rank_ready(event.rank, now)
