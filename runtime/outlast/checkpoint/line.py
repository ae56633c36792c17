"""How a head moves: claimed, moved forward, pruned. Pure.

Each function takes the head that was found and gives the one that shall be, or refuses. ``outlast.checkpoint.archive``
puts that in its place with a conditional put, and asks again when another was quicker.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from outlast.checkpoint.manifest import MANIFESTS, ClaimMark, Entry, Head, Manifest, Quarantined
from outlast.checkpoint.store import ObjectInfo
from outlast.errors import ClaimLost
from outlast.snapshot.identity import Generation

_GENERATION = r"\d+-[0-9a-zA-Z]+-\d+"
_OWN_KEY = re.compile(rf"{MANIFESTS}(?P<named>{_GENERATION})\.json|(?P<within>{_GENERATION})/.+")
_MANIFEST_BELOW = re.compile(rf"(?:(?P<job>.+)/)?{MANIFESTS}{_GENERATION}\.json")


def job_of_manifest(key: str) -> str | None:
    """Below which path a manifest lies ("": none); None when the key is of another form: many a bucket has
    ``manifests/`` of its own."""
    match = _MANIFEST_BELOW.fullmatch(key)
    return None if match is None else match["job"] or ""


def generation_of(key: str) -> str:
    """Of what generation an object is; "" when the key is not of a checkpoint's form."""
    match = _OWN_KEY.fullmatch(key)
    return "" if match is None else match["named"] or match["within"]


def claimed(head: Head, claim: ClaimMark, expected: ClaimMark | None) -> Head:
    """The head in the hands of ``claim``. Raises ClaimLost when it is in those of somebody who came between.

    ``expected``: the claim that the controller found at first, or its own last one. That claim's controller may be
    succeeded, whatever it has claimed since; so may this very controller. With None, nothing having been found, so may
    any earlier attempt.
    """
    found = head.claim
    if expected is None:
        takeable = found is None or found.controller == claim.controller or found.attempt < claim.attempt
    else:
        takeable = found is None or found.controller in (claim.controller, expected.controller)
    if not takeable:
        raise ClaimLost(f"{_owner(head)}, not by {claim} or who was there before it: this controller must stop")
    return replace(head, claim=claim)


def committed(head: Head, entry: Entry, claim: ClaimMark) -> Head:
    """The head with a new checkpoint at the end of its line. Raises ClaimLost when ``claim`` does not hold it.

    What other attempts left at or beyond that step is an abandoned branch and goes, unless a person has pinned it. The
    same generation is replaced and stays pinned; it is no longer in quarantine.
    """
    check_claim(head, claim)
    earlier, later = [], []
    for other in head.line:
        same_attempt = _attempt_of(other) == _attempt_of(entry)
        if other.generation == entry.generation:
            entry = replace(entry, pinned=entry.pinned or other.pinned)
        elif same_attempt and other.step > entry.step:
            later.append(other)
        elif same_attempt or other.step < entry.step or other.pinned:
            earlier.append(other)
    rest = tuple(item for item in head.quarantined if item.entry.generation != entry.generation)
    return replace(head, line=(*earlier, entry, *later), quarantined=rest)


def check_claim(head: Head, claim: ClaimMark) -> None:
    """Raises ClaimLost when the head is in other hands."""
    if head.claim != claim:
        raise ClaimLost(f"{_owner(head)}, not by {claim} any more: this controller must stop")


def quarantined(head: Head, generation: Generation, reason: str, time: str) -> Head:
    """The head without that checkpoint in its line, if it was there. ``time``: RFC 3339."""
    entry = head.entry(generation)
    if entry is None:
        return head
    line = tuple(other for other in head.line if other is not entry)
    return replace(head, line=line, quarantined=(*head.quarantined, Quarantined(entry, reason, time)))


def pinned(head: Head, generation: Generation) -> Head:
    """The head with that checkpoint out of reach of retention."""
    return _with_pin(head, generation, True)


