"""The agent with a real forkserver, a real keeper and small real scripts; the controller is a queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from outlast import messages as m
from outlast.agent.node_agent import HEARTBEAT_S, NodeAgent
from outlast.errors import TransferError
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import RankRestore, RestorePlan
from outlast.snapshot.stored import StoredImage
from support.keepers import flip, write_shard
from support.sites import PRELUDE, Node, Site, alive, attempt, eventually


def test_a_new_node_joins_and_beats(site: Site) -> None:
    node = site.node()
    node.none_of("Heartbeat", 2 * HEARTBEAT_S)
    joined = node.join()
    assert (joined.node, joined.attempt, joined.seat, joined.running, joined.held) == ("node-0", None, None, False, ())
    assert (joined.procs, joined.best_seen_attempt, joined.host) == (1, 0, "127.0.0.1")
    assert joined.free_port > 0
    assert joined.memory is not None
    assert joined.memory > 1 << 20
    assert joined.dirty == ()
    fields = node.raw("Info")["fields"]
    assert fields["agent_pid"] == os.getpid()
    assert fields["keeper_pid"] == node.pids()["keeper"]
    assert node.next("Heartbeat").attempt is None
    began = time.monotonic()
    for _ in range(4):
        node.next("Heartbeat")
    assert time.monotonic() - began == pytest.approx(4 * HEARTBEAT_S, abs=0.2)
    assert node.join().registration == joined.registration, "asked again it says the same"


def test_a_ranks_life(site: Site) -> None:
    script = (
        PRELUDE
        + """
