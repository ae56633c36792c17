"""Makes the head anew out of manifests when it was lost or cannot be read. Needs numpy, unlike the archive itself.

::

    all manifests -> those of images that verify, byte for byte -> the line that they tell of -> head.json, if told to
                  -> the others: into quarantine, their objects kept

A head that reads well is left alone, and so is one that somebody makes meanwhile. Pins and the reasons of former
quarantines are lost with the head. No job may be running on it: its controller would find its claim gone, and stop.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from outlast.checkpoint import line
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import (
    HEAD_KEY,
    MANIFESTS,
    Entry,
    Head,
    Manifest,
    NewerFormat,
    Quarantined,
    entry_of,
    manifest_key,
    rfc3339,
)
from outlast.checkpoint.saying import Progress, carry_out
from outlast.checkpoint.store import ObjectInfo, Store, open_store
from outlast.checkpoint.verify import verify
from outlast.clock import Clock, SystemClock
from outlast.errors import CheckpointError, ObjectMissing, RequestError
from outlast.snapshot.identity import Generation


@dataclass(frozen=True)
class Finding:
    """What there is without a head. ``manifests`` that can be read, with the entry of each; ``unreadable``: the others;
    ``etag``: of the head that cannot be read, None where there is none."""

    manifests: tuple[tuple[Manifest, Entry], ...]
    unreadable: tuple[Quarantined, ...]
    etag: str | None

    @property
    def bytes(self) -> int:
        """Of all images: what is to be read."""
        return sum(entry.bytes for _, entry in self.manifests)


def look(store: Store, clock: Clock) -> Finding | None:
    """What there is; None when the head is there and reads well. Raises RequestError when there is nothing at all,
    NewerFormat for a head or manifest of a newer version."""
    etag = _etag_of_damaged_head(store)
    if etag == "":
        return None
    manifests, unreadable = [], []
    for info in store.list(MANIFESTS):
        data, _ = store.get(info.key)
        try:
            manifest = Manifest.from_text(data, f"{store.url}/{info.key}")
            if manifest_key(manifest.generation) != info.key:
                raise CheckpointError(f"{store.url}/{info.key} is the manifest of {manifest.generation}")
            manifests.append((manifest, entry_of(manifest, data)))
        except NewerFormat:
            raise
        except CheckpointError as error:
            unreadable += _kept(info, data, str(error), clock)
    if not manifests:
        raise RequestError(f"{store.url} holds no manifest that can be read: there is nothing to make a head of")
    return Finding(tuple(manifests), tuple(unreadable), etag)


def _kept(info: ObjectInfo, data: bytes, reason: str, clock: Clock) -> list[Quarantined]:
    """A manifest that cannot be read keeps its objects, for people to look at. A key of another form is no manifest."""
    try:
        generation = Generation.parse(info.key.removeprefix(MANIFESTS).removesuffix(".json"))
    except ValueError:
        return []
    digest, created = hashlib.sha256(data).hexdigest(), rfc3339(info.modified)
    return [
        Quarantined(Entry(generation, generation.step, info.key, digest, 0, created), reason, rfc3339(clock.wall()))
    ]


def _etag_of_damaged_head(store: Store) -> str | None:
    """None: there is no head; "": it reads well."""
    etag = None
    for _ in range(2):  # what was damaged on its way is read again
        try:
            data, etag = store.get(HEAD_KEY)
            Head.from_text(data, f"{store.url}/{HEAD_KEY}")
            return ""
        except ObjectMissing:
            return None
        except NewerFormat:
            raise
        except CheckpointError:
            continue
    return etag


def rebuild(archive: Archive, finding: Finding, progress: Callable[[int], None], clock: Clock) -> Head:
    """The head that the manifests tell of, every byte read. Raises what the store raises."""
    sound: list[tuple[Manifest, Entry]] = []
    damaged = list(finding.unreadable)
    for manifest, entry in finding.manifests:
        problems = verify(archive, entry, progress)
        if problems:
            damaged.append(Quarantined(entry, problems[0].text, rfc3339(clock.wall())))
        else:
            sound.append((manifest, entry))
    if sound:
        return line.rebuilt(sound, damaged)
    newest = max(finding.manifests, key=lambda found: found[0].generation)
    return Head(newest[0].job, quarantined=tuple(damaged))


def write(store: Store, head: Head, etag: str | None) -> None:
    """Put it in its place. Raises PreconditionFailed when another head came there meanwhile."""
    store.put(HEAD_KEY, head.to_text().encode(), if_match=etag, if_absent=etag is None)


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m outlast.checkpoint.repair URL [--write]``: what ``trainctl checkpoints repair`` starts."""
    parser = argparse.ArgumentParser(prog="python -m outlast.checkpoint.repair")
    parser.add_argument("url", help="the job's own URL: <store>/<namespace>/<name>")
    parser.add_argument("--write", action="store_true", help="put the head in its place")
    args = parser.parse_args(argv)
    return carry_out(lambda: _repair(args.url, args.write))


def _repair(url: str, wanted: bool) -> dict[str, Any]:
    with closing(open_store(url)) as store:
        finding = look(store, SystemClock())
        if finding is None:
            return {"text": f"{url}/{HEAD_KEY} is there and can be read: nothing is to be repaired", "written": False}
        head = rebuild(Archive(store), finding, Progress(finding.bytes).add, SystemClock())
        if wanted:
            write(store, head, finding.etag)
    return _told(url, finding, head, wanted)


def _told(url: str, finding: Finding, head: Head, written: bool) -> dict[str, Any]:
    """What was found, for people and for programs."""
    named = {entry.generation for entry in head.line} | {item.entry.generation for item in head.quarantined}
    dropped = [entry for _, entry in finding.manifests if entry.generation not in named]
    steps = ", ".join(str(entry.step) for entry in head.line) or "none"
    did = f"{HEAD_KEY} is written" if written else "nothing was written: add --write"
    return {
        "text": f"{url} has checkpoints of steps {steps} that verify; {did}",
        "written": written,
        "job": head.job.to_json(),
        "checkpoints": [entry.to_json() for entry in reversed(head.line)],
        "quarantined": [item.to_json() for item in head.quarantined],
        "abandoned": [entry.to_json() for entry in dropped],
    }


if __name__ == "__main__":
    raise SystemExit(main())
