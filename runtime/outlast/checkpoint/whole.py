"""A checkpoint's tensors, whole, whatever the world was that wrote it.

Sharded ones are put together from all ranks' pieces; of others rank 0's is taken, as for the final weights. Memory: a
batch of tensors that are read together (``outlast.protect.shards.BATCH_BYTES``), or the largest tensor where that is
more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from outlast.protect.leaves import Leaf
from outlast.protect.shards import ShardReader, Shards, Want


@dataclass(frozen=True)
class TensorKind:
    """A whole tensor's type and shape."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class WholeState:
    """One checkpoint of ``world`` ranks. ``open_image`` gives a rank's image, and is called from several threads;
    ``label`` names the checkpoint in errors."""

    def __init__(self, open_image: Callable[[int], ShardReader], world: int, label: str) -> None:
        self._shards = Shards(open_image(0), open_image, 0, world, label=label)

    def state(self) -> dict[str, Any]:
        """Rank 0's JSON state."""
        return dict(self._shards.state())

    def leaves(self) -> list[str]:
        """The names of rank 0's leaves."""
        return list(self._shards.names)

    def kind(self, name: str) -> TensorKind:
        """What the leaf ``name`` is as a whole tensor. Raises StateError when there is none of that name."""
        info = self._shards.info(name)
        shape = info["global_shape"] if info["distributed"] else info["shape"]
        return TensorKind(getattr(torch, info["dtype"]), tuple(shape))

    def expect(self, names: Iterable[str]) -> None:
        """The leaves that will be asked for next, in this order: they are read in batches."""
        self._shards.expect(self._want(name) for name in dict.fromkeys(names))

    def tensor(self, name: str) -> torch.Tensor:
        """The whole leaf ``name`` on the CPU.

        Raises StateError when its pieces leave something out, and what reading the images raises.
        """
        announced = self._shards.want(name)
        return self._shards.tensor(announced if announced.like is not None else self._want(name))

    def _want(self, name: str) -> Want:
        kind, info = self.kind(name), self._shards.info(name)
        wanted = torch.empty(kind.shape, dtype=kind.dtype, device="meta")
        return Want(name, Leaf(name, wanted, False, kind.shape, (0,) * len(kind.shape), bool(info["distributed"])))
