"""Whole runs of which something is asked while they train: they are suspended, held, resized and broken over HTTP, and
end with the bits of the run of which nothing was asked."""

from __future__ import annotations

import json
import os
import pathlib
import signal
from typing import Any

import psutil
import pytest

from support.asking import Asking
from support.runs import Outcome, job, trainctl_run

pytestmark = pytest.mark.timeout(400)

STEPS = 60
FSDP = ("--parallel", "fsdp", "--pace", "0.2", "--global-batch", "256", "--steps", str(STEPS))
SUSPENDED = 3


def spec(folder: pathlib.Path | None = None, **changes: Any) -> dict[str, Any]:
    """The job, with a store in ``folder`` that is used at the end alone, unless somebody asks for more."""
    if folder is not None:
        changes["checkpoint"] = {"url": f"file://{folder}/store", "interval": 1000}
    return job("train.py", *FSDP, **changes)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    outcome = trainctl_run(spec(), tmp_path_factory.mktemp("reference"))
    assert outcome.status == 0, outcome.output
    return outcome


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


def test_after_a_hold_a_lost_head_costs_no_step(tmp_path: pathlib.Path, reference: Outcome) -> None:
    held: dict[str, Any] = {}

    def hold(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        before = controller.until_step(12)
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


def test_a_hold_that_nobody_takes_over_ends(tmp_path: pathlib.Path, reference: Outcome) -> None:
    def hold(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        controller.until_step(12)
        controller.ask("POST", "/hold", {"patience_s": 4})
        step = controller.until(lambda status: status["snapshot"]["held"], 30)["step"]
        after = controller.until(lambda status: not status["snapshot"]["held"], 10)
        assert step <= after["step"] <= step + 1

    outcome = trainctl_run(spec(), tmp_path, during=hold)
    assert outcome.status == 0, outcome.output
    assert (outcome.digest, outcome.recoveries) == (reference.digest, [])


def test_faults_on_request(tmp_path: pathlib.Path, reference: Outcome) -> None:
    """One after the other, each once the one before is recovered from."""
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

    outcome = trainctl_run(spec(faults={"allow": True}), tmp_path, during=strike)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    injected = [event["text"] for event in outcome.events("fault-injected")]
    assert injected == [f"{fault}" for fault in faults]
    kinds = [recovery["kind"] for recovery in outcome.recoveries]
    # A busy machine may start an agent again so slowly that its node is given up.
    assert kinds in (["rank-exit", "agent-lost", "node-lost"], ["rank-exit", "node-lost", "node-lost"])
    assert {event["text"].split(":")[0] for event in outcome.events("injured")} == {
        "rank-crash",
        "keeper-crash",
        "corrupt",
    }


def test_a_job_that_allows_no_faults_takes_none(tmp_path: pathlib.Path, reference: Outcome) -> None:
    def strike(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        controller.until_step(2)
        assert "spec.faults.allow" in controller.refused("/fault", {"fault": "rank-crash:1"})

    outcome = trainctl_run(spec(), tmp_path, during=strike)
    assert outcome.status == 0, outcome.output
    assert (outcome.digest, outcome.recoveries) == (reference.digest, [])


def test_a_node_that_is_asked_to_leave_hands_over_and_is_replaced(tmp_path: pathlib.Path, reference: Outcome) -> None:
    def leave(folder: pathlib.Path) -> None:
        controller = Asking(folder)
        controller.until_step(8)
        controller.ask("POST", "/fault", {"fault": "node-leave:1"})
        controller.until(lambda status: "left" in {node["state"] for node in status["nodes"].values()}, 30)

    outcome = trainctl_run(spec(faults={"allow": True}), tmp_path, during=leave)
    assert outcome.status == 0, outcome.output
    assert outcome.digest == reference.digest
    (left,) = outcome.recoveries
    assert (left["kind"], left["lost_steps"]) == ("node-left", 0)
