"""A run's numbers across its controllers (pure).

A controller that replaces a dead one learns the job's state from the nodes, but not what was counted before, and it
cannot tell of the recovery that it is itself a part of. The supervisor outlives them all: it remembers each one's last
status, adds the counts up, books the time between two controllers as spent on starting one, and records the recovery
from the loss of the controller, or of Ray's head, when ranks had to be started again.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from outlast.local.report import CAUSES

RESTORED = ("restored", "restored-none")
"""The kinds of events that say what a new attempt begins with."""


CAUSES_OF_LOSS = {
    "head-lost": "Ray's head and the controller were lost",
    "controller-lost": "the controller was lost",
}


@dataclass
class Loss:
    """A loss of the controller: when it happened and was noticed (wall seconds), and what came of it."""

    kind: str
    happened: float
    noticed: float
    best_step: int
    restored: Mapping[str, Any] | None = None
    total_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As a controller's own record of a recovery."""
        fields = self.restored or {}
        step = fields.get("step")
        return {
            "kind": self.kind,
            "cause": CAUSES_OF_LOSS[self.kind],
            "attempt": fields.get("attempt"),
            "detect_s": round(self.noticed - self.happened, 3),
            "restore_sources": dict(fields.get("restore_sources") or {}),
            "restored_step": step,
            "lost_steps": None if step is None else max(0, self.best_step - int(step)),
            "total_s": None if self.total_s is None else round(self.total_s, 3),
        }


class History:
    """Fed with every /status, every event and when they came (wall seconds); ``merged`` is one status for all of it."""

    def __init__(self) -> None:
        self._last: dict[str, Mapping[str, Any]] = {}
        self._heard: dict[str, tuple[float, float]] = {}
        self._losses: list[Loss] = []
        self._started = 0
        self._best_step = 0

    def reached(self, step: int) -> None:
        """``step`` steps were done, whoever has told of it."""
        self._best_step = max(self._best_step, step)
        if self._open is not None and self._open.restored is None:
            self._open.best_step = self._best_step

    def head_lost(self, happened: float, noticed: float) -> None:
        """Ray's head is gone; nothing is done twice for one that is lost again before the job went on."""
        if self._open is None:
            self._losses.append(Loss("head-lost", happened, noticed, self._best_step))

    def feed_event(self, event: Mapping[str, Any]) -> None:
        """A line of the event log."""
        kind = event.get("kind")
        if kind == "controller-started":
            self._controller_started(float(event["time"]))
        elif kind in RESTORED and self._open is not None:
            self._open.restored = event["fields"]
        elif kind == "adopted" and self._open is not None:
            self._losses.pop()

    @property
    def _open(self) -> Loss | None:
        """The loss that the job has not recovered from."""
        return self._losses[-1] if self._losses and self._losses[-1].total_s is None else None

    def _controller_started(self, now: float) -> None:
        """Another than the first took over from one that was last heard some time ago."""
        self._started += 1
        if self._started > 1 and self._open is None:
            heard = max((last for _, last in self._heard.values()), default=now)
            self._losses.append(Loss("controller-lost", min(heard, now), now, self._best_step))

    def _end_loss(self, status: Mapping[str, Any], now: float) -> None:
        """The first step done after it ends a loss."""
        loss = self._open
        if loss is None or loss.restored is None:
            return
        if (
            status.get("attempt") == loss.restored.get("attempt")
            and int(status.get("step") or 0) > loss.restored["step"]
        ):
            loss.total_s = now - loss.happened

    def feed(self, status: Mapping[str, Any], now: float) -> None:
        """The newest status of the controller that it names."""
        self._end_loss(status, now)
        self.reached(max(int(status.get("step") or 0), int(status.get("best_step") or 0)))
        name = str(status.get("controller"))
        self._last.pop(name, None)
        self._last[name] = status
        self._heard[name] = (self._heard.get(name, (now, now))[0], now)

    def merged(self) -> dict[str, Any]:
        """The newest status with what happened under all controllers; empty before the first."""
        all_of_them = list(self._last.values())
        if not all_of_them:
            return {}
        return {
            **all_of_them[-1],
            "recoveries": self._recoveries(),
            "goodput": self._goodput(),
            "snapshots": _sums([status.get("snapshots") or {} for status in all_of_them]),
            "checkpoints": _checkpoints([status.get("checkpoints") or {} for status in all_of_them]),
            "resizes": [resize for status in all_of_them for resize in status.get("resizes") or []],
        }

    def _recoveries(self) -> list[dict[str, Any]]:
        """In the order of attempts; of what is told twice the last is the whole story."""
        told = [entry for status in self._last.values() for entry in status.get("recoveries") or []]
        told += [loss.to_json() for loss in self._losses]
        found = {(entry.get("attempt"), entry.get("cause")): entry for entry in told}
        return sorted(found.values(), key=lambda entry: entry.get("attempt") or 0)

    def _goodput(self) -> dict[str, Any]:
        ledgers = [status.get("goodput") or {} for status in self._last.values()]
        lost = {cause: sum(float((one.get("lost_s") or {}).get(cause, 0.0)) for one in ledgers) for cause in CAUSES}
        train = sum(float(one.get("train_s", 0.0)) for one in ledgers)
        lost["start"] += self._between()
        wall = train + sum(lost.values())
        return {
            "ratio": round(train / wall, 4) if wall > 0 else None,
            "wall_s": round(wall, 3),
            "train_s": round(train, 3),
            "lost_s": {cause: round(seconds, 3) for cause, seconds in lost.items()},
        }

    def _between(self) -> float:
        """Seconds from the last word of each controller to the first of the next."""
        spans = [self._heard[name] for name in self._last]
        return sum(max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(spans))


def _checkpoints(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is counted, added up; what is known of the newest one, as it was said last."""
    newest = {name: one[name] for one in told for name in ("last_step", "url") if one.get(name) is not None}
    counts = [{name: value for name, value in one.items() if name not in newest} for one in told]
    return {**_sums(counts), **newest}


def _sums(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    names = {name for count in counts for name, value in count.items() if isinstance(value, int | float)}
    return {name: sum(count.get(name) or 0 for count in counts) for name in sorted(names)}
