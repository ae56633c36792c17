"""Restoring into another world: a table of the rules, then any worlds, losses and stores."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from outlast.snapshot.erasure import decode_ranges
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT, HeldImage, RankRestore, RestorePlan
from outlast.snapshot.placement import groups
from outlast.snapshot.restore import candidates, plan_restore
from outlast.snapshot.stored import StoredCheckpoint
from support.held_images import (
    LENGTH,
    NEW,
    OLD,
    damaged,
    guest,
    held,
    shard_of,
    snapshot,
    stored,
    without,
)

PEER, DECODE, OBJECT = "memory-peer", "memory-decode", "object"
OLD_WORLD = snapshot(world=4)


def seated(*nodes: str) -> dict[int, str]:
    return dict(enumerate(nodes))


def planned(
    images: Iterable[HeldImage], seats: Mapping[int, str], procs: int = 1, checkpoints: Iterable[StoredCheckpoint] = ()
) -> RestorePlan:
    plan = plan_restore(held(images), seats, procs, checkpoints)
    assert plan is not None
    assert plan.direct
    assert RestorePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    return plan


def places(plan: RestorePlan) -> list[tuple[str, str, int, str | None]]:
    return [(restore.source, restore.node, restore.slot, restore.holder) for restore in plan.ranks]


def at_home(seat: int, slot: int = 1) -> tuple[str, str, int, str]:
    return (PEER, f"node-{seat}", slot, f"node-{seat}")


THREE = seated("node-0", "node-1", "node-2")


@pytest.mark.parametrize(
    ("images", "seats", "expected"),
    [
        pytest.param(
            without(OLD_WORLD, "node-3"),
            THREE,
            [*map(at_home, range(3)), (DECODE, "node-2", GUEST_SLOT + 3, None)],
            id="a node lost: its image becomes a guest where most of it is needed",
        ),
        pytest.param(OLD_WORLD, THREE, [*map(at_home, range(4))], id="a node leaves: it is read where it is"),
        pytest.param(
            OLD_WORLD,
            seated("node-7", "node-8"),
            [*map(at_home, range(4))],
            id="all seats elsewhere, the old nodes are spares",
        ),
        pytest.param(
            OLD_WORLD,
            seated(*(f"node-{i}" for i in range(6))),
            [*map(at_home, range(4))],
            id="it grows",
        ),
        pytest.param(
            without(OLD_WORLD, "node-2", "node-3"),
            seated("node-1", "node-0"),
            [
                *map(at_home, range(2)),
                (DECODE, "node-0", GUEST_SLOT + 2, None),
                (DECODE, "node-1", GUEST_SLOT + 3, None),
            ],
            id="guests are spread, by name",
        ),
        pytest.param(
            [*without(OLD_WORLD, "node-2", "node-3"), guest(2, "node-0", world=4)],
            seated("node-0", "node-1"),
            [
                *map(at_home, range(2)),
                (PEER, "node-0", GUEST_SLOT + 2, "node-0"),
                (DECODE, "node-1", GUEST_SLOT + 3, None),
            ],
            id="a guest of an earlier attempt serves, and counts",
        ),
        pytest.param(
            [*OLD_WORLD, guest(0, "node-2", world=4)],
            THREE,
            [*map(at_home, range(4))],
            id="a guest is not needed",
        ),
        pytest.param(
            damaged(OLD_WORLD, shard_of(1), 3),
            THREE,
            [at_home(0), (DECODE, "node-1", 1, "node-1"), at_home(2), at_home(3)],
            id="repaired where it lies",
        ),
        pytest.param(
            damaged(OLD_WORLD, shard_of(3), 3),
            THREE,
            [*map(at_home, range(3)), (DECODE, "node-2", GUEST_SLOT + 3, "node-3")],
            id="a node without a seat repairs nothing",
        ),
        pytest.param(
            [*damaged(OLD_WORLD, shard_of(3), 3), *damaged([guest(3, "node-2", world=4)], shard_of(3), 1, 2)],
            THREE,
            [*map(at_home, range(3)), (DECODE, "node-2", GUEST_SLOT + 3, "node-2")],
            id="rather repaired on a node with a seat than fetched",
        ),
        pytest.param(
            [*OLD_WORLD, *(replace(image, node="node-1", slot=0) for image in OLD_WORLD if shard_of(3)(image))],
            THREE,
            [*map(at_home, range(3)), (PEER, "node-1", 0, "node-1")],
            id="rather read from a node with a seat",
        ),
    ],
)
def test_where_each_old_image_is_read(
    images: list[HeldImage], seats: dict[int, str], expected: list[tuple[str, str, int, str | None]]
) -> None:
    plan = planned(images, seats)
    assert places(plan) == expected
    assert [(restore.rank, restore.seat, restore.local_rank) for restore in plan.ranks] == [(s, s, 0) for s in range(4)]
    assert {restore.length for restore in plan.ranks} == {LENGTH}
    assert plan.kept_slot == 1
    assert plan.origins() == Counter(source for source, *_ in expected)


def test_several_ranks_a_node_become_as_many_guests() -> None:
    plan = planned(without(snapshot(procs=2, world=8), "node-3"), THREE, procs=2)
    assert [(r.rank, r.seat, r.local_rank) for r in plan.ranks] == [(2 * s + i, s, i) for s in range(4) for i in (0, 1)]
    assert places(plan)[6:] == [
        (DECODE, "node-2", GUEST_SLOT + 3, None),
        (DECODE, "node-0", GUEST_SLOT + 3, None),
    ]


def test_as_many_ranks_on_other_nodes_is_another_world() -> None:
    plan = planned(OLD_WORLD, seated("node-0", "node-1"), procs=2)
    assert places(plan) == [*map(at_home, range(4))]
    back = planned(snapshot(procs=2, world=4, groups=[range(2)], m=1), seated(*(f"node-{i}" for i in range(4))))
    assert [(r.seat, r.local_rank) for r in back.ranks] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_decode_reads_from_nodes_without_seats() -> None:
    plan = planned(without(OLD_WORLD, "node-0"), seated("node-1", "node-9"))
    (restore,) = (restore for restore in plan.ranks if restore.source == DECODE)
    assert (restore.node, restore.holder) == ("node-1", None)
    assert {source.node for source in restore.sources} == {"node-1", "node-2", "node-3"}
    assert restore.group is not None
    assert restore.group.index == 0


def test_a_copy_of_no_use_keeps_a_guest_away() -> None:
    """A keeper reads an image out by its name, and might take the wrong file."""
    short = replace(next(filter(shard_of(3), OLD_WORLD)), node="node-2", slot=0, length=LENGTH - 1, bad_blocks=(0,))
    plan = planned([*without(OLD_WORLD, "node-3"), short], THREE)
    assert places(plan)[3] == (DECODE, "node-0", GUEST_SLOT + 3, None)
    (_, reason), *_ = candidates(held([*without(OLD_WORLD, "node-3"), short]), seated("node-2"), 1)
    assert "every node with a seat has a copy that is no use" in str(reason)


@pytest.mark.parametrize(
    ("images", "origins", "slot"),
    [
        pytest.param([], [OBJECT] * 4, None, id="everything lost"),
        pytest.param(without(OLD_WORLD, "node-3"), [PEER, PEER, PEER, DECODE], 1, id="memory first"),
        pytest.param(
            without(OLD_WORLD, "node-1", "node-2", "node-3"), [PEER, OBJECT, OBJECT, OBJECT], 1, id="beyond parity"
        ),
        pytest.param(damaged(snapshot(m=0), shard_of(2), 0), [PEER, PEER, OBJECT, PEER], 1, id="damaged, no parity"),
        pytest.param([guest(3, "node-0", world=4)], [OBJECT] * 3 + [PEER], None, id="only a guest"),
    ],
)
def test_what_memory_lacks_is_read_from_the_store(
    images: list[HeldImage], origins: list[str], slot: int | None
) -> None:
    plan = planned(images, THREE, checkpoints=[stored()])
    assert [restore.source for restore in plan.ranks] == origins
    assert plan.kept_slot == slot
    for restore, image in zip(plan.ranks, stored().images, strict=True):
        if restore.source == OBJECT:
            assert (restore.node, restore.holder, restore.length) == ("", None, image.size)
            assert (restore.url, restore.key) == (stored().url, image.key)
    assert all(restore.source != OBJECT for name in THREE.values() for restore in plan.on_node(name))


def test_the_store_tells_a_world_that_headers_do_not() -> None:
    assert planned(snapshot(), THREE, checkpoints=[stored()]).origins() == {PEER: 4}
    ((_, reason),) = candidates(held(snapshot(world=4)), THREE, 1, [stored(nodes=3)])
    assert "different worlds: [3, 4]" in str(reason)


def test_another_jobs_checkpoint_comes_last_and_is_read_directly() -> None:
    newer = replace(stored(foreign=True), generation=Generation(9, 900, "f" * 16))
    older = stored(OLD, foreign=True)
    found = list(candidates(held(snapshot(world=4)), seated(*(f"node-{i}" for i in range(4))), 1, [older, newer]))
    assert [generation for generation, _ in found] == [NEW, newer.generation, OLD]
    _, plan = found[1]
    assert isinstance(plan, RestorePlan)
    assert (plan.direct, plan.origins(), plan.kept_slot) == (True, {OBJECT: 4}, None)
    assert {(restore.node, restore.url) for restore in plan.ranks} == {("", newer.url)}
    assert RestorePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_own_images_never_serve_another_jobs_generation() -> None:
    foreign = replace(stored(foreign=True), images=stored(foreign=True).images[:3])
    found = list(candidates(held(without(snapshot(m=0, world=4), "node-0")), THREE, 1, [foreign]))
    assert ["rank 0 of the old world has no image" in str(found[0][1]), "no image of rank 3" in str(found[1][1])] == [
        True,
        True,
    ]


@pytest.mark.parametrize(
    ("images", "seats", "procs", "reason"),
    [
        pytest.param(
            without(OLD_WORLD, "node-1", "node-2", "node-3"), THREE, 1, "rank 1 of the old world has no", id="lost"
        ),
        pytest.param(
            damaged(damaged(OLD_WORLD, shard_of(2), *range(5)), lambda image: image.kind == "parity", *range(7)),
            THREE,
            1,
            "rank 2 of the old world has only a damaged",
            id="damaged",
        ),
        pytest.param(without(snapshot(m=0, world=4), "node-3"), seated("node-0", "node-1"), 2, "rank 3 of", id="last"),
        pytest.param(
            [replace(image, world=3) for image in OLD_WORLD if image.kind == "shard"],
            seated("node-0"),
            1,
            "of another world than 3 nodes of 1 ranks: it has seat 3",
            id="a header that cannot be",
        ),
    ],
)
def test_why_there_is_no_direct_plan(images: list[HeldImage], seats: dict[int, str], procs: int, reason: str) -> None:
    ((_, found),) = candidates(held(images), seats, procs)
    assert reason in str(found)


# --- any worlds -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Two generations of one old world, what is left of them, and a new one."""

    nodes: int
    procs: int
    images: tuple[HeldImage, ...]
    lost: frozenset[str]
    seats: Mapping[int, str]
    new_procs: int
    stored: tuple[StoredCheckpoint, ...]
    excluded: frozenset[Generation]

    @property
    def same_world(self) -> bool:
        return (self.nodes, self.procs) == (len(self.seats), self.new_procs)

    def of(self, generation: Generation) -> list[HeldImage]:
        return [image for image in self.images if image.generation == generation]

    def find(self, node: str, kind: str, seat: int, local_rank: int, generation: Generation) -> HeldImage | None:
        """What the node's keeper takes for the image of that name."""
        wanted = (node, kind, seat, local_rank)
        named = [i for i in self.of(generation) if (i.node, i.kind, i.seat, i.local_rank) == wanted]
        return min(named, key=lambda image: f"slot-{local_rank}-{image.slot}.img", default=None)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    nodes, procs, parity = draw(st.integers(1, 6)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
    size = draw(st.sampled_from((None, 2, 3)))
    placed = groups([(seat, str(seat)) for seat in range(nodes)], size, parity)
    written = [
        image
        for group in placed
        for generation, slot in ((OLD, 0), (NEW, 1))
        for image in snapshot(generation, slot, procs, group.parity, [group.seats], nodes * procs)
    ]
    names = [f"node-{seat}" for seat in range(nodes)]
    lost = frozenset(draw(st.sets(st.sampled_from(names), max_size=3)))
    alive = [*sorted(set(names) - lost), "new-0", "new-1", "new-2"]
    order = draw(st.permutations(alive))
    seats = seated(*order[: draw(st.integers(1, len(order)))])
    if draw(st.booleans()):  # the same world again, as far as there are nodes
        seats = seated(*order[:nodes])
    files = {(i.node, i.kind, i.local_rank, i.slot): i for i in written if i.node not in lost}
    for _ in range(draw(st.integers(0, 3))):
        node, seat = draw(st.sampled_from(alive)), draw(st.integers(0, nodes - 1))
        extra = guest(seat, node, draw(st.sampled_from((OLD, NEW))), nodes * procs)
        files[node, "shard", 0, extra.slot] = extra
    left = _damaged(draw, list(files.values()))
    checkpoints = [stored(g, nodes, procs) for g in draw(st.sets(st.sampled_from((OLD, NEW))))]
    checkpoints += [replace(stored(foreign=True), generation=Generation(5, 1, "f" * 16))] * draw(st.integers(0, 1))
    excluded = frozenset(draw(st.sets(st.sampled_from((OLD, NEW)), max_size=1)))
    new_procs = draw(st.sampled_from((procs, 1, 2)))
    return Case(nodes, procs, tuple(left), lost, seats, new_procs, tuple(checkpoints), excluded)


def _damaged(draw: st.DrawFn, images: list[HeldImage]) -> list[HeldImage]:
    numbers = st.integers(0, max(len(images) - 1, 0))
    for index in draw(st.sets(numbers, max_size=6)) if images else ():
        blocks = draw(st.sets(st.integers(0, 4), min_size=1, max_size=3))
        images[index] = replace(images[index], bad_blocks=tuple(sorted(blocks)))
    gone = draw(st.sets(numbers, max_size=3))
    return [image for number, image in enumerate(images) if number not in gone]


@settings(max_examples=600, deadline=None)
@given(cases())
def test_every_plan_holds_and_no_newer_one_was_possible(case: Case) -> None:
    found = dict(candidates(held(case.images), case.seats, case.new_procs, case.stored, case.excluded))
    foreign = [checkpoint.generation for checkpoint in case.stored if checkpoint.foreign]
    own = {image.generation for image in case.images} | {c.generation for c in case.stored if not c.foreign}
    assert list(found) == [*sorted(own - case.excluded, reverse=True), *foreign]
    for generation, plan in found.items():
        event(
            f"{'same' if case.same_world else 'other'} world: {plan.origins() if isinstance(plan, RestorePlan) else 'no plan'}"
        )
        if generation in foreign:
            assert isinstance(plan, RestorePlan)
            assert plan.direct
            assert {restore.source for restore in plan.ranks} == {OBJECT}
        elif isinstance(plan, RestorePlan):
            check(case, plan)
        else:
            assert not possible(case, generation)


def check(case: Case, plan: RestorePlan) -> None:
    expected = [(rank, *divmod(rank, case.procs)) for rank in range(case.nodes * case.procs)]
    assert [(restore.rank, restore.seat, restore.local_rank) for restore in plan.ranks] == expected
    assert plan.direct == (not case.same_world)
    slots = Counter(r.slot for r in plan.ranks if r.slot < GUEST_SLOT and (not plan.direct or r.source != OBJECT))
    assert plan.kept_slot in (slots or {None: 0})
    for restore in plan.ranks:
        assert case.lost.isdisjoint({restore.node, restore.holder, *(s.node for s in restore.sources)})
        check_source(case, plan, restore)
        if not plan.direct:
            assert restore.node == case.seats[restore.seat]
        elif restore.source == DECODE:
            check_decoded_directly(case, plan.generation, restore)
    check_writes(case, plan)
    if plan.direct:
        check_spread(case, plan)


def check_source(case: Case, plan: RestorePlan, restore: RankRestore) -> None:
    """One that can really provide it, and none that is nearer is passed over."""
    name, generation = (restore.seat, restore.local_rank), plan.generation
    nodes = {image.node for image in case.images}
    sound = [c for node in nodes if (c := case.find(node, "shard", *name, generation)) and not c.bad_blocks]
    if restore.source in (DECODE, OBJECT):
        assert not sound
    else:
        (copy,) = (copy for copy in sound if copy.node == restore.holder)
        assert restore.length == copy.length
        assert restore.slot == copy.slot or (restore.source == PEER and not plan.direct)
        assert plan.direct or (restore.holder == restore.node) == (restore.source == "memory-local")
    if restore.source == DECODE:
        check_decode(case, generation, restore)
    if restore.source == OBJECT:
        (checkpoint,) = (c for c in case.stored if c.generation == generation and not c.foreign)
        image = checkpoint.images[restore.rank]
        assert (restore.url, restore.key, restore.length) == (checkpoint.url, image.key, image.size)
        assert (restore.node == "") == plan.direct


def check_decode(case: Case, generation: Generation, restore: RankRestore) -> None:
    group = restore.group
    assert group is not None
    for source in restore.sources:
        image = case.find(source.node, source.kind, group.seats[source.member], restore.local_rank, generation)
        assert image is not None
        assert image.bad_blocks == source.bad_blocks
        assert source.kind == "shard" or image.group == replace(group, index=source.member)
    assert group.seats[group.index] == restore.seat
    own = [s.node for s in restore.sources if (s.member, s.kind) == (group.index, "shard")]
    assert own == [restore.holder] * len(own)
    left, parity = restore.shard_availability(), restore.parity_availability()
    for _ in decode_ranges(group.layout(), group.index, left, parity):
        pass


def check_decoded_directly(case: Case, generation: Generation, restore: RankRestore) -> None:
    assert restore.node in case.seats.values()
    copy = case.find(restore.node, "shard", restore.seat, restore.local_rank, generation)
    if copy is None:
        assert restore.slot == GUEST_SLOT + restore.seat
    else:
        assert (copy.node, copy.slot) == (restore.holder, restore.slot)


def check_writes(case: Case, plan: RestorePlan) -> None:
    """Nothing that is read is overwritten, and afterwards keepers find what was made."""
    made = [r for r in plan.ranks if r.source == DECODE or (not plan.direct and r.source in (PEER, OBJECT))]
    written = {(r.node, r.local_rank, r.slot) for r in made if r.holder != r.node}
    assert len({(r.node, r.local_rank, r.slot) for r in made}) == len(made)
    for restore in plan.ranks:
        seats = restore.group.seats if restore.group else ()
        read = [(s.node, seats[s.member]) for s in restore.sources if s.kind == "shard"]
        for node, seat in [*read, *([(restore.holder, restore.seat)] if restore.holder else [])]:
            copy = case.find(node, "shard", seat, restore.local_rank, plan.generation)
            assert copy is not None
            assert (node, restore.local_rank, copy.slot) not in written
    for restore in made:
        own = [
            image.slot
            for image in case.of(plan.generation)
            if (image.node, image.kind) == (restore.node, "shard")
            and (image.seat, image.local_rank) == (restore.seat, restore.local_rank)
            and image.bad_blocks
            and image.slot != restore.slot
        ]
        assert all(f"{restore.slot}.img" < f"{slot}.img" for slot in own)


def check_spread(case: Case, plan: RestorePlan) -> None:
    """No node has two guests more than one that could have had the second."""
    guests = Counter(dict.fromkeys(case.seats.values(), 0))
    made = [r for r in plan.ranks if r.source == DECODE and r.node != r.holder]
    there = [
        image.node
        for image in case.of(plan.generation)
        if image.slot >= GUEST_SLOT
        and case.find(image.node, "shard", image.seat, image.local_rank, plan.generation) is image
    ]
    guests.update(node for node in there if node in guests)
    before = max(guests.values())
    guests.update(restore.node for restore in made)
    unusable = {image.node for image in case.of(plan.generation) if image.bad_blocks}
    free = [count for node, count in guests.items() if node not in unusable]
    if made and free and not unusable & set(guests):
        assert max(guests.values()) <= max(before, min(free) + 1)


def possible(case: Case, generation: Generation) -> bool:
    """A bound that needs no block arithmetic: what is stored, or has each group's loss within its parity.

    ``True`` is certain. Then a plan must exist.
    """
    if generation in (checkpoint.generation for checkpoint in case.stored if not checkpoint.foreign):
        return True
    if not case.same_world and not any(image.kind == "shard" for image in case.of(generation)):
        return False  # nothing says how many ranks there were
    ranks = [divmod(rank, case.procs) for rank in range(case.nodes * case.procs)]
    return all(_sound(case, generation, "shard", *rank) or _decodable(case, generation, *rank) for rank in ranks)


def _sound(case: Case, generation: Generation, kind: str, seat: int, local_rank: int) -> bool:
    nodes = {image.node for image in case.images}
    copies = [case.find(node, kind, seat, local_rank, generation) for node in nodes]
    return any(copy is not None and not copy.bad_blocks for copy in copies)


def _decodable(case: Case, generation: Generation, seat: int, local_rank: int) -> bool:
    found = {i.group.seats: i.group.parity for i in case.of(generation) if i.group and seat in i.group.seats}
    for seats, parity in found.items():
        both = [
            _sound(case, generation, "shard", s, local_rank) and _sound(case, generation, "parity", s, local_rank)
            for s in seats
        ]
        if both.count(False) <= parity:
            return True
    return False
