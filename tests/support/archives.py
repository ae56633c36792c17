"""Stores that die, or stand still, between two of their operations, and small checkpoints to put into them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import ClaimMark, JobMark, Manifest, image_key, rfc3339
from outlast.checkpoint.store import ObjectInfo, Store, StoreOptions, Unfinished, open_store
from outlast.clock import ManualClock
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredImage

T = TypeVar("T")

MARK = JobMark("default", "demo", "0123456789abcdef")
FUTURE = ManualClock(wall_offset=4e9)
"""A clock by which everything was long ago."""


class Killed(Exception):
    """The process that used the store is no more."""


class SteppedStore:
    """A store that calls ``step`` with each operation's name, before it and after it; each object is removed by an
    operation of its own."""

    def __init__(self, store: Store, step: Callable[[str], None]) -> None:
        self._store = store
        self._step = step

    @property
    def url(self) -> str:
        return self._store.url

    def _do(self, name: str, call: Callable[[], T]) -> T:
        self._step(name)
        result = call()
        self._step(f"{name} done")
        return result

    def get(self, key: str) -> tuple[bytes, str]:
        return self._do(f"get {key}", lambda: self._store.get(key))

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        return self._do(f"put {key}", lambda: self._store.put(key, data, if_match=if_match, if_absent=if_absent))

    def upload(self, key: str, data: memoryview, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._do(f"upload {key}", lambda: self._store.upload(key, data, cancelled))

    def read_into(
        self, key: str, offset: int, target: memoryview, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        self._do(f"read {key}", lambda: self._store.read_into(key, offset, target, cancelled))

    def head(self, key: str) -> ObjectInfo:
        return self._do(f"head {key}", lambda: self._store.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(self._do(f"list {prefix}", lambda: list(self._store.list(prefix))))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._do(f"delete {key}", partial(self._store.delete, [key]))

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        return iter(self._do("unfinished", lambda: list(self._store.unfinished(prefix))))

    def call_off(self, upload: Unfinished) -> None:
        self._do("call off", lambda: self._store.call_off(upload))

    def close(self) -> None:
        self._store.close()


class TurnTaker:
    """Runs ``work`` in a thread that stands still before and after every operation of its store until ``turn``."""

    def __init__(self, store: Store, work: Callable[[Store], None]) -> None:
        self.finished = False
        self.error: Exception | None = None
        self._go, self._stands = threading.Semaphore(0), threading.Semaphore(0)
        self._given_up = False
        self._work = work
        self._store = SteppedStore(store, lambda _: self._stand())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._stands.acquire(timeout=10)

    def turn(self) -> None:
        """Let it do one operation's first or second half. Returns when it stands again or has finished."""
        if not self.finished:
            self._go.release()
            assert self._stands.acquire(timeout=10), "it did not come to its next operation"

    def end(self) -> None:
        """Have the thread end where it stands."""
        self._given_up = True
        self._go.release()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _stand(self) -> None:
        self._stands.release()
        self._go.acquire()
        if self._given_up:
            raise Killed

    def _run(self) -> None:
        try:
            self._stand()
            self._work(self._store)
        except Killed:
            pass
        except Exception as error:  # noqa: BLE001 - the test looks at it
            self.error = error
        self.finished = True
        self._stands.release()


def folder(path: Path) -> Store:
    """A store in a folder."""
    return open_store(f"file://{path}", StoreOptions(patience_s=0.2))


def claim_of(attempt: int, controller: str = "one") -> ClaimMark:
    return ClaimMark(attempt, f"{attempt:016x}", controller)


def generation_of(claim: ClaimMark, step: int) -> Generation:
    return Generation(claim.attempt, step, claim.incarnation)


def upload(store: Store, generation: Generation, world: int = 2) -> tuple[StoredImage, ...]:
    """Objects that are images in name and size alone."""
    images = []
    for rank in range(world):
        data, key = f"{generation} {rank}".encode(), image_key(generation, rank)
        store.upload(key, memoryview(data))
        images.append(StoredImage(rank, rank, 0, key, len(data), "0" * 16))
    return tuple(images)


def manifest_of(generation: Generation, images: tuple[StoredImage, ...], created: float = 0.0) -> Manifest:
    return Manifest(MARK, generation, generation.step, len(images), 1, rfc3339(created), images, {"script": "abc"})


def checkpoint(archive: Archive, claim: ClaimMark, step: int) -> Generation:
    """Upload and commit."""
    generation = generation_of(claim, step)
    archive.commit(manifest_of(generation, upload(archive.store, generation)), claim)
    return generation


def keys(store: Store) -> set[str]:
    return {info.key for info in store.list()}
