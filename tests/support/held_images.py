"""What keepers and stores hold, as values: one image after the other, then what is lost and damaged of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from outlast.snapshot.erasure import BLOCK
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT, GroupInfo, HeldImage, Inventory
from outlast.snapshot.stored import StoredCheckpoint, StoredImage

OLD, NEW = Generation(1, 10, "a" * 16), Generation(1, 20, "a" * 16)
SEATS = {seat: f"node-{seat}" for seat in range(4)}
LENGTH = 5 * BLOCK

Choice = Callable[[HeldImage], bool]


def snapshot(
    generation: Generation = NEW,
    slot: int = 1,
    procs: int = 1,
    m: int = 2,
    groups: Iterable[Sequence[int]] = (range(4),),
    world: int = 0,
) -> list[HeldImage]:
    """All images of one generation: seat s on node-s, each group protected (m 0: not at all)."""
    images = []
    for seats in groups:
        for index, seat in enumerate(seats):
            for local_rank in range(procs):
                group = GroupInfo(tuple(seats), m, (LENGTH,) * len(seats), index)
                shard = HeldImage(f"node-{seat}", seat, local_rank, slot, generation, "shard", LENGTH, world=world)
                images.append(shard)
                if m:
                    images.append(replace(shard, kind="parity", length=m * 3 * BLOCK + 9000, group=group, world=0))
    return images


def held(images: Iterable[HeldImage]) -> list[Inventory]:
    images = list(images)
    nodes = sorted({image.node for image in images})
    return [Inventory(node, tuple(image for image in images if image.node == node)) for node in nodes]


def without(images: Iterable[HeldImage], *nodes: str) -> list[HeldImage]:
    return [image for image in images if image.node not in nodes]


def damaged(images: Iterable[HeldImage], choice: Choice, *blocks: int) -> list[HeldImage]:
    return [replace(image, bad_blocks=blocks) if choice(image) else image for image in images]


def shard_of(seat: int) -> Choice:
    return lambda image: image.kind == "shard" and image.seat == seat


def parity_of(seat: int) -> Choice:
    return lambda image: image.kind == "parity" and image.seat == seat


def guest(seat: int, node: str, generation: Generation = NEW, world: int = 0, local_rank: int = 0) -> HeldImage:
    """A seat's image on a node that has been asked to keep it for others."""
    return HeldImage(node, seat, local_rank, GUEST_SLOT + seat, generation, "shard", LENGTH, world=world)


def stored(generation: Generation = NEW, nodes: int = 4, procs: int = 1, foreign: bool = False) -> StoredCheckpoint:
    """A complete checkpoint."""
    url = "file:///store/default/other" if foreign else "file:///store/default/job"
    images = [
        StoredImage(rank, *divmod(rank, procs), f"{generation}/rank-{rank:05d}.safetensors", LENGTH, "0" * 16)
        for rank in range(nodes * procs)
    ]
    return StoredCheckpoint(generation, url, nodes, procs, tuple(images), {"mesh": [nodes * procs]}, foreign)
