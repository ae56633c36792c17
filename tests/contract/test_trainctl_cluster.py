"""``trainctl`` on a real API server without nodes: what it sends, what it shows, and what it says when it is refused."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from outlast.checkpoint.manifest import job_url
from outlast.checkpoint.store import open_store
from support.commands import Trainctl
from support.labs import Lab, running_lab
from support.stores import ROOT

pytestmark = pytest.mark.timeout(120)

CRD = str(ROOT / "manifests" / "crd.yaml")
JOB = """
apiVersion: outlast.dev/v1alpha1
kind: TrainingJob
metadata: {name: small}
spec:
  entrypoint: [python, train.py]
  workers: {replicas: 4}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Lab]:
    with running_lab("tctl", nodes=0) as lab:
        lab.kubectl("apply", "-f", CRD)
        lab.kubectl("wait", "--for=condition=established", "crd/trainingjobs.outlast.dev")
        yield lab


@pytest.fixture
def trainctl(cluster: Lab, tmp_path: pathlib.Path) -> Iterator[Trainctl]:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "train.py").write_text("print('hello')\n")
    yield Trainctl(cluster.variables, str(tmp_path))
    cluster.kubectl("delete", "trainingjobs", "--all", "--all-namespaces", "--wait=true")


def resource(cluster: Lab, name: str = "small", namespace: str = "default") -> dict[str, Any]:
    return cluster.get("-n", namespace, "trainingjob", name)


def set_status(cluster: Lab, name: str, **status: Any) -> None:
    """As an operator that has seen the specification as it is."""
    generation = resource(cluster, name)["metadata"]["generation"]
    patch = json.dumps({"status": {"observedGeneration": generation, **status}})
    cluster.kubectl("patch", "trainingjob", name, "--subresource=status", "--type=merge", "-p", patch)


# --- submit ---------------------------------------------------------------------------------------------------------


def test_a_file_is_submitted_as_it_is(cluster: Lab, trainctl: Trainctl) -> None:
    done = trainctl("submit", "job.yaml", "--set", "workers.spares=1")
    assert (done.status, done.out) == (0, "trainingjob.outlast.dev/small created\n")
    assert "train.py beside job.yaml is not sent" in done.err
    spec = resource(cluster)["spec"]
    assert (spec["workers"]["replicas"], spec["workers"]["spares"]) == (4, 1)
    assert spec["recovery"]["maxRestarts"] == 20, "the server's default"
    assert trainctl.ok("submit", "-", "--name", "other", "-o", "name", given=JOB) == "trainingjob.outlast.dev/other\n"


def test_a_script_goes_with_its_job_and_away_with_it(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "train.py", "--name", "scripted", "--nodes", "2", "--", "--steps", "5")
    job = resource(cluster, "scripted")
    assert job["spec"]["entrypoint"] == ["python", "train.py", "--steps", "5"]
    name = job["metadata"]["annotations"]["outlast.dev/code"]
    config = cluster.get("configmap", name)
    assert config["data"] == {"train.py": "print('hello')\n"}
    assert config["metadata"]["ownerReferences"][0]["uid"] == job["metadata"]["uid"]
    told = trainctl.ok("delete", "scripted", "--wait")
    assert "its packed code" in told
    # The garbage collector looks for new kinds of owners every 30 s, and this one is new.
    cluster.kubectl("wait", "--for=delete", f"configmap/{name}", "--timeout=90s")


def test_a_job_that_is_refused_leaves_no_code_behind(cluster: Lab, trainctl: Trainctl) -> None:
    done = trainctl("submit", "train.py", "--name", "refused", "--set", "metadata.labels={a: b c}")
    assert done.status == 2, done
    assert "metadata.labels" in done.err
    assert cluster.get("configmap", "-l", "outlast.dev/job=refused")["items"] == []


