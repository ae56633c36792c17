"""The same faults, twice on the lab's three machines: a TrainingJob, and the same model, data and optimizer as an
Indexed Job of torchrun, restarting from the last checkpoint that it wrote to S3 with torch.save.

    python benchmarks/peer_torchrun.py [--every 50] [--only peer|ours]        # root; about six minutes

Both have three ranks of one thread. The peer is what the PyTorch documentation suggests: torchrun with the c10d
rendezvous at index 0, unlimited restarts, Pods replaced by Kubernetes' Job controller. Its Pods' grace period is a
second, in its favour. A fault's time is from the command that injects it until a step is done by a new attempt, and
until one is done that had not been done before. No target: it stands beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

import boto3
from botocore.config import Config

from support.clusterfaults import Faults
from support.labs import Lab, build_images, lab_wide_s3, running_lab
from support.stores import ROOT, environment
from support.trainingjobs import Job, job, template

NAMESPACE, BUCKET, PEER = "train", "training", "peer"
STEPS = 1_000_000
"""Never reached: both are deleted when their faults are over."""
REST_STEPS = 60
PATIENCE_S = 300.0
COMPARED = ("container killed", "Pod deleted", "node powered off")


@dataclass(frozen=True)
class Times:
    """Seconds from a fault."""

    first_step_s: float
    new_step_s: float
    steps_again: int


class Listener:
    """Hears which step the peer has done."""

    def __init__(self, host: str) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self.address = f"{host}:{self._socket.getsockname()[1]}"
        self._news = threading.Condition()
        self.began, self.step = 0.0, 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            told = json.loads(self._socket.recv(4096))
            with self._news:
                self.began, self.step = told["began"], told["step"]
                self._news.notify_all()

    def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Returns when ``holds``, which is asked after each step that is heard of."""
        with self._news:
            if not self._news.wait_for(holds, PATIENCE_S):
                sys.exit(f"the peer: not {what} within {PATIENCE_S:g} s; last heard of step {self.step}")

    def cost_of(self, fault: Callable[[], object]) -> Times:
        before, top = self.began, self.step
        at = time.monotonic()
        fault()
        base = first_s = 0.0

        def goes_on() -> bool:
            nonlocal top, base, first_s
            if self.began == before:
                top = max(top, self.step)
                return False
            if not base:
                base, first_s = self.step - 1, time.monotonic() - at
            return self.step > top

        self.until("going on", goes_on)
        return Times(first_s, time.monotonic() - at, int(max(0, top - base)))


