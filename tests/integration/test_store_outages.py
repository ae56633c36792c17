"""Whole runs with an S3 server over HTTP that is away, slow, full, forgetful or lying, and with keepers and controllers
that die while they write to it. Training goes on in each, the events say what is wrong, the last step gets there, the
weights are those of the undisturbed run, and what is in the bucket afterwards restores.

Everything happens by coordinate: an event of the run, or the n-th request of a kind, which a door holds until told. The
job is paced for as long as that lasts, so that it trains meanwhile however fast the machine is.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import boto3
import pytest
from botocore.config import Config

from outlast.checkpoint.archive import Archive
from outlast.checkpoint.store import StoreOptions, open_store
from outlast.checkpoint.verify import verify
from support.lines import Line, line_to
from support.mounts import small_file_system
from support.runs import Outcome, job, trainctl_run
from support.s3door import Asked, Door, Hold
from support.stores import environment, new_bucket, s3
from support.story import Story, meanwhile

pytestmark = pytest.mark.timeout(400)

STEPS = 120
FSDP = ("--parallel", "fsdp", "--global-batch", "256", "--steps", str(STEPS))
OUTAGE_S = 30.0
ALL = frozenset({"all"})
CLIENT = Config(s3={"addressing_style": "path"})


@dataclass
class Site:
    """A bucket behind a door behind a line. ``line`` breaks connections, ``door`` knows requests; ``direct`` goes past
    both."""

    line: Line
    door: Door
    direct: dict[str, str]
    bucket: str

    @property
    def url(self) -> str:
        """Where the job's checkpoints lie."""
        return f"s3://{self.bucket}/store/default/test"

    def archive(self) -> Archive:
        """As a reader sees it, past all faults."""
        with environment(self.direct):
            return Archive(open_store(self.url, StoreOptions(patience_s=5)))

    def check_readers(self) -> list[int]:
        """No reader is offered half a checkpoint; the steps that there are, the newest last."""
        archive = self.archive()
        head = archive.read_head()
        assert head is not None
        assert archive.restorable(enough=100).bad == ()
        return [entry.step for entry in head.line]

    def command(self, *arguments: str) -> dict[str, Any]:
        """``trainctl checkpoints``, past all faults: its JSON."""
        command = [sys.executable, "-m", "trainctl", "checkpoints", *arguments, "--json"]
        with environment(self.direct):
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def check_end(self, digest: str, folder: pathlib.Path) -> None:
        """Every byte of every checkpoint verifies, the last step's weights are those, and gc finds garbage at most."""
        steps = self.check_readers()
        assert steps[-1] == STEPS
        assert self.command("export", self.url, "--to", str(folder / "export"))["weights_digest"] == digest
        self.command("gc", self.url, "--grace", "0s", "--delete")
        assert self.command("gc", self.url, "--grace", "0s") | {"bytes": 0} == {
            **{"url": self.url, "deleted": False, "bytes": 0, "objects": [], "unfinished": []}
        }
        assert self.check_readers() == steps
        self.command("verify", self.url)
        archive = self.archive()
        for step in steps:
            assert verify(archive, archive.find(step)) == []


@contextmanager
def site(folder: pathlib.Path, buckets: pathlib.Path | None = None) -> Iterator[Site]:
    """One of its own, to which the environment leads."""
    with s3(buckets) as direct:
        door = Door(direct["AWS_ENDPOINT_URL"])
        try:
            with environment(direct):
                bucket = new_bucket()
            with line_to(door.url, folder) as line, environment({**direct, "AWS_ENDPOINT_URL": line.url}):
                yield Site(line, door, direct, bucket)
        finally:
            door.close()


LARGE = ("--width", "1024", "--global-batch", "64")
"""Images of 19 MB: two parts each."""


