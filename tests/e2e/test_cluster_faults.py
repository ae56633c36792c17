"""One job through everything that happens to Pods and machines, and the same weights as if nothing had."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from support.clusterfaults import Faults
from support.trainingjobs import STEPS, Job, job, template

Submit = Callable[[dict[str, Any]], Job]

ZONE = "topology.kubernetes.io/zone"
APART = 15
"""Steps of rest between two faults: there are snapshots again, and parity."""


def domains(job: Job) -> dict[str, str]:
    """The failure domain of each node, as its controller has it."""
    return {name: node["domain"] for name, node in job.ask()["nodes"].items() if node["state"] in ("active", "spare")}


def zones(job: Job, nodes: Iterable[str]) -> dict[str, str]:
    """The zone of the machine of each of ``nodes``."""
    machines = {machine["metadata"]["name"]: machine for machine in job.lab.get("nodes")["items"]}
    labels = {
        pod["metadata"]["name"]: machines[pod["spec"]["nodeName"]]["metadata"]["labels"] for pod in job.pods("node")
    }
    return {name: labels[name][ZONE] for name in nodes}


@pytest.mark.timeout(1200, func_only=True)
def test_a_job_goes_on(
    submit: Submit, bucket: str, undisturbed: Callable[[int, int], str], timings: dict[str, Any]
) -> None:
    pod = template()
    resource = job(
        "bytelm",
        STEPS,
        replicas=3,
        spares=1,
        workers={"template": pod, "failureDomain": ZONE},
        head={"template": template({"resources": {"requests": {"cpu": "100m"}}})},
        checkpoint={"url": bucket, "interval": 100},
        recovery={"maxRestarts": 50},
    )
    began = time.monotonic()
    bytelm = submit(resource)
    bytelm.reach(1)
    found = domains(bytelm)
    assert found == zones(bytelm, found), "the runtime places parity by what the operator reads of the Nodes"
    timings["apply_to_first_step_s"] = round(time.monotonic() - began, 2)
    faults = Faults(bytelm)
    costs = timings["faults"] = {}
    for name, fault in faults.in_turn():
        bytelm.reach((bytelm.ask()["best_step"] or 0) + APART)
        if name != "head deleted":
            faults.await_spare()
        costs[name] = cost = bytelm.cost_of(fault).to_json()
        print(f"{time.monotonic() - began:.0f} s: {name} at step {bytelm.ask()['step']}: {cost}")
        assert name != "node drained" or cost["steps_again"] == 0, "a drain hands over: nothing is done twice"
        faults.repair()
    status = bytelm.until_phase("Succeeded", 480)
    assert status["step"] == STEPS
    assert status["weightsDigest"] == undisturbed(STEPS, 3)
    assert status["checkpoint"]["step"] == STEPS, "the last step is always checkpointed"
    assert status["restartCount"] >= 2, "a killed container and a lost machine cannot hand over"
    timings["steps"], timings["goodput"] = STEPS, status["goodput"]
