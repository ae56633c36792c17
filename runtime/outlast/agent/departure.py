"""A node's leaving: it was told to go, hands over what it has, and ends when nothing of it is needed any more."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

from outlast import messages as m
from outlast.agent.forkclient import ForkClient
from outlast.clock import Clock
from outlast.errors import RequestError, TransferError


class Departure:
    """One node's. All methods are called on the reactor's thread.

    Call order: ``begin`` when the forkserver was told to end, ``tell`` whenever the node has joined; ``release`` once
    no rank lives; ``clear`` when the forkserver is gone.
    """

    def __init__(
        self, node: str, memory: Path, forks: ForkClient, emit: Callable[[m.Event], None], clock: Clock
    ) -> None:
        self._node, self._memory, self._forks = node, memory, forks
        self._emit, self._clock = emit, clock
        self._ends: float | None = None
        self._known = False
        self.released = False

    def begin(self, seconds: float) -> None:
        """The node will be gone in so many seconds. A controller that does not know the node is told when it joins."""
        self._ends = self._clock.monotonic() + seconds
        if self._known:
            self.tell()

    def tell(self) -> None:
        """The node has joined: say that it leaves, if it does."""
        self._known = True
        if self._ends is not None:
            left = max(self._ends - self._clock.monotonic(), 0.0)
            self._emit(m.Leaving(self._node, left, "the node was told to go"))

    def release(self) -> None:
        """End the forkserver, and the keeper with it."""
        self.released = True
        with contextlib.suppress(RequestError, TransferError):  # it has ended: that is told in any case
            self._forks.shutdown()

    def clear(self) -> None:
        """Give back the memory of the images, which nobody serves any more."""
        for path in self._memory.glob("*.img*"):
            path.unlink(missing_ok=True)
