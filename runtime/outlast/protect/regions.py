"""Boxes of a global tensor, and where their bytes lie in a piece of it: what a change of the world needs. Pure.

Every piece is stored whole and row-major, as the header of its image says. A part of it is read in runs: ranges of
bytes that hold a box and little else, so that a range of rows is one read and a range of columns is not one for every
row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

GAP = 16 << 10
"""Bytes that are rather read and thrown away than skipped by another read."""
LONGEST = 8 << 20
"""Of a run that holds more than its box, since it is read into memory of its own."""


@dataclass(frozen=True)
class Box:
    """The elements from ``offset`` on, ``shape`` of them in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def common(self, other: Box) -> Box | None:
        """What both have; None when that is nothing."""
        first = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        ends = zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        shape = tuple(min(a + n, b + k) - lo for (a, n, b, k), lo in zip(ends, first, strict=True))
        return Box(first, shape) if all(n > 0 for n in shape) else None

    def strides(self) -> tuple[int, ...]:
        """Elements from one to the next in each dimension, row-major."""
        return tuple(math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape)))

    def place(self, inner: Box) -> int:
        """How many elements come before ``inner``'s first."""
        return sum((a - b) * stride for a, b, stride in zip(inner.offset, self.offset, self.strides(), strict=True))

    def span(self, inner: Box) -> int:
        """Elements from ``inner``'s first to its last, both counted; ``inner`` has at least one."""
        return 1 + sum((n - 1) * stride for n, stride in zip(inner.shape, self.strides(), strict=True))

    def holds_densely(self, inner: Box) -> bool:
        """Whether ``inner``'s elements lie here one after the other."""
        return self.span(inner) == inner.size


@dataclass(frozen=True)
class Run:
    """Bytes ``start:stop`` of a piece, which begin and end with those of ``box``."""

    start: int
    stop: int
    box: Box


def runs(piece: Box, box: Box, width: int) -> Iterator[Run]:
    """The bytes of ``piece`` to read for ``box``, a part of it, by their place; ``width``: bytes of an element."""
    span = piece.span(box)
    if span == box.size or (span * width <= LONGEST and _widest_gap(piece, box) * width <= GAP):
        start = piece.place(box) * width
        yield Run(start, start + span * width, box)
        return
    dim = next(dim for dim, n in enumerate(box.shape) if n > 1)
    half = box.shape[dim] // 2
    yield from runs(piece, _cut(box, dim, 0, half), width)
    yield from runs(piece, _cut(box, dim, half, box.shape[dim]), width)


def _widest_gap(piece: Box, box: Box) -> int:
    """The most elements of ``piece`` between two of ``box`` that follow one another."""
    widest, inner = 0, 1
    for n, stride in zip(reversed(box.shape), reversed(piece.strides()), strict=True):
        if n > 1:
            widest = max(widest, stride - inner)
        inner += (n - 1) * stride
    return widest


def _cut(box: Box, dim: int, first: int, stop: int) -> Box:
    offset, shape = list(box.offset), list(box.shape)
    offset[dim] += first
    shape[dim] = stop - first
    return Box(tuple(offset), tuple(shape))
