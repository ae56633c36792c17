"""What the API server refuses, by the schema and its CEL rules, and that it says what to write instead."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.operators import World

pytestmark = pytest.mark.timeout(120)

Json = dict[str, Any]


def job(name: str = "job", **spec: Any) -> Json:
    content = {"entrypoint": ["python", "train.py"], **spec}
    return {
        "apiVersion": "outlast.dev/v1alpha1",
        "kind": "TrainingJob",
        "metadata": {"name": name},
        "spec": content,
    }


def apply(place: World, resource: Json, *options: str) -> tuple[int, str]:
    done = place.api.kubectl(
        "-n", place.namespace, "apply", "-f", "-", *options, stdin=json.dumps(resource), check=False
    )
    return done.returncode, done.stdout + done.stderr


def refused(place: World, resource: Json) -> str:
    status, text = apply(place, resource, "--dry-run=server")
    assert status != 0, text
    return text


REFUSED: list[tuple[str, Json, str]] = [
    ("no entrypoint", job(entrypoint=[]), "entrypoint"),
    ("blank entrypoint", job(entrypoint=["  "]), "entrypoint must begin with a program, such as python"),
    ("a long name", job("n" * 51), "at most 50 characters"),
    ("a name with dots", job("a.b"), "must be a DNS label"),
    (
        "more at least than wanted",
        job(workers={"replicas": 2, "minReplicas": 3}),
        "minReplicas must be at most replicas",
    ),
    ("parity alone", job(snapshot={"erasure": {"parity": 1}}), "one node has no other to hold parity"),
    (
        "too much parity",
        job(workers={"replicas": 4}, snapshot={"erasure": {"parity": 4}}),
        "must be less than the nodes of a redundancy group",
    ),
    (
        "too large a group",
        job(workers={"replicas": 4}, snapshot={"erasure": {"groupSize": 5}}),
        "groupSize must be at most workers.replicas",
    ),
    ("no nodes", job(workers={"replicas": 0}), "greater than or equal to 1"),
    ("no duration", job(recovery={"window": "soon"}), "window"),
    ("no memory", job(snapshot={"maxMemory": "lots"}), "maxMemory"),
    ("a variable given twice", job(env=[{"name": "A"}, {"name": "A"}]), "Duplicate value"),
]


@pytest.mark.parametrize(("resource", "hint"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_refused(place: World, resource: Json, hint: str) -> None:
    assert hint in refused(place, resource)


def test_defaults_are_filled_in(place: World) -> None:
    made = place.submit("defaults", replicas=2)
    spec = made["spec"]
    assert spec["workers"]["spares"] == 0
    assert spec["recovery"]["startTimeout"] == "15m"
    assert spec["snapshot"]["everySteps"] == "auto"
    assert spec["suspend"] is False
    assert "checkpoint" not in spec


FIXED: list[tuple[str, Json]] = [
    ("entrypoint", {"entrypoint": ["python", "other.py"]}),
    ("env", {"env": [{"name": "A", "value": "b"}]}),
    ("workers.procsPerWorker", {"workers": {"procsPerWorker": 2}}),
    ("workers.failureDomain", {"workers": {"failureDomain": "zone"}}),
    ("workers.template", {"workers": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}}),
    ("head.template", {"head": {"template": {"spec": {"nodeSelector": {"a": "b"}}}}}),
    ("snapshot.erasure", {"snapshot": {"erasure": {"parity": 2}}}),
    ("checkpoint.url", {"checkpoint": {"url": "s3://bucket/other"}}),
]


@pytest.mark.parametrize(("field", "change"), FIXED, ids=[case[0] for case in FIXED])
def test_what_cannot_change_while_the_job_runs(place: World, field: str, change: Json) -> None:
    place.submit("fixed", replicas=4, checkpoint={"url": "s3://bucket/one"})
    patch = ["-n", place.namespace, "patch", "tj", "fixed", "--type=merge", "-p"]
    done = place.api.kubectl(*patch, json.dumps({"spec": change}), check=False)
    assert done.returncode != 0
    assert f"spec.{field} cannot change while the job runs" in done.stderr
    place.api.kubectl(*patch, json.dumps({"spec": {"suspend": True}}))
    place.api.kubectl(*patch, json.dumps({"spec": change}))


def test_what_may_change_while_the_job_runs(place: World) -> None:
    place.submit("free", replicas=4)
    change = {"workers": {"replicas": 3, "spares": 1}, "recovery": {"maxRestarts": 3}, "suspend": True}
    patch = ["-n", place.namespace, "patch", "tj", "free", "--type=merge", "-p"]
    place.api.kubectl(*patch, json.dumps({"spec": change}))


def test_kubectl_scales_and_knows_the_pods(place: World) -> None:
    place.submit("sized", replicas=4)
    place.api.kubectl("-n", place.namespace, "scale", "tj", "sized", "--replicas=3")
    assert place.job("sized")["spec"]["workers"]["replicas"] == 3
    status = {"status": {"selector": "outlast.dev/job=sized,outlast.dev/role=node", "workers": {"ready": 3}}}
    place.api.kubectl(
        "-n", place.namespace, "patch", "tj", "sized", "--subresource=status", "--type=merge", "-p", json.dumps(status)
    )
    path = f"/apis/outlast.dev/v1alpha1/namespaces/{place.namespace}/trainingjobs/sized/scale"
    scale = json.loads(place.api.kubectl("get", "--raw", path).stdout)
    assert scale["status"] == {"replicas": 3, "selector": "outlast.dev/job=sized,outlast.dev/role=node"}


def test_columns_and_explanations(place: World) -> None:
    place.submit("shown")
    table = place.api.kubectl("-n", place.namespace, "get", "tj", "shown").stdout.splitlines()
    assert table[0].split() == ["NAME", "PHASE", "STEP", "WORKERS", "GOODPUT", "RESTARTS", "CHECKPOINT", "AGE"]
    explained = place.api.kubectl("explain", "trainingjob.spec.workers").stdout
    assert "The fewest nodes to go on with when no spare is left" in explained
