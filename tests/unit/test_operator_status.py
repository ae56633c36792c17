"""What a job's status says: progress added up over controllers, phases and conditions, and what is told as Events."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outlast.jobstatus import TrainingJobStatus
from outlast_operator.versions import skew
from support.operator_world import NOW, World, head, node, resource, word

STORE = {"url": "s3://bucket/training"}


def said(world: World) -> dict[str, Any]:
    assert world.said is not None
    return world.said


def reasons(world: World) -> list[tuple[str, str]]:
    """The Events of one more pass."""
    return [(told.type, told.reason) for told in world.step().happenings]


def new_head(world: World, **fields: Any) -> None:
    """The head is lost, and the next one's controller speaks."""
    del world.pods[next(iter(world.names("head")))]
    world.step()
    world.now += 10
    world.start(world.names("head")[0])
    world.said = word(**{"controller": "c2", **fields})


# --- progress -------------------------------------------------------------------------------------------------------


def test_what_the_controller_says_becomes_the_status() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    said(world).update(
        checkpoint={"step": 30, "age_s": 5.0, "url": "s3://bucket/training/research/bytelm"},
        restarts={"rank-exit": 2, "node-lost": 1},
        attempts=4,
        attempt=4,
    )
    world.step()
    status = world.status
    assert (status.phase, status.step, status.total_steps, status.attempt) == ("Running", 40, 100, 4)
    assert (status.restarts, status.restart_count) == ({"rank-exit": 2, "node-lost": 1}, 3)
    assert (status.workers.ready, status.workers.wanted, status.workers.spares) == (4, 3, 1)
    assert status.snapshot is not None
    assert (status.snapshot.step, status.snapshot.time) == (38, "2027-01-15T07:59:58Z")
    assert status.checkpoint is not None
    assert (status.checkpoint.step, status.checkpoint.time) == (30, "2027-01-15T07:59:55Z")
    assert status.checkpoint.url == "s3://bucket/training/research/bytelm"
    assert status.goodput == 0.9
    assert status.controller.version == "0.1.0"


def test_nothing_changes_while_only_time_passes() -> None:
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 30, "age_s": 5.0})
    before = world.status
    world.now += 7
    said(world)["snapshot"]["age_s"] += 7.2
    said(world)["checkpoint"]["age_s"] += 6.9
    decided = world.step()
    assert not decided.urgent
    after = world.status
    assert after.controller.heard_time != before.controller.heard_time
    assert after.model_copy(update={"controller": before.controller}) == before


def test_progress_can_wait_and_what_matters_cannot() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    said(world).update(
        step=41, snapshot={"step": 41, "age_s": 0.1}, goodput={"train_s": 95.0, "lost_s": {"start": 10.0}}
    )
    assert not world.step().urgent
    said(world)["checkpoint"] = {"step": 41, "age_s": 0.1}
    assert world.step().urgent, "the first checkpoint"
    said(world)["checkpoint"] = {"step": 50, "age_s": 0.1}
    assert not world.step().urgent
    said(world)["phase"] = "Recovering"
    assert world.step().urgent


def test_counts_are_added_up_over_controllers() -> None:
    world = World.training(resource({"checkpoint": STORE}), restarts={"rank-exit": 2}, attempts=3, attempt=3)
    new_head(
        world,
        restarts={},
        attempts=0,
        attempt=0,
        step=0,
        best_step=0,
        phase="Pending",
        goodput={"lost_s": {"idle": 4.0}},
    )
    world.run()
    assert world.status.restarts == {"rank-exit": 2}, "the new controller has not begun an attempt"
    assert (world.status.step, world.status.attempt) == (40, 3), "what was done is not forgotten while nodes gather"
    said(world).update(attempts=4, attempt=4, step=30, phase="Starting")
    world.run()
    assert world.status.restarts == {"rank-exit": 2, "head-lost": 1}
    assert world.status.controller.earlier_goodput == {"start": 16.0, "train": 90.0}, "6 s without any controller"
    assert world.status.goodput == pytest.approx(90 / 110, abs=1e-4)
    said(world).update(restarts={"rank-exit": 1}, attempts=5, attempt=5)
    world.run()
    assert (world.status.restarts, world.status.restart_count) == ({"rank-exit": 3, "head-lost": 1}, 4)
    new_head(world, controller="c3", restarts={}, attempts=5, attempt=5)
    world.run()
    assert world.status.restarts == {"rank-exit": 3, "head-lost": 1}, "adopted ranks were not restarted"


