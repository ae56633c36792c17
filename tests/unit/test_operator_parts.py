"""The small decisions around a pass: what is awaited, what is written, what a refusal means, what is kept, what is told."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.clock import ManualClock
from outlast.jobstatus import Condition, TrainingJobStatus, WorkersStatus
from outlast_operator.caches import Caches, parse
from outlast_operator.cluster import Cluster
from outlast_operator.events import AGAIN_S, BURST, EVERY_S, REPEAT_S, Digest, Events
from outlast_operator.expectations import Expectations
from outlast_operator.kinds import BUDGET, JOB, MACHINE, POD, POLICY, SECRET
from outlast_operator.model import Happening, Key, Object
from outlast_operator.pruning import pruned, same
from outlast_operator.refusals import ApiError, Verb, Verdict, from_answer, reason_of, verdict
from outlast_operator.statuswrite import Pace, as_json, difference, patch_of
from outlast_operator.store import Store

JOB_KEY = Key("default", "bytelm")


# --- expectations ---------------------------------------------------------------------------------------------------


def test_a_pod_is_awaited_until_the_cache_has_it() -> None:
    expectations, pods = Expectations(patience_s=10), set[str]()
    expectations.created(JOB_KEY, "p-0", 0.0)
    expectations.created(JOB_KEY, "p-1", 0.0)
    pods.add("p-0")
    missing = expectations.outstanding(JOB_KEY, 5, pods.__contains__, 1.0)
    assert missing is not None
    assert (missing.pods, missing.overdue) == ({"p-1"}, False)
    pods.add("p-1")
    assert expectations.outstanding(JOB_KEY, 5, pods.__contains__, 2.0) is None


def test_a_pod_that_came_and_went_is_not_awaited() -> None:
    expectations = Expectations()
    expectations.created(JOB_KEY, "p-0", 0.0)
    expectations.seen(JOB_KEY, "p-0")
    assert expectations.outstanding(JOB_KEY, 0, lambda _: False, 1.0) is None


def test_the_resource_is_awaited_in_the_version_that_was_written() -> None:
    expectations = Expectations()
    expectations.wrote(JOB_KEY, 7, 0.0)
    assert expectations.outstanding(JOB_KEY, 6, lambda _: True, 1.0) is not None
    assert expectations.outstanding(JOB_KEY, 8, lambda _: True, 1.0) is None


def test_what_is_overdue_is_asked_for_once_in_a_while_and_pods_are_never_given_up() -> None:
    expectations = Expectations(patience_s=10)
    expectations.created(JOB_KEY, "p-0", 0.0)
    expectations.wrote(JOB_KEY, 7, 0.0)
    found = [expectations.outstanding(JOB_KEY, 6, lambda _: False, now) for now in (5.0, 10.0, 12.0, 20.0)]
    assert [one is not None and one.overdue for one in found] == [False, True, False, True]
    assert all(one is not None and one.pods == {"p-0"} for one in found)


# --- what is written ------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.integers() | st.text(max_size=3) | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=4),
    max_leaves=12,
)
_TREES = st.dictionaries(st.text(max_size=2), _JSON, max_size=5)


def _merged(target: Any, patch: Any) -> Any:
    """RFC 7396, section 2."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


