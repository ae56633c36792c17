"""Having the controller made, or found, in a Ray that runs: ``outlast.controller.launch`` as a process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from outlast.errors import OutlastError
from outlast.hosting import processes

LAUNCH_LIMIT_S = 60.0


class Launcher:
    """``pid``: of the launching that is under way, which its starter waits for."""

    def __init__(self, config_file: Path, log: Path, env: Mapping[str, str], cwd: Path) -> None:
        self._config_file, self._log, self._env, self._cwd = config_file, log, env, cwd
        self.pid: int | None = None

    async def launch(self, address: str) -> None:
        """Return when a controller answers over HTTP in the Ray at ``address``. Raises OutlastError."""
        command = [sys.executable, "-P", "-m", "outlast.controller.launch", "--address", address]
        process = processes.launch([*command, "--config", str(self._config_file)], self._env, self._log, self._cwd)
        self.pid = process.pid
        try:
            status = await processes.wait_for(process, LAUNCH_LIMIT_S)
        except TimeoutError as error:
            raise OutlastError(f"the controller did not start: {error}; see {self._log}") from error
        finally:
            self.pid = None
        if status != 0:
            raise OutlastError(f"the controller did not start: {_last_line(self._log)}; see {self._log}")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no reason given"
