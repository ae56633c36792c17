"""What can be rebuilt from what is held: tables, then any damage."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from outlast.errors import UnrecoverableError
from outlast.snapshot.erasure import BLOCK, decode_ranges
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import GUEST_SLOT, GroupInfo, HeldImage, Inventory, RankRestore, RestorePlan
from outlast.snapshot.restore import candidates, lacking_parity, plan_restore
from outlast.snapshot.stored import StoredCheckpoint
from support.held_images import (
    LENGTH,
    NEW,
    OLD,
    SEATS,
    damaged,
    guest,
    held,
    parity_of,
    shard_of,
    snapshot,
    stored,
    without,
)


def planned(
    images: Iterable[HeldImage],
    seats: dict[int, str] = SEATS,
    procs: int = 1,
    checkpoints: Iterable[StoredCheckpoint] = (),
) -> RestorePlan:
    plan = plan_restore(held(images), seats, procs, checkpoints)
    assert plan is not None
    return plan


LOCAL, PEER, DECODE, OBJECT = "memory-local", "memory-peer", "memory-decode", "object"
SPARE = {**SEATS, 2: "node-4"}


@pytest.mark.parametrize(
    ("images", "seats", "generation", "origins"),
    [
        pytest.param(snapshot(), SEATS, NEW, [LOCAL] * 4, id="all there"),
        pytest.param([*snapshot(OLD, 0), *snapshot()], SEATS, NEW, [LOCAL] * 4, id="newest"),
        pytest.param(snapshot(), SPARE, NEW, [LOCAL, LOCAL, PEER, LOCAL], id="seat moved, node alive"),
        pytest.param(
            without(snapshot(), "node-2"), SPARE, NEW, [LOCAL, LOCAL, DECODE, LOCAL], id="node lost, spare has its seat"
        ),
        pytest.param(
            without(snapshot(), "node-2", "node-3"),
            {**SPARE, 3: "node-5"},
            NEW,
            [LOCAL, LOCAL, DECODE, DECODE],
            id="as many as parity",
        ),
        pytest.param(
            [*snapshot(OLD, 0), *without(snapshot(), "node-1", "node-2", "node-3")],
            SEATS,
            OLD,
            [LOCAL] * 4,
            id="newer beyond reach",
        ),
        pytest.param(
            [*snapshot(OLD, 0), *(i for i in snapshot() if i.kind == "shard" and i.seat)],
            SEATS,
            OLD,
            [LOCAL] * 4,
            id="newer without parity and one rank",
        ),
        pytest.param(
            [i for i in snapshot() if i.kind == "shard"], SEATS, NEW, [LOCAL] * 4, id="no parity yet, all ranks there"
        ),
        pytest.param(
            damaged(snapshot(), shard_of(1), 0, 4), SEATS, NEW, [LOCAL, DECODE, LOCAL, LOCAL], id="repair in place"
        ),
        pytest.param(damaged(snapshot(), parity_of(1), 0, 4), SEATS, NEW, [LOCAL] * 4, id="bad parity needs no repair"),
        pytest.param(
            damaged(without(snapshot(), "node-2"), shard_of(1), 0, 1, 2, 3, 4),
            SPARE,
            NEW,
            [LOCAL, DECODE, DECODE, LOCAL],
            id="lost and corrupt within reach",
        ),
        pytest.param(
            [
                *snapshot(OLD, 0),
                *damaged(damaged(without(snapshot(), "node-2"), shard_of(1), 0, 1, 2), parity_of(3), *range(7)),
            ],
            SPARE,
            OLD,
            [LOCAL, LOCAL, PEER, LOCAL],
            id="lost and corrupt beyond reach",
        ),
        pytest.param(
            [*snapshot(), *(replace(i, node="node-9") for i in snapshot() if i.seat == 0)],
            SEATS,
            NEW,
            [LOCAL] * 4,
            id="a zombie's copies change nothing",
        ),
        pytest.param(
            [*damaged(snapshot(), shard_of(0), 3), *(replace(i, node="node-9") for i in snapshot() if i.seat == 0)],
            SEATS,
            NEW,
            [PEER, LOCAL, LOCAL, LOCAL],
            id="a sound copy elsewhere before decoding",
        ),
        pytest.param(
            [i for i in snapshot() if i.kind == "parity"], SEATS, NEW, [DECODE] * 4, id="as much parity as data, alone"
        ),
        pytest.param(
            without(snapshot(m=1, groups=[range(2), range(2, 4)]), "node-0", "node-3"),
            {**SEATS, 0: "node-5", 3: "node-6"},
            NEW,
            [DECODE, LOCAL, LOCAL, DECODE],
            id="a loss in each group of two",
        ),
    ],
)
def test_where_each_rank_comes_from(
    images: list[HeldImage], seats: dict[int, str], generation: Generation, origins: list[str]
) -> None:
    plan = planned(images, seats)
    assert plan.generation == generation
    assert [restore.source for restore in plan.ranks] == origins
    assert [(restore.rank, restore.node) for restore in plan.ranks] == sorted(seats.items())
    assert {restore.slot for restore in plan.ranks} == {1 if generation == NEW else 0}
    assert plan.origins() == {origin: origins.count(origin) for origin in set(origins)}
    assert [restore.seat for restore in plan.on_node("node-3")] == [seat for seat in seats if seats[seat] == "node-3"]
    assert RestorePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    ("images", "seats", "reason"),
    [
        pytest.param([], SEATS, None, id="nothing held"),
        pytest.param(
            without(snapshot(), "node-0", "node-1", "node-2"), SEATS, "rank 0 has no image", id="beyond reach"
        ),
        pytest.param(
            [i for i in snapshot(m=1) if i.kind == "parity"], SEATS, "1 of 3 chunks needed are left", id="parity alone"
        ),
        pytest.param(
            [i for i in snapshot() if i.kind == "shard" and i.seat], SEATS, "no parity of its group", id="no parity"
        ),
        pytest.param(
            damaged([i for i in snapshot() if i.kind == "shard"], shard_of(2), 1),
            SEATS,
            "rank 2 has only a damaged image",
            id="damaged without parity",
        ),
        pytest.param(snapshot(), {0: "node-0", 1: "node-1"}, "another world", id="fewer seats, headers do not say"),
        pytest.param(snapshot(procs=2), SEATS, "another world", id="fewer ranks a node, headers do not say"),
        pytest.param(
            [*snapshot(world=4)[:2], *snapshot(world=8)[2:]], SEATS, "different worlds", id="headers that disagree"
        ),
        pytest.param(
            [replace(i, group=None) if i.kind == "parity" else i for i in snapshot() if i.seat],
            SEATS,
            "no parity",
            id="parity of an unknown group",
        ),
        pytest.param(
            [replace(i, group=replace(i.group, parity=4)) if i.group else i for i in without(snapshot(), "node-0")],
            SEATS,
            "cannot have parity 4",
            id="an impossible group",
        ),
    ],
)
def test_why_there_is_no_plan(images: list[HeldImage], seats: dict[int, str], reason: str | None) -> None:
    assert plan_restore(held(images), seats, 1) is None
    reasons = [str(found) for _, found in candidates(held(images), seats, 1)]
    if reason is None:
        assert reasons == []
    else:
        with pytest.raises(UnrecoverableError, match=reason):
            raise UnrecoverableError(reasons[0])


def test_candidates_say_why_the_newest_was_passed_over() -> None:
    images = [*snapshot(OLD, 0), *without(snapshot(), "node-1", "node-2", "node-3")]
    (newest, reason), (next_one, plan) = candidates(held(images), SEATS, 1)
    assert (newest, next_one) == (NEW, OLD)
    assert "rank 1" in str(reason)
    assert isinstance(plan, RestorePlan)


def test_the_parallel_attempt_of_another_controller_is_not_mixed_in() -> None:
    """Same numbers, another incarnation: another generation."""
    other = replace(NEW, incarnation="b" * 16)
    halves = [i for i in snapshot() if i.seat < 2] + [i for i in snapshot(other) if i.seat >= 2]
    assert plan_restore(held(halves), {**SEATS, 0: "x", 1: "y"}, 1) is not None
    assert plan_restore(held(i for i in halves if i.kind == "shard"), SEATS, 1) is None


def test_a_decode_says_what_to_read() -> None:
    images = damaged(without(snapshot(), "node-2"), shard_of(1), 3)
    restore = planned(images, SPARE).ranks[2]
    assert (restore.node, restore.holder, restore.length) == ("node-4", None, LENGTH)
    assert restore.group == GroupInfo((0, 1, 2, 3), 2, (LENGTH,) * 4, 2)
    assert restore.shard_availability() == [frozenset(), {3}, None, frozenset()]
    assert set(restore.parity_availability()) == {(0, 0), (0, 1), (3, 0), (3, 1), (1, 0), (2, 1)}
    assert {(source.member, source.kind) for source in restore.sources} == {
        (member, kind) for member in (0, 1, 3) for kind in ("shard", "parity")
    }


def test_a_damaged_copy_is_repaired_where_it_is_or_fetched() -> None:
    images = damaged(snapshot(), shard_of(2), 1)
    in_place, fetched = planned(images).ranks[2], planned(images, SPARE).ranks[2]
    assert (in_place.node, in_place.holder) == ("node-2", "node-2")
    assert (fetched.node, fetched.holder) == ("node-4", "node-2")
    assert fetched.shard_availability()[2] == {1}


def test_a_local_image_stays_in_its_slot() -> None:
    images = [replace(i, slot=0) if i.seat == 3 else i for i in snapshot()]
    assert [restore.slot for restore in planned(images).ranks] == [1, 1, 1, 0]


def test_several_ranks_a_node() -> None:
    plan = planned(without(snapshot(procs=2), "node-1"), {**SEATS, 1: "node-7"}, procs=2)
    assert [(r.rank, r.seat, r.local_rank) for r in plan.ranks] == [(2 * s + i, s, i) for s in range(4) for i in (0, 1)]
    assert [r.rank for r in plan.ranks if r.source == DECODE] == [2, 3] == [r.rank for r in plan.on_node("node-7")]


def test_a_copy_of_another_length_is_no_source() -> None:
    images = [replace(i, length=LENGTH - 1) if shard_of(1)(i) else i for i in without(snapshot(), "node-2")]
    restore = planned(images, SPARE).ranks[2]
    assert restore.shard_availability() == [frozenset(), None, None, frozenset()]


def places(plan: RestorePlan) -> list[tuple[str, int, str | None]]:
    return [(restore.source, restore.slot, restore.holder) for restore in plan.ranks]


def test_no_rebuild_overwrites_what_others_are_about_to_read() -> None:
    exchanged = planned(snapshot(), {**SEATS, 0: "node-1", 1: "node-0"})
    assert places(exchanged) == [
        (PEER, GUEST_SLOT, "node-0"),
        (PEER, GUEST_SLOT + 1, "node-1"),
        (LOCAL, 1, "node-2"),
        (LOCAL, 1, "node-3"),
    ]
    assert exchanged.kept_slot == 1
    moved = planned(without(snapshot(), "node-0"), {0: "node-3", 1: "node-1", 2: "node-2", 3: "node-9"})
    assert places(moved) == [
        (DECODE, GUEST_SLOT, None),
        (LOCAL, 1, "node-1"),
        (LOCAL, 1, "node-2"),
        (PEER, 1, "node-3"),
    ]


def test_a_damaged_image_that_is_replaced_is_no_source() -> None:
    """Rank 1's own group can rebuild it no more, so it is fetched over the copy that rank 2 would be decoded from."""
    sound_at_9 = replace(next(filter(shard_of(1), snapshot())), node="node-9")
    images = damaged(without(snapshot(m=1), "node-2"), shard_of(1), 0)
    without_store = planned([*images, sound_at_9], SPARE)
    assert places(without_store)[1] == (PEER, 1, "node-9")
    assert {s.node for s in without_store.ranks[2].sources if s.member == 1 and s.kind == "shard"} == {"node-9"}

    beyond = damaged(without(snapshot(m=1), "node-2"), shard_of(1), 2)  # its stripe's parity was on node-2
    assert "rank 1 has only a damaged image" in str(next(candidates(held(beyond), SPARE, 1))[1])
    plan = planned(beyond, SPARE, checkpoints=[stored()])
    assert [restore.source for restore in plan.ranks] == [LOCAL, OBJECT, OBJECT, LOCAL]


