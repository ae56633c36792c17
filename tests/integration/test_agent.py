"""The agent with a real forkserver, a real keeper and small real scripts; the controller is a queue."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outlast import messages as m
from outlast.agent.forkclient import ForkClient
from outlast.agent.node_agent import HEARTBEAT_S, NodeAgent
from outlast.errors import TransferError
from outlast.snapshot.identity import Generation
from support.keepers import write_shard
from support.sites import PRELUDE, Site, alive, attempt, eventually, open_site, open_zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[ForkClient]:
    with open_zygote() as client:
        yield client


@pytest.fixture
def site(zygote: ForkClient) -> Iterator[Site]:
    with open_site(zygote) as site:
        yield site


def test_a_new_node_joins_and_beats(site: Site) -> None:
    node = site.node()
    node.none_of("Heartbeat", 2 * HEARTBEAT_S)
    joined = node.join()
    assert (joined.node, joined.attempt, joined.seat, joined.running, joined.held) == ("node-0", None, None, False, ())
    assert (joined.procs, joined.best_seen_attempt, joined.host) == (1, 0, "127.0.0.1")
    assert joined.free_port > 0
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
    limits = {"slots": 2, "parity": 1, "group": 2, "max_memory": None}
    assert json.loads(restore) == {"op": "restore", "plan": None, "images": {}, "protection": limits}
    told = {"op": "permit", "generation": str(generation), "slot": 1, "step": 2, "replan": False, "fresh": True}
    assert json.loads(permit) == told
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
    node.do(m.Stop("node-0", attempt(2)))
    stopped = node.next("Stopped")
    assert not [pid for pid in pids if alive(pid)]
    assert (stopped.attempt, stopped.dirty) == (attempt(2), ())
    assert [(image.generation, image.slot) for image in stopped.inventory.images] == [(Generation.of(attempt(1), 5), 1)]
    assert stopped.free_port not in (0, first.free_port)
    node.none_of("RankExited")


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
