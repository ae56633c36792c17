"""What a Pod's processes decide without Kubernetes: settings, threads, heads to join, registering, holding, output."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast import kube
from outlast.clock import ManualClock
from outlast.errors import OutlastError, RequestError, TransferError
from outlast.pod import process, ranklogs
from outlast.pod.console import Console, line_of
from outlast.pod.cpu import cpu_limit, rank_threads, share
from outlast.pod.head import HeadPod, controller_config, is_held, worth_holding
from outlast.pod.ranklogs import LONGEST_LINE, MOST_BEHIND, RESUME, Lines, RankLogs
from outlast.pod.raycare import DOUBT_S, Find, Joined, RayCare, pick_head, why_part
from outlast.pod.registration import AGAIN_S, Registered, Standing, concern, must_register, standing_of
from outlast.pod.settings import Folders, head_settings, node_settings
from support.pods import free_port, until

VARIABLES = {kube.POD_VARIABLE: "j-node-1", kube.POD_IP_VARIABLE: "10.0.0.1", kube.HEAD_VARIABLE: "j-head.default.svc"}
JOB = {
    "apiVersion": "outlast.dev/v1alpha1",
    "kind": "TrainingJob",
    "metadata": {"name": "j", "uid": "the-uid"},
    "spec": {"entrypoint": ["python", "train.py"]},
}


# --- settings -------------------------------------------------------------------------------------------------------


def test_a_pod_is_told_by_variables_and_arguments() -> None:
    told = node_settings([], {**VARIABLES, kube.MACHINE_VARIABLE: "m-1", kube.GRACE_VARIABLE: "45"})
    assert (told.own.pod, told.own.ip, told.own.grace_s) == ("j-node-1", "10.0.0.1", 45)
    assert (told.head, told.machine, told.port) == ("j-head.default.svc", "m-1", kube.NODE_PORT)
    assert told.own.folders == Folders(
        pathlib.Path("/etc/outlast"), pathlib.Path("/run/outlast"), pathlib.Path("/dev/shm")
    )
    head = head_settings(["--run-folder", "/r", "--gcs-port", "7"], VARIABLES)
    assert (head.folders.run, head.gcs_port, head.controller_port) == (pathlib.Path("/r"), 7, kube.CONTROLLER_PORT)
    assert head.grace_s == kube.GRACE_S


@pytest.mark.parametrize("missing", [kube.POD_VARIABLE, kube.POD_IP_VARIABLE, kube.HEAD_VARIABLE])
def test_a_variable_that_is_missing_is_named(missing: str) -> None:
    with pytest.raises(RequestError, match=missing):
        node_settings([], {name: value for name, value in VARIABLES.items() if name != missing})


def test_a_grace_that_is_no_number_is_refused() -> None:
    with pytest.raises(RequestError, match=kube.GRACE_VARIABLE):
        head_settings([], {**VARIABLES, kube.GRACE_VARIABLE: "soon"})


def test_a_secret_that_is_not_there_or_holds_no_job_is_refused(tmp_path: pathlib.Path) -> None:
    folders = Folders(tmp_path, tmp_path, tmp_path)
    with pytest.raises(RequestError, match=r"job.json cannot be read.*Secret"):
        folders.read_job()
    with pytest.raises(RequestError, match="token cannot be read"):
        folders.read_token()
    (tmp_path / kube.JOB_KEY).write_text("{}")
    with pytest.raises(RequestError, match="holds no TrainingJob"):
        folders.read_job()


def test_the_controller_waits_for_nodes_and_is_marked_by_the_jobs_uid(tmp_path: pathlib.Path) -> None:
    (tmp_path / kube.JOB_KEY).write_text(json.dumps(JOB))
    settings = head_settings(["--job-folder", str(tmp_path), "--run-folder", "/r"], VARIABLES)
    config = controller_config(settings, settings.folders.read_job())
    assert (config.patient, config.store_identity, config.resume) == (True, "the-uid", False)
    assert (config.host, config.http_port, config.dir) == ("0.0.0.0", kube.CONTROLLER_PORT, "/r/job")
    assert config.token_file == str(tmp_path / kube.TOKEN_KEY)


# --- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
        ({"cpu.max": "nonsense\n"}, None),
        ({}, None),
    ],
)
def test_the_containers_cpu_limit(tmp_path: pathlib.Path, files: dict[str, str], limit: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_limit(tmp_path) == limit


def test_threads_follow_the_limit_and_not_more_cores_than_there_are(tmp_path: pathlib.Path) -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_threads(1, tmp_path) == cores
    (tmp_path / "cpu.max").write_text("100000 100000")
    assert rank_threads(1, tmp_path) == 1
    (tmp_path / "cpu.max").write_text("6400000 100000")
    assert rank_threads(1, tmp_path) == cores
    assert [share(8, 2), share(1.5, 1), share(0.5, 1), share(2, 3)] == [4, 1, 1, 1]


# --- the head in force ----------------------------------------------------------------------------------------------

HERE = Joined("10.0.0.9", "session-1", "node-1-abc")


@pytest.mark.parametrize(
    ("current", "found", "picked"),
    [
        (None, (), None),
        (None, ("10.0.0.9", "10.0.0.8"), "10.0.0.9"),
        ("10.0.0.8", ("10.0.0.8", "10.0.0.9"), "10.0.0.8"),
        ("10.0.0.8", ("10.0.0.9",), "10.0.0.9"),
        ("10.0.0.8", (), "10.0.0.8"),
    ],
)
def test_which_head_to_belong_to(current: str | None, found: Sequence[str], picked: str | None) -> None:
    assert pick_head(current, found) == picked


@pytest.mark.parametrize(
    ("head", "session", "alive", "why"),
    [
        ("10.0.0.9", "session-1", True, ""),
        ("10.0.0.9", "", True, ""),
        ("10.0.0.9", "session-1", False, "raylet"),
        ("10.0.0.7", "session-1", True, "another head"),
        ("10.0.0.9", "session-2", True, "anew"),
    ],
)
def test_when_a_raylet_is_of_no_use(head: str, session: str, alive: bool, why: str) -> None:
    assert why in why_part(HERE, head, session, alive)
    assert bool(why_part(HERE, head, session, alive)) == bool(why)


class StubMember:
    """A raylet that joins whatever head it is told, unless that head is in ``refused``."""

    def __init__(self) -> None:
        self.refused: set[str] = set()
        self.joins: list[tuple[str, str]] = []
        self.session, self.kills, self.running = "", 0, False
        self.pids = (os.getpid(),)

    def alive(self) -> bool:
        return self.running

    async def join(self, address: str, resource: str) -> None:
        if address in self.refused:
            raise OutlastError("Ray did not start")
        self.joins.append((address, resource))
        self.session, self.running = f"session-of-{len(self.joins)}", True

    async def kill(self) -> None:
        self.kills += 1
        self.running = False


async def until_true(condition: Any, what: str) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
    assert condition(), what


@asynccontextmanager
async def cared(out: pathlib.Path, find: Find) -> AsyncIterator[tuple[RayCare, StubMember, int]]:
    """A node's care for its Ray, where every address has a head at that port."""
    server = await asyncio.start_server(lambda _, writer: writer.close(), "0.0.0.0", port := free_port())
    member, console = StubMember(), Console(os.open(out, os.O_CREAT | os.O_WRONLY), {})
    care = RayCare(member, "head", port, "n", console, find)  # type: ignore[arg-type]
    task = asyncio.create_task(care.run())
    try:
        yield care, member, port
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()
        console.close()


