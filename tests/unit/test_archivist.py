"""The archivist: orders of the machine become moves of the store, one after the other, and every order is answered."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from outlast import messages as m
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.line import Retention
from outlast.checkpoint.manifest import HEAD_KEY, JobMark, image_key
from outlast.checkpoint.store import Store, StoreOptions
from outlast.clock import SystemClock
from outlast.config import ControllerConfig
from outlast.controller.archivist import Archivist, Charge, trouble_of
from outlast.controller.job_settings import settings_of
from outlast.controller.settings import CheckpointConfig
from outlast.errors import (
    CheckpointError,
    ClaimLost,
    ObjectMissing,
    OutlastError,
    RequestError,
    StoreDenied,
    StoreUnavailable,
)
from outlast.snapshot.identity import Attempt, Generation
from support.archives import MARK, SteppedStore, checkpoint, claim_of, folder, upload

WAIT = 10.0


def attempt(number: int) -> Attempt:
    return Attempt(number, f"{number:016x}")


def generation(number: int, step: int) -> Generation:
    return Generation.of(attempt(number), step)


@dataclass
class Desk:
    """An archivist at work. ``trouble``: raised by the store's operations whose name it is given for."""

    archivist: Archivist
    store: Store
    trouble: dict[str, OutlastError] = field(default_factory=dict)
    answers: queue.SimpleQueue[m.Event] = field(default_factory=queue.SimpleQueue)
    lines: list[tuple[str, str]] = field(default_factory=list)

    def fail(self, operation: str) -> None:
        """Called around each operation of the store."""
        for name, error in self.trouble.items():
            if operation.startswith(name) and not operation.endswith(" done"):
                raise error

    def log(self, kind: str, text: str, fields: Mapping[str, Any]) -> None:
        self.lines.append((kind, text))

    def answer(self) -> m.Event:
        return self.answers.get(timeout=WAIT)

    def ask(self, *orders: Any) -> m.Event:
        """Give orders; the next answer."""
        for order in orders:
            self.archivist.submit(order)
        return self.answer()

    def claim(self, number: int = 1) -> m.Event:
        return self.ask(m.Claim(attempt(number)))

    def claimed(self, number: int = 1) -> list[Generation]:
        """Claim, which must succeed; what may be restored."""
        event = self.claim(number)
        assert isinstance(event, m.Claimed), event
        assert event.attempt == attempt(number)
        return [stored.generation for stored in event.stored]

    def failed(self, number: int = 1) -> tuple[str, str]:
        """Claim, which must fail; the trouble and the reason."""
        event = self.claim(number)
        assert isinstance(event, m.ClaimFailed), event
        return event.trouble, event.reason

    def unseen(self, number: int = 1) -> tuple[bool, str]:
        """Claim, which must succeed without what another job lends; whether a person must act, and the reason."""
        event = self.claim(number)
        assert isinstance(event, m.Claimed), event
        assert event.stored == ()
        return event.denied, event.unseen

    def order(self, number: int, step: int) -> m.CommitCheckpoint:
        """Upload, and the order to commit."""
        images = upload(self.store, generation(number, step))
        return m.CommitCheckpoint(generation(number, step), 2, 1, images[::-1], {"script": "abc"})

    def commit(self, number: int, step: int) -> m.Event:
        return self.ask(self.order(number, step))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.lines]

    def idle(self) -> None:
        """All orders so far have been carried out: the answer to a commit that cannot be is the proof."""
        self.archivist.submit(m.CommitCheckpoint(generation(999, 1), 1, 1, ()))
        event = self.answer()
        assert isinstance(event, m.CheckpointFailed), event
        assert event.generation == generation(999, 1)


def charge(path: Path, **fields: Any) -> Charge:
    return replace(Charge(f"file://{path}", MARK, "one", Retention(2)), **fields)


@contextmanager
def desk(path: Path, trouble: OutlastError | None = None, commit_s: float = WAIT, **fields: Any) -> Iterator[Desk]:
    wanted = charge(path, **fields)
    made: list[Desk] = []

    def open_at(url: str, options: StoreOptions) -> Store:
        return SteppedStore(folder(Path(url.removeprefix("file://"))), lambda name: made[0].fail(name))

    archivist = Archivist(wanted, SystemClock(), open_at, pauses_s=(0.01, 0.02), commit_s=commit_s)
    made.append(Desk(archivist, folder(path), {"": trouble} if trouble else {}))
    thread = threading.Thread(target=archivist.run, args=(made[0].answers.put, made[0].log))
    thread.start()
    try:
        yield made[0]
    finally:
        archivist.close()
        thread.join(WAIT)
        assert not thread.is_alive()