def test_the_last_failures_are_kept_with_cause_node_and_time() -> None:
    world = World.training()
    told = [
        {
            "cause": "rank-exit",
            "text": f"rank {at} exited",
            "node": node(1),
            "rank": at,
            "step": at,
            "time": NOW - 100 + at,
            "age_s": 1.0,
        }
        for at in range(12)
    ]
    said(world)["failures"] = told
    world.step()
    kept = world.status.failures
    assert [failure.rank for failure in kept] == list(range(4, 12))
    assert (kept[-1].cause, kept[-1].node, kept[-1].time) == ("rank-exit", node(1), "2027-01-15T07:58:31Z")
    world.now += 3
    assert reasons(world) == []
    new_head(
        world,
        failures=[
            {
                "cause": "node-lost",
                "text": "lost",
                "node": node(2),
                "rank": None,
                "step": 50,
                "time": None,
                "age_s": 2.0,
            }
        ],
    )
    world.run()
    assert [failure.cause for failure in world.status.failures][-2:] == ["rank-exit", "node-lost"]
    world.now += 1
    said(world)["failures"][0]["age_s"] = 3.4
    world.step()
    assert len(world.status.failures) == 8, "the same failure, though its age was rounded"


@pytest.mark.parametrize(
    "broken", [{"nodes": None}, {"workers": 5}, {"restarts": []}, {"failures": ["x"]}, {"step": "many"}]
)
def test_words_of_another_version_break_nothing(broken: dict[str, Any]) -> None:
    world = World.training()
    said(world).update(broken)
    world.run()
    assert world.status.phase == "Running"


# --- phases and conditions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "before", "shown"),
    [
        ("Pending", False, "Pending"),
        ("Starting", False, "Starting"),
        ("Running", False, "Running"),
        ("Recovering", False, "Recovering"),
        ("Starting", True, "Recovering"),
        ("Pending", True, "Recovering"),
        ("Meditating", True, "Running"),
    ],
)
def test_phases(phase: str, before: bool, shown: str) -> None:
    if before:
        world = World.training()
        new_head(world, phase="Running")
        world.run()
    else:
        world = World(resource())
        world.run()
        world.start(head(0))
        world.said = word(attempts=0, step=0, best_step=0)
    said(world)["phase"] = phase
    world.run()
    assert world.status.phase == shown
    assert world.condition("Ready").status == ("True" if shown == "Running" else "False")
    assert world.condition("Recovering").status == ("True" if shown == "Recovering" else "False")


def test_there_are_always_five_conditions_and_each_says_why() -> None:
    world = World.training()
    found = world.status.conditions
    assert [one.type for one in found] == ["Ready", "Suspended", "Recovering", "Succeeded", "Failed"]
    assert all(one.reason and one.observed_generation == 1 for one in found)


def test_a_conditions_time_moves_with_its_status_alone() -> None:
    world = World.training()
    began = world.condition("Ready").last_transition_time
    world.now += 100
    world.edit(recovery={"maxRestarts": 3})
    world.step()
    assert world.condition("Ready").last_transition_time == began
    assert world.condition("Ready").observed_generation == 2
    said(world)["phase"] = "Recovering"
    world.step()
    assert world.condition("Ready").last_transition_time != began


@pytest.mark.parametrize("phase", ["Running", "Recovering", "Starting"])
def test_an_operator_that_returns_says_what_was_said_until_it_has_heard_more(phase: str) -> None:
    record = {"kind": "rank-exit", "cause": "rank 1 exited", "total_s": None}
    world = World.training(phase=phase, recoveries=[record] if phase == "Recovering" else [])
    before = world.status
    world.said, world.now = None, world.now + 300
    decided = world.step()
    assert (decided.actions, decided.happenings, decided.urgent) == ((), (), False)
    assert world.status.phase == before.phase == phase
    assert world.status.workers == before.workers
    for kind in ("Ready", "Recovering"):
        was = next(one for one in before.conditions if one.type == kind)
        now = world.condition(kind)
        assert (now.status, now.reason) == (was.status, was.reason)


