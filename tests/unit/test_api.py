"""The TrainingJob: what is read, what is refused, and in which words."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from outlast.api import Checkpoint, Erasure, Recovery, TrainingJob, TrainingJobStatus, Workers, group_sizes, load
from outlast.errors import RequestError, SpecError
from outlast.resource import Part, fields_of

MINIMAL = """
apiVersion: outlast.dev/v1alpha1
kind: TrainingJob
metadata: {name: bytelm}
spec: {entrypoint: [python, train.py]}
"""
FULL = """
apiVersion: outlast.dev/v1alpha1
kind: TrainingJob
metadata: {name: bytelm}
spec:
  entrypoint: [python, train.py, --steps, "2000"]
  env: [{name: NCCL_DEBUG, value: WARN}]      # as in a Pod
  workers:
    replicas: 4                 # nodes that train
    minReplicas: 2              # absent: never shrink
    spares: 1
    procsPerWorker: 1           # ranks on a node
    failureDomain: topology.kubernetes.io/zone
    template: {spec: {containers: []}}
  head: {template: {}}
  snapshot:
    everySteps: auto
    erasure: {parity: 2, groupSize: 4}
    maxMemory: 8Gi
  checkpoint:                   # absent: no object tier
    url: s3://bucket/prefix     # or file:///folder
    interval: 10m               # or a number of steps, or auto
    restoreFrom: s3://bucket/prefix/default/other@12000
    keepLast: 5
    keepEverySteps: 10000
    bandwidth: 200Mi
  recovery:
    {maxRestarts: 20, window: 1h, hangTimeout: auto, shrinkAfter: 60s, growAfter: 45s, startTimeout: 15m}
  faults: {allow: false}
  suspend: false
  activeDeadlineSeconds: 604800
  ttlSecondsAfterFinished: 86400
