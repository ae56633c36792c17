"""What the operator makes, on a real API server: it is taken, comes back as it was made, and fits restricted namespaces.

There are no controllers and no kubelets here; what becomes of a Pod is the end-to-end tests' business.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from outlast.api import TrainingJob
from outlast_operator import objects, podspec
from outlast_operator.caches import parse
from outlast_operator.kinds import JOB, OWNED, POD, Kind, kind_of
from outlast_operator.model import Apply, Call, Controller, Create, Delete, Key, Observed, Plan, Settings
from outlast_operator.plan import plan
from outlast_operator.pruning import pruned
from outlast_operator.refusals import ApiError
from outlast_operator.statuswrite import as_json
from support.charts import ROOT
from support.operators import World

pytestmark = pytest.mark.timeout(120)

SETTINGS = Settings(
    "0.1.0", "outlast-training:dev", operator_namespace="outlast-system", operator_labels={"app": "outlast"}
)
TOKEN = "t" * 43
Json = dict[str, Any]

FULL_TEMPLATE: Json = {
    "metadata": {"labels": {"team": "a"}, "annotations": {"note": "b"}},
    "spec": {
        "initContainers": [
            {
                "name": "fetch",
                "image": "fetch:1",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
        "containers": [
            {
                "name": "outlast",
                "image": "mine:1",
                "env": [{"name": "A", "value": "$(OUTLAST_POD)"}],
                "envFrom": [{"secretRef": {"name": "bucket"}}],
                "resources": {"requests": {"cpu": "1500m"}, "limits": {"memory": "8Gi", "nvidia.com/gpu": 8}},
                "volumeMounts": [{"name": "data", "mountPath": "/data"}],
            }
        ],
        "volumes": [{"name": "data", "emptyDir": {}}],
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "nodeSelector": {"pool": "a"},
        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
        "terminationGracePeriodSeconds": 120,
    },
}


class Pass:
    """Passes without what surrounds them: read everything, plan, do it."""

    def __init__(self, place: World, name: str) -> None:
        self._place, self._name = place, name

    def once(self, now: float, controller: Controller = Controller()) -> Plan:  # noqa: B008 - a frozen value
        cluster, namespace = self._place.cluster, self._place.namespace
        decided = plan(self._observed(controller), SETTINGS, now)
        for action in decided.actions:
            match action:
                case Create():
                    cluster.create(kind_of(action.object), namespace, action.object)
                case Apply():
                    cluster.apply(kind_of(action.object), namespace, action.object, force=True)
                case Delete():
                    cluster.delete(POD, namespace, action.name, action.uid, 0)
                case Call():
                    raise AssertionError(f"{action} with nobody to call")
        if decided.status is not None:
            cluster.patch(JOB, namespace, self._name, {"status": as_json(decided.status)}, "status")
        return decided

    def _observed(self, controller: Controller) -> Observed:
        raw = pruned(JOB, self._place.job(self._name))
        job, invalid = parse(raw)
        owned = {(kind.name, one["metadata"]["name"]): one for kind in OWNED for one in self._all(kind)}
        key = Key(self._place.namespace, self._name)
        return Observed(key, raw, job, invalid, self._all(POD), {}, owned, controller, new_token=TOKEN)

    def _all(self, kind: Kind) -> list[Mapping[str, Any]]:
        pages = self._place.cluster.pages(kind, self._place.namespace, f"outlast.dev/job={self._name}")
        return [pruned(kind, one) for page in pages for one in page["items"]]


@pytest.mark.parametrize(
    "workers", [{}, {"spares": 2, "failureDomain": "topology.kubernetes.io/zone", "template": FULL_TEMPLATE}]
)
def test_what_is_made_is_taken_and_a_second_pass_does_nothing(place: World, workers: Json) -> None:
    """The defaults that the API server fills in are not taken for differences."""
    place.submit(workers=workers, snapshot={"maxMemory": "2Gi"})
    passes = Pass(place, "job")
    assert len(passes.once(1000.0).actions) == 4 + 1 + 3 + workers.get("spares", 0)
    again = passes.once(1001.0)
    assert again.actions == ()
    assert not again.urgent
    assert not again.happenings


def test_what_somebody_else_changed_is_mended(place: World) -> None:
    place.submit()
    passes = Pass(place, "job")
    passes.once(1000.0)
    change = {"spec": {"selector": {"outlast.dev/pod": "elsewhere"}}}
    (service, *_) = OWNED
    place.cluster.patch(service, place.namespace, "job-head", change)
    (action,) = passes.once(1001.0).actions
    assert isinstance(action, Apply)
    assert passes.once(1002.0).actions == ()


def test_pods_fit_a_namespace_that_enforces_restricted_security(place: World) -> None:
    """Admission decides, and a template that asks for more is refused: so it does look."""
    place.api.kubectl("label", "namespace", place.namespace, "pod-security.kubernetes.io/enforce=restricted")
    place.submit("safe", workers={"template": FULL_TEMPLATE})
    Pass(place, "safe").once(1000.0)
    assert len(place.names("safe")) == 4
    bold = {"spec": {"containers": [{"name": "outlast", "securityContext": {"runAsUser": 0}}]}}
    place.submit("bold", workers={"template": bold})
    with pytest.raises(ApiError, match="violates PodSecurity"):
        Pass(place, "bold").once(1000.0)


@pytest.mark.parametrize("path", sorted((ROOT / "manifests" / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_pods_of_the_examples_are_taken(place: World, path: Any) -> None:
    made = json.loads(place.api.kubectl("-n", place.namespace, "apply", "-o", "json", "-f", str(path)).stdout)
    job, invalid = parse(made)
    assert job is not None, invalid
    assert podspec.problems(job) == []
    for pod in (podspec.node_pod(job, SETTINGS, 0), podspec.head_pod(job, SETTINGS, 1)):
        pod["spec"].pop("priorityClassName", None)  # the class is the cluster's
        place.cluster.create(POD, place.namespace, pod)


def test_what_pods_read_is_the_job(place: World) -> None:
    made = place.submit(env=[{"name": "A", "value": "1"}], recovery={"startTimeout": "2m"})
    job, _ = parse(made)
    assert job is not None
    read = TrainingJob.model_validate_json(objects.job_json(job))
    assert read.spec == job.spec
    assert (read.metadata.name, read.metadata.uid) == ("job", made["metadata"]["uid"])


def test_an_older_image_is_told_no_default_that_it_may_not_know(place: World) -> None:
    """The API server fills every field that has a default in; what Pods read has those alone that somebody chose."""
    made = place.submit(env=[{"name": "A", "value": "1"}], recovery={"startTimeout": "2m"})
    job, _ = parse(made)
    assert job is not None
    assert "faults" in made["spec"]
    spec = json.loads(objects.job_json(job))["spec"]
    assert set(spec) == {"entrypoint", "env", "workers", "recovery"}
    assert set(spec["recovery"]) == {"startTimeout"}
