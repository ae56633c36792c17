"""Other people's admission between the operator and its Pods: a webhook that is down, a quota, a policy on labels."""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from outlast_operator.crd import to_yaml
from outlast_operator.kinds import Kind
from support.apiserver import api_server, eventually
from support.controllers import Controllers
from support.operators import World, world

pytestmark = pytest.mark.timeout(120)

PODS = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
QUOTA = Kind("ResourceQuota", "v1", "resourcequotas")
GATES = (
    "--feature-gates=MutatingAdmissionPolicy=true",
    "--runtime-config=admissionregistration.k8s.io/v1beta1=true",
)


def ready(place: World) -> dict[str, Any]:
    found = [one for one in place.status().get("conditions") or () if one["type"] == "Ready"]
    return dict(found[0]) if found else {}


def edit(place: World, spec: dict[str, Any]) -> None:
    place.api.kubectl("-n", place.namespace, "patch", "tj", "job", "--type=merge", "-p", json.dumps({"spec": spec}))


def test_a_webhook_that_is_down_is_told_and_the_job_steered_meanwhile(place: World, controllers: Controllers) -> None:
    operator = place.start(plan="real", controller_port=controllers.port)
    place.submit("job", 3, recovery={"startTimeout": "1h"})
    place.wait_for_pods("head-0", "node-1", "node-2", "node-3")
    nodes = {f"job-node-{at}": {"node": f"job-node-{at}", "state": "active"} for at in (1, 2, 3)}
    size = {"ready": 3, "wanted": 3, "least": 3, "size": 3, "spares": 0, "wanted_spares": 0}
    ip = place.run_head(controllers, 31, phase="Running", attempts=1, attempt=1, step=5, nodes=nodes, workers=size)
    eventually("it trains", lambda: place.status().get("phase") == "Running")
    hook = {
        "name": "down.example.com",
        "clientConfig": {"url": "https://127.0.0.1:1/x"},
        "rules": [PODS],
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": place.namespace}},
        "timeoutSeconds": 2,
    }
    configuration = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": "down"},
        "webhooks": [hook],
    }
    place.api.kubectl("apply", "-f", "-", stdin=json.dumps(configuration))
    try:
        time.sleep(2)  # the API server takes a moment to ask it
        place.delete_pod("job-node-3")
        controllers.tell(ip, phase="Recovering", workers={**size, "ready": 2})
        eventually("it is told", lambda: ready(place).get("reason") == "Refused")
        assert "failed calling webhook" in ready(place)["message"]
        edit(place, {"workers": {"minReplicas": 2}})
        eventually("its controller is told", lambda: [c for c in controllers[ip].calls if c[1] == "/resize"])
        assert place.names() == ["job-head-0", "job-node-1", "job-node-2"]
    finally:
        place.api.kubectl("delete", "validatingwebhookconfiguration", "down")
    place.wait_for_pods("head-0", "node-1", "node-2", "node-4", within_s=60)
    assert operator.metrics()['outlast_operator_errors_total{kind="refused"}'] >= 1


def test_no_name_is_used_twice_while_a_quota_refuses_a_spare(place: World, controllers: Controllers) -> None:
    hard = {"pods": "4"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": hard}}
    place.cluster.create(QUOTA, place.namespace, quota)

    def used(pods: int) -> None:
        status = {"status": {"hard": hard, "used": {"pods": str(pods)}}}
        place.cluster.patch(QUOTA, place.namespace, "small", status, "status")

    used(0)
    place.start(plan="real", controller_port=controllers.port)
    place.submit("job", 3, workers={"spares": 1})
    place.wait_for_pods("head-0", "node-1", "node-2", "node-3")
    eventually("what was made is known", lambda: place.status().get("nextPod") == 4)
    place.delete_pod("job-node-3")
    used(3)
    eventually("another is made", lambda: "job-node-4" in place.names() or None)
    assert "job-node-3" not in place.names()


@pytest.fixture
def labelling(tmp_path: pathlib.Path) -> Iterator[World]:
    """A namespace in which a policy sets a label of each new Pod."""
    with api_server(*GATES) as server:
        server.kubectl("apply", "-f", "-", stdin=to_yaml())
        eventually("TrainingJobs are served", lambda: server.kubectl("get", "tj", check=False).returncode == 0)
        with world(server, tmp_path) as made:
            changed = 'Object{metadata: Object.metadata{labels: {"app.kubernetes.io/managed-by": "platform"}}}'
            policy = {
                "matchConstraints": {"resourceRules": [PODS]},
                "reinvocationPolicy": "Never",
                "failurePolicy": "Fail",
                "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": changed}}],
            }
            where = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": made.namespace}}}
            binding = {"policyName": "own", "matchResources": where}
            for kind, spec in (("MutatingAdmissionPolicy", policy), ("MutatingAdmissionPolicyBinding", binding)):
                version = "admissionregistration.k8s.io/v1beta1"
                obj = {"apiVersion": version, "kind": kind, "metadata": {"name": "own"}, "spec": spec}
                server.kubectl("apply", "-f", "-", stdin=json.dumps(obj))
            eventually("the policy is in force", lambda: _relabelled(made), within_s=30)
            yield made


def _relabelled(place: World) -> bool:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe"},
        "spec": {"containers": [{"name": "x", "image": "x"}]},
    }
    command = ["-n", place.namespace, "create", "--dry-run=server", "-o", "json", "-f", "-"]
    return "platform" in place.api.kubectl(*command, stdin=json.dumps(pod)).stdout


def test_pods_that_admission_hides_from_the_operator_are_told_and_not_left_behind(labelling: World) -> None:
    operator = labelling.start(plan="real")
    operator.acting()
    labelling.submit("job", 2, recovery={"startTimeout": "30s"})
    eventually("it is told", lambda: ready(labelling).get("reason") == "Forbidden", within_s=30)
    assert "admission changes its label app.kubernetes.io/managed-by" in ready(labelling)["message"]
    edit(labelling, {"suspend": True})
    eventually("it is suspended", lambda: labelling.status().get("phase") == "Suspended", within_s=60)
    eventually("no Pod is left", lambda: labelling.names() == [] or None, within_s=30)
