"""What the API server refuses, by the schema and its CEL rules, and that it says what to write instead."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from outlast.kube import LONGEST_JOB_NAME
from outlast_operator.caches import parse
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


STEPS = "write auto or a whole number of steps, at least 1"
INTERVAL = "write a whole number of steps, at least 1, a duration of more than 0s, such as 10m, or auto"
DURATION = "write 90s, 10m or 1h30m"
POSITIVE = "write a duration of more than 0s, such as 90s, 10m or 1h30m"
HANG = f"{POSITIVE}, or auto"
MEMORY = "write 1Mi or more, such as 8Gi, 512Mi or 8G"
WHERE = "write s3://bucket/prefix or file:///folder"


def stored(**checkpoint: Any) -> Json:
    return job(checkpoint={"url": "s3://bucket/one", **checkpoint})


REFUSED: list[tuple[str, Json, str]] = [
    ("no entrypoint", job(entrypoint=[]), "entrypoint"),
    ("blank entrypoint", job(entrypoint=["  "]), "entrypoint must begin with a program, such as python"),
    ("a long name", job("n" * 51), "at most 50 characters"),
    ("a name with dots", job("a.b"), "without dots"),
    ("a name that no Service can have", job("7b-sft"), "metadata.name must begin with a letter"),
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
    ("a variable given twice", job(env=[{"name": "A"}, {"name": "A"}]), "Duplicate value"),
    ("no variable's name", job(env=[{"name": "A B"}]), "cannot name a variable: write letters, digits and _ . -"),
    ("a rank's variable", job(env=[{"name": "RANK"}]), "is set by Outlast for each rank: remove it here"),
    ("a prefix of Outlast's", job(env=[{"name": "OUTLAST_X"}]), "is set by Outlast for each rank"),
    *((f"everySteps {value!r}", job(snapshot={"everySteps": value}), STEPS) for value in (0, -5, "many", "10")),
    *((f"interval {value!r}", stored(interval=value), INTERVAL) for value in (0, -1, "0s", "often", "100")),
    *((f"startTimeout {value!r}", job(recovery={"startTimeout": value}), POSITIVE) for value in ("0s", "0h0m", 0, -1)),
    *((f"window {value!r}", job(recovery={"window": value}), POSITIVE) for value in ("soon", "10 min", "600")),
    *((f"hangTimeout {value!r}", job(recovery={"hangTimeout": value}), HANG) for value in ("0s", "Auto", 0)),
    *((f"shrinkAfter {value!r}", job(recovery={"shrinkAfter": value}), DURATION) for value in ("never", "-5s", -5)),
    *((f"maxMemory {value!r}", job(snapshot={"maxMemory": value}), MEMORY) for value in ("lots", "1k", "0.5Mi", 4096)),
    ("bandwidth", stored(bandwidth="8GB"), MEMORY),
    *(
        (f"url {url!r}", stored(url=url), hint)
        for url, hint in (
            ("bucket/x", WHERE),
            ("gs://bucket/x", WHERE),
            ("file://folder", WHERE),
            ("file:///", WHERE),
            ("s3://B/x", "a bucket's name has 3 to 63 of a-z, 0-9, - and ."),
            ("s3://bucket/x?y=1", "?, # and blanks may not stand in it"),
            ("file:///a b", "?, # and blanks may not stand in it"),
            ("s3://bucket//x", "must be written out: without //, . and .. in its path"),
            ("file:////a", "must be written out"),
            ("file:///a/../b", "must be written out"),
        )
    ),
    ("restoreFrom a name", stored(restoreFrom="other"), "write s3://bucket/prefix/<namespace>/<name>"),
    ("restoreFrom a bucket", stored(restoreFrom="s3://bucket"), "names a bucket, not a job"),
    ("restoreFrom no step", stored(restoreFrom="s3://bucket/a/b@new"), "write @12000, or leave it out for the newest"),
]
ACCEPTED: list[Json] = [
    job(env=[{"name": "A"}, {"name": "_b.c-1"}, {"name": "RANKS"}]),
    *(job(snapshot={"everySteps": value}) for value in (1, 10**12, "auto")),
    *(stored(interval=value) for value in (1, "auto", "0.5s", "1h30m")),
    job(recovery={"window": "1d", "startTimeout": 90, "hangTimeout": "250ms", "shrinkAfter": "0s", "growAfter": 0}),
    *(job(snapshot={"maxMemory": value}) for value in ("1Mi", "1048576", 1048576, "1.5Gi", "8G", "9999E")),
    *(stored(url=url) for url in ("s3://bucket", "s3://a.b-c/x/", "file:///folder", "file:///a/.b/..c/d..")),
    *(
        stored(restoreFrom=f"{url}{step}")
        for url in ("s3://bucket/default/other", "file:///a@b/c")
        for step in ("", "/", "@12000", "@1/")
    ),
]


@pytest.mark.parametrize(("resource", "hint"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_refused(place: World, resource: Json, hint: str) -> None:
    assert hint in refused(place, resource)


@pytest.mark.parametrize("resource", [case[1] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_refused_would_be_refused_by_the_operator(resource: Json) -> None:
    """No rule asks for more than ``outlast.api`` does, or than the names of Pods and Services allow."""
    parsed, _ = parse(resource)
    name = resource["metadata"]["name"]
    assert parsed is None or len(name) > LONGEST_JOB_NAME or not name[0].isalpha()


def test_what_is_accepted(place: World) -> None:
    for number, resource in enumerate(ACCEPTED):
        parsed, problem = parse(resource)
        assert parsed is not None, problem
        resource["metadata"]["name"] = f"job-{number}"
    status, text = apply(place, {"apiVersion": "v1", "kind": "List", "items": ACCEPTED}, "--dry-run=server")
    assert status == 0, text


def grouped(replicas: int, group: int | None, parity: int | None) -> Json:
    given = {"groupSize": group, "parity": parity}
    erasure = {name: number for name, number in given.items() if number is not None}
    name = f"grid-{replicas}-{group}-{parity}".lower()
    return job(name, workers={"replicas": replicas}, snapshot={"erasure": erasure})


GRID = [
    grouped(replicas, group, parity)
    for replicas in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
    for group in (None, 2, 3, 4, 8)
    for parity in (None, 0, 1, 2, 3, 4, 7, 8)
]
"""Around where nodes make another number of groups, and around the parity that their smallest allows."""


def test_groups_and_parity_are_taken_where_the_runtime_takes_them(place: World) -> None:
    fits_by_name = {resource["metadata"]["name"]: parse(resource)[0] is not None for resource in GRID}
    assert set(fits_by_name.values()) == {True, False}
    _, text = apply(place, {"apiVersion": "v1", "kind": "List", "items": GRID}, "--dry-run=server")
    taken = {line.split()[0].rpartition("/")[2] for line in text.splitlines() if "(server dry run)" in line}
    assert taken == {name for name, fits in fits_by_name.items() if fits}


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
    ("checkpoint.restoreFrom", {"checkpoint": {"restoreFrom": "s3://bucket/one/default/other"}}),
]


def patch(place: World, name: str, *options: str, **content: Any) -> tuple[int, str]:
    """A merge patch; the exit status of kubectl, and what it said."""
    what = ["-n", place.namespace, "patch", "tj", name, "--type=merge", *options, "-p", json.dumps(content)]
    done = place.api.kubectl(*what, check=False)
    return done.returncode, done.stdout + done.stderr


def patched(place: World, name: str, **spec: Any) -> None:
    status, text = patch(place, name, spec=spec)
    assert status == 0, text


def not_patched(place: World, name: str, hint: str, **spec: Any) -> None:
    status, text = patch(place, name, spec=spec)
    assert status != 0, text
    assert hint in text


def set_phase(place: World, name: str, phase: str) -> None:
    """As the operator does, which is not there."""
    status, text = patch(place, name, "--subresource=status", status={"phase": phase})
    assert status == 0, text


@pytest.mark.parametrize(("field", "change"), FIXED, ids=[case[0] for case in FIXED])
def test_what_cannot_change_while_the_job_runs(place: World, field: str, change: Json) -> None:
    place.submit("fixed", replicas=4, checkpoint={"url": "s3://bucket/one"})
    set_phase(place, "fixed", "Running")
    hint = f"spec.{field} cannot change while the job runs: set spec.suspend to true, and wait for the phase"
    not_patched(place, "fixed", hint, **change)
    not_patched(place, "fixed", hint, **change, suspend=True)
    patched(place, "fixed", suspend=True)
    not_patched(place, "fixed", hint, **change)
    not_patched(place, "fixed", hint, **change, suspend=False)
    set_phase(place, "fixed", "Suspended")
    patched(place, "fixed", **change)


WIDER = {"workers": {"procsPerWorker": 2}}


@pytest.mark.parametrize("phase", ["Pending", "Starting", "Running", "Recovering"])
def test_suspending_and_resuming_at_once_changes_nothing_fixed(place: World, phase: str) -> None:
    """The Pods are still there: two patches, one behind the other, must not get past them."""
    place.submit("quick", replicas=4)
    set_phase(place, "quick", phase)
    patched(place, "quick", suspend=True)
    not_patched(place, "quick", "spec.workers.procsPerWorker cannot change", **WIDER, suspend=False)
    patched(place, "quick", suspend=False)
    assert place.job("quick")["spec"]["workers"]["procsPerWorker"] == 1


@pytest.mark.parametrize("phase", ["", "Suspended"])
def test_a_job_that_is_suspended_is_changed_and_resumed_in_one_patch(place: World, phase: str) -> None:
    """Whether the operator has seen it yet or not."""
    place.submit("queued", replicas=4, suspend=True)
    if phase:
        set_phase(place, "queued", phase)
    patched(place, "queued", entrypoint=["python", "other.py"])
    patched(place, "queued", **WIDER, suspend=False)
    not_patched(place, "queued", "spec.entrypoint cannot change", entrypoint=["python", "third.py"])


def test_a_job_that_nobody_has_seen_is_changed_as_it_is_suspended(place: World) -> None:
    place.submit("unseen", replicas=4)
    not_patched(place, "unseen", "spec.workers.procsPerWorker cannot change", **WIDER)
    patched(place, "unseen", **WIDER, suspend=True)


def test_a_status_without_a_phase_is_not_believed_to_have_no_pods(place: World) -> None:
    """As another version might write it: the definition says Pending."""
    place.submit("other", replicas=4, suspend=True)
    status, text = patch(place, "other", "--subresource=status", status={"selector": "outlast.dev/job=other"})
    assert status == 0, text
    not_patched(place, "other", "spec.workers.procsPerWorker cannot change", **WIDER)
    set_phase(place, "other", "Suspended")
    patched(place, "other", **WIDER)


def test_the_status_is_written_whatever_the_phase(place: World) -> None:
    """Rules for changes of the spec do not stand in the way of the operator."""
    place.submit("told", replicas=4, checkpoint={"url": "s3://bucket/one"})
    for phase in ("Pending", "Running", "Suspended", "Running", "Succeeded"):
        set_phase(place, "told", phase)


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
    status = {
        "phase": "Running",
        "step": 40,
        "workers": {"ready": 3},
        "goodput": 0.87,
        "restartCount": 2,
        "checkpoint": {"step": 30, "time": "2020-01-01T00:00:00Z", "url": "s3://bucket/one"},
    }
    patch = ["patch", "tj", "shown", "--subresource=status", "--type=merge", "-p", json.dumps({"status": status})]
    place.api.kubectl("-n", place.namespace, *patch)
    names, values = place.api.kubectl("-n", place.namespace, "get", "tj", "shown").stdout.splitlines()
    assert names.split() == ["NAME", "PHASE", "STEP", "WORKERS", "GOODPUT", "RESTARTS", "CHECKPOINT", "AGE"]
    assert values.split()[:6] == ["shown", "Running", "40", "3", "0.87", "2"]
    assert re.fullmatch(r"\d+y\d*d?", values.split()[6]), "the checkpoint's age"
    assert re.fullmatch(r"\d+s", values.split()[7])
    for category in ("all", "training"):
        listed = place.api.kubectl("-n", place.namespace, "get", category, "-o", "name").stdout
        assert "trainingjob.outlast.dev/shown" in listed
    whole = place.api.kubectl("explain", "trainingjob").stdout
    assert "One training job: the custom resource" in whole
    assert "SpecError" not in whole, "that is for who calls Python"
    explained = place.api.kubectl("explain", "trainingjob.spec.workers").stdout
    assert "The fewest nodes to go on with when no spare is left" in explained