def test_dry_runs_make_nothing(cluster: Lab, trainctl: Trainctl) -> None:
    job, code = yaml.safe_load_all(trainctl.ok("submit", "train.py", "--name", "dry", "--dry-run"))
    assert job["metadata"]["namespace"] == "default"
    assert code["metadata"]["name"] == job["metadata"]["annotations"]["outlast.dev/code"]
    assert json.loads(trainctl.ok("submit", "job.yaml", "--dry-run=client", "-o", "json"))["kind"] == "TrainingJob"
    told = trainctl.ok("submit", "job.yaml", "--dry-run=server")
    assert told == "trainingjob.outlast.dev/small would be created (the server has checked it)\n"
    checked = json.loads(trainctl.ok("submit", "job.yaml", "--dry-run=server", "-o", "json"))
    assert checked["spec"]["recovery"]["window"] == "1h", "the server's default"
    assert cluster.get("trainingjobs")["items"] == cluster.get("configmaps", "-l", "outlast.dev/job=dry")["items"] == []


def test_what_a_dry_run_prints_is_what_kubectl_applies(cluster: Lab, trainctl: Trainctl) -> None:
    text = trainctl.ok("submit", "train.py", "--name", "same", "--nodes", "2", "--gpus", "1", "--dry-run")
    assert cluster.kubectl("apply", "-f", "-", "-o", "name", given=text).split()[0].endswith("/same")
    cluster.kubectl("delete", "configmap", "-l", "outlast.dev/job=same")
    assert resource(cluster, "same")["spec"]["workers"]["replicas"] == 2


def test_a_name_is_taken_once_unless_replaced(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "train.py", "--name", "small")
    first = resource(cluster)["metadata"]
    done = trainctl("submit", "job.yaml")
    assert done.status == 2
    assert 'there is a TrainingJob "small" in namespace "default" already (Pending)' in done.err
    assert "--replace" in done.err
    trainctl.ok("submit", "train.py", "--name", "small", "--replace")
    second = resource(cluster)["metadata"]
    assert second["uid"] != first["uid"]
    config = cluster.get("configmap", second["annotations"]["outlast.dev/code"])
    assert config["metadata"]["ownerReferences"][0]["uid"] == second["uid"], "the same code, not the old job's"


def test_a_job_is_not_deleted_for_one_that_is_refused(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "train.py", "--name", "small")
    first = resource(cluster)["metadata"]["uid"]
    wrong = ["--set", "metadata.labels={a: b c}"]
    assert trainctl("submit", "train.py", "--name", "small", "--replace", *wrong).status != 0
    assert resource(cluster)["metadata"]["uid"] == first


def test_code_that_was_left_behind_is_taken_up(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "train.py", "--name", "left", "-o", "name")
    name = resource(cluster, "left")["metadata"]["annotations"]["outlast.dev/code"]
    cluster.kubectl("patch", "configmap", name, "--type=merge", "-p", '{"metadata":{"ownerReferences":null}}')
    trainctl.ok("delete", "left", "--wait")
    uid = cluster.get("configmap", name)["metadata"]["uid"]
    trainctl.ok("submit", "train.py", "--name", "left")
    config = cluster.get("configmap", name)["metadata"]
    assert config["uid"] == uid
    assert config["ownerReferences"][0]["uid"] == resource(cluster, "left")["metadata"]["uid"]


def test_what_only_the_server_knows_is_told_in_its_words(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml")
    done = trainctl("scale", "small", "--min-nodes", "9")
    assert done.status == 2
    assert "minReplicas must be at most replicas" in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "this is no YAML at line 1"),
        (
            JOB.replace("replicas: 4", "replicas: 4, replica: 3"),
            "spec.workers.replica: there is no such field; did you mean",
        ),
        (JOB.replace("replicas: 4", "replicas: 0"), "spec.workers.replicas: 0 was given, but it must be at least 1"),
        (JOB.replace("kind: TrainingJob", "kind: Job"), "kind"),
    ],
)
def test_a_wrong_file_is_refused_before_it_is_sent(trainctl: Trainctl, text: str, said: str) -> None:
    done = trainctl("submit", "-", given=text)
    assert done.status == 2
    assert said in done.err


