"""Where a run's files are: what stays in DIR, and what is gone with the run.

Sockets and Ray's files live in a short folder of the system's temporary one, since a unix socket's path has at most 107
bytes; the nodes' memory is on tmpfs.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from outlast.config import MemoryShare
from outlast.errors import RequestError

TMPFS = Path("/dev/shm")
_PREFIX = "outlast-"
_PRIVATE = 0o700
_LONGEST_BASE = 24
"""A socket's path has at most 107 bytes, of which Ray's session folder below ours takes 66."""


def memory_share(nodes: int) -> MemoryShare:
    """What each of the nodes that train may take of the tmpfs that they share: spares hold nothing until they have the
    seat of a node that does not any more."""
    stat = os.statvfs(TMPFS)
    return MemoryShare(nodes=nodes, bytes=stat.f_bavail * stat.f_frsize // nodes)


@dataclass(frozen=True)
class RunFolders:
    """``root`` is DIR; ``short`` and ``memory`` are removed at the end."""

    root: Path
    short: Path
    memory: Path

    @classmethod
    def create(cls, root: Path) -> RunFolders:
        """Make all folders and the run's token. Raises RequestError when there is no tmpfs."""
        if not os.access(TMPFS, os.W_OK):
            raise RequestError(f"{TMPFS} cannot be written: snapshots need a tmpfs there")
        base = tempfile.gettempdir()
        short = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base if len(base) <= _LONGEST_BASE else "/tmp"))
        folders = cls(root.resolve(), short, TMPFS / short.name)
        folders.memory.mkdir(mode=_PRIVATE)
        for folder in (folders.control, folders.logs):
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        descriptor = os.open(folders.token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        return folders

    @property
    def job_file(self) -> Path:
        return self.root / "job.yaml"

    @property
    def control(self) -> Path:
        return self.root / "control"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def token_file(self) -> Path:
        """64 hexadecimal digits: Ray's token and the job's."""
        return self.control / "token"

    @property
    def config_file(self) -> Path:
        return self.control / "controller.json"

    @property
    def faults_file(self) -> Path:
        return self.root / "faults.jsonl"

    @property
    def report_file(self) -> Path:
        return self.root / "report.json"

    @property
    def zygote_socket(self) -> Path:
        return self.short / "zygote"

    @property
    def gate_socket(self) -> Path:
        return self.short / "gate"

    def node_sockets(self, node: str) -> Path:
        return self.short / node

    def node_memory(self, node: str) -> Path:
        return self.memory / node

    def remove(self) -> None:
        """Remove what does not outlive the run."""
        for folder in (self.memory, self.short):
            shutil.rmtree(folder, ignore_errors=True)