def test_a_node_follows_the_head_wherever_its_name_leads(tmp_path: pathlib.Path) -> None:
    """No address at first, then one, then another; then Ray is started anew under the same."""
    found: list[str] = []

    async def find(_: str) -> Sequence[str]:
        return tuple(found)

    async def story() -> None:
        async with cared(tmp_path / "out", find) as (care, member, port):
            await asyncio.sleep(0.1)
            assert care.joined is None
            found.append("127.0.0.1")
            await until_true(lambda: care.joined, "joined")
            first = care.joined
            care.trust("session-of-1")
            found[:] = ["127.0.0.2"]
            care.doubt()
            await until_true(lambda: len(member.joins) == 2 and care.joined, "joined the other")
            care.trust("session-of-2")
            assert [address for address, _ in member.joins] == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
            assert care.joined != first
            assert member.joins[0][1] != member.joins[1][1], "an agent is never made in a raylet of before"
            care.trust("another-session")
            await until_true(lambda: len(member.joins) == 3, "joined the new Ray")

    asyncio.run(story())
    assert "127.0.0.2" in (tmp_path / "out").read_text()


def test_a_name_server_that_is_silent_does_not_keep_a_node_from_its_head(tmp_path: pathlib.Path) -> None:
    """The head's address is known; its raylet ends while no name is answered."""
    asked: list[asyncio.Future[Sequence[str]]] = []

    async def find(_: str) -> Sequence[str]:
        asked.append(asyncio.get_running_loop().create_future())
        return ["127.0.0.1"] if len(asked) == 1 else await asked[-1]

    async def story() -> None:
        async with cared(tmp_path / "out", find) as (care, member, _):
            await until_true(lambda: care.joined, "joined")
            member.running = False
            care.doubt()
            await until_true(lambda: len(member.joins) == 2, "joined again")
            await asyncio.sleep(3 * DOUBT_S)
            assert len(asked) == 2, "and one question at a time"

    asyncio.run(story())


