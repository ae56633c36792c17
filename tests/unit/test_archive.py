"""A job's checkpoints in a folder: whoever dies or wakes in between, readers see complete checkpoints alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast.checkpoint import repair
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.line import Retention
from outlast.checkpoint.manifest import HEAD_KEY, ClaimMark, Head, JobMark, image_key
from outlast.checkpoint.store import Store
from outlast.checkpoint.verify import PIECE, verify
from outlast.errors import (
    CheckpointError,
    ClaimLost,
    ObjectMissing,
    PreconditionFailed,
    RequestError,
    StoreUnavailable,
)
from outlast.snapshot.identity import Generation
from outlast.snapshot.image import BLOCK, Entry, ImageFile, block_checksums, plan_layout
from outlast.snapshot.stored import StoredImage
from support.archives import (
    FUTURE,
    MARK,
    Killed,
    SteppedStore,
    TurnTaker,
    checkpoint,
    claim_of,
    folder,
    generation_of,
    keys,
    manifest_of,
    upload,
)

CLAIM = claim_of(1)
FIRST = generation_of(CLAIM, 5)


@pytest.fixture(autouse=True, scope="module")
def quick_files() -> Iterator[None]:
    """Nothing here loses power: that a folder's files are fsync'd is tested with the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        yield


def claimed(path: Path, claim: ClaimMark = CLAIM) -> Archive:
    archive = Archive(folder(path), FUTURE)
    archive.claim(MARK, claim, None)
    return archive


def steps(archive: Archive) -> list[int]:
    return [entry.step for entry in archive.require_head().line]


# --- claiming -------------------------------------------------------------------------------------------------------


def test_a_claim_makes_the_head_and_succeeds_itself(tmp_path: Path) -> None:
    archive = Archive(folder(tmp_path))
    assert archive.read_head() is None
    assert archive.claim(MARK, CLAIM, None) == Head(MARK, CLAIM)
    checkpoint(archive, CLAIM, 5)
    head = archive.claim(MARK, claim_of(2), CLAIM)
    assert (head.claim, [entry.step for entry in head.line]) == (claim_of(2), [5])


def test_another_jobs_checkpoints_are_refused_unless_resumed(tmp_path: Path) -> None:
    checkpoint(claimed(tmp_path), CLAIM, 5)
    other, mine = Archive(folder(tmp_path)), JobMark("default", "demo", "another")
    with pytest.raises(
        RequestError,
        match=r"demo \(0123456789abcdef\); this one is default/demo \(another\).*checkpoint.resume.*--resume",
    ):
        other.claim(mine, claim_of(1, "two"), CLAIM)
    head = other.claim(mine, claim_of(1, "two"), CLAIM, resume=True)
    assert (head.job, [entry.step for entry in head.line]) == (mine, [5])
    with pytest.raises(RequestError):
        Archive(folder(tmp_path)).claim(MARK, claim_of(2), CLAIM)


def test_a_controller_that_wakes_can_neither_commit_nor_claim_nor_expire(tmp_path: Path) -> None:
    old, new = claimed(tmp_path), Archive(folder(tmp_path))
    checkpoint(old, CLAIM, 5)
    new.claim(MARK, claim_of(2, "two"), CLAIM)
    before = old.read_head()
    for act in (
        lambda: checkpoint(old, CLAIM, 10),
        lambda: old.claim(MARK, claim_of(3), CLAIM),
        lambda: old.expire(Retention(1), CLAIM),
        lambda: old.quarantine(generation_of(CLAIM, 5), "x", CLAIM),
    ):
        with pytest.raises(ClaimLost):
            act()
    assert old.read_head() == before


# --- committing -----------------------------------------------------------------------------------------------------


