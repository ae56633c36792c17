"""What each rank had for itself, when their number is another than it was: a hook chooses, or it is rank 0's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

from outlast.data import ElasticSampler
from outlast.errors import StateError
from outlast.protect.leaves import Collector
from outlast.protect.plan import STATE
from outlast.protect.shards import Shards
from outlast.protect.tree import Json, unflatten

CHEAP_RANKS = 256
CHEAP_BYTES = 64 << 20
"""States of so many old ranks, and so many bytes in all, are compared to tell which differ."""

OnResize = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any] | None]
"""Takes the old ranks' states, and gives those that this rank is to load (others, or None: rank 0's)."""


class OldStates(Sequence[Mapping[str, Any]]):
    """For each old rank, object name -> state, of the ``names``. Read when asked for, and kept."""

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        self._shards, self._names = shards, names
        self._ranks: dict[int, OldState] = {}

    def __len__(self) -> int:
        return self._shards.world

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> Mapping[str, Any] | Sequence[Mapping[str, Any]]:
        if isinstance(index, slice):
            return [self[rank] for rank in range(*index.indices(len(self)))]
        rank = index + len(self) if index < 0 else index
        if not 0 <= rank < len(self):
            raise IndexError(f"there were {len(self)} ranks, so there is no state of rank {index}")
        if rank not in self._ranks:
            self._ranks[rank] = OldState(self._shards.of(rank), self._names)
        return self._ranks[rank]


class OldState(Mapping[str, Any]):
    """One old rank's states."""

    def __init__(self, shards: Shards, names: Sequence[str]) -> None:
        self._shards = shards
        objects = shards.state()["objects"]
        self._saved: dict[str, Json] = {name: objects[name] for name in names if name in objects}

    def __getitem__(self, name: str) -> Any:
        return unflatten(self._saved[name], self._shards.tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved)

    def __len__(self) -> int:
        return len(self._saved)


def chosen_states(on_resize: OnResize, collector: Collector, shards: Shards) -> Mapping[str, Any]:
    """What the hook chooses for this rank. Raises StateError when it names something that is not protected so."""
    chosen = on_resize(OldStates(shards, list(collector.others))) or {}
    unknown = sorted(set(chosen) - set(collector.others))
    if unknown:
        raise StateError(
            f"on_resize gave a state for {', '.join(unknown)}, but chooses for objects that are neither modules nor "
            f"optimizers: {', '.join(collector.others) or 'none is protected'}"
        )
    return chosen


def differing_states(collector: Collector, shards: Shards) -> list[str]:
    """Objects whose states (tensors apart) differed between the old ranks; none when that is dear to find out."""
    names = [key for key, value in collector.others.items() if not follows_its_sampler(value)]
    if not names or not 1 < shards.world <= CHEAP_RANKS:
        return []
    if shards.own.layout().entry(STATE).nbytes * shards.world > CHEAP_BYTES:
        return []
    shards.open(range(shards.world))
    first = shards.state()["objects"]
    others = [shards.of(rank).state()["objects"] for rank in range(shards.world) if rank != shards.rank]
    return [name for name in names if any(other.get(name) != first.get(name) for other in others)]


def follows_its_sampler(value: object) -> bool:
    """Whether a protected object is a loader whose position its ElasticSampler knows exactly, for any world."""
    return isinstance(getattr(value, "batch_sampler", None), ElasticSampler)


def set_position(sampler: ElasticSampler, step: int) -> None:
    """Put a sampler that is not protected itself where ``step`` steps leave it."""
    sampler.load_state_dict({**sampler.state_dict(), "position": step * sampler.global_batch})
