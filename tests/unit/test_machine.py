"""The machine in a simulated cluster: every fault, at every phase, in virtual time.

The cluster checks at every instruction that there is one live attempt, that no permit overtakes a commit, and that no
copy destroys the last state that could be restored.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outlast import messages as m
from outlast.controller.machine import Machine
from outlast.controller.phases import OVER, TRANSITIONS, Phase
from outlast.controller.settings import CheckpointConfig, MachineConfig
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.inventory import HeldImage, Inventory
from outlast.snapshot.stored import StoredCheckpoint
from support.simulated import LENGTH, Cluster
from support.simulated_store import URL

CONFIG = MachineConfig(replicas=4, spares=1, every_steps=5)


def cluster(nodes: int = 5, config: MachineConfig = CONFIG, **options: Any) -> Cluster:
    return Cluster(config, nodes, **options)


def status(world: Cluster) -> dict[str, Any]:
    found = world.machine.status(world.now)
    json.dumps(found)
    return found


def succeeded(world: Cluster) -> dict[str, Any]:
    finish = world.run_to_end()
    assert finish.outcome == "succeeded", finish
    found = status(world)
    assert found["step"] == world.total
    assert found["weights_digest"] == f"digest-{world.total}"
    goodput = found["goodput"]
    assert goodput["train_s"] + sum(goodput["lost_s"].values()) == pytest.approx(goodput["wall_s"], abs=0.01)
    return found


# --- without faults -------------------------------------------------------------------------------------------------


def test_an_undisturbed_run() -> None:
    world = cluster()
    found = succeeded(world)
    assert found["phase"] == "Succeeded"
    assert found["attempt"] == 1
    assert found["recoveries"] == []
    assert found["restarts"] == {}
    assert found["snapshots"]["count"] == 11
    assert {line.fields["step"] % 5 for line in world.log if line.kind == "snapshot-committed"} == {0}


def test_an_interval_is_chosen_when_none_is_asked_for() -> None:
    world = cluster(config=MachineConfig(4, spares=1), total=200)
    chosen = succeeded(world)["snapshot"]["interval"]
    steps = [line.fields["step"] for line in world.log if line.kind == "snapshot-committed"]
    apart = {b - a for a, b in itertools.pairwise(steps[2:])}
    assert max(apart) - min(apart) <= 2
    assert max(apart) * 0.2 == pytest.approx(chosen["interval_s"], rel=0.1)
    assert chosen["inputs"]["latency_s"] == pytest.approx(0.15, abs=0.02)


def test_a_single_node_needs_no_parity() -> None:
    found = succeeded(cluster(1, MachineConfig(1, procs=2, every_steps=5)))
    assert found["snapshots"]["count"] > 5


def test_a_job_waits_for_its_nodes_and_then_gives_up() -> None:
    world = cluster(3, MachineConfig(4, start_timeout_s=30.0))
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "only 3 of 4 nodes joined" in finish.reason


# --- one fault ------------------------------------------------------------------------------------------------------


def one_recovery(world: Cluster, **expected: Any) -> dict[str, Any]:
    found = succeeded(world)
    (record,) = found["recoveries"]
    assert {key: record[key] for key in expected} == expected
    assert record["total_s"] > 0
    return record


def test_nodes_that_verify_large_images_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold says how long; heartbeats go on."""
    monkeypatch.setattr("outlast.controller.job.VERIFIED_BYTES_S", LENGTH / 20)
    world = cluster()
    stop, verifying = world._on_stop, []

    def take_long(node: Any, told: m.Stop) -> None:
        if node.name in verifying:  # told again: it is at it
            return
        say = world.say
        world.say = lambda event, delay=0.005: say(event, delay + 70.0 * isinstance(event, m.Stopped))  # type: ignore[method-assign]
        verifying.append(node.name)
        stop(node, told)
        world.say = say  # type: ignore[method-assign]

    world.run_to_step(35)
    world._on_stop = take_long  # type: ignore[method-assign]
    world.crash_rank(1)
    world.run_to("recovered", 200.0)
    assert len(verifying) == len(world.nodes)
    assert "node-lost" not in world.kinds()


