"""One node of Ray: a head or one that joins it, started by ``ray start``, watched and ended by pid.

``ray stop`` is never called: it would end every Ray of the machine, also of other people. What ``ray start`` leaves
running loses its parent and so becomes a child of this process, which must be a child subreaper or process 1; that is
how it is found.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from outlast.errors import OutlastError
from outlast.hosting import processes

OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store; its default is 30% of the machine's memory."""

START_LIMIT_S = 60.0
LOOPBACK = "127.0.0.1"
_GCS, _RAYLET = "gcs/gcs_server", "raylet/raylet"


@dataclass(frozen=True)
class RaySite:
    """Where a node of Ray runs. ``folder`` is short (Ray makes sockets below it) and the node's own; ``spare`` names
    this process's other children, which are not Ray's; ``host``: its own address.
    """

    folder: Path
    token_file: Path
    log: Path
    env: Mapping[str, str]
    spare: Callable[[], Collection[int]]
    host: str = LOOPBACK


class RayNode:
    """What a head and a further node have in common. ``vital``: what must run; ``session``: the name of the Ray that
    was started last, which all its nodes share; ``starter``: the pid of the start that is under way."""

    def __init__(self, site: RaySite, vital: Sequence[str]) -> None:
        self._site = site
        self._env = {**site.env, **ray_environment(site.token_file)}
        self._names = tuple(vital)
        self._vital: list[int] = []
        self._starts = 0
        self.session = ""
        self.starter: int | None = None

    @property
    def env(self) -> Mapping[str, str]:
        """The environment with which a process can join this Ray."""
        return self._env

    @property
    def pids(self) -> tuple[int, ...]:
        """Of what must run: the GCS's, of a head, and the raylet's."""
        return tuple(self._vital)

    def alive(self) -> bool:
        """Whether all that must run does."""
        return bool(self._vital) and all(processes.is_running(pid) for pid in self._vital)

    async def kill(self) -> None:
        """SIGKILL all of it, every actor below it too. Returns once they are gone."""
        self._vital = []
        await processes.kill_all(self._all, self._site.spare())

    async def _start(self, arguments: Sequence[str]) -> Path:
        """Start it, in a folder of its own, which is returned. Raises OutlastError naming the log when it does not
        come up."""
        self._starts += 1
        temp = self._site.folder / f"ray-{self._starts}"
        process = processes.launch([*_COMMAND, *arguments, *_QUIET, f"--temp-dir={temp}"], self._env, self._site.log)
        self.starter = process.pid
        try:
            status = await processes.wait_for(process, START_LIMIT_S)
        except TimeoutError as error:
            raise OutlastError(f"Ray did not start: {error}; see {self._site.log}") from error
        finally:
            self.starter = None
        if status != 0:
            raise OutlastError(f"Ray did not start (exit status {status}); see {self._site.log}")
        self.session = (temp / "session_latest").resolve().name
        self._vital = [pid for pid in self._members() if self._is_vital(processes.command_of(pid))]
        if len(self._vital) < len(self._names):
            raise OutlastError(f"Ray ended at once; see {self._site.log}")
        return temp

    def _is_vital(self, command: str) -> bool:
        return command.partition(" ")[0].endswith(self._names)

    def _members(self) -> list[int]:
        spare = self._site.spare()
        return [pid for pid in processes.children(os.getpid()) if pid not in spare]

    def _all(self) -> list[int]:
        found = self._members()
        for pid in list(found):
            found += processes.descendants(pid)
        return found


class RayHead(RayNode):
    """The GCS, the raylet and their helpers, with token authentication. ``port`` 0: any free one."""

    def __init__(self, site: RaySite, port: int = 0) -> None:
        super().__init__(site, (_GCS, _RAYLET))
        self._port = port

    async def start(self) -> str:
        """Start it and return its address ("ip:port"). Raises OutlastError naming the log when it does not come up."""
        own = ["--head", f"--port={self._port}", f"--node-ip-address={self._site.host}", "--no-monitor"]
        temp = await self._start([*own, "--include-dashboard=false", "--dashboard-port=0"])
        return (temp / "ray_current_cluster").read_text().strip()


class RayMember(RayNode):
    """The raylet and its helpers of a node that joins a head."""

    def __init__(self, site: RaySite) -> None:
        super().__init__(site, (_RAYLET,))

    async def join(self, address: str, resource: str) -> None:
        """Start it and have it join the head at ``address``; it offers one of ``resource``. Raises OutlastError."""
        await self._start(
            [f"--address={address}", f"--node-ip-address={self._site.host}", f"--resources={json.dumps({resource: 1})}"]
        )


def ray_environment(token_file: Path) -> dict[str, str]:
    """The variables that every process of an authenticated, silent Ray needs.

    Ray's memory monitor is off: it would end agents because ranks need memory.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }


_COMMAND = (sys.executable, "-P", "-m", "ray.scripts.scripts", "start")
_QUIET = (
    "--num-cpus=0",
    "--num-gpus=0",
    "--include-log-monitor=False",
    "--disable-usage-stats",
    f"--object-store-memory={OBJECT_STORE_BYTES}",
)
