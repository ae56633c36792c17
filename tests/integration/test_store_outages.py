"""Whole runs with an S3 server over HTTP that is away, slow, full, forgetful or lying, and with keepers and controllers
that die while they write to it. Training goes on in each, the events say what is wrong, the last step gets there, the
weights are those of the undisturbed run, and what is in the bucket afterwards restores.

Everything happens by coordinate: an event of the run, or the n-th request of a kind, which a door holds until told.
``--pace`` keeps the job training for as long as an outage lasts, however fast the machine is.
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
from support.lines import Line, line_to
from support.runs import Outcome, job, trainctl_run
from support.s3door import Door
from support.stores import environment, new_bucket, s3
from support.story import Story, meanwhile

pytestmark = pytest.mark.timeout(400)

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

    def check_end(self, last: int) -> None:
        """Every byte of every checkpoint verifies, the last step is there, and gc finds garbage at most."""
        steps = self.check_readers()
        assert steps[-1] == last
        for step in steps:
            self.command("verify", self.url, str(step))
        self.command("gc", self.url, "--grace", "0s", "--delete")
        assert self.command("gc", self.url, "--grace", "0s") | {"bytes": 0} == {
            **{"url": self.url, "deleted": False, "bytes": 0, "objects": [], "unfinished": []}
        }
        assert self.check_readers() == steps
        for step in steps:
            self.command("verify", self.url, str(step))


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


def durable(site: Site, steps: int, pace: float, *arguments: str, **spec: Any) -> dict[str, Any]:
    """The FSDP job of ``test_durable`` with a snapshot every 2 steps and, unless said otherwise, a checkpoint every 10."""
    given = ("--parallel", "fsdp", "--global-batch", "256", "--steps", str(steps), "--pace", str(pace), *arguments)
    checkpoint = {"url": f"s3://{site.bucket}/store", "interval": 10, **spec.pop("checkpoint", {})}
    return job("train.py", *given, checkpoint=checkpoint, snapshot={"everySteps": 2}, **spec)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Runs without faults and without a store, once for each kind of job: what the others must end with."""
    known: dict[tuple[str, ...], Outcome] = {}

    def run(steps: int, *arguments: str) -> Outcome:
        key = (str(steps), *arguments)
        if key not in known:
            given = ("--parallel", "fsdp", "--global-batch", "256", "--steps", str(steps), *arguments)
            known[key] = trainctl_run(job("train.py", *given), tmp_path_factory.mktemp("undisturbed"))
            assert known[key].status == 0, known[key].output
        return known[key]

    return run


def check_run(outcome: Outcome, reference: Outcome, steps: int) -> None:
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    assert outcome.report["checkpoints"]["last_step"] == steps


def restored_elsewhere(site: Site, spec: dict[str, Any], folder: pathlib.Path, reference: Outcome, step: int) -> None:
    """Another machine goes on from what the bucket holds, from that step, to the same end."""
    resumed = trainctl_run(spec, folder, options=("--resume",))
    assert resumed.status == 0, resumed.output
    assert resumed.events("restored")[0]["fields"]["step"] == step
    assert resumed.digest == reference.digest


# --- outages --------------------------------------------------------------------------------------------------------


@contextmanager
def training_goes_on(story: Story, least: int) -> Iterator[None]:
    """At least so many steps are done within the block, all by one attempt."""
    before, attempts = story.step(), {event["attempt"] for event in story.events()}
    yield
    assert story.step() - before >= least, f"steps stood still at {before}"
    assert {event["attempt"] for event in story.events()} == attempts


def test_a_store_that_answers_503_for_half_a_minute_then_cuts_connections(
    tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome]
) -> None:
    steps, pace = 320, 0.2
    with site(tmp_path) as place:
        story = Story(tmp_path / "run")

        def break_it() -> None:
            story.committed()
            place.door.refusing = ALL
            with training_goes_on(story, 30):
                began = time.monotonic()
                event = story.next("store-unavailable", limit_s=OUTAGE_S)
                assert "SlowDown (503)" in event["text"], event
                time.sleep(max(0.0, began + OUTAGE_S - time.monotonic()))
                step = place.check_readers()[-1]
            place.door.refusing = frozenset()
            assert place.door.refused > 0
            step = story.committed(beyond=step)
            for break_off in (place.line.reset, lambda: place.line.cut(100_000)):
                break_off()
                with training_goes_on(story, 10):
                    event = story.next("store-unavailable")
                    assert "onnection" in event["text"], event
                place.line.clear()
                step = story.committed(beyond=step)
                place.check_readers()

        with meanwhile(break_it):
            outcome = trainctl_run(durable(place, steps, pace), tmp_path)
        check_run(outcome, undisturbed(steps), steps)
        place.check_end(steps)