def head_steps(path: Path) -> list[int]:
    return [entry.step for entry in Archive(folder(path)).require_head().line]


# --- the good life --------------------------------------------------------------------------------------------------


def test_claims_commits_and_retention(tmp_path: Path) -> None:
    with desk(tmp_path) as at:
        assert at.claimed(1) == []
        for step in (5, 10, 15):
            event = at.commit(1, step)
            assert isinstance(event, m.CheckpointCommitted), event
            stored = event.checkpoint
            assert (stored.generation, stored.nodes, stored.procs) == (generation(1, step), 2, 1)
            assert (stored.url, stored.foreign) == (f"file://{tmp_path}", False)
            assert [image.rank for image in stored.images] == [0, 1]
        assert at.answer() == m.CheckpointsExpired((generation(1, 5),))
        assert at.claimed(2) == [generation(1, 15), generation(1, 10)]
        assert at.kinds() == ["checkpoint-expired"]
        assert head_steps(tmp_path) == [10, 15]
        assert at.archivist.status() == {"url": f"file://{tmp_path}", "claimed": str(attempt(2)), "last_error": None}


def test_a_later_controller_of_the_job_takes_over_and_the_older_has_lost(tmp_path: Path) -> None:
    with desk(tmp_path) as old:
        old.claimed(1)
        old.commit(1, 5)
        with desk(tmp_path, controller="two") as new:
            assert new.claimed(2) == [generation(1, 5)]
            assert isinstance(event := old.commit(1, 10), m.CheckpointFailed)
            assert (event.trouble, head_steps(tmp_path)) == ("lost", [5])
            assert "claim-lost" in old.kinds()
            trouble, reason = old.failed(3)
            assert trouble == "lost"
            assert "controller two" in reason
            assert new.claimed(4) == [generation(1, 5)]


def test_a_controller_that_slept_before_its_first_claim_has_lost(tmp_path: Path) -> None:
    checkpoint_by(tmp_path, 5)
    with desk(tmp_path, controller="sleeper") as sleeper:
        sleeper.idle()
        with desk(tmp_path, controller="two") as new:
            new.claimed(2)
            assert sleeper.failed(3)[0] == "lost"


def checkpoint_by(path: Path, *steps: int, mark: JobMark = MARK) -> None:
    """What a controller of the past left."""
    archive, claim = Archive(folder(path)), claim_of(1, "past")
    archive.claim(mark, claim, None)
    for step in steps:
        checkpoint(archive, claim, step)


def test_another_jobs_checkpoints_are_refused_or_resumed(tmp_path: Path) -> None:
    checkpoint_by(tmp_path, 5)
    other = JobMark("default", "demo", "another")
    with desk(tmp_path, mark=other) as at:
        trouble, reason = at.failed(1)
        assert trouble == "denied"
        assert "--resume" in reason
        assert at.archivist.status()["last_error"] == reason
    with desk(tmp_path, mark=other, resume=True) as at:
        assert at.claimed(1) == [generation(1, 5)]
        assert at.kinds() == ["store-resumed"]


@pytest.mark.parametrize("steps", [(), (5,)])
def test_a_job_that_ends_without_a_checkpoint_gives_its_place_back(tmp_path: Path, steps: tuple[int, ...]) -> None:
    """Its next run, or another job of its name, is not asked to go on from nothing."""
    other = JobMark("default", "demo", "another")
    with desk(tmp_path) as at:
        at.claimed(1)
        for step in steps:
            at.commit(1, step)
        with desk(tmp_path, mark=other) as rival:
            assert rival.failed(1)[0] == "denied", "it has not ended"
        at.archivist.submit(m.Finish("failed", "the script fails by itself"))
    head = Archive(folder(tmp_path)).require_head()
    assert (head.vacant, head.claim is None) == (not steps, not steps)
    with desk(tmp_path, mark=other) as at:
        assert at.failed(1)[0] == "denied" if steps else at.claimed(1) == []


def test_a_job_that_has_ended_does_not_take_a_store_that_comes_back(tmp_path: Path) -> None:
    with desk(tmp_path, StoreUnavailable("503")) as at:
        at.failed(1)
        at.archivist.submit(m.Finish("failed", "the store did not answer"))
        at.archivist.submit(m.Finish("failed", "and the one before was carried out"))
        while not at.archivist._orders.empty():
            time.sleep(0.01)
        at.trouble.clear()
        with pytest.raises(queue.Empty):
            at.answers.get(timeout=0.3)
    assert Archive(folder(tmp_path)).read_head() is None


