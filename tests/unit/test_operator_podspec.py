"""Pods out of templates: what is refused and what to write instead, what is added, the head's, security, memory."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outlast import kube
from outlast.api import TrainingJob
from outlast_operator import podspec
from outlast_operator.caches import parse
from outlast_operator.memory import memory_sum, parse_memory, parse_quantity
from support.operator_world import NAME, NAMESPACE, SETTINGS, Json, resource

GI = 1 << 30


def job_with(template: Json | None = None, head: Json | None = None, **spec: Any) -> TrainingJob:
    workers = {} if template is None else {"template": template}
    heads = {} if head is None else {"head": {"template": head}}
    job, invalid = parse(resource({**heads, **spec}, workers=workers))
    assert job is not None, invalid
    return job


def node_of(template: Json | None = None, **spec: Any) -> Json:
    job = job_with(template, **spec)
    assert podspec.problems(job) == []
    return podspec.node_pod(job, SETTINGS, 7)


def head_of(template: Json | None = None, head: Json | None = None) -> Json:
    job = job_with(template, head)
    assert podspec.problems(job) == []
    return podspec.head_pod(job, SETTINGS, 7)


def of(container: Json | None = None, **spec: Any) -> Json:
    return {"spec": {"containers": [{"name": "outlast", **(container or {})}], **spec}}


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "path", "hint"),
    [
        (of({"command": ["python"]}), "spec.containers[0].command", "spec.entrypoint"),
        (of({"args": ["--fast"]}), "spec.containers[0].args", "spec.entrypoint"),
        ({"spec": {"containers": [{"name": "side"}, {"name": "outlast", "command": ["x"]}]}}, "spec.containers[1].command", ""),
        ({"spec": {"containers": [{"name": "first", "command": ["x"]}, {"name": "side"}]}}, "spec.containers[0].command", ""),
        (of(volumes=[{"name": "outlast-run", "emptyDir": {}}]), "spec.volumes[0].name", "call yours otherwise"),
        (of(volumes=[{"name": "a"}, {"name": "a"}]), "spec.volumes[1].name", "given twice"),
        (of({"volumeMounts": [{"name": "d", "mountPath": "/dev/shm"}]}), "spec.containers[0].volumeMounts[0].mountPath", "elsewhere"),
        (of({"volumeMounts": [{"name": "d", "mountPath": "/run/outlast/x/"}]}), "spec.containers[0].volumeMounts[0].mountPath", "/run/outlast"),
        (of({"volumeMounts": [{"name": "outlast-job", "mountPath": "/x"}]}), "spec.containers[0].volumeMounts[0].name", "your own"),
        (of({"env": [{"name": "OUTLAST_HEAD", "value": "x"}]}), "spec.containers[0].env[0].name", "leave it out"),
        (of({"env": [{"name": "A"}, {"name": "A"}]}), "spec.containers[0].env[1].name", "given twice"),
        (of({"env": [{"name": "A", "value": "1"}, {"name": "B", "value": 1}]}), "spec.containers[0].env[1].value", "quotes"),
        (of({"volumeMounts": [{"name": {}, "mountPath": "/x"}]}), "spec.containers[0].volumeMounts[0].name", "must be a text"),
        (of(volumes=[{"name": []}]), "spec.volumes[0].name", "must be a text"),
        (of({"env": [{"name": 0}]}), "spec.containers[0].env[0].name", "must be a text"),
        (of({"ports": 8080}), "spec.containers[0].ports", "list of mappings"),
        (of(tolerations={"key": "gpu"}), "spec.tolerations", "list of mappings"),
        (of(imagePullSecrets="regcred"), "spec.imagePullSecrets", "list of mappings"),
        (of(nodeSelector=["gpu"]), "spec.nodeSelector", "must be a mapping"),
        (of({"lifecycle": {"preStop": {}}}), "spec.containers[0].lifecycle", "leave it out"),
        ({"spec": {"containers": [{"name": "a"}, {"name": "a"}]}}, "spec.containers[1].name", "given twice"),
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.containers", "call it outlast"),
        (of(hostNetwork=True), "spec.hostNetwork", "secondary network"),
        (of(hostIPC=True), "spec.hostIPC", "leave it out"),
        (of(hostPID=True), "spec.hostPID", "leave it out"),
        (of(restartPolicy="Never"), "spec.restartPolicy", "leave it out"),
        (of(activeDeadlineSeconds=5), "spec.activeDeadlineSeconds", "write spec.activeDeadlineSeconds"),
        (of(terminationGracePeriodSeconds=0), "spec.terminationGracePeriodSeconds", "such as 60"),
        ({"containers": []}, "containers", "below spec.workers.template.spec"),
        ({"metadata": {"name": "x"}}, "metadata.name", "only labels and annotations"),
        ({"metadata": {"labels": {"outlast.dev/role": "head"}}}, "metadata.labels", "leave it out"),
        ({"metadata": {"labels": {"app.kubernetes.io/managed-by": "me"}}}, "metadata.labels", "leave it out"),
        ({"spec": ["x"]}, "spec", "must be a mapping"),
        ({"spec": {"containers": {"name": "x"}}}, "spec.containers", "list of mappings"),
        ({"spec": {"containers": ["x"]}}, "spec.containers", "list of mappings"),
        ({"spec": {"containers": "x"}}, "spec.containers", "list of mappings"),
        (of({"env": {"A": "b"}}), "spec.containers[0].env", "list of mappings"),
        (of({"resources": {"limits": "1Gi"}}), "spec.containers[0]", "must be mappings"),
        (of({"resources": {"limits": {"memory": "lots"}}}), "spec.containers[0].resources.limits.memory", "8Gi"),
        (of({"resources": {"limits": {"memory": "1Gi"}}}), "spec.containers[0].resources.limits.memory", "2Gi"),
    ],
)  # fmt: skip
def test_what_is_refused(template: Json, path: str, hint: str) -> None:
    found = podspec.problems(job_with(template))
    paths = [where for where, _ in found]
    assert paths == [f"spec.workers.template.{path}"]
    assert hint in found[0][1]


def test_the_heads_template_is_checked_likewise() -> None:
    found = podspec.problems(job_with(head=of({"command": ["ray"]})))
    assert [path for path, _ in found] == ["spec.head.template.spec.containers[0].command"]


@pytest.mark.parametrize(
    "template",
    [
        {},
        {"spec": {}},
        of({"image": "mine:1"}),
        of(restartPolicy="OnFailure"),
        of({"ports": [{"containerPort": 80, "name": None}, {"containerPort": 81, "name": None}]}),
        of({"command": [], "args": []}),
        {"spec": {"containers": [{"name": "side", "command": ["x"]}, {"name": "outlast"}]}},
        {"metadata": {"creationTimestamp": None, "labels": {"team": "a"}}},
    ],
)
def test_what_is_accepted(template: Json) -> None:
    assert podspec.problems(job_with(template)) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["spec", "metadata", "containers", "name", "env", "volumes", "volumeMounts", "resources", "limits", "memory",
         "securityContext", "affinity", "labels", "annotations", "initContainers", "topologySpreadConstraints"]
    ), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["spec", "metadata", "other"]), json_values, max_size=3))
def test_any_template_is_judged_and_what_passes_can_be_made(template: Json) -> None:
    """The schema keeps templates as they are: nothing in one may break the operator."""
    job = job_with(template)
    if not podspec.problems(job):
        podspec.node_pod(job, SETTINGS, 1)
        podspec.head_pod(job, SETTINGS, 1)


# --- added ----------------------------------------------------------------------------------------------------------


def test_a_node_pod_has_what_the_runtime_needs() -> None:
    made = node_of(of({"image": "mine:1", "env": [{"name": "A", "value": "b"}]}, volumes=[{"name": "data"}]))
    labels = made["metadata"]["labels"]
    assert made["metadata"]["name"] == labels[kube.POD_LABEL] == f"{NAME}-node-7"
    assert (labels[kube.JOB_LABEL], labels[kube.ROLE_LABEL]) == (NAME, "node")
    assert labels[kube.MANAGED_BY_LABEL] == kube.MANAGED_BY
    assert made["metadata"]["annotations"][kube.VERSION_ANNOTATION] == "0.1.0"
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["controller"], owner["blockOwnerDeletion"], owner["uid"]) == (True, False, "job-uid")
    spec = made["spec"]
    assert (spec["restartPolicy"], spec["terminationGracePeriodSeconds"]) == ("OnFailure", 60)
    assert spec["automountServiceAccountToken"] is False
    (main,) = spec["containers"]
    assert (main["image"], main["command"]) == ("mine:1", ["python", "-P", "-m", "outlast.pod.node"])
    assert "imagePullPolicy" not in main, "of one's own image Kubernetes decides"
    env = {
        variable["name"]: variable.get("value") or variable["valueFrom"]["fieldRef"]["fieldPath"]
        for variable in main["env"]
    }
    assert env == {
        kube.POD_VARIABLE: "metadata.name",
        kube.POD_IP_VARIABLE: "status.podIP",
        kube.MACHINE_VARIABLE: "spec.nodeName",
        kube.GRACE_VARIABLE: "60",
        kube.HEAD_VARIABLE: f"{NAME}-head.{NAMESPACE}.svc",
        "A": "b",
    }
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/etc/outlast", "/run/outlast", "/dev/shm"}
    assert [volume["name"] for volume in spec["volumes"]] == ["data", "outlast-job", "outlast-run", "outlast-memory"]
    assert spec["volumes"][-1]["emptyDir"] == {"medium": "Memory"}
    assert main["readinessProbe"]["httpGet"] == {"path": "/healthz", "port": 8471, "scheme": "HTTP"}
    live = main["livenessProbe"]
    assert live["failureThreshold"] * live["periodSeconds"] >= 300, "a busy node is not killed"


def test_a_head_pod_has_no_memory_volume_and_another_command() -> None:
    (main,) = head_of()["spec"]["containers"]
    assert main["command"] == ["python", "-P", "-m", "outlast.pod.head"]
    assert {mount["mountPath"] for mount in main["volumeMounts"]} == {"/etc/outlast", "/run/outlast"}
    assert main["readinessProbe"]["httpGet"]["port"] == 8470
    assert kube.HEAD_VARIABLE not in {variable["name"] for variable in main["env"]}


def test_an_image_is_not_needed() -> None:
    (main,) = node_of()["spec"]["containers"]
    assert (main["name"], main["image"], main["imagePullPolicy"]) == ("outlast", "outlast-training:dev", "IfNotPresent")


def test_what_the_template_says_stays() -> None:
    template = {
        "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
        "spec": {
            "containers": [
                {"name": "side", "image": "side:1", "command": ["run"]},
                {"name": "outlast", "livenessProbe": {"exec": {"command": ["true"]}}, "workingDir": "/work"},
            ],
            "terminationGracePeriodSeconds": 300,
            "automountServiceAccountToken": True,
            "priorityClassName": "high",
            "affinity": {"nodeAffinity": {}},
        },
    }
    before = copy.deepcopy(template)
    made = node_of(template)
    assert template == before, "a template is not changed"
    assert made["metadata"]["labels"]["team"] == "a"
    assert made["metadata"]["annotations"]["note"] == "b"
    spec = made["spec"]
    assert (spec["terminationGracePeriodSeconds"], spec["automountServiceAccountToken"]) == (300, True)
    assert spec["containers"][0] == template["spec"]["containers"][0]  # type: ignore[index]
    main = spec["containers"][1]
    assert main["livenessProbe"] == {"exec": {"command": ["true"]}}
    assert {"name": kube.GRACE_VARIABLE, "value": "300"} in main["env"]
    assert spec["priorityClassName"] == "high"


@pytest.mark.parametrize(
    ("domain", "given", "keys"),
    [
        (None, [], ["kubernetes.io/hostname"]),
        ("topology.kubernetes.io/zone", [], ["topology.kubernetes.io/zone"]),
        ("topology.kubernetes.io/zone", ["topology.kubernetes.io/zone"], ["topology.kubernetes.io/zone"]),
        (None, ["topology.kubernetes.io/zone"], ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]),
    ],
)
def test_nodes_are_spread_over_the_failure_domain(domain: str | None, given: list[str], keys: list[str]) -> None:
    template = of(topologySpreadConstraints=[{"topologyKey": key, "maxSkew": 2} for key in given])
    raw = resource(workers={"template": template, **({"failureDomain": domain} if domain else {})})
    job, _ = parse(raw)
    assert job is not None
    found = podspec.node_pod(job, SETTINGS, 1)["spec"]["topologySpreadConstraints"]
    assert [one["topologyKey"] for one in found] == keys
    own = [one for one in found if one["maxSkew"] == 1]
    assert all(one["whenUnsatisfiable"] == "ScheduleAnyway" for one in own)
    assert "topologySpreadConstraints" not in podspec.head_pod(job, SETTINGS, 1)["spec"]


# --- the head's -----------------------------------------------------------------------------------------------------


def test_the_head_is_made_of_the_workers_template_without_their_machines() -> None:
    container = {
        "image": "mine:1",
        "env": [{"name": "A", "value": "b"}],
        "envFrom": [{"secretRef": {"name": "bucket"}}],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "resources": {"limits": {"nvidia.com/gpu": 8, "memory": "100Gi"}, "requests": {"cpu": "96"}},
        "securityContext": {"runAsUser": 7},
    }
    kept = {
        "serviceAccountName": "trainer",
        "imagePullSecrets": [{"name": "pull"}],
        "volumes": [{"name": "data", "emptyDir": {}}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "a"},
        "priorityClassName": "high",
        "securityContext": {"fsGroup": 9},
    }
    dropped = {"initContainers": [{"name": "fetch"}], "resourceClaims": [{"name": "gpu"}]}
    template = of(container, **kept, **dropped, affinity={"podAntiAffinity": {"x": 1}, "nodeAffinity": {"y": 2}})
    template["spec"]["containers"].append({"name": "side", "image": "side:1"})
    spec = head_of(template)["spec"]
    (main,) = spec["containers"]
    assert main["resources"] == {"requests": {"cpu": "250m", "memory": "1Gi"}}
    assert (main["image"], main["envFrom"], main["securityContext"]["runAsUser"]) == ("mine:1", container["envFrom"], 7)
    assert {"name": "A", "value": "b"} in main["env"]
    assert {"name": "data", "mountPath": "/data"} in main["volumeMounts"]
    for name, value in kept.items():
        if name not in ("volumes", "securityContext"):
            assert spec[name] == value
    assert spec["securityContext"]["fsGroup"] == 9
    assert spec["affinity"] == {"nodeAffinity": {"y": 2}}
    assert not dropped.keys() & spec.keys()


def test_a_head_template_of_its_own_gets_the_workers_image() -> None:
    spec = head_of(of({"image": "mine:1"}), of({"resources": {"requests": {"cpu": "2"}}}, nodeSelector={"pool": "b"}))[
        "spec"
    ]
    (main,) = spec["containers"]
    assert (main["image"], main["resources"], spec["nodeSelector"]) == (
        "mine:1",
        {"requests": {"cpu": "2"}},
        {"pool": "b"},
    )
    assert head_of(of({"image": "mine:1"}), of({"image": "head:2"}))["spec"]["containers"][0]["image"] == "head:2"


@pytest.mark.parametrize(
    ("image", "own", "found"),
    [
        ({}, {}, [{"name": "workers"}]),
        ({}, {"imagePullSecrets": [{"name": "head"}]}, [{"name": "head"}]),
        ({"image": "head:2"}, {}, None),
    ],
)
def test_a_head_that_gets_the_workers_image_gets_what_it_is_pulled_with(image: Json, own: Json, found: Any) -> None:
    head = of(image, **own)
    before = copy.deepcopy(head)
    workers = of({"image": "mine:1"}, imagePullSecrets=[{"name": "workers"}])
    assert head_of(workers, head)["spec"].get("imagePullSecrets") == found
    assert head_of(workers)["spec"]["imagePullSecrets"] == [{"name": "workers"}]
    assert head == before, "a template is not changed"
    assert "imagePullSecrets" not in head_of(of({"image": "mine:1"}), of())["spec"]


# --- security -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pod", "container", "left_alone"),
    [
        (None, None, False),
        ({"fsGroup": 7}, None, False),
        ({"runAsUser": 7}, None, False),
        (None, {"capabilities": {"add": ["IPC_LOCK"]}}, False),
        ({"runAsUser": 0}, None, True),
        (None, {"runAsUser": 0}, True),
        (None, {"privileged": True}, True),
        ({"runAsNonRoot": False}, None, True),
        ({"runAsUser": 0}, {"runAsUser": 7}, False),
    ],
)
def test_security_is_restricted_where_the_template_is_silent(
    pod: Json | None, container: Json | None, left_alone: bool
) -> None:
    template = of({} if container is None else {"securityContext": container})
    template["spec"] |= {} if pod is None else {"securityContext": pod}
    spec = node_of(template)["spec"]
    made, main = spec.get("securityContext"), spec["containers"][0].get("securityContext")
    if left_alone:
        assert (made, main) == (pod, container)
        return
    assert made["runAsNonRoot"] is True
    assert made["seccompProfile"] == {"type": "RuntimeDefault"}
    assert made["fsGroup"] == (pod or {}).get("fsGroup", 1000)
    assert (main.get("runAsUser") or made["runAsUser"]) == (
        (pod or {}).get("runAsUser") or 1000 if not (container or {}).get("runAsUser") else 7
    )
    assert main["allowPrivilegeEscalation"] is False
    assert main["capabilities"] == ((container or {}).get("capabilities") or {"drop": ["ALL"]})


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("max_memory", "limit", "volume", "fits"),
    [
        (None, None, None, True),
        (8 * GI, None, 8 * GI + (256 << 20), True),
        (None, "16Gi", 8 * GI, True),
        (None, "2Gi", GI, True),
        (None, "2047Mi", (2047 << 20) // 2, False),
        (2 * GI, "3328Mi", 2 * GI + (256 << 20), True),
        (2 * GI, "3327Mi", 2 * GI + (256 << 20), False),
    ],
)
def test_the_volume_and_the_limit(max_memory: int | None, limit: str | None, volume: int | None, fits: bool) -> None:
    found = memory_sum(max_memory, {"limits": {"memory": limit}} if limit else {"requests": {"memory": "1Gi"}})
    assert (found.volume, found.problem == "") == (volume, fits)


def test_the_limited_volume_is_told_to_the_node() -> None:
    made = node_of(of({"resources": {"limits": {"memory": "8Gi"}}}), snapshot={"maxMemory": "2Gi"})
    size = str(2 * GI + (256 << 20))
    assert made["spec"]["volumes"][-1]["emptyDir"] == {"medium": "Memory", "sizeLimit": size}
    assert {"name": kube.MEMORY_VARIABLE, "value": size} in made["spec"]["containers"][0]["env"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8Gi", 8 * GI),
        ("1.5Gi", GI * 3 // 2),
        ("8G", 8 * 10**9),
        ("64k", 64_000),
        ("1500m", Fraction(3, 2)),
        ("1e3", 1000),
        ("12E2", 1200),
        ("1E", 10**18),
        ("1Ei", 1 << 60),
        ("2.", 2),
        (".5", Fraction(1, 2)),
        ("+1", 1),
        ("100n", Fraction(1, 10**7)),
        (4096, 4096),
        (0.5, Fraction(1, 2)),
    ],
)
def test_quantities(text: Any, value: Any) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "8GB", "8 Gi", "Gi", "1.2.3", "1e", "0x10", "--1", None, True, [], "1e9999"])
def test_no_quantities(text: Any) -> None:
    with pytest.raises(ValueError, match="is no quantity"):
        parse_quantity(text)


def test_memory_is_rounded_up_and_more_than_nothing() -> None:
    assert parse_memory("1500m") == 2
    with pytest.raises(ValueError, match="is no amount of memory"):
        parse_memory("-1Gi")
