"""The command line: help, refusals, exit statuses, and how a run is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from outlast.api import TrainingJob, load
from outlast.checkpoint.archive import Archive
from outlast.checkpoint.manifest import ClaimMark, Entry, Head, JobMark, job_url, manifest_key
from outlast.checkpoint.store import open_store
from outlast.errors import RequestError
from outlast.local.storecheck import identity_of
from outlast.snapshot.identity import Generation
from trainctl.jobs import _with_value
from trainctl.live import JsonView, PlainView
from trainctl.status import event_line, summarize

JOB = """
apiVersion: outlast.dev/v1alpha1
kind: TrainingJob
metadata: {name: small}
spec:
  entrypoint: [python, -c, pass]
  workers: {replicas: 2, spares: 1}
"""

ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
"""The child finds what this process finds, installed or not."""

STATUS: dict[str, Any] = {
    "phase": "Running",
    "step": 20,
    "total": 60,
    "attempt": 2,
    "metrics": {"loss": 1.23456},
    "nodes": {"node-0": {"state": "active"}, "node-1": {"state": "active"}, "node-2": {"state": "spare"}},
    "workers": {"ready": 3, "wanted": 2, "spares": 1},
    "goodput": {"ratio": 0.5},
}


def _trainctl(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from trainctl.main import run; run()", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENV, text=True, capture_output=True, timeout=60, check=False)


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB)
    return path


def test_help_names_the_options_and_is_quick(tmp_path: Path) -> None:
    took = []
    for _ in range(3):
        began = os.times()
        assert _trainctl(["--help"], tmp_path).returncode == 0
        ended = os.times()
        took.append(ended.children_user + ended.children_system - began.children_user - began.children_system)
    assert min(took) < 0.3, "seconds of processor: what else the machine does is not its fault"
    text = _trainctl(["run", "--help"], tmp_path).stdout
    for option in ("--dir", "--fault", "--set", "--replace-after", "--resume", "--json", "node-leave", "node-join"):
        assert option in text


def test_help_imports_nothing_heavy() -> None:
    heavy = ("rich", "pydantic", "yaml", "torch", "ray", "boto3", "outlast.checkpoint", "outlast.snapshot")
    code = f"import sys, trainctl.main; print([name for name in {heavy} if name in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=ENV, text=True, capture_output=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run"], "Missing argument"),
        (["submit"], "Missing argument"),
        (["submit", "--"], "Missing argument"),
        (["run", "absent.yaml"], "absent.yaml: No such file or directory"),
        (["run", "job.yaml", "--fault", "explode@3"], "unknown kind explode"),
        (["run", "job.yaml", "--fault", "rank-crash@3:2"], "the job has ranks 0 to 1"),
        (["run", "job.yaml", "--replace-after", "soon"], "--replace-after soon: a number of seconds"),
        (["run", "job.yaml", "--replace-after", "nan"], "--replace-after nan: a number of seconds"),
        (["run", "job.yaml", "--set", "spec.workers.replicas=0"], "spec.workers.replicas"),
        (["run", "job.yaml", "--set", "spec.entrypoint=[python, nowhere.py]"], "there is no nowhere.py"),
        (["run", "job.yaml", "--set", "spec.entrypoint=[nosuchprogram]"], "there is no program nosuchprogram on PATH"),
        (["run", "job.yaml", "--set", "spec.entrypoint=[./nosuch]"], "/nosuch (ranks start in the job file's folder)"),
        (["run", "job.yaml", "--set", "spec.entrypoint=[./job.yaml]"], "job.yaml is not executable: chmod +x it"),
        (
            ["run", "job.yaml", "--set", "spec.entrypoint=[sh]", "--set", "spec.env=[{name: PATH, value: bin}]"],
            "there is no program sh on PATH",
        ),
        (["run", "job.yaml", "--resume"], "no spec.checkpoint"),
        (["run", "job.yaml", "--dir", "."], "it is not empty"),
        (["run", "job.yaml", "--dir", "job.yaml/x"], "Not a directory"),
        (["walk"], "No such command"),
    ],
)
def test_wrong_requests_end_with_2_and_a_reason(job: Path, arguments: list[str], said: str) -> None:
    done = _trainctl(arguments, job.parent)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert list(job.parent.iterdir()) == [job], "a refused request leaves nothing"


@pytest.mark.parametrize(("text", "said"), [("a: [", "this is no YAML at line 1"), ("", "the file is empty")])
def test_a_file_that_holds_no_job_is_named(job: Path, text: str, said: str) -> None:
    job.write_text(text)
    assert f"trainctl: job.yaml: {said}" in _trainctl(["run", "job.yaml"], job.parent).stderr


def test_programs_are_found_where_ranks_find_them(job: Path) -> None:
    """What is refused here is the folder alone, which is looked at after the program."""
    (job.parent / "bin").mkdir()
    for name in ("train", "bin/prepare"):
        (job.parent / name).write_text("#!/bin/sh\n")
        (job.parent / name).chmod(0o755)
    path = ["--set", "spec.env=[{name: PATH, value: bin}]"]
    for options in (["--set", "entrypoint=[./train]"], ["--set", "entrypoint=[prepare]", *path], path):
        assert "it is not empty" in _trainctl(["run", "job.yaml", "--dir", ".", *options], job.parent).stderr


def test_a_run_says_that_it_does_not_heed_suspend(job: Path) -> None:
    told = [
        _trainctl(["run", "job.yaml", "--dir", ".", *more], job.parent).stderr
        for more in ((), ("--set", "suspend=true"))
    ]
    assert ["spec.suspend" in text for text in told] == [False, True]


def test_the_version_is_the_packages(job: Path) -> None:
    done = _trainctl(["--version"], job.parent)
    assert (done.returncode, done.stdout) == (0, f"trainctl {version('outlast')}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["submit", "job.yaml", "--dry-run"]])
def test_output_that_nobody_takes_is_told_in_a_line(job: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", "from trainctl.main import run; run()", *arguments]
    run: dict[str, Any] = {"cwd": job.parent, "env": ENV, "text": True, "stderr": subprocess.PIPE, "timeout": 60}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, check=False, **run)
    assert (done.returncode, done.stderr) == (1, "trainctl: standard output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        done = subprocess.run(command, stdout=closed, check=False, **run)
    assert (done.returncode, done.stderr) == (1, ""), "who reads has gone: there is nothing to say"


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (["--dry-run"], "client"),
        (["--dry-run", "client"], "client"),
        (["--dry-run", "server", "--name", "x"], "server"),
        (["--dry-run", "job.yaml"], "client"),
        (["--dry-run=none", "client"], "none"),
    ],
)
def test_a_dry_runs_value_is_no_argument_of_the_script(words: list[str], taken: str) -> None:
    given = list(_with_value(words))
    assert given[0] == f"--dry-run={taken}"
    assert given[1:] == [word for word in words[1:] if word != taken]


def test_summary_of_a_status() -> None:
    committed = {"step": 16, "age_s": 3.2}
    durable = {"step": 10, "age_s": 40.6}
    status = {**STATUS, "snapshot": {"committed": committed}, "checkpoint": {"committed": durable}}
    summary = dict(summarize(status).rows())
    assert summary == {
        "phase": "Running",
        "step": "20/60",
        "loss": "1.2346",
        "nodes": "2/2 active, 1 spare",
        "attempt": "2",
        "snapshot": "step 16, 3 s ago",
        "checkpoint": "step 10, 41 s ago",
        "goodput": "50.0%",
    }


def test_summary_of_nothing_is_dashes() -> None:
    assert {value for _, value in summarize({}).rows()} == {"-"}
    assert event_line({}) == "event: "


def test_plain_lines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with PlainView(tmp_path) as view:
        view.show({"type": "progress", "text": "starting"})
        view.show({"type": "event", "event": {"kind": "restart", "text": "rank 1 died"}})
        view.show({"type": "status", "status": STATUS})
        view.show({"type": "end", "text": "done"})
    lines = [line.split("s  ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines == [f"everything of this run goes to {tmp_path}", "starting", "restart: rank 1 died", "done"]


def test_json_lines_are_passed_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with JsonView(tmp_path) as view:
        view.show({"type": "end", "exit": 0})
    assert capsys.readouterr().out.splitlines()[1] == '{"type": "end", "exit": 0}'


def _stored_job(tmp_path: Path, uid: str | None = None) -> TrainingJob:
    overrides = [f"spec.checkpoint.url=file://{tmp_path}/store"] + ([f"metadata.uid={uid}"] if uid else [])
    return load(JOB, overrides)


def _put_head(tmp_path: Path, steps: Sequence[int]) -> str:
    """A head of another run of the same job, with checkpoints of these steps; returns their URL."""
    url = job_url(f"file://{tmp_path}/store", "default", "small")
    archive = Archive(open_store(url))
    claim = ClaimMark(1, "ab" * 8, "controller")
    generations = [Generation(1, step, "ab" * 8) for step in steps]
    line = tuple(Entry(g, g.step, manifest_key(g), "0" * 64, 10, "2026-01-01T00:00:00Z") for g in generations)
    archive.store.put("head.json", Head(JobMark("default", "small", "theirs"), claim, line).to_text().encode())
    return url


def test_a_job_without_checkpoints_in_its_store_gets_a_mark_of_its_own(tmp_path: Path) -> None:
    said: list[str] = []
    first, second = (identity_of(_stored_job(tmp_path), False, said.append) for _ in range(2))
    assert len(first) == len(second) == 32
    assert first != second
    assert identity_of(_stored_job(tmp_path, "of-kubernetes"), False, said.append) == "of-kubernetes"
    assert identity_of(load(JOB), False, said.append)
    assert said == []


def test_checkpoints_are_gone_on_from_only_when_asked(tmp_path: Path) -> None:
    url, said = _put_head(tmp_path, [10, 20]), list[str]()
    with pytest.raises(RequestError, match=r"the newest of step 20: go on from them with --resume"):
        identity_of(_stored_job(tmp_path), False, said.append)
    assert identity_of(_stored_job(tmp_path), True, said.append) == "theirs"
    assert said == [f"going on from the newest of step 20 at {url}"]
    job = _stored_job(tmp_path)
    wanted = job.spec.checkpoint
    assert wanted is not None
    spec = job.spec.model_copy(update={"checkpoint": wanted.model_copy(update={"resume": True})})
    assert identity_of(job.model_copy(update={"spec": spec}), False, said.append) == "theirs"


def test_a_store_without_checkpoints_lets_a_job_start_afresh(tmp_path: Path) -> None:
    said: list[str] = []
    identity_of(_stored_job(tmp_path), True, said.append)
    _put_head(tmp_path, [])
    assert identity_of(_stored_job(tmp_path), True, said.append) == "theirs"
    assert all(line.endswith("starting afresh") for line in said)
    assert len(said) == 2


def test_a_run_that_has_no_checkpoint_yet_is_not_stopped_by_another(tmp_path: Path) -> None:
    _put_head(tmp_path, [])
    with pytest.raises(RequestError, match=r"has made no checkpoint.*begin in its place with --resume"):
        identity_of(_stored_job(tmp_path), False, lambda _: None)
    assert identity_of(_stored_job(tmp_path, "of-kubernetes"), False, lambda _: None) == "of-kubernetes"


def test_a_run_that_gave_its_place_back_is_no_obstacle(tmp_path: Path) -> None:
    url = _put_head(tmp_path, [])
    archive = Archive(open_store(url))
    claim = archive.require_head().claim
    assert claim is not None
    archive.release(claim)
    marks = {identity_of(_stored_job(tmp_path), False, lambda _: None) for _ in range(2)}
    assert len(marks | {"theirs"}) == 3, "two runs that begin now are not taken for one"


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("nowhere", "holds no checkpoints"),
        ("store@9", "holds no checkpoints"),
        ("store/default/small@7", "no checkpoint of step 7"),
    ],
)
def test_what_is_to_be_begun_with_is_looked_for_before_anything_starts(
    tmp_path: Path, reference: str, told: str
) -> None:
    _put_head(tmp_path / "other", [5])
    there = f"file://{tmp_path}/other/{reference}"
    job = _stored_job(tmp_path)
    assert job.spec.checkpoint is not None
    spec = job.spec.model_copy(update={"checkpoint": job.spec.checkpoint.model_copy(update={"restore_from": there})})
    with pytest.raises(RequestError, match=f"spec.checkpoint.restoreFrom .*{told}"):
        identity_of(job.model_copy(update={"spec": spec}), False, lambda _: None)


@pytest.mark.parametrize("resume", [True, False])
def test_checkpoints_whose_head_was_lost_are_not_begun_over(tmp_path: Path, resume: bool) -> None:
    url = _put_head(tmp_path, [10])
    store = open_store(url)
    store.put(manifest_key(Generation(1, 10, "ab" * 8)), b"{}")
    store.delete(["head.json"])
    with pytest.raises(RequestError, match=f"no head.json.*trainctl checkpoints repair {url}"):
        identity_of(_stored_job(tmp_path), resume, lambda _: None)


def test_a_refused_run_says_why_and_leaves_nothing(job: Path, tmp_path: Path) -> None:
    _put_head(tmp_path, [10])
    before = sorted(tmp_path.rglob("*"))
    options = ["--set", f"spec.checkpoint.url=file://{tmp_path}/store"]
    done = _trainctl(["run", "job.yaml", *options, "--dir", "run"], job.parent)
    assert done.returncode == 2, done.stderr
    assert "go on from them with --resume" in done.stdout
    assert sorted(path for path in tmp_path.rglob("*") if path.name != "run") == before
    assert list((tmp_path / "run").iterdir()) == []
