"""``trainctl checkpoints`` on a store in a folder: what it lists, shows, pins and removes, and what it refuses."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlast.agent.keeper_calls import UPLOAD_S
from outlast.checkpoint.archive import GRACE_S, Archive
from outlast.checkpoint.manifest import ClaimMark, JobMark, Manifest, image_key, rfc3339
from outlast.checkpoint.store import open_store
from outlast.quantities import parse_duration
from outlast.snapshot.identity import Generation
from outlast.snapshot.stored import StoredImage
from trainctl.catalogue import ago, amount
from trainctl.checkpoints import GRACE
from trainctl.main import run

MARK = "ab" * 8
CLAIM = ClaimMark(1, MARK, "controller")
ABOUT = {"script": "c0ffee", "mesh": {"shape": [2], "names": ["shard"]}}


@dataclass
class Job:
    """A job's folder with checkpoints of steps 10, 20 and 30, of two ranks with 100 bytes each."""

    root: Path
    name: str = "first"

    @property
    def folder(self) -> Path:
        return self.root / "default" / self.name

    @property
    def url(self) -> str:
        return f"file://{self.folder}"

    def generation(self, step: int) -> Generation:
        return Generation(1, step, MARK)

    def archive(self) -> Archive:
        return Archive(open_store(self.url))

    def fill(self) -> Job:
        archive, mark = self.archive(), JobMark("default", self.name, "me")
        archive.claim(mark, CLAIM, None)
        for step in (10, 20, 30):
            images = []
            for rank in range(2):
                key = image_key(self.generation(step), rank)
                archive.store.upload(key, memoryview(bytes(100)))
                images.append(StoredImage(rank, rank, 0, key, 100, f"{rank:016x}"))
            created = rfc3339(time.time() - 1000 + step)
            archive.commit(Manifest(mark, self.generation(step), step, 2, 1, created, tuple(images), ABOUT), CLAIM)
        return self


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path / "store").fill()


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trainctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs ``trainctl checkpoints ...`` here: exit status, output, complaints."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["trainctl", "checkpoints", *arguments])
        with pytest.raises(SystemExit) as ended:
            run()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return call


def of_json(answer: tuple[int, str, str]) -> dict[str, Any]:
    assert answer[0] == 0, answer
    found: dict[str, Any] = json.loads(answer[1])
    return found