# --- registering ----------------------------------------------------------------------------------------------------


def standing(**changes: Any) -> Standing:
    fields: dict[str, Any] = {"controller": "c", "session": "session-1", "seq": 3, "state": None, "outcome": None}
    return Standing(**{**fields, **changes})


BEFORE = Registered("c", HERE, at=100.0)


@pytest.mark.parametrize(
    ("found", "before", "now", "expected"),
    [
        (standing(), None, 100.0, True),
        (standing(), BEFORE, 100.0 + AGAIN_S - 0.1, False),
        (standing(), BEFORE, 100.0 + AGAIN_S, True),
        (standing(state="joining"), BEFORE, 900.0, False),
        (standing(state="active"), BEFORE, 900.0, False),
        (standing(state="leaving"), BEFORE, 900.0, False),
        (standing(state="lost"), BEFORE, 900.0, True),
        (standing(state="left"), BEFORE, 900.0, False),
        (standing(state="active", controller="d"), BEFORE, 100.0, True),
        (standing(state="active"), Registered("c", Joined("10.0.0.9", "session-1", "node-1-def"), 100.0), 100.1, True),
        (standing(session="session-2"), None, 100.0, False),
        (standing(session=""), None, 100.0, True),
        (standing(outcome="succeeded"), None, 100.0, False),
    ],
)
def test_when_a_node_is_registered(found: Standing, before: Registered | None, now: float, expected: bool) -> None:
    assert must_register(found, HERE, before, now) is expected


def test_a_standing_out_of_a_status() -> None:
    status = {"controller": "c", "ray": "s", "seq": 7, "outcome": None, "nodes": {"a": {"state": "active"}}}
    assert standing_of(status, "a") == Standing("c", "s", 7, "active", None)
    assert standing_of(status, "b") == Standing("c", "s", 7, None, None)
    assert standing_of({"controller": "c"}, "a") == Standing("c", "", 0, None, None)


def test_which_events_concern_a_node() -> None:
    assert concern([{"kind": "finished", "fields": {}}], "a")
    assert concern([{"kind": "controller-started"}], "a")
    assert concern([{"kind": "snapshot-committed"}, {"kind": "node-lost", "fields": {"node": "a"}}], "a")
    assert not concern([{"kind": "node-lost", "fields": {"node": "b"}}, {"kind": "start"}], "a")


# --- holding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "states", "outcome", "expected"),
    [
        ("running", ("active", "active"), None, True),
        ("running", ("leaving", "active"), None, True),
        ("running", ("leaving", "leaving"), None, False),
        ("starting", ("active", "active"), None, False),
        ("succeeded", ("active", "active"), "succeeded", False),
        ("running", (), None, False),
    ],
)
def test_whether_a_hold_is_of_use(stage: str, states: Sequence[str], outcome: str | None, expected: bool) -> None:
    nodes = {str(number): {"state": state} for number, state in enumerate(states)}
    assert worth_holding({"stage": stage, "nodes": nodes, "outcome": outcome}) is expected


