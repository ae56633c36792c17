"""A checkpoint's tensors, whole, whatever the world was that wrote it.

Sharded ones are put together from all ranks' pieces, also what an optimizer keeps as plain tensors of the shape of its
parameter's shard; of others rank 0's is taken, as for the final weights. Memory: a batch of tensors that are read
together (``outlast.protect.shards.BATCH_BYTES``), or the largest tensor where that is more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from outlast.checkpoint.statedict import is_optimizer
from outlast.protect.leaves import Leaf
from outlast.protect.shards import ShardReader, Shards, Want
from outlast.protect.tree import tensor_names


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
        self._cut_like: dict[str, str | None] = {}

    def state(self) -> dict[str, Any]:
        """Rank 0's JSON state."""
        return dict(self._shards.state())

    def leaves(self) -> list[str]:
        """The names of rank 0's leaves."""
        return list(self._shards.names)

    def kind(self, name: str) -> TensorKind:
        """What the leaf ``name`` is as a whole tensor. Raises StateError when there is none of that name."""
        info, along = self._shards.info(name), self._along(name)
        placed = info if along is None else self._shards.info(along)
        shape = placed["global_shape"] if placed["distributed"] else info["shape"]
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
        kind, along = self.kind(name), self._along(name)
        wanted = torch.empty(kind.shape, dtype=kind.dtype, device="meta")
        spread = along is not None or bool(self._shards.info(name)["distributed"])
        return Want(name, Leaf(name, wanted, False, kind.shape, (0,) * len(kind.shape), spread), along)

    def _along(self, name: str) -> str | None:
        """The parameter like which a plain tensor of an optimizer's state is cut; None: it is whole, or a DTensor. All
        ranks' headers are asked, once."""
        if name not in self._cut_like:
            self._cut_like[name] = self._find_along(name)
        return self._cut_like[name]

    def _find_along(self, name: str) -> str | None:
        parameter = self._parameters.get(name)
        if parameter is None or parameter not in self._shards.names:
            return None
        info, whose = self._shards.info(name), self._shards.info(parameter)
        if info["distributed"] or not whose["distributed"] or not info["shape"] or info["shape"] != whose["shape"]:
            return None
        return parameter if self._shards.is_cut_like(name, parameter) else None

    @cached_property
    def _parameters(self) -> dict[str, str]:
        """Leaf of an optimizer's state -> whose it is."""
        optimizers = [saved for saved in self._shards.state()["objects"].values() if is_optimizer(saved)]
        states = [item for saved in optimizers for item in saved["states"].items()]
        return {leaf: parameter for parameter, tree in states for leaf in tensor_names(tree)}
