"""One local Ray head: started by ``ray start``, watched and ended by pid.

``ray stop`` is never called: it would end every Ray of the machine, also of other people. What ``ray start`` leaves
running loses its parent and so becomes a child of the supervisor, which is how it is found.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from outlast.errors import OutlastError
from outlast.local import processes

OBJECT_STORE_BYTES = 80_000_000
"""Nothing large goes through Ray's object store; its default is 30% of the machine's memory."""

START_LIMIT_S = 60.0
_VITAL = ("gcs/gcs_server", "raylet/raylet")


class RayHead:
    """The GCS, the raylet and their helpers, with token authentication.

    ``folder`` is short (Ray makes sockets below it) and the head's own; ``spare`` names the supervisor's other
    children, which are not Ray's.
    """

    def __init__(
        self, folder: Path, token_file: Path, log: Path, env: Mapping[str, str], spare: Callable[[], Collection[int]]
    ) -> None:
        self._folder = folder
        self._log = log
        self._env = {**env, **ray_environment(token_file)}
        self._spare = spare
        self._vital: list[int] = []
        self._starts = 0
        self.starter: int | None = None

    @property
    def env(self) -> Mapping[str, str]:
        """The environment with which a process can join this Ray."""
        return self._env

    @property
    def pids(self) -> tuple[int, ...]:
        """The GCS's and the raylet's."""
        return tuple(self._vital)

    async def start(self) -> str:
        """Start it and return its address ("ip:port"). Raises OutlastError naming the log when it does not come up."""
        self._starts += 1
        temp = self._folder / f"ray-{self._starts}"
        process = processes.launch(_command(temp), self._env, self._log)
        self.starter = process.pid
        try:
            status = await processes.wait_for(process, START_LIMIT_S)
        except TimeoutError as error:
            raise OutlastError(f"Ray did not start: {error}; see {self._log}") from error
        finally:
            self.starter = None
        if status != 0:
            raise OutlastError(f"Ray did not start (exit status {status}); see {self._log}")
        self._vital = [pid for pid in self._members() if _is_vital(processes.command_of(pid))]
        if len(self._vital) < len(_VITAL):
            raise OutlastError(f"Ray ended at once; see {self._log}")
        return (temp / "ray_current_cluster").read_text().strip()

    def alive(self) -> bool:
        """Whether both the GCS and the raylet run."""
        return bool(self._vital) and all(processes.is_running(pid) for pid in self._vital)

    async def kill(self) -> None:
        """SIGKILL all of it: GCS, raylet, and every actor below it. Returns once they are gone."""
        self._vital = []
        await processes.kill_all(self._all, self._spare())

    def _members(self) -> list[int]:
        spare = self._spare()
        return [pid for pid in processes.children(os.getpid()) if pid not in spare]

    def _all(self) -> list[int]:
        found = self._members()
        for pid in list(found):
            found += processes.descendants(pid)
        return found


def ray_environment(token_file: Path) -> dict[str, str]:
    """The variables that every process of an authenticated, silent Ray needs."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }


def _command(temp: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--port=0", "--node-ip-address=127.0.0.1"),
        *("--num-cpus=0", "--num-gpus=0", "--no-monitor", "--include-log-monitor=False", "--disable-usage-stats"),
        *("--include-dashboard=false", "--dashboard-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        f"--temp-dir={temp}",
    ]


def _is_vital(command: str) -> bool:
    return command.partition(" ")[0].endswith(_VITAL)