def test_when_ranks_are_held() -> None:
    assert is_held({"snapshot": {"held": True}})
    assert not is_held({"snapshot": {"held": False}})
    assert not is_held({})


# --- output ---------------------------------------------------------------------------------------------------------


def test_an_event_is_a_line_of_keys_and_values() -> None:
    line = line_of(0.5, "ray-joined", {"node": "n-1", "seconds": 1.23456, "why": 'a "b" c', "none": None, "empty": ""})
    assert line == ('time=1970-01-01T00:00:00.500Z event=ray-joined node=n-1 seconds=1.235 why="a \\"b\\" c" empty=""')
    assert "\n" not in line_of(0, "x", {"text": "two\nlines"})


def test_a_reader_that_does_not_read_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.pod.console.MOST_WAITING", 10)
    monkeypatch.setattr("outlast.pod.console._FLUSH_S", 0.05)
    reader, writer = os.pipe()
    console = Console(writer, {"node": "n"}, ManualClock())
    for number in range(5000):
        console.say("event", number=number, text="x" * 100)
    data = b""

    def read() -> None:
        nonlocal data
        while piece := os.read(reader, 1 << 16):
            data += piece

    reading = threading.Thread(target=read)
    reading.start()
    until(lambda: b"lines-dropped" in data, 10, "a line that says what was dropped")
    console.close()
    os.close(writer)
    reading.join(10)
    os.close(reader)
    lines = data.splitlines()
    told = sum(b"event=event" in line for line in lines)
    dropped = sum(int(line.split(b"lines=")[1].split()[0]) for line in lines if b"lines-dropped" in line)
    assert told + dropped == 5000


@given(st.lists(st.binary(max_size=50)), st.integers(0, 10**6))
def test_pieces_of_output_become_the_same_lines_however_they_are_cut(pieces: list[bytes], rank: int) -> None:
    whole = b"".join(pieces)
    lines = Lines(rank, 2)
    told = b"".join(lines.feed(piece) for piece in pieces) + lines.end()
    prefix = f"[rank {rank} attempt 2] ".encode()
    expected = whole.split(b"\n")[:-1] + ([whole.split(b"\n")[-1]] if whole.split(b"\n")[-1] else [])
    assert told == b"".join(prefix + line + b"\n" for line in expected)


def test_a_line_without_end_is_cut() -> None:
    lines = Lines(0, 1)
    told = lines.feed(b"x" * (2 * LONGEST_LINE + 5))
    assert told.count(b"\n") == 2
    assert lines.end() == b"[rank 0 attempt 1] xxxxx\n"


def test_a_line_is_cut_between_characters() -> None:
    lines = Lines(0, 1)
    told = lines.feed("€".encode() * LONGEST_LINE) + lines.end()
    assert "\ufffd" not in told.decode(errors="replace")
    text = told.replace(b"[rank 0 attempt 1] ", b"").replace(b"\n", b"").decode()
    assert text == "€" * LONGEST_LINE