def test_what_verifies_and_gives_wrong_bytes_is_not_used_again() -> None:
    """Parity that was made of a byte that was wrong only then: an older generation, or the store, has what it lacks."""
    config = replace(CONFIG, checkpoint=CheckpointConfig(URL, interval_steps=20))
    world = cluster(config=config, total=300)
    rebuild, wrong = world._rebuild, []

    def decode(node: Any, start: m.Start) -> None:
        plan = start.restore
        lacking = [one for one in plan.on_node(node.name) if one.source == "memory-decode"] if plan is not None else []
        if plan is None or not lacking or (wrong and plan.generation not in wrong):
            rebuild(node, start)
            return
        wrong.append(plan.generation)
        text = "1 blocks do not verify after the rebuild"
        world.say(m.RestoreFailed(node.name, start.attempt, plan.generation, text, "bad", lacking[0].rank, memory=True))

    world._rebuild = decode  # type: ignore[method-assign]
    world.run_to_step(57)
    world.lose_node(world.seated(1))
    world.run_to("recovered", 200.0)
    assert len(wrong) == 2
    assert wrong[0] == wrong[1], "read anew once"
    assert world.store.quarantined == [], "the store's own copy is not the one that was bad"
    assert world.run_to_end().outcome == "succeeded"


def test_a_source_that_is_damaged_as_it_is_read_is_decoded_around() -> None:
    """One failure says little of a generation: what turned bad shows when it is verified again."""
    world = cluster(config=replace(CONFIG, parity=2), total=200)
    rebuild, damaged = world._rebuild, list[str]()

    def decode(node: Any, start: m.Start) -> None:
        plan = start.restore
        lacking = [one for one in plan.on_node(node.name) if one.source == "memory-decode"] if plan is not None else []
        if plan is None or not lacking or damaged:
            rebuild(node, start)
            return
        source = world.nodes[lacking[0].sources[0].node]
        damaged.append(source.name)
        for key, image in list(source.images.items()):
            if image.kind == "shard" and image.generation == plan.generation:
                source.images[key] = replace(image, bad_blocks=(1,))
        text = "1 blocks do not verify after the rebuild"
        world.say(m.RestoreFailed(node.name, start.attempt, plan.generation, text, "bad", lacking[0].rank, memory=True))

    world._rebuild = decode  # type: ignore[method-assign]
    world.run_to_step(33)
    world.run_to("snapshot-committed")
    newest = world.kept
    assert newest is not None
    for node in world.nodes.values():
        node.images = {key: image for key, image in node.images.items() if image.generation == newest}
    world.lose_node(world.seated(1))
    world.run_to("recovered", 200.0)
    steps = [line.fields["step"] for line in world.log if line.kind == "restored"]
    assert (len(damaged), steps) == (1, [newest.step, newest.step])


def test_a_node_that_has_not_heard_that_it_is_to_stop_is_told_again() -> None:
    world = cluster()
    stop, lost = world._on_stop, list[str]()

    def hear_the_second_time(node: Any, told: m.Stop) -> None:
        if node.seat == 2 and not lost:
            lost.append(node.name)
        else:
            stop(node, told)

    world.run_to_step(12)
    world._on_stop = hear_the_second_time  # type: ignore[method-assign]
    began = world.now
    world.crash_rank(1)
    world.run_to("recovered", 100.0)
    assert world.now - began < 25.0
    assert "node-lost" not in world.kinds()


def test_a_script_may_take_long_until_it_protects_its_state() -> None:
    """There is nothing to load: nobody waits for it, and the first rank's word is no reason to give the others up."""
    world = cluster(total=100)
    say, beat = world.say, world._heartbeat

    def late(event: m.Event, delay: float = 0.005) -> None:
        say(event, delay + (1000.0 + event.rank if isinstance(event, m.RankReady) else 0.0))

    def without_steps(node: Any) -> None:
        if node.hears and not world.machine.job.all_ready:
            world.at(0.001, lambda: world.tell(m.Heartbeat(node.name, node.running)))
        else:
            beat(node)

    world.say, world._heartbeat = late, without_steps  # type: ignore[method-assign]
    do_step = world._do_step
    ready = lambda: world.machine.job.all_ready  # noqa: E731
    world._do_step = lambda attempt: do_step(attempt) if ready() else world.at(1.0, lambda: world._do_step(attempt))  # type: ignore[method-assign]
    assert world.run(1200.0, ready)
    assert world.run_to_end().outcome == "succeeded"
    assert "fault" not in world.kinds()


def test_nodes_that_have_not_heard_what_to_start_are_told_again() -> None:
    world = cluster()
    heard, lost = {m.Start: world._on_start, m.Load: world._on_load}, list[type]()

    def hear_the_second_time(node: Any, told: Any) -> None:
        kind = type(told)
        if kind in lost or node.seat != (None if kind is m.Start else 1):
            heard[kind](node, told)
        else:
            lost.append(kind)

    world._on_start = world._on_load = hear_the_second_time  # type: ignore[method-assign, assignment]
    began = world.now
    world.run_to("snapshot-committed")
    assert lost == [m.Start, m.Load]
    assert 60.0 < world.now - began < 75.0
    assert world.run_to_end().outcome == "succeeded"
    assert "fault" not in world.kinds()


