"""Micro-batches of global steps out of any loader, with the position that has been consumed.

With an ElasticSampler the loader's iterator never ends and the sampler says which micro-batches make a step; any other
loader gives one micro-batch a step (or as many as asked for), and a new epoch begins when its iterator ends. What a
prefetching loader drew ahead does not count: the position moves when a step is finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from outlast.data import ElasticSampler
from outlast.errors import RequestError


class Batches:
    """Feeds ``Run.steps``. ``sampler`` is the loader's ElasticSampler, if it has one."""

    def __init__(self, loader: Any, micro_batches: int) -> None:
        self.loader = loader
        sampler = getattr(loader, "batch_sampler", None)
        self.sampler: ElasticSampler | None = sampler if isinstance(sampler, ElasticSampler) else None
        if self.sampler is None and isinstance(getattr(loader, "sampler", None), ElasticSampler):
            raise RequestError("ElasticSampler yields batches: pass it as DataLoader(dataset, batch_sampler=sampler)")
        if self.sampler is not None and micro_batches != 1:
            raise RequestError("with an ElasticSampler, micro-batches are set by ElasticSampler(micro_batch=...)")
        self._micro_batches = micro_batches
        self._iterator: Iterator[Any] | None = None
        if self.sampler is not None and getattr(loader, "num_workers", 0) > 0:
            from outlast.loading import attach

            attach(loader, self.sampler.seed)

    def open(self) -> None:
        """Make the iterator (this consumes global RNG, so RNG is restored after it)."""
        self._iterator = iter(self.loader)

    def step(self) -> Iterator[tuple[Any, bool, float]]:
        """(batch, whether it is the step's last, its weight) for each micro-batch of the next step."""
        weights = self._weights()
        for index, weight in enumerate(weights):
            yield self._next(), index == len(weights) - 1, weight

    def finished(self) -> None:
        """The step's batches were used."""
        if self.sampler is not None:
            self.sampler.advance()

    def _weights(self) -> list[float]:
        if self.sampler is None:
            return [1.0 / self._micro_batches] * self._micro_batches
        return list(self.sampler.weights)

    def _next(self) -> Any:
        assert self._iterator is not None
        try:
            return next(self._iterator)
        except StopIteration:
            self._iterator = iter(self.loader)
        try:
            return next(self._iterator)
        except StopIteration:
            raise RequestError("the loader is empty: it gave no batch in a whole epoch") from None


def position_is_protected(batches: Batches, objects: Mapping[str, Any]) -> bool:
    """Whether a restart can go on where the data stood."""
    held = [id(value) for value in objects.values()]
    return id(batches.loader) in held or (batches.sampler is not None and id(batches.sampler) in held)