@pytest.mark.parametrize(
    ("images", "seats", "expected"),
    [
        pytest.param(
            [*without(snapshot(), "node-3"), guest(3, "node-1")],
            {**SEATS, 3: "node-9"},
            (PEER, 1, "node-1"),
            id="a guest elsewhere",
        ),
        pytest.param(
            [*snapshot(), guest(3, "node-1")], {**SEATS, 3: "node-9"}, (PEER, 1, "node-3"), id="a guest comes last"
        ),
        pytest.param([*snapshot(), guest(3, "node-3")], SEATS, (LOCAL, 1, "node-3"), id="its own, not its guest"),
        pytest.param(
            [*without(snapshot(), "node-3"), guest(3, "node-9")],
            {**SEATS, 3: "node-9"},
            (LOCAL, GUEST_SLOT + 3, "node-9"),
            id="only its own guest",
        ),
        pytest.param(
            [*without(snapshot(), "node-3"), guest(3, "node-9"), guest(3, "node-0")],
            {**SEATS, 3: "node-9"},
            (PEER, 1, "node-0"),
            id="another's guest before its own",
        ),
        pytest.param(
            [*without(snapshot(), "node-3"), *damaged([guest(3, "node-9")], shard_of(3), 2)],
            {**SEATS, 3: "node-9"},
            (DECODE, GUEST_SLOT + 3, "node-9"),
            id="its own guest, repaired",
        ),
        pytest.param(
            [*without(snapshot(), "node-3"), *damaged([guest(3, "node-0")], shard_of(3), 2)],
            {**SEATS, 3: "node-9"},
            (DECODE, 1, "node-0"),
            id="another's guest, repaired after the fetch",
        ),
    ],
)
def test_guests_of_an_earlier_attempt(
    images: list[HeldImage], seats: dict[int, str], expected: tuple[str, int, str]
) -> None:
    plan = planned(images, seats)
    assert places(plan)[3] == expected
    assert not plan.direct
    assert plan.kept_slot == 1