def peer_objects(tell: str, every: int) -> list[dict[str, Any]]:
    """Its Service, script and Job."""
    script = (ROOT / "benchmarks" / "peer_train.py").read_text()
    about = {"name": PEER, "namespace": NAMESPACE}
    command = [
        "torchrun", "--nnodes=3", "--nproc-per-node=1", "--max-restarts=100", "--rdzv-backend=c10d", f"--rdzv-id={PEER}",
        f"--rdzv-endpoint={PEER}-0.{PEER}:29400", "/job/peer_train.py", f"--steps={STEPS}", f"--every={every}",
        f"--bucket={BUCKET}", f"--prefix={PEER}-{time.time():.0f}", f"--tell={tell}",
    ]  # fmt: skip
    container = {
        "name": "train",
        "image": "outlast-training:dev",
        "command": command,
        "env": [{"name": "OMP_NUM_THREADS", "value": "1"}],
        "envFrom": [{"secretRef": {"name": "bucket"}}],
        "volumeMounts": [{"name": "job", "mountPath": "/job"}],
    }
    pod = {
        "restartPolicy": "OnFailure",
        "subdomain": PEER,
        "terminationGracePeriodSeconds": 1,
        "containers": [container],
        "volumes": [{"name": "job", "configMap": {"name": PEER}}],
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": {"app": PEER}},
            }
        ],
    }
    job_spec = {
        "completions": 3,
        "parallelism": 3,
        "completionMode": "Indexed",
        "backoffLimit": 1000,
        "template": {"metadata": {"labels": {"app": PEER}}, "spec": pod},
    }
    service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": PEER}}
    return [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": about, "data": {"peer_train.py": script}},
        {"apiVersion": "v1", "kind": "Service", "metadata": about, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": job_spec},
    ]


class PeerFaults:
    """The same three faults; never at index 0, whose Pod has the rendezvous: that one costs the peer more."""

    def __init__(self, lab: Lab) -> None:
        self._lab, self._off = lab, ""

    def in_turn(self) -> list[tuple[str, Callable[[], None]]]:
        return [
            ("container killed", lambda: self._lab.kill_container(self._pod(1), "train")),
            ("Pod deleted", self._delete),
            ("node powered off", self._power_off),
        ]

    def repair(self) -> None:
        if self._off:
            self._lab.power_on(self._off)
            self._off = ""

    def _pod(self, index: int) -> dict[str, Any]:
        selector = f"app={PEER},batch.kubernetes.io/job-completion-index={index}"
        found = self._lab.get("-n", NAMESPACE, "pods", "-l", selector)["items"]
        return next(pod for pod in found if pod["status"]["phase"] == "Running")

    def _delete(self) -> None:
        name = self._pod(1)["metadata"]["name"]
        self._lab.kubectl("-n", NAMESPACE, "delete", "pod", name, "--wait=false", "--grace-period=1")

    def _power_off(self) -> None:
        self._off = self._pod(2)["spec"]["nodeName"]
        self._lab.power_off(self._off)


def measure_peer(lab: Lab, every: int) -> dict[str, Times]:
    host = next(entry["host_address"] for entry in json.loads(lab.kubelab("status", "--name", lab.name, "--json")))
    listener, found = Listener(host), {}
    lab.apply(*peer_objects(listener.address, every))
    faults = PeerFaults(lab)
    for name, fault in faults.in_turn():
        goal = listener.step + REST_STEPS
        # The same place between two checkpoints for each fault: half of the interval has to be done again.
        listener.until(f"at step {goal}", lambda: listener.step >= goal and listener.step % every == every // 2)  # noqa: B023
        found[name] = listener.cost_of(fault)
        faults.repair()
    lab.kubectl("-n", NAMESPACE, "delete", f"job/{PEER}", f"service/{PEER}", f"configmap/{PEER}")
    return found


def measure_ours(lab: Lab) -> dict[str, Times]:
    lab.helm(
        "upgrade", "--install", "outlast", str(ROOT / "charts" / "outlast"), "--namespace", "outlast-system",
        "--create-namespace", "--set", "image.tag=dev", "--wait", "--timeout", "120s",
    )  # fmt: skip
    resource = job(
        "ours",
        STEPS,
        replicas=3,
        spares=1,
        size="small",
        step_time=0,
        workers={"template": template()},
        checkpoint={"url": f"s3://{BUCKET}"},
    )
    resource["metadata"]["namespace"] = NAMESPACE
    lab.apply(resource)
    ours, found = Job(lab, NAMESPACE, "ours"), {}
    ours.reach(1, PATIENCE_S)
    faults = Faults(ours)
    for name, fault in faults.in_turn():
        if name not in COMPARED:
            continue
        ours.reach((ours.ask()["best_step"] or 0) + REST_STEPS, PATIENCE_S)
        faults.await_spare()
        cost = ours.cost_of(fault)
        found[name] = Times(cost.restarted_s, cost.new_step_s, cost.steps_again)
        faults.repair()
    lab.kubectl("-n", NAMESPACE, "delete", "trainingjob", "ours", "--wait=false")
    return found


def prepare(lab: Lab, variables: dict[str, str]) -> None:
    build_images(lab)
    boto3.client("s3", config=Config(s3={"addressing_style": "path"})).create_bucket(Bucket=BUCKET)
    lab.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "bucket", "namespace": NAMESPACE},
            "stringData": variables,
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints of the peer")
    parser.add_argument("--only", choices=["peer", "ours"])
    args = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("peer_torchrun.py needs root: the lab's machines are namespaces")
    results: dict[str, dict[str, Times]] = {}
    with running_lab("peer", nodes=3) as lab, lab_wide_s3(lab) as variables, environment(variables):
        prepare(lab, variables)
        if args.only != "ours":
            results[f"torchrun, a checkpoint every {args.every} steps"] = measure_peer(lab, args.every)
        if args.only != "peer":
            results["outlast, a snapshot every 10 steps, one spare"] = measure_ours(lab)
    print(
        "| fault | way | to the first step (s) | to the first new step (s) | steps done again |\n|---|---|---|---|---|"
    )
    for name in next(iter(results.values())):
        for way, times in results.items():
            found = times[name]
            print(f"| {name} | {way} | {found.first_step_s:.1f} | {found.new_step_s:.1f} | {found.steps_again} |")


if __name__ == "__main__":
    main()