def rows(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_ls_lists_the_newest_first(job: Job, trainctl: Command) -> None:
    status, text, _ = trainctl("ls", job.url)
    assert status == 0
    head, names, *lines = rows(text)
    assert head[:4] == ["3", "checkpoints", "of", "default/first"]
    assert names == ["STEP", "GENERATION", "AGE", "SIZE", "RANKS", "PINNED", "STATE"]
    assert [(line[0], line[1], line[-1]) for line in lines] == [
        (str(step), str(job.generation(step)), "ok") for step in (30, 20, 10)
    ]
    found = of_json(trainctl("ls", job.url, "--json"))
    assert found["claim"] == CLAIM.to_json()
    newest = found["checkpoints"][0]
    assert 960 < newest.pop("age_s") < 1060
    assert {k: v for k, v in newest.items() if k != "created"} == {
        **{"step": 30, "generation": str(job.generation(30)), "bytes": 200, "ranks": 2},
        **{"pinned": False, "state": "ok", "reason": None},
    }


def test_ls_says_what_is_wrong_with_a_checkpoint(job: Job, trainctl: Command) -> None:
    job.archive().quarantine(job.generation(20), "block 7 does not verify")
    (job.folder / image_key(job.generation(30), 1)).unlink()
    (job.folder / "manifests" / f"{job.generation(10)}.json").write_text("{}")
    found = of_json(trainctl("ls", job.url, "--json"))["checkpoints"]
    assert [(row["step"], row["state"], row["ranks"]) for row in found] == [
        (30, "incomplete", None),
        (10, "incomplete", None),
        (20, "quarantined", None),
    ]
    assert "rank-00001.safetensors is missing" in found[0]["reason"]
    assert "is damaged" in found[1]["reason"]
    assert "quarantined: block 7 does not verify" in trainctl("ls", job.url)[1]


def test_of_a_store_ls_lists_the_jobs_and_the_rest_names_them(job: Job, trainctl: Command) -> None:
    other = Job(job.root, "second").fill()
    above = f"file://{job.root}"
    assert [row["url"] for row in of_json(trainctl("ls", above, "--json"))["jobs"]] == [job.url, other.url]
    _, first, second = rows(trainctl("ls", above)[1])
    assert (first, second) == ([job.url, "3", "600", "B", "30"], [other.url, "3", "600", "B", "30"])
    for command in ("show", "gc", "pin", "unpin", "verify"):
        status, _, complaint = trainctl(command, above)
        assert status == 2
        assert job.url in complaint
        assert other.url in complaint


def test_into_a_pipe_nothing_is_cut_off(job: Job, trainctl: Command) -> None:
    reason = "block 7 does not verify; " * 20
    job.archive().quarantine(job.generation(20), reason)
    text = output_of(trainctl, "ls", job.url)
    assert f"quarantined: {reason.strip()}" in text
    assert "PINNED   STATE" in text


def test_a_head_that_cannot_be_read_hides_no_other_job(job: Job, trainctl: Command) -> None:
    other = Job(job.root, "second").fill()
    (job.folder / "head.json").write_text("{}")
    text = output_of(trainctl, "ls", f"file://{job.root}")
    assert other.url in text
    assert f"{job.url}/head.json cannot be read" in text
    found = of_json(trainctl("ls", f"file://{job.root}", "--json"))
    assert [row["url"] for row in found["jobs"]] == [other.url]
    assert [row["url"] for row in found["unreadable"]] == [job.url]
    assert "cannot be read" in found["unreadable"][0]["reason"]


def test_what_there_is_one_of_is_told_so(job: Job, trainctl: Command) -> None:
    garbage(job, 90000)
    assert "1 object of 4.9 KiB and 0 unfinished uploads would be removed" in output_of(trainctl, "gc", job.url)
    lone = Archive(open_store(f"file://{job.root}/default/lone"))
    lone.claim(JobMark("default", "lone", "me"), CLAIM, None)
    lone.store.upload(image_key(job.generation(5), 0), memoryview(bytes(100)))
    images = (StoredImage(0, 0, 0, image_key(job.generation(5), 0), 100, "0" * 16),)
    mark = JobMark("default", "lone", "me")
    lone.commit(Manifest(mark, job.generation(5), 5, 1, 1, rfc3339(time.time()), images, ABOUT), CLAIM)
    assert output_of(trainctl, "ls", lone.url).startswith("1 checkpoint of default/lone")
    assert "1: 1 node x 1" in output_of(trainctl, "show", lone.url)


def test_json_is_for_what_was_found_and_not_for_errors(job: Job, trainctl: Command) -> None:
    status, text, complaint = trainctl("verify", job.url, "15", "--json")
    assert (status, text) == (2, "")
    assert complaint.startswith("trainctl: ")
    assert "no checkpoint of step 15" in complaint
    status, text, complaint = trainctl("verify", job.url, "10", "--json")
    assert (status, complaint) == (1, ""), "that something is wrong is what was found"
    assert len(json.loads(text)["problems"]) == 2


def test_show_tells_the_manifest(job: Job, trainctl: Command) -> None:
    text = trainctl("show", job.url, "20")[1]
    for part in (str(job.generation(20)), "2 nodes x 1", "mesh.shape", "c0ffee", image_key(job.generation(20), 1)):
        assert part in text
    assert of_json(trainctl("show", job.url, "--json"))["step"] == 30
    assert of_json(trainctl("show", f"{job.url}@10", "--json"))["about"] == ABOUT
    assert of_json(trainctl("show", f"{job.url}@10", "10", "--json"))["step"] == 10


def test_pins_are_set_and_taken_away(job: Job, trainctl: Command) -> None:
    assert "is pinned" in trainctl("pin", job.url, "10")[1]
    assert [entry.pinned for entry in job.archive().require_head().line] == [True, False, False]
    assert of_json(trainctl("pin", job.url, "--json"))["step"] == 30
    assert of_json(trainctl("unpin", job.url, "10", "--json"))["pinned"] is False
    assert [entry.pinned for entry in job.archive().require_head().line] == [False, False, True]


def garbage(job: Job, age_s: float) -> Path:
    """An image of a generation that no manifest names."""
    path = job.folder / image_key(job.generation(40), 0)
    path.parent.mkdir()
    path.write_bytes(bytes(5000))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_gc_shows_first_and_removes_when_told(job: Job, trainctl: Command) -> None:
    assert "there is no garbage" in trainctl("gc", job.url)[1]
    path = garbage(job, 90000)
    text = trainctl("gc", job.url)[1]
    assert "4.9 KiB" in text
    assert image_key(job.generation(40), 0) in text
    assert "--delete" in text
    assert path.exists()
    found = of_json(trainctl("gc", job.url, "--delete", "--json"))
    assert found["objects"] == [{"key": image_key(job.generation(40), 0), "bytes": 5000}]
    assert not path.exists()
    assert of_json(trainctl("ls", job.url, "--json"))["checkpoints"][0]["state"] == "ok"


def test_gc_leaves_alone_what_may_be_under_way(job: Job, trainctl: Command) -> None:
    path = garbage(job, UPLOAD_S + 600)
    trainctl("gc", job.url, "--delete")
    assert path.exists(), "younger than the day that is the default"
    trainctl("gc", job.url, "--delete", "--grace", "5m")
    assert not path.exists()


def test_the_command_leaves_alone_what_the_archive_does() -> None:
    assert parse_duration(GRACE) == GRACE_S > UPLOAD_S


def test_gc_tells_of_uploads_that_were_never_ended(job: Job, trainctl: Command) -> None:
    draft = job.folder / ".drafts" / f"0011+{job.generation(50)}%2Frank-00000.safetensors"
    draft.write_bytes(b"half")
    os.utime(draft, (time.time() - 90000,) * 2)
    assert "never ended" in trainctl("gc", job.url)[1]
    assert draft.exists()
    assert len(of_json(trainctl("gc", job.url, "--delete", "--json"))["unfinished"]) == 1
    assert not draft.exists()


def test_without_a_head_everything_names_the_remedy(job: Job, trainctl: Command) -> None:
    (job.folder / "head.json").unlink()
    for command in ("ls", "show", "verify", "pin", "unpin", "gc"):
        status, _, complaint = trainctl(command, job.url)
        assert status == 2
        assert f"trainctl checkpoints repair {job.url}" in complaint
    assert f"trainctl checkpoints repair {job.url}" in trainctl("ls", f"file://{job.root}")[1]
    assert of_json(trainctl("ls", f"file://{job.root}", "--json"))["headless"] == [job.url]


def test_repair_needs_images_that_verify(job: Job, trainctl: Command) -> None:
    """Those here are none: all go into quarantine, with nothing written until told."""
    head = job.folder / "head.json"
    assert "nothing is to be repaired" in output_of(trainctl, "repair", job.url)
    head.unlink()
    said = output_of(trainctl, "repair", job.url)
    assert "add --write" in said
    assert "step 20 goes into quarantine" in said
    assert not head.exists()
    assert "head.json is written" in output_of(trainctl, "repair", job.url, "--write")
    assert [row["state"] for row in of_json(trainctl("ls", job.url, "--json"))["checkpoints"]] == ["quarantined"] * 3


def output_of(trainctl: Command, *arguments: str) -> str:
    status, text, complaint = trainctl(*arguments)
    assert status == 0, complaint
    return text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "URL", "15"], "no checkpoint of step 15"),
        (["pin", "URL", "15"], "no checkpoint of step 15"),
        (["ls", "file:///nowhere/at/all"], "holds no checkpoints"),
        (["show", "ftp://x/y"], "is no store: write s3://bucket/prefix or file:///folder"),
        (["gc", "URL", "--grace", "soon"], "--grace"),
        (["ls", "URL@10"], "checkpoints ls takes no step: write file:///"),
        (["gc", "URL@10"], "checkpoints gc takes no step: write file:///"),
        (["repair", "URL@10"], "checkpoints repair takes no step: write file:///"),
        (["show", "URL@10", "20"], "@10 names step 10, and step 20 was given too"),
        (["ls", "file://"], '"file://" is no absolute folder: write file:///folder'),
        (["ls", "file://host/x"], '"file://host/x" is no absolute folder: write file:///folder; did you mean'),
        (["ls", "s3://"], 's3://: "" is no bucket'),
        (["ls", "s3:///x"], 's3:///x: "" is no bucket'),
        (["ls", "/nowhere/at/all"], '"/nowhere/at/all" is no store: write s3://'),
        (["export", "URL"], "--to"),
        (["export", "URL", "--to", "x", "--format", "onnx"], "onnx"),
        (["ls"], "Missing argument"),
        (["mend", "URL"], "No such command"),
    ],
)
def test_wrong_requests_end_with_2_and_a_reason(job: Job, trainctl: Command, arguments: list[str], said: str) -> None:
    status, _, complaint = trainctl(*(word.replace("URL", job.url) for word in arguments))
    assert status == 2
    assert said in complaint


