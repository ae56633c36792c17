"""How a run is shown: a live table on a terminal, plain lines elsewhere, JSON lines for programs.

Every view takes the supervisor's lines: ``{"type": "progress", "text"}``, ``{"type": "event", "event"}`` (a line of the
event log), ``{"type": "status", "status"}`` (the controller's /status) and ``{"type": "end", "outcome", "text", ...}``.
What a status does not say is shown as a dash, never an error.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from trainctl.status import Summary, event_line, summarize
from trainctl.terminal import is_drawable

if TYPE_CHECKING:
    from rich.console import RenderableType

STATUS_EVERY_S = 5.0
"""How often a plain view says how far the job is."""

_EVENTS_SHOWN = 8


class View(AbstractContextManager["View"], Protocol):
    """Where the supervisor's lines go."""

    def show(self, line: Mapping[str, Any]) -> None:
        """Show one line."""
        ...


def choose_view(as_json: bool, directory: Path) -> View:
    """The view for this process's standard output."""
    if as_json:
        return JsonView(directory)
    if is_drawable():
        return LiveView(directory)
    return PlainView(directory)


class _View:
    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        return None


class JsonView(_View):
    """Passes every line on."""

    def __init__(self, directory: Path) -> None:
        self.show({"type": "directory", "path": str(directory)})

    def show(self, line: Mapping[str, Any]) -> None:
        print(json.dumps(line), flush=True)


class PlainView(_View):
    """A line for each thing that happens, and now and then one for how far the job is."""

    def __init__(self, directory: Path) -> None:
        self._began = self._said = time.monotonic()
        self._step: int | None = None
        self._print(f"everything of this run goes to {directory}")

    def show(self, line: Mapping[str, Any]) -> None:
        match line.get("type"):
            case "progress" | "end":
                self._print(str(line.get("text", "")))
            case "event":
                self._print(event_line(line["event"]))
            case "status":
                self._show_status(summarize(line["status"]))

    def _show_status(self, summary: Summary) -> None:
        now = time.monotonic()
        if summary.step == self._step or now - self._said < STATUS_EVERY_S:
            return
        self._said, self._step = now, summary.step
        parts = [f"{name} {value}" for name, value in summary.rows() if value != "-"]
        self._print(", ".join(parts))

    def _print(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:7.1f}s  {text}", flush=True)


class LiveView(_View):
    """A table that is drawn anew four times a second, with the last events below it."""

    def __init__(self, directory: Path) -> None:
        from rich.console import Console
        from rich.live import Live

        self._directory = directory
        self._summary = summarize({})
        self._events: deque[str] = deque(maxlen=_EVENTS_SHOWN)
        self._end: str | None = None
        self._began = time.monotonic()
        self._live = Live(get_renderable=self._draw, console=Console(), refresh_per_second=4)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._end is not None:
            self._live.console.print(self._end, markup=False, highlight=False)

    def show(self, line: Mapping[str, Any]) -> None:
        match line.get("type"):
            case "progress":
                self._events.append(self._stamped(str(line.get("text", ""))))
            case "event":
                self._events.append(self._stamped(event_line(line["event"])))
            case "status":
                self._summary = summarize(line["status"])
            case "end":
                self._end = str(line.get("text", ""))

    def _stamped(self, text: str) -> str:
        return f"{time.monotonic() - self._began:7.1f}s  {text}"

    def _draw(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in (("folder", str(self._directory)), *self._summary.rows()):
            table.add_row(Text(name, style="dim"), Text(value))
        return Group(table, Text(), *(Text(event, overflow="ellipsis", no_wrap=True) for event in self._events))