def test_a_commit_is_what_readers_see(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    generation = checkpoint(archive, CLAIM, 5)
    reader = Archive(folder(tmp_path))
    entry = reader.find()
    assert (entry.generation, entry.step, reader.manifest(entry).generation) == (generation, 5, generation)
    stored = reader.restorable()
    assert [found.generation for found in stored.stored] == [generation]
    assert (stored.bad, stored.stored[0].url) == ((), f"file://{tmp_path}")
    assert reader.complete(entry, foreign=True) == replace(stored.stored[0], foreign=True)


def test_a_commit_may_be_repeated(tmp_path: Path) -> None:
    archive, generation = claimed(tmp_path), generation_of(CLAIM, 5)
    images = upload(archive.store, generation)
    first = archive.commit(manifest_of(generation, images, created=1.0), CLAIM)
    assert archive.commit(manifest_of(generation, images, created=2.0), CLAIM) == first
    assert archive.restorable().bad == ()


def test_what_is_not_uploaded_is_not_committed(tmp_path: Path) -> None:
    archive, generation = claimed(tmp_path), generation_of(CLAIM, 5)
    images = upload(archive.store, generation)
    manifest = manifest_of(generation, images)
    with pytest.raises(CheckpointError, match="not of each of 3"):
        archive.commit(replace(manifest, nodes=3), CLAIM)
    with pytest.raises(CheckpointError, match=r"rank-00001.safetensors has .* bytes, not 99"):
        archive.commit(replace(manifest, images=(images[0], replace(images[1], size=99))), CLAIM)
    archive.store.delete([images[0].key])
    with pytest.raises(CheckpointError, match=r"rank-00000.safetensors is missing"):
        archive.commit(manifest, CLAIM)
    assert steps(archive) == []


def test_a_manifest_that_a_dead_controller_left_is_taken_or_replaced(tmp_path: Path) -> None:
    archive, generation = claimed(tmp_path), generation_of(CLAIM, 5)
    images = upload(archive.store, generation)
    left = manifest_of(generation, images, created=1.0)
    archive.store.put(f"manifests/{generation}.json", left.to_text().encode())
    archive.commit(manifest_of(generation, images, created=2.0), CLAIM)
    assert archive.manifest(archive.find(5)) == left
    for step, text in ((6, b"torn"), (7, left.to_text().encode())):
        generation = generation_of(CLAIM, step)
        archive.store.put(f"manifests/{generation}.json", text)
        checkpoint(archive, CLAIM, step)
        assert archive.manifest(archive.find(step)).generation == generation


def test_what_a_person_pins_meanwhile_is_kept(tmp_path: Path) -> None:
    person = claimed(tmp_path)
    checkpoint(person, CLAIM, 5)
    pinned: list[int] = []

    def pin_before_the_head_moves(name: str) -> None:
        if name == f"put {HEAD_KEY}" and not pinned:
            pinned.append(5)
            person.pin(5)

    controller = Archive(SteppedStore(folder(tmp_path), pin_before_the_head_moves))
    checkpoint(controller, CLAIM, 10)
    assert pinned
    assert [(entry.step, entry.pinned) for entry in person.require_head().line] == [(5, True), (10, False)]


def test_a_head_that_the_store_lost_is_put_back(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    checkpoint(archive, CLAIM, 5)
    archive.store.delete([HEAD_KEY])
    checkpoint(archive, CLAIM, 10)
    assert steps(archive) == [5, 10]
    archive.store.delete([HEAD_KEY])
    archive.claim(MARK, claim_of(2), CLAIM)
    assert steps(archive) == [5, 10]


def test_without_a_head_nothing_can_be_done(tmp_path: Path) -> None:
    archive = Archive(folder(tmp_path))
    for act in (archive.find, archive.require_head, lambda: archive.pin(5), lambda: archive.expire(Retention())):
        with pytest.raises(RequestError, match="holds no checkpoints"):
            act()
    with pytest.raises(CheckpointError, match="claim the checkpoints first"):
        checkpoint(archive, CLAIM, 5)
    assert archive.restorable().stored == ()


def test_a_damaged_head_is_told_and_left_alone(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    checkpoint(archive, CLAIM, 5)
    damaged = (tmp_path / HEAD_KEY).read_text().replace('"step": 5', '"step": 6')
    (tmp_path / HEAD_KEY).write_text(damaged)
    for act in (archive.find, lambda: archive.claim(MARK, claim_of(2), CLAIM), lambda: archive.gc(dry_run=False)):
        with pytest.raises(CheckpointError, match=f"{HEAD_KEY} cannot be read"):
            act()
    assert (tmp_path / HEAD_KEY).read_text() == damaged


class OnceFlipped(SteppedStore):
    """Gives the first answer with a flipped byte."""

    def __init__(self, store: Store) -> None:
        super().__init__(store, lambda _: None)
        self.flipped: set[str] = set()

    def get(self, key: str) -> tuple[bytes, str]:
        data, etag = super().get(key)
        if key in self.flipped:
            return data, etag
        self.flipped.add(key)
        return data[:50] + bytes([data[50] ^ 1]) + data[51:], etag


def test_what_was_damaged_on_its_way_is_read_again(tmp_path: Path) -> None:
    checkpoint(claimed(tmp_path), CLAIM, 5)
    reader = Archive(OnceFlipped(folder(tmp_path)))
    assert [found.generation.step for found in reader.restorable().stored] == [5]


# --- finding --------------------------------------------------------------------------------------------------------


def test_finding_says_what_there_is(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    with pytest.raises(RequestError, match="no checkpoint: there are those of steps none"):
        archive.find()
    for step in (5, 10, 15):
        checkpoint(archive, CLAIM, step)
    assert archive.quarantine(generation_of(CLAIM, 10), "flipped")
    assert not archive.quarantine(generation_of(CLAIM, 10), "flipped")
    assert (archive.find().step, archive.find(5).step, archive.find(generation_of(CLAIM, 5)).step) == (15, 5, 5)
    with pytest.raises(
        RequestError, match=r"no checkpoint of step 10: there are those of steps 5, 15, and in quar.* 10"
    ):
        archive.find(10)
    assert image_key(generation_of(CLAIM, 10), 0) in keys(archive.store)


def spoil(archive: Archive, step: int, how: str) -> None:
    generation = generation_of(CLAIM, step)
    image, manifest = image_key(generation, 1), f"manifests/{generation}.json"
    store = archive.store
    match how:
        case "image missing":
            store.delete([image])
        case "image short":
            store.upload(image, memoryview(b"x"))
        case "manifest missing":
            store.delete([manifest])
        case "manifest changed":
            store.put(manifest, store.get(manifest)[0].replace(b"abc", b"abd"))


@pytest.mark.parametrize("how", ["image missing", "image short", "manifest missing", "manifest changed"])
def test_what_is_not_whole_is_passed_over_and_named(tmp_path: Path, how: str) -> None:
    archive = claimed(tmp_path)
    for step in (5, 10, 15):
        checkpoint(archive, CLAIM, step)
    spoil(archive, 10, how)
    reader = Archive(folder(tmp_path))
    found = reader.restorable()
    assert [stored.generation.step for stored in found.stored] == [15, 5]
    assert [(entry.step, str(generation_of(CLAIM, 10)) in reason) for entry, reason in found.bad] == [(10, True)]
    with pytest.raises((CheckpointError, ObjectMissing)):
        reader.complete(reader.find(10))
    assert [stored.generation.step for stored in reader.restorable(enough=1).stored] == [15]


# --- removing -------------------------------------------------------------------------------------------------------


def test_retention_removes_all_of_what_expires(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    for step in (5, 10, 15, 20):
        checkpoint(archive, CLAIM, step)
    assert archive.pin(5).pinned
    order: list[str] = []
    pruning = Archive(SteppedStore(folder(tmp_path), order.append))
    assert [entry.step for entry in pruning.expire(Retention(2))] == [10]
    assert steps(archive) == [5, 15, 20]
    assert not any(str(generation_of(CLAIM, 10)) in key for key in keys(archive.store))
    moves = [name.split()[0] for name in order if not name.endswith("done")]
    assert moves == ["get", "put", "delete", "list", "delete", "delete"]
    assert f"delete manifests/{generation_of(CLAIM, 10)}.json" == order[4]
    assert not archive.unpin(5).pinned
    assert [entry.step for entry in archive.expire(Retention(1, keep_every_steps=10))] == [5]
    assert steps(archive) == [15, 20]


def test_what_expires_while_it_is_looked_at_is_not_called_damaged(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    for step in (5, 10, 15):
        checkpoint(archive, CLAIM, step)

    class Slow(Archive):
        def read_head(self) -> Head | None:
            found = super().read_head()
            archive.expire(Retention(keep_last=1), CLAIM)
            return found

    found = Slow(folder(tmp_path)).restorable()
    assert [stored.generation.step for stored in found.stored] == [15]
    assert found.bad == ()


def test_a_branch_that_a_commit_drops_is_removed_with_what_expires(tmp_path: Path) -> None:
    archive, second = claimed(tmp_path), claim_of(2)
    for step in (5, 10, 15, 20):
        checkpoint(archive, CLAIM, step)
    archive.pin(15)
    archive.claim(MARK, second, CLAIM)
    checkpoint(archive, second, 10)
    assert steps(archive) == [5, 15, 10]
    dropped = {str(generation_of(CLAIM, step)) for step in (10, 20)}
    assert [entry.step for entry in archive.expire(Retention(9), second)] == [10, 20]
    assert not [key for key in keys(archive.store) if any(name in key for name in dropped)]
    assert archive.restorable().bad == ()
    assert archive.gc().keys == ()
    assert archive.expire(Retention(9), second) == ()


def test_what_could_not_be_removed_is_removed_the_next_time(tmp_path: Path) -> None:
    failing = [True]

    def fail_to_delete(name: str) -> None:
        if name.startswith("delete") and failing:
            raise StoreUnavailable("503")

    checkpoint(claimed(tmp_path), CLAIM, 5)
    archive = Archive(SteppedStore(folder(tmp_path), fail_to_delete), FUTURE)
    checkpoint(archive, CLAIM, 10)
    with pytest.raises(StoreUnavailable):
        archive.expire(Retention(1), CLAIM)
    assert steps(archive) == [10]
    failing.clear()
    assert [entry.step for entry in archive.expire(Retention(1), CLAIM)] == [5]
    assert archive.gc().keys == ()


def test_gc_shows_first_and_removes_then(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    checkpoint(archive, CLAIM, 5)
    needed = keys(archive.store)
    upload(archive.store, generation_of(CLAIM, 10))
    draft = tmp_path / ".drafts" / "00+left"
    draft.parent.mkdir(exist_ok=True)
    draft.write_bytes(b"x")
    shown = archive.gc()
    assert (len(shown.keys), shown.dry_run, len(shown.unfinished)) == (2, True, 1)
    assert shown.bytes == sum((tmp_path / key).stat().st_size for key in shown.keys)
    assert keys(archive.store) > needed
    assert Archive(folder(tmp_path)).gc(dry_run=False).keys == (), "by now's clock they are fresh"
    assert archive.gc(dry_run=False).keys == shown.keys
    assert keys(archive.store) == needed
    assert not draft.exists()


def test_what_was_collected_as_garbage_before_its_commit_is_no_checkpoint(tmp_path: Path) -> None:
    """gc with a short --grace beside a job: the commit is refused before what it would replace is removed."""
    archive, generation = claimed(tmp_path), generation_of(CLAIM, 10)
    checkpoint(archive, CLAIM, 5)

    def collect(name: str) -> None:
        if name == f"put {HEAD_KEY} done":
            archive.store.delete([image_key(generation, 1)])

    job = Archive(SteppedStore(folder(tmp_path), collect), FUTURE)
    manifest = manifest_of(generation, upload(archive.store, generation))
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors is missing"):
        job.commit(manifest, CLAIM)
    assert steps(archive) == [5]
    assert [item.entry.step for item in archive.require_head().quarantined] == [10]


def test_a_branch_is_removed_though_the_second_look_was_interrupted(tmp_path: Path) -> None:
    archive, second, troubles = claimed(tmp_path), claim_of(2), [StoreUnavailable("503")]
    for step in (5, 10):
        checkpoint(archive, CLAIM, step)
    moved = False

    def fail_once(name: str) -> None:
        nonlocal moved
        moved = moved or name == f"put {HEAD_KEY} done"
        if moved and name.startswith("list ") and not name.endswith("done") and troubles:
            raise troubles.pop()

    archive.claim(MARK, second, CLAIM)
    generation = generation_of(second, 7)
    manifest = manifest_of(generation, upload(archive.store, generation))
    job = Archive(SteppedStore(folder(tmp_path), fail_once), FUTURE)
    with pytest.raises(StoreUnavailable):
        job.commit(manifest, second)
    job.commit(manifest, second)
    assert [entry.step for entry in job.expire(Retention(9), second)] == [10]


def test_gc_removes_what_lies_beside_a_checkpoint_that_counts(tmp_path: Path) -> None:
    archive = claimed(tmp_path)
    generation = checkpoint(archive, CLAIM, 5)
    left = f"{generation}/left-over"
    archive.store.put(left, b"x")
    assert archive.gc(dry_run=False).keys == (left,)
    assert archive.gc().keys == ()


def test_gc_leaves_alone_what_a_job_names_meanwhile(tmp_path: Path) -> None:
    archive, generations = claimed(tmp_path), [generation_of(CLAIM, step) for step in (5, 10, 15)]
    manifests = [manifest_of(generation, upload(archive.store, generation)) for generation in generations]

    def commit(name: str) -> None:
        if name == f"delete {image_key(generations[1], 1)} done":  # keys go in their order as texts: 10, 15, 5
            archive.commit(manifests[2], CLAIM)

    others = (str(generation) for generation in generations[:2])
    found = Archive(SteppedStore(folder(tmp_path), commit), FUTURE).gc(dry_run=False)
    assert {key.partition("/")[0] for key in found.keys} <= set(others)
    assert [stored.generation for stored in archive.restorable().stored] == [generations[2]]


# --- dying at every point -------------------------------------------------------------------------------------------


def life(store: Store) -> None:
    """All that a controller does to a store, over two attempts, and what a person does."""
    archive, second = Archive(store, FUTURE), claim_of(2)
    archive.claim(MARK, CLAIM, None)
    for step in (5, 10, 15):
        checkpoint(archive, CLAIM, step)
        archive.expire(Retention(2), CLAIM)
    archive.pin(10)
    archive.claim(MARK, second, CLAIM)
    archive.quarantine(generation_of(CLAIM, 15), "flipped", second)
    checkpoint(archive, second, 12)
    checkpoint(archive, second, 20)
    archive.expire(Retention(1), second)
    archive.gc(dry_run=False)


def killed_at(number: int) -> Callable[[str], None]:
    count = iter(range(number + 1))

    def step(name: str) -> None:
        if next(count) == number:
            raise Killed(name)

    return step


def test_dying_at_any_point_leaves_complete_checkpoints_and_garbage(tmp_path: Path) -> None:
    for number in range(10_000):
        store = folder(tmp_path / str(number))
        try:
            life(SteppedStore(store, killed_at(number)))
            break
        except Killed:
            _check_what_was_left(store)
    assert number > 100
    assert steps(Archive(store)) == [10, 20]


def _check_what_was_left(store: Store) -> None:
    archive = Archive(store, FUTURE)
    head, found = archive.read_head(), archive.restorable(enough=100)
    line = head.line if head is not None else ()
    assert found.bad == ()
    assert [stored.generation for stored in found.stored] == [entry.generation for entry in reversed(line)]
    archive.gc(dry_run=False)
    named = [*line, *(item.entry for item in head.quarantined if head)] if head is not None else []
    wanted = {key for entry in named for key in (entry.manifest, *(image_key(entry.generation, r) for r in (0, 1)))}
    assert keys(store) == wanted | ({HEAD_KEY} if head is not None else set())
    after = claim_of(9, "after")
    archive.claim(MARK, after, head.claim if head is not None else None)
    checkpoint(archive, after, 30)
    assert steps(archive) == [*(entry.step for entry in line), 30]


# --- two controllers ------------------------------------------------------------------------------------------------


class Watched(SteppedStore):
    """Notes every head that was put, by whom."""

    def __init__(self, store: Store, who: str, history: list[tuple[str, Head]]) -> None:
        super().__init__(store, lambda _: None)
        self._who, self._history = who, history

    def put(self, key: str, data: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        etag = super().put(key, data, if_match=if_match, if_absent=if_absent)
        if key == HEAD_KEY:
            self._history.append((self._who, Head.from_text(data)))
        return etag


def controller(name: str, attempt: int) -> Callable[[Store], None]:
    def work(store: Store) -> None:
        archive, claim = Archive(store), claim_of(attempt, name)
        found = archive.read_head()
        archive.claim(MARK, claim, found.claim if found is not None else None)
        for step in (5, 10):
            generation = Generation(attempt, step, f"{attempt}{name}")
            archive.commit(manifest_of(generation, upload(store, generation, world=1)), claim)
            archive.expire(Retention(1), claim)

    return work


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.tuples(st.integers(1, 2), st.integers(1, 2)))
def test_of_two_controllers_one_commits_and_readers_see_whole_checkpoints(
    stretches: list[int], attempts: tuple[int, int]
) -> None:
    """``stretches``: how many turns the one has, then the other, and so on."""
    with tempfile.TemporaryDirectory() as place:
        history: list[tuple[str, Head]] = []
        store = folder(Path(place))
        actors = {
            name: TurnTaker(Watched(store, name, history), controller(name, attempt))
            for name, attempt in zip("ab", attempts, strict=True)
        }
        try:
            for actor, turns in zip(cycle(actors.values()), [*stretches, 1000, 1000], strict=False):
                for _ in range(turns):
                    if actor.finished:
                        break
                    actor.turn()
                    assert Archive(store).restorable(enough=100).bad == (), "a reader sees what is not there"
        finally:
            for actor in actors.values():
                actor.end()
        _check_history(history, {name: actor.error for name, actor in actors.items()})


def _check_history(history: list[tuple[str, Head]], errors: dict[str, Exception | None]) -> None:
    before: Head | None = None
    for who, head in history:
        if before is not None and {e.generation for e in head.line} - {e.generation for e in before.line}:
            assert before.claim is not None
            assert before.claim.controller == who, "who did not hold the claim has committed"
        before = head
    assert all(error is None or isinstance(error, ClaimLost) for error in errors.values()), errors
    owners = [head.claim.controller for _, head in history if head.claim is not None]
    assert sum(one != other for one, other in pairwise(owners)) <= 1, "the claim went back"
    winner = owners[-1]
    assert errors[winner] is None, "who claimed last goes on"


# --- verifying ------------------------------------------------------------------------------------------------------


def sealed(path: Path, generation: Generation, nbytes: int) -> ImageFile:
    layout = plan_layout([Entry("weights", "U8", (nbytes,), nbytes)], {"rank": "0"})
    image = ImageFile.create(path, layout)
    image.begin(generation)
    noise = np.random.default_rng(7).integers(0, 256, nbytes, np.uint8)
    image.entry_view("weights")[:] = noise.data
    image.seal(block_checksums(image.view(0, layout.trailer_offset)))
    return image


def real_checkpoint(
    archive: Archive,
    scratch: Path,
    nbytes: int = PIECE + 3 * BLOCK + 17,
    generation: Generation = FIRST,
    claim: ClaimMark = CLAIM,
) -> Generation:
    images = []
    for rank in range(2):
        image = sealed(scratch / f"{rank}.img", generation, nbytes)
        data, key = (scratch / f"{rank}.img").read_bytes(), image_key(generation, rank)
        archive.store.upload(key, memoryview(data))
        checksum = xxhash.xxh64_hexdigest(image.checksums().tobytes())
        images.append(StoredImage(rank, rank, 0, key, len(data), checksum))
        image.close()
    archive.commit(manifest_of(generation, tuple(images)), claim)
    return generation


# --- without its head -----------------------------------------------------------------------------------------------


def test_manifests_of_something_else_are_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "app.yaml").write_text("kind: Deployment")
    claimed(tmp_path)


def test_over_checkpoints_whose_head_was_lost_nobody_begins_anew(tmp_path: Path) -> None:
    checkpoint(claimed(tmp_path), CLAIM, 5)
    before = keys(folder(tmp_path)) - {HEAD_KEY}
    (tmp_path / HEAD_KEY).unlink()
    archive = Archive(folder(tmp_path), FUTURE)
    for act in (
        lambda: archive.claim(MARK, claim_of(2), None),
        lambda: archive.claim(MARK, claim_of(2), None, resume=True),
        archive.find,
        lambda: archive.gc(dry_run=False),
        lambda: archive.pin(5),
    ):
        with pytest.raises(RequestError, match=f"no {HEAD_KEY}.*trainctl checkpoints repair file://{tmp_path}"):
            act()
    assert keys(archive.store) == before


def repaired(path: Path) -> Head:
    store = folder(path)
    finding = repair.look(store, FUTURE)
    assert finding is not None
    head = repair.rebuild(Archive(store), finding, lambda _: None, FUTURE)
    repair.write(store, head, finding.etag)
    return head


def with_images(archive: Archive, claim: ClaimMark, scratch: Path, *at: int) -> None:
    for step in at:
        real_checkpoint(archive, scratch, 1000, generation_of(claim, step), claim)


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "unreadable"])
def test_a_head_is_made_anew_of_manifests_that_verify(tmp_path: Path, lost: bool) -> None:
    root = tmp_path / "store"
    archive, second = claimed(root), claim_of(2)
    with_images(archive, CLAIM, tmp_path, 5, 10, 15)
    archive.claim(MARK, second, CLAIM)
    with_images(archive, second, tmp_path, 10, 20, 30)
    wanted = archive.require_head().line
    assert [(entry.generation.attempt, entry.step) for entry in wanted] == [(1, 5), (2, 10), (2, 20), (2, 30)]
    path = root / image_key(generation_of(second, 30), 0)
    path.write_bytes(path.read_bytes()[:-9] + bytes(9))
    if lost:
        (root / HEAD_KEY).unlink()
    else:
        (root / HEAD_KEY).write_text("{")
    head = repaired(root)
    assert (head.job, head.claim, head.line) == (MARK, None, wanted[:3])
    assert [item.entry.step for item in head.quarantined] == [30]
    assert Archive(folder(root)).read_head() == head
    assert repair.look(folder(root), FUTURE) is None
    with pytest.raises(ClaimLost):
        checkpoint(archive, second, 40)
    after = Archive(folder(root), FUTURE)
    after.claim(MARK, claim_of(3), None)
    assert {key.split("/")[0] for key in after.gc().keys if key.endswith(".safetensors")} == {
        *(str(generation_of(CLAIM, step)) for step in (10, 15)),
        str(generation_of(second, 40)),
    }, "what was given up, not what is in quarantine"


def test_a_repair_takes_nothing_for_garbage_that_it_cannot_read(tmp_path: Path) -> None:
    root = tmp_path / "store"
    archive = claimed(root)
    with_images(archive, CLAIM, tmp_path, 5, 10)
    name = root / "manifests" / f"{generation_of(CLAIM, 10)}.json"
    text = name.read_text()
    name.write_text("torn")
    (root / HEAD_KEY).unlink()
    head = repaired(root)
    assert ([entry.step for entry in head.line], [item.entry.step for item in head.quarantined]) == ([5], [10])
    assert Archive(folder(root), FUTURE).gc().keys == ()
    (root / HEAD_KEY).unlink()
    name.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="use a newer outlast"):
        repair.look(folder(root), FUTURE)


def test_a_repair_overwrites_no_head_that_came_meanwhile(tmp_path: Path) -> None:
    root = tmp_path / "store"
    archive = claimed(root)
    with_images(archive, CLAIM, tmp_path, 5)
    (root / HEAD_KEY).unlink()
    store = folder(root)
    finding = repair.look(store, FUTURE)
    assert finding is not None
    head = repair.rebuild(Archive(store), finding, lambda _: None, FUTURE)
    with_images(archive, CLAIM, tmp_path, 10)
    with pytest.raises(PreconditionFailed):
        repair.write(store, head, finding.etag)
    assert steps(archive) == [5, 10]
    with pytest.raises(RequestError, match="nothing to make a head of"):
        repair.look(folder(tmp_path / "empty"), FUTURE)


# --- every byte -----------------------------------------------------------------------------------------------------


def test_a_sound_checkpoint_verifies_with_its_progress(tmp_path: Path) -> None:
    archive = claimed(tmp_path / "store")
    real_checkpoint(archive, tmp_path)
    done: list[int] = []
    entry = archive.find()
    assert verify(archive, entry, done.append) == []
    assert sum(done) == entry.bytes


def test_what_is_removed_while_it_is_verified_is_not_called_damaged(tmp_path: Path) -> None:
    archive = claimed(tmp_path / "store")
    real_checkpoint(archive, tmp_path)
    entry = archive.find()
    archive.manifest(entry)
    checkpoint(Archive(folder(tmp_path / "store")), CLAIM, entry.step + 5)
    Archive(folder(tmp_path / "store")).expire(Retention(1), CLAIM)
    with pytest.raises(RequestError, match=rf"step {entry.step} was removed .* while it was read: take a newer one"):
        verify(archive, entry)


@pytest.mark.parametrize("place", [0, 100, PIECE - 1, PIECE + BLOCK, -1, -100])
def test_a_flipped_byte_anywhere_is_found(tmp_path: Path, place: int) -> None:
    archive = claimed(tmp_path / "store")
    generation = real_checkpoint(archive, tmp_path)
    path = tmp_path / "store" / image_key(generation, 1)
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)
    problems = verify(archive, archive.find())
    assert [(problem.rank, problem.key) for problem in problems] == [(1, image_key(generation, 1))]
    assert image_key(generation, 1) in problems[0].text


def test_missing_short_and_exchanged_objects_are_found(tmp_path: Path) -> None:
    archive = claimed(tmp_path / "store")
    generation = real_checkpoint(archive, tmp_path)
    entry, store = archive.find(), tmp_path / "store"
    first, second = (store / image_key(generation, rank) for rank in (0, 1))
    whole = first.read_bytes()
    sealed(tmp_path / "other.img", generation, 1000)
    first.write_bytes((tmp_path / "other.img").read_bytes())
    second.write_bytes(whole[:-1])
    assert {problem.rank for problem in verify(archive, entry)} == {0, 1}
    first.unlink()
    assert [problem.rank for problem in verify(archive, entry)] == [0, 1]
    (store / entry.manifest).write_text(json.dumps({"format": 1}))
    assert [problem.key for problem in verify(Archive(folder(store)), entry)] == [entry.manifest]


def test_conditional_puts_are_what_all_this_rests_on(tmp_path: Path) -> None:
    store = folder(tmp_path)
    etag = store.put("a", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed):
        store.put("a", b"2", if_absent=True)
    store.put("a", b"2", if_match=etag)
    with pytest.raises(PreconditionFailed):
        store.put("a", b"3", if_match=etag)
