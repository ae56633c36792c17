"""Where each leaf's bytes go in a rank's image: pure arithmetic over leaves and the cut.

A leaf that n ranks hold alike is cut into n parts of whole 64-byte units, and each rank's image gets one (REFT, section
on sharded snapshots); a leaf of one rank alone is stored whole. The information to put it together again travels in the
image's header.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from outlast.protect.leaves import Leaf
from outlast.snapshot.image import Entry

STATE = "__state__"
UNIT = 64
Cut = Mapping[str, tuple[int, ...]]
"""Leaf key -> the ranks that hold it alike, in order, at least two."""

SAFETENSORS_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The bytes ``start:stop`` of ``leaf`` that this rank's image holds; ``replicas`` share the rest."""

    leaf: Leaf
    start: int
    stop: int
    replicas: tuple[int, ...]

    @property
    def whole(self) -> bool:
        return len(self.replicas) == 1

    def entry(self) -> Entry:
        leaf = self.leaf
        info = {
            "leaf": leaf.name, "start": self.start, "stop": self.stop, "nbytes": leaf.nbytes,
            "dtype": str(leaf.tensor.dtype).removeprefix("torch."), "shape": list(leaf.shape),
            "global_shape": list(leaf.global_shape), "offset": list(leaf.offset),
            "distributed": leaf.distributed, "device": leaf.device, "lazy": leaf.lazy, "replicas": list(self.replicas),
        }  # fmt: skip
        name = SAFETENSORS_NAMES.get(leaf.tensor.dtype)
        if self.whole and name:
            return Entry(leaf.name, name, leaf.shape, leaf.nbytes, info)
        size = self.stop - self.start
        return Entry(leaf.name, "U8", (size,), size, info)


def part_range(nbytes: int, index: int, count: int) -> tuple[int, int]:
    """The bytes that replica ``index`` of ``count`` copies. Empty for the last ones of a small leaf."""
    units = -(-nbytes // UNIT)
    first, rest = divmod(units, count)
    start = index * first + min(index, rest)
    stop = start + first + (1 if index < rest else 0)
    return min(start * UNIT, nbytes), min(stop * UNIT, nbytes)


def make_parts(leaves: Mapping[str, Leaf], cut: Cut, rank: int) -> list[Part]:
    """This rank's parts, eager leaves first."""
    parts = []
    for leaf in sorted(leaves.values(), key=lambda leaf: leaf.lazy):
        replicas = cut.get(leaf.key, (rank,)) if leaf.lazy else (rank,)
        start, stop = part_range(leaf.nbytes, replicas.index(rank), len(replicas))
        parts.append(Part(leaf, start, stop, replicas))
    return parts


def state_entry(capacity: int) -> Entry:
    """Room for the JSON state: a little-endian u64 length, then UTF-8."""
    return Entry(STATE, "U8", (capacity,), capacity, {})


def state_capacity(length: int) -> int:
    """Room for a JSON state of ``length`` bytes and its growth, so that a longer list needs no new layout."""
    return max(16 * 1024, -(-(2 * length + 8) // 4096) * 4096)


def estimate_bytes(leaves: Sequence[Leaf], optimizer_states_known: bool, replicas: int) -> int:
    """What a rank's image will hold, before the optimizer has made its state: Adam's two moments are assumed."""
    lazy = sum(leaf.nbytes for leaf in leaves if leaf.lazy)
    eager = sum(leaf.nbytes for leaf in leaves if not leaf.lazy)
    return (lazy if optimizer_states_known else 3 * lazy) // replicas + eager + state_capacity(0)


def group_equal(digests: Mapping[int, Mapping[str, str]]) -> dict[str, list[tuple[int, ...]]]:
    """Which ranks hold which leaf alike: digests by rank and leaf key -> sets of two ranks or more by leaf key."""
    holders: dict[str, dict[str, list[int]]] = {}
    for rank in sorted(digests):
        for key, digest in digests[rank].items():
            holders.setdefault(key, {}).setdefault(digest, []).append(rank)
    return {
        key: sets
        for key, by_digest in holders.items()
        if (sets := [tuple(ranks) for ranks in by_digest.values() if len(ranks) > 1])
    }


def cut_of(rank: int, groups: Mapping[str, Sequence[Sequence[int]]]) -> dict[str, tuple[int, ...]]:
    """One rank's cut out of what ``group_equal`` found."""
    return {key: tuple(ranks) for key, sets in groups.items() for ranks in sets if rank in ranks}


def rotating_sample(cut: Cut, turn: int) -> list[tuple[str, tuple[int, ...]]]:
    """For each set of replicas one of its leaves, another one each turn; the same choice on every member."""
    by_set: dict[tuple[int, ...], list[str]] = {}
    for key, replicas in cut.items():
        by_set.setdefault(replicas, []).append(key)
    return [(sorted(keys)[turn % len(keys)], replicas) for replicas, keys in sorted(by_set.items())]


def decode_state(blob: bytes | memoryview) -> Any:
    """The JSON state of an image's ``__state__`` entry."""
    import json

    length = int.from_bytes(blob[:8], "little")
    return json.loads(bytes(blob[8 : 8 + length]))