class Followed:
    """A folder of ranks' files, followed."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.told = folder, b""
        self.logs = RankLogs(folder, self.write)

    def write(self, lines: bytes) -> None:
        self.told += lines

    def append(self, rank: int, attempt: int, data: bytes) -> None:
        with (self.folder / f"rank-{rank}.attempt-{attempt}.log").open("ab") as file:
            file.write(data)


def test_ranks_output_is_followed_across_attempts(tmp_path: pathlib.Path) -> None:
    followed = Followed(tmp_path)
    followed.append(0, 1, b"of the container before\n")
    followed.logs.start()
    followed.append(0, 1, b"last words")
    until(lambda: (tmp_path / "rank-0.attempt-1.log").exists(), 1, "the file")
    followed.append(0, 2, b"first\n")
    followed.append(1, 2, b"other\nhalf")
    until(lambda: b"first" in followed.told and b"last words" in followed.told, 10, "both attempts' lines")
    followed.append(1, 2, b" a line\n")
    followed.logs.close()
    assert sorted(followed.told.splitlines()) == [
        b"[rank 0 attempt 1] last words",
        b"[rank 0 attempt 2] first",
        b"[rank 1 attempt 2] half a line",
        b"[rank 1 attempt 2] other",
    ]


def test_a_rank_that_writes_without_end_is_passed_over_and_that_is_said(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranklogs, "EVERY_S", 0.01)
    followed = Followed(tmp_path)
    followed.logs.start()
    followed.append(0, 1, b"line\n" * (4 * MOST_BEHIND // 5))
    until(lambda: b"left out" in followed.told, 10, "a line that says what was left out")
    followed.append(0, 1, b"the end\n")
    followed.logs.close()
    assert len(followed.told) < 30 * RESUME
    assert followed.told.endswith(b"[rank 0 attempt 1] the end\n")


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranklogs, "EVERY_S", 0.01)
    followed = Followed(tmp_path)
    followed.logs.start()
    (tmp_path / "rank-1.attempt-1.log").symlink_to(tmp_path / "nowhere")
    followed.append(0, 1, b"first\n")
    until(lambda: b"first" in followed.told, 10, "the other file's line")
    broken = followed.logs._open["rank-0.attempt-1.log"]
    monkeypatch.setattr(broken, "advance", _gone)
    until(lambda: not followed.logs._open, 10, "it is given up")
    followed.append(2, 1, b"second\n")
    until(lambda: b"second" in followed.told, 10, "a later file's line")
    followed.logs.close()


def _gone() -> bytes:
    raise OSError(errno.EIO, "the volume is gone")


def test_files_of_long_past_attempts_are_removed(tmp_path: pathlib.Path) -> None:
    for attempt in range(1, 26):
        (tmp_path / f"rank-0.attempt-{attempt}.log").touch()
    (tmp_path / "keeper.node.log").touch()
    followed = Followed(tmp_path)
    followed.logs.start()
    followed.logs.close()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"keeper.node.log", *(f"rank-0.attempt-{attempt}.log" for attempt in range(6, 26))}


# --- the first process ------------------------------------------------------------------------------------------------

_IMPORTING = "import outlast.pod, time; print('imports', flush=True); time.sleep(60)"


@pytest.mark.skipif(os.geteuid() != 0, reason="a PID namespace needs root")
def test_a_first_process_that_is_told_to_go_while_it_imports_goes() -> None:
    """The kernel keeps a signal without a handler from process 1."""
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-P", "-c", _IMPORTING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as outer:
        assert outer.stdout is not None
        assert outer.stdout.readline() == "imports\n"
        (first,) = pathlib.Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
        os.kill(int(first), signal.SIGTERM)
        try:
            assert outer.wait(10) == 128 + signal.SIGTERM
        finally:
            outer.kill()


def test_what_the_machine_refuses_is_said_in_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "/run/outlast/s")

    assert process.run(work, Console(os.dup(1), {})) == 1
    told = capfd.readouterr()
    assert "event=failed" in told.out
    assert "/run/outlast/s" in told.out
    assert "Traceback" not in told.err


@pytest.mark.parametrize(("before", "waits"), [(False, False), (True, True)])
def test_a_head_that_goes_before_its_first_controller_is_up_waits_for_nothing(
    tmp_path: pathlib.Path, before: bool, waits: bool
) -> None:
    """After a controller of the job, the next one's nodes may still bring what is worth waiting for."""
    (tmp_path / kube.JOB_KEY).write_text(json.dumps(JOB))
    settings = head_settings(["--job-folder", str(tmp_path), "--run-folder", str(tmp_path / "run")], VARIABLES)
    pod = HeadPod(settings, settings.folders.read_job(), "token", Console(os.open(os.devnull, os.O_WRONLY), {}))
    answers = iter([False, False, True])

    class Client:
        async def status(self) -> dict[str, Any]:
            if not next(answers, True):
                raise TransferError("nobody listens")
            return {"stage": "gathering", "nodes": {}}

    pod._client = Client()  # type: ignore[assignment]
    pod._ray.alive = lambda: True  # type: ignore[method-assign]
    pod._answered = before

    async def story() -> bool:
        try:
            async with asyncio.timeout(3):
                await pod._hold()
        except TimeoutError:
            return True
        return False

    assert asyncio.run(story()) is waits
