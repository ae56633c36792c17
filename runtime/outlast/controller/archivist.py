"""Executes what the machine asks of the object store, off the event loop: one thread, one order after the other.

``run`` is the thread's whole life; the others may be called from any thread. What comes of an order is an event given
to ``answer``; what only a person cares for is a line given to ``log``. Both are called in the thread.

A store that is down holds up nothing: each call gives up after ``PATIENCE_S``. A claim that fails is answered with
``ClaimFailed`` once and tried again, with growing pauses (where a person must act with the longest), until another
``Claim`` or ``close``, unless it is lost; a commit is tried for ``COMMIT_S`` before it is answered. Nothing is
committed while the newest ``Claim`` has not succeeded.

Whom a claim may succeed: the controller that held the head when this one looked first, or this one itself. Who finds
another there has been succeeded, and has lost.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from outlast import messages as m
from outlast.api import TrainingJob
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.line import Retention
from outlast.checkpoint.manifest import (
    ClaimMark,
    Entry,
    JobMark,
    Manifest,
    NewerFormat,
    checkpoint_of,
    job_url,
    parse_reference,
    rfc3339,
)
from outlast.checkpoint.store import Store, StoreOptions, open_store
from outlast.clock import Clock
from outlast.config import ControllerConfig
from outlast.errors import (
    CheckpointError,
    ClaimLost,
    ObjectMissing,
    OutlastError,
    RequestError,
    StoreDenied,
    StoreError,
)
from outlast.messages.events import StoreTrouble
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredCheckpoint

PATIENCE_S = 5.0
"""Seconds for which one call to the store goes on trying."""
COMMIT_S = 60.0
"""Seconds for which a commit is tried."""
PAUSES_S = (1.0, 30.0)
"""Seconds before the first and the longest wait between two tries."""

Order = m.Claim | m.CommitCheckpoint | m.Quarantine | m.Finish
Answer = Callable[[m.Event], object]
Log = Callable[[str, str, Mapping[str, Any]], object]
_FAILURES = (StoreError, CheckpointError, ClaimLost, RequestError)


class Librarian(Protocol):
    """What the driver needs of an archivist."""

    def run(self, answer: Answer, log: Log) -> None: ...

    def submit(self, order: Order) -> None: ...

    def status(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Charge:
    """What an archivist looks after. ``url``: the job's own; ``controller``: which one it works for; ``restore_from``:
    URL[@STEP] of another job's checkpoint; ``resume``: go on from what is there, whosever it was."""

    url: str
    mark: JobMark
    controller: str
    retention: Retention
    restore_from: str | None = None
    resume: bool = False

    @classmethod
    def of(cls, config: ControllerConfig, controller: str) -> Charge | None:
        """What the job's specification asks for; None when it has no object tier."""
        job = TrainingJob.model_validate(config.job)
        wanted, meta = job.spec.checkpoint, job.metadata
        if wanted is None:
            return None
        return cls(
            url=job_url(wanted.url, meta.namespace, meta.name),
            mark=JobMark(meta.namespace, meta.name, config.store_identity),
            controller=controller,
            retention=Retention(wanted.keep_last, wanted.keep_every_steps),
            restore_from=wanted.restore_from,
            resume=config.resume or wanted.resume,
        )


@dataclass
class _Unfinished:
    """An order that waits for the store to answer again, or for a person; times are monotonic seconds. ``told``: with
    what trouble a claim was answered last, and whether the head was ours."""

    order: m.Claim | m.CommitCheckpoint
    since: float
    due: float
    pause: float
    told: tuple[StoreTrouble, bool] | None = None