def test_a_store_that_refuses_is_a_wrong_request(job: Job, trainctl: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, complaint = trainctl("ls", f"file://{tmp_path}/file/default/first")
    assert status == 2
    assert "file" in complaint


@pytest.mark.parametrize(("variable", "value"), [("AWS_ENDPOINT_URL", "localhost:9000"), ("AWS_PROFILE", "nope")])
def test_a_configuration_that_cannot_be_used_is_a_wrong_request(
    trainctl: Command, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    status, _, complaint = trainctl("ls", "s3://bucket/default/first")
    assert status == 2
    assert value in complaint
    assert "check the S3 configuration (AWS_ENDPOINT_URL" in " ".join(complaint.split())


def test_a_damaged_head_is_a_failure(job: Job, trainctl: Command) -> None:
    (job.folder / "head.json").write_text("{}")
    status, _, complaint = trainctl("ls", job.url)
    assert status == 1
    assert "head.json cannot be read" in complaint


def test_amounts_are_for_people() -> None:
    assert [amount(size) for size in (0, 1023, 1024, 5 << 30, 3 << 40)] == ["0 B", "1023 B", "1.0 KiB", "5.0 GiB", "3.0 TiB"]  # fmt: skip
    assert [ago(seconds) for seconds in (3, 600, 10800, 432000)] == ["3 s", "10 min", "3.0 h", "5.0 d"]


def test_a_store_that_does_not_answer_is_named_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, trainctl: Command
) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setattr("trainctl.catalogue.PATIENCE_S", 1.0)
    for name, value in (
        ("ENDPOINT_URL", f"http://127.0.0.1:{port}"),
        ("ACCESS_KEY_ID", "a"),
        ("SECRET_ACCESS_KEY", "b"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    status, _, told = trainctl("ls", "s3://bucket/research/bytelm")
    assert status == 1
    assert told.count("s3://bucket/research/bytelm is waited for, 1 s at most: ") == 1, told
