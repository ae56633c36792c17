"""A process of its own for what needs torch, ray or numpy: it writes JSON lines to its standard output.

The child is in a session of its own: a terminal's Ctrl-C comes to it through this process alone.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from outlast.errors import RequestError

INTERRUPTED = 130
"""The exit status after a Ctrl-C."""
_KILLS = 2


def check_installed(what: str, names: Iterable[str]) -> None:
    """Raises RequestError that says how to install what ``what`` lacks."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"{what} needs {', '.join(missing)}: pip install 'outlast[train]'")


class Interrupts:
    """Passes Ctrl-C and SIGTERM on: the first asks the child to stop, the second to end at once."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.count += 1
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT if self.count < _KILLS else signal.SIGTERM)


def lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The child's JSON lines until it closes its output; other text counts as progress."""
    assert process.stdout is not None
    for text in process.stdout:
        try:
            value = json.loads(text)
        except ValueError:
            value = {"type": "progress", "text": text.rstrip()}
        if isinstance(value, dict):
            yield value
