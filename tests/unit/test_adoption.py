"""A controller that dies while ranks are restored: the next one lets them go on, or plans the restore anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from outlast import messages as m
from outlast.controller.settings import CheckpointConfig, MachineConfig
from outlast.snapshot.identity import Generation
from support.simulated import Cluster, SimNode
from support.simulated_store import URL

CONFIG = MachineConfig(replicas=4, spares=1, every_steps=5)


def slow_at(world: Cluster, source: str, seconds: float) -> list[SimNode]:
    """The first node that gets images from ``source`` takes long; it, once it has begun."""
    rebuild, begun = world._rebuild, list[SimNode]()

    def take_long(node: SimNode, start: m.Start) -> None:
        plan = start.restore
        if plan is not None and not begun and any(one.source == source for one in plan.on_node(node.name)):
            begun.append(node)
            world.at(seconds, lambda: rebuild(node, start))
        else:
            rebuild(node, start)

    world._rebuild = take_long  # type: ignore[method-assign]
    return begun


def rebuilding(config: MachineConfig, slow_s: float) -> tuple[Cluster, Generation]:
    """A node is lost, its replacement takes ``slow_s`` to decode its image, the controller dies meanwhile."""
    world = Cluster(config, 5, total=400)
    world.run_to_step(33)
    world.run_to("snapshot-committed")
    kept, begun = world.kept, slow_at(world, "memory-decode", slow_s)
    assert kept is not None
    world.lose_node(world.seated(1), replace_after=None)
    assert world.run(30.0, lambda: bool(begun))
    world.run(1.0)
    world.restart_controller()
    world.run_to("adopted")
    return world, kept


@pytest.mark.parametrize("parity", [1, 2])
@pytest.mark.parametrize("slow_s", [0.5, 8.0, 60.0])
def test_what_is_being_rebuilt_is_protected_again_before_it_is_written_over(parity: int, slow_s: float) -> None:
    world, kept = rebuilding(replace(CONFIG, parity=parity), slow_s)
    seen = len(world.log)
    world.run_to("snapshot-permitted", 100.0)
    since = [line.kind for line in world.log[seen:]]
    assert "protected" in since, since
    world.run(0.3)
    world.lose_node(world.seated(2), replace_after=1.0)
    assert world.run_to("restored").fields["step"] >= kept.step
    assert world.run_to_end().outcome == "succeeded"


def loading(config: MachineConfig, nodes: int) -> Cluster:
    """All have rebuilt what they lacked, and hear no word to load from a controller, which dies."""
    world = Cluster(config, nodes, total=200)
    world.run_to_step(30)
    world._on_load = lambda node, load: None  # type: ignore[method-assign]
    world.crash_rank(0)
    job = world.machine.job
    assert world.run(20.0, lambda: job.phase.value == "starting" and not job.awaiting)
    world.run(1.0)
    world.restart_controller()
    world.run_to("adopted")
    return world


@pytest.mark.parametrize("nodes", [1, 5])
def test_ranks_that_never_load_end_the_attempt(nodes: int) -> None:
    world = loading(replace(CONFIG, replicas=max(nodes - 1, 1), spares=nodes > 1), nodes)
    line = world.run_to("fault", 2 * CONFIG.start_timeout_s)
    assert "did not become ready within" in line.text


def test_the_word_to_load_is_said_until_it_is_heard() -> None:
    world = Cluster(CONFIG, 5, total=200)
    hear, lost, deaf = world._on_load, list[str](), [False]

    def load(node: Any, told: m.Load) -> None:
        if deaf[0]:
            return
        if node.seat == 1 and not lost:
            lost.append(node.name)
            return
        hear(node, told)

    world.run_to_step(30)
    deaf[0], world._on_load = True, load  # type: ignore[method-assign]
    world.crash_rank(0)
    job = world.machine.job
    assert world.run(20.0, lambda: job.phase.value == "starting" and not job.awaiting)
    world.restart_controller()
    deaf[0] = False
    faults = world.kinds().count("fault")
    world.run_to("snapshot-committed", 60.0)
    assert (len(lost), world.kinds().count("fault")) == (1, faults)


def test_a_script_that_protects_nothing_is_left_alone() -> None:
    """There is no state to load: however long no rank says that it has one, it goes on."""
    world = Cluster(CONFIG, 5, total=10**6)
    say = world.say
    world.say = lambda event, delay=0.005: None if isinstance(event, m.RankReady) else say(event, delay)  # type: ignore[method-assign]
    world.run_to("unprotected")
    world.restart_controller()
    world.run_to("adopted")
    faults = world.kinds().count("fault")
    world.run(3 * CONFIG.start_timeout_s)
    assert world.kinds().count("fault") == faults
    assert world.machine.job.attempt is not None
    assert world.machine.job.attempt.number == 1


@pytest.mark.parametrize("nodes", [1, 4])
def test_ranks_that_ended_while_their_last_step_was_uploaded(nodes: int) -> None:
    """They may say so after all have joined: the step is in the store before the job has succeeded."""
    config = replace(CONFIG, replicas=nodes, spares=0, checkpoint=CheckpointConfig(URL, interval_steps=10))
    world = Cluster(config, nodes, total=24)
    world.store.upload_s = 5.0
    world.run_to("last-step")
    world.run_to("checkpoint-started")
    world.restart_controller()
    assert world.run_to_end().outcome == "succeeded"
    assert world.store.line[-1].generation.step == 24


def test_ranks_that_came_back_at_the_last_boundary_get_their_snapshot() -> None:
    """Nobody does a step any more: the permit for the last one is due all the same."""
    config = MachineConfig(4, every_steps=5, checkpoint=CheckpointConfig(URL, interval_steps=10))
    world = Cluster(config, 4, total=24)
    world.store.upload_s = 60.0
    end, writing = world._end, [True]
    world._end = lambda node, attempt: None if writing[0] else end(node, attempt)  # type: ignore[method-assign]
    world.run_to("last-step")
    world.crash_rank(0)
    writing[0] = False
    world.run_to("restored")
    job = world.machine.job
    assert world.run(60.0, lambda: job.all_ready and job.phase.value == "running")
    world.run(0.15)
    world.restart_controller()
    world.run_to("adopted")
    faults = world.kinds().count("fault")
    assert world.run(200.0, lambda: world.machine.over)
    assert world.finished is not None
    assert (world.finished.outcome, world.kinds().count("fault")) == ("succeeded", faults)


def resumed(world: Cluster) -> list[int]:
    return [line.fields["step"] for line in world.log if line.kind in ("restored", "restored-none")]


@pytest.mark.parametrize("dies", [False, True], ids=["same controller", "another one"])
def test_the_snapshot_of_a_larger_world_is_kept_until_there_is_one_of_the_smaller(dies: bool) -> None:
    config = MachineConfig(5, min_replicas=3, every_steps=20, parity=2, group_size=8, shrink_after_s=5.0)
    world = Cluster(config, 5, total=400, step_s=1.0)
    world.run_to_step(41)
    world.lose_node(world.seated(4), replace_after=None)
    world.run_to("restored", 200.0)
    job = world.machine.job
    assert world.run(60.0, lambda: job.all_ready and job.phase.value == "running")
    if dies:
        world.restart_controller()
        world.run_to("adopted")
        assert world.machine.job.inherited is None
        world.run(1.0)
    plan = world.restores[-1].restore
    assert plan is not None
    world.lose_node(world.nodes[next(rank.node for rank in plan.ranks if rank.seat == 4)], replace_after=None)
    world.run_to("restored", 200.0)
    assert resumed(world) == [40, 40]
    assert "protected" not in world.kinds()


@pytest.mark.parametrize("parity", [0, 1])
def test_what_was_passed_over_as_damaged_is_not_what_is_kept(parity: int) -> None:
    """Keepers list it still, unverified."""
    world = Cluster(MachineConfig(4, every_steps=20, parity=parity), 4, total=400, step_s=1.0)
    world.run_to_step(41)
    newest = world.kept
    assert newest is not None
    for seat in range(2):
        node = world.seated(seat)
        for key, image in list(node.images.items()):
            if image.generation == newest:
                node.images[key] = replace(image, bad_blocks=(1,))
    world.crash_rank(2)
    world.run_to("restored", 60.0)
    job = world.machine.job
    assert world.run(60.0, lambda: job.all_ready and job.phase.value == "running")
    world.run(1.5)
    world.restart_controller()
    world.run_to("adopted")
    permitted = world.run_to("snapshot-permitted", 100.0).fields["step"]
    assert world.run(100.0, lambda: world.live_step() >= permitted)
    world.run(0.02)  # no copy has ended
    world.crash_rank(1)
    world.run_to("restored", 60.0)
    assert resumed(world)[0] == 20
    assert resumed(world)[1] >= 20


def test_nobody_loads_while_another_node_reads_from_the_store() -> None:
    """Ranks read what they have in common from its keeper."""
    config = replace(CONFIG, parity=0, checkpoint=CheckpointConfig(URL, interval_steps=10))
    world = Cluster(config, 5, total=400)
    world.run_to_step(33)
    world.run(5.0)
    fetching = slow_at(world, "object", 120.0)
    world.lose_node(world.seated(1), replace_after=None)
    assert world.run(100.0, lambda: bool(fetching))
    world.run(2.0)
    world.restart_controller()
    world.run_to("adopted")
    perform, early = world._perform, list[m.Load]()

    def heard(told: m.Instruction) -> None:
        if isinstance(told, m.Load) and not fetching[0].rebuilt:
            early.append(told)
        perform(told)

    world._perform = heard  # type: ignore[method-assign, assignment]
    world.run_to("snapshot-committed", 300.0)
    assert early == []


def test_what_an_adopted_attempt_lacked_is_nothing_to_the_next() -> None:
    world, _ = rebuilding(CONFIG, 1000.0)
    say = world.say
    world.say = lambda event, delay=0.005: say(event, delay + 90.0 * isinstance(event, m.RankReady))  # type: ignore[method-assign]
    beat = lambda node: world.tell(m.Heartbeat(node.name, node.running)) if node.hears else None  # noqa: E731
    world._heartbeat = beat  # type: ignore[method-assign, assignment]
    for seat in (0, 2, 3):
        world.lose_node(world.seated(seat), replace_after=0.1)
    seen = len(world.log)
    world.run_to("restored-none", 60.0)
    world.run(85.0)
    assert "not-restored" not in [line.kind for line in world.log[seen:]]


def test_nodes_that_were_away_are_not_taken_for_the_one_that_has_what_is_needed() -> None:
    """After the head was lost a node comes that was paused for long; another, which has a seat's newest image, is last."""
    world = Cluster(replace(CONFIG, parity=1), 5, total=400)
    world.run_to_step(12)
    paused = world.seated(2)
    world.pause(paused)
    world.run_to("recovered", 60.0)
    world.add_node()
    world.add_node()
    world.run(5.0)
    world.resume(paused)
    world.run_to_step(60)
    last, gone = world.seated(2), world.seated(3)
    world.lose_node(gone, replace_after=None)
    join = world.join
    world.join = lambda node: world.at(1.0, lambda: join(node)) and None if node is last else join(node)  # type: ignore[method-assign, func-returns-value]
    world.restart_controller(head=True)
    line = world.run_to("restored", 60.0)
    assert line.fields["restore_sources"]["memory-decode"] == 1
    assert "passed-over" not in [entry.kind for entry in world.log[-12:]]


