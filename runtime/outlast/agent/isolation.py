"""Local nodes that cannot see each other's memory files: a mount namespace for each (mount_namespaces(7)).

On one machine all nodes share a tmpfs, so a read past the keepers would work unseen. With root's rights each process of
a node gets a namespace in which an empty tmpfs covers the folder of all nodes' memory and only its own is put back.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x00020000
_MS_NOSUID, _MS_NODEV = 0x2, 0x4
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Isolate:
    """``base`` holds the memory folders of all nodes, ``own`` is the one below it that stays visible."""

    base: str
    own: str

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base, "own": self.own}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Isolate:
        return cls(str(data["base"]), str(data["own"]))


def may_isolate() -> bool:
    """Whether this process is likely to have the right (it is root; a container may still refuse)."""
    return os.geteuid() == 0


def enter(isolate: Isolate) -> None:
    """Move this process into a mount namespace that shows ``isolate.own`` alone below ``isolate.base``.

    Call it in a single-threaded process. Raises OSError where the kernel refuses (PermissionError without rights),
    ValueError when ``own`` does not lie below ``base``.
    """
    own, base = Path(isolate.own).resolve(), Path(isolate.base).resolve()
    own.relative_to(base)
    _check(_libc.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    kept = os.open(own, os.O_PATH | os.O_DIRECTORY)  # of this namespace's own mount, or it could not be bound
    try:
        _mount("tmpfs", str(base), "tmpfs", _MS_NOSUID | _MS_NODEV)
        own.mkdir(parents=True, mode=0o700)
        _mount(f"/proc/self/fd/{kept}", str(own), None, _MS_BIND)
    finally:
        os.close(kept)


def die_with_parent(parent: int, signal_number: int) -> None:
    """Have the kernel send ``signal_number`` to this process when the thread of ``parent`` that forked it ends.

    Ends the process at once when ``parent`` is gone already. (prctl(2), PR_SET_PDEATHSIG; not inherited by a fork.)
    """
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    _check(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl(PR_SET_CHILD_SUBREAPER)")


def children() -> list[int]:
    """The children of this process, adopted ones too; none on a kernel without CONFIG_PROC_CHILDREN."""
    pid = os.getpid()
    try:
        return [int(child) for child in Path(f"/proc/self/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _mount(source: str, target: str, kind: str | None, flags: int) -> None:
    done = _libc.mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), None)
    _check(done, f"mount of {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