@given(_TREES, _TREES)
def test_the_difference_makes_one_of_the_other(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert _merged(old, difference(old, new)) == new
    assert (difference(old, new) == {}) == (old == new)


def test_a_status_is_written_as_what_differs_for_the_version_it_was_made_of() -> None:
    old = TrainingJobStatus(step=5, workers=WorkersStatus(ready=2, wanted=3), goodput=0.5)
    raw = {"metadata": {"name": "x", "resourceVersion": "42"}, "status": as_json(old)}
    assert patch_of(raw, old) is None
    new = TrainingJobStatus(step=6, workers=WorkersStatus(ready=3, wanted=3))
    expected = {"step": 6, "workers": {"ready": 3}, "goodput": None}
    assert patch_of(raw, new) == {"metadata": {"resourceVersion": "42"}, "status": expected}


@pytest.mark.parametrize(
    ("urgent", "now", "wait"), [(False, 10.0, 20.0), (True, 10.0, 0.0), (False, 30.0, 0.0), (False, 90.0, 0.0)]
)
def test_progress_waits_for_its_turn(urgent: bool, now: float, wait: float) -> None:
    assert Pace(every_s=30.0, last=0.0).wait_s(urgent, now) == wait


# --- refusals -------------------------------------------------------------------------------------------------------

QUOTA = 'pods "a-node-1" is forbidden: exceeded quota: small, requested: pods=1, used: pods=4, limited: pods=4'
RIGHTS = 'pods is forbidden: User "system:serviceaccount:x:y" cannot create resource "pods" in API group ""'
ENDING = "unable to create new content in namespace x because it is being terminated"
UNKNOWN_FIELD = 'Pod in version "v1" cannot be handled as a Pod: strict decoding error: unknown field "spec.a"'
OTHERS = 'Apply failed with 1 conflict: conflict with "kubectl" using v1: .spec.selector.a'


@pytest.mark.parametrize(
    ("verb", "status", "message", "expected", "reason"),
    [
        ("create", 422, 'Pod "x" is invalid: spec.containers[0].image: Required value', Verdict.REFUSED, "InvalidPod"),
        ("create", 403, QUOTA, Verdict.REFUSED, "QuotaExceeded"),
        ("create", 403, RIGHTS, Verdict.REFUSED, "Forbidden"),
        ("create", 403, ENDING, Verdict.BEHIND, None),
        ("create", 400, 'admission webhook "policy" denied the request', Verdict.REFUSED, "Refused"),
        ("create", 400, UNKNOWN_FIELD, Verdict.REFUSED, "InvalidPod"),
        ("create", 409, "already exists", Verdict.BEHIND, None),
        ("apply", 409, OTHERS, Verdict.REFUSED, "NameTaken"),
        (
            "apply",
            409,
            "the object has been modified; please apply your changes to the latest version",
            Verdict.BEHIND,
            None,
        ),
        ("patch", 409, "the object has been modified", Verdict.BEHIND, None),
        ("patch", 404, "not found", Verdict.BEHIND, None),
        ("delete", 404, "not found", Verdict.DONE, None),
        ("delete", 409, "the UID in the precondition does not match", Verdict.DONE, None),
        ("create", 401, "Unauthorized", Verdict.RETRY, None),
        ("create", 429, "too many requests", Verdict.RETRY, None),
        ("create", 500, "etcdserver: leader changed", Verdict.RETRY, None),
        ("create", 500, 'failed calling webhook "mesh.test": connection refused', Verdict.REFUSED, "Refused"),
        ("create", 504, "timeout", Verdict.RETRY, None),
        ("create", 0, "connection refused", Verdict.RETRY, None),
    ],
)
def test_what_an_answer_means(verb: Verb, status: int, message: str, expected: Verdict, reason: str | None) -> None:
    error = ApiError(verb, "Pod a-node-1", status, "", message)
    assert verdict(error) is expected
    if reason is not None:
        assert reason_of(error) == reason
        assert message in str(error)


def test_answers_of_others_than_the_api_server_are_read_too() -> None:
    error = from_answer("create", "Pod x", 502, b"<html>Bad gateway</html>", {"Retry-After": "7"})
    assert (error.status, error.retry_after_s) == (502, 7.0)
    assert "Bad gateway" in error.message


# --- caches ---------------------------------------------------------------------------------------------------------


def _pod(name: str, job: str = "bytelm", uid: str = "u1", node: str = "", **status: Any) -> dict[str, Any]:
    labels = {"outlast.dev/job": job, "app.kubernetes.io/managed-by": "outlast"}
    owner = [{"kind": "TrainingJob", "name": job, "uid": uid, "controller": True}]
    metadata = {"name": name, "namespace": "default", "uid": f"uid-{name}", "labels": labels, "ownerReferences": owner}
    return pruned(POD, {"metadata": {**metadata, "resourceVersion": "1"}, "spec": {"nodeName": node}, "status": status})


def _raw_job(name: str = "bytelm", uid: str = "u1", generation: int = 1, **more: Any) -> dict[str, Any]:
    metadata = {"name": name, "namespace": "default", "uid": uid, "generation": generation, "resourceVersion": "3"}
    return pruned(JOB, {"metadata": metadata, "spec": {"entrypoint": ["python", "t.py"]}, **more})


@pytest.fixture
def touched() -> list[tuple[str, Key]]:
    return []


@pytest.fixture
def caches(touched: list[tuple[str, Key]]) -> Caches:
    return Caches(lambda key: touched.append(("touched", key)), lambda key: touched.append(("renewed", key)))


def _put(caches: Caches, obj: dict[str, Any]) -> None:
    kind = next(kind for kind in caches.stores if kind.name == obj["kind"])
    if caches.stores[kind].put(obj):
        caches.changed(kind, obj)


def _machine(name: str) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "uid": name, "resourceVersion": "1"},
        "status": {"conditions": [{"type": "Ready", "status": "True", "lastHeartbeatTime": "1"}]},
    }