def test_another_job_that_cannot_be_read_is_no_store_that_is_down(tmp_path: Path) -> None:
    checkpoint_by(tmp_path / "other", 5)
    folder(tmp_path / "other").put(HEAD_KEY, b'{"foo":')
    with desk(tmp_path / "own", restore_from=f"file://{tmp_path}/other") as at:
        denied, reason = at.unseen(1)
    assert denied
    assert f"checkpoint.restoreFrom file://{tmp_path}/other" in reason
    assert f"trainctl checkpoints repair file://{tmp_path}/other" in reason


def test_without_an_identity_nothing_is_claimed(tmp_path: Path) -> None:
    with desk(tmp_path, mark=replace(MARK, identity="")) as at:
        trouble, reason = at.failed(1)
        assert trouble == "denied"
        assert "store_identity" in reason


# --- a store in trouble ---------------------------------------------------------------------------------------------


def test_a_store_that_is_down_is_told_once_and_tried_until_it_answers(tmp_path: Path) -> None:
    with desk(tmp_path, StoreUnavailable("503")) as at:
        assert at.failed(1) == ("unavailable", "503")
        event = at.commit(1, 5)
        assert isinstance(event, m.CheckpointFailed)
        assert (event.trouble, "503" in event.reason) == ("unavailable", True)
        at.trouble.clear()
        assert at.answer() == m.Claimed(attempt(1))
        assert isinstance(at.commit(1, 5), m.CheckpointCommitted)


def test_a_later_claim_supersedes_one_that_waits(tmp_path: Path) -> None:
    with desk(tmp_path, StoreUnavailable("503")) as at:
        at.failed(1)
        assert at.failed(2) == ("unavailable", "503")
        at.trouble.clear()
        assert at.answer() == m.Claimed(attempt(2))
        at.archivist.submit(m.CommitCheckpoint(generation(2, 5), 1, 1, ()))
        assert isinstance(at.answer(), m.CheckpointFailed), "nobody answered the first claim any more"


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (StoreDenied("403"), "denied"),
        (ClaimLost("x"), "lost"),
        (CheckpointError("nonsense"), "unavailable"),
        (ObjectMissing("no head"), None),
    ],
)
def test_what_a_claim_runs_into(tmp_path: Path, error: OutlastError, trouble: str | None) -> None:
    with desk(tmp_path, error) as at:
        if trouble is None:
            at.trouble = {f"get {HEAD_KEY}": error}
            assert at.claimed(1) == []
        else:
            assert at.failed(1)[0] == trouble


def test_a_commit_is_tried_until_the_store_answers(tmp_path: Path) -> None:
    with desk(tmp_path) as at:
        at.claimed(1)
        order, tried = at.order(1, 5), threading.Semaphore(0)

        def fail(operation: str) -> None:
            tried.release()
            if at.trouble:
                raise StoreUnavailable("503")

        at.fail = fail  # type: ignore[method-assign]
        at.trouble = {"": StoreUnavailable("503")}
        at.archivist.submit(order)
        for _ in range(3):
            assert tried.acquire(timeout=WAIT)
        at.trouble.clear()
        event = at.answer()
        assert isinstance(event, m.CheckpointCommitted)
        assert event.checkpoint.generation == generation(1, 5)
        assert at.kinds() == ["store-unavailable"], "once, however often it is tried"


@pytest.mark.parametrize(
    ("error", "trouble"),
    [(StoreUnavailable("503"), "unavailable"), (StoreDenied("403"), "denied"), (CheckpointError("x"), "bad")],
)
def test_a_commit_that_cannot_be_is_answered(tmp_path: Path, error: OutlastError, trouble: str) -> None:
    with desk(tmp_path, commit_s=0.02) as at:
        at.claimed(1)
        at.trouble = {"put manifests/": error}
        assert at.commit(1, 5) == m.CheckpointFailed(generation(1, 5), str(error), trouble)  # type: ignore[arg-type]
        at.trouble.clear()
        assert isinstance(at.commit(1, 5), m.CheckpointCommitted)