# --- looking --------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_as_kubectl_would(cluster: Lab, trainctl: Trainctl) -> None:
    assert trainctl.ok("status") == 'there are no TrainingJobs in namespace "default"\n'
    trainctl.ok("submit", "job.yaml")
    cluster.run("kubectl", "create", "namespace", "team")
    trainctl.ok("submit", "job.yaml", "-n", "team", "--name", "theirs")
    set_status(cluster, "small", phase="Running", step=12, totalSteps=100, goodput=0.987, restartCount=2)
    header, row = trainctl.ok("status").splitlines()
    assert header.split()[:3] == ["NAME", "PHASE", "STEP"]
    assert row.split()[:6] == ["small", "Running", "12/100", "0/4", "98.7%", "2"]
    rows = trainctl.ok("status", "-A").splitlines()[1:]
    assert [row.split()[:2] for row in rows] == [["default", "small"], ["team", "theirs"]]
    assert trainctl.ok("-n", "team", "status", "-o", "name") == "trainingjob.outlast.dev/theirs\n"
    listed = json.loads(trainctl.ok("status", "-o", "json"))
    assert listed["kind"] == "List"
    assert "managedFields" not in listed["items"][0]["metadata"]
    one = yaml.safe_load(trainctl.ok("status", "small", "-o", "yaml"))
    assert one["status"]["step"] == 12
    assert one["controller"] is None
    assert "no head Pod" in one["controllerTrouble"]
    assert "STORE" in trainctl.ok("status", "-o", "wide")


def test_a_list_is_watched(cluster: Lab, trainctl: Trainctl) -> None:
    with trainctl.start("status", "--watch") as watching:
        watching.until("the header", lambda line: line.startswith("NAME"))
        trainctl.ok("submit", "job.yaml")
        watching.until("a new job", lambda line: line.startswith("small   Pending"))
        set_status(cluster, "small", phase="Running", step=1)
        watching.until("its change", lambda line: line.startswith("small   Running   1 "))
        watching.process.send_signal(signal.SIGINT)
        assert watching.process.wait(10) == 130


@pytest.mark.parametrize(
    ("form", "expected"),
    [("yaml", "---"), ("json", '{"apiVersion": "outlast.dev/v1alpha1"'), ("name", "trainingjob.outlast.dev/small")],
)
def test_what_is_followed_is_written_in_the_form_that_was_asked_for(
    cluster: Lab, trainctl: Trainctl, form: str, expected: str
) -> None:
    trainctl.ok("submit", "job.yaml")
    for what in (("status", "small"), ("status",)):
        with trainctl.start(*what, "--watch", "-o", form) as watching:
            watching.until("the job", lambda line: line.startswith(expected))
            watching.process.send_signal(signal.SIGINT)
            assert watching.process.wait(10) == 130
    assert trainctl("events", "small", "-o", "name").status == 2


def test_following_a_submission_ends_with_the_job(cluster: Lab, trainctl: Trainctl) -> None:
    for name, phase, status in (("good", "Succeeded", 0), ("bad", "Failed", 1)):
        condition = {"type": phase, "status": "True", "reason": "BecauseOf", "message": "it was so"}
        condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
        with trainctl.start("submit", "job.yaml", "--name", name, "--wait") as following:
            following.until("that it was made", lambda line: line.endswith("created"))
            following.until("how it is", lambda line: line.startswith("phase Pending"))
            set_status(cluster, name, phase="Running", step=1)
            following.until("that it runs", lambda line: line.startswith("phase Running"))
            set_status(cluster, name, phase=phase, conditions=[condition])
            assert following.end() == status
            assert following.lines[-1].startswith(f"phase {phase}, why BecauseOf: it was so")
        assert f"phase {phase}, why BecauseOf" in trainctl.ok("status", name, "--watch"), (
            "that it was watched went well"
        )


