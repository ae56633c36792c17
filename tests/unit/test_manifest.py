"""The head and its moves as values: who may claim, what a commit leaves in the line, what expires and what is garbage."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpoint.line import claimed, committed, expired, garbage, pinned, quarantined, unpinned
from outlast.checkpoint.manifest import (
    FORMAT,
    ClaimMark,
    Entry,
    Head,
    Manifest,
    NewerFormat,
    Quarantined,
    checkpoint_of,
    entry_of,
    image_key,
    job_url,
    manifest_key,
    parse_reference,
    rfc3339,
)
from outlast.checkpoint.store import ObjectInfo
from outlast.errors import CheckpointError, ClaimLost, RequestError
from outlast.snapshot.stored import StoredImage
from support.archives import MARK, claim_of, generation_of, manifest_of

HOUR = 3600.0


def entry(step: int, attempt: int = 1, pin: bool = False) -> Entry:
    generation = generation_of(claim_of(attempt), step)
    return Entry(generation, step, manifest_key(generation), "d" * 64, 100, rfc3339(step), pin)


def head(*entries: Entry, claim: ClaimMark | None = None) -> Head:
    return Head(MARK, claim, entries)


def steps(found: Head) -> list[int]:
    return [item.step for item in found.line]


def images(step: int, world: int = 2) -> tuple[StoredImage, ...]:
    generation = generation_of(claim_of(1), step)
    return tuple(StoredImage(rank, rank, 0, image_key(generation, rank), 7, "0" * 16) for rank in range(world))


# --- text -----------------------------------------------------------------------------------------------------------


def test_head_and_manifest_come_back_as_they_were() -> None:
    full = Head(MARK, claim_of(3), (entry(5), entry(9, 2, pin=True)), (Quarantined(entry(7), "flipped", rfc3339(0)),))
    assert Head.from_text(full.to_text()) == full
    assert Head.from_text(head().to_text()) == head()
    manifest = manifest_of(generation_of(claim_of(1), 5), images(5))
    assert Manifest.from_text(manifest.to_text()) == manifest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "null",
        "{}",
        '{"format": 1}',
        '{"format": "1"}',
        '{"format": true}',
        '{"format": 0}',
        '{"format": 1, "job": 3}',
        b"\xff\xfe\x00",
        "[" * 100_000,
    ],
)
def test_what_is_no_head_or_manifest_is_named(text: str | bytes) -> None:
    for kind in (Head, Manifest):
        with pytest.raises(CheckpointError, match="some/place cannot be read"):
            kind.from_text(text, "some/place")


@pytest.mark.parametrize("kind", [Head, Manifest])
def test_a_newer_format_is_refused_by_name(kind: type[Head] | type[Manifest]) -> None:
    with pytest.raises(NewerFormat, match=f"some/place has format {FORMAT + 1}.*use a newer outlast"):
        kind.from_text(json.dumps({"format": FORMAT + 1, "whatever": []}), "some/place")


@given(st.data())
def test_a_head_of_which_one_character_changed_is_refused(data: st.DataObject) -> None:
    text = head(entry(5), entry(10), claim=claim_of(1)).to_text()
    digits = [index for index, letter in enumerate(text) if letter.isdigit() and index > text.index('"job"')]
    index = data.draw(st.sampled_from(digits))
    other = data.draw(st.sampled_from([digit for digit in "0123456789" if digit != text[index]]))
    with pytest.raises(CheckpointError):
        Head.from_text(text[:index] + other + text[index + 1 :])


@pytest.mark.parametrize("ranks", [[0], [0, 1, 2], [1, 0], [0, 0]])
def test_a_manifest_has_one_image_of_every_rank(ranks: list[int]) -> None:
    given_images = tuple(replace(images(5)[0], rank=rank) for rank in ranks)
    manifest = Manifest(MARK, generation_of(claim_of(1), 5), 5, 2, 1, rfc3339(0), given_images)
    with pytest.raises(CheckpointError, match="not of each of 2"):
        Manifest.from_text(manifest.to_text())


def test_a_manifest_tells_what_a_restore_needs() -> None:
    manifest = manifest_of(generation_of(claim_of(1), 5), images(5))
    stored = checkpoint_of(manifest, "file:///a/default/demo", foreign=True)
    assert (stored.generation, stored.world, stored.images) == (manifest.generation, 2, manifest.images)
    assert (stored.url, stored.foreign, stored.about) == ("file:///a/default/demo", True, {"script": "abc"})
    made = entry_of(manifest, b"text")
    assert (made.step, made.bytes, made.manifest) == (5, 14, f"manifests/{manifest.generation}.json")
    assert made.digest == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"


def test_times_and_urls() -> None:
    assert rfc3339(1_700_000_000.25) == "2023-11-14T22:13:20.250Z"
    assert job_url("s3://bucket/p/", "default", "demo") == "s3://bucket/p/default/demo"
    assert parse_reference("s3://bucket/p/default/demo@12000") == ("s3://bucket/p/default/demo", 12000)
    assert parse_reference("file:///a@1/default/demo/") == ("file:///a@1/default/demo", None)
    with pytest.raises(RequestError, match="no step"):
        parse_reference("file:///a/default/demo@newest")


# --- claims ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected", "taken"),
    [
        (None, None, True),
        (None, claim_of(4, "me"), True),
        (claim_of(4, "me"), claim_of(4, "me"), True),
        (claim_of(5, "me"), claim_of(4, "me"), True),  # an answer of the store was lost
        (claim_of(4, "old"), claim_of(4, "old"), True),
        (claim_of(9, "old"), claim_of(4, "old"), True),  # the one that is succeeded went on for a while
        (claim_of(5, "new"), claim_of(4, "me"), False),
        (claim_of(3, "new"), claim_of(4, "old"), False),
        (claim_of(4, "old"), None, True),
        (claim_of(5, "new"), None, False),
        (claim_of(6, "new"), None, False),
        (claim_of(9, "me"), None, True),
    ],
)
def test_who_may_claim(found: ClaimMark | None, expected: ClaimMark | None, taken: bool) -> None:
    mine, before = claim_of(5, "me"), head(entry(5), claim=found)
    if taken:
        assert claimed(before, mine, expected) == replace(before, claim=mine)
    else:
        with pytest.raises(ClaimLost, match=r"default/demo.*are claimed by attempt .*this controller must stop"):
            claimed(before, mine, expected)


# --- commits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "new", "left"),
    [
        ([], entry(5), [5]),
        ([entry(5)], entry(10), [5, 10]),
        ([entry(5), entry(10)], entry(8, attempt=2), [5, 8]),
        ([entry(5), entry(10)], entry(10, attempt=2), [5, 10]),
        ([entry(5), entry(10, pin=True), entry(15)], entry(8, attempt=2), [5, 10, 8]),
        ([entry(5), entry(10)], entry(5), [5, 10]),
        ([entry(5), entry(15)], entry(10), [5, 10, 15]),
        ([entry(5), entry(10), entry(15, attempt=2)], entry(10), [5, 10]),
    ],
    ids=["first", "next", "branch", "branch-same-step", "pinned-stays", "again", "late", "older-attempt-again"],
)
def test_what_a_commit_leaves(line: list[Entry], new: Entry, left: list[int]) -> None:
    claim = claim_of(2)
    after = committed(head(*line, claim=claim), new, claim)
    assert steps(after) == left
    assert after.entry(new.generation) == new


def test_a_commit_without_the_claim_is_lost() -> None:
    for found in (None, claim_of(1, "other"), claim_of(2)):
        with pytest.raises(ClaimLost):
            committed(head(claim=found), entry(5), claim_of(1))


def test_a_commit_again_keeps_the_pin_and_ends_the_quarantine() -> None:
    claim = claim_of(1)
    before = head(entry(5, pin=True), claim=claim)
    assert committed(before, replace(entry(5), digest="e" * 64), claim).line[0].pinned
    bad = quarantined(before, entry(5).generation, "flipped", rfc3339(0))
    assert (steps(bad), bad.quarantined[0].reason) == ([], "flipped")
    again = committed(bad, entry(5), claim)
    assert (steps(again), again.quarantined) == ([5], ())


def test_pins_and_quarantine_of_what_is_not_there_change_nothing() -> None:
    before, other = head(entry(5)), entry(9).generation
    assert quarantined(before, other, "x", "t") == pinned(before, other) == unpinned(before, other) == before
    assert unpinned(pinned(before, entry(5).generation), entry(5).generation) == before


# --- retention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("taken", "last", "every", "left"),
    [
        ([5], 1, None, [5]),
        ([5, 10, 15], 2, None, [10, 15]),
        ([5, 10, 15], 0, None, [15]),
        ([90, 110, 130, 150], 1, 100, [110, 150]),
        ([100, 150, 199, 200, 250], 1, 100, [100, 200, 250]),
        ([50, 450, 460, 470], 1, 100, [450, 470]),
        ([50, 60], 1, 100, [60]),
    ],
)
def test_what_expires(taken: list[int], last: int, every: int | None, left: list[int]) -> None:
    after, removed = expired(head(*map(entry, taken)), last, every)
    assert steps(after) == left
    assert [item.step for item in removed] == [step for step in taken if step not in left]


@given(
    st.lists(st.integers(1, 60), unique=True).map(sorted),
    st.integers(1, 4),
    st.one_of(st.none(), st.integers(1, 20)),
    st.sets(st.integers(1, 60)),
)
def test_retention_at_every_commit_keeps_what_it_would_keep_in_one_go(
    taken: list[int], last: int, every: int | None, pins: set[int]
) -> None:
    whole = head(*(entry(step, pin=step in pins) for step in taken))
    gradual = head()
    for item in whole.line:
        gradual, _ = expired(replace(gradual, line=(*gradual.line, item)), last, every)
    assert gradual == expired(whole, last, every)[0]
    kept = steps(gradual)
    assert set(kept) >= set(taken[-last:]) | (pins & set(taken))
    for multiple in range(every or 1000, 60, every or 1000):
        first = next((step for step in taken if step >= multiple), None)
        assert first is None or first in kept


# --- garbage --------------------------------------------------------------------------------------------------------


def listing(step: int, age: float, *, attempt: int = 1, ranks: int = 2) -> list[ObjectInfo]:
    """A checkpoint's objects; the last was written so long ago, the others an hour before that."""
    generation = generation_of(claim_of(attempt), step)
    names = [image_key(generation, rank) for rank in range(ranks)] + [manifest_key(generation)]
    return [ObjectInfo(name, 7, "e", -age - (HOUR if name != names[-1] else 0.0)) for name in names]


def test_garbage_is_what_nobody_names_and_nobody_touched_lately() -> None:
    kept, bad, old, fresh = (listing(step, age) for step, age in ((5, 9 * HOUR), (10, 9 * HOUR), (15, HOUR), (20, 60)))
    foreign = [ObjectInfo(key, 1, "e", -1e9) for key in ("head.json", "README", "manifests/x.json", "a/b/head.json")]
    stray = [ObjectInfo(image_key(generation_of(claim_of(1), 5), 2), 7, "e", -1e9)]
    found = quarantined(head(entry(5), entry(10)), entry(10).generation, "flipped", rfc3339(0))
    manifests = [manifest_of(generation_of(claim_of(1), 5), images(5))]
    keys = garbage([*kept, *bad, *old, *fresh, *foreign, *stray], found, manifests, 0.0, HOUR)
    assert set(keys) == {info.key for info in (*old, *stray)}
    assert keys[0] == old[-1].key, "manifests go first"


def test_without_a_readable_manifest_all_of_its_generation_stays() -> None:
    assert garbage(listing(5, 9 * HOUR), head(entry(5)), [], 0.0, HOUR) == []
    assert len(garbage(listing(5, 9 * HOUR), None, [], 0.0, HOUR)) == 3
