"""Reads every byte of a checkpoint and compares every block's checksum. Needs numpy, unlike the archive itself.

Memory: ``PARALLEL`` buffers of ``PIECE`` bytes, and each image's checksums (a 32,768th of its size).
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import Entry, Manifest
from outlast.checkpoint.reading import ObjectShard
from outlast.checkpoint.saying import Progress, carry_out
from outlast.checkpoint.store import open_store
from outlast.errors import CheckpointError, ObjectMissing
from outlast.snapshot.stored import StoredImage

PARALLEL = 4
"""Images that are read at a time."""
PIECE = 4 << 20
"""Bytes that are read at a time of each."""


@dataclass(frozen=True)
class Problem:
    """What is wrong with one object. ``rank`` is None where it is the manifest."""

    key: str
    rank: int | None
    text: str


def verify(archive: Archive, entry: Entry, progress: Callable[[int], None] = lambda _: None) -> list[Problem]:
    """Everything that is wrong with a checkpoint; nothing when it is sound.

    ``progress`` is called with the bytes read since its last call, from one thread at a time; they add up to
    ``entry.bytes`` for what can be read. Raises StoreUnavailable, StoreDenied, and RequestError when it was removed
    meanwhile.
    """
    problems = _problems(archive, entry, progress)
    if problems:
        archive.check_named(entry)
    return problems


def _problems(archive: Archive, entry: Entry, progress: Callable[[int], None]) -> list[Problem]:
    try:
        manifest = archive.manifest(entry)
    except (ObjectMissing, CheckpointError) as error:
        return [Problem(entry.manifest, None, str(error))]
    lock = threading.Lock()

    def tell(nbytes: int) -> None:
        with lock:
            progress(nbytes)

    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="outlast-verify") as pool:
        found = list(pool.map(lambda image: _check(archive, manifest, image, tell), manifest.images))
    return [problem for problems in found for problem in problems]


def _check(archive: Archive, manifest: Manifest, image: StoredImage, tell: Callable[[int], None]) -> list[Problem]:
    """What is wrong with one image; one problem for each piece that does not verify."""
    shard = ObjectShard(archive.store, image.key, manifest.generation)
    try:
        layout = shard.layout()
    except (ObjectMissing, CheckpointError) as error:
        return [Problem(image.key, image.rank, str(error))]
    problems = []
    if layout.total_bytes != image.size:
        text = f"{shard} has {layout.total_bytes} bytes, not the {image.size} that its manifest names"
        problems.append(Problem(image.key, image.rank, text))
    if shard.checksum != image.checksum:
        text = f"{shard} is another image than its manifest names: checksum {shard.checksum}, not {image.checksum}"
        problems.append(Problem(image.key, image.rank, text))
    buffer = memoryview(bytearray(PIECE))
    for start in range(0, layout.trailer_offset, PIECE):
        length = min(PIECE, layout.trailer_offset - start)
        try:
            shard.read_into(start, buffer[:length])
        except CheckpointError as error:
            problems.append(Problem(image.key, image.rank, str(error)))
        tell(length)
    tell(layout.total_bytes - layout.trailer_offset)
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    """``python -m outlast.checkpoint.verify URL [--step N]``: what ``trainctl checkpoints verify`` starts."""
    parser = argparse.ArgumentParser(prog="python -m outlast.checkpoint.verify")
    parser.add_argument("url", help="the job's own URL: <store>/<namespace>/<name>")
    parser.add_argument("--step", type=int, default=None, help="the newest by default")
    args = parser.parse_args(argv)

    def work() -> dict[str, Any]:
        with closing(open_store(args.url)) as store:
            archive = Archive(store)
            entry = archive.find(args.step)
            problems = verify(archive, entry, Progress(entry.bytes).add)
        summary = f"{len(problems)} problems" if problems else f"all {entry.bytes} bytes verify"
        return {
            "exit": 1 if problems else 0,
            "text": f"step {entry.step} of {args.url}: {summary}",
            "step": entry.step,
            "generation": str(entry.generation),
            "bytes": entry.bytes,
            "problems": [asdict(problem) for problem in problems],
        }

    return carry_out(work)


if __name__ == "__main__":
    raise SystemExit(main())
