"""The command line against a real cluster: one job from its submission to its deletion, and what is printed."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import yaml

from support.labs import Lab
from support.trainingjobs import Job, assert_nothing_left, job, template

NAMESPACE = "train"


class Line:
    """``trainctl`` in the jobs' namespace."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._lab.run(sys.executable, "-m", "trainctl", "-n", NAMESPACE, *arguments, timeout=240)

    def __call__(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


@pytest.fixture
def trainctl(release: Lab) -> Line:
    return Line(release)


@pytest.fixture(scope="module")
def running(release: Lab, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """A job submitted by its file, which trains for long."""
    line = Line(release)
    resource = job(
        "steered",
        1_000_000,
        replicas=2,
        step_time=0.3,
        validate_every=10,
        workers={"template": template(), "minReplicas": 1},
        checkpoint={"url": bucket, "interval": 20},
        faults={"allow": True},
        recovery={"growAfter": "1s"},
    )
    file = tmp_path_factory.mktemp("jobs") / "job.yaml"
    file.write_text(yaml.safe_dump(resource))
    printed = line("submit", str(file))
    assert "steered" in printed
    found = Job(release, NAMESPACE, "steered")
    found.reach(30, seconds=180)
    yield found
    line("delete", "steered", "--wait")


def test_a_dry_run_prints_a_job_that_is_valid(trainctl: Line, release: Lab, tmp_path: pathlib.Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("print('hello')\n")
    flags = ["--name", "mine", "--nodes", "4", "--spares", "1", "--image", "mine:1", "--dry-run"]
    printed = trainctl("submit", str(script), *flags, "--", "--lr", "0.1")
    documents = {part["kind"]: part for part in yaml.safe_load_all(printed) if part}
    assert documents["TrainingJob"]["spec"]["workers"]["replicas"] == 4
    assert documents["TrainingJob"]["spec"]["entrypoint"][-2:] == ["--lr", "0.1"]
    release.kubectl("apply", "-n", NAMESPACE, "--dry-run=server", "-f", "-", given=printed)


SCRIPT = """
import torch
import outlast

run = outlast.init()
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.protect(model=model, optimizer=optimizer)
for batch in run.steps([torch.ones(2, 4)] * 4, total=8):
    optimizer.zero_grad()
    model(batch).sum().backward()
    optimizer.step()
print(f"rank {run.rank} of {run.world_size} says goodbye", flush=True)
"""


def test_a_script_is_sent_run_and_followed_and_its_logs_outlive_its_pods(
    trainctl: Line, release: Lab, bucket: str, tmp_path: pathlib.Path
) -> None:
    """From flags alone: the script goes as a ConfigMap; what it said is read from where the agents left it."""
    script = tmp_path / "small.py"
    script.write_text(SCRIPT)
    flags = ["--name", "small", "--nodes", "1", "--image", "outlast-training:dev", "--store", bucket]
    flags += ["--secret", "bucket"]  # with the store's credentials
    try:
        trainctl("submit", str(script), *flags, "--wait")
        said = "rank 0 of 1 says goodbye"
        assert said in trainctl("logs", "small")
        release.kubectl("-n", NAMESPACE, "delete", "pod", "-l", "outlast.dev/job=small", "--timeout=60s")
        assert said in trainctl("logs", "small"), "from the job's store"
    finally:
        trainctl("delete", "small", "--wait")
    assert_nothing_left(release, NAMESPACE, "small")


def test_status(trainctl: Line, running: Job) -> None:
    assert "steered" in trainctl("status")
    shown = trainctl("status", "steered")
    assert "Running" in shown
    assert "steered-node-" in shown, "its nodes, which the controller knows"
    assert json.loads(trainctl("status", "steered", "-o", "json"))["metadata"]["name"] == "steered"


def test_describe_and_events(trainctl: Line, running: Job) -> None:
    assert "steered-head-0" in trainctl("describe", "steered")
    events = trainctl("events", "steered")
    assert "PodsMade" in events, "Kubernetes' own"
    assert "attempt 1 starts all ranks" in events, "and the controller's"


def test_faults_are_injected_and_refused(trainctl: Line, running: Job) -> None:
    cost = running.cost_of(lambda: trainctl("fault", "rank-crash:1", "steered"))
    assert cost.restarted_s < 60
    wrong = trainctl.run("fault", "earthquake:1", "steered")
    assert wrong.returncode == 2
    assert "earthquake" in wrong.stderr


def test_logs_across_a_restart(trainctl: Line, running: Job) -> None:
    running.reach(running.ask()["best_step"] + 11)
    assert "validation loss" in trainctl("logs", "steered")
    assert "step 10: validation loss" in trainctl("logs", "steered", "0", "--attempt", "1")
    assert "validation loss" in trainctl("logs", "steered", "--previous", "--tail", "300")
    assert "event=controller-started" in trainctl("logs", "steered", "--head")


def test_checkpoints_of_the_job(trainctl: Line, running: Job) -> None:
    running.watch_steps("checkpointed", 120, lambda s: (s["checkpoints"] or {}).get("count", 0) >= 1)
    rows = json.loads(trainctl("checkpoints", "ls", "steered", "--json"))["checkpoints"]
    assert rows
    assert all(row["step"] % 20 == 0 and row["state"] == "ok" for row in rows), rows
    _, _, *lines = trainctl("checkpoints", "ls", "steered").splitlines()
    assert str(rows[0]["step"]) in [line.split()[0] for line in lines], "the newest is there a moment later, too"


def test_scale(trainctl: Line, running: Job) -> None:
    trainctl("scale", "steered", "--nodes", "1")
    running.watch_steps("of one node", 180, lambda s: s["stage"] == "running" and s["workers"]["size"] == 1)
    trainctl("scale", "steered", "--nodes", "2")
    running.watch_steps("of two nodes", 180, lambda s: s["stage"] == "running" and s["workers"]["size"] == 2)


def test_suspend_and_resume(trainctl: Line, running: Job) -> None:
    trainctl("suspend", "steered", "--wait", "--timeout", "2m")
    status = running.status()
    assert status["phase"] == "Suspended"
    kept = status["checkpoint"]["step"]
    assert "Suspended" in trainctl("status", "steered")
    trainctl("resume", "steered", "--wait", "--timeout", "3m")
    assert running.reach(kept + 1, 180)["step"] > kept


def test_what_is_not_there_is_told(trainctl: Line, release: Lab) -> None:
    done = trainctl.run("status", "nobody")
    assert done.returncode != 0
    assert "nobody" in done.stderr
    assert "Traceback" not in done.stderr