def test_a_damaged_copy_gives_way_to_the_new_one_wherever_it_lies() -> None:
    """Else its keeper would still find it: slot-0-0.img before slot-0-1.img."""
    copies = [replace(image, slot=0) if shard_of(3)(image) else image for image in snapshot(m=0)]
    images = damaged(copies, shard_of(3), 2)
    sound = replace(next(filter(shard_of(3), snapshot())), node="node-9")
    assert places(planned([*images, sound]))[3] == (PEER, 0, "node-9")
    assert places(planned(images, checkpoints=[stored()]))[3] == (OBJECT, 0, None)


def test_parity_alone_of_a_larger_world_is_not_taken_for_the_present_one() -> None:
    """Any parity image of three mirrors two of them: both seats could be decoded, but not the world they are of."""
    parities = [image for image in snapshot(m=2, groups=[range(3)]) if image.kind == "parity" and image.seat < 2]
    ((_, reason),) = candidates(held(parities), {0: "node-0", 1: "node-1"}, 1)
    assert "of another world than 2 nodes of 1 ranks: it has seat 2" in str(reason)


def test_guests_do_not_decide_the_slot() -> None:
    images = [*without(snapshot(slot=2), "node-1", "node-2", "node-3"), *(guest(s, f"node-{s}") for s in (1, 2, 3))]
    plan = planned(images, {**SEATS, 1: "node-9"})
    assert places(plan)[:2] == [(LOCAL, 2, "node-0"), (PEER, 2, "node-1")]
    assert plan.kept_slot == 2
    assert planned([guest(seat, f"node-{seat}") for seat in range(4)]).kept_slot is None


