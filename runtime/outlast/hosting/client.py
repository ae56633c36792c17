"""The controller's HTTP as those see it who run the job's processes: ``trainctl run``, a head Pod, a node Pod.

Every call finds the controller anew, since it may have been replaced.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from outlast.config import NodeConfig
from outlast.errors import TransferError

_CALL_S = 10.0


class ControllerRefused(TransferError):
    """It answered, and refused. ``status``: of HTTP."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text, status)
        self.text, self.status = text, status

    def __str__(self) -> str:
        return self.text


Whereabouts = Callable[[], str]
"""Gives the controller's URL, without a path; OSError, ValueError or KeyError while that is not known."""


def told_by(http_file: Path) -> Whereabouts:
    """Where the controller says that it is, in the file that it writes (``ControllerConfig.http_file``)."""

    def where() -> str:
        address = json.loads(http_file.read_text())
        return f"http://{address['host']}:{address['port']}"

    return where


class ControllerClient:
    """An async context manager. Every method raises TransferError when there is no controller that answers, and
    ControllerRefused, which is one, when there is."""

    def __init__(self, where: Whereabouts, token: str) -> None:
        self._where = where
        self._headers = {"Authorization": f"Bearer {token}"}
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(headers=self._headers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def status(self) -> dict[str, Any]:
        """What the controller knows."""
        return await self._call("GET", "/status")

    async def news(self, after: int, wait_s: float) -> dict[str, Any]:
        """The status, as soon as the event log is beyond ``after``, or after ``wait_s`` seconds."""
        return await self._call("GET", f"/status?after={after}&wait={wait_s:g}", limit_s=wait_s + _CALL_S)

    async def hold(self, patience_s: float) -> None:
        """Have the ranks wait at a committed snapshot, so long at most, for another controller."""
        await self._call("POST", "/hold", {"patience_s": patience_s})

    async def events(self, after: int, wait_s: float) -> list[dict[str, Any]]:
        """Events newer than ``after``; waits up to ``wait_s`` seconds for one."""
        answer = await self._call("GET", f"/events?after={after}&wait={wait_s:g}", limit_s=wait_s + _CALL_S)
        return list(answer["events"])

    async def add_node(self, config: NodeConfig) -> None:
        """Register a node."""
        await self._call("POST", "/nodes", json.loads(config.model_dump_json()))

    async def remove_node(self, node: str) -> None:
        """Have a node forgotten, and its agent ended for good."""
        await self._call("DELETE", f"/nodes/{node}", limit_s=2 * _CALL_S, absent_is_fine=True)

    async def record(self, kind: str, text: str, fields: Mapping[str, Any]) -> None:
        """Add a line to the event log."""
        await self._call("POST", "/events", {"kind": kind, "text": text, "fields": dict(fields)})

    async def stop(self, reason: str) -> None:
        """Ask for the job's end; when it is over already, for the controller's."""
        await self._call("POST", "/stop", {"reason": reason})

    async def _call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        limit_s: float = _CALL_S,
        absent_is_fine: bool = False,
    ) -> dict[str, Any]:
        assert self._session is not None, "used outside of its context"
        timeout = aiohttp.ClientTimeout(total=limit_s)
        try:
            url = f"{self._where()}{path}"
            async with self._session.request(method, url, json=body, timeout=timeout) as response:
                answer = await response.json()
        except (OSError, aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            raise TransferError(
                f"the controller does not answer {method} {path}: {error or type(error).__name__}"
            ) from error
        if response.status >= 400 and not (absent_is_fine and response.status == 404):
            text = f"the controller refused {method} {path}: {response.status} {answer}"
            raise ControllerRefused(text, response.status)
        return dict(answer)


def controller_pid(http_file: Path) -> int | None:
    """The controller's process, as it wrote itself; None before the first."""
    try:
        return int(json.loads(http_file.read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return None
