"""A script, or a folder of code, as a ConfigMap that Pods mount as their working directory.

Each file is a key of its own, so that what was sent can be read with kubectl, and needs nothing in the image to unpack
it: the volume's ``items`` put the files back under their paths, folders included. A ConfigMap holds 1 MiB.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from outlast.errors import RequestError
from outlast.kube import CODE_ANNOTATION, JOB_LABEL, MANAGED_BY_LABEL
from outlast_operator.template import containers, main_index, pod_spec

LIMIT = 900 * 1024
"""Bytes of all files: a ConfigMap may have 1 MiB with its names."""
MOST_FILES = 500
"""Each is named again in every Pod."""
FOLDER = "/opt/outlast/code"
"""Where the code is mounted; the ranks' working directory. It is read-only."""
VOLUME = "outlast-code"
_SHIP = "put the code into the image (--image, with --no-code), or into a volume of workers.template"
_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_NAMED = 5
_EXECUTABLE = 0o755


@dataclass(frozen=True, order=True)
class CodeFile:
    """``path`` is relative, with ``/``."""

    path: str
    data: bytes
    executable: bool = False


@dataclass(frozen=True)
class Packed:
    """Files that fit into one ConfigMap, by path. ``left_out``: what else is in the folder that somebody might miss."""

    files: tuple[CodeFile, ...]
    left_out: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of names, modes and contents."""
        found = hashlib.sha256()
        for file in self.files:
            head = f"{file.path}\0{int(file.executable)}\0{len(file.data)}\0"
            found.update(head.encode() + file.data)
        return found.hexdigest()

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(file.data) for file in self.files)

    def name(self, job: str) -> str:
        """The ConfigMap's name: other code, another name."""
        return f"{job}-code-{self.digest[:10]}"

    def config_map(self, job: str, namespace: str) -> dict[str, Any]:
        """The ConfigMap, not yet owned by the job."""
        texts: dict[str, str] = {}
        binaries: dict[str, str] = {}
        for key, file in self._keys():
            text = _text_of(file.data)
            if text is None:
                binaries[key] = base64.b64encode(file.data).decode()
            else:
                texts[key] = text
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": self.name(job),
                "namespace": namespace,
                "labels": {JOB_LABEL: job, MANAGED_BY_LABEL: "trainctl"},
            },
            "immutable": True,
            **({"data": texts} if texts else {}),
            **({"binaryData": binaries} if binaries else {}),
        }

    def volume(self, job: str) -> dict[str, Any]:
        """The Pods' volume: each file under its path."""
        items = [
            {"key": key, "path": file.path, **({"mode": _EXECUTABLE} if file.executable else {})}
            for key, file in self._keys()
        ]
        return {"name": VOLUME, "configMap": {"name": self.name(job), "items": items}}

    def _keys(self) -> Iterator[tuple[str, CodeFile]]:
        """Keys as like the paths as a ConfigMap allows, each once."""
        used: set[str] = set()
        for file in self.files:
            key = plain = re.sub(r"[^-._a-zA-Z0-9]", "_", file.path)[:200]
            number = 1
            while key in used:
                number += 1
                key = f"{plain}.{number}"
            used.add(key)
            yield key, file


def pack_script(script: Path) -> Packed:
    """One file. Raises RequestError when it is too large or no file."""
    return _packed({script.name: script}, script)


def pack_folder(folder: Path) -> Packed:
    """All files of a folder but hidden ones, Python's caches and what is behind links to folders.

    Raises RequestError: none, too many, too large, a link that leads out of the folder.
    """
    left_out: list[str] = []
    try:
        if not folder.is_dir():
            raise RequestError(f"--code {folder}: there is no such folder")
        paths = {path.relative_to(folder).as_posix(): path for path in _walk(folder, left_out)}
    except OSError as error:
        raise RequestError(f"{error.filename}: {error.strerror}") from error
    if not paths:
        raise RequestError(f"--code {folder}: there is no file in it that could be sent")
    return replace(_packed(paths, folder), left_out=tuple(left_out))


def with_code(tree: Mapping[str, Any], packed: Packed) -> dict[str, Any]:
    """The TrainingJob ``tree`` with the code mounted where its ranks start, and an annotation that says so.

    Raises RequestError when its template has a working directory already.
    """
    job = str(tree["metadata"]["name"])
    spec = dict(tree["spec"])
    workers = dict(spec.get("workers") or {})
    workers["template"] = _mounted(workers.get("template") or {}, packed.volume(job), "workers")
    spec["workers"] = workers
    head = dict(spec.get("head") or {})
    if head.get("template"):
        spec["head"] = {**head, "template": _mounted(head["template"], packed.volume(job), "head")}
    metadata = dict(tree["metadata"])
    metadata["annotations"] = {**(metadata.get("annotations") or {}), CODE_ANNOTATION: packed.name(job)}
    return {**tree, "metadata": metadata, "spec": spec}


