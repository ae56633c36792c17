"""A simulated cluster around the controller's machine: nodes, keepers and ranks in virtual time, and their faults.

``Cluster`` performs the machine's instructions after short delays and feeds back what agents would say. Ranks of an
attempt step together, as collectives make them. At every instruction it checks what must always hold:

- ranks of two attempts never run on nodes that the controller counts as alive;
- no permit while a keeper does not know the last commit;
- what could be restored before a snapshot's copy began, from memory or the store, can still be once it has begun;
- an image is not overwritten while it is uploaded, and no two generations are uploaded at a time;
- a node that was told to leave gets no seat.
"""

from __future__ import annotations

import heapq
import itertools
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from outlast import messages as m
from outlast.controller.machine import Machine
from outlast.controller.settings import MachineConfig
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import GUEST_SLOT, GroupInfo, HeldImage, Inventory, RankRestore, RestorePlan
from outlast.snapshot.restore import plan_restore
from support.simulated_store import SimStore

LENGTH = 1 << 20
HEARTBEAT_S = 0.25
TICK_S = 0.1
EPOCH = 1_700_000_000.0


@dataclass
class SimNode:
    """One node: its agent, its keeper's files, and the attempt that its ranks belong to."""

    name: str
    domain: str
    alive: bool = True
    paused: bool = False
    agent_up: bool = True
    keeper_up: bool = True
    registration: str = ""
    fence: Attempt | None = None
    seat: int | None = None
    running: Attempt | None = None
    dead_ranks: set[int] = field(default_factory=set)
    rebuilt: bool = False
    load: m.Load | None = None
    begun: Attempt | None = None
    loaded: bool = False
    done: dict[int, str] = field(default_factory=dict)
    images: dict[tuple[str, int, int], HeldImage] = field(default_factory=dict)
    permits: dict[Generation, m.Permit] = field(default_factory=dict)
    held: Generation | None = None
    at_end: bool = False
    world_nodes: int = 0
    restores: RestorePlan | None = None
    upload: object = None
    leaving: bool = False
    memory: int | None = None
    keeper_port: int = 7000
    backlog: list[m.Instruction] = field(default_factory=list)

    @property
    def hears(self) -> bool:
        return self.alive and not self.paused and self.agent_up

    def inventory(self) -> Inventory:
        return Inventory(self.name, tuple(self.images.values()))


