"""``file:///folder`` as a store: for one machine, a network file system, and tests.

An object is a file below the folder. It is written under another name in ``.drafts``, made durable with fsync, and
moved into place, so that a reader or a crash at any moment finds it whole or not at all. Conditional puts take a lock
file, which holds between processes of one machine (and between machines where the file system's locks do).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from outlast.checkpoint.pacing import Pace
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

DRAFTS = ".drafts"
LOCK = ".lock"
SMALL = 1 << 20
"""Objects up to this size have their content's hash as etag."""

_TRIES = 5
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR}
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
        with _told(self._url, key):
            content = path.read_bytes()
            return content, _etag(path, content)

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        path = self._path(key)
        with _told(self._url, key), self._locked():
            self._check(path, key, if_match, if_absent)
            self._write(path, memoryview(data), lambda: False)
            return _etag(path, data)

    def upload(self, key: str, data: memoryview, cancelled: Callable[[], bool] = lambda: False) -> None:
        path = self._path(key)
        with _told(self._url, key):
            self._write(path, data, cancelled)

    def read_into(
        self, key: str, offset: int, target: memoryview, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        path, part = self._path(key), self._options.part_bytes
        with _told(self._url, key), path.open("rb", buffering=0) as file:
            done = 0
            while done < len(target):
                if cancelled():
                    raise StaleAttemptError(f"reading {key} was called off")
                got = os.preadv(file.fileno(), [target[done : done + part]], offset + done)
                if not got:
                    raise CheckpointError(f"{self._url}/{key} ends at {offset + done}, not at {offset + len(target)}")
                done += got

    def head(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with _told(self._url, key):
            stat = path.stat()
            content = path.read_bytes() if stat.st_size <= SMALL else None
            return ObjectInfo(key, stat.st_size, _etag(path, content), stat.st_mtime)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        with _told(self._url, prefix):
            found = sorted(key for key in self._keys() if key.startswith(prefix))
        for key in found:
            try:
                stat = self._path(key).stat()
            except FileNotFoundError:
                continue
            yield ObjectInfo(key, stat.st_size, f"{stat.st_size}-{stat.st_mtime_ns}", stat.st_mtime)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            path = self._path(key)
            with _told(self._url, key):
                path.unlink(missing_ok=True)
                self._prune(path.parent)

    def unfinished(self, prefix: str = "") -> Iterator[Unfinished]:
        drafts = self._root / DRAFTS
        for path in sorted(drafts.iterdir()) if drafts.is_dir() else ():
            key = unquote(path.name.split("+", 1)[1]) if "+" in path.name else path.name
            if key.startswith(prefix):
                yield Unfinished(key, path.name, path.stat().st_mtime)

    def call_off(self, upload: Unfinished) -> None:
        (self._root / DRAFTS / upload.token).unlink(missing_ok=True)

    def close(self) -> None:
        """There is nothing to let go."""

    def _path(self, key: str) -> Path:
        parts = PurePosixPath(key).parts
        if not parts or key.startswith("/") or any(part in (".", "..") for part in key.split("/")):
            raise RequestError(f"{key!r} is no key: parts between slashes, without . and ..")
        return self._root.joinpath(*parts)

    def _keys(self) -> Iterator[str]:
        for folder, names, files in os.walk(self._root):
            names[:] = [name for name in names if name != DRAFTS]
            for name in files:
                if name != LOCK:
                    yield (Path(folder) / name).relative_to(self._root).as_posix()

    def _check(self, path: Path, key: str, if_match: str | None, if_absent: bool) -> None:
        present = path.read_bytes() if path.exists() else None
        if if_absent and present is not None:
            raise PreconditionFailed(f"{self._url}/{key} is there already")
        if if_match is not None and (present is None or _etag(path, present) != if_match):
            raise PreconditionFailed(f"{self._url}/{key} is {'gone' if present is None else 'another one by now'}")

    def _write(self, path: Path, data: memoryview, cancelled: Callable[[], bool]) -> None:
        """Again when somebody who deletes has just removed the folder for being empty."""
        for _ in range(_TRIES - 1):
            try:
                self._write_once(path, data, cancelled)
                return
            except FileNotFoundError:
                continue
        self._write_once(path, data, cancelled)

    def _write_once(self, path: Path, data: memoryview, cancelled: Callable[[], bool]) -> None:
        drafts = self._root / DRAFTS
        for folder in (drafts, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
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

    def _prune(self, folder: Path) -> None:
        """Remove folders that became empty, as an object store has none."""
        while folder != self._root and self._root in folder.parents:
            try:
                folder.rmdir()
            except OSError:
                return
            folder = folder.parent

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self._root.mkdir(parents=True, exist_ok=True)
        with (self._root / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
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
    if error.errno in _DENIED:
        return StoreDenied(f"{where}: {error.strerror}; make {error.filename or url} a folder that this user may write")
    return StoreUnavailable(f"{where}: {error.strerror or error}")


def _etag(path: Path, content: bytes | None) -> str:
    if content is not None and len(content) <= SMALL:
        return hashlib.sha256(content).hexdigest()
    stat = path.stat()
    return f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
