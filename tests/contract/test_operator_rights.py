"""The operator as it is shipped works with the chart's role, needs all of it, and nothing more."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping

import pytest

from support.apiserver import ApiServer, api_server, eventually
from support.charts import ROOT, split
from support.operators import World, world

MANIFESTS = ROOT / "manifests"
ACCOUNT = "outlast-operator"

SELDOM: Mapping[tuple[str, str], str] = {
    ("update", "trainingjobs/finalizers"): "asked for by an admission plugin that this API server does not run",
    ("get", "pods"): "only when the cache is behind for long",
    ("get", "secrets"): "only when a Secret of the job's name is there already",
    ("create", "leases"): "only when somebody has deleted the chart's",
    ("patch", "events"): "only when something is said again",
}
"""Rights that the test's day has no use for, and why they are there."""

Right = tuple[str, str]


@pytest.fixture(scope="module")
def installed() -> Iterator[ApiServer]:
    with api_server() as server:
        server.kubectl("apply", "-f", str(MANIFESTS / "install.yaml"))
        eventually("the resource is served", lambda: "trainingjobs" in server.kubectl("api-resources").stdout)
        yield server


@pytest.fixture
def place(installed: ApiServer, tmp_path: pathlib.Path) -> Iterator[World]:
    with world(installed, tmp_path) as made:
        yield made


def granted() -> set[Right]:
    """(verb, resource) that any role of the operator has."""
    rules = []
    for role in split((MANIFESTS / "install.yaml").read_text()):
        if role["kind"] in ("ClusterRole", "Role") and role["metadata"]["name"].startswith(ACCOUNT):
            rules += role["rules"]
    return {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


def used(calls: Mapping[tuple[str, str, str], float]) -> set[Right]:
    """What the API server asks of RBAC for these requests: an apply is a patch, and creates."""
    found = set()
    for verb, resource, _ in calls:
        if resource == "trainingjobs" and verb == "patch":
            found.add((verb, "trainingjobs/status"))
        elif verb == "apply":
            found |= {("patch", resource), ("create", resource)}
        else:
            found.add((verb, resource))
    return found


def start_as_shipped(place: World, installed: ApiServer) -> None:
    token = installed.kubectl("-n", "outlast-system", "create", "token", ACCOUNT).stdout.strip()
    kubeconfig = installed.write_kubeconfig("operator", token)
    flags = ["--operator-namespace", "outlast-system", "--lease", ACCOUNT]
    flags += ["--operator-labels", "app.kubernetes.io/name=outlast"]
    place.start_real("shipped", kubeconfig, *flags).acting()


def test_one_day_with_the_charts_role(place: World, installed: ApiServer) -> None:
    start_as_shipped(place, installed)
    (operator,) = place.operators
    place.submit(recovery={"startTimeout": "1s"}, ttlSecondsAfterFinished=1)
    eventually("the Pods were given back", lambda: place.status().get("start", {}).get("retryTime"), within_s=30)
    place.wait_for_pods()
    place.submit("doomed", recovery={"startTimeout": "5s"}, ttlSecondsAfterFinished=1)
    place.wait_for_pods("head-0", "node-1", "node-2", "node-3", job="doomed")
    edit = ["patch", "tj", "doomed", "--type=merge", "-p", '{"spec":{"workers":{"spares":1}}}']
    installed.kubectl("-n", place.namespace, *edit)
    waiting = {"reason": "InvalidImageName", "message": "no such image"}
    container = {"name": "outlast", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    place.set_pod("doomed-node-1", containerStatuses=[{**container, "state": {"waiting": waiting}}])
    gone = lambda: installed.kubectl("-n", place.namespace, "get", "tj", "doomed", check=False).returncode != 0  # noqa: E731
    eventually("the job failed, and went after its time", gone, within_s=30)

    calls = operator.calls()
    refused = {call for call in calls if call[2] in ("401", "403")}
    assert refused == set(), operator.log()[-3000:]
    assert used(calls) <= granted(), "the role lacks these, or the API server would have refused them"
    assert granted() - used(calls) == set(SELDOM), "what nothing uses must go from the role, or be explained here"


@pytest.mark.parametrize(
    ("verb", "resource"),
    [
        ("update", "trainingjobs"),
        ("patch", "trainingjobs"),
        ("create", "pods/exec"),
        ("get", "pods/log"),
        ("delete", "secrets"),
        ("get", "configmaps"),
        ("patch", "nodes"),
        ("create", "clusterroles"),
    ],
)
def test_what_it_may_not(installed: ApiServer, verb: str, resource: str) -> None:
    resource, _, part = resource.partition("/")
    who = f"system:serviceaccount:outlast-system:{ACCOUNT}"
    asked = ["auth", "can-i", verb, resource, f"--subresource={part}", "--as", who, "-A"]
    assert installed.kubectl(*asked, check=False).stdout.split()[0] == "no"