def unpinned(head: Head, generation: Generation) -> Head:
    """The head with that checkpoint left to retention again."""
    return _with_pin(head, generation, False)


def rebuilt(found: Iterable[tuple[Manifest, Entry]], damaged: Iterable[Quarantined] = ()) -> Head:
    """The head that manifests without one tell of, claimed by nobody and with nothing pinned.

    They are taken in the order of attempts, each commit dropping what an earlier attempt left at or beyond its step:
    that is the line as it was, with what retention was about to remove and what was written and never committed, which
    is as sound. The job is that of the newest. Raises ValueError when there is none.
    """
    ordered = sorted(found, key=lambda item: (item[0].generation.attempt, item[0].step))
    if not ordered:
        raise ValueError("there are no manifests")
    unclaimed = ClaimMark(0, "", "")
    head = Head(ordered[-1][0].job, unclaimed)
    for _, entry in ordered:
        head = committed(head, entry, unclaimed)
    return replace(head, claim=None, quarantined=tuple(damaged))


@dataclass(frozen=True)
class Retention:
    """What stays: the newest ``keep_last``, the first at or after each multiple of ``keep_every_steps``, the pinned."""

    keep_last: int = 3
    keep_every_steps: int | None = None


def expired(head: Head, keep_last: int, keep_every_steps: int | None) -> tuple[Head, tuple[Entry, ...]]:
    """The head without what retention does not keep, and the entries that went. The newest never goes."""
    kept = set(head.line[-max(1, keep_last) :])
    kept.update(entry for entry in head.line if entry.pinned)
    if keep_every_steps:
        before = 0
        for entry in sorted(head.line, key=lambda entry: entry.step):
            if entry.step // keep_every_steps > before:
                kept.add(entry)
            before = entry.step // keep_every_steps
    removed = tuple(entry for entry in head.line if entry not in kept)
    return replace(head, line=tuple(entry for entry in head.line if entry in kept)), removed


def garbage(
    listing: Iterable[ObjectInfo], head: Head | None, manifests: Iterable[Manifest], now: float, grace_s: float
) -> list[str]:
    """Keys of the objects that no reader needs and nobody is about to need, manifests first.

    ``manifests``: those of the line, as far as they could be read. An object is needed when the head or one of them
    names it, or when it belongs to a generation in quarantine or of an unreadable manifest. What a generation uploaded
    last is its age: an upload may be long under way. Keys that are not of a checkpoint's form are left alone.
    """
    needed, whole = _needed(head, manifests)
    groups: dict[str, list[ObjectInfo]] = {}
    for info in listing:
        generation = generation_of(info.key)
        if generation and generation not in whole:
            groups.setdefault(generation, []).append(info)
    old = [group for group in groups.values() if now - max(info.modified for info in group) >= grace_s]
    keys = [info.key for group in old for info in group if info.key not in needed]
    return sorted(keys, key=lambda key: (not key.startswith(MANIFESTS), key))


def _needed(head: Head | None, manifests: Iterable[Manifest]) -> tuple[set[str], set[str]]:
    """Keys that are needed, and generations of which everything is."""
    if head is None:
        return set(), set()
    known = {manifest.generation: manifest for manifest in manifests}
    named = [*head.line, *(item.entry for item in head.quarantined)]
    keys = {entry.manifest for entry in named}
    keys.update(image.key for manifest in known.values() for image in manifest.images)
    readable = {entry.generation for entry in head.line if entry.generation in known}
    return keys, {str(entry.generation) for entry in named if entry.generation not in readable}


def _attempt_of(entry: Entry) -> tuple[int, str]:
    return entry.generation.attempt, entry.generation.incarnation


def _owner(head: Head) -> str:
    return f"the checkpoints of {head.job} are claimed by {head.claim or 'nobody'}"


def _with_pin(head: Head, generation: Generation, pin: bool) -> Head:
    line = (replace(entry, pinned=pin) if entry.generation == generation else entry for entry in head.line)
    return replace(head, line=tuple(line))