def test_a_crashed_rank() -> None:
    world = cluster()
    world.run_to_step(12)
    world.crash_rank(1)
    record = one_recovery(world, kind="rank-exit", rank=1, lost_steps=2, restored_step=10, detect_s=0.0)
    assert record["restore_sources"] == {"memory-local": 4}
    assert record["total_s"] < 1.0


def test_a_rank_that_raises_is_named_though_its_victims_speak_first() -> None:
    world = cluster()
    world.run_to_step(12)
    node = world.seated(3)
    assert node.running is not None
    node.dead_ranks.add(3)
    world._collateral()
    error = m.ErrorInfo(world.now, "ValueError", "loss is nan", "Traceback ...")
    world.say(m.RankExited(node.name, node.running, 3, 1, None, error, world.now, 12), 0.2)
    one_recovery(world, kind="rank-error", rank=3, node=node.name)
    (failure,) = status(world)["failures"]
    assert failure["message"] == "loss is nan"
    assert failure["attempt"] == 1
    assert failure["traceback"] == "Traceback ..."


def test_a_lost_node_is_replaced_by_the_spare() -> None:
    world = cluster()
    world.run_to_step(12)
    lost = world.seated(2)
    world.lose_node(lost)
    record = one_recovery(world, kind="node-lost", node=lost.name, restored_step=10)
    assert record["restore_sources"] == {"memory-local": 3, "memory-decode": 1}
    assert 1.4 < record["detect_s"] < 2.2
    assert record["total_s"] < 3.0
    nodes = status(world)["nodes"]
    assert nodes[lost.name]["state"] == "lost"
    assert nodes["node-4"]["seat"] == 2


def test_without_a_spare_the_job_waits_for_a_replacement() -> None:
    world = cluster(4)
    world.run_to_step(12)
    world.lose_node(world.seated(2), replace_after=5.0)
    world.run_to("waiting")
    assert status(world)["phase"] == "Recovering"
    record = one_recovery(world, kind="node-lost")
    assert record["restore_sources"] == {"memory-local": 3, "memory-decode": 1}
    assert status(world)["goodput"]["lost_s"]["idle"] > 2.0


def test_who_is_patient_waits_for_nodes_without_end_and_says_so() -> None:
    config = MachineConfig(4, every_steps=5, start_timeout_s=20.0, patient=True)
    world = cluster(3, config)
    world.run(50.0)
    assert world.kinds().count("still-waiting") == 2
    world.add_node()
    world.run_to_step(12)
    world.lose_node(world.seated(2), replace_after=None)
    world.run(50.0)
    assert world.kinds().count("still-waiting") == 4
    world.add_node()
    assert succeeded(world)["recoveries"][0]["kind"] == "node-lost"


def test_without_a_replacement_the_job_fails_and_says_why() -> None:
    world = cluster(4, MachineConfig(4, every_steps=5, start_timeout_s=20.0))
    world.run_to_step(12)
    world.lose_node(world.seated(2), replace_after=None)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "only 3 of 4 nodes are left" in finish.reason


def test_a_hang_is_detected_and_stacks_are_taken() -> None:
    world = cluster()
    world.run_to_step(12)
    world.hung.add(1)
    world.run_to("stacks")
    world.hung.clear()
    record = one_recovery(world, kind="hang")
    assert 10.0 < record["detect_s"] < 11.0


def test_an_announced_pause_is_no_hang() -> None:
    world = cluster()
    world.run_to_step(12)
    node = world.seated(1)
    assert node.running is not None
    world.tell(m.Busy(node.name, node.running, 1, "validation", 60.0))
    world.hung.add(1)
    world.run(40.0)
    assert "fault" not in world.kinds()
    world.hung.clear()
    assert succeeded(world)["recoveries"] == []


def test_a_paused_node_is_given_up_and_changes_nothing_when_it_wakes() -> None:
    world = cluster()
    world.run_to_step(12)
    zombie = world.seated(2)
    world.pause(zombie)
    world.run_to("recovered")
    assert zombie.running is not None, "nobody could kill its ranks"
    world.resume(zombie)
    world.run(3.0)
    assert zombie.running is None, "it was told to register anew"
    assert status(world)["nodes"][zombie.name]["state"] == "spare"
    found = succeeded(world)
    assert len(found["recoveries"]) == 1
    assert found["attempt"] == 2


@pytest.mark.parametrize(("away_s", "lost"), [(4.0, False), (9.0, True)])
def test_an_agent_that_is_slow_to_come_back_costs_no_node_while_the_keeper_answers(away_s: float, lost: bool) -> None:
    world = cluster()
    world.run_to_step(12)
    node = world.seated(2)
    world.crash_agent(node, back_after=away_s)
    world.run_to("recovered")
    assert ("node-lost" in world.kinds()) == lost
    assert (world.seated(2) is node) != lost