def test_a_store_that_stalls_then_is_slow(tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome]) -> None:
    """A request that gets no answer is given up after 20 s by a keeper, 5 s by the controller. What is slow is late:
    checkpoints are skipped and counted, none fails."""
    steps, pace = 300, 0.25
    with site(tmp_path) as place:
        story = Story(tmp_path / "run")

        def break_it() -> None:
            step = story.committed()
            place.line.stall()
            with training_goes_on(story, 40):
                event = story.next("store-unavailable")
                assert "Read timeout" in event["text"], event
            place.line.clear()
            step = story.committed(beyond=step)
            place.line.slow(40_000)
            story.next("checkpoint-started")
            with training_goes_on(story, 10):
                step = story.committed(beyond=step)
            place.line.clear()
            story.committed(beyond=step)

        with meanwhile(break_it):
            outcome = trainctl_run(durable(place, steps, pace), tmp_path)
        check_run(outcome, undisturbed(steps), steps)
        assert outcome.report["checkpoints"]["skipped"] >= 2, outcome.report["checkpoints"]
        place.check_end(steps)


def test_a_bucket_that_is_full(
    tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome], small_disk: pathlib.Path
) -> None:
    """The server's disk has no room until somebody frees some, after the failure was told."""
    with site(tmp_path, small_disk) as place:
        story = Story(tmp_path / "run")
        filler = small_disk / "filler"

        def fill_and_free() -> None:
            story.committed()
            stat = os.statvfs(small_disk)
            filler.write_bytes(bytes(stat.f_bavail * stat.f_frsize))
            with training_goes_on(story, 20):
                event = story.next("store-unavailable")
                assert "(5" in event["text"], event
                place.check_readers()
            filler.unlink()

        with meanwhile(fill_and_free):
            outcome = trainctl_run(durable(place, 120, 0.2), tmp_path)
        check_run(outcome, undisturbed(120), 120)
        place.check_end(120)


# --- what is in the store is not what was put there -------------------------------------------------------------------


def test_a_lost_object_and_flipped_bytes_are_passed_over(
    tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome]
) -> None:
    """All nodes are lost twice: after the newest checkpoint lost an object, and while bytes of the newest are flipped
    on their way. Each time the one before it is used; the other is in quarantine, and its objects are kept."""
    steps, pace = 80, 0.25
    everything = [f"node-loss@{step}:{seat}" for step in (28, 58) for seat in range(4)]
    with site(tmp_path) as place:
        story = Story(tmp_path / "run")

        def spoil() -> None:
            story.next("checkpoint-committed", lambda event: event["fields"]["step"] == 20)
            entry = place.archive().find(20)
            image = place.archive().manifest(entry).images[1]
            with environment(place.direct):
                client = boto3.session.Session().client("s3", config=CLIENT)
                client.delete_object(Bucket=place.bucket, Key=f"{urlsplit(place.url).path[1:]}/{image.key}")
            event = story.next("checkpoint-quarantined")
            assert f"{image.key} is missing" in event["text"], event
            assert story.next("restored")["fields"]["step"] == 10
            story.next("checkpoint-committed", lambda event: event["fields"]["step"] == 50)
            generation = str(place.archive().find(50).generation)
            place.door.flips = lambda asked: asked.what == "read" and generation in asked.key
            event = story.next("checkpoint-quarantined")
            assert "do not verify" in event["text"], event
            assert story.next("restored")["fields"]["step"] == 40
            place.door.flips = lambda _: False

        with meanwhile(spoil):
            outcome = trainctl_run(durable(place, steps, pace), tmp_path, everything, ("--replace-after", "1"))
        assert place.door.flipped > 0
        check_run(outcome, undisturbed(steps), steps)
        place.check_end(steps)


