"""Snapshots of one rank in time: permits are obeyed at boundaries, and every result is reported.

A permit names one coming step. At its boundary the rank either copies, or (when the controller asks for it) only votes
on which replicas are equal; at any other boundary it says why it could not. From the boundary until ``Window.closed``
parameters and optimizer states must not change: the optimizer pre-step hook waits for it.

Gradients are in no snapshot. Where no optimizer has stepped since the boundary before, they may be a part of a sum over
several steps, and no snapshot is taken; after the last step nothing uses them.

A permit may ask the rank to stay at the boundary when it has copied, until it is told to proceed, or ended: what was
done by then is not done again elsewhere. After the last step of a job with an object tier all ranks stay so.
"""

from __future__ import annotations

import queue
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from outlast.errors import CapacityError, OutlastError, SnapshotError
from outlast.protect.capture import Capture, Moment, SnapshotPlan
from outlast.protect.plan import rotating_sample
from outlast.protect.replicas import ReplicaVote, digest
from outlast.rank.link import AgentLink
from outlast.snapshot.copier import CopyTicket
from outlast.snapshot.identity import Generation

WINDOW_DEADLINE_S = 600.0
HOLD_DEADLINE_S = 7 * 3600.0
"""For a word of the controller's, which may wait for an upload of six hours."""
FINAL_DEADLINE_S = 1200.0
ACCUMULATING = "accumulating: no optimizer step since the last boundary"
NAMED = 5
"""Tensors that a note names at most."""


@dataclass
class Window:
    """The time in which lazy leaves are being read. ``stalled_s`` is how long training was blocked by it."""

    generation: Generation
    closed: threading.Event = field(default_factory=threading.Event)
    given_up: threading.Event = field(default_factory=threading.Event)
    opened: float = 0.0
    stalled_s: float = 0.0
    waiting_since: float | None = None

    def wait(self) -> None:
        """Block until lazy leaves may change. Raises SnapshotError when the copy does not end."""
        if self.closed.is_set():
            return
        self.waiting_since = time.perf_counter()
        if not self.closed.wait(WINDOW_DEADLINE_S):
            raise SnapshotError(f"the copy of generation {self.generation} has not ended in {WINDOW_DEADLINE_S:.0f} s")
        self.stalled_s += time.perf_counter() - self.waiting_since
        self.waiting_since = None

    def stall_so_far(self) -> float:
        waiting = self.waiting_since
        return self.stalled_s + (time.perf_counter() - waiting if waiting is not None else 0.0)


@dataclass(frozen=True)
class _Copying:
    """One copy under way. ``before``: digests of lazy leaves at the boundary, where they are checked."""

    window: Window
    moment: Moment
    ticket: CopyTicket
    slot: int
    plan: SnapshotPlan
    before: Mapping[str, str | None]