print(open(os.environ["OUTLAST_MEMORY_DIR"] + "/attempt.json").read())
print(json.dumps(hear()))
say("ready", restored_step=0, restore_s=0.5, source="none")
say("step", step=1, seconds=0.25, own_seconds=0.1, metrics={"loss": 2.0}, total=3)
print(json.dumps(hear()))
say("copied", generation="1-aaaaaaaaaaaaaaaa-2", slot=1, bytes=10, length=20, stall_s=0.1, copy_s=0.2)
say("busy", label="eval", limit_s=None)
say("idle")
say("note", kind="hint", text="hello")
say("missed", generation="1-aaaaaaaaaaaaaaaa-4", reason="late")
say("done", digest="d1", steps=3, environment={"torch": "x"})
print(os.environ["FROM_JOB"], sorted(name for name in os.environ if name.startswith("TORCHELASTIC")))
"""
    )
    node = site.node(script)
    node.join()
    start = node.start()
    node.do(start)
    assert node.next("RestoreReady") == m.RestoreReady("node-0", attempt(1))
    node.none_of("RankReady")
    node.do(m.Load(("node-0",), attempt(1)))
    assert node.next("RankReady") == m.RankReady("node-0", attempt(1), 0, 0, 0.5, "none")
    assert node.raw("Metrics") == {
        **{"type": "Metrics", "node": "node-0", "attempt": str(attempt(1)), "rank": 0, "step": 1, "total": 3},
        "metrics": {"loss": 2.0},
    }
    assert node.next("Heartbeat") == m.Heartbeat(
        "node-0", attempt(1), {0: 1}, {0: 0.25}, {0: 0.1}, {"loss": 2.0}, total=3
    )
    generation = Generation.of(attempt(1), 2)
    node.do(m.Permit(("node-0",), Generation.of(attempt(9), 2), 1, False))
    node.do(m.Permit(("node-0",), generation, 1, False, {"node-0": (0,)}))
    assert node.next("Copied") == m.Copied("node-0", 0, generation, 1, 10, 20, 0.1, 0.2)
    assert node.next("Busy") == m.Busy("node-0", attempt(1), 0, "eval", None)
    assert node.next("Idle") == m.Idle("node-0", attempt(1), 0)
    assert node.next("Note") == m.Note("node-0", 0, "hint", "hello")
    assert node.next("Missed").reason == "late"
    assert node.raw("Info")["fields"] == {"environment": {"torch": "x"}}
    assert node.next("RankDone") == m.RankDone("node-0", attempt(1), 0, "d1", 3)
    stored, restore, permit, *rest = node.log(0, 1).splitlines()
    assert json.loads(stored)["started"] == str(attempt(1)), "the attempt is on disk before its ranks run"
    limits = {"slots": 2, "parity": 0, "group": 1, "max_memory": None, "final": False}
    assert json.loads(restore) == {"op": "restore", "plan": None, "images": {}, "protection": limits}
    told = {"op": "permit", "generation": str(generation), "slot": 1, "step": 2, "replan": False, "fresh": True}
    assert json.loads(permit) == {**told, "hold": False}
    names = ["ERROR_FILE", "MAX_RESTARTS", "RESTART_COUNT", "RUN_ID"]
    assert rest == [f"yes {[f'TORCHELASTIC_{name}' for name in names]}"]


def test_a_crash_is_told_within_milliseconds(site: Site) -> None:
    node = site.node(procs=2)
    node.run()
    for _ in range(2):
        node.next("RankReady")
    pid = node.pids()["rank-1"]
    before = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    exited = node.next("RankExited")
    assert time.monotonic() - before < 0.2
    assert (exited.rank, exited.code, exited.signal, exited.error) == (1, None, signal.SIGKILL, None)
    assert "rank-1" not in node.pids()


@pytest.mark.parametrize("uses_outlast", [True, False])
def test_an_exception_is_told_with_its_traceback(site: Site, uses_outlast: bool) -> None:
    says = "say('error', type='ValueError', message='bad', traceback='in f', time=5.0)\n" if uses_outlast else ""
    node = site.node((PRELUDE if uses_outlast else "") + says + "raise ValueError('bad')\n")
    node.do(node.start())
    exited = node.next("RankExited")
    assert (exited.code, exited.signal, exited.error.type, exited.error.message) == (1, None, "ValueError", "bad")
    if uses_outlast:
        assert (exited.error.time, exited.error.traceback) == (5.0, "in f")
    else:
        assert "raise ValueError('bad')" in exited.error.traceback
        assert abs(exited.error.time - time.time()) < 60
    assert node.log(0, 1).rstrip().endswith("ValueError: bad")


def test_a_rank_that_was_done_stays_done(site: Site) -> None:
    node = site.node(PRELUDE + "say('done', digest='d', steps=9)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    node.do(node.start())
    assert node.next("Note").kind == "late-exit"
    assert node.next("RankDone").digest == "d"


def test_stop_kills_everything_and_verifies_the_files(site: Site) -> None:
    script = (
        PRELUDE
        + """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "100"]).pid)