def test_a_job_that_is_deleted_while_it_is_watched_is_told(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml")
    with trainctl.start("status", "small", "--watch") as watching:
        watching.until("how it is", lambda line: "phase Pending" in line)
        trainctl.ok("delete", "small")
        assert watching.end() == 1
        assert watching.errors.endswith('the TrainingJob "small" in namespace "default" was deleted\n')


def test_events_and_descriptions_tell_what_kubernetes_says(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml", "--set", "checkpoint.url=s3://bucket/p")
    meta = resource(cluster)["metadata"]
    uid, now = meta["uid"], meta["creationTimestamp"]
    for reason, kind, name, its_uid, seen, told in (
        ("Restarted", "TrainingJob", "small", uid, now, "rank 2 was killed"),
        ("FailedScheduling", "Pod", "small-node-3", "a-pods", now, "0/3 nodes are available"),
        ("Started", "Pod", "small-node-x", "a-pods", now, "another's"),
        ("GivenBack", "TrainingJob", "small", "an-earlier-jobs", now, "another's of that name"),
        ("Killing", "Pod", "small-node-0", "an-earlier-pods", "2026-01-01T00:00:00Z", "another's Pod of that name"),
    ):
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"small.{reason.lower()}", "namespace": "default"},
            "involvedObject": {"kind": kind, "name": name, "namespace": "default", "uid": its_uid},
            "reason": reason,
            "message": told,
            "type": "Warning",
            "lastTimestamp": seen,
            "count": 3,
        }
        cluster.apply(event)
    condition = {"type": "Ready", "status": "False", "reason": "NoNodes", "message": "3 of 4 nodes are missing"}
    set_status(cluster, "small", conditions=[{**condition, "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    text = trainctl.ok("events", "small")
    assert "Restarted          job            ! rank 2 was killed (x3)" in text
    assert "FailedScheduling   small-node-3   ! 0/3 nodes are available (x3)" in text
    assert "another's" not in text
    told = json.loads(trainctl.ok("events", "small", "-o", "json"))["events"]
    assert [entry["kind"] for entry in told] == ["FailedScheduling", "Restarted"]
    with trainctl.start("events", "small", "--follow") as following:
        following.until("the last that was there", lambda line: "rank 2 was killed" in line)
        cluster.apply({**event, "lastTimestamp": "2026-01-01T00:01:00Z"})
        cluster.apply({**event, "metadata": {"name": "small.later", "namespace": "default"}, "lastTimestamp": now})
        following.until("what comes", lambda line: "Killing" in line)
        assert sum("another's" in line for line in following.lines) == 1
    page = trainctl.ok("describe", "small")
    for part in ("4 of 1 rank each", "s3://bucket/p", "NoNodes", "3 of 4 nodes are missing", "rank 2 was killed"):
        assert part in page
    assert json.loads(trainctl.ok("describe", "small", "-o", "json"))["job"]["kind"] == "TrainingJob"


def test_that_no_operator_looks_at_a_job_is_told(cluster: Lab, trainctl: Trainctl) -> None:
    note = "no operator has looked at it for 1"
    trainctl.ok("submit", "job.yaml")
    trainctl.ok("submit", "job.yaml", "--name", "resumed", "--set", "suspend=true")
    set_status(cluster, "resumed", phase="Suspended")
    assert note not in trainctl.ok("status", "small"), "one may yet"
    time.sleep(11)
    assert note in trainctl.ok("status", "small")
    assert "does one run? (kubectl get pods -A -l app.kubernetes.io/name=outlast)" in trainctl.ok("describe", "small")
    assert note not in trainctl.ok("status", "resumed")
    trainctl.ok("resume", "resumed")
    assert note not in trainctl.ok("status", "resumed"), "it was written a moment ago"
    time.sleep(11)
    assert note in trainctl.ok("status", "resumed")
    set_status(cluster, "resumed", phase="Pending")
    assert note not in trainctl.ok("status", "resumed")


def test_what_is_not_there_is_told(cluster: Lab, trainctl: Trainctl) -> None:
    for command in ("status", "describe", "logs", "events", "suspend", "resume", "delete"):
        done = trainctl(command, "nothing")
        assert done.status == 1
        assert done.err.startswith('trainctl: there is no TrainingJob "nothing" in namespace "default"')
        assert done.err.count("\n") == 1


# --- changing -------------------------------------------------------------------------------------------------------


def test_a_job_is_suspended_and_resumed(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml")
    done = trainctl("suspend", "small")
    assert done.out == "trainingjob.outlast.dev/small suspended\n"
    assert "no store" in done.err
    assert resource(cluster)["spec"]["suspend"] is True
    assert trainctl.ok("suspend", "small") == "trainingjob.outlast.dev/small is suspended already\n"
    done = trainctl("suspend", "small", "--wait", "--timeout", "1s")
    assert done.status == 1
    assert 'after 1 s the TrainingJob "small" is not seen to be suspended: it is Pending' in done.err
    set_status(cluster, "small", phase="Suspended")
    assert trainctl.ok("suspend", "small", "--wait").endswith("small is Suspended\n")
    assert json.loads(trainctl.ok("suspend", "small", "--wait", "-o", "json"))["status"]["phase"] == "Suspended"
    assert trainctl.ok("resume", "small", "-o", "name") == "trainingjob.outlast.dev/small\n"
    assert resource(cluster)["spec"]["suspend"] is False
    set_status(cluster, "small", phase="Running")
    done = trainctl("suspend", "small", "--wait", "--timeout", "1s")
    assert (done.status, "it is Running" in done.err) == (1, True)
    done = trainctl("resume", "small", "--wait", "--timeout", "1s")
    assert (done.status, "is not seen to be resumed: it is Running" in done.err) == (1, True), "that was before"
    set_status(cluster, "small", phase="Failed")
    done = trainctl("resume", "small")
    assert done.status == 2
    set_status(cluster, "small", phase="Running")
    with trainctl.start("suspend", "small", "--wait") as waiting:
        waiting.until("that it was asked", lambda line: line.endswith("suspended"))
        set_status(cluster, "small", phase="Succeeded")
        assert waiting.end() == 1, "it is not suspended"
    assert "has ended (Succeeded): it is not suspended" in waiting.errors
    done = trainctl("suspend", "small")
    assert (done.status, done.err) == (
        2,
        'trainctl: the TrainingJob "small" has ended (Succeeded): it cannot be suspended\n',
    )


def test_a_job_is_scaled_and_nothing_else_of_it_changes(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml")
    before = resource(cluster)["spec"]
    assert trainctl.ok("scale", "small", "--nodes", "6") == "trainingjob.outlast.dev/small scaled: 4 nodes -> 6 nodes\n"
    told = trainctl.ok("scale", "small", "--nodes", "5", "--min-nodes", "2", "--spares", "1")
    assert told.endswith("6 nodes -> 5 nodes, at least 2, 1 spare\n")
    expected = {**before, "workers": {**before["workers"], "replicas": 5, "minReplicas": 2, "spares": 1}}
    assert resource(cluster)["spec"] == expected
    told = trainctl.ok("scale", "small", "--nodes", "5", "--spares", "1")
    assert told == "trainingjob.outlast.dev/small has 5 nodes, at least 2, 1 spare already\n"
    assert trainctl("scale", "small").err == "trainctl: scale: say how many: --nodes, --min-nodes or --spares\n"


def test_a_deletion_says_what_goes_and_what_stays(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml", "--set", "checkpoint.url=s3://bucket/p", "--set", "workers.spares=1")
    newest = {"step": 70, "time": "2026-01-01T00:00:00Z", "url": "s3://bucket/p/default/small"}
    set_status(cluster, "small", phase="Running", step=77, checkpoint=newest)
    text = trainctl.ok("delete", "small", "--wait")
    assert text.splitlines() == [
        "trainingjob.outlast.dev/small deleted",
        "  goes    its Pods (5 nodes and the head), Service, Secret, NetworkPolicy and disruption budget",
        "  lost    what it has done since its newest checkpoint (it is at step 77)",
        "  stays   its checkpoints and logs at s3://bucket/p/default/small",
    ]
    assert cluster.run("kubectl", "get", "trainingjob", "small").returncode == 1


def test_waiting_for_a_deletion_ends_with_what_is_still_there(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml")
    uid = resource(cluster)["metadata"]["uid"]
    owner = {"apiVersion": "outlast.dev/v1alpha1", "kind": "TrainingJob", "name": "small", "uid": uid}
    meta = {"name": "small-node-0", "labels": {"outlast.dev/job": "small"}, "ownerReferences": [owner]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {**meta, "finalizers": ["example.com/held"]}}
    cluster.apply({**pod, "spec": {"containers": [{"name": "outlast", "image": "none"}]}})
    done = trainctl("delete", "small", "--wait", "--timeout", "2s")
    assert done.status == 1
    assert "after 2 s the TrainingJob \"small\" is not gone: pods ['small-node-0']" in done.err
    cluster.kubectl("patch", "pod", "small-node-0", "--type=merge", "-p", '{"metadata":{"finalizers":null}}')


def test_faults_need_to_be_allowed(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml")
    done = trainctl("fault", "rank-crash:1", "small")
    assert done.status == 2
    assert "spec.faults.allow is false" in done.err
    cluster.kubectl("patch", "trainingjob", "small", "--type=merge", "-p", '{"spec":{"faults":{"allow":true}}}')
    done = trainctl("fault", "rank-crash:1", "small")
    assert (done.status, "no head Pod" in done.err) == (1, True)
    for fault, said in (
        ("rank-crash", "rank-crash needs a rank: rank-crash:0"),
        ("explode:1", "unknown kind explode"),
        ("rank-crash@20:1", "it is not KIND:TARGET, such as rank-crash:1"),
        ("pod-delete:7", "a seat is needed, 0 to 3"),
    ):
        done = trainctl("fault", fault, "small")
        assert done.status == 2, done
        assert said in done.err


# --- the job's store ------------------------------------------------------------------------------------------------


def test_logs_of_pods_that_are_gone_come_from_the_store(trainctl: Trainctl, tmp_path: pathlib.Path) -> None:
    trainctl.ok("submit", "job.yaml", "--set", f"checkpoint.url=file://{tmp_path}/store")
    store = open_store(job_url(f"file://{tmp_path}/store", "default", "small"))
    for attempt, rank, text in ((1, 0, "old\n"), (2, 0, "one\ntwo\n"), (2, 1, "uno\n"), (10, 1, "dieci\n")):
        store.put(f"logs/attempt-{attempt}/rank-{rank}.log", text.encode())
    done = trainctl("logs", "small")
    assert (done.status, done.out) == (0, "one\ntwo\n")
    assert "logs/attempt-2: no Pod has these lines any more" in done.err
    assert trainctl.ok("logs", "small", "1", "--tail", "1") == "dieci\n"
    assert trainctl.ok("logs", "small", "--attempt", "1") == "old\n"
    assert trainctl.ok("logs", "small", "--attempt", "2", "--all-ranks").splitlines() == [
        "[rank 0 attempt 2] one",
        "[rank 0 attempt 2] two",
        "[rank 1 attempt 2] uno",
    ]
    done = trainctl("logs", "small", "--attempt", "3")
    assert done.status == 1
    assert "nor in the job's store" in done.err


def test_checkpoints_are_found_by_the_jobs_name(trainctl: Trainctl, tmp_path: pathlib.Path) -> None:
    trainctl.ok("submit", "job.yaml", "--set", f"checkpoint.url=file://{tmp_path}/store")
    done = trainctl("checkpoints", "ls", "small")
    assert (done.status, f"file://{tmp_path}/store/default/small holds no checkpoints" in done.err) == (2, True)
    trainctl.ok("submit", "job.yaml", "--name", "bare")
    done = trainctl("checkpoints", "show", "bare@10")
    assert (done.status, 'the TrainingJob "bare" has no store' in done.err) == (2, True)


# --- who may, and who is not there ----------------------------------------------------------------------------------


def as_user(cluster: Lab, folder: pathlib.Path, name: str) -> str:
    """A kubeconfig of a user whom the API server knows and who may do nothing yet."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    pem = request.public_bytes(serialization.Encoding.PEM)
    cluster.apply(
        {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"name": name},
            "spec": {
                "request": base64.b64encode(pem).decode(),
                "signerName": "kubernetes.io/kube-apiserver-client",
                "usages": ["client auth"],
            },
        }
    )
    cluster.kubectl("certificate", "approve", name)
    cluster.kubectl("wait", "csr", name, "--for=jsonpath={.status.certificate}", "--timeout=30s")
    config = json.loads(cluster.kubectl("config", "view", "--raw", "--minify", "-o", "json"))
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    user = {
        "client-certificate-data": cluster.get("csr", name)["status"]["certificate"],
        "client-key-data": base64.b64encode(secret).decode(),
    }
    config["users"] = [{"name": config["users"][0]["name"], "user": user}]
    (folder / f"{name}.kubeconfig").write_text(json.dumps(config))
    return str(folder / f"{name}.kubeconfig")


def test_a_user_without_rights_is_told_which(cluster: Lab, trainctl: Trainctl, tmp_path: pathlib.Path) -> None:
    bob = as_user(cluster, tmp_path, "bob")
    for command, action in (
        (["status"], 'list trainingjobs.outlast.dev in namespace "default"'),
        (["status", "x"], 'get trainingjobs.outlast.dev in namespace "default"'),
        (["submit", "job.yaml", "--dry-run=server"], 'create trainingjobs.outlast.dev in namespace "default"'),
    ):
        done = trainctl(*command, "--kubeconfig", bob)
        assert done.status == 1
        assert f'you may not {action}: User "bob" cannot' in done.err
        assert done.err.count("\n") == 1
    assert trainctl(*["delete", "x"], "--kubeconfig", bob).status == 1


def test_who_impersonates_has_no_more_rights_than_whom(
    cluster: Lab, trainctl: Trainctl, tmp_path: pathlib.Path
) -> None:
    """As kubectl does: an admin whose user says ``as`` must not delete with an admin's rights."""
    trainctl.ok("submit", "job.yaml")
    config = json.loads(pathlib.Path(cluster.variables["KUBECONFIG"]).read_text())
    config["users"][0]["user"] |= {"as": "jane", "as-groups": ["devs", "readers"], "as-user-extra": {"Why": ["a", "b"]}}
    weak = tmp_path / "weak"
    weak.write_text(json.dumps(config))
    done = trainctl("delete", "small", "--kubeconfig", str(weak))
    assert done.status == 1
    assert 'User "jane" cannot' in done.err
    role = ["create", "clusterrole", "read", "--verb=get,list", "--resource=trainingjobs.outlast.dev"]
    cluster.kubectl(*role)
    try:
        cluster.kubectl("create", "clusterrolebinding", "read", "--clusterrole=read", "--group=readers")
        assert "small" in trainctl.ok("status", "--kubeconfig", str(weak)), "all groups count"
    finally:
        cluster.kubectl("delete", "clusterrole,clusterrolebinding", "read")


@pytest.mark.parametrize("name", ["..", "a/b", "a?b"])
@pytest.mark.parametrize("command", [["status"], ["-n", "x", "delete", "small"], ["submit", "job.yaml"]])
def test_what_is_no_namespace_is_told(trainctl: Trainctl, command: list[str], name: str) -> None:
    done = trainctl(*command, "-n", name)
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert f'"{name}" is no name of a namespace' in done.err


def test_a_namespace_that_is_not_there_is_told(trainctl: Trainctl) -> None:
    for more in ([], ["--dry-run=server"]):
        done = trainctl("submit", "job.yaml", "-n", "nowhere", *more)
        assert done.status == 1
        assert 'there is no namespace "nowhere" in the cluster of context' in done.err
        assert "make it (kubectl create namespace nowhere), or choose another with -n" in done.err


@pytest.mark.parametrize("name", ["", "a/b", "j?x", "Big", "a b"])
@pytest.mark.parametrize("command", [["suspend"], ["delete"], ["events"], ["scale", "--nodes", "2"], ["status"]])
def test_what_is_no_name_is_told(trainctl: Trainctl, command: list[str], name: str) -> None:
    done = trainctl(command[0], name, *command[1:])
    assert done.status == 2
    assert f'"{name}" is no name of a TrainingJob' in done.err


def test_without_the_definition_trainctl_says_how_to_install(cluster: Lab, trainctl: Trainctl) -> None:
    cluster.kubectl("delete", "-f", CRD, "--wait=true")
    try:
        for command in (["status"], ["status", "-A"], ["submit", "job.yaml"], ["describe", "x"], ["delete", "x"]):
            done = trainctl(*command)
            assert done.status == 1
            assert "knows no TrainingJobs: install Outlast there first (helm install" in done.err
            assert done.err.splitlines()[-1].startswith("trainctl: ")
    finally:
        cluster.kubectl("apply", "-f", CRD)
        cluster.kubectl("wait", "--for=condition=established", "crd/trainingjobs.outlast.dev")


def test_contexts_and_files_are_found_as_kubectl_finds_them(cluster: Lab, tmp_path: pathlib.Path) -> None:
    config = json.loads(pathlib.Path(cluster.variables["KUBECONFIG"]).read_text())
    only = config["contexts"][0]
    named = {"name": "team", "context": {**only["context"], "namespace": "team"}}
    (tmp_path / "more").write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "contexts": [named]}))
    both = f"{cluster.variables['KUBECONFIG']}{os.pathsep}{tmp_path}/more{os.pathsep}{tmp_path}/absent"
    trainctl = Trainctl({**cluster.variables, "KUBECONFIG": both})
    assert 'in namespace "team"' in trainctl.ok("status", "--context", "team")
    assert 'in namespace "x"' in trainctl.ok("status", "--context", "team", "-n", "x")
    assert 'in namespace "default"' in trainctl.ok("status")
    done = trainctl("status", "--context", "none")
    assert done.status == 2
    assert f"--context none: there is no such context in {cluster.variables['KUBECONFIG']}" in done.err
    assert f"there are {only['name']}, team" in done.err


def test_an_api_server_that_is_away_is_told(cluster: Lab, tmp_path: pathlib.Path) -> None:
    config = json.loads(pathlib.Path(cluster.variables["KUBECONFIG"]).read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    (tmp_path / "config").write_text(json.dumps(config))
    done = Trainctl({**cluster.variables, "KUBECONFIG": str(tmp_path / "config")})("status")
    assert done.status == 1
    assert "(https://127.0.0.1:1) does not answer: Connection refused: is the cluster up" in done.err
    assert done.err.count("\n") == 1


# --- completion -----------------------------------------------------------------------------------------------------


def completed(cluster: Lab, line: str, **more: str) -> list[str]:
    asked = {"_TRAINCTL_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    code = ["-c", "import sys; sys.argv[0] = 'trainctl'; from trainctl.main import run; run()"]
    environment = {**Trainctl(cluster.variables).environment(), **asked, **more}
    done = subprocess.run(
        [sys.executable, *code], env=environment, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.stderr == ""
    return list(done.stdout.split())


def test_job_names_are_completed(cluster: Lab, trainctl: Trainctl) -> None:
    for name in ("alpha", "alps", "beta"):
        trainctl.ok("submit", "job.yaml", "--name", name)
    assert completed(cluster, "trainctl status al") == ["alpha", "alps"]
    assert completed(cluster, "trainctl delete alpha be") == ["beta"]
    assert completed(cluster, "trainctl -n team logs ") == []
    assert completed(cluster, "trainctl checkpoints ls be") == ["beta"]
    assert "suspend" in completed(cluster, "trainctl su")
    began = time.monotonic()
    assert completed(cluster, "trainctl status al", KUBECONFIG="/nowhere") == []
    assert time.monotonic() - began < 5


SCRIPTS = pathlib.Path(sys.executable).parent
"""Where trainctl's are, and those by which kubectl finds it."""


def kubectl(cluster: Lab, *words: str) -> subprocess.CompletedProcess[str]:
    """Run kubectl with its plugin on PATH."""
    return cluster.run("env", f"PATH={SCRIPTS}:{cluster.variables['PATH']}", "kubectl", *words)


def test_kubectl_completes_its_plugin(cluster: Lab, trainctl: Trainctl) -> None:
    """By the script of that name beside trainctl's."""
    trainctl.ok("submit", "job.yaml", "--name", "gamma")

    def offered(*words: str) -> list[str]:
        done = kubectl(cluster, "__complete", "outlast", *words)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert offered("status", "ga") == ["gamma", ":4"]
    assert offered("sus") == ["suspend", ":4"]
    done = cluster.run(str(SCRIPTS / "kubectl_complete-outlast"), "submit", "no-su")
    assert (done.returncode, done.stderr) == (0, ""), "kubectl says :0 too when its plugin breaks"
    assert offered("submit", "no-su") == [":0"], "names of files are the shell's to offer"
    assert "--dry-run" in offered("submit", "--dry")


def test_kubectl_runs_its_plugin(cluster: Lab, trainctl: Trainctl) -> None:
    trainctl.ok("submit", "job.yaml", "--name", "delta")
    done = kubectl(cluster, "outlast", "status", "-o", "name")
    assert (done.returncode, done.stdout) == (0, "trainingjob.outlast.dev/delta\n"), done.stderr
    done = kubectl(cluster, "outlast", "submit")
    assert done.returncode != 0
    assert "Usage: kubectl outlast submit" in done.stderr
