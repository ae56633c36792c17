"""The chart in a real cluster: installed, upgraded, removed."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Callable
from typing import Any

import pytest

from support.labs import Lab
from support.stores import ROOT
from support.trainingjobs import Job, assert_nothing_left, job

CHART = str(ROOT / "charts" / "outlast")
WHERE = ("--namespace", "outlast-system")


def test_two_replicas_one_leads(release: Lab) -> None:
    (deployment,) = release.get("-n", "outlast-system", "deployments")["items"]
    assert deployment["status"]["readyReplicas"] == 2
    lease = release.get("-n", "outlast-system", "lease", "outlast-operator")
    pods = release.get("-n", "outlast-system", "pods", "-l", "app.kubernetes.io/name=outlast")["items"]
    leaders = [p["metadata"]["name"] for p in pods if p["metadata"]["name"] in lease["spec"]["holderIdentity"]]
    assert len(leaders) == 1
    assert len({pod["spec"]["nodeName"] for pod in pods}) == 2, "on different machines"


def test_metrics_and_health_of_both_replicas(release: Lab) -> None:
    leaders = 0.0
    for pod in release.get("-n", "outlast-system", "pods", "-l", "app.kubernetes.io/name=outlast")["items"]:
        address = pod["status"]["podIP"]
        with urllib.request.urlopen(f"http://{address}:8081/readyz", timeout=5) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(f"http://{address}:8080/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        gauges = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("outlast_operator_")}
        leaders += gauges["outlast_operator_leader"]
        assert gauges["outlast_operator_queue_oldest_seconds"] < 30, "nobody queues what only the leader takes"
    assert leaders == 1.0


def test_explain_reads_like_documentation(release: Lab) -> None:
    text = release.kubectl("explain", "trainingjob.spec.workers")
    assert "minReplicas" in text
    assert "The fewest nodes to go on with" in text


@pytest.mark.parametrize(
    ("who", "verb", "what", "allowed"),
    [
        ("view", "get", "trainingjobs", True),
        ("view", "create", "trainingjobs", False),
        ("view", "get", "secrets", False),
        ("edit", "create", "trainingjobs", True),
        ("edit", "patch", "trainingjobs/scale", True),
        ("edit", "patch", "trainingjobs/status", False),
        ("edit", "create", "pods/portforward", True),
        ("edit", "get", "pods/portforward", True),
        ("view", "get", "pods/portforward", False),
        ("outlast-edit", "get", "pods/portforward", True),
        ("outlast-edit", "create", "pods/portforward", True),
        ("outlast-edit", "delete", "pods", True),
        ("outlast-edit", "create", "pods", False),
        ("outlast-edit", "delete", "configmaps", True),
        ("outlast-edit", "list", "secrets", False),
        ("outlast-view", "delete", "pods", False),
    ],
)
def test_people_have_rights_through_the_clusters_own_roles_and_the_charts(
    release: Lab, who: str, verb: str, what: str, allowed: bool
) -> None:
    """The cluster's roles have much by themselves: that the chart's are enough for trainctl, they alone tell."""
    release.run("kubectl", "-n", "train", "create", "rolebinding", f"{who}-tester", f"--clusterrole={who}", f"--user={who}-tester")  # fmt: skip
    resource, _, part = what.partition("/")
    asked = [
        "kubectl",
        "-n",
        "train",
        "auth",
        "can-i",
        verb,
        resource,
        f"--subresource={part}",
        "--as",
        f"{who}-tester",
    ]
    deadline = time.monotonic() + 20
    while (answer := release.run(*asked).stdout.split()[0]) != ("yes" if allowed else "no"):
        assert time.monotonic() < deadline, f"{who}, {verb} {what}: {answer} (the aggregation of roles takes a moment)"


def test_an_upgrade_leaves_what_runs_alone(release: Lab, submit: Callable[[dict[str, Any]], Job]) -> None:
    """The operator is replaced, the definition is applied again; the job's Pods stay, and no attempt is lost."""
    running = submit(job("steady", 100000, replicas=2))
    before = running.reach(5, seconds=180)
    names = [pod["metadata"]["uid"] for pod in running.pods("node")] + [running.head()["metadata"]["uid"]]
    release.kubectl("label", "crd", "trainingjobs.outlast.dev", "was=here", "--overwrite")
    release.kubectl("patch", "crd", "trainingjobs.outlast.dev", "--type=json", "-p", '[{"op":"remove","path":"/spec/names/shortNames"}]')  # fmt: skip
    options = ["--set", "image.tag=dev", "--set", "logLevel=debug", "--wait", "--timeout", "120s"]
    release.helm("upgrade", "outlast", CHART, *WHERE, *options)
    assert release.get("crd", "trainingjobs.outlast.dev")["spec"]["names"]["shortNames"] == ["tj"]
    after = running.reach(before["step"] + 20)
    assert after["attempt"] == before["attempt"]
    assert names == [pod["metadata"]["uid"] for pod in running.pods("node")] + [running.head()["metadata"]["uid"]]


@pytest.mark.last
def test_uninstall_leaves_nothing_but_the_definition(release: Lab, submit: Callable[[dict[str, Any]], Job]) -> None:
    """And jobs; these can be deleted without any operator."""
    assert not release.get("-A", "trainingjobs")["items"], "tests remove their jobs"
    image = {"spec": {"containers": [{"name": "outlast", "image": "nowhere.invalid/none:1"}]}}
    orphan = submit(job("orphan", 10, replicas=1, workers={"template": image}))
    orphan.until("given Pods", 60, lambda found: found.get("status", {}).get("head"))
    release.helm("uninstall", "outlast", *WHERE, "--wait")
    operators = ["pod", "-l", "app.kubernetes.io/name=outlast", "-n", "outlast-system"]
    release.kubectl("wait", "--for=delete", *operators, "--timeout=40s")
    release.kubectl("-n", orphan.namespace, "delete", "trainingjob", orphan.name, "--timeout=30s")
    assert_nothing_left(release, orphan.namespace, orphan.name)
    for label in ("app.kubernetes.io/name=outlast", "app.kubernetes.io/managed-by=outlast"):
        assert release.kubectl("get", kinds(release), "-A", "-l", label, "-o", "name").split() == []
    within = release.kubectl("-n", "outlast-system", "get", kinds(release, "--namespaced"), "-o", "name").split()
    assert set(within) <= {"configmap/kube-root-ca.crt", "serviceaccount/default"}, within
    definition = release.get("crd", "trainingjobs.outlast.dev")
    assert definition["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def kinds(lab: Lab, *options: str) -> str:
    """All that the API server lists, as one argument of kubectl, but Events, which outlive what they are about."""
    names = lab.kubectl("api-resources", "--verbs=list", "-o", "name", *options).split()
    return ",".join(name for name in names if not name.startswith(("events", "componentstatuses")))


@pytest.mark.last
def test_plain_manifests_install_the_same(release: Lab) -> None:
    """``kubectl apply -f manifests/install.yaml`` of what the chart's defaults are; its images are not built here."""
    file = str(ROOT / "manifests" / "install.yaml")
    release.kubectl("apply", "-f", file)
    lease = ["-n", "outlast-system", "lease", "outlast-operator"]
    assert release.get(*lease)["spec"] == {}, "its spec is the operator's to write"
    release.kubectl("delete", "-f", file, "--ignore-not-found", "--timeout=60s")