def test_a_node_whose_keeper_is_down_too_is_not_waited_for() -> None:
    world = cluster()
    world.run_to_step(12)
    node = world.seated(2)
    world.crash_keeper(node, back_after=60.0)
    world.crash_agent(node, back_after=60.0)
    began = world.now
    world.run_to("node-lost")
    assert world.now - began < 2.0


def test_a_zombie_serves_as_a_spare_later() -> None:
    world = cluster(total=200)
    world.run_to_step(12)
    zombie = world.seated(2)
    world.pause(zombie)
    world.run_to("recovered")
    world.resume(zombie)
    world.run(3.0)
    for seat in (0, 1):
        world.lose_node(world.seated(seat), replace_after=None)
        world.add_node()
        world.run_to("recovered")
    succeeded(world)


def test_a_keepers_crash_restarts_no_rank() -> None:
    world = cluster()
    world.run_to_step(12)
    for _ in range(3):
        world.crash_keeper(world.seated(1))
        world.run(2.0)
    found = succeeded(world)
    assert found["attempt"] == 1
    assert found["snapshots"]["count"] >= 8


def test_a_keepers_crash_while_encoding_is_retried() -> None:
    world = cluster()
    world.run_to("encoding")
    world.crash_keeper(world.seated(1), back_after=3.0)
    line = world.run_to("snapshot-committed")
    assert line.fields["seconds"] > 2.5
    succeeded(world)


def test_an_agents_crash_is_a_restart_on_the_same_node() -> None:
    world = cluster()
    world.run_to_step(12)
    node = world.seated(1)
    world.crash_agent(node)
    record = one_recovery(world, kind="agent-lost", node=node.name)
    assert record["restore_sources"] == {"memory-local": 4}
    assert status(world)["nodes"][node.name]["seat"] == 1


def test_a_new_controller_leaves_running_ranks_alone() -> None:
    world = cluster()
    world.run_to_step(22)
    attempts = set(world.step)
    world.restart_controller()
    world.run_to("adopted")
    found = succeeded(world)
    assert set(world.step) == attempts
    assert found["recoveries"] == []
    assert "snapshot-committed" in world.kinds()[world.kinds().index("adopted") :]


def test_a_new_controller_sees_a_run_that_ended_without_it() -> None:
    world = cluster(total=20)
    world.run_to_step(16)
    world.restart_controller(after=5.0)
    succeeded(world)


def test_after_a_head_loss_ranks_are_restored_from_files() -> None:
    world = cluster()
    world.run_to_step(22)
    world.restart_controller(head=True)
    line = world.run_to("restored")
    assert line.fields["step"] == 20
    assert line.fields["restore_sources"] == {"memory-local": 4}
    assert succeeded(world)["attempt"] == 2


def test_a_loss_before_the_first_snapshot_restarts_from_step_0() -> None:
    world = cluster(config=MachineConfig(4, spares=1, every_steps=50))
    world.run_to_step(7)
    world.lose_node(world.seated(0))
    record = one_recovery(world, kind="node-lost", restored_step=0)
    assert record["restore_sources"] == {"none": 4}
    assert "restored-none" in world.kinds()


def test_capacity_ends_the_job() -> None:
    world = cluster()
    world.run_to_step(3)
    world.tell(m.Capacity("node-1", 1, 4096, "tmpfs /m is too small"))
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "4096 bytes are missing" in finish.reason


def test_a_stop_request_stops() -> None:
    world = cluster()
    world.run_to_step(3)
    world.tell(m.StopRequested("enough"))
    assert world.run_to_end() == m.Finish("stopped", "enough")
    assert status(world)["phase"] == "Stopped"


# --- combinations ---------------------------------------------------------------------------------------------------


def test_two_nodes_of_a_group_at_once() -> None:
    world = cluster(6)
    world.run_to_step(12)
    for seat in (1, 2):
        world.lose_node(world.seated(seat))
    found = succeeded(world)
    assert found["recoveries"][0]["restore_sources"] == {"memory-local": 2, "memory-decode": 2}


def test_three_nodes_of_a_group_at_once_are_beyond_reach() -> None:
    world = cluster(7)
    world.run_to_step(12)
    for seat in (1, 2, 3):
        world.lose_node(world.seated(seat))
    found = succeeded(world)
    assert found["recoveries"][0]["restore_sources"] == {"none": 4}
    assert "passed-over" in world.kinds()
    assert "restored-none" in world.kinds()


def test_losses_one_after_the_other_do_not_add_up() -> None:
    world = cluster(total=400)
    world.run_to_step(12)
    for seat in (0, 1, 2, 3, 0, 1):
        world.lose_node(world.seated(seat), replace_after=1.0)
        world.run_to("protected")
        world.run(1.0)
    found = succeeded(world)
    assert len(found["recoveries"]) == 6
    assert all(record["restore_sources"]["memory-decode"] == 1 for record in found["recoveries"])


