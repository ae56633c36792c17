"""The controller's HTTP as the supervisor sees it.

Every call finds the controller anew, since it may have been replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

from outlast.config import NodeConfig
from outlast.errors import TransferError

_CALL_S = 10.0


class ControllerClient:
    """An async context manager. Every method raises TransferError when there is no controller that answers."""

    def __init__(self, http_file: Path, token: str) -> None:
        self._http_file = http_file
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

    def pid(self) -> int | None:
        """The controller's process, as it wrote itself; None before the first."""
        try:
            return int(json.loads(self._http_file.read_text())["pid"])
        except (OSError, ValueError, KeyError):
            return None

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
            address = json.loads(self._http_file.read_text())
            url = f"http://{address['host']}:{address['port']}{path}"
            async with self._session.request(method, url, json=body, timeout=timeout) as response:
                answer = await response.json()
        except (OSError, aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
            raise TransferError(
                f"the controller does not answer {method} {path}: {error or type(error).__name__}"
            ) from error
        if response.status >= 400 and not (absent_is_fine and response.status == 404):
            raise TransferError(f"the controller refused {method} {path}: {response.status} {answer}")
        return dict(answer)
