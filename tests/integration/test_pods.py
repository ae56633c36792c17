"""A job in Pods without Kubernetes: head and nodes as processes with folders for volumes, in a real Ray on loopback."""

from __future__ import annotations

from typing import Any

import pytest

from support.pods import World, until, world
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


def test_a_job_in_pods_trains_through_a_lost_head_and_a_restarted_node() -> None:
    with world(short_job(300)) as pods:
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
        assert [node.wait(30) for node in nodes] == [0, 0]
        pods.ask("POST", "/stop", {})
        assert head.wait(30) == 0
