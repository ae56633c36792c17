"""What a forkserver imports and is asked for: ``preload``, ``Spawn``, ``ServerSetup``, and ``program`` for commands."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from outlast.agent.isolation import Isolate

Kind = Literal["script", "module", "exec", "call"]
Lifetime = Literal["client", "server"]

DEFAULT_PRELOAD = (
    "numpy",
    "torch",
    "torch.distributed",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "torch.utils.data",
    "outlast.session",
    "outlast.snapshot.keeper",
    "outlast.checkpoint.ready",
)
"""What ranks and keepers would import anyway."""


@dataclass(frozen=True)
class Spawn:
    """A process to be made.

    id: unique among the server's living children. argv: ``script``: [path, arguments...], ``module``: [name,
    arguments...], ``exec``: the command. target, args: ``call``: "package.module:function" and its JSON arguments.
    env: the whole environment. stdout, stderr: files to append to. lifetime: whose end it does not outlive. threads: of
    torch's kernels. role: the name of its pid file; "" for none.
    """

    id: str
    kind: Kind
    argv: tuple[str, ...] = ()
    target: str = ""
    args: tuple[Any, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str = "/"
    stdout: str = os.devnull
    stderr: str = os.devnull
    lifetime: Lifetime = "client"
    threads: int | None = None
    isolate: Isolate | None = None
    role: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spawn:
        """Raises TypeError or KeyError when it is none."""
        isolate = data.get("isolate")
        tuples = {"argv": tuple(data.get("argv", ())), "args": tuple(data.get("args", ()))}
        return cls(**{**data, **tuples, "isolate": Isolate.from_json(isolate) if isolate else None})


def program(command: Sequence[str]) -> tuple[Kind, tuple[str, ...]]:
    """How to run ``command`` in a fork: this interpreter's scripts and modules directly, all else by exec.

    A bare ``python`` is this interpreter. Its option ``-u`` is accepted (output is by lines anyway), with any other the
    command is run as it stands.
    """
    first, *rest = command
    if _is_this_python(first):
        while rest and rest[0] == "-u":
            rest = rest[1:]
        if len(rest) >= 2 and rest[0] == "-m":
            return "module", tuple(rest[1:])
        if rest and not rest[0].startswith("-"):
            return "script", tuple(rest)
    return "exec", tuple(command)


def _is_this_python(name: str) -> bool:
    path = Path(name)
    if path.name not in ("python", "python3", f"python3.{sys.version_info.minor}"):
        return False
    return name == path.name or path.parent == Path(sys.executable).parent


@dataclass(frozen=True)
class ServerSetup:
    """A forkserver to be forked: where it listens, and how it differs from its parent.

    pid_dir: where pid files go ("": nowhere). log: the file for its own output ("": the parent's). survive_parent: go
    on when the parent ends.
    """

    socket: str
    pid_dir: str = ""
    log: str = ""
    isolate: Isolate | None = None
    survive_parent: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ServerSetup:
        """Raises TypeError or KeyError when it is none."""
        isolate = data.get("isolate")
        return cls(**{**data, "isolate": Isolate.from_json(isolate) if isolate else None})


def preload(names: Sequence[str]) -> list[str]:
    """Import modules for all children to share; returns those that could not be imported.

    OpenBLAS makes its threads when NumPy is imported, and a fork must see a single thread: it gets none.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    missing = []
    gc.disable()
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            print(f"forkserver: {name} is not preloaded: {error}", file=sys.stderr, flush=True)
            missing.append(name)
    gc.collect()
    gc.freeze()
    return missing
