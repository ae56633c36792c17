"""One job's checkpoints in a store: claimed, committed, read, kept in order. See ``manifest`` for what they are.

Objects are written in the order images, manifest, head, and removed in the opposite one; the head moves by conditional
puts alone. So whatever dies between two steps leaves a complete checkpoint or garbage that ``gc`` removes. A head that
another has moved meanwhile is read and changed anew, so that what a person pins is not lost.

Call order for a controller: ``claim`` before every attempt, ``restorable`` for what can be restored; then ``commit``
for each generation whose images are uploaded, and ``expire``. All calls raise StoreUnavailable and StoreDenied as the
store does, CheckpointError for a head that cannot be read, ClaimLost when another controller holds the head. One
``Archive`` is not for several threads at a time.

Manifests without a head are checkpoints whose catalogue was lost. Nobody begins anew over them, and ``gc`` does not
take them for garbage: RequestError names ``trainctl checkpoints repair`` (``outlast.checkpoint.repair``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from outlast.checkpoint import line
from outlast.checkpoint.line import Retention
from outlast.checkpoint.manifest import (
    HEAD_KEY,
    MANIFESTS,
    ClaimMark,
    Entry,
    Head,
    JobMark,
    Manifest,
    NewerFormat,
    checkpoint_of,
    entry_of,
    manifest_key,
    rfc3339,
)
from outlast.checkpoint.store import Store, Unfinished
from outlast.clock import Clock, SystemClock
from outlast.errors import CheckpointError, ObjectMissing, PreconditionFailed, RequestError, StoreUnavailable
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredCheckpoint, StoredImage

TRIES = 100
"""Times that the head may be moved by others while it is being changed."""
ENOUGH = 8
"""Restorable checkpoints that are looked for: should all of them turn out bad, the next claim finds others."""
GRACE_S = 86400.0
"""Seconds for which what no head names is taken for an upload under way."""


@dataclass(frozen=True)
class Restorable:
    """``stored``: complete checkpoints, newest first; ``bad``: those of the line that are none, and why."""

    stored: tuple[StoredCheckpoint, ...]
    bad: tuple[tuple[Entry, str], ...] = ()


@dataclass(frozen=True)
class GcReport:
    """What ``gc`` found and, but for a dry run, removed. ``bytes``: of the objects."""

    keys: tuple[str, ...]
    bytes: int
    unfinished: tuple[Unfinished, ...]
    dry_run: bool


class Archive:
    """The checkpoints of one job; ``store`` is opened at the job's own URL."""

    def __init__(self, store: Store, clock: Clock | None = None) -> None:
        self.store = store
        self._clock = clock or SystemClock()
        self._manifests: dict[str, Manifest] = {}
        self._known: Head | None = None
        self._leaving: dict[Generation, Entry] = {}

    @property
    def url(self) -> str:
        return self.store.url

    # --- the head ---------------------------------------------------------------------------------------------------

    def read_head(self) -> Head | None:
        """The head as it is; None when nobody ever claimed it."""
        return self._read()[0]

    def require_head(self) -> Head:
        """The head as it is. Raises RequestError when there is none, or when it was lost."""
        head = self.read_head()
        if head is None:
            self.check_lost()
            raise self._none()
        return head

    def check_lost(self) -> None:
        """To be called when no head was found. Raises RequestError with the remedy when there are manifests, and still
        no head: another may have made both meanwhile."""
        manifests = (info for info in self.store.list(MANIFESTS) if line.job_of_manifest(info.key) == "")
        if any(True for _ in manifests) and self.read_head() is None:
            raise RequestError(
                f"{self.url} holds manifests of checkpoints, but no {HEAD_KEY}, which says which of them count: it was "
                f"lost or removed. See what can be had back with: trainctl checkpoints repair {self.url}"
            )

    def claim(self, mark: JobMark, claim: ClaimMark, expected: ClaimMark | None, *, resume: bool = False) -> Head:
        """Take the head, made if there is none. ``expected``: see ``line.claimed``; ``resume``: also from another job.

        Raises RequestError when the checkpoints are another job's or the head was lost and this archive never saw it,
        ClaimLost when another came between.
        """

        def take(head: Head) -> Head:
            if head.job != mark and not resume and not head.vacant:
                raise RequestError(
                    f"{self.url} holds the checkpoints of another job, {head.job}; this one is {mark}: go on from them "
                    "with spec.checkpoint.resume (trainctl run --resume), or give this job another name or "
                    "checkpoint.url"
                )
            return replace(line.claimed(head, claim, expected), job=mark)

        return self._move(take, Head(mark))

    def release(self, claim: ClaimMark) -> None:
        """Give the head back if ``claim`` holds it and no checkpoint was made: there is nothing to go on from."""

        def give(head: Head) -> Head:
            return replace(head, claim=None) if head.claim == claim and head.empty else head

        if self.read_head() is not None:
            self._move(give)

    def commit(self, manifest: Manifest, claim: ClaimMark) -> Head:
        """Make a generation, whose images are all uploaded, a checkpoint: its manifest, then the head. May be repeated.

        What it drops from the line, an abandoned branch, is removed from the store by the next ``expire``. Raises
        ClaimLost, and CheckpointError when an image is not there as the manifest says.
        """
        head = self._read()[0] or self._known
        if head is None:
            raise CheckpointError(f"{self.url}/{HEAD_KEY} is not there: claim the checkpoints first")
        line.check_claim(head, claim)
        self._check(manifest)
        entry = head.entry(manifest.generation) or self._put_manifest(manifest)
        dropped: dict[Generation, Entry] = {}

        def move(found: Head) -> Head:
            after = line.committed(found, entry, claim)
            dropped.update({other.generation: other for other in found.line if after.entry(other.generation) is None})
            return after

        head = self._move(move)
        self._leaving.update({key: other for key, other in dropped.items() if head.entry(key) is None})
        try:
            self._check(manifest)  # who collected garbage meanwhile may not have known yet that it is none
        except CheckpointError as error:
            self.quarantine(manifest.generation, str(error), claim)
            raise
        return head

    def quarantine(self, generation: Generation, reason: str, claim: ClaimMark | None = None) -> bool:
        """Take a checkpoint out of the line, its objects kept; False when the line does not have it.

        Raises ClaimLost when ``claim`` is given and does not hold the head.
        """
        time, found = rfc3339(self._clock.wall()), False

        def move(head: Head) -> Head:
            nonlocal found
            if claim is not None:
                line.check_claim(head, claim)
            found = head.entry(generation) is not None
            return line.quarantined(head, generation, reason, time)

        self._move(move)
        return found

    def pin(self, which: int | Generation | None) -> Entry:
        """Keep a checkpoint (a step's newest, a generation's, the newest) out of reach of retention."""
        return self._set_pin(which, line.pinned)

    def unpin(self, which: int | Generation | None) -> Entry:
        """Leave a checkpoint to retention again."""
        return self._set_pin(which, line.unpinned)

    # --- reading ----------------------------------------------------------------------------------------------------

    def find(self, which: int | Generation | None = None) -> Entry:
        """The checkpoint of a step or generation; None: the newest. Raises RequestError that says which there are."""
        return self._pick(self.require_head(), which)

    def manifest(self, entry: Entry) -> Manifest:
        """A checkpoint's manifest. Raises ObjectMissing, and CheckpointError when it is not what the head names."""
        if entry.digest not in self._manifests:
            where = f"{self.url}/{entry.manifest}"
            self._manifests[entry.digest] = Manifest.from_text(self._intact(entry, where), where)
        return self._manifests[entry.digest]

    def complete(self, entry: Entry, *, foreign: bool = False) -> StoredCheckpoint:
        """One checkpoint, for restoring it. Raises ObjectMissing, and CheckpointError when not all of it is there."""
        manifest = self.manifest(entry)
        self._check(manifest)
        return checkpoint_of(manifest, self.url, foreign)

    def restorable(self, enough: int = ENOUGH, *, foreign: bool = False) -> Restorable:
        """The newest ``enough`` checkpoints whose manifests verify and whose objects are all there in full size.

        Those passed over are named with the reason, what expired meanwhile is not. Contents of images are not read.
        ``foreign``: this archive is not that of the job that wants to restore.
        """
        head = self.read_head()
        sizes = {info.key: info.size for info in self.store.list()} if head is not None and head.line else {}
        stored: list[StoredCheckpoint] = []
        bad: list[tuple[Entry, str]] = []
        for entry in reversed(head.line if head is not None else ()):
            if len(stored) == enough:
                break
            reason = self._fault(entry, sizes)
            if reason is None:
                stored.append(checkpoint_of(self.manifest(entry), self.url, foreign))
            else:
                bad.append((entry, reason))
        return Restorable(tuple(stored), self._still_named(bad))

    def _still_named(self, bad: list[tuple[Entry, str]]) -> tuple[tuple[Entry, str], ...]:
        """Those that the head names still: what retention has taken out of it since is removed, not damaged."""
        head = self.read_head() if bad else None
        return tuple((entry, reason) for entry, reason in bad if head is not None and head.entry(entry.generation))

    def check_named(self, entry: Entry) -> None:
        """To be called when not all of a checkpoint was there. Raises RequestError when the head names it no more, as
        far as there is one that can be read."""
        try:
            head = self.read_head()
        except CheckpointError:
            return
        if head is not None and head.entry(entry.generation) is None:
            raise RequestError(
                f"the checkpoint of step {entry.step} was removed from {self.url} while it was read: take a newer one, "
                f"or keep one first with: trainctl checkpoints pin {self.url}"
            )

    # --- removing ---------------------------------------------------------------------------------------------------

    def expire(self, retention: Retention, claim: ClaimMark | None = None) -> tuple[Entry, ...]:
        """Remove what retention does not keep, and what commits dropped: from the head, then the manifests, then the
        objects. What was left behind by a call that failed is removed by the next one.

        Raises ClaimLost when ``claim`` is given and does not hold the head.
        """
        removed: tuple[Entry, ...] = ()

        def move(head: Head) -> Head:
            nonlocal removed
            if claim is not None:
                line.check_claim(head, claim)
            kept, removed = line.expired(head, retention.keep_last, retention.keep_every_steps)
            return kept

        self._move(move)
        self._leaving.update({entry.generation: entry for entry in removed})
        gone = tuple(self._leaving.values())
        self.store.delete([entry.manifest for entry in gone])
        for entry in gone:
            self.store.delete([info.key for info in self.store.list(f"{entry.generation}/")])
            del self._leaving[entry.generation]
        return gone

    def gc(self, *, dry_run: bool = True, grace_s: float = GRACE_S) -> GcReport:
        """Find, and but for a dry run remove, what no reader needs and nobody has touched for ``grace_s``.

        Raises RequestError when the head was lost: without it nobody knows what is needed.
        """
        now = self._clock.wall()
        listing = {info.key: info for info in self.store.list()}
        unfinished = tuple(upload for upload in self.store.unfinished() if now - upload.started >= grace_s)
        head = self.read_head()
        if head is None:
            self.check_lost()
        keys = line.garbage(listing.values(), head, self._readable(head), now, grace_s)
        if not dry_run:
            keys = self._remove(keys, head)
            for upload in unfinished:
                self.store.call_off(upload)
        return GcReport(tuple(keys), sum(listing[key].size for key in keys), unfinished, dry_run)

    def _remove(self, garbage: Iterable[str], known: Head | None) -> list[str]:
        """Delete what is garbage still, a generation at a time: a job that runs may have named one since ``known``."""
        groups: dict[str, list[str]] = {}
        for key in garbage:
            groups.setdefault(line.generation_of(key), []).append(key)
        for generation in list(groups):
            head, which = self.read_head(), Generation.parse(generation)
            named_before = known is not None and known.entry(which) is not None
            if head is not None and head.entry(which) is not None and not named_before:
                del groups[generation]
            else:
                self.store.delete(groups[generation])
        return [key for group in groups.values() for key in group]

    # --- how --------------------------------------------------------------------------------------------------------

    def _read(self) -> tuple[Head | None, str | None]:
        """The head and its etag. What was damaged on its way is read again, once."""
        where = f"{self.url}/{HEAD_KEY}"
        try:
            data, etag = self.store.get(HEAD_KEY)
            try:
                self._known = Head.from_text(data, where)
            except CheckpointError:
                data, etag = self.store.get(HEAD_KEY)
                self._known = self._parse(data, where)
        except ObjectMissing:
            return None, None
        return self._known, etag

    def _parse(self, data: bytes, where: str) -> Head:
        try:
            return Head.from_text(data, where)
        except NewerFormat:
            raise
        except CheckpointError as error:
            remedy = f"see what can be had back with: trainctl checkpoints repair {self.url}"
            raise CheckpointError(f"{error}; {remedy}") from error

    def _move(self, change: Callable[[Head], Head], fresh: Head | None = None) -> Head:
        """Replace the head by what ``change`` makes of it. A head that the store lost is taken from memory; without
        that from ``fresh``, if there are no manifests either. Raises RequestError when there is none at all."""
        for _ in range(TRIES):
            found, etag = self._read()
            base = found or self._known
            if base is None:
                self.check_lost()
                base = fresh
            if base is None:
                raise self._none()
            head = change(base)
            if head == found:
                return head
            try:
                self.store.put(HEAD_KEY, head.to_text().encode(), if_match=etag, if_absent=etag is None)
            except PreconditionFailed:
                continue
            self._known = head
            return head
        raise StoreUnavailable(f"{self.url}/{HEAD_KEY} was moved by others {TRIES} times: try again later")

    def _none(self) -> RequestError:
        return RequestError(f"{self.url} holds no checkpoints: its URL must end with a job's namespace and name")

    def _put_manifest(self, manifest: Manifest) -> Entry:
        """Write a manifest that no head names. One that is there already, of the same images, is taken as it is:
        another controller may be about to name it."""
        key, data = manifest_key(manifest.generation), manifest.to_text().encode()
        for _ in range(TRIES):
            try:
                self.store.put(key, data, if_absent=True)
                return entry_of(manifest, data)
            except PreconditionFailed:
                pass
            try:
                found, etag = self.store.get(key)
                if (there := _same(found, manifest)) is not None:
                    return entry_of(there, found)
                self.store.put(key, data, if_match=etag)
                return entry_of(manifest, data)
            except (ObjectMissing, PreconditionFailed):
                continue
        raise StoreUnavailable(f"{self.url}/{key} was changed by others {TRIES} times: try again later")

    def _check(self, manifest: Manifest) -> None:
        try:
            manifest.check()
        except ValueError as error:
            raise CheckpointError(f"{manifest.generation} is no complete checkpoint: {error}") from error
        prefixes = {image.key.rpartition("/")[0] for image in manifest.images}
        sizes = {info.key: info.size for prefix in prefixes for info in self.store.list(f"{prefix}/")}
        if (reason := _lacking(manifest.images, sizes)) is not None:
            raise CheckpointError(f"{self.url} does not hold all of {manifest.generation}: {reason}")

    def _fault(self, entry: Entry, sizes: Mapping[str, int]) -> str | None:
        """Why a checkpoint cannot be restored, as far as a listing tells. Raises NewerFormat: that is no fault."""
        try:
            return _lacking(self.manifest(entry).images, sizes)
        except NewerFormat:
            raise
        except ObjectMissing:
            return f"{entry.manifest} is missing"
        except CheckpointError as error:
            return str(error)

    def _intact(self, entry: Entry, where: str) -> bytes:
        """A manifest's bytes. What was damaged on its way is read again, once."""
        for _ in range(2):
            data, _ = self.store.get(entry.manifest)
            if hashlib.sha256(data).hexdigest() == entry.digest:
                return data
        raise CheckpointError(f"{where} is damaged: its SHA-256 is not the one that {HEAD_KEY} names")

    def _readable(self, head: Head | None) -> Iterable[Manifest]:
        for entry in head.line if head is not None else ():
            try:
                yield self.manifest(entry)
            except (ObjectMissing, CheckpointError):
                continue

    def _pick(self, head: Head, which: int | Generation | None) -> Entry:
        if which is None:
            entry = head.line[-1] if head.line else None
        else:
            entry = head.entry(which) if isinstance(which, Generation) else head.at_step(which)
        if entry is None:
            wanted = "" if which is None else f" of step {which}" if isinstance(which, int) else f" {which}"
            raise RequestError(f"{self.url} has no checkpoint{wanted}: {_what_there_is(head)}")
        return entry

    def _set_pin(self, which: int | Generation | None, move: Callable[[Head, Generation], Head]) -> Entry:
        picked: list[Entry] = []

        def change(head: Head) -> Head:
            picked[:] = [self._pick(head, which)]
            return move(head, picked[0].generation)

        after = self._move(change).entry(picked[0].generation)
        return after or picked[0]


def _lacking(images: Iterable[StoredImage], sizes: Mapping[str, int]) -> str | None:
    """What is wrong with the first image that is not there in full size."""
    for image in images:
        size = sizes.get(image.key)
        if size is None:
            return f"{image.key} is missing"
        if size != image.size:
            return f"{image.key} has {size} bytes, not {image.size}"
    return None


def _same(data: bytes, manifest: Manifest) -> Manifest | None:
    """The manifest in ``data`` if it is of the same images."""
    try:
        there = Manifest.from_text(data)
    except CheckpointError:
        return None
    same = (there.job, there.generation, there.images) == (manifest.job, manifest.generation, manifest.images)
    return there if same else None


def _what_there_is(head: Head) -> str:
    steps = ", ".join(str(entry.step) for entry in head.line) or "none"
    bad = ", ".join(str(item.entry.step) for item in head.quarantined)
    return f"there are those of steps {steps}" + (f", and in quarantine {bad}" if bad else "")