def test_of_two_copies_on_a_node_the_one_counts_that_its_keeper_finds() -> None:
    """By file name: slot-0-1.img before slot-0-103.img before slot-0-2.img."""
    first = [*damaged(snapshot(slot=2), shard_of(3), 1), guest(3, "node-3")]
    assert places(planned(first, {**SEATS, 3: "node-9"}))[3] == (PEER, 2, "node-3")
    second = [*damaged(snapshot(), shard_of(3), 1), guest(3, "node-3")]
    assert places(planned(second, {**SEATS, 3: "node-9"}))[3] == (DECODE, 1, "node-3")


@pytest.mark.parametrize(
    ("images", "origins", "slot"),
    [
        pytest.param([], [OBJECT] * 4, 0, id="everything lost"),
        pytest.param(without(snapshot(), "node-2"), [LOCAL, LOCAL, DECODE, LOCAL], 1, id="memory first"),
        pytest.param(
            without(snapshot(m=1), "node-1", "node-2"), [LOCAL, OBJECT, OBJECT, LOCAL], 1, id="two beyond parity"
        ),
        pytest.param(
            without([i for i in snapshot() if i.kind == "shard"], "node-0"), [OBJECT, LOCAL, LOCAL, LOCAL], 1,
            id="no parity",
        ),
        pytest.param(
            damaged(snapshot(m=0), shard_of(3), 1), [LOCAL, LOCAL, LOCAL, OBJECT], 1, id="damaged"
        ),
    ],
)  # fmt: skip
def test_what_memory_lacks_comes_from_the_store(images: list[HeldImage], origins: list[str], slot: int) -> None:
    plan = planned(images, checkpoints=[stored()])
    assert [restore.source for restore in plan.ranks] == origins
    assert {restore.slot for restore in plan.ranks} == {plan.kept_slot} == {slot}
    assert [(restore.rank, restore.node) for restore in plan.ranks] == sorted(SEATS.items())
    assert not plan.direct
    for restore, image in zip(plan.ranks, stored().images, strict=True):
        if restore.source == OBJECT:
            assert (restore.url, restore.key, restore.length) == (stored().url, image.key, image.size)
            assert restore.holder is None
    assert RestorePlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_the_newest_counts_wherever_it_is() -> None:
    in_memory = planned(snapshot(), checkpoints=[stored(OLD)])
    assert (in_memory.generation, in_memory.origins()) == (NEW, {LOCAL: 4})
    in_store = planned(snapshot(OLD), checkpoints=[stored()])
    assert (in_store.generation, in_store.origins()) == (NEW, {OBJECT: 4})
    newer = [*snapshot(OLD, 0), *without(snapshot(), "node-0", "node-1", "node-2")]
    found = list(candidates(held(newer), SEATS, 1, [stored(OLD)]))
    assert [generation for generation, _ in found] == [NEW, OLD]
    assert "rank 0 has no image" in str(found[0][1])
    assert places(found[1][1])[0] == (LOCAL, 0, "node-0")  # type: ignore[arg-type]


