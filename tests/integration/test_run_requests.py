"""Whole runs of which something is asked while they train: they are suspended, held, resized and broken over HTTP, and
end with the bits of the run of which nothing was asked."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from support.asking import Asking
from support.runs import Outcome, job, trainctl_run

pytestmark = pytest.mark.timeout(400)

STEPS = 70
FSDP = ("--parallel", "fsdp", "--pace", "0.2", "--global-batch", "256", "--steps", str(STEPS))
SUSPENDED = 3


def spec(folder: pathlib.Path | None = None, **changes: Any) -> dict[str, Any]:
    """The job, with a store in ``folder`` that is used at the end alone, unless somebody asks for more."""
    if folder is not None:
        changes["checkpoint"] = {"url": f"file://{folder}/store", "interval": 1000}
    return job("train.py", *FSDP, **changes)


@pytest.fixture(scope="module")
def reference(undisturbed: Callable[[dict[str, Any]], Outcome]) -> Outcome:
    return undisturbed(spec())


def test_a_suspended_job_goes_on_elsewhere_with_the_same_bits(tmp_path: pathlib.Path, reference: Outcome) -> None:
    asked: dict[str, Any] = {}

    def suspend(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        asked["at"] = controller.until_step(12)["step"]
        assert controller.ask("POST", "/suspend", {"patience_s": 60, "reason": "make room"}) == {"asked": "suspend"}

    first = trainctl_run(spec(tmp_path), tmp_path / "first", during=suspend)
    assert first.status == SUSPENDED, first.output
    assert first.report["phase"] == "Suspended"
    final = first.folder / "control" / "final.json"
    suspended = json.loads(final.read_text())["suspended"]
    step = suspended["step"]
    assert suspended == {"step": step, "checkpoint_step": step, "reason": "make room"}
    assert asked["at"] < step < STEPS
    assert first.report["checkpoints"]["last_step"] == step

    second = trainctl_run(spec(tmp_path), tmp_path / "second", options=("--resume",))
    assert second.status == 0, second.output
    assert second.digest == reference.digest
    (restored,) = second.events("restored")
    assert restored["fields"]["step"] == step
    assert min(second.losses()) == step + 1, "no step was done twice"
    assert max(first.losses()) == step


def test_a_hold_ends_by_itself_and_when_the_head_is_lost_costs_no_step(
    tmp_path: pathlib.Path, reference: Outcome
) -> None:
    """And a job that allows no faults takes none."""
    held: dict[str, Any] = {}

    def hold(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        controller.until_step(2)
        assert "spec.faults.allow" in controller.refused("/fault", {"fault": "rank-crash:1"})

        controller.ask("POST", "/hold", {"patience_s": 4})
        step = controller.until(lambda status: status["snapshot"]["held"], 30)["step"]
        after = controller.until(lambda status: not status["snapshot"]["held"], 10)
        assert step <= after["step"] <= step + 1

        before = controller.until_step(after["step"] + 5)
        controller.ask("POST", "/hold", {"patience_s": 60})
        held.update(controller.until(lambda status: status["snapshot"]["held"], 30))
        supervisor = psutil.Process(before["pid"]).parents()
        heads = [child for parent in supervisor for child in parent.children() if child.name() == "gcs_server"]
        os.kill(heads[0].pid, signal.SIGKILL)

    outcome = trainctl_run(spec(), tmp_path, during=hold)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    (loss,) = outcome.recoveries
    assert (loss["kind"], loss["lost_steps"], loss["restored_step"]) == ("head-lost", 0, held["step"])
    assert all(len(losses) == 1 for losses in outcome.losses().values()), "no step was done twice"


def test_faults_on_request(tmp_path: pathlib.Path, reference: Outcome) -> None:
    """One after the other, each once the one before is recovered from; last, a node is asked to leave."""
    faults = ["rank-crash:1", "keeper-crash:2", "corrupt:0/data", "agent-crash:3", "controller-crash", "node-loss:2"]

    def strike(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        controller.until_step(8)
        for fault in faults:
            controller.ask("POST", "/fault", {"fault": fault})
            controller.until(lambda status: status["phase"] != "Running", 5) if fault[:4] in ("rank", "agen") else None
            step = controller.until_step(8)["step"]
            controller.until_step(step + 4)
        assert "there is no rank 4" in controller.refused("/fault", {"fault": "rank-crash:4"})
        assert "can be asked for" in controller.refused("/fault", {"fault": "straggler:1"})
        controller.ask("POST", "/fault", {"fault": "node-leave:1"})
        controller.until(lambda status: "left" in {node["state"] for node in status["nodes"].values()}, 30)

    outcome = trainctl_run(spec(faults={"allow": True}), tmp_path, during=strike)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    injected = [event["text"] for event in outcome.events("fault-injected")]
    assert injected == [*faults, "node-leave:1"]
    *kinds, last = [recovery["kind"] for recovery in outcome.recoveries]
    assert (last, outcome.recoveries[-1]["lost_steps"]) == ("node-left", 0)
    assert kinds == ["rank-exit", "agent-lost", "node-lost"]
    assert {event["text"].split(":")[0] for event in outcome.events("injured")} == {
        "rank-crash",
        "keeper-crash",
        "corrupt",
        "node-leave",
    }