def test_a_claim_ends_a_commit_that_waits(tmp_path: Path) -> None:
    with desk(tmp_path) as at:
        at.claimed(1)
        at.trouble = {"put manifests/": StoreUnavailable("503")}
        event = at.ask(at.order(1, 5), m.Claim(attempt(2)))
        assert event == m.CheckpointFailed(generation(1, 5), "it was superseded", "unavailable")
        assert isinstance(at.answer(), m.Claimed)


def test_an_image_that_is_not_there_is_no_checkpoint(tmp_path: Path) -> None:
    with desk(tmp_path) as at:
        at.claimed(1)
        order = at.order(1, 5)
        at.store.delete([image_key(order.generation, 1)])
        event = at.ask(order)
        assert isinstance(event, m.CheckpointFailed)
        assert (event.trouble, "is missing" in event.reason) == ("bad", True)


def test_retention_that_fails_is_a_line_and_no_more(tmp_path: Path) -> None:
    with desk(tmp_path) as at:
        at.claimed(1)
        at.trouble = {"delete": StoreUnavailable("503")}
        for step in (5, 10, 15):
            assert isinstance(at.commit(1, step), m.CheckpointCommitted)
        at.archivist.submit(m.CommitCheckpoint(generation(1, 20), 1, 1, ()))
        at.answer()
        assert at.kinds() == ["retention-failed"]


# --- quarantine -----------------------------------------------------------------------------------------------------


def test_checkpoints_that_are_not_whole_are_quarantined_when_claiming(tmp_path: Path) -> None:
    checkpoint_by(tmp_path, 5, 10)
    folder(tmp_path).delete([image_key(generation(1, 10), 0)])
    with desk(tmp_path) as at:
        assert at.claimed(2) == [generation(1, 5)]
        assert at.kinds() == ["checkpoint-quarantined"]
        assert head_steps(tmp_path) == [5]
        assert folder(tmp_path).head(image_key(generation(1, 10), 1)).size, "what is left of it is kept"


def test_what_the_machine_condemns_is_taken_out_and_not_offered(tmp_path: Path) -> None:
    checkpoint_by(tmp_path, 5, 10)
    with desk(tmp_path) as at:
        assert at.claimed(2) == [generation(1, 10), generation(1, 5)]
        at.archivist.submit(m.Quarantine(generation(1, 10), "block 3 does not verify"))
        assert at.claimed(3) == [generation(1, 5)]
        assert at.kinds() == ["checkpoint-quarantined"]
        head = Archive(folder(tmp_path)).require_head()
        assert [(item.entry.step, item.reason) for item in head.quarantined] == [(10, "block 3 does not verify")]


def test_what_is_condemned_while_the_store_is_down_is_taken_out_later(tmp_path: Path) -> None:
    checkpoint_by(tmp_path, 5, 10)
    with desk(tmp_path) as at:
        at.claimed(2)
        at.trouble = {f"put {HEAD_KEY}": StoreUnavailable("503")}
        at.archivist.submit(m.Quarantine(generation(1, 10), "flipped"))
        at.failed(3)
        at.trouble.clear()
        event = at.answer()
        assert isinstance(event, m.Claimed)
        assert [stored.generation for stored in event.stored] == [generation(1, 5)]
        assert at.kinds() == ["quarantine-failed", "checkpoint-quarantined"]
        assert head_steps(tmp_path) == [5]


# --- from another job -----------------------------------------------------------------------------------------------


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another job's checkpoints of steps 5, 10 and 15."""
    path = tmp_path / "other"
    checkpoint_by(path, 5, 10, 15, mark=JobMark("default", "other", "its own"))
    return path


def foreign(path: Path, number: int = 1, **fields: Any) -> tuple[m.Event, list[str]]:
    with desk(path, **fields) as at:
        return at.claim(number), at.kinds()


@pytest.mark.parametrize(("at_step", "steps"), [("", [15, 10, 5]), ("@10", [10])])
def test_a_job_begins_with_another_jobs_checkpoint(tmp_path: Path, other: Path, at_step: str, steps: list[int]) -> None:
    event, _ = foreign(tmp_path / "own", restore_from=f"file://{other}{at_step}")
    assert isinstance(event, m.Claimed)
    assert [stored.generation.step for stored in event.stored] == steps
    assert {(stored.foreign, stored.url) for stored in event.stored} == {(True, f"file://{other}")}


def test_its_own_checkpoints_come_before_another_jobs(tmp_path: Path, other: Path) -> None:
    checkpoint_by(tmp_path / "own", 3)
    event, _ = foreign(tmp_path / "own", 2, restore_from=f"file://{other}")
    assert isinstance(event, m.Claimed)
    assert [(stored.generation.step, stored.foreign) for stored in event.stored] == [(3, False)]