@pytest.mark.parametrize("moment", ["restart", "cause", "restored", "running"])
def test_a_node_lost_while_recovering_from_another(moment: str) -> None:
    world = cluster(6)
    world.run_to_step(12)
    world.lose_node(world.seated(2))
    world.run_to(moment)
    world.lose_node(world.seated(1))
    found = succeeded(world)
    assert sum(record["restored_step"] != 10 for record in found["recoveries"]) == 0
    assert sum(len(record["further"]) for record in found["recoveries"]) + len(found["recoveries"]) >= 2


@pytest.mark.parametrize("moment", ["snapshot-permitted", "encoding", "replan-permitted", "snapshot-committed"])
def test_a_node_lost_during_a_snapshot(moment: str) -> None:
    world = cluster()
    world.run_to_step(12)
    world.run_to(moment) if moment != "replan-permitted" else world.crash_rank(0)
    if moment == "replan-permitted":
        world.run_to(moment)
    world.lose_node(world.seated(3))
    found = succeeded(world)
    assert found["recoveries"][-1]["restored_step"] >= 10


def test_head_and_node_together() -> None:
    world = cluster()
    world.run_to_step(22)
    world.lose_node(world.seated(1), replace_after=None)
    world.restart_controller(head=True)
    line = world.run_to("restored")
    assert line.fields["restore_sources"] == {"memory-local": 3, "memory-decode": 1}
    succeeded(world)


def test_corrupt_blocks_and_a_lost_node_within_reach() -> None:
    world = cluster()
    world.run_to_step(12)
    image = world.seated(0).images["shard", 0, 1]
    world.seated(0).images["shard", 0, 1] = HeldImage(**{**vars(image), "bad_blocks": (1,)})
    world.lose_node(world.seated(3))
    found = succeeded(world)
    assert found["recoveries"][0]["restore_sources"] == {"memory-local": 2, "memory-decode": 2}


# --- giving up ------------------------------------------------------------------------------------------------------


def test_the_same_error_three_times_is_a_bug_of_the_script() -> None:
    world = cluster()
    for _ in range(3):
        world.run_to_step(13)
        world.crash_rank(1, m.ErrorInfo(world.now, "ValueError", "bad shape"))
        world.run(0.2)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "raised ValueError: bad shape" in finish.reason
    assert "the script fails by itself" in finish.reason


def test_restarts_are_limited() -> None:
    world = cluster(config=MachineConfig(4, every_steps=5, max_restarts=2))
    for step in (8, 12, 16):
        world.run_to_step(step)
        world.crash_rank(step % 4)
        world.run(0.5)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "2 restarts within 3600 s were allowed" in finish.reason


def test_a_deadline_ends_the_job() -> None:
    world = cluster(config=MachineConfig(4, active_deadline_s=5.0), total=1000)
    assert "activeDeadlineSeconds" in world.run_to_end().reason


# --- the snapshot cycle, by hand ------------------------------------------------------------------------------------


def test_a_permit_that_comes_too_late_doubles_the_margin_and_is_repeated() -> None:
    world = cluster()
    world.run_to("snapshot-permitted")
    generation = Generation.parse(world.log[-1].fields["generation"])
    world.tell(m.Missed(world.seated(0).name, 0, generation, "late"))
    assert world.log[-1].kind == "snapshot-aborted"
    line = world.run_to("snapshot-permitted")
    assert line.fields["step"] > generation.step
    succeeded(world)


def test_a_plan_that_no_longer_holds_is_made_anew() -> None:
    world = cluster()
    world.run_to("snapshot-permitted")
    generation = Generation.parse(world.log[-1].fields["generation"])
    world.tell(m.Missed(world.seated(0).name, 0, generation, "replan"))
    world.run_to("replan-permitted")
    world.run_to("snapshot-committed")


def test_slots_take_turns() -> None:
    world = cluster()
    succeeded(world)
    slots = [line.fields["slot"] for line in world.log if line.kind == "snapshot-permitted"]
    assert slots == [i % 2 for i in range(len(slots))]


def test_a_slot_with_a_living_writer_gets_a_new_file() -> None:
    world = cluster()
    world.run_to_step(12)
    permits: list[m.Permit] = []
    perform = world._perform

    def spy(instruction: m.Instruction) -> None:
        if isinstance(instruction, m.Permit) and not instruction.replan:
            permits.append(instruction)
        perform(instruction)

    world._perform = spy  # type: ignore[method-assign]
    node = world.seated(1)
    world.machine.job.members.nodes[node.name].dirty = {(0, 0), (0, 1)}
    for _ in range(4):
        world.run_to("snapshot-committed")
    assert permits[0].fresh == {node.name: (0,)}
    assert permits[-1].fresh == {}