# --- who writes dies --------------------------------------------------------------------------------------------------

LARGE = ("--width", "1024")
"""Images of 19 MB: two parts each."""


def test_a_keeper_is_killed_at_each_point_of_an_upload(
    tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome]
) -> None:
    """Seat 1's, of whose images a request is held meanwhile, or the controller's that makes a checkpoint of them."""
    steps = 70
    with site(tmp_path) as place:
        story, door = Story(tmp_path / "run"), place.door

        def kill_at_each() -> None:
            step = story.committed()
            for what, number, answered in (
                ("part", 1, False),
                ("part", 2, False),
                ("complete", 1, False),
                ("complete", 1, True),
                ("manifest", 1, False),
                ("manifest", 1, True),
                ("head", 1, True),
            ):
                of_seat = "" if what in ("manifest", "head") else "rank-00001"
                before = door.seen["manifest"]
                after_manifest = what != "head" or None
                with door.holding(
                    what,
                    number,
                    answered=answered,
                    where=lambda asked, of=of_seat, any_=after_manifest, before=before: (
                        of in asked.key and (any_ or door.seen["manifest"] > before)
                    ),
                ) as hold:
                    hold.wait()
                    story.kill_keeper(1)
                    place.check_readers()
                    story.next("keeper-lost")
                step = story.committed(beyond=step)
                place.check_readers()

        with meanwhile(kill_at_each):
            outcome = trainctl_run(durable(place, steps, 0.25, *LARGE, checkpoint={"interval": 4}), tmp_path)
        check_run(outcome, undisturbed(steps, *LARGE), steps)
        assert outcome.recoveries == [], "a keeper is no loss"
        place.check_end(steps)


def test_a_controller_is_killed_between_manifest_and_head(
    tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome]
) -> None:
    """The first time its request for the head goes nowhere; the second time it was sent already, and arrives after its
    sender's death."""
    steps = 120
    with site(tmp_path) as place:
        story, door = Story(tmp_path / "run"), place.door

        def kill_twice() -> None:
            step = story.committed()
            for deliver in (False, True):
                before = door.seen["manifest"]
                with door.holding(
                    "head", deliver=deliver, where=lambda _, before=before: door.seen["manifest"] > before
                ) as hold:
                    hold.wait()
                    os.kill(story.controller(), signal.SIGKILL)
                    assert place.check_readers()[-1] == step
                story.next("controller-started")
                step = story.committed(beyond=step)
                place.check_readers()

        with meanwhile(kill_twice):
            outcome = trainctl_run(durable(place, steps, 0.25), tmp_path)
        check_run(outcome, undisturbed(steps), steps)
        place.check_end(steps)


def test_a_controller_that_was_paused_at_the_commit_moves_nothing(
    tmp_path: pathlib.Path, undisturbed: Callable[..., Outcome]
) -> None:
    """Stopped when its manifest is written, it wakes after another machine has gone on from the checkpoint before."""
    steps = 80
    with site(tmp_path) as place:
        first, second, door = Story(tmp_path / "first" / "run"), Story(tmp_path / "second" / "run"), place.door
        spec = durable(place, steps, 0.25)
        taken: list[int] = []

        def pause_take_over_and_wake() -> None:
            step = first.committed()
            with door.holding("manifest", answered=True) as hold:
                hold.wait()
                controller = first.controller()
                os.kill(controller, signal.SIGSTOP)
            assert place.check_readers()[-1] == step
            with meanwhile(lambda: wake(controller)):
                resumed = trainctl_run(spec, tmp_path / "second", options=("--resume",), alone=False)
            assert resumed.events("restored")[0]["fields"]["step"] == step
            taken.append(step)
            check_run(resumed, undisturbed(steps), steps)

        def wake(controller: int) -> None:
            second.next("restored")
            os.kill(controller, signal.SIGCONT)

        with meanwhile(pause_take_over_and_wake):
            outcome = trainctl_run(spec, tmp_path / "first", alone=False)
        assert outcome.status == 1, outcome.output
        assert "taken over" in outcome.output
        place.check_end(steps)


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 64 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no small file system: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
