"""``file:///folder`` as a store: for one machine, a network file system, and tests.

An object is a file below the folder. It is written under another name in ``.drafts``, made durable with fsync, and
moved into place, so that a reader or a crash at any moment finds it whole or not at all. Conditional puts take a lock
file, which holds between processes of one machine (and between machines where the file system's locks do).

A full disk and a file system that fails are waited for. What waits keeps no draft and begins anew, so that of several
one finds the room that the drafts of the others took. What this user may not do is told at once.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from outlast.checkpoint.pacing import Pace
from outlast.checkpoint.retrying import again
from outlast.checkpoint.store import ObjectInfo, StoreOptions, Unfinished
from outlast.errors import (
    CheckpointError,
    ObjectMissing,
    PreconditionFailed,
    RequestError,
    StaleAttemptError,
    StoreDenied,
    StoreError,
    StoreUnavailable,
)

T = TypeVar("T")
DRAFTS = ".drafts"
LOCK = ".lock"
SMALL = 1 << 20
"""Up to this size a head has the etag that ``get`` and ``put`` have; larger objects are not read for it."""

_TRIES = 5
_LOCK_PAUSES_S = (0.002, 0.25)
"""Between two looks at a lock that is held: as a rule that is for one small write."""
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}
_FULL = {errno.ENOSPC, errno.EDQUOT}


class FolderStore:
    """A folder, made when something is first put there."""

    def __init__(self, url: str, options: StoreOptions) -> None:
        self._url = url.rstrip("/")
        self._root = Path(unquote(urlsplit(self._url).path))
        self._options = options
        self._pace = Pace(options.bandwidth)

    @property
    def url(self) -> str:
        return self._url

    def get(self, key: str) -> tuple[bytes, str]:
        path = self._path(key)

        def read() -> tuple[bytes, str]:
            content = path.read_bytes()
            return content, _etag(content)

        return self._again(key, read)

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        path, until, tries = self._path(key), time.monotonic() + self._options.patience_s, 0

        def write() -> str:
            nonlocal tries
            tries += 1
            with self._locked(key, until):
                present = _content(path)
                if tries == 1 or present != data:  # else it was moved into place, and what came after that has failed
                    self._check(key, present, if_match, if_absent)
                self._write(key, path, memoryview(data), lambda: False)
                return _etag(data)

        return self._again(key, write)

    def upload(self, key: str, data: memoryview, cancelled: Callable[[], bool] = lambda: False) -> None:
        path = self._path(key)
        self._again(key, lambda: self._write(key, path, data, cancelled), cancelled, slow=True)

    def read_into(
        self, key: str, offset: int, target: memoryview, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        path = self._path(key)
        self._again(key, lambda: self._read(key, path, offset, target, cancelled), cancelled, slow=True)

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)

        def look() -> ObjectInfo:
            with path.open("rb", buffering=0) as file:  # of one and the same object, whatever takes its place now
                stat = os.fstat(file.fileno())
                etag = _etag(file.read()) if stat.st_size <= SMALL else f"{stat.st_size}-{stat.st_mtime_ns}"
            return ObjectInfo(key, stat.st_size, etag, stat.st_mtime)

        return self._again(key, look)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        yield from self._again(prefix, lambda: sorted(self._found(prefix), key=lambda info: info.key))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._again(key, partial(self._remove, self._path(key)))

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        yield from self._again(prefix, lambda: tuple(self._drafts(prefix)))

    def call_off(self, upload: Unfinished) -> None:
        draft = self._root / DRAFTS / upload.token
        self._again(upload.key, lambda: draft.unlink(missing_ok=True))

    def close(self) -> None:
        """There is nothing to let go."""

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or any(part in (".", "..") for part in key.split("/")):
            raise RequestError(f"{key!r} is no key: parts between slashes, without . and ..")
        return self._root.joinpath(*parts)

    def _again(
        self, key: str, call: Callable[[], T], cancelled: Callable[[], bool] = lambda: False, slow: bool = False
    ) -> T:
        def ask() -> T:
            with _told(self._url, key):
                return call()

        return again(ask, self._options.patience_s, cancelled, self._options.on_wait, slow=slow)

    # --- finding ----------------------------------------------------------------------------------------------------

    def _found(self, prefix: str) -> Iterator[ObjectInfo]:
        """What disappears meanwhile is left out, what cannot be read is an error: nothing else is missing."""
        for folder, names, files in os.walk(self._root, onerror=_unless_gone):
            names[:] = [name for name in names if name != DRAFTS]
            for path in (Path(folder) / name for name in files if name != LOCK):
                key = path.relative_to(self._root).as_posix()
                if key.startswith(prefix) and (stat := _stat(path)) is not None:
                    yield ObjectInfo(key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}", stat.st_mtime)

    def _drafts(self, prefix: str) -> Iterator[Unfinished]:
        try:
            paths = sorted((self._root / DRAFTS).iterdir())
        except FileNotFoundError:
            return
        for path in paths:
            key = unquote(path.name.split("+", 1)[1]) if "+" in path.name else path.name
            if key.startswith(prefix) and (stat := _stat(path)) is not None:
                yield Unfinished(key, path.name, stat.st_mtime)

    # --- reading and writing ----------------------------------------------------------------------------------------

    def _read(self, key: str, path: Path, offset: int, target: memoryview, cancelled: Callable[[], bool]) -> None:
        with path.open("rb", buffering=0) as file:
            done, part = 0, self._options.part_bytes
            while done < len(target):
                if cancelled():
                    raise StaleAttemptError(f"reading {key} was called off")
                got = os.preadv(file.fileno(), [target[done : done + part]], offset + done)
                if not got:
                    raise CheckpointError(f"{self._url}/{key} ends at {offset + done}, not at {offset + len(target)}")
                done += got

    def _check(self, key: str, present: bytes | None, if_match: str | None, if_absent: bool) -> None:
        if if_absent and present is not None:
            raise PreconditionFailed(f"{self._url}/{key} is there already")
        if if_match is not None and (present is None or _etag(present) != if_match):
            raise PreconditionFailed(f"{self._url}/{key} is {'gone' if present is None else 'another one by now'}")

    def _write(self, key: str, path: Path, data: memoryview, cancelled: Callable[[], bool]) -> None:
        """Again when somebody who deletes has just removed the folder for being empty, or the draft for being old."""
        for _ in range(_TRIES):
            try:
                self._write_once(path, data, cancelled)
                return
            except FileNotFoundError as error:
                reason = error
        raise StoreUnavailable(f"{self._url}/{key}: {reason.filename} was removed while it was written") from reason

    def _write_once(self, path: Path, data: memoryview, cancelled: Callable[[], bool]) -> None:
        drafts = self._root / DRAFTS
        for folder in (drafts, path.parent):
            _make_folder(folder)
        key = path.relative_to(self._root).as_posix().replace("%", "%25").replace("/", "%2F")
        draft = drafts / f"{secrets.token_hex(8)}+{key}"
        try:
            with draft.open("wb", buffering=0) as file:
                self._fill(file.fileno(), data, cancelled)
                os.fsync(file.fileno())
            draft.replace(path)
            _sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)

    def _fill(self, file: int, data: memoryview, cancelled: Callable[[], bool]) -> None:
        done, part = 0, min(self._options.part_bytes, 4 << 20)
        while done < len(data):
            piece = data[done : done + part]
            if not self._pace.wait(len(piece), cancelled) or cancelled():
                raise StaleAttemptError("the upload was called off")
            done += os.write(file, piece)

    def _remove(self, path: Path) -> None:
        """With the folders that become empty by that, as an object store has none."""
        path.unlink(missing_ok=True)
        folder = path.parent
        while folder != self._root and self._root in folder.parents:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    @contextmanager
    def _locked(self, key: str, until: float) -> Iterator[None]:
        """Alone among those who put on a condition. Raises StoreUnavailable when another still is ``until`` then."""
        _make_folder(self._root)
        with (self._root / LOCK).open("w") as file:

            def lock() -> None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    text = f"{self._url}/{key}: another process holds the lock {self._root / LOCK}"
                    raise StoreUnavailable(f"{text}; end it if it hangs") from error

            again(lock, until - time.monotonic(), on_wait=self._options.on_wait, pauses_s=_LOCK_PAUSES_S)
            yield


@contextmanager
def _told(url: str, key: str) -> Iterator[None]:
    """What the file system says, in the words of a store."""
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing(f"{url}/{key}: there is no such object") from error
    except OSError as error:
        raise _store_error(url, key, error) from error


def _store_error(url: str, key: str, error: OSError) -> StoreError:
    where = f"{url}/{key}"
    if error.errno in _FULL:
        return StoreUnavailable(f"{where}: the file system is full; free some space, or keep fewer checkpoints")
    if isinstance(error, NotADirectoryError) and (file := _file_above(error)):
        return StoreDenied(f"{where}: {file} is a file, below which there can be no folder; name another URL")
    if error.errno in _DENIED:
        return StoreDenied(f"{where}: {error.strerror}; make {error.filename or url} a folder that this user may write")
    return StoreUnavailable(f"{where}: {error.strerror or error}")


def _file_above(error: OSError) -> Path | None:
    """Which part of a path is no folder."""
    return next((above for above in Path(error.filename or "").parents if above.is_file()), None)


def _unless_gone(error: OSError) -> None:
    """A folder that was there a moment ago is no error."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _etag(content: bytes) -> str:
    """Of the content alone: whatever else is asked of a file may be another file's by then."""
    return hashlib.sha256(content).hexdigest()


def _make_folder(folder: Path) -> None:
    """With those above it, each on the disk in the one that it is in."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
