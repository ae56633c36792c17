"""What the object tier needs of a store, and nothing more: small objects with conditional puts, large ones in parts.

Two kinds: ``s3://bucket/prefix`` (``outlast.checkpoint.s3``) and ``file:///folder`` (``outlast.checkpoint.folder``);
``open_store`` tells them apart. Keys are relative to the URL, with ``/`` between parts, without ``.`` and ``..``.

Who calls what: the controller ``get`` and ``put`` on the head and manifests, ``delete``, ``list`` and ``unfinished``;
keepers ``upload`` and ``read_into``; ranks and commands ``read_into``. An object is whole or absent at every moment:
what a reader sees under a key was put there by one ``put`` or ``upload`` that ended well.

Errors: ObjectMissing, PreconditionFailed, StoreDenied (configuration, credentials, permissions: at once, with the
remedy) and StoreUnavailable (5xx, throttling, timeouts, lost connections, a full disk, a file system that fails: after
having tried again, with growing pauses and jitter, for ``patience_s``). Nothing of boto3 or OSError gets out. Any
thread may call any method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from outlast.errors import RequestError

PART_BYTES = 16 << 20
"""Of a large object that is sent or read at a time; more where an object would have more than 10,000 parts."""
PARALLEL = 4
"""Parts of one object that are under way at a time."""


@dataclass(frozen=True)
class ObjectInfo:
    """``size`` in bytes; ``etag`` changes with the content; ``modified`` in wall seconds, by the store's clock."""

    key: str
    size: int
    etag: str
    modified: float


@dataclass(frozen=True)
class Unfinished:
    """An upload that was begun and neither ended nor called off. ``token`` is the store's own name for it."""

    key: str
    token: str
    started: float


def _nothing(_: str | None) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class StoreOptions:
    """``patience_s``: how long a call goes on trying, a transfer from its first failure on; ``timeout_s``: for one
    request to make any progress; ``bandwidth``: bytes a second for all uploads through this store together, what is
    sent again included (None: no limit). ``on_wait`` is told why, whenever a request is to be made again, and None when
    it no longer waits: it was answered, given up or called off. Any thread may tell, each of its own requests."""

    patience_s: float = 60.0
    timeout_s: float = 20.0
    parallel: int = PARALLEL
    part_bytes: int = PART_BYTES
    bandwidth: int | None = None
    on_wait: Callable[[str | None], None] = _nothing


class Store(Protocol):
    """One place for objects. See the module's text for errors and threads."""

    @property
    def url(self) -> str:
        """The URL that it was opened with, without a slash at its end."""
        ...

    def get(self, key: str) -> tuple[bytes, str]:
        """A small object and its etag."""
        ...

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Make or replace a small object; its new etag. ``if_match``: only if its etag is still that; ``if_absent``:
        only if there is none; PreconditionFailed else. A conditional put whose answer was lost is looked up, not
        repeated blindly: when the object has exactly this content, it was ours.
        """
        ...

    def upload(self, key: str, data: memoryview, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Make or replace a large object, its parts in parallel, without copying ``data`` as a whole.

        StaleAttemptError when ``cancelled`` says yes between two parts; what was sent is then called off. An upload
        that somebody else called off begins anew: never ObjectMissing.
        """
        ...

    def read_into(
        self, key: str, offset: int, target: memoryview, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Fill ``target`` from ``offset`` on, in parallel where it is large. CheckpointError when the object ends
        before."""
        ...

    def head(self, key: str) -> ObjectInfo:
        """What an object is, without its content."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix``, by key."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; those that are not there are no error."""
        ...

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        """Uploads that nobody ended: garbage when they are old."""
        ...

    def call_off(self, upload: Unfinished) -> None:
        """Remove what such an upload has sent."""
        ...

    def close(self) -> None:
        """Let connections go."""
        ...


_DEFAULTS = StoreOptions()


def open_store(url: str, options: StoreOptions = _DEFAULTS) -> Store:
    """The store at ``url``. Opening asks nothing of it yet. Raises RequestError for a URL that is none, StoreDenied for
    a configuration that cannot be used."""
    scheme = urlsplit(url).scheme
    if scheme == "file":
        from outlast.checkpoint.folder import FolderStore

        return FolderStore(url, options)
    if scheme == "s3":
        from outlast.checkpoint.s3 import S3Store

        return S3Store(url, options)
    raise RequestError(f"{url} is no store: write s3://bucket/prefix or file:///folder")