@pytest.mark.parametrize("seconds", [1.7e308, -1.7e308])
def test_sums_over_controllers_stay_numbers_of_json(seconds: float) -> None:
    world = World.training()
    assert world.said is not None
    restarts = {f"c{number}": 2**60 for number in range(9)}
    for identity in ("c1", "c2", "c3"):
        booked = {"train_s": seconds, "lost_s": {"start": seconds}}
        world.said |= {"controller": identity, "goodput": booked, "restarts": restarts}
        world.step()
    json.dumps(world.job["status"], allow_nan=False)
    assert world.status.goodput == (0.5 if seconds > 0 else None)
    assert world.status.restart_count < 2**63


def test_a_snapshot_is_not_forgotten_while_a_new_controller_gathers() -> None:
    world = World.training()
    new_head(world, snapshot={"step": None}, attempts=0, attempt=0, step=0, best_step=0, phase="Pending")
    world.run()
    assert world.status.snapshot is not None, "it is what keeps a job from being given back"
    said(world).update(attempts=2, attempt=2, phase="Running")
    world.run()
    assert world.status.snapshot is None


def test_the_first_start_is_remembered() -> None:
    world = World(resource())
    world.run()
    assert world.status.start_time is None
    world.start(head(0))
    world.said = word(phase="Starting", step=0, best_step=0, attempts=1)
    world.now += 30
    world.run()
    assert (world.status.phase, world.status.start_time) == ("Starting", "2027-01-15T08:00:30Z")


def test_the_controller_knows_best_when_its_ranks_were_started() -> None:
    world = World.training(start_time=NOW - 50.4)
    world.job["status"].pop("startTime")
    world.step()
    assert world.status.start_time == "2027-01-15T07:59:09Z"


def test_another_size_than_is_wanted_is_said() -> None:
    world = World.training()
    said(world)["workers"]["size"] = 2
    world.step()
    assert world.condition("Ready").message == "all ranks train on 2 nodes, while 3 are wanted"


def test_waiting_for_nodes_is_said_with_numbers() -> None:
    world = World(resource())
    world.run()
    world.start(head(0))
    world.said = word({node(1): "joining"}, phase="Pending", attempts=0, step=0, best_step=0)
    world.run()
    ready = world.condition("Ready")
    assert (ready.reason, ready.message) == ("WaitingForNodes", "1 of at least 3 nodes have joined")


def test_what_keeps_a_spare_from_starting_is_said_while_the_job_trains() -> None:
    world = World.training()
    world.pods[node(4)]["status"] |= {
        "conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes"}]
    }
    world.step()
    ready = world.condition("Ready")
    assert (ready.status, ready.reason) == ("True", "Training")
    assert f"Unschedulable: {node(4)}: 0/3 nodes" in ready.message


# --- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "runtime", "apart"),
    [
        ("0.3.1", "0.3.9", False),
        ("0.3.1", "0.2.0", False),
        ("0.3.1", "0.4.0rc1", False),
        ("0.3.1", "0.1.7", True),
        ("0.3.1", "0.5.0", True),
        ("1.0.0", "0.9.0", True),
        ("0.3.1", "", False),
        ("unknown", "0.3.1", False),
    ],
)
def test_one_minor_version_apart_works_together(operator: str, runtime: str, apart: bool) -> None:
    assert bool(skew(operator, runtime)) == apart


def test_versions_too_far_apart_are_said_with_the_remedy() -> None:
    assert "upgrade the training image" in skew("0.3.1", "0.1.0")
    assert "upgrade the operator" in skew("0.3.1", "0.5.0")
    world = World.training()
    said(world)["version"] = "0.3.0"
    assert reasons(world) == [("Warning", "VersionSkew")]
    ready = world.condition("Ready")
    assert (ready.status, ready.reason) == ("True", "VersionSkew"), "it trains all the same"
    assert reasons(world) == []


# --- Events ---------------------------------------------------------------------------------------------------------


