"""The controller of a ``trainctl run`` that is under way, asked over HTTP as the operator would."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

START_S = 120.0


class Asking:
    """``folder`` is the run's. Waits for the controller before the first request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Raises OSError when there is no controller, urllib.error.HTTPError (one of them) when it refuses."""
        where = json.loads((self.folder / "control" / "http.json").read_text())
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://{where['host']}:{where['port']}{path}", data=data, method=method)
        request.add_header("Authorization", f"Bearer {(self.folder / 'control' / 'token').read_text()}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def refused(self, path: str, body: Any) -> str:
        """The error of a request that is refused."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.ask("POST", path, body)
        assert caught.value.code == 400
        return str(json.load(caught.value)["error"])

    def until(self, condition: Callable[[dict[str, Any]], Any], seconds: float = START_S) -> dict[str, Any]:
        """The first status of which ``condition`` holds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                status: dict[str, Any] = self.ask("GET", "/status")
            except OSError:
                status = {}
            if status and condition(status):
                return status
            assert time.monotonic() < deadline, f"not in {seconds} s: {status}"
            time.sleep(0.05)

    def until_step(self, step: int) -> dict[str, Any]:
        """The first status in which so many steps are done and the job runs."""
        return self.until(lambda status: status["phase"] == "Running" and status["step"] >= step)