def test_what_is_excluded_is_not_even_told() -> None:
    checkpoints = [stored(), stored(OLD)]
    found = candidates(held([*snapshot(OLD, 0), *snapshot()]), SEATS, 1, checkpoints, frozenset({NEW}))
    assert [generation for generation, _ in found] == [OLD]
    everything = frozenset({NEW, OLD})
    assert plan_restore(held(snapshot()), SEATS, 1, [*checkpoints, stored(OLD, foreign=True)], everything) is None


def test_a_checkpoint_that_lacks_an_image() -> None:
    checkpoint = replace(stored(), images=stored().images[:3])
    assert planned(snapshot(), checkpoints=[checkpoint]).origins() == {LOCAL: 4}
    ((_, reason),) = candidates([], SEATS, 1, [checkpoint])
    assert str(reason) == "rank 3 has no image, and no parity of its group is held"


def test_which_members_lack_parity() -> None:
    group = range(4)
    assert lacking_parity(held(snapshot()), NEW, group, 2, 1) == ()
    assert lacking_parity(held(without(snapshot(), "node-1")), NEW, group, 2, 1) == (1,)
    assert lacking_parity(held(damaged(snapshot(), parity_of(3), 0)), NEW, group, 2, 1) == (3,)
    assert lacking_parity(held(snapshot()), NEW, group, 2, 2) == (0, 1, 2, 3)
    assert lacking_parity(held(snapshot()), NEW, group, 1, 1) == (0, 1, 2, 3)
    assert lacking_parity(held(snapshot()), OLD, group, 2, 1) == (0, 1, 2, 3)


