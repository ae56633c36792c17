"""What the agent asks of its keeper, each in a worker, with the answers as events."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from outlast import messages as m
from outlast.agent.keeper_host import KeeperHost
from outlast.agent.rank_messages import slots
from outlast.agent.reactor import Reactor
from outlast.api import TrainingJob
from outlast.clock import Clock
from outlast.errors import (
    CapacityError,
    CheckpointError,
    ImageError,
    ObjectMissing,
    OutlastError,
    RequestError,
    StaleAttemptError,
    StoreDenied,
    StoreError,
    TransferError,
)
from outlast.snapshot.identity import Attempt
from outlast.snapshot.inventory import HeldImage, Inventory, RankRestore, RestorePlan
from outlast.snapshot.stored import StoredImage

CALL_S = 30.0
"""A call that moves no images; long enough for a keeper to be restarted."""
FENCE_TRIES = 3
VERIFY_S = 3600.0
"""Hashing all of a node's images (a core does several GB a second); the controller waits by how much it is."""
REBUILD_S = 600.0
FETCH_S = 3600.0
"""Getting one image from object storage; a store that does not answer is given up sooner."""
ENCODE_S = 300.0
UPLOAD_S = 6 * 3600.0
"""Bounds what nobody waits for: a newer attempt ends an upload."""


class KeeperTasks:
    """One node's requests. All methods but ``status`` and ``held`` are called on the reactor's thread."""

    def __init__(
        self,
        node: str,
        job: TrainingJob,
        host: KeeperHost,
        reactor: Reactor,
        emit: Callable[[m.Event], None],
        clock: Clock,
    ) -> None:
        self._node, self._host, self._reactor, self._emit, self._clock = node, host, reactor, emit, clock
        self._slots, self._procs = slots(job), job.spec.workers.procs_per_worker

    def status(self) -> dict[str, Any]:
        """What the keeper has, as it says itself. Blocks until there is a keeper; raises TransferError."""
        return self._host.call("status", timeout=CALL_S)

    def held(self, status: Mapping[str, Any]) -> tuple[HeldImage, ...]:
        """The images in a ``status``."""
        return tuple(HeldImage.from_json(image) for image in status["images"])

    def fence(self, attempt: Attempt, then: Callable[[], None]) -> None:
        """Have the keeper obey ``attempt`` and nobody older; ``then`` only if it does."""

        def done(reply: dict[str, Any] | OutlastError) -> None:
            if isinstance(reply, OutlastError):
                self._complain("fence-failed", reply)
            else:
                then()

        self._reactor.work(partial(self._fence, attempt), done)

    def verify(self, attempt: Attempt, then: Callable[[Inventory], None]) -> None:
        """Fence at ``attempt``, then read every image; a keeper that cannot is taken to hold nothing."""

        def done(reply: dict[str, Any] | OutlastError) -> None:
            if isinstance(reply, StaleAttemptError):
                self._complain("fence-failed", reply)
                return
            if isinstance(reply, OutlastError):
                self._complain("inventory-failed", reply)
                then(Inventory(self._node))
                return
            for text in reply.get("damaged", []):
                self._emit(m.Note(self._node, None, "image-damaged", str(text)))
            then(Inventory.from_json(reply))

        def job() -> dict[str, Any]:
            self._fence(attempt)
            return self._host.call("inventory", timeout=VERIFY_S)

        self._reactor.work(job, done)

    def _fence(self, attempt: Attempt) -> dict[str, Any]:
        """A keeper whose writers of older attempts are slow to leave is asked again."""
        for _ in range(FENCE_TRIES - 1):
            try:
                return self._call("fence", CALL_S, attempt)
            except TransferError as error:
                self._reactor.post(partial(self._complain, "fence-slow", error))
        return self._call("fence", CALL_S, attempt)

    def rebuild(self, start: m.Start, dirty: frozenset[int], then: Callable[[], None]) -> None:
        """Get back what this node lacks of the plan, all images at once; then tell that it is ready, and call ``then``.

        What cannot be rebuilt ends the attempt, as if its rank had, or, where what it is made of is bad, or the store
        says so, with ``RestoreFailed``: nobody trains on bytes that do not verify.
        """
        lacking = _lacking(start.restore, self._node)
        replies: list[dict[str, Any]] = []
        left, failed = len(lacking), False

        def ready() -> None:
            self._emit(_rebuilt(self._node, start.attempt, replies))
            then()

        def done(restore: RankRestore, reply: dict[str, Any] | OutlastError) -> None:
            nonlocal left, failed
            left -= 1
            if isinstance(reply, OutlastError):
                failed = True
                self._complain("rebuild-failed", reply)
                self._emit(self._not_rebuilt(start, restore, reply))
            else:
                replies.append(reply)
            if left == 0 and not failed:
                ready()

        if not lacking:
            ready()
        for restore in lacking:
            fresh = restore.local_rank in dirty
            self._reactor.work(partial(self._rebuild, start, restore, fresh), partial(done, restore))

    def _rebuild(self, start: m.Start, restore: RankRestore, fresh: bool) -> dict[str, Any]:
        assert start.restore is not None
        peers = {node: list(address) for node, address in start.keepers.items()}
        generation, wanted = str(start.restore.generation), restore.to_json()
        seconds = FETCH_S if restore.source == "object" else REBUILD_S
        return self._call(
            "rebuild", seconds, start.attempt, generation=generation, restore=wanted, peers=peers, fresh=fresh
        )

    def _not_rebuilt(self, start: m.Start, restore: RankRestore, error: OutlastError) -> m.RestoreFailed | m.RankExited:
        plan, trouble = start.restore, trouble_of(error)
        assert plan is not None
        stored = restore.source == "object"
        decoded = restore.source == "memory-decode"  # then what is read verifies, what it gives does not
        if trouble is not None and (stored or (decoded and trouble == "bad")):
            told_of = (self._node, start.attempt, plan.generation, str(error))
            return m.RestoreFailed(*told_of, trouble, restore.rank, memory=not stored)
        rank = start.seat * start.procs if plan.direct else restore.rank  # the old world's ranks are nobody's
        told = m.ErrorInfo(self._clock.wall(), type(error).__name__, f"its state could not be rebuilt: {error}")
        return m.RankExited(self._node, start.attempt, rank, error=told, time=told.time)

    def encode(self, encode: m.Encode, attempt: Attempt | None) -> None:
        """Make parity; ``Encoded`` or ``EncodeFailed``. It is not tried again here: peers may be gone."""
        generation = encode.generation
        if attempt is None:
            self._emit(m.EncodeFailed(self._node, generation, "no attempt is in force"))
            return

        def done(reply: dict[str, Any] | OutlastError) -> None:
            if isinstance(reply, CapacityError):
                self._emit(m.Capacity(self._node, None, 0, str(reply)))
            if isinstance(reply, OutlastError):
                self._emit(m.EncodeFailed(self._node, generation, str(reply)))
            else:
                self._emit(m.Encoded(self._node, generation, float(reply["seconds"]), int(reply["bytes"])))

        self._reactor.work(partial(self._call, "encode", ENCODE_S, attempt, False, **_encode_fields(encode)), done)

    def upload(
        self, upload: m.Upload, attempt: Attempt, seat: int, then: Callable[[m.Uploaded | m.UploadFailed], None]
    ) -> None:
        """Put the seat's images of a generation into the store; ``then`` gets how that went. It is not tried again
        here: the keeper itself is patient with the store, and one that had to be restarted has lost its place.
        """
        generation = upload.generation

        def done(reply: dict[str, Any] | OutlastError) -> None:
            if isinstance(reply, OutlastError):
                trouble = trouble_of(reply) or ("denied" if isinstance(reply, RequestError) else "unavailable")
                then(m.UploadFailed(self._node, generation, str(reply), trouble))
            else:
                images = tuple(StoredImage.from_json(image) for image in reply["images"])
                then(m.Uploaded(self._node, generation, images, int(reply["bytes"]), float(reply["seconds"])))

        fields: dict[str, Any] = {"generation": str(generation), "seat": seat, "url": upload.url, "procs": self._procs}
        job = partial(self._call, "upload", UPLOAD_S, attempt, False, bandwidth=upload.bandwidth, **fields)
        self._reactor.work(job, done)

    def store_trouble(self, seconds: float, then: Callable[[str | None], None]) -> None:
        """In so many seconds, tell why the keeper's transfers wait for the store; None: as far as known they do not."""

        def done(reply: dict[str, Any] | OutlastError) -> None:
            then(None if isinstance(reply, OutlastError) else reply["trouble"])

        look = partial(self._host.call, "waiting", timeout=CALL_S)
        self._reactor.after(seconds, lambda: self._reactor.work(look, done))

    def commit(self, commit: m.Commit, attempt: Attempt | None) -> None:
        """Have the keeper remember a commit, and drop what it makes useless; ``CommitAcked`` when it does."""
        if attempt is None:
            return

        def done(reply: dict[str, Any] | OutlastError) -> None:
            if isinstance(reply, OutlastError):
                self._complain("commit-failed", reply)
            else:
                self._emit(m.CommitAcked(self._node, commit.generation))

        fields: dict[str, Any] = {"generation": str(commit.generation), "slots": self._slots, "procs": self._procs}
        self._reactor.work(partial(self._call, "commit", CALL_S, attempt, **fields), done)

    def _call(self, op: str, timeout: float, attempt: Attempt, again: bool = True, **fields: Any) -> dict[str, Any]:
        identity = {"attempt": attempt.number, "incarnation": attempt.incarnation}
        return self._host.call(op, timeout=timeout, again=again, **identity, **fields)

    def _complain(self, kind: str, error: OutlastError) -> None:
        self._emit(m.Note(self._node, None, kind, str(error)))