def test_a_job_sees_the_pods_and_not_the_machines_of_another_of_the_same_name(caches: Caches) -> None:
    """Their names are taken until they are gone."""
    for number, uid in ((1, "old"), (2, "new")):
        _put(caches, pruned(MACHINE, _machine(f"m{number}")))
        _put(caches, _pod(f"bytelm-node-{number}", uid=uid, node=f"m{number}"))
    _put(caches, _raw_job(uid="new"))
    observed = caches.observe(JOB_KEY)
    assert observed is not None
    assert [pod["metadata"]["name"] for pod in observed.pods] == ["bytelm-node-1", "bytelm-node-2"]
    assert list(observed.machines) == ["m2"]


def test_a_machine_concerns_the_jobs_with_pods_on_it(caches: Caches, touched: list[tuple[str, Key]]) -> None:
    _put(caches, _raw_job())
    _put(caches, _pod("bytelm-node-1", node="m1"))
    touched.clear()
    machine = _machine("m1")
    _put(caches, pruned(MACHINE, machine))
    assert touched == [("touched", JOB_KEY)]
    observed = caches.observe(JOB_KEY)
    assert observed is not None
    assert set(observed.machines) == {"m1"}
    machine["status"]["conditions"][0]["lastHeartbeatTime"] = "2"
    _put(caches, pruned(MACHINE, {**machine, "metadata": {**machine["metadata"], "resourceVersion": "2"}}))
    assert touched == [("touched", JOB_KEY)], "a heartbeat is no change"


def test_another_generation_renews_the_job_and_another_status_does_not(
    caches: Caches, touched: list[tuple[str, Key]]
) -> None:
    _put(caches, _raw_job())
    _put(caches, _raw_job(status={"step": 1}))
    _put(caches, _raw_job(generation=2))
    assert [what for what, _ in touched] == ["renewed", "touched", "renewed"]


def test_a_status_of_a_newer_operator_and_unknown_metadata_are_no_obstacle() -> None:
    raw = _raw_job(status={"phase": "Running", "invented": 1, "workers": {"ready": 1, "novel": True}})
    job, invalid = parse({**raw, "metadata": {**raw["metadata"], "generateName": "b-", "selfLink": "/x"}})
    assert invalid == ""
    assert job is not None
    assert job.status is not None
    assert (job.status.phase, job.status.workers.ready) == ("Running", 1)


def test_a_job_that_cannot_be_is_told_why() -> None:
    raw = _raw_job()
    job, invalid = parse({**raw, "spec": {**raw["spec"], "workers": {"replicas": 1, "minReplicas": 2}}})
    assert job is None
    assert "spec.workers.minReplicas" in invalid


