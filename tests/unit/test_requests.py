"""What people and the cluster ask of a running job, in a simulated cluster: another size, a hold, the end for now,
something broken; and what the next controller knows of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from outlast import messages as m
from outlast.controller.settings import CheckpointConfig, MachineConfig
from outlast.messages import codec
from support.simulated import EPOCH, LENGTH, Cluster
from support.simulated_store import URL

CONFIG = MachineConfig(4, every_steps=5, grow_after_s=30.0, start_timeout_s=120.0)
STORED = replace(CONFIG, checkpoint=CheckpointConfig(URL, interval_steps=50))


def cluster(nodes: int = 4, config: MachineConfig = CONFIG, **options: Any) -> Cluster:
    return Cluster(config, nodes, **{"total": 400, **options})


def status(world: Cluster) -> dict[str, Any]:
    found = world.machine.status(world.now)
    json.dumps(found, allow_nan=False)
    return found


def succeeded(world: Cluster) -> dict[str, Any]:
    finish = world.run_to_end()
    assert finish.outcome == "succeeded", finish
    assert status(world)["weights_digest"] == f"digest-{world.total}"
    return status(world)


def sizes(found: dict[str, Any]) -> list[tuple[int, int]]:
    return [(resize["from"], resize["to"]) for resize in found["resizes"]]


def states(found: dict[str, Any]) -> dict[str, str]:
    return {name: node["state"] for name, node in found["nodes"].items()}


def resize(world: Cluster, replicas: int, least: int | None = None, spares: int = 0) -> str:
    request = m.ResizeRequested(replicas, least, spares)
    objection = world.machine.objection(request)
    world.tell(request)
    return objection


# --- another size ---------------------------------------------------------------------------------------------------


def test_fewer_nodes_are_handed_over_to_without_a_step_lost() -> None:
    world = cluster()
    world.run_to_step(12)
    seats = dict(world.machine.job.members.seats)
    assert resize(world, 2) == ""
    assert status(world)["workers"]["wanted"] == 2
    world.run_to("resumed")
    world.run_to("snapshot-committed")
    world.run(2.0)
    found = status(world)
    assert found["workers"] | {"size": 2, "ready": 2, "least": 2, "wanted": 2} == found["workers"]
    assert sorted(world.released) == sorted([seats[2], seats[3]]), "those with the highest seats"
    assert {states(found)[seats[seat]] for seat in (2, 3)} == {"left"}
    assert [node["node"] for node in found["seats"]] == [seats[0], seats[1]]
    found = succeeded(world)
    assert sizes(found) == [(4, 2)]
    (record,) = found["recoveries"]
    assert (record["kind"], record["lost_steps"], record["planned"]) == ("resize", 0, True)
    assert found["restarts"] == {}


def test_a_surplus_spare_leaves_and_ranks_go_on() -> None:
    world = cluster(6, replace(CONFIG, spares=2))
    world.run_to_step(12)
    seats = dict(world.machine.job.members.seats)
    spares = [name for name in world.nodes if name not in seats.values()]
    resize(world, 4, spares=1)
    world.run(3.0)
    assert world.released == spares[:1]
    assert not world.machine.job.resizing.shedding
    world.add_node()
    world.run(3.0)
    assert len(world.released) == 1, "who comes later is a spare more"
    assert succeeded(world)["recoveries"] == []


def test_a_spare_leaves_before_a_seat_is_given_up_and_who_had_it_is_the_spare() -> None:
    world = cluster(5)
    world.run_to_step(12)
    seats = dict(world.machine.job.members.seats)
    spare = next(name for name in world.nodes if name not in seats.values())
    resize(world, 3, spares=1)
    world.run_to("resumed")
    world.run_to("snapshot-committed")
    world.run(2.0)
    assert world.released == [spare]
    assert states(status(world))[seats[3]] == "spare"
    found = succeeded(world)
    assert sizes(found) == [(4, 3)]
    assert found["recoveries"][0]["lost_steps"] == 0


def test_more_nodes_are_taken_at_once_when_they_join() -> None:
    world = cluster(2, replace(CONFIG, replicas=2))
    world.run_to_step(12)
    resize(world, 4)
    assert status(world)["workers"]["wanted"] == 4
    world.run(1.0)
    for _ in range(2):
        world.add_node()
    world.run_to("resumed")
    assert world.now < 120.0
    found = succeeded(world)
    assert sizes(found) == [(2, 4)]
    assert found["recoveries"][0]["lost_steps"] == 0


def test_down_and_up_again_waits_for_no_pause() -> None:
    world = cluster()
    world.run_to_step(12)
    resize(world, 3)
    world.run_to("resumed")
    world.run_to("snapshot-committed")
    resize(world, 4)
    world.add_node()
    asked = world.now
    world.run_to("resumed")
    assert world.now - asked < 10.0
    assert sizes(succeeded(world)) == [(4, 3), (3, 4)]


def test_a_crash_while_more_nodes_are_wanted_does_not_wait_for_them() -> None:
    world = cluster(2, replace(CONFIG, replicas=2))
    world.run_to_step(12)
    resize(world, 4)
    world.crash_rank(1)
    world.run_to("recovered")
    found = succeeded(world)
    assert found["recoveries"][0]["total_s"] < 2.0
    assert sizes(found) == []


def test_min_replicas_null_never_shrinks_by_failure() -> None:
    world = cluster(config=replace(CONFIG, min_replicas=1, shrink_after_s=2.0, start_timeout_s=20.0))
    world.run_to_step(12)
    resize(world, 3, None)
    world.run_to("resumed")
    world.run_to("snapshot-committed")
    world.lose_node(world.seated(1), replace_after=None)
    assert "only 2 of 3 nodes are left" in world.run_to_end().reason


def test_a_new_least_lets_a_job_shrink_that_could_not() -> None:
    world = cluster(config=replace(CONFIG, shrink_after_s=2.0))
    world.run_to_step(12)
    resize(world, 4, 2)
    world.lose_node(world.seated(1), replace_after=None)
    assert sizes(succeeded(world)) == [(4, 3)]


def test_the_same_numbers_again_are_of_no_effect() -> None:
    world = cluster()
    world.run_to_step(12)
    for _ in range(3):
        resize(world, 4)
    resize(world, 3)
    resize(world, 3)
    assert world.kinds().count("resize-asked") == 1
    assert sizes(succeeded(world)) == [(4, 3)]


def test_what_fewer_nodes_cannot_hold_is_refused_with_the_sum() -> None:
    world = Cluster(CONFIG, 0, total=200)
    for _ in range(4):
        world.add_node(memory=int(5.5 * LENGTH))
    world.run_to_step(12)
    text = resize(world, 2)
    assert "MiB" in text
    assert "lacks" in text
    assert world.kinds()[-1] == "resize-refused"
    found = succeeded(world)
    assert (sizes(found), found["workers"]["wanted"]) == ([], 4)


def test_what_turns_out_too_small_once_it_is_known_is_not_done() -> None:
    world = Cluster(CONFIG, 0, total=200)
    for _ in range(4):
        world.add_node(memory=int(5.5 * LENGTH))
    world.run(0.5)
    assert resize(world, 2) == "", "nothing is known yet"
    world.run_to("resize-refused")
    found = succeeded(world)
    assert found["workers"]["wanted"] == found["workers"]["size"]


def test_a_resize_before_the_start_is_the_size_of_the_start() -> None:
    world = cluster(2)
    world.run(1.0)
    assert status(world)["stage"] == "gathering"
    resize(world, 2)
    found = succeeded(world)
    assert (found["ranks"]["world"], sizes(found)) == (2, [])


def test_a_resize_during_a_recovery_is_the_size_after_it() -> None:
    world = cluster()
    world.run_to_step(12)
    world.lose_node(world.seated(1), replace_after=None)
    world.run_to("waiting")
    resize(world, 3)
    world.run_to("recovered")
    found = succeeded(world)
    assert sizes(found) == [(4, 3)]
    assert found["recoveries"][0]["total_s"] < 5.0


@pytest.mark.parametrize("moment", ["leaving", "planned", "running"])
def test_who_was_too_many_stays_when_it_is_wanted_again(moment: str) -> None:
    world = cluster()
    world.run_to_step(12)
    seats = dict(world.machine.job.members.seats)
    resize(world, 2)
    world.run_to(moment)
    resize(world, 3)
    assert [line.fields["node"] for line in world.log if line.kind == "stays"] == [seats[2]]
    world.run(20.0)
    assert world.released == [seats[3]]
    found = succeeded(world)
    assert (found["workers"]["size"], found["recoveries"][0]["lost_steps"]) == (3, 0)


def test_a_node_that_is_too_many_and_told_to_go_goes_in_its_own_time() -> None:
    world = cluster()
    world.run_to_step(12)
    seats = dict(world.machine.job.members.seats)
    resize(world, 3)
    world.run_to("planned")
    world.leave(world.nodes[seats[3]], 10.0)
    found = succeeded(world)
    assert states(found)[seats[3]] == "left"
    assert found["recoveries"][0]["lost_steps"] == 0


@pytest.mark.parametrize("moment", ["resize-asked", "snapshot-permitted", "planned", "running", "released"])
@pytest.mark.parametrize("head", [False, True])
def test_the_size_survives_a_controller(moment: str, head: bool) -> None:
    world = cluster()
    world.run_to_step(12)
    resize(world, 3)
    if moment != "resize-asked":
        world.run_to(moment)
    world.restart_controller(after=0.1, head=head)
    world.run_to("adopted" if not head and moment != "planned" else "running")
    world.run(15.0)
    found = status(world)
    assert (found["workers"]["wanted"], found["workers"]["size"], found["workers"]["ready"]) == (3, 3, 3)
    assert succeeded(world)["ranks"]["world"] == 3


def test_a_growth_that_is_waited_for_survives_a_lost_head() -> None:
    world = cluster(2, replace(CONFIG, replicas=2))
    world.run_to_step(12)
    resize(world, 4)
    world.restart_controller(head=True)
    line = world.run_to("restored")
    assert line.fields["step"] == 10
    assert status(world)["workers"] | {"wanted": 4, "size": 2} == status(world)["workers"]
    succeeded(world)


def test_the_same_numbers_again_have_those_leave_that_are_too_many_by_now() -> None:
    world = cluster(6)
    world.run_to_step(12)
    world.run(3.0)
    assert not world.released
    resize(world, 4)
    world.run(3.0)
    assert len(world.released) == 2
    assert "resize-asked" not in world.kinds()
    assert succeeded(world)["recoveries"] == []


# --- a hold ---------------------------------------------------------------------------------------------------------


def test_held_ranks_wait_and_the_next_head_goes_on_there() -> None:
    world = cluster()
    world.run_to_step(12)
    world.tell(m.HoldRequested(30.0))
    assert world.run(10.0, lambda: status(world)["snapshot"]["held"])
    line = world.log[-1]
    assert (line.kind, line.fields["held"]) == ("snapshot-committed", True)
    step = world.live_step()
    world.run(5.0)
    assert world.live_step() == step == line.fields["step"]
    assert status(world)["phase"] == "Running"
    world.restart_controller(head=True)
    assert world.run_to("restored").fields["step"] == step
    assert succeeded(world)["workers"]["size"] == 4


def test_a_hold_ends_when_nobody_takes_over() -> None:
    world = cluster()
    world.run_to_step(12)
    world.tell(m.HoldRequested(10.0))
    world.run_to("snapshot-committed")
    world.run_to("hold-over")
    world.run(1.0)
    assert not status(world)["snapshot"]["held"]
    found = succeeded(world)
    assert found["goodput"]["lost_s"]["snapshot_stall"] > 8.0
    assert found["recoveries"] == []


def test_a_new_controller_of_the_same_head_lets_held_ranks_go_on() -> None:
    world = cluster()
    world.run_to_step(12)
    world.tell(m.HoldRequested(60.0))
    world.run_to("snapshot-committed")
    world.restart_controller()
    world.run_to("adopted")
    assert succeeded(world)["attempt"] == 1


def test_a_node_that_has_not_heard_that_its_ranks_may_go_on_is_told_again() -> None:
    world = cluster()
    world.run_to_step(12)
    let_go, deaf = world._on_proceed, []

    def hear_the_second_time(node: Any, proceed: m.Proceed) -> None:
        if node.name in deaf or node.name != world.seated(1).name:
            let_go(node, proceed)
        else:
            deaf.append(node.name)

    world._on_proceed = hear_the_second_time  # type: ignore[method-assign]
    world.tell(m.HoldRequested(5.0))
    world.run_to("hold-over")
    held_at = world.live_step()
    world.run(15.0)
    assert deaf
    assert world.live_step() > held_at + 5
    assert "fault" not in world.kinds()
    succeeded(world)


def test_a_node_that_has_not_heard_that_its_hold_is_called_off_is_told_again() -> None:
    """What ranks say while they are held keeps them from being taken for hung."""
    world = cluster()
    world.run_to_step(12)
    copy, call_off, missed, deaf = world._copy, world._on_abort, [], []

    def miss_one(node: Any, attempt: Any, rank: int, permit: m.Permit) -> None:
        if permit.hold and rank == 0 and not missed:
            missed.append(permit.generation)
            world.say(m.Missed(node.name, rank, permit.generation, "replan"), 0.2)
            return
        if permit.hold and not deaf:
            world.say(m.Busy(node.name, attempt, rank, "held", 7 * 3600.0), 0.01)
        copy(node, attempt, rank, permit)

    def hear_no_abort(node: Any, abort: m.Abort) -> None:
        if abort.generation in missed and not deaf and node.seat == 2:
            deaf.append(node.name)
        else:
            call_off(node, abort)

    world._copy, world._on_abort = miss_one, hear_no_abort  # type: ignore[method-assign]
    resize(world, 3, 2)
    world.run_to("snapshot-aborted")
    stopped_at = world.live_step()
    world.run(30.0)
    assert deaf
    assert world.live_step() > stopped_at


def test_who_has_not_heard_that_it_may_go_is_told_again() -> None:
    world = cluster(total=4000)
    world.run_to_step(12)
    let_go, deaf = world._on_release, []

    def hear_the_second_time(node: Any, release: m.Release) -> None:
        if deaf:
            let_go(node, release)
        else:
            deaf.append(node.name)

    world._on_release = hear_the_second_time  # type: ignore[method-assign]
    resize(world, 2)
    world.run_to("resumed")
    world.run(60.0)
    assert deaf
    assert states(status(world))[deaf[0]] == "left"


def test_a_hold_during_a_recovery_holds_what_comes_of_it() -> None:
    world = cluster()
    world.run_to_step(12)
    world.crash_rank(1)
    world.tell(m.HoldRequested(30.0))
    assert world.run(20.0, lambda: status(world)["snapshot"]["held"])


def test_a_resize_waits_for_the_end_of_a_hold() -> None:
    world = cluster()
    world.run_to_step(12)
    world.tell(m.HoldRequested(10.0))
    world.run_to("snapshot-committed")
    resize(world, 3)
    world.run(5.0)
    assert status(world)["workers"]["size"] == 4
    world.run_to("resumed")
    assert sizes(succeeded(world)) == [(4, 3)]


# --- the end for now ------------------------------------------------------------------------------------------------


def suspended(world: Cluster, seconds: float = 100.0) -> dict[str, Any]:
    finish = world.run_to_end(seconds)
    assert finish.outcome == "suspended", finish
    found = status(world)
    assert (found["phase"], found["outcome"], found["reason"]) == ("Suspended", "suspended", finish.reason)
    return found


def test_a_suspended_job_has_its_last_step_in_the_store() -> None:
    world = cluster(config=STORED)
    world.run_to_step(12)
    world.tell(m.SuspendRequested(60.0, "make room"))
    asked = world.now
    found = suspended(world)
    assert world.now - asked < 5.0
    step = found["suspended"]["step"]
    assert found["suspended"] == {"step": step, "checkpoint_step": step, "reason": "make room"}
    assert step == world.store.line[-1].generation.step == max(world.step.values())
    assert "is in the store" in found["reason"]


@pytest.mark.parametrize("sums", [3, 4, 8])
def test_suspended_between_two_sums_of_gradients_it_takes_the_next_boundary(sums: int) -> None:
    world = cluster(config=STORED, total=10**4, step_s=10.0)
    world.sums = sums
    world.run(40 * 10.0 * sums)
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world, 1000.0)
    step = found["suspended"]["step"]
    assert found["suspended"]["checkpoint_step"] == step
    assert step % sums == 0


def test_suspended_while_it_recovers_it_has_as_many_steps_time() -> None:
    world = cluster(config=replace(STORED, every_steps=5), total=10**4, step_s=90.0)
    world.run(90.0 * 33)
    world.crash_rank(0)
    assert world.run(60.0, lambda: world.machine.job.phase.value == "stopping")
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world, 4000.0)
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"]


def test_asked_again_while_it_ends_it_goes_on_ending() -> None:
    world = cluster(config=STORED)
    world.run_to_step(12)
    world.tell(m.SuspendRequested(60.0))
    assert world.run(60.0, lambda: world.finished is not None)
    assert not world.machine.over
    assert world.machine.objection(m.SuspendRequested(60.0)) == ""
    world.tell(m.SuspendRequested(60.0))
    suspended(world)


def test_a_checkpoint_under_way_is_finished_first() -> None:
    world = cluster(config=STORED, total=1000)
    world.store.upload_s = 3.0
    world.run_to("checkpoint-started")
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world)
    assert len(world.store.committed) == 2
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"]


def test_an_upload_that_goes_on_may_outlast_the_patience() -> None:
    world = cluster(config=STORED)
    world.store.upload_s = 40.0
    world.run_to_step(12)
    world.tell(m.SuspendRequested(10.0))
    found = suspended(world)
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"]


@pytest.mark.parametrize("upload_s", [0.3, 30.0])
def test_a_store_that_does_not_answer_is_not_waited_for(upload_s: float) -> None:
    world = cluster(config=STORED)
    world.run_to("checkpoint-committed")
    saved = world.store.line[-1].generation.step
    world.run(4.0)
    world.store.upload_s, world.store.trouble = upload_s, "unavailable"
    world.tell(m.SuspendRequested(10.0))
    asked = world.now
    if upload_s > 10:
        world.run_to("checkpoint-started")
        node = world.seated(0).name
        world.tell(m.Note(node, None, "store-unavailable", f"{node} waits for the store: no route"))
    found = suspended(world)
    assert 9.0 < world.now - asked < 16.0
    step = found["suspended"]["step"]
    assert found["suspended"]["checkpoint_step"] == saved < step
    assert f"the {step - saved} steps after it are lost" in found["reason"]


def test_without_an_object_tier_it_ends_and_says_what_is_lost() -> None:
    world = cluster()
    world.run_to_step(12)
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world, 2.0)
    assert found["suspended"]["checkpoint_step"] is None
    assert "no object tier" in found["reason"]


def test_suspended_while_it_waits_for_nodes_it_ends_at_once() -> None:
    world = cluster(config=STORED)
    world.run_to("checkpoint-committed")
    saved = world.store.line[-1].generation.step
    world.lose_node(world.seated(1), replace_after=None)
    world.run_to("waiting")
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world, 2.0)
    assert found["suspended"]["checkpoint_step"] == saved


def test_suspended_before_a_node_came_it_ends_soon() -> None:
    world = cluster(0, STORED)
    world.run(1.0)
    world.tell(m.SuspendRequested(60.0))
    suspended(world, 6.0)


def test_suspended_when_the_head_was_lost_it_waits_for_the_nodes_to_find_the_next() -> None:
    """In Pods they look its address up, and join another Ray: that takes longer than on one machine."""
    world = cluster(5, config=replace(STORED, patient=True))
    world.run_to_step(22)
    world.restart_controller(after=20.0, head=True)
    world.run(0.7)
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world, 60.0)
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"] >= 20


def test_suspended_while_ranks_start_it_waits_for_them() -> None:
    world = cluster(5, config=STORED)
    world.run_to_step(22)
    world.rebuild_s = 30.0
    world.lose_node(world.seated(1))
    world.run_to("restart")
    world.tell(m.SuspendRequested(10.0))
    found = suspended(world, 100.0)
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"] >= 20


@pytest.mark.parametrize("fault", ["rank", "controller", "head"])
def test_a_recovery_is_completed_before(fault: str) -> None:
    world = cluster(5, config=STORED)
    world.run_to_step(22)
    if fault == "rank":
        world.crash_rank(2)
        world.run_to("restart")
    else:
        world.restart_controller(head=fault == "head")
        world.run(0.7)
    world.tell(m.SuspendRequested(60.0))
    found = suspended(world, 20.0)
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"] >= 20


def test_a_rank_that_crashes_while_it_is_held_costs_nothing() -> None:
    world = cluster(config=STORED)
    world.store.upload_s = 5.0
    world.run_to_step(12)
    world.tell(m.SuspendRequested(60.0))
    step = world.run_to("snapshot-committed").fields["step"]
    world.run(1.0)
    world.crash_rank(2)
    found = suspended(world)
    assert found["suspended"]["checkpoint_step"] == found["suspended"]["step"] >= step


def test_a_job_that_has_done_its_last_step_succeeds() -> None:
    world = cluster(config=STORED, total=20)
    world.store.upload_s = 5.0
    world.run_to("last-step")
    world.tell(m.SuspendRequested(60.0))
    assert world.run_to_end().outcome == "succeeded"


def test_a_hang_is_not_waited_for() -> None:
    world = cluster(config=STORED)
    world.run_to_step(12)
    world.hung.add(1)
    world.tell(m.SuspendRequested(5.0))
    found = suspended(world, 7.0)
    assert found["suspended"]["checkpoint_step"] is None


# --- something broken -----------------------------------------------------------------------------------------------

ALLOWED = replace(CONFIG, spares=1, procs=2, faults=True)


@pytest.mark.parametrize(
    ("asked", "cause"),
    [
        (m.FaultRequested("rank-crash", 3), "rank-exit"),
        (m.FaultRequested("hang", 2), "hang"),
        (m.FaultRequested("node-loss", 1), "node-lost"),
        (m.FaultRequested("agent-crash", 2), "agent-lost"),
        (m.FaultRequested("node-leave", 0), "node-left"),
    ],
)
def test_a_fault_strikes_whom_it_names(asked: m.FaultRequested, cause: str) -> None:
    world = cluster(5, ALLOWED)
    world.run_to_step(12)
    seat = asked.target // 2 if asked.kind in ("rank-crash", "hang") else asked.target
    node = world.seated(seat or 0).name
    assert world.machine.objection(asked) == ""
    world.tell(asked)
    line = next(line for line in world.log if line.kind == "fault-injected")
    assert line.fields["node"] == node
    found = succeeded(world)
    (injury,) = world.injuries
    assert injury == m.Injure(node, asked.kind, asked.target if asked.kind in ("rank-crash", "hang") else None)
    assert found["recoveries"][0]["kind"] == cause


def test_the_controller_can_be_asked_to_crash() -> None:
    world = cluster(5, ALLOWED)
    world.run_to_step(12)
    world.tell(m.FaultRequested("controller-crash"))
    world.run_to("adopted")
    assert succeeded(world)["attempt"] == 1


@pytest.mark.parametrize(
    ("config", "asked", "text"),
    [
        (CONFIG, m.FaultRequested("rank-crash", 0), "spec.faults.allow"),
        (CONFIG, m.FaultRequested("controller-crash"), "spec.faults.allow"),
        (ALLOWED, m.FaultRequested("rank-crash", 8), "there is no rank 8: the job has ranks 0 to 7 now"),
        (ALLOWED, m.FaultRequested("node-loss", 4), "there is no seat 4: the job has seats 0 to 3 now"),
    ],
)
def test_what_cannot_be_broken_is_refused(config: MachineConfig, asked: m.FaultRequested, text: str) -> None:
    world = cluster(5, config)
    world.run_to_step(12)
    assert text in world.machine.objection(asked)
    world.tell(asked)
    assert world.kinds()[-1] == "fault-refused"
    assert not world.injuries


def test_nothing_is_broken_that_is_not_there() -> None:
    world = cluster(4, replace(ALLOWED, spares=0))
    assert "no attempt has been started" in world.machine.objection(m.FaultRequested("hang", 0))
    world.run_to_step(12)
    world.lose_node(world.seated(1), replace_after=None)
    world.run_to("waiting")
    assert "another has yet to take its seat" in world.machine.objection(m.FaultRequested("keeper-crash", 1))
    assert "no rank runs just now" in world.machine.objection(m.FaultRequested("rank-crash", 0))
    assert world.machine.objection(m.FaultRequested("keeper-crash", 0)) == ""


def test_a_job_that_ends_takes_no_requests() -> None:
    world = cluster()
    world.run_to_step(3)
    world.tell(m.StopRequested("enough"))
    for request in (m.HoldRequested(1.0), m.SuspendRequested(1.0), m.ResizeRequested(3, None, 0)):
        assert "enough" in world.machine.objection(request)


# --- what the next controller knows ---------------------------------------------------------------------------------


def test_restarts_and_errors_of_the_controller_before_count() -> None:
    world = cluster(config=replace(CONFIG, max_restarts=2))
    world.run_to_step(12)
    world.crash_rank(1)
    world.run_to("recovered")
    world.restart_controller()
    world.run_to("adopted")
    world.crash_rank(1)
    world.run_to("recovered")
    world.restart_controller()
    world.run_to("adopted")
    assert len(world.left.restarts) == 2
    assert all(EPOCH < at < world.now + EPOCH for at in world.left.restarts)
    world.crash_rank(1)
    assert "2 restarts within" in world.run_to_end().reason


def test_a_script_that_fails_by_itself_is_found_out_across_controllers() -> None:
    world = cluster()
    for _ in range(3):
        world.run(60.0, lambda: world.live_step() >= 7)
        world.crash_rank(1, m.ErrorInfo(world.now, "ValueError", "loss is nan"))
        if not world.run(3.0, lambda: world.finished is not None):
            world.restart_controller()
        world.run(1.0)
    assert world.left.errors[0][2] >= 1
    assert world.left.errors[0][1] == "ValueError: loss is nan"


def test_the_deadline_counts_from_the_first_controller() -> None:
    world = cluster(config=replace(CONFIG, active_deadline_s=30.0), total=1000)
    began = world.now
    world.run_to_step(22)
    started = status(world)["start_time"]
    assert EPOCH + began < started < EPOCH + began + 2
    world.restart_controller(after=5.0)
    world.run_to("adopted")
    assert status(world)["start_time"] == started
    assert "activeDeadlineSeconds" in world.run_to_end().reason
    assert 30.0 < world.now - began < 32.0


def test_what_is_kept_survives_json() -> None:
    kept = m.Kept(1.5, 2.5, (3.5, 4.5), ((7, "ValueError: x", 2),), m.Size(3, None, 1), True)
    assert codec.decode(m.Kept, json.loads(json.dumps(codec.encode(kept)))) == kept
    assert codec.decode(m.Kept, {}) == m.Kept()


# --- what /status says of failures ----------------------------------------------------------------------------------


def test_failures_bear_wall_times() -> None:
    world = cluster(5)
    world.run_to_step(12)
    struck = world.now
    name = world.seated(2).name
    world.lose_node(world.seated(2))
    world.run_to("recovered")
    found = status(world)
    (failure,) = found["failures"]
    assert failure | {"cause": "node-lost", "node": name, "step": failure["step"]} == failure
    assert failure["time"] == pytest.approx(EPOCH + struck, abs=2.5)
    assert found["first_error"]["time"] == failure["time"]
    assert {seat["node"] for seat in found["seats"]} == set(world.machine.job.members.seats.values())
