"""Ranks' logs come into the job's store when an attempt has ended on a node, and nothing waits for them."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from outlast import messages as m
from support.runs import job, trainctl_run
from support.sites import PRELUDE, WAIT, WAITS, Node, Site, alive, attempt, eventually

TALKS = PRELUDE + "print('attempt', os.environ['OUTLAST_ATTEMPT'], 'rank', rank)\nhear()\ntime.sleep(100)\n"


def durable(site: Site, url: str, script: str = TALKS, procs: int = 2) -> Node:
    """A node of a job with an object tier."""
    node = site.node(script, procs=procs, boot=False)
    job: dict[str, Any] = dict(node.config.job)
    job["spec"] = {**job["spec"], "checkpoint": {"url": url}}
    node.config = node.config.model_copy(update={"job": job})
    return node.boot()


def stored(folder: Path, number: int, rank: int) -> str | None:
    path = folder / "default" / "j" / "logs" / f"attempt-{number}" / f"rank-{rank}.log"
    return path.read_text() if path.exists() else None


def test_logs_are_stored_when_the_attempt_has_ended_on_the_node(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}")
    node.join()
    node.run(1, seat=1, world_nodes=2)
    eventually(lambda: node.log(2, 1) and node.log(3, 1))
    assert stored(tmp_path, 1, 2) is None, "it runs"
    node.do(m.Stop("node-0", attempt(2)))
    node.next("Stopped")
    eventually(lambda: stored(tmp_path, 1, 2) and stored(tmp_path, 1, 3))
    assert stored(tmp_path, 1, 3) == "attempt 1 rank 3\n"


def test_an_agent_stores_what_the_one_before_it_left(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}", procs=1)
    node.join()
    node.run(1)
    eventually(lambda: node.log(0, 1))
    node.crash()
    node.boot()
    eventually(lambda: stored(tmp_path, 1, 0))


def test_a_store_that_refuses_is_a_note_and_holds_nothing_up(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    node = durable(site, f"file://{tmp_path}/file/store", procs=1)
    node.join()
    node.run(1)
    node.do(m.Stop("node-0", attempt(2)))
    said: dict[str, Any] = {}
    while not {"Stopped", "Note"} <= said.keys():  # in either order
        message = node.sent.get(timeout=WAIT)
        said[message["type"]] = message
    assert said["Note"]["kind"] == "logs-not-stored"
    assert "attempt 1" in said["Note"]["text"]
    assert "/file" in said["Note"]["text"]


def test_a_node_that_leaves_waits_for_its_logs(site: Site, tmp_path: Path) -> None:
    node = durable(site, f"file://{tmp_path}", procs=1)
    node.join()
    node.run(1)
    eventually(lambda: node.log(0, 1))
    forkserver = node.pids()["forkserver"]
    os.kill(forkserver, signal.SIGTERM)
    node.next("Leaving")
    node.do(m.Release("node-0"))
    eventually(lambda: not alive(forkserver))
    assert stored(tmp_path, 1, 0) == "attempt 1 rank 0\n"


def test_without_an_object_tier_there_is_nothing_to_do(site: Site) -> None:
    node = site.node(WAITS)
    node.join()
    node.run(1)
    node.do(m.Stop("node-0", attempt(2)))
    node.next("Stopped")
    node.none_of("Note")
    assert not [role for role in node.pids() if role.startswith("logs")]


def test_a_local_run_leaves_each_attempts_logs_in_the_store(tmp_path: Path) -> None:
    spec = job("train.py", "--steps", "20", workers={"replicas": 2, "spares": 0})
    spec["spec"]["checkpoint"] = {"url": f"file://{tmp_path}/store", "interval": 10}
    outcome = trainctl_run(spec, tmp_path / "local", ["rank-error@12:1"])
    assert outcome.status == 0, outcome.output
    logs = tmp_path / "store" / "default" / "test" / "logs"
    found = {path.relative_to(logs).as_posix() for path in logs.rglob("*.log")}
    assert found == {f"attempt-{number}/rank-{rank}.log" for number in (1, 2) for rank in (0, 1)}
    assert "Error" in (logs / "attempt-1" / "rank-1.log").read_text()
