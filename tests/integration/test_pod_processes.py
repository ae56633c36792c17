"""A job in Pods without Kubernetes: head and nodes as processes with folders for volumes, in a real Ray on loopback."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from support.pods import PodProcess, World, until, world
from support.runs import job

pytest.importorskip("ray", reason="needs outlast[train]")
pytest.importorskip("torch", reason="needs outlast[train]")

START_S = 90.0


def short_job(steps: int, pace: str = "0.05", **spec: Any) -> dict[str, Any]:
    """Two nodes without a spare."""
    found = job("train.py", "--steps", str(steps), "--pace", pace, workers={"replicas": 2, "spares": 0}, **spec)
    return {**found, "metadata": {"name": "test", "uid": "a-uid"}}


def running_at(pods: World, step: int) -> dict[str, Any]:
    """The status once that step was done."""
    return until(lambda: (found := pods.status()).get("step", 0) >= step and found, START_S, f"step {step}")


def held_step(head: PodProcess) -> int:
    """The committed snapshot at which it said that the ranks wait."""
    return int(head.output.rpartition("event=held")[2].partition("step=")[2].split()[0])


def delete(*pods: PodProcess) -> None:
    """The job is deleted: nobody is left who could take over."""
    for pod in pods:
        pod.terminate()
    assert [pod.wait(25) for pod in pods] == [0] * len(pods)


def test_a_job_in_pods_trains_through_a_lost_head_and_a_restarted_node() -> None:
    """The new head is at the old one's address; memory, folders and name are all that is left of the node."""
    with world(short_job(160)) as pods:
        head = pods.head()
        nodes = [pods.node(), pods.node()]
        running_at(pods, 30)
        head.lose()
        head = pods.head()
        running_at(pods, 60)
        nodes[0].kill()
        nodes[0].start()
        found = until(lambda: (found := pods.status()).get("outcome") and found, 120, "the job's end")
        assert found["outcome"] == "succeeded"
        assert pods.restored() == {"memory-local"}
        assert [node.wait(60) for node in nodes] == [0, 0]
        pods.ask("POST", "/stop", {})
        assert head.wait(30) == 0


def test_a_head_that_is_told_to_go_loses_no_step() -> None:
    with world(short_job(1000)) as pods:
        head = pods.head()
        nodes = [pods.node(), pods.node()]
        running_at(pods, 20)
        head.terminate()
        assert head.wait(30) == 0
        assert "event=held" in head.output, "the ranks waited at a committed snapshot"
        held = held_step(head)
        pods.head()
        found = running_at(pods, held + 5)
        assert found["attempt"] == 2
        assert pods.restored_steps() == [held]
        delete(pods.pods[-1], *nodes)


def test_a_head_that_is_told_to_go_asks_the_controller_that_is_started_again() -> None:
    with world(short_job(1000)) as pods:
        head = pods.head()
        nodes = [pods.node(), pods.node()]
        running_at(pods, 20)
        before = pods.status()
        os.kill(pods.controller_pid(), signal.SIGKILL)
        head.terminate()
        assert head.wait(60) == 0
        assert "event=held" in head.output, head.output
        held = held_step(head)
        assert held > before["step"]
        pods.head()
        running_at(pods, held + 5)
        assert pods.restored_steps() == [held]
        delete(pods.pods[-1], *nodes)
