"""``trainctl`` and Pods on a real kubelet: port-forward, logs that are followed from Pod to Pod, code that is mounted.

The Pods are stand-ins (``support.standins``): no operator, no Ray; what is between them and ``trainctl`` is real.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support.commands import Trainctl
from support.labs import Lab, running_lab
from support.standins import IMAGE, StandInJob, build_stand_in, node_status
from support.stores import ROOT

pytestmark = pytest.mark.timeout(240)

RECOVERY = {
    "kind": "rank-exit",
    "cause": "rank 1 was killed",
    "attempt": 2,
    "total_s": 1.234,
    "lost_steps": 3,
    "restore_sources": {"local": 1, "peer": 1},
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab("tctl2", nodes=1) as lab:
        build_stand_in(lab, tmp_path_factory.mktemp("image"))
        lab.kubectl("apply", "-f", str(ROOT / "manifests" / "crd.yaml"))
        lab.kubectl("wait", "--for=condition=established", "crd/trainingjobs.outlast.dev")
        yield lab


@pytest.fixture
def trainctl(cluster: Lab, tmp_path: pathlib.Path) -> Trainctl:
    return Trainctl(cluster.variables, str(tmp_path))


_numbers = iter(range(100))


@pytest.fixture
def job(cluster: Lab) -> Iterator[StandInJob]:
    """Two nodes with a rank each."""
    spec = {"workers": {"replicas": 2}, "faults": {"allow": True}}
    made = StandInJob(cluster, f"job-{next(_numbers)}", spec=spec).create()
    yield made
    made.delete()


def start(job: StandInJob) -> tuple[str, str, str]:
    """Its head, and its nodes with seats 0 and 1, in attempt 1."""
    head, first, second = job.add_pod("head", 0), job.add_pod("node", 1), job.add_pod("node", 2)
    job.set_controller(head, node_status({first: 0, second: 1}), [event(1, "running", "all ranks run")])
    job.set_status(head=head, phase="Running", attempt=1, step=5, workers={"ready": 2, "wanted": 2})
    return head, first, second


def event(seq: int, kind: str, text: str, attempt: int = 1) -> dict[str, Any]:
    fields = {"job": "job", "attempt": attempt, "fields": {}}
    return {"time": time.time(), "seq": seq, "kind": kind, "text": text, **fields}


def test_the_controller_is_asked_through_a_port_forward(job: StandInJob, trainctl: Trainctl) -> None:
    head, first, second = start(job)
    job.set_controller(head, node_status({first: 0, second: 1}, recoveries=[RECOVERY]), [])
    text = trainctl.ok("status", job.name)
    assert "step      7/100" in text, "the controller's, which is newer than the resource's"
    assert "rank 1 was killed" in text
    assert "from the resource alone" not in text
    told = json.loads(trainctl.ok("status", job.name, "-o", "json"))
    assert told["controller"]["nodes"][first]["seat"] == 0
    assert told["status"]["step"] == 5
    page = trainctl.ok("describe", job.name)
    for part in ("2 of 1 rank each", "1 local, 1 peer", f"{job.lab.name}-node-1", "Started container outlast"):
        assert part in page


def test_a_controller_that_cannot_be_asked_is_said_and_why(job: StandInJob, trainctl: Trainctl, cluster: Lab) -> None:
    head, _, _ = start(job)
    job.set_status(head=f"{job.name}-head-9")
    text = trainctl.ok("status", job.name)
    assert "step         5" in text, "the resource's"
    assert f"(from the resource alone: the head Pod {job.name}-head-9 is gone, and another one not in its place" in text
    job.set_status(head=head)
    cluster.kubectl("delete", "secret", f"{job.name}-outlast")
    assert "the job's Secret with the controller's token is not there" in trainctl.ok("status", job.name)


def test_a_port_that_nobody_listens_on_is_told(cluster: Lab, job: StandInJob, trainctl: Trainctl) -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{job.name}-head-0", "labels": {"outlast.dev/job": job.name, "outlast.dev/role": "head"}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "outlast", "image": IMAGE, "command": ["sleep", "600"]}],
        },
    }
    cluster.apply(pod)
    job.wait_ready(f"{job.name}-head-0")
    job.set_status(head=f"{job.name}-head-0", phase="Starting")
    text = trainctl.ok("status", job.name)
    listening = (
        f"(from the resource alone: the head Pod {job.name}-head-0 runs, but its controller does not listen yet)"
    )
    assert listening in text
    cluster.kubectl("delete", "pod", f"{job.name}-head-0", "--grace-period=1")


def test_a_head_that_does_not_run_is_not_asked(cluster: Lab, job: StandInJob, trainctl: Trainctl) -> None:
    name = f"{job.name}-head-0"
    container = {"name": "outlast", "image": "example.com/nowhere:1", "imagePullPolicy": "Never"}
    meta = {"name": name, "labels": {"outlast.dev/job": job.name, "outlast.dev/role": "head"}}
    cluster.apply({"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": {"containers": [container]}})
    held = "--for=jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImageNeverPull"
    cluster.kubectl("wait", f"pod/{name}", held, "--timeout=60s")
    job.set_status(head=name, phase="Pending")
    told = f"the head Pod {name} is still starting (ErrImageNeverPull)"
    assert f"(from the resource alone: {told})" in trainctl.ok("status", job.name)
    assert trainctl("events", job.name).err == f"note: without the controller's event log: {told}\n"
    cluster.kubectl("delete", "pod", name, "--grace-period=1")


def test_the_controller_of_a_job_that_has_ended_is_not_asked(job: StandInJob, trainctl: Trainctl) -> None:
    head, _, _ = start(job)
    job.exit(head, 0)
    ended = "--for=jsonpath={.status.phase}=Succeeded"
    job.lab.kubectl("wait", f"pod/{head}", ended, "--timeout=60s")
    assert f"the head Pod {head} has ended (Succeeded)" in trainctl.ok("status", job.name), "the job has not yet"
    job.set_status(phase="Succeeded")
    told = f"the job has ended (Succeeded), and its controller with it: `trainctl logs {job.name} --head` shows what it"
    assert told in trainctl.ok("describe", job.name)
    assert told in trainctl("events", job.name).err
    assert "from the resource" not in trainctl.ok("status", job.name)
    assert f"pod={head}" in trainctl.ok("logs", job.name, "--head")


def test_logs_of_a_rank_are_its_lines_alone(job: StandInJob, trainctl: Trainctl) -> None:
    head, first, second = start(job)
    job.say(first, "[rank 0 attempt 1] one", "time=x event=own", "[rank 0 attempt 2] two", "[rank 0 attempt 2] three")
    job.say(second, "[rank 1 attempt 1] uno", "[rank 1 attempt 2] due")
    job.set_status(attempt=2)
    assert trainctl.ok("logs", job.name) == "two\nthree\n"
    assert trainctl.ok("logs", job.name, "--previous") == "one\n"
    assert trainctl.ok("logs", job.name, "1", "--attempt", "1") == "uno\n"
    assert trainctl.ok("logs", job.name, "0", "--tail", "1") == "three\n"
    assert trainctl.ok("logs", job.name, "0", "--tail", "0") == ""
    marked = trainctl.ok("logs", job.name, "--all-ranks").splitlines()
    assert marked == ["[rank 0 attempt 2] two", "[rank 0 attempt 2] three", "[rank 1 attempt 2] due"]
    (line,) = trainctl.ok("logs", job.name, "1", "--timestamps").splitlines()
    assert line.startswith("20")
    assert line.endswith("Z due")
    assert trainctl.ok("logs", job.name, "--head") == f"time=now event=began pod={head}\n"


def test_logs_that_are_nowhere_are_told(job: StandInJob, trainctl: Trainctl) -> None:
    start(job)
    done = trainctl("logs", job.name, "1", "--attempt", "7")
    assert done.status == 1
    assert "there is no output of rank 1 in attempt 7: not in the 2 node Pods there are" in done.err
    assert "the job has no store" in done.err
    done = trainctl("logs", job.name, "2")
    assert (done.status, done.err) == (2, "trainctl: there is no rank 2: the job has ranks 0 to 1\n")


def test_logs_are_followed_across_a_restart_a_lost_node_and_to_the_end(job: StandInJob, trainctl: Trainctl) -> None:
    head, first, second = start(job)
    job.say(first, "[rank 0 attempt 1] one")
    with trainctl.start("logs", job.name, "0", "--follow") as following:
        following.until("what was there", lambda line: line == "one")
        job.say(first, "[rank 0 attempt 1] two", "[rank 1 attempt 1] not this")
        following.until("what comes", lambda line: line == "two")

        job.say(first, "[rank 0 attempt 1] last words")
        job.restart(first)
        job.say(first, "[rank 0 attempt 2] after the restart")
        following.until("the restarted container's", lambda line: line == "after the restart")

        third = job.add_pod("node", 3)
        job.set_controller(head, node_status({third: 0, second: 1}), [])
        job.delete_pod(first)
        job.say(third, "[rank 0 attempt 3] elsewhere")
        following.until("the Pod that has the rank now", lambda line: line == "elsewhere")

        job.set_status(phase="Succeeded")
        for pod in (second, third):
            job.exit(pod, 0)
        assert following.end() == 0
        assert following.lines == ["one", "two", "last words", "after the restart", "elsewhere"]
        assert f"--- rank 0, attempt 3, Pod {third}" in following.errors


def test_events_of_both_sources_are_followed(job: StandInJob, trainctl: Trainctl, cluster: Lab) -> None:
    head, first, second = start(job)
    with trainctl.start("events", job.name, "--follow") as following:
        following.until("the event log", lambda line: line.endswith("running  attempt 1: all ranks run"))
        later = [event(1, "running", "all ranks run"), event(2, "fault", "rank 1 was killed")]
        job.set_controller(head, node_status({first: 0, second: 1}), later)
        following.until("a new line of the log", lambda line: line.endswith("fault  attempt 1: rank 1 was killed"))
        job.add_pod("node", 3)
        following.until("Kubernetes' own", lambda line: f"Started  {job.name}-node-3" in line)
        job.delete()
        assert following.end() == 1
        assert "was deleted" in following.errors
        assert sum("all ranks run" in line for line in following.lines) == 1


def test_a_job_is_watched_to_its_end(job: StandInJob, trainctl: Trainctl) -> None:
    head, first, second = start(job)
    with trainctl.start("status", job.name, "--watch") as watching:
        watching.until("how far it is", lambda line: "phase Running" in line)
        watching.until("the controller's step", lambda line: "step 7/100" in line)
        job.set_controller(head, node_status({first: 0, second: 1}, attempt=2, phase="Recovering"), [])
        watching.until("another attempt", lambda line: "attempt 2" in line)
        job.set_status(phase="Recovering")
        watching.until("the resource's phase", lambda line: "phase Recovering" in line and "attempt 2" in line)
        job.set_status(phase="Succeeded", weightsDigest="c0ffee")
        assert watching.end() == 0
        assert "phase Succeeded" in watching.lines[-1]
        assert "weights c0ffee" in watching.lines[-1]


def test_faults_go_to_the_controller_or_to_a_pod(job: StandInJob, trainctl: Trainctl, cluster: Lab) -> None:
    head, _, second = start(job)
    assert trainctl.ok("fault", "rank-crash:1", job.name).startswith(f"rank-crash:1 asked of {job.name}: ")
    trainctl.ok("fault", "corrupt:0/header", job.name)
    assert job.faults(head) == ["rank-crash:1", "corrupt:0/header"]
    done = trainctl("fault", "hang:1", job.name)
    assert (done.status, done.err) == (2, "trainctl: hang:1: not here\n"), "the controller's own reason"
    assert trainctl.ok("fault", "pod-delete:1", job.name) == f"Pod {second} deleted\n"
    assert trainctl.ok("fault", "head-loss", job.name) == f"Pod {head} deleted\n"
    pods = {pod["metadata"]["name"] for pod in cluster.get("pods", "-l", f"outlast.dev/job={job.name}")["items"]}
    assert pods == {f"{job.name}-node-1"}


def test_code_is_there_when_a_pod_starts(cluster: Lab, trainctl: Trainctl, tmp_path: pathlib.Path) -> None:
    """A Pod made of the job's template, as the operator makes one, finds its files, modes and folders."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/__init__.py").write_text("")
    (tmp_path / "lib/words.py").write_text("WORD = 'packed'\n")
    (tmp_path / "train.py").write_text(
        "import os, sys\nfrom lib.words import WORD\nprint(WORD, os.getcwd(), os.access('run.sh', os.X_OK), sys.argv[1:])\n"
    )
    (tmp_path / "run.sh").write_text("#!/bin/sh\n")
    (tmp_path / "run.sh").chmod(0o755)
    trainctl.ok("submit", "train.py", "--code", ".", "--name", "packed", "--image", IMAGE, "--", "--a", "1")
    spec = cluster.get("trainingjob", "packed")["spec"]
    pod_spec = spec["workers"]["template"]["spec"]
    pod_spec["containers"][0]["command"] = spec["entrypoint"]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "packed"},
        "spec": {**pod_spec, "restartPolicy": "Never"},
    }
    cluster.apply(pod)
    cluster.kubectl("wait", "pod/packed", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=60s")
    assert cluster.kubectl("logs", "packed") == "packed /opt/outlast/code True ['--a', '1']\n"
    cluster.kubectl("delete", "pod", "packed", "--grace-period=1")
    trainctl.ok("delete", "packed", "--wait")
    gone = ["wait", "--for=delete", "configmap", "-l", "outlast.dev/job=packed", "--timeout=30s"]
    cluster.kubectl(*gone)