def _mounted(template: Mapping[str, Any], volume: Mapping[str, Any], where: str) -> dict[str, Any]:
    pod = dict(pod_spec(template))
    found = [dict(container) for container in containers(pod)]
    trains = found[main_index(found)]
    if trains.get("workingDir"):
        raise RequestError(
            f"--code: spec.{where}.template has workingDir {trains['workingDir']} already, where ranks start: leave it "
            "out, and the code's folder is it"
        )
    trains["workingDir"] = FOLDER
    mount = {"name": VOLUME, "mountPath": FOLDER, "readOnly": True}
    trains["volumeMounts"] = [*(trains.get("volumeMounts") or []), mount]
    pod["containers"] = found
    pod["volumes"] = [*(pod.get("volumes") or []), dict(volume)]
    return {**template, "spec": pod}


def _walk(folder: Path, left_out: list[str]) -> Iterator[Path]:
    """The files to send. Raises RequestError for a link that leads out of the folder: it may be to a secret."""
    for text, folders, names in os.walk(folder, onerror=_raise):
        place = Path(text)
        left_out += [_shown(folder, place / name) for name in sorted([*folders, *names]) if name.startswith(".")]
        kept = [place / name for name in sorted([*folders, *names]) if not _unwanted(name)]
        linked = [path for path in kept if path.is_symlink() and path.is_dir()]
        for path in kept:
            if path not in linked:
                _check_link(folder, path)
        left_out += [_shown(folder, path) for path in linked]
        folders[:] = [path.name for path in kept if path.is_dir() and not path.is_symlink()]
        yield from (path for path in kept if not path.is_dir())


def _raise(error: OSError) -> None:
    raise error


def _unwanted(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__" or name.endswith((".pyc", ".egg-info"))


def _shown(folder: Path, path: Path) -> str:
    """A path in the folder, with a slash behind it where it is one itself."""
    return path.relative_to(folder).as_posix() + ("/" if path.is_dir() and not path.is_symlink() else "")


def _check_link(folder: Path, path: Path) -> None:
    if path.is_symlink() and not _target(path).is_relative_to(folder.resolve()):
        raise RequestError(
            f"--code {folder}: {path.relative_to(folder).as_posix()} is a link to {path.readlink()}, which is not in "
            "the folder: put a copy in its place, or take the link away"
        )


def _target(link: Path) -> Path:
    try:
        return link.resolve()
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{link}: this link leads nowhere: take it away") from error


def _packed(paths: Mapping[str, Path], what: Path) -> Packed:
    """Read them, once it is known that they are not too many and not too large, and that their names are text."""
    for name in paths:
        _check_name(name, what)
    if len(paths) > MOST_FILES:
        raise RequestError(f"{what}: it has {len(paths)} files, and {MOST_FILES} can be sent: {_SHIP}")
    sizes = {name: _size_of(path) for name, path in paths.items()}
    if sum(sizes.values()) > LIMIT:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:_NAMED]
        named = ", ".join(f"{name} ({_kib(sizes[name])})" for name in largest)
        total = f"{_kib(sum(sizes.values()))}, and {_kib(LIMIT)} can be sent"
        raise RequestError(f"{what}: the code takes {total}: {_SHIP}. The largest files: {named}")
    return Packed(tuple(sorted(_read(path, name) for name, path in paths.items())))


def _check_name(name: str, what: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{what}: the name {name!a} is no UTF-8 text: give the file another one") from error


def _size_of(path: Path) -> int:
    try:
        if not path.is_file():
            raise RequestError(f"{path}: it is no file, so that it cannot be sent")
        return path.stat().st_size
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error


def _read(path: Path, name: str) -> CodeFile:
    try:
        return CodeFile(PurePosixPath(name).as_posix(), path.read_bytes(), os.access(path, os.X_OK))
    except OSError as error:
        raise RequestError(f"{path}: {error.strerror}") from error


def _text_of(data: bytes) -> str | None:
    """None: it is no text. JSON would have each control character take six bytes."""
    try:
        return None if _CONTROL.search(data) else data.decode()
    except UnicodeDecodeError:
        return None


def _kib(count: int) -> str:
    return f"{(count + 1023) >> 10} KiB"