def test_keepers_are_told_a_commit_again_until_they_answer() -> None:
    world = cluster()
    world.run_to("encoding")
    node = world.seated(2)
    said: list[m.Commit] = []
    deliver = world._on_commit

    def deaf(target: Any, commit: m.Commit) -> None:
        said.append(commit)
        if target is not node or len([c for c in said if c.nodes == (node.name,)]):
            deliver(target, commit)

    world._on_commit = deaf  # type: ignore[method-assign]
    line = world.run_to("snapshot-committed")
    assert line.fields["seconds"] > 4.0


def test_a_restored_generation_that_cannot_be_protected_is_told() -> None:
    world = cluster(total=2000)
    world.run_to_step(12)
    world.lose_node(world.seated(2))
    world.run_to("restored")
    refuse = lambda node, encode, fence: world.say(m.EncodeFailed(node.name, encode.generation, "no space"))  # noqa: E731
    encode, world._encode = world._encode, refuse  # type: ignore[method-assign]
    line = world.run_to("not-protected")
    assert "after 5 tries: no space" in line.text
    world.run(59.0)
    assert world.kinds().count("not-protected") == 1
    world.run(40.0)
    assert world.kinds().count("not-protected") == 2
    world._encode = encode  # type: ignore[method-assign]
    world.run_to("protected")
    assert succeeded(world)["restarts"] == {"node-lost": 1}, "it has cost no restart"


# --- tables ---------------------------------------------------------------------------------------------------------


def test_every_phase_leads_to_an_end() -> None:
    assert set(TRANSITIONS) == set(Phase)
    reached = set(OVER)
    for _ in Phase:
        reached |= {phase for phase, ways in TRANSITIONS.items() if ways & reached}
    assert reached == set(Phase)


def test_what_nobody_asked_for_changes_nothing() -> None:
    now, stranger = 1.0, Attempt(9, "f" * 16)
    machine = Machine(CONFIG, now, lambda: "0" * 16)
    assert machine.handle(m.Tick(), now) == [m.Remember(m.Kept(began=now))]
    generation = Generation.of(stranger, 5)
    for event in (
        m.Heartbeat("x", stranger, {0: 1}),
        m.NodeGone("x", "?"),
        m.KeeperLost("x"),
        m.KeeperBack("x", "h", 1),
        m.Stopped("x", stranger, Inventory("x")),
        m.RestoreReady("x", stranger),
        m.RankReady("x", stranger, 0, 0, 0.0, "none"),
        m.RankExited("x", stranger, 0, 1),
        m.RankDone("x", stranger, 0),
        m.Busy("x", stranger, 0, "b", None),
        m.Idle("x", stranger, 0),
        m.Planned("x", 0, generation),
        m.Copied("x", 0, generation, 0, 1, 1),
        m.Missed("x", 0, generation, "late"),
        m.Encoded("x", generation),
        m.EncodeFailed("x", generation, "?"),
        m.CommitAcked("x", generation),
        m.Leaving("x", 5.0),
        m.RestoreFailed("x", stranger, generation, "?"),
        m.Uploaded("x", generation, ()),
        m.UploadFailed("x", generation, "?"),
        m.Claimed(stranger),
        m.ClaimFailed(stranger, "?", "lost"),
        m.CheckpointCommitted(StoredCheckpoint(generation, "u", 1, 1, ())),
        m.CheckpointFailed(generation, "?", "unavailable"),
        m.Tick(),
        m.Finalized(),
    ):
        assert machine.handle(event, now) == []
    assert machine.status(now)["stage"] == "gathering"


def test_messages_of_an_older_attempt_are_ignored() -> None:
    world = cluster()
    world.run_to_step(12)
    old = world.machine.job.attempt
    assert old is not None
    world.crash_rank(1)
    world.run_to("recovered")
    name = world.seated(0).name
    stale: list[m.Event] = [
        m.RankExited(name, old, 0, 1),
        m.RankDone(name, old, 0, "zzz", 60),
        m.Copied(name, 0, Generation.of(old, 15), 1, 1, 1),
        m.CommitAcked(name, Generation.of(old, 10)),
        m.Heartbeat(name, old, {0: 1000}),
    ]
    for event in stale:
        assert world.machine.handle(event, world.now) == []
    assert succeeded(world)["weights_digest"] == "digest-60"


