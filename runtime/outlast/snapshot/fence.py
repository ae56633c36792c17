"""The fence of one keeper: which attempt may write, and nobody else.

A keeper obeys one attempt at a time, the newest that it heard of; that survives its restarts in ``fence.json``. Raising
the fence ends what older attempts are still writing *and waits for it*, so that after the answer to ``fence`` no byte
of theirs arrives, not even from a peer that was paused in the middle of a push.

Call order: every operation that writes does its writing inside ``with fence.writing(attempt, cancel)``; ``cancel`` is
called from another thread and must make the writer leave soon. What only reads on this node (an upload, which a slow
store may hold up) is done inside ``with fence.reading(attempt, cancel)``: it is ended as well, but not waited for.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from outlast.errors import StaleAttemptError
from outlast.snapshot.identity import Attempt
from outlast.snapshot.wire import Deadline

STOP_SECONDS = 10.0
"""How long a cancelled writer may take to leave."""


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a small file in one step."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_text(json.dumps(value))
    draft.replace(path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a small file; None when it is missing or no JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


_Workers = dict[object, tuple[Attempt, Callable[[], None]]]


class Fence:
    """The attempt in force on this keeper, and who is writing for it. Threads may share it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._changed = threading.Condition()
        self._writers: _Workers = {}
        self._readers: _Workers = {}
        stored = read_json(path)
        self._current = Attempt(int(stored["attempt"]), str(stored["incarnation"])) if stored else None

    @property
    def current(self) -> Attempt | None:
        """The attempt in force; None before the first."""
        return self._current

    def admit(self, attempt: Attempt) -> None:
        """Let ``attempt`` write from now on: in force already, or newer, which raises the fence.

        Raises StaleAttemptError for an older attempt or another incarnation of the same number, TransferError when a
        writer of an older attempt does not leave in time.
        """
        with self._changed:
            self._check(attempt)
            if attempt != self._current:
                write_json(self._path, {"attempt": attempt.number, "incarnation": attempt.incarnation})
                self._current = attempt
            working = [*self._writers.values(), *self._readers.values()]
            older = [cancel for worker, cancel in working if worker != attempt]
        for cancel in older:
            cancel()
        self._wait_gone(attempt)

    def writing(self, attempt: Attempt, cancel: Callable[[], None]) -> AbstractContextManager[None]:
        """Write within this block, as ``attempt``. Raises like ``admit``; ``cancel`` ends the block from outside."""
        return self._working(self._writers, attempt, cancel)

    def reading(self, attempt: Attempt, cancel: Callable[[], None]) -> AbstractContextManager[None]:
        """Do within this block, as ``attempt``, what changes nothing here. Raises like ``admit``; a newer attempt calls
        ``cancel`` and does not wait.
        """
        return self._working(self._readers, attempt, cancel)

    @contextmanager
    def _working(self, workers: _Workers, attempt: Attempt, cancel: Callable[[], None]) -> Iterator[None]:
        self.admit(attempt)
        key = object()
        with self._changed:
            self._check(attempt)
            workers[key] = (attempt, cancel)
        try:
            yield
        finally:
            with self._changed:
                del workers[key]
                self._changed.notify_all()

    def _check(self, attempt: Attempt) -> None:
        current = self._current
        if current and attempt != current and attempt.number <= current.number:
            raise StaleAttemptError(f"attempt {attempt} is over here: attempt {current} is in force")

    def _wait_gone(self, attempt: Attempt) -> None:
        deadline = Deadline.after(STOP_SECONDS, f"writers of attempts before {attempt} to stop")
        with self._changed:
            while any(writer.number < attempt.number for writer, _ in self._writers.values()):
                self._changed.wait(deadline.left())
