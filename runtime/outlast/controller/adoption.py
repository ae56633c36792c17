"""Taking over from a controller that died: what joined nodes say decides whether their ranks go on undisturbed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace

from outlast.controller import durable, ending, keeping
from outlast.controller.job import Job
from outlast.controller.phases import Phase
from outlast.controller.progress import Progress
from outlast.controller.recovery import Restored, seat_groups, unprotected
from outlast.controller.settings import MachineConfig
from outlast.controller.snapshot_work import Committed
from outlast.controller.snapshots import SnapshotCycle
from outlast.messages.events import Joined, RankDone, RankExited, RankReady, RestoreReady
from outlast.messages.instructions import Stop
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import GUEST_SLOT, HeldImage, Inventory
from outlast.snapshot.placement import Group


@dataclass
class Gathering:
    """What the nodes said when they joined, and what they and their ranks have said since."""

    joined: dict[str, Joined] = field(default_factory=dict)
    last_join: float = 0.0
    said: dict[str, list[RestoreReady | RankReady | RankDone]] = field(default_factory=dict)

    def add(self, event: Joined, now: float) -> None:
        """A node joined."""
        self.joined[event.node] = event
        self.said[event.node] = []
        self.last_join = now

    def hear(self, event: RestoreReady | RankReady | RankDone | RankExited) -> None:
        """A joined node has what it lacked, or a rank of it is ready, or has ended, well or not."""
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
        whole = set(seats) == set(range(len(seats))) and self._all_of(newest, len(seats), config)
        return (newest, dict(sorted(seats.items()))) if whole else None

    def _all_of(self, attempt: Attempt, size: int, config: MachineConfig) -> bool:
        """Whether so many nodes are all that the attempt has, which may be another number than is wanted by now."""
        world = max(event.world_nodes for event in self.joined.values() if event.attempt == attempt)
        if world:
            return size == world
        if not config.least <= size <= config.replicas:
            return False
        return size == config.replicas or self.held_size(config, attempt) == size

    def held_size(self, config: MachineConfig, attempt: Attempt | None = None) -> int | None:
        """How many nodes wrote the newest images that are held (those of ``attempt`` if there are any); None when they
        do not say."""
        images = [image for event in self.joined.values() for image in event.held if image.world]
        own = [image for image in images if attempt is not None and image.generation.taken_by(attempt)]
        newest = max(own or images, key=lambda image: image.generation, default=None)
        return None if newest is None else newest.world // config.procs

    def expected(self, config: MachineConfig) -> int:
        """The nodes to wait for: as many as wrote the newest images, if there are any, else all that are wanted."""
        return self.held_size(config) or config.replicas

    def history(self) -> bool:
        """Whether anything was ever started: then nodes that are still to come may hold what is needed."""
        return any(event.best_seen_attempt or event.attempt or event.held for event in self.joined.values())

    def complete(self, config: MachineConfig) -> bool:
        """Whether nobody else is expected to bring a part of the state: of the newest snapshot, or of its attempt's one
        before, which is whole while that is taken. Older ones lie on nodes that were away meanwhile."""
        if any(event.running for event in self.joined.values()):
            return False
        seats: dict[Generation, set[int]] = defaultdict(set)
        for image in (image for event in self.joined.values() for image in event.held if image.kind == "shard"):
            seats[image.generation].add(image.seat)
        wanted = set(range(self.expected(config)))
        last = sorted(seats)[-2:]
        return any(seats[generation] == wanted and generation.same_attempt(last[-1]) for generation in last)

    def restart_count(self) -> int:
        """The most restarts that any node was told of."""
        return max((event.restart_count for event in self.joined.values()), default=0)


def newest_whole(
    joined: Mapping[int, Joined], attempt: Attempt, placed: Sequence[Group], procs: int
) -> Restored | None:
    """The newest generation of which every seat's node says that it holds all of its ranks' images: one that
    ``attempt`` took or began with, as others may have been passed over as damaged.

    ``joined``: what the seats' nodes say, unverified. It is treated like one that was restored: protected again
    before its slot's neighbour is written, since the controller that died may not have come to that.
    """
    world, begun = len(joined) * procs, joined[0].restores
    images: dict[Generation, dict[int, HeldImage]] = {}
    for seat, event in joined.items():
        for image in event.held:
            its_own = image.kind == "shard" and image.seat == seat and image.local_rank < procs
            counts = image.generation.taken_by(attempt) or image.generation == begun
            if its_own and counts and image.world in (0, world):
                images.setdefault(image.generation, {})[seat * procs + image.local_rank] = image
    whole = [generation for generation, ranks in images.items() if len(ranks) == world]
    if not whole:
        return None
    newest = max(whole)
    ranks = images[newest]
    inventories = {seat: Inventory("", event.held) for seat, event in joined.items()}
    targets = unprotected(newest, inventories, placed, procs)
    return Restored(newest, ranks[0].slot, {rank: image.length for rank, image in ranks.items()}, targets)


def to_keep(joined: Mapping[int, Joined], whole: Restored | None) -> tuple[Restored | None, bool]:
    """What an attempt's next snapshot must not write over, and whether nodes may still make images of it.

    ``whole``: its newest whole generation. When it began with a newer one, then either some of the images were not
    there yet as the controller died, or ranks read from those of another world, which no node has as its own. Where
    the store has it, nothing is lost with them. All nodes of an attempt were told the same of its beginning.
    """
    begun = joined[0].restores
    if begun is None or joined[0].stored or (whole is not None and whole.generation >= begun):
        return whole, False
    images = [image for event in joined.values() for image in event.held if image.kind == "shard"]
    slots = {image.slot for image in images if image.generation == begun}
    if not slots:
        return whole, False
    slot = min((slot for slot in slots if slot < GUEST_SLOT), default=None)
    return Restored(begun, slot, {}, {}, direct=True), True


def gathered(job: Job, gathering: Gathering, now: float) -> None:
    """Begin, or go on with what outlived another controller, once enough nodes are here."""
    gathering.keep(job.members.alive)
    running = gathering.running(job.config)
    if running is not None:
        _adopt(job, gathering, *running, now)
        return
    config, here, expected = job.config, job.members.usable, gathering.expected(job.config)
    enough = here >= expected
    waited = now - max(job.began, gathering.last_join)
    if not enough and waited >= config.shrink_after_s:
        enough = here >= config.least
    settled = now - gathering.last_join >= config.patience.settle_s
    if enough and (settled or not gathering.history() or gathering.complete(config)):
        job.restart_count = gathering.restart_count()
        job.begin_attempt(now)
        if job.preparation is not None:
            job.preparation.size = max(min(config.least, expected), min(here, config.replicas))


def _adopt(job: Job, gathering: Gathering, attempt: Attempt, seats: dict[int, str], now: float) -> None:
    """The ranks of ``attempt`` run: let them."""
    job.attempt, job.restart_count = attempt, gathering.restart_count()
    job.story.last_attempt = attempt.number
    if job.started is None:
        job.started = now + job.epoch
    keeping.keep(job)
    job.members.seat_all(seats)
    placed = seat_groups(job.config, job.members, seats)
    joined = {seat: gathering.joined[name] for seat, name in seats.items()}
    whole = newest_whole(joined, attempt, placed, job.config.procs)
    restored, job.half_restored = to_keep(joined, whole)
    begun = joined[0].restores
    job.resumes, job.progress = begun is not None, Progress(now, begun.step if begun is not None else 0)
    job.cycle = SnapshotCycle(job.around, attempt, placed, restored, adopted=True)
    if restored is not None and not restored.direct:
        job.inherited = Committed(restored.generation, restored.slot or 0, restored.lengths)
    job.emit("adopted", f"attempt {attempt.number} goes on under a new controller", attempt=attempt.number)
    job.enter(Phase.RUNNING, now)
    job.story.running(0, now)
    job.load_again_at = now + job.config.patience.settle_s
    job.out += [Stop(name, attempt) for name, node in job.members.alive.items() if node.seat is None]
    durable.claim_again(job, now)
    job.awaiting = set(seats.values())
    for event in (event for name in seats.values() for event in gathering.said[name]):
        match event:
            case RestoreReady():
                job.awaiting.discard(event.node)
            case RankDone():
                ending.rank_done(job, event.rank, event.digest, event.steps, now)
            case RankReady():
                durable.hear_about(job, event)
                job.rank_ready(event.rank, now)
