"""The operator as it is shipped, with the chart's roles and nothing more, through a job's whole life."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import yaml

from outlast_operator.kinds import JOB, MACHINE
from outlast_operator.refusals import ApiError
from support.apiserver import eventually
from support.charts import helm, render, split
from support.controllers import Controllers
from support.operators import OperatorProcess, World
from support.said import said

pytestmark = pytest.mark.timeout(180)

SYSTEM = "outlast-system"
SELDOM = {("get", "pods"), ("get", "secrets"), ("patch", "events"), ("create", "leases")}
"""Granted for what this life does not come to: a cache that is behind, a name that is taken, an Event said again, a Lease
that somebody deleted."""
POD = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "any"},
    "spec": {"containers": [{"name": "any", "image": "any"}]},
}
LEASE = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "any"}, "spec": {}}
NODES = [f"job-node-{index}" for index in (1, 2, 3)]


@pytest.fixture(scope="module")
def chart() -> list[dict[str, Any]]:
    if helm() is None:
        pytest.skip("no helm here: the lab (kubelab) or helm itself is needed")
    return split(render({}))


def install(place: World, chart: list[dict[str, Any]]) -> str:
    """Account, roles, bindings and Lease of the chart; the kubeconfig of whoever has them. Other tests' jobs go: this
    operator would see to them too."""
    place.api.kubectl("delete", "trainingjobs", "--all", "--all-namespaces", "--wait=true")
    wanted = ("ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Lease")
    found = [obj for obj in chart if obj["kind"] in wanted]
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}}
    place.api.kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([namespace, *found]))
    account = next(obj["metadata"]["name"] for obj in found if obj["kind"] == "ServiceAccount")
    # The API server learns of roles, and of what its admission plugins ask for, by watches of its own.
    eventually(f"{account} may make Pods", functools.partial(_may_make, place, account, POD), 60)
    eventually(f"{account} may make Leases", functools.partial(_may_make, place, account, LEASE), 60)
    token = place.api.kubectl("-n", SYSTEM, "create", "token", account).stdout.strip()
    return place.api.write_kubeconfig("chart", token)


def _may_make(place: World, account: str, obj: dict[str, Any]) -> bool:
    """Whether the API server would take it: nothing is made."""
    who = ("-n", SYSTEM, f"--as=system:serviceaccount:{SYSTEM}:{account}")
    done = place.api.kubectl(*who, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(obj), check=False)
    return done.returncode == 0


def flags(chart: list[dict[str, Any]]) -> list[str]:
    """The Deployment's own arguments."""
    deployment = next(obj for obj in chart if obj["kind"] == "Deployment")
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    return [argument.replace("$(POD_NAMESPACE)", SYSTEM) for argument in arguments]


def phase(place: World, wanted: str) -> None:
    eventually(f"the phase is {wanted}", lambda: place.status().get("phase") == wanted or None, 10)


def edit(place: World, **spec: Any) -> None:
    place.cluster.patch(JOB, place.namespace, "job", {"spec": spec})


def live(place: World, controllers: Controllers) -> None:
    """Start, run, lose a node, grow, suspend, resume, succeed, go."""
    place.submit(ttlSecondsAfterFinished=1)
    place.wait_for_pods("head-0", "node-1", "node-2", "node-3")
    ip = place.run_head(controllers, 1, **said(NODES, step=3))
    phase(place, "Running")
    for name in NODES:
        place.set_pod(name, phase="Running", conditions=[{"type": "Ready", "status": "True"}])
    place.delete_pod("job-node-2")
    place.wait_for_pods("head-0", "node-1", "node-3", "node-4")
    edit(place, workers={"replicas": 4})
    place.wait_for_pods("head-0", "node-1", "node-3", "node-4", "node-5")
    called(controllers, ip, "/resize")
    edit(place, suspend=True)
    called(controllers, ip, "/suspend")
    controllers.tell(ip, outcome="suspended", phase="Suspended")
    phase(place, "Suspended")
    eventually("the Pods are gone", lambda: not place.names())
    edit(place, suspend=False)
    place.wait_for_pods("head-6", "node-7", "node-8", "node-9", "node-10")
    end = said([f"job-node-{index}" for index in (7, 8, 9, 10)], step=9)
    ip = place.run_head(controllers, 2, "job-head-6", **end)
    phase(place, "Running")
    controllers.tell(ip, outcome="succeeded", phase="Succeeded", weights_digest="d" * 64)
    called(controllers, ip, "/stop")
    eventually("the job is deleted", lambda: _is_gone(place))


def called(controllers: Controllers, ip: str, path: str) -> None:
    eventually(
        f"the controller is asked for {path}", lambda: any(call[1] == path for call in controllers[ip].calls), 10
    )


def _is_gone(place: World) -> bool:
    try:
        place.job()
    except ApiError as error:
        return error.status == 404
    return False


def test_the_charts_roles_suffice_and_are_all_used(
    place: World, chart: list[dict[str, Any]], controllers: Controllers
) -> None:
    kubeconfig = install(place, chart)
    machine = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "m1"}}
    place.api.kubectl("apply", "-f", "-", stdin=json.dumps(machine))
    operator = place.start_real("one", kubeconfig, *flags(chart), f"--controller-port={controllers.port}")
    operator.ready()
    live(place, controllers)
    assert [line for line in operator.log().splitlines() if "forbidden" in line.lower()] == []
    assert {key: count for key, count in operator.calls().items() if key[2] in ("401", "403")} == {}
    assert granted(chart) - used(operator) <= SELDOM
    uid = place.cluster.get(MACHINE, None, "m1")["metadata"]["uid"]
    place.cluster.delete(MACHINE, "", "m1", uid, None)


def granted(chart: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """(verb, resource) of all roles that the operator's account is bound to."""
    account = next(obj["metadata"]["name"] for obj in chart if obj["kind"] == "ServiceAccount")
    bound = {
        (obj["roleRef"]["kind"], obj["roleRef"]["name"])
        for obj in chart
        if obj["kind"].endswith("Binding") and any(subject["name"] == account for subject in obj["subjects"])
    }
    roles = [obj for obj in chart if (obj["kind"], obj["metadata"]["name"]) in bound]
    rules = [rule for role in roles for rule in role["rules"]]
    return {(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"]}


def used(operator: OperatorProcess) -> set[tuple[str, str]]:
    """(verb, resource) as the API server authorizes them: an apply is a patch, and a create where there is nothing yet."""
    found = set()
    for verb, resource, status in operator.calls():
        if verb == "apply":
            found |= {("patch", resource)} | ({("create", resource)} if status == "201" else set())
        elif (verb, resource) == ("patch", "trainingjobs"):
            found.add(("patch", "trainingjobs/status"))
        else:
            found.add((verb, resource))
    return found
