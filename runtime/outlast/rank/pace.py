"""How long a step takes, and which part of it is this rank's own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook


class Pace:
    """Times a step, and the part of it that waits for no other rank: fetching data, and from the optimizer on."""

    def __init__(self) -> None:
        self._began = self._fetched = 0.0
        self._stepping: float | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        hook = register_optimizer_step_pre_hook(self._on_optimizer)
        try:
            yield
        finally:
            hook.remove()

    def _on_optimizer(self, *_: Any) -> None:
        if self._stepping is None:
            self._stepping = time.perf_counter()

    def begin(self) -> None:
        self._began, self._fetched, self._stepping = time.perf_counter(), 0.0, None

    def held(self, seconds: float) -> None:
        """For so long the rank was kept waiting, on purpose: that is no part of the step."""
        self._began += seconds

    def fetching(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            before = time.perf_counter()
            try:
                item = next(batches)
            except StopIteration:
                return
            self._fetched += time.perf_counter() - before
            yield item

    def end(self) -> tuple[float, float]:
        """(seconds of the step, seconds of its own part)."""
        now = time.perf_counter()
        return now - self._began, self._fetched + (now - self._stepping if self._stepping is not None else 0.0)