def test_an_index_follows_what_changes() -> None:
    store = Store({"node": lambda obj: obj["spec"].get("nodeName") or None})
    for node in ("", "m1", "m2"):
        store.put(_pod("p", node=node))
    assert [len(store.by("node", node)) for node in ("", "m1", "m2")] == [0, 0, 1]
    store.remove(Key("default", "p"))
    assert store.by("node", "m2") == []
    assert len(store) == 0


def test_what_passes_do_not_read_is_not_kept() -> None:
    container = {"name": "outlast", "image": "i", "resources": {}, "env": [{"name": "A", "value": "b" * 999}]}
    spec = {"nodeName": "m", "containers": [container], "volumes": [{"name": "v"}], "tolerations": [{}]}
    pod = {
        "metadata": {"name": "p", "namespace": "d", "managedFields": [{"f": {}}]},
        "spec": spec,
        "status": {"podIP": "1", "hostIP": "2"},
    }
    kept = pruned(POD, pod)
    assert "managedFields" not in kept["metadata"]
    assert kept["spec"] == {"nodeName": "m", "containers": [{"name": "outlast", "image": "i", "resources": {}}]}
    assert kept["status"] == {"podIP": "1"}
    assert pruned(POD, kept) == kept


@pytest.mark.parametrize("kind", [POLICY, BUDGET, SECRET])
def test_an_apply_that_changed_nothing_is_no_change(kind: Any) -> None:
    """The API server raises the generation of a NetworkPolicy when {} was given and nothing was kept."""

    def version(number: int) -> Object:
        return pruned(
            kind, {"metadata": {"name": "x", "generation": number, "resourceVersion": str(number)}, "spec": {}}
        )

    assert same(version(1), version(2))


# --- events ---------------------------------------------------------------------------------------------------------

SAID = Happening("Normal", "Started", "ranks run")


def _other(number: int) -> Happening:
    return Happening("Warning", "Lost", f"node {number} is gone")


def test_what_is_said_again_raises_a_count_now_and_then() -> None:
    digest, raw = Digest(), _raw_job()
    first = digest.line(raw, SAID, 0.0)
    again = [digest.line(raw, SAID, now) for now in (1.0, 2.0, REPEAT_S + 1)]
    assert first is not None
    assert again[:2] == [None, None]
    assert again[2] is not None
    assert (again[2].name, again[2].count, again[2].last) == (first.name, 4, REPEAT_S + 1)
    anew = digest.line(raw, SAID, REPEAT_S + AGAIN_S + 2)
    assert anew is not None
    assert (anew.count, anew.name != first.name) == (1, True)


def test_a_job_that_has_much_to_say_is_cut_off() -> None:
    digest, raw = Digest(), _raw_job()
    told = [digest.line(raw, _other(number), 1000.0) is not None for number in range(100)]
    assert told == [True] * int(BURST) + [False] * (100 - int(BURST))
    assert digest.line(raw, _other(200), 1000.0 + EVERY_S) is not None
    assert digest.line(raw, _other(201), 1000.0 + EVERY_S) is None


def test_what_an_earlier_job_of_the_name_told_is_told_of_the_new_one() -> None:
    events = Events(cast(Cluster, None), ManualClock(), "x", lambda: None)
    for uid in ("one", "one", "two"):
        raw = _raw_job()
        events.tell({**raw, "metadata": {**raw["metadata"], "uid": uid}}, [SAID])
    assert events._lines.qsize() == 2


def test_names_of_events_differ() -> None:
    digest, raw = Digest(), _raw_job()
    lines = [digest.line(raw, _other(number), 5.0) for number in range(20)]
    assert len({line.name for line in lines if line is not None}) == 20


def test_a_condition_survives_the_way_to_json() -> None:
    condition = Condition(type="Ready", status="True", reason="Running", last_transition_time="2026-01-01T00:00:00Z")
    tree = json.loads(json.dumps(as_json(TrainingJobStatus(conditions=(condition,)))))
    job, invalid = parse(_raw_job(status=tree))
    assert invalid == ""
    assert job is not None
    assert job.status == TrainingJobStatus(conditions=(condition,))
