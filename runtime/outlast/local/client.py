"""The controller of a job on this machine: its HTTP, and its process."""

from __future__ import annotations

from pathlib import Path

from outlast.hosting.client import ControllerClient, controller_pid, told_by


class LocalClient(ControllerClient):
    """Finds the controller by the file that it writes (``ControllerConfig.http_file``)."""

    def __init__(self, http_file: Path, token: str) -> None:
        super().__init__(told_by(http_file), token)
        self._http_file = http_file

    def pid(self) -> int | None:
        """The controller's process, as it wrote itself; None before the first."""
        return controller_pid(self._http_file)
