"""A job whose size changes: it begins short, shrinks, grows, and lets nodes go, in a simulated cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from outlast import messages as m
from outlast.controller.resizing import LONGEST_PAUSE_S, Pause
from outlast.controller.settings import MachineConfig
from support.simulated import LENGTH, Cluster

CONFIG = MachineConfig(4, every_steps=5, min_replicas=2, shrink_after_s=5.0, grow_after_s=3.0, start_timeout_s=120.0)
FIXED = replace(CONFIG, min_replicas=None)


def cluster(nodes: int = 4, config: MachineConfig = CONFIG, **options: Any) -> Cluster:
    return Cluster(config, nodes, **{"total": 200, **options})


def succeeded(world: Cluster) -> dict[str, Any]:
    finish = world.run_to_end()
    assert finish.outcome == "succeeded", finish
    found = world.machine.status(world.now)
    json.dumps(found)
    assert found["step"] == world.total
    assert found["weights_digest"] == f"digest-{world.total}"
    return found


def sizes(found: dict[str, Any]) -> list[tuple[int, int]]:
    return [(resize["from"], resize["to"]) for resize in found["resizes"]]


def lose(world: Cluster, seat: int) -> str:
    name = world.seated(seat).name
    world.lose_node(world.seated(seat), replace_after=None)
    return name


# --- short at the start ---------------------------------------------------------------------------------------------


def test_it_begins_with_fewer_when_no_more_come() -> None:
    world = cluster(3)
    world.run_to("short")
    assert 105.0 <= world.now <= 106.0, "after shrinkAfter"
    found = succeeded(world)
    assert found["ranks"]["world"] == 3
    assert found["workers"]["size"] == 3
    assert found["resizes"] == []


def test_it_begins_at_once_when_all_are_there() -> None:
    world = cluster(5)
    world.run_to("running")
    assert world.now < 101.0
    assert succeeded(world)["workers"]["size"] == 4


def test_it_waits_when_fewer_than_the_least_come() -> None:
    world = cluster(1)
    assert "only 1 of 4 nodes joined" in world.run_to_end().reason


# --- shrink ---------------------------------------------------------------------------------------------------------


def test_without_a_replacement_it_goes_on_with_fewer() -> None:
    world = cluster()
    world.run_to_step(12)
    lose(world, 1)
    line = world.run_to("waiting")
    assert "waiting 5 s for more, then going on with fewer" in line.text
    restored = world.run_to("restored")
    assert restored.fields["direct"]
    assert restored.fields["step"] == 10
    assert restored.fields["restore_sources"] == {"memory-peer": 3, "memory-decode": 1}
    found = succeeded(world)
    assert sizes(found) == [(4, 3)]
    (record,) = found["recoveries"]
    assert record["kind"] == "node-lost"
    assert record["lost_steps"] <= 2
    assert found["restarts"] == {"node-lost": 1}


def test_a_spare_comes_before_shrinking() -> None:
    world = cluster(5)
    world.run_to_step(12)
    lose(world, 1)
    found = succeeded(world)
    assert sizes(found) == []
    assert found["workers"]["size"] == 4


def test_it_never_shrinks_below_the_least() -> None:
    world = cluster(total=1000)
    world.run_to_step(12)
    for seat in (0, 1):
        lose(world, seat)
    world.run_to("resized")
    world.run_to("snapshot-committed")
    lose(world, 0)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "only 1 of 4 nodes are left" in finish.reason


def test_without_min_replicas_it_waits_as_ever() -> None:
    world = cluster(config=replace(FIXED, start_timeout_s=20.0))
    world.run_to_step(12)
    lose(world, 1)
    assert "only 3 of 4 nodes are left" in world.run_to_end().reason


def test_a_fault_at_the_smaller_size_does_not_wait_again() -> None:
    world = cluster()
    world.run_to_step(12)
    lose(world, 3)
    world.run_to("resized")
    world.run_to("snapshot-committed")
    world.crash_rank(1)
    world.run_to("recovered")
    found = succeeded(world)
    assert found["recoveries"][1]["total_s"] < 1.0
    assert found["recoveries"][1]["restore_sources"] == {"memory-local": 3}
    assert sizes(found) == [(4, 3)]


def test_what_was_written_by_the_old_world_is_kept_until_the_first_snapshot() -> None:
    """The cluster checks that no copy destroys it; here nodes are lost before there is a newer one."""
    world = cluster(total=400)
    world.run_to_step(12)
    lose(world, 3)
    world.run_to("resized")
    world.run_to("snapshot-permitted")
    lose(world, 0)
    world.run_to("resized")
    found = succeeded(world)
    assert found["recoveries"][-1]["restored_step"] >= 10
    assert sizes(found) == [(4, 3), (3, 2)]


def test_memory_is_checked_before_shrinking() -> None:
    world = Cluster(replace(CONFIG, start_timeout_s=30.0), 0, total=200)
    for _ in range(4):
        world.add_node(memory=int(4.5 * LENGTH))
    world.run_to_step(12)
    lose(world, 1)
    line = world.run_to("no-room")
    assert "lacks" in line.text
    assert len(line.fields["missing"]) == 3
    world.add_node()
    world.run_to("recovered")
    assert sizes(succeeded(world)) == []


def test_too_little_memory_and_no_replacement_fails_and_says_why() -> None:
    world = Cluster(replace(CONFIG, start_timeout_s=30.0), 0, total=200)
    for _ in range(4):
        world.add_node(memory=int(4.5 * LENGTH))
    world.run_to_step(12)
    lose(world, 1)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "lacks" in finish.reason


# --- grow -----------------------------------------------------------------------------------------------------------


def shrunk(**options: Any) -> Cluster:
    world = cluster(**options)
    world.run_to_step(12)
    lose(world, 1)
    world.run_to("resized")
    return world


def test_it_grows_back_and_recomputes_nothing() -> None:
    world = shrunk()
    world.run(5.0)
    world.add_node()
    world.run_to("resumed")
    found = succeeded(world)
    assert sizes(found) == [(4, 3), (3, 4)]
    record = found["recoveries"][-1]
    assert (record["kind"], record["lost_steps"], record["planned"]) == ("resize", 0, True)
    assert record["cause"] == "grows from 3 to 4 nodes"
    assert found["restarts"] == {"node-lost": 1}, "no restart was spent"


def test_joiners_are_taken_together() -> None:
    world = cluster()
    world.run_to_step(12)
    for seat in (1, 2):
        lose(world, seat)
    world.run_to("resized")
    world.run(5.0)
    world.add_node()
    world.run(1.5)
    world.add_node()
    assert sizes(succeeded(world)) == [(4, 2), (2, 4)]


def test_it_stays_as_it_is_for_a_while_after_a_resize() -> None:
    world = shrunk()
    resized_at = world.now
    world.add_node()
    world.run_to("growing")
    assert world.now - resized_at >= 3.0


def test_ranks_are_held_and_stay_held_until_the_new_attempt() -> None:
    world = shrunk()
    world.run(5.0)
    world.add_node()
    world.run_to("growing")
    permits: list[m.Permit] = []
    perform = world._perform

    def spy(instruction: m.Instruction) -> None:
        if isinstance(instruction, m.Permit):
            permits.append(instruction)
        perform(instruction)

    world._perform = spy  # type: ignore[method-assign]
    world.run_to("planned")
    held = permits[-1]
    assert held.hold
    assert not held.replan
    assert world.run_to("restored").fields["step"] == held.generation.step


def test_a_growth_that_becomes_moot_lets_ranks_go_on() -> None:
    world = shrunk(total=1000)
    world.run(5.0)
    name = world.add_node()
    world.run_to("growing")
    cycle = world.machine.job.cycle
    assert cycle is not None
    assert world.run(10.0, lambda: cycle.holding)
    world.tell(m.NodeGone(name, "gone again"))
    world.lose_node(world.nodes[name], replace_after=None)
    attempt = world.machine.job.attempt
    step = world.live_step()
    world.run(5.0)
    assert world.machine.job.attempt == attempt
    assert world.live_step() > step + 10
    assert all(node.held is None for node in world.nodes.values())


def test_an_aborted_hold_is_tried_again() -> None:
    world = shrunk(total=1000)
    world.run(5.0)
    world.add_node()
    world.run_to("growing")
    line = world.run_to("snapshot-permitted")
    generation = world.machine.job.cycle.work.generation  # type: ignore[union-attr]
    world.tell(m.Missed(world.seated(0).name, 0, generation, "late"))
    world.run_to("planned")
    assert "resumed" not in world.kinds()
    assert world.run_to("restored").fields["step"] > line.fields["step"]


def test_new_nodes_that_are_too_small_are_not_grown_into() -> None:
    world = shrunk(total=300)
    world.run_to("snapshot-committed")
    world.add_node(memory=LENGTH)
    world.run_to("no-room")
    assert sizes(succeeded(world)) == [(4, 3)]


def test_the_pause_grows_with_losses_soon_after_growths() -> None:
    pause = Pause(30.0)
    assert pause.over(0.0)
    now = 0.0
    for expected in (60.0, 120.0, 240.0, 480.0, 600.0, 600.0):
        pause.resized(True, now)
        assert not pause.over(now + pause.seconds - 1)
        assert pause.over(now + pause.seconds)
        pause.lost(now + 10)
        pause.lost(now + 11)
        assert pause.seconds == expected
        now += 1000.0
    assert pause.seconds == LONGEST_PAUSE_S
    pause.resized(True, now)
    pause.lost(now + 301)
    assert pause.seconds == 30.0


def test_shrinking_is_followed_by_the_pause_but_does_not_lengthen_it() -> None:
    pause = Pause(30.0)
    pause.resized(False, 0.0)
    pause.lost(1.0)
    assert pause.seconds == 30.0
    assert not pause.over(29.0)


# --- leave ----------------------------------------------------------------------------------------------------------


def test_a_node_that_leaves_hands_over_to_the_spare() -> None:
    world = cluster(5, FIXED)
    world.run_to_step(12)
    node = world.seated(2)
    world.leave(node)
    world.run_to("released")
    found = succeeded(world)
    assert world.released == [node.name]
    (record,) = found["recoveries"]
    assert (record["kind"], record["lost_steps"], record["node"]) == ("node-left", 0, node.name)
    assert record["restore_sources"] == {"memory-local": 3, "memory-peer": 1}
    assert found["nodes"][node.name]["state"] == "left"
    assert found["restarts"] == {}
    assert sizes(found) == []


def test_a_node_that_leaves_without_a_spare_makes_the_job_smaller_at_once() -> None:
    world = cluster(config=replace(CONFIG, shrink_after_s=1000.0))
    world.run_to_step(12)
    node = world.seated(0)
    world.leave(node)
    world.run_to("resumed")
    assert world.now < 110.0
    found = succeeded(world)
    assert sizes(found) == [(4, 3)]
    assert [record["lost_steps"] for record in found["recoveries"]] == [0]
    assert world.released == [node.name]


def test_a_node_that_leaves_when_the_job_may_not_shrink_is_waited_for_like_a_lost_one() -> None:
    world = cluster(4, FIXED)
    world.run_to_step(12)
    node = world.seated(1)
    world.leave(node, 20.0)
    world.run_to("waiting")
    world.run(18.0)
    assert world.released == [node.name], "at 80% of its time"
    world.add_node()
    found = succeeded(world)
    (record,) = found["recoveries"]
    assert record["lost_steps"] == 0
    assert record["restore_sources"] == {"memory-local": 3, "memory-decode": 1}


def test_a_spare_that_leaves_is_let_go_at_once() -> None:
    world = cluster(5, FIXED)
    world.run_to_step(12)
    (spare,) = (name for name in world.nodes if world.machine.job.members.nodes[name].seat is None)
    world.leave(world.nodes[spare])
    world.run_to("released")
    found = succeeded(world)
    assert found["recoveries"] == []
    assert found["nodes"][spare]["state"] == "left"


def test_several_that_leave_are_handed_over_at_once() -> None:
    world = cluster()
    world.run_to_step(12)
    for seat in (0, 2):
        world.leave(world.seated(seat))
    found = succeeded(world)
    assert sizes(found) == [(4, 2)]
    assert len(world.released) == 2
    assert [record["lost_steps"] for record in found["recoveries"]] == [0]


def test_without_time_for_a_snapshot_the_newest_serves() -> None:
    """A keeper that does not come back makes the held snapshot impossible."""
    world = cluster(config=replace(CONFIG, patience=replace(CONFIG.patience, copy_s=60.0)))
    world.run_to_step(12)
    world.crash_keeper(world.seated(1), back_after=60.0)
    world.leave(world.seated(2), 10.0)
    began = world.now
    world.run_to("planned")
    assert 4.9 <= world.now - began <= 5.2
    found = succeeded(world)
    assert found["recoveries"][0]["kind"] == "node-left"


def test_a_node_that_dies_before_it_has_handed_over_is_a_lost_node() -> None:
    world = cluster(5, FIXED)
    world.run_to_step(12)
    node = world.seated(2)
    world.leave(node)
    world.run(0.05)
    world.lose_node(node, replace_after=None)
    found = succeeded(world)
    assert found["recoveries"][0]["kind"] == "node-lost"
    assert found["nodes"][node.name]["state"] == "lost"


def test_a_node_that_leaves_during_a_recovery_is_not_seated() -> None:
    world = cluster(6, FIXED)
    world.run_to_step(12)
    world.crash_rank(1)
    world.run_to("restart")
    node = world.seated(2)
    world.leave(node)
    world.run_to("released")
    found = succeeded(world)
    assert found["nodes"][node.name]["seat"] is None
    assert found["recoveries"][0]["kind"] == "rank-exit"


def test_a_node_that_leaves_before_the_start_gets_no_seat() -> None:
    world = cluster(5, FIXED)
    world.run(0.02)
    world.nodes["node-0"].leaving = True
    found = succeeded(world)
    assert found["nodes"]["node-0"]["state"] == "left"


def test_an_agent_that_starts_anew_is_told_again() -> None:
    world = cluster(5, FIXED)
    world.run_to_step(12)
    (spare,) = (name for name in world.nodes if world.machine.job.members.nodes[name].seat is None)
    world.tell(m.Leaving(spare, 30.0, "drained"))
    instructions = world.machine.handle(m.Leaving(spare, 30.0, "drained"), world.now)
    assert instructions == [m.Release(spare)]


def test_which_nodes_would_leave_is_told() -> None:
    world = cluster(5)
    world.run_to_step(3)
    spare = next(name for name in world.nodes if world.machine.job.members.nodes[name].seat is None)
    seats = world.machine.job.members.seats
    assert world.machine.status(world.now)["workers"]["would_leave"] == [spare, seats[3], seats[2]]


# --- a new controller -----------------------------------------------------------------------------------------------


def test_a_new_controller_adopts_the_smaller_attempt() -> None:
    world = shrunk()
    world.run_to("snapshot-committed")
    attempts = set(world.step)
    world.restart_controller()
    world.run_to("adopted")
    found = succeeded(world)
    assert set(world.step) == attempts
    assert found["ranks"]["world"] == 3


def test_three_of_four_are_not_taken_for_an_attempt_of_three() -> None:
    world = cluster()
    world.run_to_step(22)
    lose(world, 3)
    world.restart_controller()
    world.run_to("restored")
    assert "adopted" not in world.kinds()
    assert sizes(succeeded(world)) == []  # the new controller knows of no other size


def test_after_a_head_loss_the_smaller_job_does_not_wait_for_more() -> None:
    world = shrunk()
    world.run_to("snapshot-committed")
    world.restart_controller(head=True)
    began = world.now
    world.run_to("restored")
    assert world.now - began < 5.0
    assert succeeded(world)["workers"]["size"] == 3


def test_ranks_held_by_the_controller_before_are_let_go() -> None:
    world = shrunk(total=300)
    world.run(5.0)
    world.add_node()
    world.run_to("growing")
    world.run_to("encoding")
    assert world.run(5.0, lambda: any(node.held for node in world.nodes.values()))
    world.restart_controller()
    world.run_to("adopted")
    world.run(4.0)
    assert all(node.held is None for node in world.nodes.values())
    found = succeeded(world)
    assert found["workers"]["size"] == 4


def test_a_permit_of_the_controller_before_holds_nobody_for_good() -> None:
    world = shrunk(total=300)
    world.run(5.0)
    world.add_node()
    world.run_to("growing")
    world.run_to("snapshot-permitted")
    world.restart_controller(after=0.1)
    world.run_to("adopted")
    assert succeeded(world)["workers"]["size"] == 4


def test_a_new_controller_knows_files_that_a_rank_may_still_write() -> None:
    world = cluster(total=400)
    world.run_to_step(12)
    joined: list[m.Event] = []
    say = world.say

    def dirty(event: m.Event, delay: float = 0.005) -> None:
        if isinstance(event, m.Joined):
            event = replace(event, dirty=((0, 1),))
            joined.append(event)
        say(event, delay)

    world.say = dirty  # type: ignore[method-assign]
    world.restart_controller()
    world.run_to("adopted")
    assert len(joined) == 4
    assert all(node.dirty == {(0, 1)} for node in world.machine.job.members.nodes.values())


@pytest.mark.parametrize("procs", [1, 3])
def test_ranks_are_those_of_the_seats_in_force(procs: int) -> None:
    world = cluster(config=replace(CONFIG, procs=procs))
    world.run_to_step(12)
    lose(world, 0)
    assert succeeded(world)["ranks"] == {"ready": 3 * procs, "done": 3 * procs, "world": 3 * procs}