def test_inventories_cross_the_wire() -> None:
    for inventory in held(damaged(snapshot(procs=2), parity_of(1), 3, 5)):
        assert Inventory.from_json(json.loads(json.dumps(inventory.to_json()))) == inventory
    with pytest.raises(ValueError, match="shard or parity"):
        HeldImage.from_json({**snapshot()[0].to_json(), "kind": "cache"})
    broken = planned(snapshot()).to_json()
    broken["ranks"][0]["source"] = "disk"
    with pytest.raises(ValueError, match="memory-decode, object"):
        RestorePlan.from_json(broken)


def test_checkpoints_cross_the_wire() -> None:
    for checkpoint in (stored(procs=2), stored(OLD, foreign=True)):
        assert StoredCheckpoint.from_json(json.loads(json.dumps(checkpoint.to_json()))) == checkpoint
    assert stored(nodes=3, procs=2).world == 6


@st.composite
def damage(draw: st.DrawFn) -> tuple[list[HeldImage], dict[int, str], set[str]]:
    """Two generations, some nodes lost and replaced, some images damaged or gone."""
    m = draw(st.integers(1, 3))
    images = [*snapshot(OLD, 0, m=m), *snapshot(NEW, 1, m=m)]
    lost = {f"node-{seat}" for seat in draw(st.sets(st.integers(0, 3), max_size=3))}
    alive = without(images, *lost)
    for index in draw(st.sets(st.integers(0, max(len(alive) - 1, 0)), max_size=5)):
        blocks = draw(st.one_of(st.just(None), st.sets(st.integers(0, 4), min_size=1, max_size=3)))
        if blocks is not None:
            alive[index] = replace(alive[index], bad_blocks=tuple(sorted(blocks)))
    gone = draw(st.sets(st.integers(0, max(len(alive) - 1, 0)), max_size=2))
    left = [image for number, image in enumerate(alive) if number not in gone]
    return left, {seat: f"new-{node}" if node in lost else node for seat, node in SEATS.items()}, lost


@settings(max_examples=300, deadline=None)
@given(damage())
def test_a_plan_holds_and_no_newer_one_was_possible(case: tuple[list[HeldImage], dict[int, str], set[str]]) -> None:
    images, seats, lost = case
    plan = plan_restore(held(images), seats, 1)
    event(f"plan {plan and plan.generation.step}, {len(lost)} lost")
    if plan:
        assert [restore.rank for restore in plan.ranks] == list(range(4))
        for restore in plan.ranks:
            check(restore, images, plan.generation)
        assert not plan.direct
        assert plan.kept_slot == (1 if plan.generation == NEW else 0) == plan.ranks[0].slot
    for generation in (OLD, NEW):
        if plan is None or generation > plan.generation:
            assert not possible([image for image in images if image.generation == generation])


def check(restore: RankRestore, images: list[HeldImage], generation: Generation) -> None:
    shards = [i for i in images if i.generation == generation and shard_of(restore.seat)(i)]
    if restore.source == DECODE:
        assert restore.group is not None
        assert all(image.bad_blocks for image in shards)
        left, parity = restore.shard_availability(), restore.parity_availability()
        steps = list(decode_ranges(restore.group.layout(), restore.group.index, left, parity))
        bad = left[restore.group.index]
        assert sum(step.nbytes for step in steps) == (LENGTH if bad is None else len(bad) * BLOCK)
    else:
        (image,) = shards
        assert not image.bad_blocks
        assert (restore.holder == restore.node) == (restore.source == LOCAL)
        assert restore.holder == image.node


def possible(images: list[HeldImage]) -> bool:
    """A bound that needs no block arithmetic: with every bad image counted as lost, is a rank beyond reach?

    ``True`` is certain. Then a plan must exist.
    """
    shards = {image.seat for image in images if image.kind == "shard" and not image.bad_blocks}
    parities = {image.seat for image in images if image.kind == "parity" and not image.bad_blocks}
    if shards == set(SEATS):
        return True
    if not parities:
        return False
    m = next(image.group.parity for image in images if image.group)
    return len(set(SEATS) - (shards & parities)) <= m