class Archivist:
    """See the module's text. ``open_at`` opens the store at a URL."""

    def __init__(
        self,
        charge: Charge,
        clock: Clock,
        open_at: Callable[[str, StoreOptions], Store] = open_store,
        pauses_s: tuple[float, float] = PAUSES_S,
        commit_s: float = COMMIT_S,
    ) -> None:
        self._charge = charge
        self._clock = clock
        self._open_at = open_at
        self._pauses_s = pauses_s
        self._commit_s = commit_s
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._tell: Answer = lambda _: None
        self._write: Log = lambda *_: None
        self._closed = threading.Event()
        self._archives: dict[str, Archive] = {}
        self._looked = False
        self._expected: ClaimMark | None = None
        self._claim: ClaimMark | None = None
        self._unfinished: _Unfinished | None = None
        self._condemned: dict[Generation, str] = {}
        self._foreign: tuple[StoredCheckpoint, ...] = ()
        self._horizon: Generation | None = None
        self._passed_over: set[Generation] = set()
        self._last_error: str | None = None
        self._unseen = ""

    def submit(self, order: Order) -> None:
        """Queue an order."""
        self._orders.put(order)

    def close(self) -> None:
        """Have ``run`` return after the call that is under way, and what ``Finish`` asks for. It says no more."""
        self._closed.set()
        self._orders.put(None)

    def status(self) -> dict[str, Any]:
        """{"url", "claimed": the attempt or None, "last_error": text or None}."""
        claim = self._claim
        claimed = None if claim is None else f"{claim.attempt}-{claim.incarnation}"
        return {"url": self._charge.url, "claimed": claimed, "last_error": self._last_error or self._unseen or None}

    def run(self, answer: Answer, log: Log) -> None:
        """Carry out orders until ``close``."""
        self._tell, self._write = answer, log
        try:
            self._look()
        except _FAILURES as error:  # the claim tells
            self._last_error = str(error)
        while (order := self._next()) is not None:
            if not self._closed.is_set() or isinstance(order, m.Finish):
                self._perform(order)
        for archive in self._archives.values():
            archive.store.close()

    def _answer(self, event: m.Event) -> None:
        if not self._closed.is_set():
            self._tell(event)

    def _log(self, kind: str, text: str, fields: Mapping[str, Any]) -> None:
        if not self._closed.is_set():
            self._write(kind, text, fields)

    # --- orders and their order -------------------------------------------------------------------------------------

    def _next(self) -> Order | None:
        """The next order, or the unfinished one when its time has come."""
        waiting = self._unfinished
        wait = None if waiting is None else max(0.0, waiting.due - self._clock.monotonic())
        try:
            return self._orders.get(timeout=wait)
        except queue.Empty:
            return None if waiting is None else waiting.order

    def _perform(self, order: Order) -> None:
        try:
            match order:
                case m.Claim():
                    self._carry_out_claim(order)
                case m.CommitCheckpoint():
                    self._carry_out_commit(order)
                case m.Quarantine():
                    self._condemned[order.generation] = order.reason
                    self._quarantine_condemned()
                case m.Finish():
                    self._give_back()
        except _FAILURES as error:
            self._failed(order, error)

    def _failed(self, order: Order, error: OutlastError) -> None:
        self._last_error, trouble = str(error), trouble_of(error)
        if trouble == "lost":
            self._claim = None
            self._log("claim-lost", str(error), {})
        match order:
            case m.Claim():
                self._claim_failed(order, str(error), "unavailable" if trouble == "bad" else trouble)
            case m.CommitCheckpoint():
                self._commit_failed(order, str(error), trouble)
            case m.Quarantine():
                self._log("quarantine-failed", f"{order.generation}: {error}", {"generation": str(order.generation)})
            case m.Finish():
                self._log("claim-kept", f"the store still counts as this run's: {error}", {})

    def _claim_failed(self, order: m.Claim, reason: str, trouble: StoreTrouble) -> None:
        if trouble == "lost":
            self._unfinished = None
        elif not self._again(order, trouble, ours=False):
            return
        self._answer(m.ClaimFailed(order.attempt, reason, trouble))

    def _claim_unsettled(self, order: m.Claim, trouble: StoreTrouble) -> None:
        """The head is ours, and what ``restoreFrom`` names out of reach: who has state can do without, and commit."""
        if self._again(order, trouble, ours=True):
            self._answer(m.Claimed(order.attempt, (), self._unseen, denied=trouble == "denied"))

    def _again(self, order: m.Claim, trouble: StoreTrouble, ours: bool) -> bool:
        """Try it again later; whether it is news that this is the trouble, and whether the head is ours."""
        waiting = self._unfinished
        told = waiting.told if waiting is not None and waiting.order is order else None
        self._postpone(order, rarely=trouble == "denied").told = (trouble, ours)
        return told != (trouble, ours)

    def _commit_failed(self, order: m.CommitCheckpoint, reason: str, trouble: StoreTrouble) -> None:
        if trouble == "unavailable":
            if self._unfinished is None or self._unfinished.order is not order:
                text = f"the commit of step {order.generation.step} waits for the store and is tried again: {reason}"
                self._log("store-unavailable", text, {"generation": str(order.generation)})
            self._postpone(order)
            waiting = self._unfinished
            if waiting is not None and waiting.due - waiting.since <= self._commit_s:
                return
        self._unfinished = None
        self._answer(m.CheckpointFailed(order.generation, reason, trouble))

    def _postpone(self, order: m.Claim | m.CommitCheckpoint, rarely: bool = False) -> _Unfinished:
        now, first, longest = self._clock.monotonic(), *self._pauses_s
        waiting = self._unfinished
        if waiting is None or waiting.order is not order:
            pause = longest if rarely else first
            waiting = self._unfinished = _Unfinished(order, now, now + pause, pause)
        else:
            waiting.pause = longest if rarely else min(2 * waiting.pause, longest)
            waiting.due = now + waiting.pause
        return waiting

    def _supersede(self, order: m.Claim | m.CommitCheckpoint) -> None:
        """Give up an unfinished order of before."""
        waiting = self._unfinished
        if waiting is None or waiting.order is order:
            return
        self._unfinished = None
        if isinstance(waiting.order, m.CommitCheckpoint):
            self._answer(m.CheckpointFailed(waiting.order.generation, "it was superseded", "unavailable"))

    def _give_back(self) -> None:
        """The job has ended. A store in trouble is not waited for any more."""
        self._unfinished = None
        claim = self._expected
        if claim is not None and claim.controller == self._charge.controller and self._last_error is None:
            self._archive().release(claim)

    # --- claiming ---------------------------------------------------------------------------------------------------

    def _carry_out_claim(self, order: m.Claim) -> None:
        self._supersede(order)
        charge, attempt = self._charge, order.attempt
        claim = ClaimMark(attempt.number, attempt.incarnation, charge.controller)
        if self._claim != claim:
            self._claim = None
            self._look()
            self._archive().claim(charge.mark, claim, self._expected, resume=charge.resume)
            self._expected = claim
        stored = self._own(claim)
        self._claim, self._last_error = claim, None
        self._quarantine_condemned()
        try:
            stored = stored or self._restore_from()
        except _FAILURES as error:
            self._unseen = str(error)
            self._claim_unsettled(order, trouble_of(error))
            return
        self._unfinished, self._unseen = None, ""
        self._answer(m.Claimed(attempt, stored))

    def _look(self) -> None:
        """See, once, who holds the head: the one that may be succeeded."""
        if self._looked:
            return
        head = self._archive().read_head()
        self._looked = True
        if head is not None:
            self._expected = head.claim
            if head.job != self._charge.mark and self._charge.resume:
                text = f"{self._charge.url} was that of {head.job}; {self._charge.mark} goes on from there"
                self._log("store-resumed", text, {"checkpoints": len(head.line)})

    def _own(self, claim: ClaimMark) -> tuple[StoredCheckpoint, ...]:
        """What may be restored of the job's own line."""
        found = self._archive().restorable()
        for entry, reason in found.bad:
            self._quarantine(entry.generation, reason, claim)
        return tuple(stored for stored in found.stored if stored.generation not in self._condemned)

    def _restore_from(self) -> tuple[StoredCheckpoint, ...]:
        """Without a step: the newest when the job first looked, or older; newer ones when none of those is left."""
        named = self._charge.restore_from
        if named is None:
            return ()
        self._look_at_foreign(*parse_reference(named))
        sound = tuple(stored for stored in self._foreign if stored.generation not in self._condemned)
        if not sound:
            reasons = {self._condemned[stored.generation] for stored in self._foreign}
            text = f"checkpoint.restoreFrom {named} cannot be restored: {'; '.join(sorted(reasons))}"
            raise RequestError(f"{text}; name another checkpoint, as URL@STEP (`trainctl checkpoints ls` shows them)")
        if self._horizon is None:
            self._horizon = sound[0].generation
        return tuple(stored for stored in sound if stored.generation <= self._horizon) or sound

    def _look_at_foreign(self, url: str, step: int | None) -> None:
        """What is there now: a job that goes on has its checkpoints expire. Seen once, it may be out of reach."""
        if step is not None and self._foreign:
            return
        try:
            self._foreign = self._find_foreign(url, step)
        except _FAILURES as error:
            if not self._foreign:
                raise
            self._log("restore-from-unseen", f"{url} cannot be looked at again: {error}", {})

    def _find_foreign(self, url: str, step: int | None) -> tuple[StoredCheckpoint, ...]:
        """Another job's checkpoint of ``step``, or all that could be its newest. That job's store is only read."""
        archive = self._archive(url)
        try:
            named: Entry = archive.find(step)
            if step is not None:
                return (archive.complete(named, foreign=True),)
            found = archive.restorable(foreign=True)
        except (ObjectMissing, CheckpointError, RequestError) as error:
            raise RequestError(f"checkpoint.restoreFrom {url}: {error}") from error
        for entry, reason in found.bad:
            if entry.generation not in self._passed_over:
                fields = {"generation": str(entry.generation)}
                self._log("checkpoint-passed-over", f"{url}@{entry.step}: {reason}", fields)
        self._passed_over |= {entry.generation for entry, _ in found.bad}
        if not found.stored:
            raise RequestError(f"checkpoint.restoreFrom {url} has no complete checkpoint")
        return found.stored

    # --- committing -------------------------------------------------------------------------------------------------

    def _carry_out_commit(self, order: m.CommitCheckpoint) -> None:
        claim, charge = self._claim, self._charge
        if claim is None:
            text = self._last_error or "the store has not answered yet"
            self._answer(m.CheckpointFailed(order.generation, f"the head is not claimed: {text}", "unavailable"))
            return
        self._supersede(order)
        started = self._clock.monotonic()
        manifest = Manifest(
            job=charge.mark,
            generation=order.generation,
            step=order.generation.step,
            nodes=order.nodes,
            procs=order.procs,
            created=rfc3339(self._clock.wall()),
            images=tuple(sorted(order.images, key=lambda image: image.rank)),
            about=order.about,
        )
        self._archive().commit(manifest, claim)
        self._unfinished, self._last_error, self._unseen = None, None, ""
        self._condemned.pop(order.generation, None)
        seconds = self._clock.monotonic() - started
        self._answer(m.CheckpointCommitted(checkpoint_of(manifest, charge.url), seconds))
        self._expire(claim)

    def _expire(self, claim: ClaimMark) -> None:
        """Keep what retention says. What fails here leaves garbage, and the next commit does it again."""
        try:
            removed = self._archive().expire(self._charge.retention, claim)
        except _FAILURES as error:
            self._log("retention-failed", str(error), {})
            return
        if removed:
            self._answer(m.CheckpointsExpired(tuple(entry.generation for entry in removed)))
        for entry in removed:
            text = f"the checkpoint of step {entry.step} has expired and is removed"
            self._log("checkpoint-expired", text, {"step": entry.step, "generation": str(entry.generation)})

    # --- condemning -------------------------------------------------------------------------------------------------

    def _quarantine_condemned(self) -> None:
        """Take what the machine condemned out of the line. Without a claim that waits; it is not offered meanwhile."""
        if self._claim is None:
            return
        others = {stored.generation for stored in self._foreign}
        for generation, reason in self._condemned.items():
            if generation not in others:
                self._quarantine(generation, reason, self._claim)

    def _quarantine(self, generation: Generation, reason: str, claim: ClaimMark) -> None:
        if self._archive().quarantine(generation, reason, claim):
            text = f"the checkpoint of step {generation.step} must not be used: {reason}. Its objects are kept"
            self._log("checkpoint-quarantined", text, {"generation": str(generation), "reason": reason})

    def _archive(self, url: str | None = None) -> Archive:
        """The job's own archive, or another's; opened when it is first needed, since that imports a library."""
        place = url or self._charge.url
        if place not in self._archives:
            if not self._charge.mark.identity:
                raise RequestError("the controller was given no store_identity: it cannot mark checkpoints as its own")
            store = self._open_at(place, StoreOptions(patience_s=PATIENCE_S, timeout_s=PATIENCE_S))
            self._archives[place] = Archive(store, self._clock)
        return self._archives[place]


def trouble_of(error: OutlastError) -> StoreTrouble:
    """What the machine has to know of an error."""
    match error:
        case ClaimLost():
            return "lost"
        case StoreDenied() | RequestError() | NewerFormat():
            return "denied"
        case CheckpointError() | ObjectMissing():
            return "bad"
        case _:
            return "unavailable"
