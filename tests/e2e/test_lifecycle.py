"""Suspension, other sizes, an end that cleans up, and jobs that cannot run and say why."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from outlast import kube
from support.clusterfaults import Faults
from support.labs import Lab
from support.trainingjobs import STEPS, Job, Resource, job, template

Submit = Callable[[dict[str, Any]], Job]


def patch(target: Job, **spec: Any) -> None:
    change = json.dumps({"spec": spec})
    target.lab.kubectl("-n", target.namespace, "patch", "trainingjob", target.name, "--type=merge", "-p", change)


@pytest.mark.timeout(700, func_only=True)
def test_made_suspended_resumed_suspended_and_resumed(
    submit: Submit, bucket: str, undisturbed: Callable[[int, int], str], timings: dict[str, Any]
) -> None:
    """The second time it goes on from the checkpoint that the suspension took: nothing is done twice, the same bits,
    although its head is killed before and lost after it."""
    expected = undisturbed(STEPS, 3)
    resource = job(
        "queued",
        STEPS,
        replicas=3,
        step_time=0.2,
        workers={"template": template()},
        checkpoint={"url": bucket, "interval": 1000},
        suspend=True,
    )
    queued = submit(resource)
    queued.until_phase("Suspended", 30)
    assert not queued.pods(kube.NODE_ROLE) + queued.pods(kube.HEAD_ROLE)

    patch(queued, suspend=False)
    queued.reach(15)
    faults, costs = Faults(queued), timings.setdefault("faults of the head", {})
    costs["container killed"] = queued.cost_of(faults.kill_the_heads_container).to_json()
    patch(queued, suspend=True)
    status = queued.until_phase("Suspended", 120)
    stopped_at = status["checkpoint"]["step"]
    assert 10 <= stopped_at < STEPS
    queued.until("without Pods", 90, lambda _: not queued.pods(kube.NODE_ROLE) + queued.pods(kube.HEAD_ROLE))

    patch(queued, suspend=False)
    first = queued.watch_steps("training again", 180, lambda s: s["stage"] == "running")
    assert first["step"] >= stopped_at, "it goes on where it was"
    queued.reach(first["step"] + 15)
    costs["Pod lost"] = queued.cost_of(faults.lose_the_head).to_json()
    status = queued.until_phase("Succeeded", 120)
    assert status["weightsDigest"] == expected


@pytest.mark.timeout(900, func_only=True)
def test_scaled_down_and_up_and_gone_after_its_time(submit: Submit, release: Lab, bucket: str) -> None:
    resource = job(
        "elastic",
        200,
        replicas=3,
        step_time=0.4,
        workers={"template": template(), "minReplicas": 2},
        checkpoint={"url": bucket, "interval": 100},
        recovery={"growAfter": "1s", "shrinkAfter": "5s"},
        ttlSecondsAfterFinished=5,
    )
    resource["spec"]["entrypoint"] += ["--global-batch", "48", "--micro-batch", "8"]
    elastic = submit(resource)
    elastic.reach(20)
    scale(elastic, 2)
    size(elastic, 2)
    elastic.until("two Pods", 90, lambda _: len(elastic.pods(kube.NODE_ROLE)) == 2)
    again = elastic.ask()["step"]
    elastic.reach(again + 30)
    scale(elastic, 3)
    size(elastic, 3)
    resizes = elastic.ask()["resizes"]
    assert len(resizes) >= 2
    elastic.until_phase("Succeeded", 600)
    elastic.until_gone(60)


def scale(target: Job, replicas: int) -> None:
    target.lab.kubectl("-n", target.namespace, "scale", "trainingjob", target.name, f"--replicas={replicas}")


def size(target: Job, nodes: int) -> None:
    target.watch_steps(f"of {nodes} nodes", 180, lambda s: s["stage"] == "running" and s["workers"]["size"] == nodes)


def test_an_image_that_cannot_be_pulled(submit: Submit) -> None:
    """The reason is in the status within seconds, and after the stated time the job fails for it."""
    resource = job(
        "unpullable",
        10,
        replicas=2,
        workers={"template": template({"image": "images.example.com/no/such:1"})},
        recovery={"startTimeout": "20s"},
    )
    unpullable = submit(resource)

    def told(resource: Resource) -> bool:
        ready = unpullable.condition(resource, "Ready")
        return "images.example.com/no/such:1" in ready.get("message", "")

    seen = unpullable.until("told why", 30, told)
    assert "Pull" in unpullable.condition(seen, "Ready")["message"] + unpullable.condition(seen, "Ready")["reason"]
    unpullable.until_phase("Failed", 90)
    failed = unpullable.condition(unpullable.resource(), "Failed")
    assert "images.example.com/no/such:1" in failed["message"], failed


def test_too_little_memory_is_refused_with_the_sum(submit: Submit) -> None:
    container = {"resources": {"requests": {"memory": "512Mi"}, "limits": {"memory": "1Gi"}}}
    resource = job("narrow", 10, replicas=2, workers={"template": template(container)})
    narrow = submit(resource)
    seen = narrow.until("refused", 30, lambda r: narrow.condition(r, "Ready").get("reason") == "InvalidSpec")
    message = narrow.condition(seen, "Ready")["message"]
    assert "limits.memory" in message, "where"
    assert "512Mi" in message
    assert "256Mi for Ray + 1Gi" in message
    assert "= 1792Mi" in message, "the sum"
    assert not narrow.pods(kube.NODE_ROLE)