@pytest.mark.parametrize("late_s", [0.0, 1.0, 2.0])
def test_what_the_attempt_began_with_is_not_enough_while_newer_images_may_come(late_s: float) -> None:
    """Nodes that were away hold it whole; those that took their places hold the snapshot since."""
    world = Cluster(replace(CONFIG, parity=1, every_steps=20, spares=0), 4, total=400)
    away = list[SimNode]()
    world.run_to_step(42)
    for seat in (1, 2):
        away.append(world.seated(seat))
        world.pause(away[-1])
        world.add_node()
        world.run_to("recovered", 60.0)
    for node in away:
        world.resume(node)
    world.run_to("snapshot-committed", 60.0)
    newest = world.kept
    assert newest is not None
    late, join = [world.seated(1), world.seated(2)], world.join
    world.join = lambda node: world.at(late_s, lambda: join(node)) if node in late else join(node)  # type: ignore[method-assign]
    world.restart_controller(head=True)
    assert world.run_to("restored", 60.0).fields["step"] == newest.step


def test_ranks_are_told_to_load_although_one_has_ended_at_once() -> None:
    """It does not use Outlast, and its end has the attempt run."""
    world = Cluster(CONFIG, 5, total=200)
    world.run_to_step(30)
    rebuild = world._rebuild
    world._rebuild = lambda node, start: world.at(5.0 * (node.seat == 2), lambda: rebuild(node, start))  # type: ignore[method-assign]
    heard = list[str]()
    world._on_load = lambda node, load: heard.append(node.name)  # type: ignore[method-assign]
    world.crash_rank(0)
    world.run_to("restored")
    world.run(1.0)
    node, attempt = world.seated(1), world.machine.job.attempt
    assert attempt is not None
    world.say(m.RankDone(node.name, attempt, 1, "", 0))
    world.run(12.0)
    assert set(heard) >= set(world.machine.job.members.seated_names())