"""


def problems_of(text: str, *overrides: str) -> dict[str, str]:
    with pytest.raises(SpecError) as caught:
        load(text, overrides)
    return dict(caught.value.problems)


def test_the_smallest_job_has_defaults_for_a_first_run() -> None:
    spec = load(MINIMAL).spec
    assert spec.entrypoint == ("python", "train.py")
    assert (spec.workers.replicas, spec.workers.spares, spec.workers.procs_per_worker) == (1, 0, 1)
    assert spec.workers.min_replicas is None
    assert (spec.snapshot.every_steps, spec.snapshot.max_memory) == ("auto", None)
    assert spec.snapshot.erasure == Erasure()
    assert spec.recovery == Recovery()
    assert (spec.recovery.max_restarts, spec.recovery.window, spec.recovery.hang_timeout) == (20, 3600.0, "auto")
    assert (spec.recovery.shrink_after, spec.recovery.grow_after, spec.recovery.start_timeout) == (60.0, 30.0, 900.0)
    assert spec.checkpoint is None
    assert not spec.suspend
    assert not spec.faults.allow


def test_the_whole_resource_is_read() -> None:
    job = load(FULL)
    assert (job.metadata.name, job.metadata.namespace) == ("bytelm", "default")
    assert [(variable.name, variable.value) for variable in job.spec.env] == [("NCCL_DEBUG", "WARN")]
    assert job.spec.workers.template == {"spec": {"containers": []}}
    assert job.spec.snapshot.erasure == Erasure(parity=2, group_size=4)
    assert job.spec.snapshot.max_memory == 8 * 1024**3
    assert job.spec.recovery.window == 3600.0
    assert job.spec.active_deadline_seconds == 604800


def test_the_object_tier_is_read() -> None:
    spec = load(FULL).spec
    assert spec.workers.min_replicas == 2
    assert spec.recovery.grow_after == 45.0
    assert spec.checkpoint == Checkpoint(
        url="s3://bucket/prefix",
        interval="10m",
        restore_from="s3://bucket/prefix/default/other@12000",
        keep_last=5,
        keep_every_steps=10000,
        bandwidth=200 * 1024**2,
    )
    assert spec.checkpoint.interval == 600.0


def test_of_the_object_tier_only_the_store_must_be_told() -> None:
    checkpoint = load(MINIMAL, ["checkpoint.url=file:///folder/"]).spec.checkpoint
    assert checkpoint is not None
    assert (checkpoint.url, checkpoint.interval, checkpoint.restore_from) == ("file:///folder", "auto", None)
    assert (checkpoint.keep_last, checkpoint.keep_every_steps, checkpoint.bandwidth) == (3, None, None)
    assert "s3://bucket/prefix" in problems_of(MINIMAL, "checkpoint={}")["spec.checkpoint.url"]


@pytest.mark.parametrize(("text", "value"), [("100", 100), ("10m", 600.0), ("auto", "auto")])
def test_a_checkpoints_interval_keeps_its_kind(text: str, value: object) -> None:
    job = load(FULL, [f"checkpoint.interval={text}"])
    for each in (job, load(job.to_yaml())):
        assert each.spec.checkpoint is not None
        assert (each.spec.checkpoint.interval, type(each.spec.checkpoint.interval)) == (value, type(value))


def test_null_is_absent() -> None:
    job = load(FULL, ["snapshot=null", "workers.minReplicas=", "spec.checkpoint=null"])
    assert job.spec.snapshot == load(MINIMAL).spec.snapshot
    assert load(MINIMAL.replace("metadata: {name: bytelm}", "metadata: {name: a, namespace: null}"))


def test_a_job_survives_writing() -> None:
    job = load(FULL)
    assert load(job.to_yaml()) == job
    everything = job.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert everything["spec"]["snapshot"]["maxMemory"] == "8Gi"
    assert everything["spec"]["recovery"]["window"] == "1h"
    assert load(yaml.safe_dump(everything)) == job


def test_the_status_of_a_file_is_dropped_and_the_api_servers_metadata_accepted() -> None:
    tree = yaml.safe_load(MINIMAL)
    tree["status"] = {"phase": "Running"}
    tree["metadata"] |= {"uid": "1", "resourceVersion": "2", "creationTimestamp": "2026-01-01T00:00:00Z"}
    assert load(yaml.safe_dump(tree)).status is None


def test_a_job_read_from_a_cluster_keeps_its_status() -> None:
    tree = yaml.safe_load(MINIMAL) | {"status": {"phase": "Running", "step": 7, "workers": {"ready": 1, "wanted": 1}}}
    job = TrainingJob.from_yaml_tree(tree)
    assert job.status is not None
    assert (job.status.phase, job.status.step, job.status.workers.ready) == ("Running", 7, 1)
    assert TrainingJobStatus().phase == "Pending"


def test_the_newest_checkpoint_stands_in_the_status() -> None:
    newest = {"step": 12000, "time": "2026-01-01T00:00:00Z", "url": "s3://bucket/prefix/default/bytelm@12000"}
    tree = yaml.safe_load(MINIMAL) | {"status": {"phase": "Running", "checkpoint": newest}}
    status = TrainingJob.from_yaml_tree(tree).status
    assert status is not None
    assert status.checkpoint is not None
    assert status.model_dump(mode="json", by_alias=True)["checkpoint"] == newest
    assert load(FULL, [f"checkpoint.restoreFrom={status.checkpoint.url}", "metadata.name=branch"])


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("workers.replicas=0", "spec.workers.replicas", ["0 was given", "at least 1"]),
        ("workers.replicas='4'", "spec.workers.replicas", ['"4" was given', "whole number"]),
        ("workers.replicas=4.0", "spec.workers.replicas", ["4.0 was given", "whole number"]),
        ("workers.replicas=true", "spec.workers.replicas", ["true was given", "whole number"]),
        ("workers.spares=-1", "spec.workers.spares", ["-1 was given", "at least 0"]),
        ("workers=[]", "spec.workers", ["[] was given", "mapping"]),
        ("entrypoint=python train.py", "spec.entrypoint", ["python train.py", "list"]),
        ("entrypoint=[]", "spec.entrypoint", ["[] was given", "at least 1 entry"]),
        ("entrypoint[0]=''", "spec.entrypoint", ["must name a program"]),
        ("entrypoint[3]=2000", "spec.entrypoint[3]", ["2000 was given", "quotes"]),
        ("env[0].value=1", "spec.env[0].value", ["1 was given", "quotes"]),
        ("env[0].name=1X", "spec.env[0].name", ['"1X"', "no digit first"]),
        ("env[0].name=RANK", "spec.env[0].name", ['"RANK"', "set by Outlast"]),
        ("env[0].valueFrom={}", "spec.env[0].valueFrom", ["not there yet"]),
        ("env[1].name=NCCL_DEBUG", "spec.env[1].name", ["given twice"]),
        ("suspend='no'", "spec.suspend", ['"no" was given', "true or false"]),
        ("snapshot.everySteps=0", "spec.snapshot.everySteps", ["0 is no number of steps", "auto"]),
        ("snapshot.everySteps=often", "spec.snapshot.everySteps", ['"often"', "auto"]),
        ("snapshot.maxMemory=8GB", "spec.snapshot.maxMemory", ['"8GB"', "did you mean 8G?"]),
        ("snapshot.maxMemory=8", "spec.snapshot.maxMemory", ["8 bytes", "1Mi"]),
        ("recovery.window=10 min", "spec.recovery.window", ['"10 min"', "did you mean 10m?"]),
        ("recovery.window=0s", "spec.recovery.window", ["too short"]),
        ("recovery.hangTimeout=never", "spec.recovery.hangTimeout", ['"never"', "or write auto"]),
        ("recovery.growAfter=soon", "spec.recovery.growAfter", ['"soon" is no duration', "10m"]),
        ("recovery.growAfter=-1s", "spec.recovery.growAfter", ['"-1s" is no duration']),
        ("workers.minReplicas=0", "spec.workers.minReplicas", ["0 was given", "at least 1"]),
        ("checkpoint.url=/mnt/x", "spec.checkpoint.url", ['"/mnt/x" is no store', "did you mean file:///mnt/x?"]),
        ("checkpoint.url=gs://bucket/x", "spec.checkpoint.url", ["is no store", "s3://bucket/prefix"]),
        ("checkpoint.url=s3://Bucket", "spec.checkpoint.url", ['"Bucket" is no bucket']),
        ("checkpoint.url=3", "spec.checkpoint.url", ["3 was given", "text"]),
        ("checkpoint.url=null", "spec.checkpoint.url", ["is missing", "s3://bucket/prefix"]),
        ("checkpoint.interval=0", "spec.checkpoint.interval", ["0 is no interval", "10m", "auto"]),
        ("checkpoint.interval=10 min", "spec.checkpoint.interval", ["did you mean 10m?"]),
        ("checkpoint.interval='100'", "spec.checkpoint.interval", ["100 (steps) or 100s"]),
        ("checkpoint.interval=0s", "spec.checkpoint.interval", ["too short"]),
        ("checkpoint.interval=2.5", "spec.checkpoint.interval", ["2.5 is no interval"]),
        ("checkpoint.restoreFrom=s3://b/x@1", "spec.checkpoint.restoreFrom", ['"b" is no bucket']),
        ("checkpoint.restoreFrom=other@12", "spec.checkpoint.restoreFrom", ["is no store"]),
        ("checkpoint.restoreFrom=s3://bucket/o@new", "spec.checkpoint.restoreFrom", ['"@new" is no step', "@12000"]),
        ("checkpoint.keepLast=0", "spec.checkpoint.keepLast", ["0 was given", "at least 1"]),
        ("checkpoint.keepEverySteps=0", "spec.checkpoint.keepEverySteps", ["0 was given", "at least 1"]),
        ("checkpoint.keepEverySteps=1h", "spec.checkpoint.keepEverySteps", ['"1h" was given', "whole number"]),
        ("checkpoint.bandwidth=200MB", "spec.checkpoint.bandwidth", ['"200MB"', "did you mean 200M?"]),
        ("checkpoint.bandwidth=0", "spec.checkpoint.bandwidth", ["too little", "1Mi"]),
        ("checkpoint=s3://bucket/x", "spec.checkpoint", ["was given", "mapping"]),
        ("metadata.name=By_te", "metadata.name", ['"By_te" is no DNS label', "a-z"]),
        ("metadata.namespace=-a", "metadata.namespace", ['"-a" is no DNS label']),
        (f"metadata.name={'a' * 64}", "metadata.name", ["at most 63"]),
        ("metadata.labels.a=1", "metadata.labels.a", ["1 was given", "text"]),
        ("metadata.labels[a.b/c]=1", "metadata.labels[a.b/c]", ["1 was given", "text"]),
        ("apiVersion=v1", "apiVersion", ['"v1" was given', "outlast.dev/v1alpha1"]),
        ("kind=Job", "kind", ['"Job" was given', "TrainingJob"]),
        ("kind=null", "kind", ["is missing"]),
    ],
)
def test_a_wrong_value_is_named_with_its_path_and_what_is_allowed(override: str, path: str, words: list[str]) -> None:
    problems = problems_of(FULL, override)
    assert list(problems) == [path]
    for word in words:
        assert word in problems[path]


@pytest.mark.parametrize(
    ("override", "path", "suggestion"),
    [
        ("workers.spars=1", "spec.workers.spars", 'did you mean "spares"?'),
        ("workers.min_replicas=1", "spec.workers.min_replicas", 'did you mean "minReplicas"?'),
        ("workers.procs-per-worker=1", "spec.workers.procs-per-worker", 'did you mean "procsPerWorker"?'),
        ("replicas=1", "spec.replicas", 'did you mean "spec.workers.replicas"?'),
        ("snapshot.erasure.zzz=1", "spec.snapshot.erasure.zzz", "allowed are groupSize, parity"),
        ("checkpoint.restore_from=s3://bucket/x", "spec.checkpoint.restore_from", 'did you mean "restoreFrom"?'),
        ("checkpoint.keep=3", "spec.checkpoint.keep", "keepEverySteps, keepLast"),
        ("keepLast=3", "spec.keepLast", 'did you mean "spec.checkpoint.keepLast"?'),
        ("recovery.growafter=1s", "spec.recovery.growafter", 'did you mean "growAfter"?'),
        ("env[0].nmae=1", "spec.env[0].nmae", 'did you mean "name"?'),
        ("metadata.naem=x", "metadata.naem", 'did you mean "name"?'),
    ],
)
def test_an_unknown_field_is_refused_with_a_suggestion(override: str, path: str, suggestion: str) -> None:
    assert suggestion in problems_of(FULL, override)[path]


def test_a_field_at_the_top_is_sent_to_its_place() -> None:
    assert 'did you mean "spec.workers"' in problems_of(MINIMAL + "workers: {replicas: 3}\n")["workers"]


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("diloco={}", "spec.diloco"),
    ],
)
def test_what_comes_later_is_refused_as_not_there_yet(override: str, path: str) -> None:
    assert "not there yet" in problems_of(FULL, override)[path]


@pytest.mark.parametrize(
    ("overrides", "path", "allowed"),
    [
        (["workers.minReplicas=5"], "spec.workers.minReplicas", "at most replicas, which is 4"),
        (["workers.replicas=3", "workers.minReplicas=4"], "spec.workers.minReplicas", "replicas, which is 3"),
        (["workers.replicas=3"], "spec.snapshot.erasure.groupSize", "at most spec.workers.replicas, which is 3"),
        (["snapshot.erasure.parity=4"], "spec.snapshot.erasure.parity", "at most 3, as 4 nodes make groups of 4"),
        (["snapshot.erasure.groupSize=2"], "spec.snapshot.erasure.parity", "at most 1, as 4 nodes make groups of 2, 2"),
        (["snapshot.erasure.groupSize=1"], "spec.snapshot.erasure.groupSize", "at least 2"),
        (["snapshot.erasure.parity=0"], "spec.snapshot.erasure.parity", "at least 1"),
        (["snapshot.erasure.groupSize=null", "workers.replicas=2"], "spec.snapshot.erasure.parity", "at most 1"),
        (["snapshot.erasure.groupSize=null", "workers.replicas=1"], "spec.snapshot.erasure.parity", "leave it out"),
        (["snapshot.erasure={parity: 5}", "workers.replicas=10"], "spec.snapshot.erasure.parity", "groups of 5, 5"),
    ],
)
def test_what_cannot_be_together_is_refused(overrides: list[str], path: str, allowed: str) -> None:
    assert allowed in problems_of(FULL, *overrides)[path]


@pytest.mark.parametrize("restore_from", ["s3://bucket/prefix/default/bytelm", "s3://bucket/prefix/default/bytelm/@7"])
def test_a_job_does_not_start_from_its_own_checkpoints(restore_from: str) -> None:
    overrides = ["checkpoint.url=s3://bucket/prefix/", f"checkpoint.restoreFrom={restore_from}"]
    problem = problems_of(FULL, *overrides)["spec.checkpoint.restoreFrom"]
    assert "s3://bucket/prefix/default/bytelm is where this job's own checkpoints go" in problem
    assert "--resume" in problem
    for other in ("metadata.name=other", "metadata.namespace=team", "checkpoint.url=s3://bucket/elsewhere"):
        assert load(FULL, [*overrides, other])


def test_the_most_that_may_be_together_is_accepted() -> None:
    assert load(FULL, ["workers.minReplicas=4", "snapshot.erasure.parity=3"]).spec.workers.min_replicas == 4
    assert load(FULL, ["workers.replicas=3", "snapshot.erasure={groupSize: 2, parity: 2}"])


def test_combinations_are_checked_however_a_job_is_made() -> None:
    job = load(MINIMAL)
    spec = job.spec.model_copy(update={"workers": Workers(replicas=2, min_replicas=3)})
    with pytest.raises(SpecError, match="at most replicas"):
        TrainingJob(api_version=job.api_version, kind=job.kind, metadata=job.metadata, spec=spec)


@given(st.integers(1, 200), st.one_of(st.none(), st.integers(2, 200)))
def test_groups_cover_the_nodes_and_leave_none_alone(replicas: int, size: int | None) -> None:
    sizes = group_sizes(replicas, size)
    assert sum(sizes) == replicas
    assert max(sizes) - min(sizes) <= 1
    assert replicas == 1 or min(sizes) >= 2


def test_all_problems_are_told_at_once() -> None:
    problems = problems_of(FULL, "workers.replicas=0", "workers.spars=1", "diloco={}", "metadata.name=X")
    assert set(problems) == {"spec.workers.replicas", "spec.workers.spars", "spec.diloco", "metadata.name"}


def test_missing_fields_are_told_with_what_they_are_for() -> None:
    problems = problems_of("spec: {}")
    assert set(problems) == {"apiVersion", "kind", "metadata", "spec.entrypoint"}
    assert "[python, train.py" in problems["spec.entrypoint"]


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "b.c", "given twice (lines 3 and 4)"),
        ("a:\n- {x: 1, x: 2}\n", "a[0].x", "given twice"),
        ("", "", "empty"),
        ("# nothing\n", "", "empty"),
        ("a: 1\n---\nb: 2\n", "", "2 documents"),
        ("- a\n", "", "a list"),
        ("just text\n", "", "must hold a mapping"),
        ("a: [1\n", "", "line 2, column 1"),
        ("\ta: 1\n", "", "line 1, column 1"),
        ("a: &x [*x]\n", "a[0]", "holds itself"),
        ("1: 2\n", "", "put it in quotes"),
        ("a: {yes: 1}\n", "a", '"yes" cannot name a field'),
        ("a: !!python/object:os.system 1\n", "", "line 1"),
        pytest.param("[" * 3000, "", "nested too deeply", id="deep"),
        ("a: \x00", "", "no YAML"),
    ],
)
def test_a_file_that_is_no_resource(text: str, path: str, words: str) -> None:
    problems = problems_of(text)
    assert words in problems[path]


def test_an_empty_document_more_does_no_harm() -> None:
    assert load(f"---\n{MINIMAL}---\n") == load(MINIMAL)


def test_anchors_merges_and_dates_are_read_as_kubernetes_does() -> None:
    tree = load(
        FULL,
        ["workers.template={a: &x {k: 1}, b: {<<: *x, d: 2026-01-01}}"],
    ).spec.workers.template
    assert tree == {"a": {"k": 1}, "b": {"k": 1, "d": "2026-01-01"}}


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("spec.workers.replicas=8", lambda spec: spec.workers.replicas, 8),
        ("workers.replicas=8", lambda spec: spec.workers.replicas, 8),
        (" workers.replicas = 8", lambda spec: spec.workers.replicas, 8),
        ("entrypoint[3]='7'", lambda spec: spec.entrypoint[3], "7"),
        ("entrypoint.3='7'", lambda spec: spec.entrypoint[3], "7"),
        ("entrypoint[4]=--x=1", lambda spec: spec.entrypoint[4], "--x=1"),
        ("env[1]={name: A, value: b}", lambda spec: spec.env[1].name, "A"),
        ("snapshot.maxMemory=200Mi", lambda spec: spec.snapshot.max_memory, 200 * 1024**2),
        ("workers.template.spec.priority=3", lambda spec: spec.workers.template["spec"]["priority"], 3),
        ("workers.template.list[0].x=3", lambda spec: spec.workers.template["list"], [{"x": 3}]),
    ],
)
def test_an_override_sets_one_field(override: str, get: Any, value: object) -> None:
    assert get(load(FULL, [override]).spec) == value


def test_the_last_override_wins() -> None:
    assert load(FULL, ["workers.replicas=5", "workers.replicas=6"]).spec.workers.replicas == 6


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("foo", "spec.foo", "path=value"),
        ("=1", "", "path=value"),
        ("a..b=1", "spec.a..b", "path=value"),
        ("entrypoint[9]=x", "spec.entrypoint", "0 to 4"),
        ("entrypoint.x=1", "spec.entrypoint", "0 to 4"),
        ("suspend.x=1", "spec.suspend", "cannot be set in it"),
        ("workers={", "spec.workers", "no YAML"),
        ("workers={spares: 1, spares: 2}", "spec.workers.spares", "given twice"),
    ],
)
def test_an_override_that_cannot_be(override: str, path: str, words: str) -> None:
    assert words in problems_of(FULL, override)[path]


def test_a_problem_survives_pickling() -> None:
    with pytest.raises(RequestError) as caught:
        load("a: 1\na: 2\n")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) == "a: is given twice (lines 1 and 2); keep one"


def all_parts(part: type[Part] = TrainingJob) -> list[type[Part]]:
    return [part, *(inner for child in fields_of(part).values() if child for inner in all_parts(child))]


@pytest.mark.parametrize("part", sorted(set(all_parts()), key=str))
def test_every_field_is_described(part: type[Part]) -> None:
    for name, info in part.model_fields.items():
        assert info.description, f"{part.__name__}.{name}"
        assert info.description.endswith("."), f"{part.__name__}.{name}"


def test_a_schema_can_be_made() -> None:
    schema = TrainingJob.model_json_schema()
    recovery = schema["$defs"]["Recovery"]["properties"]
    assert recovery["window"]["x-kubernetes-int-or-string"]
    assert schema["$defs"]["Workers"]["additionalProperties"] is False
    assert "minReplicas" in schema["$defs"]["Workers"]["properties"]


def test_values_do_not_change() -> None:
    with pytest.raises(ValidationError):
        load(MINIMAL).spec.suspend = True


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
PATHS = sorted(
    {
        f"{parent}.{name}"
        for parent in ("spec", "spec.workers", "spec.recovery", "spec.snapshot", "spec.checkpoint", "metadata")
        for part in all_parts()
        for name in fields_of(part)
    }
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PATHS), VALUES)
def test_any_value_anywhere_is_taken_or_refused_in_words(path: str, value: object) -> None:
    override = f"{path}={yaml.safe_dump(value, default_flow_style=True)}"
    try:
        job = load(FULL, [override])
    except SpecError as error:
        assert all(text for _, text in error.problems)  # noqa: PT017 (either outcome is right)
    else:
        assert load(job.to_yaml()) == job