say("ready", restored_step=0, restore_s=0, source="none")
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(100)
"""
    )
    node = site.node(script, procs=2)
    first = node.join()
    node.run()
    for _ in range(2):
        node.next("RankReady")
    write_shard(Path(node.config.memory_dir) / "slot-0-1.img", 0, 0, Generation.of(attempt(1), 5), 10_000)
    pids = [node.pids()["rank-0"], node.pids()["rank-1"], int(node.log(0, 1)), int(node.log(1, 1))]
    node.do(m.Stop("node-0", attempt(2)), m.Stop("node-0", attempt(2)))
    stopped = node.next("Stopped")
    assert not [pid for pid in pids if alive(pid)]
    assert (stopped.attempt, stopped.dirty) == (attempt(2), ())
    assert [(image.generation, image.slot) for image in stopped.inventory.images] == [(Generation.of(attempt(1), 5), 1)]
    assert stopped.free_port not in (0, first.free_port)
    node.none_of("RankExited")
    node.none_of("Stopped")
    node.do(m.Stop("node-0", attempt(2)))
    assert node.next("Stopped").inventory == stopped.inventory, "the answer may be asked for again"


def test_what_ended_the_attempt_is_told_even_when_stop_was_faster(site: Site) -> None:
    script = PRELUDE + "say('error', type='E', message='cause', time=1.0)\nhear()\n"
    node = site.node(script)
    node.do(node.start())
    eventually(lambda: "rank-0" in node.pids())
    time.sleep(0.2)
    node.do(m.Stop("node-0", attempt(2)))
    exited = node.next("RankExited")
    assert (exited.attempt, exited.error.message) == (attempt(1), "cause")
    node.next("Stopped")


def test_older_and_rival_attempts_are_refused(site: Site) -> None:
    node = site.node()
    node.join()
    node.run(number=3)
    node.next("RankReady")
    pid = node.pids()["rank-0"]
    node.do(m.Stop("node-0", attempt(2)), m.Stop("node-0", attempt(3, "b")), m.Stop("node-0", attempt(3)))
    for _ in range(3):
        assert node.next("Note").kind == "stale-instruction"
    node.do(node.start(2))
    assert node.next("Note").kind == "stale-instruction"
    node.do(node.start(3))
    assert node.pids()["rank-0"] == pid, "the same start a second time changes nothing"
    assert node.next("Heartbeat").attempt == attempt(3)


def test_a_newer_start_replaces_running_ranks(site: Site) -> None:
    node = site.node()
    node.join()
    node.run()
    node.next("RankReady")
    pid = node.pids()["rank-0"]
    node.run(number=2)
    node.next("RankReady")
    assert not alive(pid)
    assert node.next("Heartbeat").attempt == attempt(2)


def test_a_rank_of_an_older_attempt_cannot_speak_for_the_new_one(site: Site) -> None:
    node = site.node(PRELUDE + "say('step', step=7, seconds=1)\nprint(os.environ['OUTLAST_AGENT'])\ntime.sleep(100)\n")
    node.do(node.start())
    old = eventually(lambda: node.log(0, 1)).strip()
    node.do(node.start(2))
    new = eventually(lambda: node.log(0, 2)).strip()
    assert old != new
    assert not Path(old).exists()
    assert Path(new).exists()


def test_a_lost_keeper_is_replaced(site: Site) -> None:
    node = site.node()
    before = node.join().keeper
    os.kill(node.pids()["keeper"], signal.SIGKILL)
    assert node.next("KeeperLost", 1) == m.KeeperLost("node-0")
    back = node.next("KeeperBack")
    assert (back.host, back.port) != before
    assert node.join().keeper == (back.host, back.port)


def test_a_new_agent_finds_keeper_and_attempt_but_no_ranks(site: Site) -> None:
    node = site.node()
    joined = node.join()
    node.run(number=2, seat=0)
    node.next("RankReady")
    write_shard(Path(node.config.memory_dir) / "slot-0-0.img", 0, 0, Generation.of(attempt(2), 5), 1000)
    rank, keeper = node.pids()["rank-0"], node.pids()["keeper"]
    node.crash()
    again = node.boot().join()
    assert node.pids()["keeper"] == keeper
    assert again.keeper == joined.keeper
    assert (again.attempt, again.seat, again.running, again.restart_count) == (attempt(2), 0, False, 1)
    assert again.best_seen_attempt == 2
    assert [image.generation.step for image in again.held] == [5]
    assert again.registration != joined.registration
    eventually(lambda: not alive(rank))
    node.do(m.Stop("node-0", attempt(3)))
    assert node.next("Stopped").dirty == ()


def test_a_stopped_leftover_of_the_agent_before_is_waited_for(site: Site) -> None:
    node = site.node()
    node.run()
    node.next("RankReady")
    pid = node.pids()["rank-0"]
    forkserver = node.pids()["forkserver"]
    os.kill(forkserver, signal.SIGSTOP)
    node.crash()
    assert alive(pid), "nobody could kill it yet"
    os.kill(forkserver, signal.SIGCONT)
    node.boot().do(m.Stop("node-0", attempt(2)))
    node.next("Stopped")
    assert not alive(pid)


def test_joining_again_tells_a_new_controller_who_is_ready(site: Site) -> None:
    node = site.node()
    node.run()
    node.next("RankReady")
    joined = node.join()
    assert (joined.attempt, joined.seat, joined.running) == (attempt(1), 0, True)
    node.next("RankReady", 1)


def test_a_node_that_was_given_up_registers_without_ranks(site: Site) -> None:
    node = site.node()
    before = node.join()
    node.run()
    node.next("RankReady")
    pid = node.pids()["rank-0"]
    node.do(m.Register("node-0"))
    joined = node.next("Joined")
    assert not alive(pid)
    assert not joined.running
    assert joined.registration != before.registration


@pytest.mark.parametrize("stopped", [False, True])
def test_stacks_go_to_the_controller_and_to_the_log(site: Site, stopped: bool) -> None:
    pause = "os.kill(os.getpid(), signal.SIGSTOP)" if stopped else "time.sleep(100)"
    node = site.node(PRELUDE + f"def stuck_here():\n    say('idle')\n    {pause}\nstuck_here()\n")
    node.do(node.start())
    node.next("Idle")
    time.sleep(0.1)
    node.do(m.DumpStacks("node-0", "no progress"))
    assert "stuck_here" in node.next("Stacks").text
    assert "stuck_here" in node.log(0, 1)


def test_without_py_spy_a_rank_writes_its_stacks_itself(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.agent.stacks._from_outside", lambda pid: ("", "not allowed"))
    node = site.node(PRELUDE + "def stuck_here():\n    say('idle')\n    time.sleep(100)\nstuck_here()\n")
    node.do(node.start())
    node.next("Idle")
    node.do(m.DumpStacks("node-0", "no progress"))
    assert "stuck_here" in node.next("Stacks").text
    assert "stuck_here" in node.log(0, 1)
    node.do(m.Stop("node-0", attempt(2)))
    assert node.next("Stopped")


def test_a_program_that_is_not_python(site: Site) -> None:
    node = site.node(entrypoint=["sh", "-c", "echo rank $RANK of $WORLD_SIZE; exit 4"])
    node.do(node.start())
    exited = node.next("RankExited")
    assert (exited.code, exited.error) == (4, None)
    assert node.log(0, 1) == "rank 0 of 1\n"


def test_a_node_without_forkserver_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    node = site.node()
    node.join()
    pids = node.pids()
    os.kill(pids["forkserver"], signal.SIGKILL)
    assert eventually(lambda: node.ended) == ["the forkserver is gone"]
    eventually(lambda: not alive(pids["keeper"]))
    monkeypatch.setattr("outlast.agent.node_agent._CONNECT_S", 0.3)
    with pytest.raises(TransferError, match="no forkserver"):
        NodeAgent(node.config, lambda _: None)


def test_nothing_that_an_agent_started_outlives_close(site: Site) -> None:
    node = site.node()
    node.run()
    node.next("RankReady")
    rank, keeper = node.pids()["rank-0"], node.pids()["keeper"]
    node.close()
    assert not alive(rank)
    assert alive(keeper), "the next agent finds it"
    node.agents.clear()
    assert subprocess.run(
        ["ls", str(node.config.socket_dir)], capture_output=True, text=True, check=True
    ).stdout.split() == [
        "fork",
        "forkserver.pid",
        "keeper.json",
        "keeper.pid",
    ]


def durable(site: Site, store: str, **changes: Any) -> Node:
    """A node of a job with an object tier."""
    node = site.node(boot=False, **changes)
    spec: dict[str, Any] = node.config.job["spec"]  # type: ignore[assignment]
    job = {**node.config.job, "spec": {**spec, "checkpoint": {"url": store}, "snapshot": {"maxMemory": "1Gi"}}}
    node.config = node.config.model_copy(update={"job": job})
    return node.boot()


def image_path(node: Node, slot: int = 0, local_rank: int = 0) -> Path:
    return Path(node.config.memory_dir) / f"slot-{local_rank}-{slot}.img"


GENERATION = Generation.of(attempt(1), 5)


def from_store(node: Node, url: str, image: StoredImage, direct: bool = False) -> RestorePlan:
    where = "" if direct else node.config.node
    place = (image.rank, image.seat, image.local_rank, where, 1, "object", image.size, None)
    return RestorePlan(GENERATION, (RankRestore(*place, url=url, key=image.key),), direct)


def test_images_go_to_the_store_and_come_back(site: Site, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/default/j"
    node = durable(site, f"file://{tmp_path}")
    assert node.join().memory == 1 << 30
    upload = m.Upload(("node-0",), GENERATION, url)
    node.do(upload)
    assert "no seat" in node.next("UploadFailed").reason
    node.run()
    node.next("RankReady")
    node.do(upload)
    failed = node.next("UploadFailed")
    assert (failed.generation, failed.trouble) == (GENERATION, "bad"), "there is no such image"
    length = write_shard(image_path(node), 0, 0, GENERATION, 300_000)
    node.do(upload)
    uploaded = node.next("Uploaded")
    [image] = uploaded.images
    assert (image.rank, image.seat, image.local_rank, image.size, uploaded.bytes) == (0, 0, 0, length, length)
    content = image_path(node).read_bytes()
    assert (tmp_path / "default/j" / image.key).read_bytes() == content

    (tmp_path / "taken").write_text("a file")
    node.do(m.Upload(("node-0",), GENERATION, f"file://{tmp_path}/taken/j"))
    assert node.next("UploadFailed").trouble == "denied"

    image_path(node).unlink()
    node.do(node.start(2, restore=from_store(node, url, image)))
    node.do(m.Load(("node-0",), attempt(2)))  # as a new controller may, that has not heard what is ready
    assert node.next("RestoreReady").bytes == length
    assert image_path(node, 1).read_bytes() == content
    node.next("RankReady")
    told = json.loads(node.log(0, 2))
    assert (told["images"], told["protection"]["slots"]) == ({"0": {"path": str(image_path(node, 1))}}, 3)
    node.do(m.Commit(("node-0",), GENERATION))
    node.next("CommitAcked")
    joined = node.join()
    assert (joined.running, joined.restores, joined.stored) == (True, GENERATION, True)


@pytest.mark.parametrize(("harm", "trouble"), [("flip", "bad"), ("missing", "bad"), ("denied", "denied")])
def test_what_the_store_cannot_give_ends_the_attempt_as_its_fault(
    site: Site, tmp_path: Path, harm: str, trouble: str
) -> None:
    url = f"file://{tmp_path}/j"
    node = durable(site, f"file://{tmp_path}")
    node.run()
    length = write_shard(image_path(node), 0, 0, GENERATION, 300_000)
    node.do(m.Upload(("node-0",), GENERATION, url))
    [image] = node.next("Uploaded").images
    if harm == "flip":
        flip(tmp_path / "j" / image.key, length // 2)
    elif harm == "missing":
        (tmp_path / "j" / image.key).unlink()
    else:
        (tmp_path / "taken").write_text("a file")
        url = f"file://{tmp_path}/taken/j"
    node.do(node.start(2, restore=from_store(node, url, image)))
    failed = node.next("RestoreFailed")
    assert (failed.attempt, failed.generation, failed.trouble, failed.rank) == (attempt(2), GENERATION, trouble, 0)
    node.none_of("RestoreReady")
    assert not image_path(node, 1).exists()


def test_what_ranks_read_themselves_is_not_fetched_for_them(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}")
    image = StoredImage(0, 0, 0, "no/such/object", 1000, "")
    node.do(node.start(restore=from_store(node, f"file://{tmp_path}/j", image, direct=True)))
    assert node.next("RestoreReady") == m.RestoreReady("node-0", attempt(1))
    node.do(m.Load(("node-0",), attempt(1)))
    node.next("RankReady")
    told = json.loads(node.log(0, 1))
    assert told["images"] == {"0": {"url": f"file://{tmp_path}/j", "key": "no/such/object", "checksum": None}}
    lost = RankRestore(7, 7, 0, "node-0", 107, "memory-decode", 1000, None)
    node.do(node.start(2, restore=RestorePlan(GENERATION, (lost,), direct=True)))
    exited = node.next("RankExited")
    assert (exited.rank, exited.error.type) == (0, "UnrecoverableError"), "the old world's rank 7 is nobody's"


def slow_upload(node: Node, folder: Path) -> None:
    """Begin an upload that takes a minute, and see it under way."""
    node.run()
    node.next("RankReady")
    write_shard(image_path(node), 0, 0, GENERATION, 60 << 20)
    node.do(m.Upload(("node-0",), GENERATION, f"file://{folder}/j", bandwidth=1 << 20))
    eventually(lambda: list(folder.glob("j/.drafts/*")))


def test_an_upload_is_over_when_its_keeper_is_killed(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}")
    slow_upload(node, tmp_path)
    os.kill(node.pids()["keeper"], signal.SIGKILL)
    failed = node.next("UploadFailed")
    assert (failed.generation, failed.trouble) == (GENERATION, "unavailable")
    node.next("KeeperBack")
    node.do(m.Upload(("node-0",), GENERATION, f"file://{tmp_path}/j"))
    assert node.next("Uploaded").generation == GENERATION


def test_an_upload_holds_back_neither_stop_nor_end(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}")
    slow_upload(node, tmp_path)
    node.do(m.Upload(("node-0",), GENERATION, f"file://{tmp_path}/j", bandwidth=1 << 20))
    node.do(m.Stop("node-0", attempt(2)))
    assert node.next("Stopped", 5).attempt == attempt(2)
    eventually(lambda: not list(tmp_path.glob("j/.drafts/*")))
    node.none_of("UploadFailed")


def test_an_agent_ends_although_its_upload_goes_on(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}")
    slow_upload(node, tmp_path)
    node.close()
    eventually(lambda: not [t for t in threading.enumerate() if t.name.startswith("outlast-agent-worker")], 5)
    node.agents.clear()


def test_held_ranks_are_told_to_go_on(site: Site) -> None:
    script = (
        PRELUDE
        + """