def test_a_job_tells_its_life_once() -> None:
    world = World(resource({"checkpoint": STORE}))
    world.run()
    for name in list(world.pods):
        world.start(name)
    world.said = word(phase="Starting", attempts=1, step=0, best_step=0)
    world.run()
    said(world).update(phase="Running", step=10)
    world.run()
    said(world)["checkpoint"] = {"step": 10, "age_s": 1.0}
    world.run()
    failure = {
        "cause": "node-lost",
        "text": f"{node(2)} was lost",
        "node": node(2),
        "step": 12,
        "time": NOW,
        "age_s": 1.0,
    }
    record = {"kind": "node-lost", "cause": f"{node(2)} was lost", "total_s": None, "lost_steps": None}
    said(world).update(phase="Recovering", failures=[failure], recoveries=[record])
    world.run()
    said(world).update(phase="Running")
    world.run()
    said(world).update(phase="Running", recoveries=[record | {"total_s": 1.24, "lost_steps": 2}])
    world.run()
    said(world).update(outcome="succeeded", step=100, weights_digest="d1")
    world.run()
    assert [(told.type, told.reason) for told in world.happenings] == [
        ("Normal", "PodsMade"),
        ("Normal", "Running"),
        ("Normal", "FirstCheckpoint"),
        ("Warning", "NodeLost"),
        ("Normal", "Recovered"),
        ("Normal", "Succeeded"),
    ]
    texts = {told.reason: told.message for told in world.happenings}
    assert texts["NodeLost"] == f"{node(2)} was lost at step 12"
    assert texts["Recovered"] == f"recovered from: {node(2)} was lost (1.2 s, 2 steps lost)"
    assert "d1" in texts["Succeeded"]


def test_a_recovery_between_two_looks_is_told() -> None:
    world = World.training()
    record = {"kind": "rank-exit", "cause": "rank 1 exited", "total_s": 0.9, "lost_steps": 1}
    failure = {"cause": "rank-exit", "text": "rank 1 exited", "rank": 1, "time": NOW, "age_s": 1.0}
    said(world).update(recoveries=[record], failures=[failure])
    assert reasons(world) == [("Warning", "RankExit"), ("Normal", "Recovered")]
    assert reasons(world) == []


@pytest.mark.parametrize("head_lost", [False, True])
def test_a_recovery_that_a_deadline_ends_is_none(head_lost: bool) -> None:
    world = World.training(resource({"activeDeadlineSeconds": 3600}))
    if head_lost:
        del world.pods[head(0)]
        world.said = None
    else:
        record = {"kind": "node-lost", "cause": f"{node(2)} was lost", "total_s": None}
        said(world).update(phase="Recovering", recoveries=[record])
    world.step()
    assert world.condition("Recovering").status == "True"
    world.now += 3601
    for _ in range(3):
        world.step()
        recovering = world.condition("Recovering")
        assert (world.status.phase, recovering.status, recovering.reason) == ("Failed", "False", "NotRecovered")
    assert "lost" in recovering.message


def test_a_job_that_succeeds_has_recovered() -> None:
    """Its last attempt found all steps done: there is no new one to tell what the recovery cost."""
    world = World.training()
    said(world).update(phase="Recovering", recoveries=[{"kind": "rank-exit", "cause": "rank 1 exited"}])
    world.step()
    said(world).update(phase="Succeeded", outcome="succeeded", step=100)
    world.step()
    assert (world.status.phase, world.condition("Recovering").reason) == ("Succeeded", "FirstStep")


def test_a_change_of_size_is_no_recovery_from_a_fault() -> None:
    world = World.training()
    record = {"kind": "resize", "cause": "grows from 2 to 3 nodes", "planned": True, "total_s": None}
    said(world).update(phase="Recovering", recoveries=[record])
    assert reasons(world) == [("Normal", "Recovering")]
    said(world).update(phase="Running", recoveries=[record | {"total_s": 2.0}])
    assert reasons(world) == [("Normal", "WentOn")]


def test_failed_checkpoints_are_told() -> None:
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 3, "age_s": 1.0})
    said(world).update(
        checkpoints={"failed": 1}, checkpoint={"step": 3, "age_s": 1.0, "last_error": "503 from the store"}
    )
    decided = world.step()
    (told,) = decided.happenings
    assert (told.type, told.reason) == ("Warning", "CheckpointFailed")
    assert "503 from the store" in told.message
    assert decided.urgent, "what is told is written, or it would be told again"
    assert reasons(world) == []


def test_a_lost_head_is_told_once() -> None:
    world = World.training()
    del world.pods[head(0)]
    assert reasons(world) == [("Warning", "HeadReplaced"), ("Normal", "Recovering")]
    assert world.condition("Recovering").reason == "HeadLost"
    world.said = None
    assert reasons(world) == []


def test_a_status_survives_being_written_and_read() -> None:
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 30, "age_s": 5.0})
    written = world.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert TrainingJobStatus.from_yaml_tree(written) == world.status