class Cluster:
    """``handled`` counts events and ``handling_s`` the real seconds that the machine took for them; ``sums``: over so
    many steps ranks sum gradients; ``rebuild_s``: what a node takes to get what it lacks."""

    def __init__(
        self,
        config: MachineConfig,
        nodes: int,
        total: int = 60,
        step_s: float = 0.2,
        domains: int | None = None,
        check: bool = True,
    ) -> None:
        self.config, self.total, self.step_s, self.check = config, total, step_s, check
        self.now = 100.0
        self._ids = itertools.count()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._incarnations = itertools.count(1)
        self._last_name = 0
        self._domains = domains
        self.nodes: dict[str, SimNode] = {}
        self.step: dict[Attempt, int] = {}
        self.hung: set[int] = set()
        self.restores: list[m.Start] = []
        self.log: list[m.Emit] = []
        self._counts: Counter[str] = Counter()
        self.given_up: set[str] = set()
        self.finished: m.Finish | None = None
        self.unacked: set[str] = set()
        self.kept: Generation | None = None
        self.store = SimStore()
        self.script = "script-1"
        self.released: list[str] = []
        self.left = m.Kept()
        self.injuries: list[m.Injure] = []
        self._last_size: int | None = None
        self.uploading: dict[Generation, set[str]] = defaultdict(set)
        self._sizes: dict[Attempt, int] = {}
        self._at_seat: dict[tuple[Attempt | None, int], SimNode] = {}
        self._loaded: dict[Attempt, set[int]] = defaultdict(set)
        self.handled, self.handling_s = 0, 0.0
        self.epoch = 0
        self.sums = 1
        self.rebuild_s = 0.05
        self.machine = self._new_machine()
        for _ in range(nodes):
            self.add_node()
        self._every(TICK_S, lambda: self.tell(m.Tick()))

    # --- time -------------------------------------------------------------------------------------------------------

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (self.now + delay, next(self._ids), action))

    def _every(self, interval: float, action: Callable[[], None]) -> None:
        def again() -> None:
            action()
            self.at(interval, again)

        self.at(interval, again)

    def run(self, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Let virtual time pass; True as soon as ``until`` holds."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, action = heapq.heappop(self._queue)
            action()
            if until is not None and until():
                return True
        self.now = max(self.now, end)
        return until is not None and until()

    def run_to_end(self, seconds: float = 600.0) -> m.Finish:
        assert self.run(seconds, lambda: self.machine.over), self._where()
        assert self.finished is not None
        return self.finished

    def run_to_step(self, step: int, seconds: float = 300.0) -> None:
        assert self.run(seconds, lambda: self.live_step() >= step), self._where()

    def run_to(self, kind: str, seconds: float = 120.0) -> m.Emit:
        seen = self._counts[kind]
        assert self.run(seconds, lambda: self._counts[kind] > seen), f"no {kind}: {self._where()}"
        return [line for line in self.log if line.kind == kind][seen]

    def _where(self) -> dict[str, object]:
        """The controller's status, short enough to be read."""
        status = self.machine.status(self.now)
        return {**status, "nodes": dict(itertools.islice(status["nodes"].items(), 8))}

    def kinds(self) -> list[str]:
        return [line.kind for line in self.log]

    def live_step(self) -> int:
        attempt = self.machine.job.attempt
        return self.step.get(attempt, 0) if attempt is not None and self.machine.job.phase.value == "running" else 0

    # --- the controller ---------------------------------------------------------------------------------------------

    def _new_machine(self) -> Machine:
        return Machine(self.config, self.now, lambda: f"{next(self._incarnations):016x}", EPOCH, self.left)

    def tell(self, event: m.Event) -> None:
        if isinstance(event, m.CommitAcked):
            self.unacked.discard(event.node)
        began = time.perf_counter()
        instructions = self.machine.handle(event, self.now)
        self.handling_s += time.perf_counter() - began
        self.handled += 1
        for instruction in instructions:
            self._perform(instruction)

    def say(self, event: m.Event, delay: float = 0.005) -> None:
        """A message to the controller of now; lost when that is another one by then."""
        epoch = self.epoch

        def arrive() -> None:
            if epoch == self.epoch and self.nodes[event.node].alive:  # type: ignore[union-attr]
                self.tell(event)

        self.at(delay, arrive)

    def _perform(self, instruction: m.Instruction) -> None:
        match instruction:
            case m.Emit():
                self.log.append(instruction)
                self._keep(instruction)
            case m.Finish():
                assert self.finished is None
                self.finished = instruction
                self.at(0.1, lambda: self.tell(m.Finalized()))
            case m.Remember():
                self.left = instruction.kept
            case m.Crash():
                self.at(0.0, self.restart_controller)
            case m.GiveUp():
                self.given_up.add(instruction.node)
            case m.AskKeeper():
                node = self.nodes[instruction.node]
                if node.alive and not node.paused and node.keeper_up:
                    self.say(m.KeeperAnswered(node.name), 0.02)
            case m.Claim():
                self._claim(instruction, self.epoch)
            case m.CommitCheckpoint():
                self.at(0.05, lambda: self._commit_checkpoint(instruction, self.epoch))
            case m.Quarantine():
                self.store.quarantine(instruction.generation)
            case m.Permit() | m.Abort() | m.Commit() | m.Load() | m.Proceed() | m.Upload():
                self._check_broadcast(instruction)
                for name in instruction.nodes:
                    self._send(name, instruction)
            case _:
                if isinstance(instruction, m.Start):
                    self._check_start(instruction)
                self._send(instruction.node, instruction)

    def _send(self, name: str, instruction: m.Instruction) -> None:
        self.at(0.01, lambda: self._deliver(name, instruction))

    def _deliver(self, name: str, instruction: m.Instruction) -> None:
        node = self.nodes[name]
        if node.alive and node.paused:
            node.backlog.append(instruction)
        elif node.hears:
            getattr(self, f"_on_{type(instruction).__name__.lower()}")(node, instruction)

    # --- invariants -------------------------------------------------------------------------------------------------

    def _check_broadcast(self, instruction: m.Instruction) -> None:
        if isinstance(instruction, m.Commit):
            self.unacked |= set(instruction.nodes)
        if isinstance(instruction, m.Permit):
            assert not self.unacked, f"permit while {self.unacked} do not know the last commit"

    def _check_start(self, start: m.Start) -> None:
        self.unacked = set()
        self.restores.append(start)
        if not self.check:
            return
        assert not self.machine.job.members.nodes[start.node].leaving, f"{start.node} was told to leave"
        seats = self.machine.job.members.seats
        assert sorted(seats) == list(range(start.world_nodes)), seats
        least = self.machine.config.least
        assert len(seats) >= (least if self._last_size is None else min(least, self._last_size))
        assert len(seats) <= self.machine.config.replicas
        self._last_size = len(seats)
        for name in self.machine.job.members.alive:
            node = self.nodes[name]
            if node.alive and node.running is not None:
                assert node.running == start.attempt, f"{node.name} still runs {node.running}"

    def recoverable(self) -> Generation | None:
        """The newest generation that can be restored from the nodes that the controller knows to be alive, and that is
        not older than what it has committed or restored.
        """
        members, kept = self.machine.job.members, self.kept
        left = [self.nodes[name].inventory() for name in members.alive if self.nodes[name].alive]
        if kept is None or not members.seats:
            return None
        stored = [] if self.config.checkpoint is None else self.store.restorable()
        plan = plan_restore(left, members.seats, self.config.procs, stored, self.store.quarantined)
        return plan.generation if plan is not None and kept is not None and plan.generation >= kept else None

    def _keep(self, line: m.Emit) -> None:
        """What must not be lost from now on."""
        self._counts[line.kind] += 1
        if line.kind in ("snapshot-committed", "protected", "restored"):
            self.kept = Generation.parse(line.fields["generation"])
        elif line.kind == "restored-none":
            self.kept = None

    # --- agents -----------------------------------------------------------------------------------------------------

    def add_node(self, memory: int | None = None) -> str:
        number = self._last_name
        self._last_name += 1
        domain = f"d{number % self._domains}" if self._domains else f"m{number}"
        node = SimNode(f"node-{number}", domain, memory=memory)
        self.nodes[node.name] = node
        self.at(0.05 + 0.0001 * (number % 997), lambda: self.join(node))
        offset = HEARTBEAT_S * ((number * 0.618) % 1.0)
        self.at(offset, lambda: self._every(HEARTBEAT_S, lambda: self._heartbeat(node)))
        return node.name

    def join(self, node: SimNode) -> None:
        if not node.hears:
            if node.alive:
                self.at(0.5, lambda: self.join(node))
            return
        node.registration = node.registration or f"r{next(self._ids)}"
        procs = self.config.procs
        ranks = set() if node.seat is None else set(range(node.seat * procs, (node.seat + 1) * procs))
        running = node.running is not None and not node.dead_ranks & (ranks - set(node.done))
        self.say(
            m.Joined(
                node.name,
                node.domain,
                "127.0.0.1",
                node.running,
                node.seat if node.running else None,
                running,
                ("127.0.0.1", node.keeper_port),
                9000,
                procs,
                best_seen_attempt=node.fence.number if node.fence else 0,
                held=node.inventory().images,
                registration=node.registration,
                memory=node.memory,
                world_nodes=node.world_nodes if running else 0,
                restores=node.restores.generation if running and node.restores is not None else None,
                stored=running and node.restores is not None and "object" in node.restores.origins(),
            )
        )
        if node.leaving:
            self.say(m.Leaving(node.name, 30.0, "again"), 0.006)
        if running and node.running is not None:
            self._repeat(node, node.running)

    def _repeat(self, node: SimNode, attempt: Attempt) -> None:
        """A new controller may not know which ranks are ready or done, nor who has what it lacked."""
        if node.rebuilt:
            self.say(m.RestoreReady(node.name, attempt), 0.006)
        for rank in self._ranks(node) if node.loaded else ():
            self.say(m.RankReady(node.name, attempt, rank, 0, 0.01, "x", self._about(rank)), 0.006)
        for rank, digest in node.done.items():
            self.say(m.RankDone(node.name, attempt, rank, digest, self.step[attempt]), 0.006)

    def _heartbeat(self, node: SimNode) -> None:
        if not node.hears:
            return
        steps: dict[int, int] = {}
        seconds: dict[int, float] = {}
        if node.running is not None and node.loaded:
            step = self.step.get(node.running, 0)
            for rank in self._ranks(node):
                steps[rank], seconds[rank] = step, self.step_s
        event = m.Heartbeat(node.name, node.running, steps, seconds, seconds, {}, self.total)
        self.say(event, 0.001)

    def _ranks(self, node: SimNode) -> range:
        procs, seat = self.config.procs, node.seat or 0
        return range(seat * procs, (seat + 1) * procs)

    def _kill_ranks(self, node: SimNode) -> None:
        node.running, node.loaded, node.dead_ranks, node.done = None, False, set(), {}
        node.permits.clear()
        node.held, node.at_end = None, False

    def _about(self, rank: int) -> dict[str, str]:
        return {"script": self.script} if rank == 0 else {}

    def _on_stop(self, node: SimNode, stop: m.Stop) -> None:
        if node.fence is not None and stop.attempt.number < node.fence.number:
            return
        if node.running != stop.attempt:
            self._kill_ranks(node)
        if node.fence != stop.attempt:
            for names in self.uploading.values():
                names.discard(node.name)
        node.fence = stop.attempt
        self.say(m.Stopped(node.name, stop.attempt, node.inventory(), free_port=9001), 0.02)

    def _on_register(self, node: SimNode, _: m.Register) -> None:
        self._kill_ranks(node)
        self.given_up.discard(node.name)
        node.registration = ""
        self.join(node)

    def _on_start(self, node: SimNode, start: m.Start) -> None:
        if start.attempt in (node.begun, None) or node.fence != start.attempt:
            return
        node.begun = start.attempt
        self._kill_ranks(node)
        node.seat, node.running, node.world_nodes = start.seat, start.attempt, start.world_nodes
        node.rebuilt, node.load = False, None
        node.restores = start.restore
        self._sizes[start.attempt] = start.world_nodes
        self._at_seat[start.attempt, start.seat] = node
        self.at(self.rebuild_s, lambda: self._rebuild(node, start))

    def _rebuild(self, node: SimNode, start: m.Start) -> None:
        plan = start.restore
        if node.running != start.attempt or not node.hears:
            return
        for item in plan.on_node(node.name) if plan is not None else ():
            assert plan is not None
            if item.source == "memory-local" or (plan.direct and item.source != "memory-decode"):
                continue
            if item.source == "object" and self._not_read(node, start, item):
                return
            self._make(node, item, plan.generation, len(plan.ranks))
        node.rebuilt = True
        self.say(m.RestoreReady(node.name, start.attempt))
        self.step.setdefault(start.attempt, plan.generation.step if plan is not None else 0)
        if node.load is not None:
            self._on_load(node, node.load)

    def _make(self, node: SimNode, item: RankRestore, generation: Generation, world: int) -> None:
        key = ("shard", item.local_rank, item.slot)
        old_parity = node.images.get(("parity", *key[1:]))
        if old_parity is not None and old_parity.generation != generation:
            del node.images["parity", item.local_rank, item.slot]
        node.images[key] = HeldImage(
            node.name, item.seat, item.local_rank, item.slot, generation, "shard", item.length, world=world
        )

    def _not_read(self, node: SimNode, start: m.Start, item: RankRestore, rank: int | None = None) -> bool:
        """Whether an image in the store cannot be had; then it is told."""
        assert start.restore is not None
        generation = start.restore.generation
        foreign = any(known.url == item.url for known in self.store.foreign)
        trouble = self.store.read(generation, item.rank, foreign)
        if trouble is not None:
            reason = f"{item.key}: {trouble}"
            self.say(m.RestoreFailed(node.name, start.attempt, generation, reason, trouble, rank), 0.02)
        return trouble is not None

    def _on_load(self, node: SimNode, load: m.Load) -> None:
        if node.running != load.attempt or node.loaded:
            return
        if not node.rebuilt:
            node.load = load
            return
        start = next(start for start in reversed(self.restores) if start.attempt == load.attempt)
        plan = start.restore
        for item in plan.ranks if plan is not None and plan.direct else ():
            if item.source == "object" and self._not_read(node, start, item, self._ranks(node)[0]):
                return
        node.loaded = True
        for rank in self._ranks(node):
            step, source = self.step[load.attempt], "x"
            self.say(m.RankReady(node.name, load.attempt, rank, step, 0.01, source, self._about(rank)), 0.03)
        self._loaded[load.attempt].add(node.seat or 0)
        if len(self._loaded[load.attempt]) == self._sizes[load.attempt]:
            at_end = self.step[load.attempt] >= self.total
            self.at(self.step_s, lambda: self._reach_end(load.attempt) if at_end else self._do_step(load.attempt))

    # --- ranks ------------------------------------------------------------------------------------------------------

    def _together(self, attempt: Attempt) -> list[SimNode] | None:
        """The nodes of an attempt, if all its ranks can take part in a collective."""
        mine = [node for node in self.nodes.values() if node.running == attempt]
        if len(mine) < self._sizes[attempt] or not all(n.alive and n.loaded and not n.dead_ranks for n in mine):
            return None
        return None if any(n.paused for n in mine) or self.hung else mine

    def _do_step(self, attempt: Attempt) -> None:
        """A step has been done; obey permits at its boundary, and go on."""
        if not any(node.running == attempt and node.alive for node in self.nodes.values()):
            return
        mine = self._together(attempt)
        if mine is None or any(node.held for node in mine):
            self.at(self.step_s, lambda: self._do_step(attempt))
            return
        step = self.step[attempt] = self.step[attempt] + 1
        if step >= self.total:
            self._reach_end(attempt)
            return
        for node in mine:
            self._boundary(node, attempt, step)
        self.at(self.step_s, lambda: self._do_step(attempt))

    def _reach_end(self, attempt: Attempt) -> None:
        """All steps are done: the ranks end, or wait at the last boundary for a snapshot of it."""
        for node in [node for node in self.nodes.values() if node.running == attempt and node.alive]:
            node.at_end = self.config.checkpoint is not None
            self._boundary(node, attempt, self.step[attempt])
            if not node.at_end:
                self._end(node, attempt)

    def _end(self, node: SimNode, attempt: Attempt) -> None:
        if node.running != attempt or not node.alive or node.dead_ranks or not node.loaded:
            return
        node.at_end, digest = False, f"digest-{self.total}"
        for rank in self._ranks(node):
            node.done[rank] = digest
            self.say(m.RankDone(node.name, attempt, rank, digest, self.step[attempt]))

    def _boundary(self, node: SimNode, attempt: Attempt, step: int) -> None:
        due = [generation for generation in node.permits if generation.step <= step]
        for generation in due:
            permit = node.permits.pop(generation)
            for rank in self._ranks(node):
                if generation.step < step:
                    self.say(m.Missed(node.name, rank, generation, "late"))
                elif permit.replan:
                    self.say(m.Planned(node.name, rank, generation), 0.05)
                elif step % self.sums and not node.at_end:
                    sound = (step - step % self.sums, self.sums)
                    self.say(m.Missed(node.name, rank, generation, "accumulating: no optimizer step", sound))
                else:
                    node.held = generation if permit.hold else None
                    self._copy(node, attempt, rank, permit)

    def _copy(self, node: SimNode, attempt: Attempt, rank: int, permit: m.Permit) -> None:
        local = rank % self.config.procs
        before = self.check and self.recoverable()
        there = node.images.get(("shard", local, permit.slot))
        busy = there is not None and node.name in self.uploading[there.generation] and node.fence == attempt
        assert not busy, f"{there} is overwritten while it is uploaded"
        for kind in ("shard", "parity"):
            node.images.pop((kind, local, permit.slot), None)
        assert not before or self.recoverable(), f"the copy of {permit.generation} destroyed what was to be kept"
        generation, slot = permit.generation, permit.slot

        def sealed() -> None:
            if node.running == attempt and node.alive and rank not in node.dead_ranks:
                world = node.world_nodes * self.config.procs
                image = HeldImage(node.name, node.seat or 0, local, slot, generation, "shard", LENGTH, world=world)
                node.images["shard", local, slot] = image
                sound = (generation.step, self.sums)
                self.say(m.Copied(node.name, rank, generation, slot, LENGTH, LENGTH, 0.001, 0.05, sound))

        self.at(0.05, sealed)

    # --- snapshots --------------------------------------------------------------------------------------------------

    def _on_permit(self, node: SimNode, permit: m.Permit) -> None:
        if node.running is not None and permit.generation.taken_by(node.running):
            node.permits[permit.generation] = permit
            if node.at_end and node.alive:
                self._boundary(node, node.running, self.step[node.running])

    def _on_abort(self, node: SimNode, abort: m.Abort) -> None:
        node.permits.pop(abort.generation, None)
        node.held = None if node.held == abort.generation else node.held

    def _on_proceed(self, node: SimNode, proceed: m.Proceed) -> None:
        if node.held != proceed.generation:
            return
        node.held, attempt = None, node.running
        if node.at_end and attempt is not None:
            self.at(0.1, lambda: self._end(node, attempt))

    def _on_encode(self, node: SimNode, encode: m.Encode) -> None:
        self.at(0.05, lambda: self._encode(node, encode, node.fence))

    def _encode(self, node: SimNode, encode: m.Encode, fence: Attempt | None) -> None:
        if not node.hears or not node.keeper_up or node.fence != fence:
            return
        for seat in encode.seats:
            peer = self._at_seat.get((fence, seat), node)
            held = any(i.kind == "shard" and i.generation == encode.generation for i in peer.images.values())
            if peer.running != fence or not peer.alive or peer.paused or not peer.keeper_up or not held:
                self.say(m.EncodeFailed(node.name, encode.generation, f"{peer.name} does not serve"))
                return
        for local in range(self.config.procs):
            group = GroupInfo(encode.seats, encode.parity, encode.lengths[local], encode.index)
            node.images["parity", local, encode.slot] = HeldImage(
                node.name, node.seat or 0, local, encode.slot, encode.generation, "parity", LENGTH,
                group=group,
            )  # fmt: skip
        self.say(m.Encoded(node.name, encode.generation, 0.05))

    def _on_commit(self, node: SimNode, commit: m.Commit) -> None:
        if node.keeper_up:
            guests = [key for key, image in node.images.items() if key[2] >= GUEST_SLOT]
            for key in guests:
                if node.images[key].generation != commit.generation:
                    del node.images[key]
            self.say(m.CommitAcked(node.name, commit.generation))

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _on_upload(self, node: SimNode, upload: m.Upload) -> None:
        fence, port, token = node.fence, node.keeper_port, object()
        if not node.keeper_up or (upload.again and node.name in self.uploading[upload.generation]):
            return
        if upload.again and (upload.generation, (node.seat or 0) * self.config.procs) in self.store.images:
            self.say(self._uploaded(node, upload))
            return
        node.upload = token  # a later one ends an earlier one
        others = {
            generation: names
            for generation, names in self.uploading.items()
            if generation != upload.generation and any(self.nodes[name].fence == fence for name in names)
        }
        assert not others, f"{upload.generation} is uploaded while {others} are"
        self.uploading[upload.generation].add(node.name)

        def over() -> None:
            same = node.alive and node.fence == fence and node.keeper_up and node.keeper_port == port
            if same and node.upload is token:
                self.uploading[upload.generation].discard(node.name)
                self.say(self._uploaded(node, upload))

        self.at(self.store.upload_s * (1 + 0.1 * (node.seat or 0)), over)

    def _uploaded(self, node: SimNode, upload: m.Upload) -> m.Event:
        generation, seat, procs = upload.generation, node.seat or 0, self.config.procs
        held = [i for i in node.images.values() if i.kind == "shard" and (i.generation, i.seat) == (generation, seat)]
        if self.store.trouble is not None:
            return m.UploadFailed(node.name, generation, f"the store is {self.store.trouble}", self.store.trouble)
        if len(held) < procs or any(image.bad_blocks for image in held):
            return m.UploadFailed(node.name, generation, "the image does not verify", "bad")
        images = self.store.put(generation, seat, procs, LENGTH)
        return m.Uploaded(node.name, generation, images, LENGTH * procs, self.store.upload_s)

    def _answer(self, event: m.Event, epoch: int) -> None:
        if epoch == self.epoch and not self.machine.over:
            self.tell(event)

    def _claim(self, claim: m.Claim, epoch: int, told: tuple[str | None, str] | None = None) -> None:
        def ask() -> None:
            if epoch != self.epoch or self.machine.job.attempt != claim.attempt:
                return
            trouble = self.store.claim(epoch, claim.attempt)
            unseen = "" if trouble else self.store.unseen()
            if told != (trouble, unseen):
                denied = bool(unseen) and self.store.lender != "unavailable"
                good = m.Claimed(claim.attempt, self.store.restorable(), unseen, denied)
                bad = m.ClaimFailed(claim.attempt, f"the store is {trouble}", trouble or "bad")
                self._answer(bad if trouble else good, epoch)
            if unseen or trouble not in (None, "lost"):
                self._claim(claim, epoch, (trouble, unseen))

        self.at(1.0 if told else 0.05, ask)

    def _commit_checkpoint(self, order: m.CommitCheckpoint, epoch: int) -> None:
        if epoch != self.epoch:
            return
        if self.store.attempt != self.machine.job.attempt:
            return  # superseded by another claim
        before = {checkpoint.generation for checkpoint in self.store.line}
        found = self.store.commit(epoch, order)
        if isinstance(found, str):
            self._answer(m.CheckpointFailed(order.generation, f"the store is {found}", found), epoch)
        else:
            self._answer(m.CheckpointCommitted(found, 0.05), epoch)
            gone = before - {checkpoint.generation for checkpoint in self.store.line}
            self._answer(m.CheckpointsExpired(tuple(sorted(gone))), epoch)

    # --- leaving ----------------------------------------------------------------------------------------------------

    def leave(self, node: SimNode, grace_s: float = 30.0) -> None:
        """A node is preempted: it says so, and is gone when it is released or its time is over."""
        if not node.alive or node.leaving:
            return
        node.leaving = True
        self.say(m.Leaving(node.name, grace_s, "preempted"), 0.01)
        self.at(grace_s, lambda: self._gone(node))

    def _on_release(self, node: SimNode, _: m.Release) -> None:
        self.released.append(node.name)
        self.at(0.1, lambda: self._gone(node))

    def _gone(self, node: SimNode) -> None:
        if not node.alive:
            return
        running = node.running is not None and not set(self._ranks(node)) <= set(node.done)
        node.alive, node.running = False, None
        node.images.clear()
        if running:
            self._collateral()
        self.at(0.05, lambda: self.tell(m.NodeGone(node.name, "its agent ended")))

    def _on_injure(self, node: SimNode, injure: m.Injure) -> None:
        self.injuries.append(injure)
        match injure.kind:
            case "rank-crash":
                assert injure.rank is not None
                if injure.rank // self.config.procs in self.machine.job.members.seats:  # not of a new controller
                    self.crash_rank(injure.rank)
            case "hang":
                assert injure.rank is not None
                self.hung.add(injure.rank)
                self.at(15.0, self.hung.clear)
            case "node-loss":
                self.lose_node(node, replace_after=2.0)
            case "node-leave":
                self.leave(node)
                self.at(8.0, lambda: (self.add_node(), None)[1])
            case "corrupt":
                self.corrupt(node)
            case "keeper-crash":
                self.crash_keeper(node)
            case "agent-crash":
                self.crash_agent(node)

    def _on_dumpstacks(self, node: SimNode, dump: m.DumpStacks) -> None:
        self.say(m.Stacks(node.name, "stacks"))

    # --- faults -----------------------------------------------------------------------------------------------------

    def seated(self, seat: int) -> SimNode:
        return self.nodes[self.machine.job.members.seats[seat]]

    def lose_node(self, node: SimNode, replace_after: float | None = 5.0) -> None:
        running, node.alive, node.running = node.running, False, None
        node.images.clear()
        if running is not None:
            self._collateral()
        if replace_after is not None:
            self.at(replace_after, lambda: (self.add_node(), None)[1])

    def crash_rank(self, rank: int, error: m.ErrorInfo | None = None) -> None:
        node = self.seated(rank // self.config.procs)
        if node.running is None or not node.alive or rank in node.dead_ranks:
            return
        node.dead_ranks.add(rank)
        code, signal = (1, None) if error else (None, 9)
        step = self.step.get(node.running, 0)
        self.say(m.RankExited(node.name, node.running, rank, code, signal, error, self.now, step), 0.01)
        self._collateral()

    def _collateral(self) -> None:
        """The other ranks lose their connections."""
        for node in self.nodes.values():
            if node.running is not None and node.loaded and node.hears:
                for rank in self._ranks(node):
                    if rank not in node.dead_ranks and rank not in node.done:
                        node.dead_ranks.add(rank)
                        error = m.ErrorInfo(self.now + 0.02, "RuntimeError", "gloo: Connection closed by peer")
                        self.say(m.RankExited(node.name, node.running, rank, 1, None, error, self.now + 0.02), 0.02)

    def pause(self, node: SimNode) -> None:
        node.paused = True

    def resume(self, node: SimNode) -> None:
        node.paused = False
        backlog, node.backlog = node.backlog, []
        for instruction in backlog:
            self._deliver(node.name, instruction)

    def crash_keeper(self, node: SimNode, back_after: float = 1.0) -> None:
        if not node.alive:
            return
        node.keeper_up = False
        for names in self.uploading.values():
            names.discard(node.name)
        self.say(m.KeeperLost(node.name), 0.02)

        def back() -> None:
            node.keeper_up = True
            node.keeper_port += 1
            self.say(m.KeeperBack(node.name, "127.0.0.1", node.keeper_port))

        self.at(back_after, back)

    def crash_agent(self, node: SimNode, back_after: float = 0.5) -> None:
        node.agent_up = False
        self._kill_ranks(node)
        self._collateral()

        def back() -> None:
            node.agent_up, node.registration = True, ""
            self.join(node)

        self.at(back_after, back)

    def corrupt(self, node: SimNode, seed: int = 0) -> None:
        chance = random.Random(seed)
        for key, image in node.images.items():
            if chance.random() < 0.7:
                node.images[key] = replace(image, bad_blocks=(chance.randrange(4),))

    def restart_controller(self, after: float = 0.5, head: bool = False) -> None:
        """The controller dies; with ``head`` all agents and ranks do too. Files stay."""
        self.epoch += 1
        self.uploading.clear()  # the new one does not know of them; keepers notice when they are overwritten
        self.unacked = set()
        self.given_up = set()
        self.machine = self._new_machine()
        for node in self.nodes.values():
            if head and node.alive:
                self._kill_ranks(node)
                node.seat, node.registration = None, ""
            spread = after + 0.1 * (next(self._ids) % 5)
            self.at(spread, lambda node=node: self.join(node))  # type: ignore[misc]