def trouble_of(error: OutlastError) -> m.StoreTrouble | None:
    """What an error of a transfer says of the store; None when it says nothing."""
    match error:
        case StoreDenied():
            return "denied"
        case ObjectMissing() | CheckpointError() | ImageError():
            return "bad"
        case StoreError():
            return "unavailable"
    return None


def _lacking(plan: RestorePlan | None, node: str) -> list[RankRestore]:
    """The images that ``node`` has to make before anyone can load. From a direct plan's store and peers ranks read
    themselves."""
    wanted = plan.on_node(node) if plan is not None else ()
    if plan is not None and plan.direct:
        return [restore for restore in wanted if restore.source == "memory-decode"]
    return [restore for restore in wanted if restore.source != "memory-local"]


def _rebuilt(node: str, attempt: Attempt, replies: list[dict[str, Any]]) -> m.RestoreReady:
    moved = sum(int(reply["bytes"]) for reply in replies)
    return m.RestoreReady(node, attempt, moved, max((float(reply["seconds"]) for reply in replies), default=0.0))


def _encode_fields(encode: m.Encode) -> dict[str, Any]:
    lengths = {str(local_rank): list(sizes) for local_rank, sizes in enumerate(encode.lengths)}
    return {
        "generation": str(encode.generation),
        "slot": encode.slot,
        "group": {"seats": list(encode.seats), "parity": encode.parity, "lengths": lengths},
        "index": encode.index,
        "peers": [{"host": host, "port": port} for host, port in encode.peers],
        "targets": None if encode.targets is None else list(encode.targets),
    }