@pytest.mark.parametrize(
    "message",
    [
        m.Joined("n", "d", "h", Attempt(1, "a" * 16), None, True, ("h", 1), 2, 3),
        m.Heartbeat("n", None, {1: 2}, {1: 0.5}),
        m.Stopped("n", Attempt(1, "a" * 16), Inventory("n"), ((0, 1),)),
        m.RankExited("n", Attempt(1, "a" * 16), 0, error=m.ErrorInfo(1.0, "T", "m")),
        m.Permit(("n",), Generation(1, 5, "a" * 16), 0, True, {"n": (0,)}),
        m.Start("n", Attempt(1, "a" * 16), 0, 1, 1, "h", 2, None, {0: ("h", 1)}, {}, 0),
        m.Encode("n", Generation(1, 5, "a" * 16), 0, (0, 1), 1, 0, ((1, 2),), (("h", 1), ("h", 2)), (0,)),
        m.Emit("a", "b", {"x": [1, {"y": None}]}),
        m.Tick(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_survive_json(message: m.Message) -> None:
    assert m.from_json(json.loads(json.dumps(m.to_json(message)))) == message


@pytest.mark.parametrize(
    "bad", [{}, {"type": "Nothing"}, {"type": "Stop"}, {"type": "Stop", "node": "n", "attempt": "?"}]
)
def test_malformed_messages_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        m.from_json(bad)


# --- any faults in any order ----------------------------------------------------------------------------------------

FAULTS = (
    "rank",
    "error",
    "node",
    "pause",
    "keeper",
    "agent",
    "controller",
    "head",
    "corrupt",
    "hang",
    "resume",
    "dawdle",
)


def strike(world: Cluster, kind: str, seat: int, seed: int) -> None:
    seats = world.machine.job.members.seats
    node = world.nodes[seats[seat]] if seat in seats else next(iter(world.nodes.values()))
    if kind == "resume" or not node.alive or (node.paused and kind != "node"):
        for paused in [other for other in world.nodes.values() if other.paused]:
            world.resume(paused)
    elif kind == "dawdle":
        world.rebuild_s = 0.05 * (1 + seed) ** 2
    elif kind in ("rank", "error") and seat in seats:
        error = m.ErrorInfo(world.now, "ValueError", f"number {'x' * seed}") if kind == "error" else None
        world.crash_rank(seat * world.config.procs, error)
    elif kind == "node":
        world.lose_node(node, replace_after=2.0)
    elif kind == "pause":
        world.pause(node)
        world.at(6.0, lambda: world.resume(node))
    elif kind == "keeper":
        world.crash_keeper(node)
    elif kind == "agent" and node.agent_up:
        world.crash_agent(node)
    elif kind in ("controller", "head"):
        world.restart_controller(head=kind == "head")
    elif kind == "corrupt":
        world.corrupt(node, seed)
    elif kind == "hang":
        world.hung.add(seat)
        world.at(15.0, world.hung.clear)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 4.0), st.sampled_from(FAULTS), st.integers(0, 3), st.integers(0, 9)), max_size=10
    ),
    st.sampled_from([None, 3, 5]),
    st.integers(1, 2),
)
def test_any_faults_end_well(faults: list[tuple[float, str, int, int]], every: int | None, procs: int) -> None:
    config = MachineConfig(4, spares=1, procs=procs, every_steps=every, max_restarts=1000, start_timeout_s=120.0)
    world = cluster(6, config, total=80)
    for wait, kind, seat, seed in faults:
        world.run(wait)
        if world.finished is None:
            strike(world, kind, seat, seed)
    world.at(10.0, lambda: [world.resume(node) for node in world.nodes.values() if node.paused] and None)
    finish = world.run_to_end(900.0)
    assert finish.outcome == "succeeded" or "by itself" in finish.reason


# --- the same with a store and changes of size ----------------------------------------------------------------------

CHANGES = (*FAULTS, "leave", "join", "gone", "outage", "refusal", "flip", "missing", "slow")


def change(world: Cluster, kind: str, seat: int, seed: int) -> None:
    """A fault, a node that comes or goes for good, or trouble with the store, which passes."""
    seats = world.machine.job.members.seats
    node = world.nodes[seats[seat]] if seat in seats else next(iter(world.nodes.values()))
    match kind:
        case "leave":
            world.leave(node, 2.0 + 3.0 * seed)
            world.at(8.0, lambda: (world.add_node(), None)[1])
        case "join":
            world.add_node()
        case "gone":
            if node.alive:
                world.lose_node(node, replace_after=12.0)
        case "outage" | "refusal":
            if world.store.trouble is None:
                world.store.trouble = "unavailable" if kind == "outage" else "denied"
                world.at(1.0 + seed, world.store.recover)
        case "flip" | "missing":
            world.store.spoil(-1 - seed % 2, lose=kind == "missing")
        case "slow":
            world.store.upload_s = 0.1 * (1 + seed) ** 2
        case _:
            strike(world, kind, seat, seed)


