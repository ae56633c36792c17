"""What a job's Pods may do, and who may reach them: the namespace enforces restricted Pod security, the lab the policies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from outlast import kube
from support.labs import Lab
from support.policies import Enforcer, within
from support.trainingjobs import Job, job, submitting, template

OPERATORS = "outlast-system"

CONNECT = """
import json, socket, sys
from concurrent.futures import ThreadPoolExecutor

def reached(at):
    try:
        socket.create_connection(at, timeout=3).close()
        return True
    except OSError:
        return False

there = [(address, port) for address, ports in json.loads(sys.argv[1]).items() for port in ports]
with ThreadPoolExecutor(64) as pool:
    print(json.dumps([at for at, did in zip(there, pool.map(reached, there)) if did]))
"""
"""Prints to which of the given (address, port) there is a connection."""

Ports = Mapping[str, list[int]]


@pytest.fixture(scope="module")
def bounded(release: Lab) -> Iterator[Job]:
    with submitting(release, "train") as submit:
        found = submit(job("bounds", 100000, replicas=2, workers={"template": template()}))
        found.reach(1)
        yield found


@pytest.fixture
def stranger(release: Lab) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a Pod that does nothing: (namespace, labels) -> it."""
    made: set[str] = set()

    def run(namespace: str, labels: Mapping[str, str]) -> dict[str, Any]:
        about = {"name": "stranger", "namespace": namespace, "labels": dict(labels)}
        container = {
            "name": "stranger",
            "image": "outlast-operator:dev",
            "command": ["python", "-c", "import signal; signal.sigwait([signal.SIGTERM])"],
            "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        }
        secure = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
        spec = {"containers": [container], "securityContext": secure, "automountServiceAccountToken": False}
        release.apply({"apiVersion": "v1", "kind": "Pod", "metadata": about, "spec": spec})
        made.add(namespace)
        release.kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod/stranger", "--timeout=60s")
        return release.get("-n", namespace, "pod", "stranger")

    yield run
    for namespace in made:
        release.kubectl("-n", namespace, "delete", "pod", "stranger", "--grace-period=1")


def reached(lab: Lab, pod: Mapping[str, Any], ports: Ports) -> Ports:
    """What of ``ports`` (by address) a process in ``pod`` has a connection to."""
    about = pod["metadata"]
    command = ["exec", "-n", about["namespace"], about["name"], "--", "python", "-c", CONNECT, json.dumps(dict(ports))]
    found: dict[str, list[int]] = {address: [] for address in ports}
    for address, port in json.loads(lab.kubectl(*command)):
        found[address].append(port)
    return found


def listening(pid: int) -> list[int]:
    """TCP ports that are open to others in the network namespace of a process."""
    rows = [line.split()[3] for line in within(pid, "ss", "-H", "-l", "-t", "-n").splitlines()]
    return sorted({int(row.rpartition(":")[2]) for row in rows if not row.startswith(("127.", "[::1]"))})


def test_pods_have_what_they_need_and_no_more(bounded: Job) -> None:
    for pod in [*bounded.pods(kube.NODE_ROLE), bounded.head()]:
        (container,) = pod["spec"]["containers"]
        mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert not any("serviceaccount" in mount for mount in mounts), "training Pods have no rights to the API"
        assert pod["metadata"]["ownerReferences"][0]["name"] == "bounds"


def test_pods_are_reached_by_their_own_and_the_operator_alone(
    release: Lab, bounded: Job, policies: Enforcer, stranger: Callable[..., dict[str, Any]]
) -> None:
    """All ports that are open to others, with the policies enforced, under which the job trains all the time."""
    (policy,) = release.get("-n", "train", "networkpolicies", "-l", f"{kube.JOB_LABEL}=bounds")["items"]
    (deployment,) = release.get("-n", OPERATORS, "deployments")["items"]
    peers = [peer for rule in policy["spec"]["ingress"] for peer in rule["from"] if "namespaceSelector" in peer]
    assert peers == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": OPERATORS}},
            "podSelector": {"matchLabels": deployment["spec"]["selector"]["matchLabels"]},
        }
    ]
    addresses = [pod["status"]["podIP"] for pod in [bounded.head(), *bounded.pods(kube.NODE_ROLE)]]
    ports = {address: listening(policies.await_guarded(address)) for address in addresses}
    head = addresses[0]
    assert kube.CONTROLLER_PORT in ports[head]
    assert all(len(found) > 2 for found in ports.values()), f"Ray and the agents listen, too: {ports}"
    nobody = {address: [] for address in addresses}

    node = bounded.pods(kube.NODE_ROLE)[0]
    assert reached(release, node, ports) == ports, "a node of the job reaches all"
    operators = release.get("-n", OPERATORS, "pods", "-l", "app.kubernetes.io/name=outlast")["items"]
    for operator in operators:
        assert reached(release, operator, ports) == {**nobody, head: [kube.CONTROLLER_PORT]}
    neighbour = stranger("train", {kube.JOB_LABEL: "another"})
    assert reached(release, neighbour, ports) == nobody, "another job's Pod, in the same namespace"
    seen = {(neighbour["status"]["podIP"], port) for port in ports[head]}
    assert seen <= policies.refused(head), "it is the policy that refused"
    disguised = stranger("default", operators[0]["metadata"]["labels"])
    assert reached(release, disguised, ports) == nobody, "the operator's labels in another namespace"
    disguised = stranger("default", node["metadata"]["labels"])
    assert reached(release, disguised, ports) == nobody, "the job's labels in another namespace"
    bounded.reach((bounded.ask()["step"] or 0) + 5)
