"""``trainctl`` follows jobs while the API server starts anew, as a user who is no administrator."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from support.apiserver import ApiServer, eventually
from support.commands import Trainctl

pytestmark = pytest.mark.timeout(180)

NAMESPACE = "restarting"
RULES = (
    ("outlast.dev", ["trainingjobs"], ["get", "list", "watch", "patch", "delete"]),
    ("", ["pods", "events"], ["get", "list", "watch"]),
)
JOB = {
    "apiVersion": "outlast.dev/v1alpha1",
    "kind": "TrainingJob",
    "metadata": {"name": "small", "namespace": NAMESPACE, "finalizers": ["outlast.dev/held"]},
    "spec": {"entrypoint": ["python", "train.py"]},
}


@pytest.fixture
def trainctl(api: ApiServer, tmp_path: pathlib.Path) -> Iterator[Trainctl]:
    """As a user who has the rights to follow, by a binding; the job is there."""
    rules = [{"apiGroups": [group], "resources": names, "verbs": verbs} for group, names, verbs in RULES]
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "rules": rules}
    apply(api, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    apply(api, {**role, "metadata": {"name": "follower", "namespace": NAMESPACE}})
    apply(api, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "ann", "namespace": NAMESPACE}})
    bind(api)
    apply(api, JOB)
    token = api.kubectl("-n", NAMESPACE, "create", "token", "ann").stdout.strip()
    yield Trainctl({"KUBECONFIG": api.write_kubeconfig("ann", token)}, str(tmp_path))
    release(api)
    unbind(api)
    api.kubectl("-n", NAMESPACE, "delete", "tj", "--all")


def apply(api: ApiServer, value: dict[str, Any]) -> None:
    api.kubectl("apply", "-f", "-", stdin=json.dumps(value))


def bind(api: ApiServer) -> None:
    api.kubectl(
        *("-n", NAMESPACE, "create", "rolebinding", "ann", "--role=follower", f"--serviceaccount={NAMESPACE}:ann")
    )


def unbind(api: ApiServer) -> None:
    api.kubectl("-n", NAMESPACE, "delete", "rolebinding", "ann", check=False)


def set_phase(api: ApiServer, phase: str) -> None:
    generation = json.loads(api.kubectl("-n", NAMESPACE, "get", "tj", "small", "-o", "json").stdout)["metadata"]
    told = {"status": {"phase": phase, "observedGeneration": generation["generation"]}}
    api.kubectl(
        *("-n", NAMESPACE, "patch", "tj", "small", "--subresource=status", "--type=merge", "-p", json.dumps(told))
    )


def release(api: ApiServer) -> None:
    """Let the deleted job go."""
    patch = json.dumps({"metadata": {"finalizers": None}})
    api.kubectl("-n", NAMESPACE, "patch", "tj", "small", "--type=merge", "-p", patch, check=False)


def metric(api: ApiServer, name: str, *labels: str) -> float:
    """The sum of the samples of a metric of the API server that have all of ``labels``."""
    lines = api.kubectl("get", "--raw", "/metrics").stdout.splitlines()
    found = [line for line in lines if line.startswith(f"{name}{{") and all(label in line for label in labels)]
    return sum(float(line.rpartition(" ")[2]) for line in found)


def watches(api: ApiServer) -> float:
    resources = ("trainingjobs", "pods", "events")
    name = "apiserver_longrunning_requests"
    return sum(metric(api, name, 'verb="WATCH"', f'resource="{resource}"') for resource in resources)


def refusals(api: ApiServer) -> float:
    """How many requests have been refused for want of rights since it started."""
    return metric(api, "authorization_attempts_total", 'result="no-opinion"')


COMMANDS = {
    ("status", "--watch"): 1,
    ("status", "small", "--watch"): 1,
    ("events", "small", "--follow", "-o", "json"): 3,
    ("suspend", "small", "--wait"): 1,
    ("delete", "small", "--wait"): 1,
}
"""Those that follow, and how many watches each has."""


def test_following_outlasts_an_api_server_that_starts_anew(api: ApiServer, trainctl: Trainctl) -> None:
    """It refuses everybody but administrators until it has read the bindings: here, until there is one."""
    set_phase(api, "Running")
    wanted = watches(api) + sum(COMMANDS.values())
    with ExitStack() as stack:
        everybody = [stack.enter_context(trainctl.start(*words, "-n", NAMESPACE)) for words in COMMANDS]
        listing, watching, _, suspending, deleting = everybody
        eventually("all follow", lambda: watches(api) >= wanted, within_s=30)
        unbind(api)
        api.stop_server(hard=True)
        api.start_server()
        enough = refusals(api) + 2 * sum(COMMANDS.values())

        def all_were_refused() -> bool:
            assert [one.errors for one in everybody if one.process.poll() is not None] == []
            return refusals(api) >= enough

        eventually("all are refused", all_were_refused, within_s=40, every_s=0.5)
        bind(api)
        set_phase(api, "Suspended")
        listing.until("its change", lambda line: line.startswith("small   Suspended"))
        watching.until("its change", lambda line: line.startswith("phase Suspended"))
        assert suspending.end() == 0, suspending.errors
        release(api)
        assert deleting.end() == 0, deleting.errors
        assert watching.end() == 1
        assert "was deleted" in watching.errors


@pytest.mark.parametrize("words", [["status", "--watch"], ["status", "small", "--watch"]])
def test_who_may_not_follow_is_told_at_once(api: ApiServer, trainctl: Trainctl, words: list[str]) -> None:
    unbind(api)
    done = trainctl(*words, "-n", NAMESPACE)
    assert done.status == 1
    assert f'you may not list trainingjobs.outlast.dev in namespace "{NAMESPACE}"' in done.err