def durable(site: Site, folder: pathlib.Path, pace: float, *arguments: str, **spec: Any) -> dict[str, Any]:
    """An FSDP job with a snapshot every 2 steps and a checkpoint every 4, unless said otherwise. A step takes ``pace``
    seconds at least until `hurry`."""
    paced = ("--pace", str(pace), "--pace-until", str(folder / "hurry"))
    checkpoint = {"url": f"s3://{site.bucket}/store", "interval": 4, **spec.pop("checkpoint", {})}
    return job("train.py", *FSDP, *paced, *arguments, checkpoint=checkpoint, snapshot={"everySteps": 2}, **spec)


def hurry(folder: pathlib.Path) -> None:
    """What was to happen while the job trains has happened."""
    (folder / "hurry").touch()


Undisturbed = Callable[[dict[str, Any]], Outcome]
PLAIN = job("train.py", *FSDP)


def check_run(outcome: Outcome, reference: Outcome) -> None:
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    assert outcome.report["checkpoints"]["last_step"] == STEPS


# --- outages --------------------------------------------------------------------------------------------------------


@contextmanager
def training_goes_on(story: Story, least: int) -> Iterator[None]:
    """So many steps are done before the block is left, all by one attempt."""
    before, attempts = story.step(), {event["attempt"] for event in story.events()}
    yield
    story.reach(before + least)
    assert {event["attempt"] for event in story.events()} == attempts


def test_a_store_that_is_away_breaks_off_stalls_and_is_slow(tmp_path: pathlib.Path, undisturbed: Undisturbed) -> None:
    """One after the other in one run; after each the next checkpoint is complete."""
    with site(tmp_path) as place:
        story = Story(tmp_path / "run")

        def break_it() -> None:
            step = answers_503(place, story, story.committed())
            for break_off in (place.line.reset, lambda: place.line.cut(100_000)):
                step = breaks_off(place, story, step, break_off)
            step = stalls(place, story, step)
            is_slow(place, story, step)
            hurry(tmp_path)

        with meanwhile(break_it):
            outcome = trainctl_run(durable(place, tmp_path, 1.2), tmp_path)
        check_run(outcome, undisturbed(PLAIN))
        place.check_end(outcome.digest, tmp_path)


def answers_503(place: Site, story: Story, step: int) -> int:
    """For half a minute, which keepers sit out; each returns the step of the first checkpoint after it."""
    place.door.refusing = ALL
    with training_goes_on(story, 15):
        began = time.monotonic()
        event = story.next("store-unavailable", limit_s=OUTAGE_S)
        assert "SlowDown (503)" in event["text"], event
        time.sleep(max(0.0, began + OUTAGE_S - time.monotonic()))
        assert place.check_readers()[-1] >= step
    place.door.refusing = frozenset()
    assert place.door.refused > 0
    return story.committed(beyond=step)


def breaks_off(place: Site, story: Story, step: int, break_off: Callable[[], None]) -> int:
    """Connections are reset, or end within a request, until that is told."""
    break_off()
    with training_goes_on(story, 4):
        event = story.next("store-unavailable")
        assert "onnection" in event["text"], event
        assert place.check_readers()[-1] >= step
    place.line.clear()
    return story.committed(beyond=step)


def stalls(place: Site, story: Story, step: int) -> int:
    """Requests get no answer: a keeper gives them up after 20 s, the controller after 5 s."""
    place.line.stall()
    with training_goes_on(story, 8):
        event = story.next("store-unavailable")
        assert "Read timeout" in event["text"], event
        assert place.check_readers()[-1] >= step
    place.line.clear()
    return story.committed(beyond=step)


def is_slow(place: Site, story: Story, step: int) -> None:
    """An upload lasts longer than the interval: checkpoints are skipped and counted, none fails."""
    before = len([event for event in story.events() if event["kind"] == "checkpoint-failed"])
    place.line.slow(25_000)
    story.next("checkpoint-started")
    with training_goes_on(story, 5):
        slow = story.next("checkpoint-committed", lambda event: event["fields"]["seconds"] > 5)
    place.line.clear()
    after = story.next("checkpoint-started")
    assert after["fields"]["step"] - slow["fields"]["step"] >= 2 * 4, "at least one was skipped"
    assert len([event for event in story.events() if event["kind"] == "checkpoint-failed"]) == before
    story.committed(beyond=step)