@settings(max_examples=250, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 6.0), st.sampled_from(CHANGES), st.integers(0, 3), st.integers(0, 9)), max_size=12
    ),
    st.sampled_from([None, 3, 5]),
    st.integers(1, 2),
    st.sampled_from([None, 2, 3]),
)
def test_any_changes_end_well(
    changes: list[tuple[float, str, int, int]], every: int | None, procs: int, least: int | None
) -> None:
    config = MachineConfig(
        4,
        spares=1,
        procs=procs,
        every_steps=every,
        max_restarts=1000,
        start_timeout_s=120.0,
        min_replicas=least,
        shrink_after_s=3.0,
        grow_after_s=2.0,
        checkpoint=CheckpointConfig(URL, interval_steps=10),
    )
    world = cluster(6, config, total=120)
    for wait, kind, seat, seed in changes:
        world.run(wait)
        if world.finished is None:
            change(world, kind, seat, seed)
    world.at(10.0, lambda: [world.resume(node) for node in world.nodes.values() if node.paused] and None)
    finish = world.run_to_end(1500.0)
    if finish.outcome == "succeeded":
        assert world.store.line[-1].generation.step == world.total
    else:
        assert "by itself" in finish.reason or "the store is denied" in finish.reason, finish.reason


# --- the same with what people and the cluster ask for --------------------------------------------------------------

REQUESTS = (*CHANGES, "resize", "resize", "hold", "break")
BROKEN = ("rank-crash", "hang", "node-loss", "node-leave", "corrupt", "keeper-crash", "agent-crash", "controller-crash")


def top_up(world: Cluster) -> None:
    """What an operator does: as many nodes as are wanted."""
    config, here = world.machine.config, [node for node in world.nodes.values() if node.alive and not node.leaving]
    for _ in range(config.replicas + config.spares - len(here)):
        world.add_node()


def ask(world: Cluster, kind: str, seat: int, seed: int) -> None:
    match kind:
        case "resize":
            replicas = 1 + (seat + seed) % 5
            least = None if seed % 3 == 0 else 1 + seed % replicas
            request: Any = m.ResizeRequested(replicas, least, seed % 2)
        case "hold":
            request = m.HoldRequested(float(seed))
        case "break":
            broken = BROKEN[seed % len(BROKEN)]
            request = m.FaultRequested(broken, None if broken == "controller-crash" else seat)
        case _:
            change(world, kind, seat, seed)
            return
    if not world.machine.objection(request):
        world.tell(request)


DENIED_AT_THE_END = [
    (4.0, "resize", 0, 0),
    (0.0, "node", 2, 0),
    (0.0, "corrupt", 1, 1),
    (0.0, "leave", 0, 0),
    (2.0, "rank", 0, 0),
    (0.0, "refusal", 0, 0),
]
"""Memory has nothing left, and the store takes back what it had promised."""


@settings(max_examples=250, deadline=None)
@example(DENIED_AT_THE_END, 3, None, None)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 6.0), st.sampled_from(REQUESTS), st.integers(0, 3), st.integers(0, 9)), max_size=12
    ),
    st.sampled_from([None, 3, 5]),
    st.sampled_from([None, 2, 3]),
    st.sampled_from([None, 0.5, 9.0]),
)
def test_any_requests_end_well(
    asked: list[tuple[float, str, int, int]], every: int | None, least: int | None, suspended: float | None
) -> None:
    config = MachineConfig(
        4,
        spares=1,
        every_steps=every,
        max_restarts=1000,
        start_timeout_s=120.0,
        min_replicas=least,
        shrink_after_s=3.0,
        grow_after_s=2.0,
        checkpoint=CheckpointConfig(URL, interval_steps=10),
        faults=True,
    )
    world = cluster(6, config, total=120)
    for wait, kind, seat, seed in asked:
        world.run(wait)
        if world.finished is None:
            ask(world, kind, seat, seed)
    world.at(10.0, lambda: [world.resume(node) for node in world.nodes.values() if node.paused] and None)
    for later in range(10, 200, 5):
        world.at(float(later), lambda: top_up(world))
    if suspended is not None:
        world.run(suspended)
        world.tell(m.SuspendRequested(10.0))
    finish = world.run_to_end(1500.0)
    line = world.store.line
    if finish.outcome == "succeeded":
        assert line[-1].generation.step == world.total
    elif finish.outcome == "suspended":
        assert suspended is not None
        saved = status(world)["suspended"]["checkpoint_step"]
        assert saved is None or saved in {checkpoint.generation.step for checkpoint in line}
    else:
        assert "by itself" in finish.reason or "the store is denied" in finish.reason, finish.reason
    size = world.machine.config
    assert size.min_replicas is None or size.min_replicas <= size.replicas