@pytest.mark.parametrize(
    ("damage", "at_step", "reason"),
    [
        (None, "@7", "no checkpoint of step 7: there are those of steps 5, 10, 15"),
        (10, "@10", "rank-00000.safetensors is missing"),
        ((5, 10, 15), "", "no complete checkpoint"),
        (None, "/elsewhere", "holds no checkpoints"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_told(
    tmp_path: Path, other: Path, damage: int | tuple[int, ...] | None, at_step: str, reason: str
) -> None:
    steps = damage if isinstance(damage, tuple) else () if damage is None else (damage,)
    folder(other).delete([image_key(generation(1, step), 0) for step in steps])
    with desk(tmp_path / "own", restore_from=f"file://{other}{at_step}") as at:
        denied, unseen = at.unseen()
        assert denied
        assert reason in unseen
        assert reason in at.archivist.status()["last_error"]
        at.archivist.submit(m.Finish("failed", unseen))
    assert Archive(folder(tmp_path / "own")).require_head().vacant, "its place is given back all the same"


def test_a_job_that_has_begun_can_do_without_what_it_began_with(tmp_path: Path, other: Path) -> None:
    """Retention of that job removes it, and it may be out of reach: there are checkpoints all the same."""
    source = f"file://{other}@5"
    with desk(tmp_path / "own", restore_from=source) as at:
        assert [found.step for found in at.claimed(1)] == [5]
    theirs, claim = Archive(folder(other)), claim_of(1, "past")
    checkpoint(theirs, claim, 20)
    theirs.expire(Retention(2), claim)
    with desk(tmp_path / "own", controller="two", restore_from=source) as at:
        assert at.unseen(1)[0]
        assert isinstance(at.commit(1, 7), m.CheckpointCommitted)
        at.idle()
        assert "restoreFrom" not in str(at.archivist.status()["last_error"]), "it does not matter any more"
        assert [found.step for found in at.claimed(2)] == [7]
    (tmp_path / "own" / HEAD_KEY).unlink()


def test_that_the_head_is_ours_is_news_though_the_lender_is_away_as_well(tmp_path: Path) -> None:
    away = {"own", "other"}

    def open_at(url: str, options: StoreOptions) -> Any:
        def step(name: str) -> None:
            if url.rpartition("/")[2] in away and not name.endswith(" done"):
                raise StoreUnavailable("503")

        return SteppedStore(folder(Path(url.removeprefix("file://"))), step)

    answers: queue.SimpleQueue[m.Event] = queue.SimpleQueue()
    wanted = charge(tmp_path / "own", restore_from=f"file://{tmp_path}/other")
    archivist = Archivist(wanted, SystemClock(), open_at, pauses_s=(0.01, 0.02))
    thread = threading.Thread(target=archivist.run, args=(answers.put, lambda *_: None))
    thread.start()
    try:
        archivist.submit(m.Claim(attempt(1)))
        assert answers.get(timeout=WAIT) == m.ClaimFailed(attempt(1), "503", "unavailable")
        away.remove("own")
        assert answers.get(timeout=WAIT) == m.Claimed(attempt(1), (), "503", denied=False)
    finally:
        archivist.close()
        thread.join()


def test_what_is_lent_is_looked_for_until_it_is_there(tmp_path: Path, other: Path) -> None:
    head = (other / HEAD_KEY).read_bytes()
    (other / HEAD_KEY).unlink()
    with desk(tmp_path / "own", restore_from=f"file://{other}") as at:
        assert at.unseen(1)[0]
        folder(other).put(HEAD_KEY, head)
        event = at.answer()
        assert isinstance(event, m.Claimed)
        assert [stored.generation.step for stored in event.stored] == [15, 10, 5]


def test_another_jobs_damaged_checkpoints_are_passed_over_and_left_as_they_are(tmp_path: Path, other: Path) -> None:
    folder(other).delete([image_key(generation(1, 15), 0)])
    before = (other / HEAD_KEY).read_bytes()
    with desk(tmp_path / "own", restore_from=f"file://{other}") as at:
        assert [found.step for found in at.claimed(1)] == [10, 5]
        at.archivist.submit(m.Quarantine(generation(1, 10), "flipped"))
        assert [found.step for found in at.claimed(2)] == [5]
        at.archivist.submit(m.Quarantine(generation(1, 5), "flipped"))
        denied, reason = at.unseen(3)
        assert denied
        assert "flipped; name another checkpoint, as URL@STEP" in reason
        assert at.kinds() == ["checkpoint-passed-over"]
    assert (other / HEAD_KEY).read_bytes() == before


def test_another_job_that_goes_on_is_looked_at_again(tmp_path: Path, other: Path) -> None:
    """What it had when the job began is restored as long as any of it is there."""
    theirs, claim = Archive(folder(other)), claim_of(1, "past")
    with desk(tmp_path / "own", restore_from=f"file://{other}") as at:
        assert [found.step for found in at.claimed(1)] == [15, 10, 5]
        for step, left in ((20, [15, 10]), (25, [15]), (30, [30, 25, 20])):
            checkpoint(theirs, claim, step)
            theirs.expire(Retention(3), claim)
            assert [found.step for found in at.claimed(step)] == left
        (other / HEAD_KEY).unlink()
        assert [found.step for found in at.claimed(99)] == [30, 25, 20], "as it was when it was seen last"
        assert at.kinds() == ["restore-from-unseen"]


# --- settings -------------------------------------------------------------------------------------------------------

JOB: dict[str, Any] = {
    "apiVersion": "outlast.dev/v1alpha1",
    "kind": "TrainingJob",
    "metadata": {"name": "demo", "namespace": "team"},
    "spec": {
        "entrypoint": ["python", "train.py"],
        "workers": {"replicas": 4, "minReplicas": 2},
        "recovery": {"shrinkAfter": "20s", "growAfter": "5s"},
        "checkpoint": {
            "url": "s3://bucket/prefix/",
            "keepLast": 5,
            "keepEverySteps": 100,
            "bandwidth": "200Mi",
            "restoreFrom": "s3://bucket/prefix/team/other@12",
        },
    },
}


def job(**checkpoint: Any) -> dict[str, Any]:
    spec = {**JOB["spec"], "checkpoint": {**JOB["spec"]["checkpoint"], **checkpoint}}
    return {**JOB, "spec": spec}


def test_what_a_job_asks_of_its_archivist(tmp_path: Path) -> None:
    def config(job: dict[str, Any], resume: bool = True) -> ControllerConfig:
        place = str(tmp_path)
        return ControllerConfig(
            job=job, name="demo", dir=place, namespace="x", token_file="t", store_identity="me", resume=resume
        )

    assert Charge.of(config(job()), "one") == Charge(
        url="s3://bucket/prefix/team/demo",
        mark=JobMark("team", "demo", "me"),
        controller="one",
        retention=Retention(5, 100),
        restore_from="s3://bucket/prefix/team/other@12",
        resume=True,
    )
    without = {key: value for key, value in JOB["spec"].items() if key != "checkpoint"}
    assert Charge.of(config({**JOB, "spec": without}), "one") is None
    for itself in (True, False):
        charge = Charge.of(config(job(resume=itself), resume=False), "one")
        assert charge is not None
        assert charge.resume is itself, "a job can say so itself"


@pytest.mark.parametrize(
    ("interval", "steps", "seconds"), [("auto", None, None), (100, 100, None), ("10m", None, 600.0)]
)
def test_what_a_job_asks_of_its_machine(interval: Any, steps: int | None, seconds: float | None) -> None:
    settings = settings_of(job(interval=interval))
    assert (settings.min_replicas, settings.shrink_after_s, settings.grow_after_s) == (2, 20.0, 5.0)
    assert settings.checkpoint == CheckpointConfig(
        url="s3://bucket/prefix/team/demo",
        interval_steps=steps,
        interval_s=seconds,
        bandwidth=200 << 20,
        restore_from="s3://bucket/prefix/team/other@12",
    )


def test_the_fingerprint_is_of_what_is_computed() -> None:
    before = settings_of(job()).fingerprint
    assert len(before) == 64
    assert settings_of(job(keepLast=9)).fingerprint == before
    other = {**JOB, "spec": {**JOB["spec"], "entrypoint": ["python", "train.py", "--lr", "1"]}}
    assert settings_of(other).fingerprint != before


@pytest.mark.parametrize(
    ("make", "trouble"),
    [
        (ClaimLost, "lost"),
        (StoreDenied, "denied"),
        (RequestError, "denied"),
        (StoreUnavailable, "unavailable"),
        (CheckpointError, "bad"),
        (ObjectMissing, "bad"),
    ],
)
def test_errors_as_troubles(make: Callable[[str], OutlastError], trouble: str) -> None:
    assert trouble_of(make("x")) == trouble