def test_a_bucket_that_is_full(tmp_path: pathlib.Path, undisturbed: Undisturbed, small_disk: pathlib.Path) -> None:
    """The server's disk has no room until somebody frees some, after the failure was told."""
    with site(tmp_path, small_disk) as place:
        story = Story(tmp_path / "run")
        filler = small_disk / "filler"

        def fill_and_free() -> None:
            step = story.committed()
            stat = os.statvfs(small_disk)
            filler.write_bytes(bytes(stat.f_bavail * stat.f_frsize))
            try:
                with training_goes_on(story, 10):
                    event = story.next("store-unavailable")
                    assert "(5" in event["text"], event
                    assert place.check_readers()[-1] >= step
            finally:
                filler.unlink()
            story.committed(beyond=step)
            hurry(tmp_path)

        with meanwhile(fill_and_free):
            outcome = trainctl_run(durable(place, tmp_path, 0.5), tmp_path)
        check_run(outcome, undisturbed(PLAIN))
        place.check_end(outcome.digest, tmp_path)


# --- what is in the store is not what was put there -------------------------------------------------------------------


def test_a_lost_object_and_flipped_bytes_are_passed_over(tmp_path: pathlib.Path, undisturbed: Undisturbed) -> None:
    """All nodes are lost twice: after the newest checkpoint lost an object, and while bytes of the newest are flipped
    on their way. Each time the one before it is used; the other is in quarantine, and its objects are kept."""
    everything = [f"node-loss@{step}:{seat}" for step in (28, 58) for seat in range(4)]
    with site(tmp_path) as place:
        story = Story(tmp_path / "run")

        def spoil() -> None:
            story.next("checkpoint-committed", lambda event: event["fields"]["step"] == 20)
            lost = lose_object(place, 20)
            event = story.next("checkpoint-quarantined")
            assert f"{lost} is missing" in event["text"], event
            assert story.next("restored")["fields"]["step"] == 10
            story.next("checkpoint-committed", lambda event: event["fields"]["step"] == 50)
            generation = str(place.archive().find(50).generation)
            place.door.flips = lambda asked: asked.what == "read" and generation in asked.key
            event = story.next("checkpoint-quarantined")
            assert "do not verify" in event["text"], event
            assert story.next("restored")["fields"]["step"] == 40
            place.door.flips = lambda _: False
            hurry(tmp_path)

        spec = durable(place, tmp_path, 0.5, checkpoint={"interval": 10})
        with meanwhile(spoil):
            outcome = trainctl_run(spec, tmp_path, everything, ("--replace-after", "1"))
        assert place.door.flipped > 0
        check_run(outcome, undisturbed(PLAIN))
        place.check_end(outcome.digest, tmp_path)


def lose_object(place: Site, step: int) -> str:
    """Remove an image of a checkpoint behind its back; its key."""
    archive = place.archive()
    image = archive.manifest(archive.find(step)).images[1]
    with environment(place.direct):
        client = boto3.session.Session().client("s3", config=CLIENT)
        client.delete_object(Bucket=place.bucket, Key=f"{urlsplit(place.url).path[1:]}/{image.key}")
    return image.key


# --- who writes dies --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where seat 1's keeper is killed: at the ``number``-th request of a kind, before the server sees it or after it
    was ``answered``. Requests are those for its image, and the controller's that make a checkpoint of all."""

    what: str
    number: int = 1
    answered: bool = False

    @contextmanager
    def held(self, door: Door) -> Iterator[Hold]:
        before, of_seat = door.seen["manifest"], "" if self.what in ("manifest", "head") else "rank-00001"

        def where(asked: Asked) -> bool:
            return of_seat in asked.key and (asked.what != "head" or door.seen["manifest"] > before)

        with door.holding(self.what, self.number, answered=self.answered, where=where) as hold:
            yield hold