class RankSnapshots:
    """Obeys permits for one rank.

    ``extra`` returns the session's own state at the boundary; ``fits`` raises CapacityError when an image of so many
    bytes is too much for the node. ``check`` reads lazy leaves twice and reports those that changed meanwhile.
    """

    def __init__(
        self,
        link: AgentLink,
        capture: Capture,
        extra: Callable[[], Mapping[str, Any]],
        fits: Callable[[int], None],
        *,
        check: bool,
    ) -> None:
        self.link, self.capture, self.extra, self.fits, self.check = link, capture, extra, fits, check
        self._failure: OutlastError | None = None
        self._distrusted: set[str] = set()  # leaves that were found to differ between replicas once
        self.window: Window | None = None
        self._vote: ReplicaVote | None = None
        self._stepped = True  # since the boundary before; nothing is lost at the first one
        self._sound: tuple[int, ...] = ()  # the last two boundaries at which no gradients waited
        self._told_unsteady = False
        self._work: queue.SimpleQueue[tuple[str, Callable[[], None]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="outlast-snapshots", daemon=True).start()
        link.on_abort.append(self._abort)
        link.on_permit.append(self._prepare)
        self._hook = register_optimizer_step_pre_hook(lambda *_: self._before_step())

    def barrier(self) -> None:
        """Called before anything changes lazy leaves: each optimizer step, and the next boundary."""
        if self.window is not None:
            self.window.wait()

    def _before_step(self) -> None:
        self.barrier()
        self._stepped = True

    def boundary(self, step: int) -> float:
        """Obey what is permitted for ``step``, and stay while held: the seconds of it. Report permits that came too
        late."""
        if self._failure is not None:
            raise self._failure
        accumulating = bool(self.capture.collector.optimizers) and not self._stepped
        self._stepped = False
        if not accumulating:
            self._sound = (*self._sound[-1:], step)
        if not self.link.permits and self.window is None:
            return 0.0
        held_s = 0.0
        for generation in self._take(step, accumulating=accumulating):
            began = time.monotonic()
            self.link.send("busy", label=f"held before step {step}", limit_s=HOLD_DEADLINE_S)
            self._hold(generation, began + HOLD_DEADLINE_S)
            self.link.send("idle")
            held_s += time.monotonic() - began
        return held_s

    def final(self, step: int) -> None:
        """Stay at the boundary after the last step, obeying permits, until told to proceed (or for 20 minutes)."""
        until = time.monotonic() + FINAL_DEADLINE_S
        while self._wait(lambda: self._proceeded(step) or self._is_due(step), until):
            if self._proceeded(step):
                return
            for generation in self._take(step):
                self._hold(generation, until)
        text = f"the last step was not made durable in {FINAL_DEADLINE_S / 60:.0f} min: going on to write the weights"
        self._note("final-snapshot-late", text)

    def _take(self, step: int, *, accumulating: bool = False) -> list[Generation]:
        """Obey what is permitted for ``step``; the generations at which to stay."""
        self.barrier()
        held = []
        for permit in self.link.take_permits(step):
            generation = Generation.parse(permit["generation"])
            if permit["step"] < step or permit["generation"] in self.link.aborted:
                self.link.send("missed", generation=str(generation), reason="late")
            elif accumulating and not permit.get("replan"):
                self.link.send("missed", generation=str(generation), reason=ACCUMULATING, sound=self._rhythm())
            elif self._obey(permit, generation) and permit.get("hold"):
                held.append(generation)
        return held

    def _rhythm(self) -> tuple[int, int] | None:
        """The last boundary at which no gradients waited, and the steps from the one before to it."""
        return (self._sound[1], self._sound[1] - self._sound[0]) if len(self._sound) == 2 else None

    def _hold(self, generation: Generation, until: float) -> None:
        """Stay until this generation is aborted, or permitted anew, or one of its step is a reason to proceed."""
        text, step = str(generation), generation.step
        if not self._wait(lambda: text in self.link.aborted or self._is_due(step) or self._proceeded(step), until):
            self._note("hold-ended", f"nobody told how to go on after generation {generation}: going on")

    def _proceeded(self, step: int) -> bool:
        return any(Generation.parse(text).step >= step for text in self.link.proceeded)

    def _is_due(self, step: int) -> bool:
        return any(permit["step"] <= step for permit in self.link.permits)

    def _wait(self, condition: Callable[[], bool], until: float) -> bool:
        """Sleep until ``condition`` holds; False when it does not by then. Raises what has ended snapshots."""
        with self.link.news:
            held = self.link.news.wait_for(
                lambda: self._failure is not None or condition(), max(0.0, until - time.monotonic())
            )
        if self._failure is not None:
            raise self._failure
        return held

    def _fail(self, error: OutlastError) -> None:
        """The next boundary ends the training loop with ``error``; so does one at which the rank stays."""
        with self.link.news:
            self._failure = error
            self.link.news.notify_all()

    def _obey(self, permit: Mapping[str, Any], generation: Generation) -> bool:
        """Vote or copy as permitted; whether this rank is copying now."""
        began = time.perf_counter()
        moment = self.capture.observe(self.extra())
        replan = bool(permit.get("replan"))
        if not replan and self._needs_plan(moment):
            self.link.send("missed", generation=str(generation), reason="replan")
            return False
        window = self.window = Window(generation, opened=began)
        if replan:
            voted = self.capture.votable(moment)
            self._work.put((str(generation), lambda: self._agree(window, moment, voted)))
        else:
            self._copy_or_tell(window, moment, permit)
        window.stalled_s += time.perf_counter() - began
        return not replan

    def _needs_plan(self, moment: Moment) -> bool:
        """``Capture.needs_plan``; tensors for whose sake plans fail again and again are told once."""
        needed = self.capture.needs_plan(moment)
        names = sorted({key.split("@")[0] for key in self.capture.unsteady})
        if names and not self._told_unsteady:
            self._told_unsteady = True
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            text = (
                f"optimizer tensors come, go or change their shape from step to step, so ranks cannot share their "
                f"copies: {', '.join(names[:NAMED])}{more}; each rank stores its own whole. Keep their names and "
                f"shapes the same to spare memory and time"
            )
            self._note("state-unsteady", text)
        return needed

    # -- voting on replicas

    def _agree(self, window: Window, moment: Moment, voted: frozenset[str]) -> None:
        try:
            lazy = [leaf for leaf in moment.leaves.values() if leaf.lazy and leaf.key in voted]
            digests = {leaf.key: None if leaf.key in self._distrusted else digest(leaf.tensor) for leaf in lazy}
        finally:
            window.closed.set()
        world = self.capture.seat.world
        if world == 1:
            cut: Mapping[str, tuple[int, ...]] = {}
        else:
            vote = self._voter()
            cut = vote.agree(str(window.generation), digests, window.given_up)
        plan = self.capture.make_plan(moment, cut, voted)
        try:
            self.fits(plan.layout.total_bytes)
        except CapacityError as error:
            self._fail(error)
            raise
        self.link.send("planned", generation=str(window.generation))

    def _voter(self) -> ReplicaVote:
        if self._vote is None:
            self._vote = ReplicaVote.connect(self.capture.seat.rank, self.capture.seat.world)
        return self._vote

    # -- copying

    def _copy_or_tell(self, window: Window, moment: Moment, permit: Mapping[str, Any]) -> None:
        try:
            self._copy(window, moment, permit)
        except CapacityError as error:
            self.link.send("capacity", missing=0, text=str(error))
            raise

    def _copy(self, window: Window, moment: Moment, permit: Mapping[str, Any]) -> None:
        before = self._digests(moment) if self.check else {}
        slot = int(permit["slot"])
        ticket = self.capture.start(moment, window.generation, slot, fresh=bool(permit.get("fresh")))
        plan = self.capture.plan
        assert plan is not None
        copying = _Copying(window, moment, ticket, slot, plan, before)
        self._work.put((str(window.generation), lambda: self._finish(copying)))

    def _finish(self, copying: _Copying) -> None:
        """Wait for the copy, compare a sample of replicas, and report."""
        window, plan = copying.window, copying.plan
        # The same choice on every replica, another one each time, whatever permits a rank has missed.
        sample = rotating_sample(plan.cut, zlib.crc32(str(window.generation).encode()))
        digests, changed = self._read_out(copying, [key for key, _ in sample])
        if changed:
            text = f"changed during the copy by something else than an optimizer: {', '.join(changed)}"
            self._note("state-changed", text)
        for key, replicas in sample:
            if not self._agreeing(window, key, digests[key], replicas):
                self._distrusted |= {key for key, members in plan.cut.items() if members == replicas}
                self.link.send("missed", generation=str(window.generation), reason="replan")
                return
        self.link.send(
            "copied", generation=str(window.generation), slot=copying.slot, bytes=copying.ticket.copied_bytes,
            length=plan.layout.total_bytes, stall_s=window.stall_so_far(), copy_s=copying.ticket.seconds,
            sound=self._rhythm(),
        )  # fmt: skip

    def _read_out(self, copying: _Copying, keys: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        """Everything that needs the lazy leaves as they were; closes the window. Digests, and names that changed."""
        still_reading = False
        try:
            copying.ticket.wait(WINDOW_DEADLINE_S)
            by_key = {leaf.key: leaf for leaf in copying.moment.leaves.values() if leaf.lazy} if keys else {}
            digests = {key: digest(by_key[key].tensor) or "" for key in keys}
            after = self._digests(copying.moment) if self.check else {}
        except TimeoutError as error:  # the copy goes on: the window stays shut, and the loop ends with this
            still_reading = True
            self._fail(SnapshotError(str(error)))
            raise
        finally:
            if not still_reading:
                copying.window.closed.set()
        return digests, [name for name, value in after.items() if copying.before.get(name) != value]

    def _agreeing(self, window: Window, key: str, mine: str, replicas: tuple[int, ...]) -> bool:
        """Whether the replicas still hold ``key`` alike; only the first of them compares and can know."""
        others = self._voter().differing(f"sample/{window.generation}", key, mine, replicas, window.given_up)
        if others:
            name = key.split("@")[0]
            text = (
                f"replicas of {name} differ: ranks {others} against rank {replicas[0]}; each is kept whole from now on"
            )
            self._note("silent-corruption", text)
        return not others

    @staticmethod
    def _digests(moment: Moment) -> dict[str, str | None]:
        return {leaf.name: digest(leaf.tensor) for leaf in moment.leaves.values() if leaf.lazy}

    # -- the background thread

    def _run(self) -> None:
        while True:
            generation, work = self._work.get()
            try:
                work()
            except CapacityError:
                continue  # the boundary meets it again, and tells
            except (OutlastError, TimeoutError, OSError, RuntimeError, ValueError) as error:
                self.link.send("missed", generation=generation, reason=f"{type(error).__name__}: {error}")

    def _prepare(self, permit: Mapping[str, Any]) -> None:
        if not permit.get("replan"):
            slot, fresh = int(permit["slot"]), bool(permit.get("fresh"))
            self._work.put((permit["generation"], lambda: self.capture.prepare(slot, fresh=fresh)))

    def _abort(self, generation: str) -> None:
        window = self.window
        if window is not None and str(window.generation) == generation:
            window.given_up.set()

    def _note(self, kind: str, text: str) -> None:
        self.link.send("note", kind=kind, text=text)

    def close(self) -> None:
        self.barrier()
        self._hook.remove()