hear()
say("ready", restored_step=3, restore_s=0.5, source="object", about={"script": "f"})
print(json.dumps(hear()))
print(json.dumps(hear()))
say("restore-failed", generation="1-aaaaaaaaaaaaaaaa-3", reason="bytes", trouble="bad")
say("restore-failed", generation="1-aaaaaaaaaaaaaaaa-3", reason="bytes", trouble="sad")
"""
    )
    node = site.node(script)
    node.run()
    assert node.next("RankReady") == m.RankReady("node-0", attempt(1), 0, 3, 0.5, "object", {"script": "f"})
    node.do(m.Proceed(("node-0",), Generation.of(attempt(9), 5)))
    node.do(m.Permit(("node-0",), GENERATION, 1, False, hold=True), m.Proceed(("node-0",), GENERATION))
    failed = node.next("RestoreFailed")
    assert (failed.generation.step, failed.reason, failed.trouble, failed.rank) == (3, "bytes", "bad", 0)
    assert node.next("Note").kind == "bad-message"
    permit, proceed = map(json.loads, node.log(0, 1).splitlines())
    assert (permit["op"], permit["hold"]) == ("permit", True)
    assert proceed == {"op": "proceed", "generation": str(GENERATION)}


def test_files_that_a_rank_may_still_write_to_are_told_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.agent.node_agent.CONFIRM_S", 0.0)
    node = site.node(procs=2)
    node.join()
    node.run()
    for _ in range(2):
        node.next("RankReady")
    node.do(m.Stop("node-0", attempt(2)))
    slots = ((0, 0), (0, 1), (1, 0), (1, 1))
    assert node.next("Stopped").dirty == slots, "nobody waited for their ends"
    assert node.join().dirty == slots


def test_a_node_that_is_told_to_go_hands_over_first(site: Site) -> None:
    node = site.node(grace_s=25.0)
    node.join()
    node.run()
    node.next("RankReady")
    pids = node.pids()
    write_shard(image_path(node), 0, 0, GENERATION, 10_000)
    os.kill(pids["forkserver"], signal.SIGTERM)
    leaving = node.next("Leaving")
    assert (leaving.node, leaving.reason) == ("node-0", "the node was told to go")
    assert 20 < leaving.grace_s <= 25
    assert node.join().running, "it goes on as before"
    assert node.next("Leaving").grace_s < leaving.grace_s
    node.crash()
    node.boot().join()
    assert node.next("Leaving").grace_s < leaving.grace_s, "an agent that starts anew tells it as well"
    node.run(2)
    node.next("RankReady")
    assert image_path(node).exists()
    pids = node.pids()
    node.do(m.Release("node-0"))
    assert eventually(lambda: node.ended) == ["the node has left the job"]
    assert node.agent.released
    eventually(lambda: not [role for role in ("forkserver", "keeper", "rank-0") if alive(pids[role])], 2)
    assert not list(Path(node.config.memory_dir).glob("*.img"))
    node.none_of("RankExited")


def test_a_node_that_is_not_released_ends_with_its_grace(site: Site) -> None:
    node = site.node(grace_s=0.5)
    node.join()
    pids = node.pids()
    os.kill(pids["forkserver"], signal.SIGTERM)
    assert node.next("Leaving").grace_s <= 0.5
    assert eventually(lambda: node.ended, 5) == ["the forkserver is gone"]
    eventually(lambda: not alive(pids["forkserver"]) and not alive(pids["keeper"]))
    assert not node.agent.released


# --- faults on request ----------------------------------------------------------------------------------------------


def test_a_rank_is_killed_or_stopped_when_that_is_asked_for(site: Site) -> None:
    node = site.node(procs=2, faults=True)
    node.join()
    node.run()
    for _ in range(2):
        node.next("RankReady")
    stopped = node.pids()["rank-1"]
    node.do(m.Injure("node-0", "hang", 1))
    assert f"SIGSTOP to rank-1 (pid {stopped})" in node.next("Note").text
    eventually(lambda: Path(f"/proc/{stopped}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    node.do(m.Injure("node-0", "rank-crash", 0))
    exited = node.next("RankExited")
    assert (exited.rank, exited.signal) == (0, signal.SIGKILL)
    node.do(m.Injure("node-0", "rank-crash", 5))
    assert node.next("Note").kind == "injury-missed"
    node.do(m.Stop("node-0", attempt(2)))
    assert node.next("Stopped").dirty == ()
    assert not alive(stopped)


def test_a_keeper_is_killed_and_comes_back(site: Site) -> None:
    node = site.node(faults=True)
    node.join()
    node.do(m.Injure("node-0", "keeper-crash"))
    assert node.next("Note").kind == "injured"
    assert node.next("KeeperLost") == m.KeeperLost("node-0")
    assert node.next("KeeperBack").node == "node-0"


@pytest.mark.parametrize("part", ["header", "data", "trailer"])
def test_flipped_bytes_are_found(site: Site, part: str) -> None:
    node = site.node(faults=True)
    node.join()
    node.run()
    node.next("RankReady")
    write_shard(Path(node.config.memory_dir) / "slot-0-0.img", 0, 0, Generation.of(attempt(1), 5), 600_000)
    node.do(m.Injure("node-0", "corrupt", part=part))
    assert "slot-0-0.img: 16 bytes at" in node.next("Note").text
    node.do(m.Stop("node-0", attempt(2)))
    images = node.next("Stopped").inventory.images
    assert all(image.bad_blocks for image in images), images


def test_a_node_leaves_when_that_is_asked_for(site: Site) -> None:
    node = site.node(faults=True)
    node.join()
    node.do(m.Injure("node-0", "node-leave"))
    assert node.next("Leaving").node == "node-0"
    node.do(m.Release("node-0"))
    eventually(lambda: node.ended)


def test_a_job_that_allows_no_faults_is_not_broken(site: Site) -> None:
    node = site.node()
    node.join()
    node.run()
    node.next("RankReady")
    pids = node.pids()
    for kind in ("rank-crash", "keeper-crash", "node-loss", "agent-crash"):
        node.do(m.Injure("node-0", kind, 0))
        assert node.next("Note").kind == "injury-refused"
    assert node.pids() == pids
