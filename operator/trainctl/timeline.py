"""What happened to a job, out of two sources in one order: Kubernetes Events and the controller's event log (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trainctl.columns import printable, table

Object = Mapping[str, Any]

KUBERNETES, CONTROLLER = "kubernetes", "controller"


@dataclass(frozen=True, order=True)
class Entry:
    """One thing that happened. ``time`` in wall seconds; ``about``: the Pod, or the attempt; ``count``: how often."""

    time: float
    source: str
    kind: str
    about: str
    text: str
    warning: bool = False
    count: int = 1

    def to_json(self) -> dict[str, Any]:
        return {
            "time": stamp(self.time),
            "source": self.source,
            "kind": self.kind,
            "about": self.about,
            "text": self.text,
            "warning": self.warning,
            "count": self.count,
        }


def of_kubernetes(event: Object) -> Entry:
    """A Kubernetes Event (core/v1), at the last time it was seen."""
    about, series = event.get("involvedObject") or {}, event.get("series") or {}
    return Entry(
        time=last_seen(event) or 0.0,
        source=KUBERNETES,
        kind=str(event.get("reason") or "Event"),
        about=str(about.get("name", "")) if about.get("kind") == "Pod" else "job",
        text=" ".join(str(event.get("message") or "").split()),
        warning=event.get("type") == "Warning",
        count=int(series.get("count") or event.get("count") or 1),
    )


def last_seen(event: Object) -> float | None:
    """The last time that a Kubernetes Event was seen, in wall seconds; None: it does not say."""
    seen = (
        (event.get("series") or {}).get("lastObservedTime")
        or event.get("lastTimestamp")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
    )
    return datetime.fromisoformat(seen).timestamp() if seen else None


def is_since(event: Object, created: str | None) -> bool:
    """Whether a Kubernetes Event was seen since ``created`` (RFC 3339), or there is no saying."""
    seen = last_seen(event)
    return not created or seen is None or seen >= datetime.fromisoformat(created).timestamp()


def of_controller(event: Object) -> Entry:
    """A line of the controller's event log."""
    attempt = event.get("attempt")
    return Entry(
        time=float(event["time"]),
        source=CONTROLLER,
        kind=str(event["kind"]),
        about=f"attempt {attempt}" if attempt else "job",
        text=str(event["text"]),
    )


def merged(kubernetes: Iterable[Object], controller: Iterable[Object]) -> list[Entry]:
    """Both, the oldest first."""
    return sorted([*map(of_kubernetes, kubernetes), *map(of_controller, controller)])


def timeline(entries: Iterable[Entry]) -> str:
    """Entries in columns."""
    rows = [_cells(entry) for entry in entries]
    return table(("TIME", "SOURCE", "KIND", "ABOUT", "WHAT"), rows) if rows else ""


def line(entry: Entry) -> str:
    """One entry by itself, as ``--follow`` writes it."""
    time, source, kind, about, text = _cells(entry)
    return printable(f"{time}  {source:<10}  {kind}  {about}: {text}")


def stamp(time: float) -> str:
    """RFC 3339, in UTC, to the second: what Kubernetes writes."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _cells(entry: Entry) -> tuple[str, str, str, str, str]:
    times = f" (x{entry.count})" if entry.count > 1 else ""
    mark = "! " if entry.warning else ""
    return stamp(entry.time), entry.source, entry.kind, entry.about, f"{mark}{entry.text}{times}"