POINTS = (
    Point("part", 1),
    Point("part", 2),
    Point("complete"),
    Point("complete", answered=True),
    Point("manifest"),
    Point("manifest", answered=True),
    Point("head", answered=True),
)


def test_keepers_and_controllers_are_killed_at_each_point_of_a_checkpoint(
    tmp_path: pathlib.Path, undisturbed: Undisturbed
) -> None:
    """Seat 1's keeper at each point; then the controller between manifest and head, where its request for the head goes
    nowhere the first time, and has been sent already, arriving after its sender's death, the second time."""
    with site(tmp_path) as place:
        story = Story(tmp_path / "run")

        def kill_at_each() -> None:
            step = story.committed()
            for point in POINTS:
                step = killed_keeper(place, story, point, step)
            assert {event["attempt"] for event in story.events()} <= {0, 1}, "a keeper is no loss"
            for deliver in (False, True):
                step = killed_controller(place, story, deliver, step)
            hurry(tmp_path)

        with meanwhile(kill_at_each):
            outcome = trainctl_run(durable(place, tmp_path, 0.5, *LARGE), tmp_path)
        check_run(outcome, undisturbed(job("train.py", *FSDP, *LARGE)))
        place.check_end(outcome.digest, tmp_path)


def killed_keeper(place: Site, story: Story, point: Point, step: int) -> int:
    """The step of the first checkpoint after it."""
    with point.held(place.door) as hold:
        hold.wait()
        story.kill_keeper(1)
        place.check_readers()
        story.next("keeper-lost")
    after = story.committed(beyond=step)
    place.check_readers()
    return after


def killed_controller(place: Site, story: Story, deliver: bool, step: int) -> int:
    """The step of the first checkpoint after it."""
    before = place.door.seen["manifest"]
    where = lambda _: place.door.seen["manifest"] > before  # noqa: E731
    with place.door.holding("head", deliver=deliver, where=where) as hold:
        hold.wait()
        readable = place.check_readers()
        os.kill(story.controller(), signal.SIGKILL)
    story.next("controller-started")
    after = story.committed(beyond=max(step, readable[-1]))
    place.check_readers()
    return after


def test_a_controller_that_was_paused_at_the_commit_moves_nothing(
    tmp_path: pathlib.Path, undisturbed: Undisturbed
) -> None:
    """Stopped when its manifest is written, it wakes after another machine has gone on from the checkpoint before."""
    with site(tmp_path) as place:
        first, second = Story(tmp_path / "first" / "run"), Story(tmp_path / "second" / "run")
        spec = durable(place, tmp_path, 0.25)

        def pause_and_take_over() -> None:
            step = first.committed()
            with place.door.holding("manifest", answered=True) as hold:
                hold.wait()
                paused = [first.supervisor(), first.controller()]  # or the one would soon start another in its place
                for pid in paused:
                    os.kill(pid, signal.SIGSTOP)
            assert place.check_readers()[-1] == step
            with meanwhile(lambda: wake(paused)):
                resumed = trainctl_run(spec, tmp_path / "second", options=("--resume",), alone=False)
            assert resumed.events("restored")[0]["fields"]["step"] == step
            check_run(resumed, undisturbed(PLAIN))

        def wake(paused: list[int]) -> None:
            second.next("restored")
            for pid in paused:
                os.kill(pid, signal.SIGCONT)
            first.next("claim-lost")
            hurry(tmp_path)

        with meanwhile(pause_and_take_over):
            outcome = trainctl_run(spec, tmp_path / "first", alone=False)
        assert outcome.status == 1, outcome.output
        assert "taken over" in outcome.output
        place.check_end(undisturbed(PLAIN).digest, tmp_path)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 64 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    with small_file_system(place, 64):
        yield place
