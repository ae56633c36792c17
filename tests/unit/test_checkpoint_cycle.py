"""The object tier as the machine sees it: the cycle as a table, then whole jobs with a simulated store."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from outlast import messages as m
from outlast.controller.checkpoints import CheckpointCycle
from outlast.controller.claims import Claims
from outlast.controller.settings import CheckpointConfig, MachineConfig, Patience
from outlast.controller.snapshot_work import Committed
from outlast.messages.events import StoreTrouble
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.stored import StoredCheckpoint, StoredImage
from support.simulated import Cluster
from support.simulated_store import URL

EVERY_20 = CheckpointConfig(URL, interval_steps=20)
CONFIG = MachineConfig(4, spares=1, every_steps=5, checkpoint=EVERY_20, fingerprint="spec-1", start_timeout_s=120.0)
ELASTIC = replace(CONFIG, spares=0, min_replicas=2, shrink_after_s=5.0, grow_after_s=3.0)

# --- the cycle, by hand ---------------------------------------------------------------------------------------------

NODES = ("a", "b")


def generation(step: int, attempt: int = 1) -> Generation:
    return Generation(attempt, step, "0" * 16)


def whole(step: int, slot: int = 0) -> Committed:
    return Committed(generation(step), slot, {0: 10, 1: 10})


def images(node: str) -> tuple[StoredImage, ...]:
    rank = NODES.index(node)
    return (StoredImage(rank, rank, 0, f"rank-{rank}", 10, "0" * 16),)


def stored(step: int) -> StoredCheckpoint:
    return StoredCheckpoint(generation(step), URL, 2, 1, (*images("a"), *images("b")))


class Hand:
    """A cycle, told by hand; keeps what the store has."""

    def __init__(self, config: CheckpointConfig = EVERY_20, auto_s: float = 60.0) -> None:
        self.cycle = CheckpointCycle(config, 1, lambda _: auto_s)
        self.stored: StoredCheckpoint | None = None
        self.now = 0.0

    def tick(self, step: int | None, after: float = 0.1, slot: int = 0, urgent: bool = False) -> list[str]:
        self.now += after
        newest = None if step is None else whole(step, slot)
        return self._kinds(self.cycle.tick(newest, self.stored, NODES, self.now, urgent=urgent))

    def uploaded(self, node: str, step: int) -> list[Any]:
        return self.cycle.uploaded(m.Uploaded(node, generation(step), images(node)))

    def failed(self, node: str, step: int, trouble: Any = "unavailable", reason: str = "503") -> list[str]:
        event = m.UploadFailed(node, generation(step), reason, trouble)
        return self._kinds(self.cycle.upload_failed(event, self.now))

    def commit(self, step: int) -> list[str]:
        self.stored = stored(step)
        return self._kinds(self.cycle.committed(self.stored, self.now))

    def whole(self, step: int) -> None:
        assert "Upload" in self.tick(step)
        for node in NODES:
            self.uploaded(node, step)
        self.commit(step)

    @staticmethod
    def _kinds(instructions: list[Any]) -> list[str]:
        return [one.kind if isinstance(one, m.Emit) else type(one).__name__ for one in instructions]


def test_one_checkpoint_from_beginning_to_end() -> None:
    hand = Hand()
    assert hand.tick(15) == []
    assert hand.tick(20, slot=2) == ["checkpoint-started", "Upload"]
    assert hand.cycle.pinned == 2
    assert hand.uploaded("a", 20) == []
    (order,) = hand.uploaded("b", 20)
    assert order == m.CommitCheckpoint(generation(20), 2, 1, (*images("a"), *images("b")), {})
    assert hand.commit(20) == ["checkpoint-committed"]
    assert hand.cycle.pinned is None
    assert hand.cycle.totals.last_step == 20
    assert hand.tick(25) == []


def test_multiples_are_those_of_the_newest_snapshot() -> None:
    hand = Hand()
    hand.whole(21)
    assert hand.tick(39) == []
    assert "Upload" in hand.tick(44)


def test_what_is_due_while_one_is_under_way_is_skipped_and_counted_once() -> None:
    hand = Hand()
    assert "Upload" in hand.tick(20)
    for step in (25, 40, 45, 45, 60):
        assert hand.tick(step) == []
    assert hand.cycle.totals.skipped == 2
    for node in NODES:
        hand.uploaded(node, 20)
    hand.commit(20)
    assert hand.tick(70) == [], "not queued"
    assert "Upload" in hand.tick(80)


def test_seconds_begin_with_the_first_look() -> None:
    hand = Hand(CheckpointConfig(URL, interval_s=30.0))
    assert hand.tick(5) == []
    assert hand.tick(10, 29.8) == []
    assert "Upload" in hand.tick(15, 0.2)


def test_without_a_newer_snapshot_it_is_skipped_and_made_up_for() -> None:
    hand = Hand(CheckpointConfig(URL, interval_s=30.0))
    hand.tick(None)
    assert hand.tick(None, 30.0) == []
    assert hand.cycle.totals.skipped == 1
    assert hand.tick(None, 1.0) == []
    assert hand.cycle.totals.skipped == 1
    assert "Upload" in hand.tick(5, 1.0)


def test_auto_asks_for_the_interval() -> None:
    hand = Hand(CheckpointConfig(URL), auto_s=90.0)
    hand.tick(5)
    assert hand.tick(5, 89.8) == []
    assert "Upload" in hand.tick(5, 0.3)


def test_the_last_one_ignores_the_interval() -> None:
    hand = Hand()
    assert "Upload" in hand.tick(7, urgent=True)


def test_a_failure_is_tried_again_with_the_newest_after_a_growing_pause() -> None:
    hand = Hand()
    hand.tick(20)
    assert hand.failed("a", 20) == ["checkpoint-failed"]
    assert hand.cycle.pinned == 0, "the other is still being read"
    assert hand.tick(25, 6.0) == []
    hand.uploaded("b", 20)
    assert hand.cycle.pinned is None
    assert "Upload" in hand.tick(26)
    pauses = []
    for _ in range(6):
        hand.failed("a", 26)
        hand.failed("b", 26)
        began = hand.now
        while "Upload" not in hand.tick(26, 0.5):
            pass
        pauses.append(hand.now - began)
    assert pauses == pytest.approx([10.0, 20.0, 40.0, 80.0, 120.0, 120.0])


def test_the_same_reason_is_told_once_a_minute() -> None:
    hand = Hand()
    hand.tick(20)
    assert hand.failed("a", 20) == ["checkpoint-failed"]
    assert hand.failed("b", 20) == []
    told = []
    for _ in range(4):
        while "Upload" not in hand.tick(20, 0.5):
            pass
        told.append((hand.now, hand.failed("a", 20)))
        hand.failed("b", 20)
    assert [bool(lines) for _, lines in told] == [False, False, False, True]
    assert hand.cycle.totals.failed == 5


def test_a_success_ends_the_pauses() -> None:
    hand = Hand()
    hand.tick(20)
    hand.failed("a", 20)
    hand.uploaded("b", 20)
    hand.tick(20, 6.0)
    hand.uploaded("a", 20)
    hand.commit(20)
    assert hand.cycle.totals.last_error is None
    hand.tick(40)
    hand.failed("a", 40, reason="other")
    hand.failed("b", 40)
    assert "Upload" in hand.tick(40, 5.1)


def test_what_was_uploaded_of_the_same_snapshot_is_not_uploaded_again() -> None:
    hand = Hand()
    hand.tick(20)
    hand.uploaded("b", 20)
    hand.failed("a", 20)
    began = hand.cycle.tick(whole(20), None, NODES, hand.now + 6, urgent=False)
    assert began[1] == m.Upload(("a",), generation(20), URL, None)
    assert isinstance(hand.uploaded("a", 20)[0], m.CommitCheckpoint)


def test_a_refusal_says_that_a_person_must_act() -> None:
    hand = Hand()
    hand.tick(20)
    event = m.UploadFailed("a", generation(20), "403: give the job s3:PutObject", "denied")
    (line,) = hand.cycle.upload_failed(event, hand.now)
    assert isinstance(line, m.Emit)
    assert "a person must act" in line.text
    assert "60 s" in line.text
    hand.uploaded("b", 20)
    assert hand.tick(25, 59.0) == []
    assert "Upload" in hand.tick(25, 2.0)


def test_a_damaged_image_gives_way_to_the_next_snapshot() -> None:
    hand = Hand()
    hand.tick(20)
    hand.failed("a", 20, "bad")
    hand.uploaded("b", 20)
    assert hand.tick(20, 600.0) == []
    assert "Upload" in hand.tick(25)


def test_a_head_that_does_not_move_is_tried_again_without_uploads() -> None:
    hand = Hand()
    hand.tick(20)
    for node in NODES:
        hand.uploaded(node, 20)
    failed = m.CheckpointFailed(generation(20), "503", "unavailable")
    assert hand._kinds(hand.cycle.commit_failed(failed, hand.now)) == ["checkpoint-failed"]
    assert hand.cycle.pinned is None
    assert hand.tick(20, 5.1) == ["checkpoint-started", "CommitCheckpoint"]


def test_a_head_that_lacks_objects_is_uploaded_anew() -> None:
    hand = Hand()
    hand.tick(20)
    for node in NODES:
        hand.uploaded(node, 20)
    hand.cycle.commit_failed(m.CheckpointFailed(generation(20), "an object is gone", "bad"), hand.now)
    assert hand.tick(20, 5.1) == ["checkpoint-started", "Upload"]


def test_a_keeper_that_is_back_is_told_again() -> None:
    hand = Hand()
    hand.tick(20)
    hand.uploaded("a", 20)
    assert hand.cycle.keeper_back("a") == []
    assert hand.cycle.keeper_back("b") == [m.Upload(("b",), generation(20), URL, None)]
    hand.uploaded("b", 20)
    assert hand.cycle.keeper_back("b") == []


def test_a_new_attempt_drops_what_is_under_way() -> None:
    hand = Hand()
    hand.tick(20)
    hand.cycle.drop()
    assert hand.cycle.pinned is None
    assert hand.uploaded("a", 20) == []
    assert "Upload" in hand.tick(20)


def test_a_commit_of_the_attempt_before_still_counts() -> None:
    hand = Hand()
    hand.whole(20)
    hand.cycle.drop()
    assert hand.commit(25) == ["checkpoint-committed"]
    assert hand.cycle.totals.count == 2


def test_claims_remember_what_is_known() -> None:
    claims, first, second = Claims(True), Attempt(1, "a" * 16), Attempt(2, "b" * 16)
    assert claims.unknown
    claims.ask(first, 0.0, 8.0)
    assert claims.pending(7.9)
    assert not claims.pending(8.0)
    claims.ask(second, 10.0, 8.0)
    assert not claims.current(m.Claimed(first))
    claims.take(m.Claimed(second, (stored(40), stored(20))))
    assert not claims.pending(10.0)
    assert claims.newest == stored(40)
    assert claims.exclude(generation(40)) == stored(40)
    assert claims.newest == stored(20)
    claims.take(m.Claimed(second, (stored(40), stored(20))))
    assert claims.newest == stored(20), "what is damaged stays so"
    claims.add(stored(60))
    assert claims.holds_step(60)
    assert not Claims(False).unknown


# --- whole jobs -----------------------------------------------------------------------------------------------------


def cluster(nodes: int = 5, config: MachineConfig = CONFIG, **options: Any) -> Cluster:
    return Cluster(config, nodes, **{"total": 100, **options})


def status(world: Cluster) -> dict[str, Any]:
    found = world.machine.status(world.now)
    json.dumps(found)
    return found


def succeeded(world: Cluster) -> dict[str, Any]:
    finish = world.run_to_end(3000.0)
    assert finish.outcome == "succeeded", finish
    found = status(world)
    assert found["step"] == world.total
    assert found["weights_digest"] == f"digest-{world.total}"
    assert world.store.line[-1].generation.step == world.total, "the last step is in the store"
    return found


def steps(world: Cluster) -> list[int]:
    return [one.step for one in world.store.committed]


def lose_all(world: Cluster, replace_after: float | None = 1.0) -> None:
    for node in [node for node in world.nodes.values() if node.alive]:
        world.lose_node(node, replace_after=replace_after)


def test_an_undisturbed_run() -> None:
    world = cluster()
    found = succeeded(world)
    assert steps(world) == [20, 40, 60, 80, 100]
    assert found["checkpoints"]["count"] == 5
    assert found["checkpoints"]["last_step"] == 100
    assert found["checkpoints"]["skipped"] == found["checkpoints"]["failed"] == 0
    assert found["checkpoint"]["step"] == 100
    assert found["checkpoint"]["url"] == URL
    assert found["recoveries"] == []


def test_three_slots_take_turns_while_one_is_pinned() -> None:
    world = cluster()
    world.store.upload_s = 4.0
    world.run_to("checkpoint-started")
    lines = [world.run_to("snapshot-permitted") for _ in range(4)]
    assert len({line.fields["slot"] for line in lines}) == 2, "two take turns, the third is read"
    succeeded(world)
    slots = {line.fields["slot"] for line in world.log if line.kind == "snapshot-permitted"}
    assert slots == {0, 1, 2}


def test_a_slow_store_skips_and_holds_nothing_back() -> None:
    world = cluster()
    world.store.upload_s = 9.0
    found = succeeded(world)
    assert found["checkpoints"]["skipped"] >= 1
    assert steps(world)[-1] == 100
    assert found["snapshots"]["count"] == 20


def test_the_manifest_tells_its_origin() -> None:
    world = cluster()
    world.run_to("checkpoint-committed")
    assert world.store.line[-1].about == {"script": "script-1", "spec": "spec-1"}


def test_losses_beyond_parity_go_on_from_the_store() -> None:
    world = cluster(8)
    world.run_to_step(33)
    for seat in (0, 1, 2):
        world.lose_node(world.seated(seat), replace_after=None)
    line = world.run_to("restored")
    assert line.fields["step"] == 30 or line.fields["restore_sources"].get("object")
    found = succeeded(world)
    assert found["recoveries"][0]["restore_sources"]["object"] >= 1


def test_a_job_that_lost_everything_goes_on_from_the_store() -> None:
    world = cluster()
    world.run_to_step(33)
    lose_all(world)
    line = world.run_to("restored")
    assert line.fields["step"] == 20
    assert line.fields["restore_sources"] == {"object": 4}
    assert succeeded(world)["recoveries"][0]["lost_steps"] in (12, 13)


def test_another_controller_on_new_nodes_goes_on_from_the_store() -> None:
    world = cluster()
    world.run_to_step(33)
    lose_all(world, 0.2)
    world.restart_controller(after=0.1)
    line = world.run_to("restored")
    assert line.fields["step"] == 20
    assert world.machine.job.attempt.number >= 2, "above every attempt that the store knows"  # type: ignore[union-attr]
    succeeded(world)


def test_checkpoints_restore_on_another_size() -> None:
    world = cluster(4, ELASTIC)
    world.run_to_step(33)
    lose_all(world, None)
    world.run(2.0)
    for _ in range(3):
        world.add_node()
    line = world.run_to("restored")
    assert line.fields["direct"]
    assert line.fields["restore_sources"] == {"object": 4}
    assert line.fields["nodes"] == 3
    found = succeeded(world)
    assert [(one["from"], one["to"]) for one in found["resizes"]] == [(4, 3)]


# --- the claim ------------------------------------------------------------------------------------------------------


def test_a_store_that_is_down_holds_a_restart_back_for_a_moment_only() -> None:
    world = cluster()
    world.run_to_step(33)
    world.store.trouble = "unavailable"
    world.crash_rank(1)
    world.run_to("recovered")
    assert status(world)["recoveries"][0]["total_s"] < 2.0
    assert status(world)["checkpoint"]["claimed"] is False
    assert "claim-failed" in world.kinds()
    world.run(4.0)
    world.store.trouble = None
    world.run_to("checkpoint-committed")
    succeeded(world)


def test_a_store_that_says_nothing_is_waited_for_in_vain_for_claim_s() -> None:
    world = cluster()
    world.run_to_step(33)
    world._claim = lambda *_: None  # type: ignore[method-assign]
    world.crash_rank(1)
    began = world.now
    world.run_to("restored")
    assert 8.0 <= world.now - began <= 8.5


def test_nothing_is_begun_anew_while_the_store_is_not_known() -> None:
    world = cluster()
    world.store.trouble = "unavailable"
    world.run_to("waiting-for-store")
    world.run(30.0)
    assert world.restores == []
    world.store.trouble = None
    world.run_to("fresh")
    succeeded(world)


def test_a_store_that_never_answers_fails_the_job_that_has_nothing() -> None:
    world = cluster()
    world.store.trouble = "unavailable"
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "startTimeout" in finish.reason
    assert "would lose the job's checkpoints" in finish.reason


def test_what_is_known_of_the_store_serves_while_it_is_down() -> None:
    """Then the attempts that need it fail, with growing pauses, until it answers."""
    world = cluster()
    world.run_to_step(33)
    world.store.trouble = "unavailable"
    lose_all(world, 0.5)
    world.run_to("backoff")
    world.run(20.0)
    world.store.trouble = None
    found = succeeded(world)
    assert found["restarts"]["restore-failed"] >= 2
    assert found["step"] == 100


def test_a_claim_lost_to_another_controller_ends_this_one() -> None:
    world = cluster()
    world.run_to_step(33)
    world.store.owner = 99
    world.crash_rank(1)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "another controller has taken over" in finish.reason


def test_a_commit_lost_to_another_controller_ends_this_one() -> None:
    world = cluster()
    world.run_to_step(13)
    world.store.owner = 99
    finish = world.run_to_end()
    assert "another controller has taken over" in finish.reason
    assert world.store.line == []


def test_a_store_that_refuses_ends_the_job_with_the_reason() -> None:
    world = cluster()
    world.store.trouble = "denied"
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "the store is denied" in finish.reason


@pytest.mark.parametrize("dies", ["a node", "the controller"])
@pytest.mark.parametrize("trouble", ["unavailable", "denied"])
def test_a_store_that_denies_later_ends_nothing_that_memory_can_go_on_from(trouble: Any, dies: str) -> None:
    world = cluster(total=400)
    world.run_to("checkpoint-committed")
    world.run_to_step(60)
    world.store.trouble = trouble
    world.run_to_step(100)
    if dies == "a node":
        world.lose_node(world.seated(1))
    else:
        world.restart_controller()
    line = world.run_to("claim-failed")
    assert ("a person must act" in line.text) == (trouble == "denied")
    if dies == "a node":
        assert world.run_to("restored").fields["step"] >= 90, "from memory"
    began = world.live_step()
    world.run(10.0)
    assert world.live_step() > began
    world.store.trouble = None
    world.run_to("claimed")
    world.run_to("checkpoint-committed")
    succeeded(world)


def test_a_store_that_denies_when_memory_has_nothing_ends_the_job() -> None:
    """A new controller does not know what the store holds: to begin anew would be to lose it."""
    world = cluster()
    world.run_to_step(33)
    world.store.trouble = "denied"
    world.restart_controller()
    lose_all(world, 0.5)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "the job's checkpoints cannot be used: the store is denied" in finish.reason


def test_a_late_claim_of_an_older_attempt_counts_for_nothing() -> None:
    world = cluster()
    world.run_to_step(13)
    old = world.machine.job.attempt
    assert old is not None
    world.crash_rank(1)
    world.run_to("restart")
    assert world.machine.handle(m.Claimed(old), world.now) == []
    assert world.machine.handle(m.ClaimFailed(old, "late", "lost"), world.now) == []
    succeeded(world)


# --- stores in trouble ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["unavailable", "denied"])
def test_training_goes_on_while_uploads_fail(trouble: Any) -> None:
    world = cluster(total=200)
    world.run_to_step(13)
    world.store.trouble = trouble
    world.run_to("checkpoint-failed")
    began = world.live_step()
    world.run(20.0)
    assert world.live_step() - began > 80
    assert status(world)["checkpoint"]["last_error"]
    world.store.trouble = None
    world.run_to("checkpoint-committed")
    assert succeeded(world)["checkpoints"]["failed"] >= 1


def test_flipped_bytes_are_quarantined_and_the_older_one_used() -> None:
    world = cluster()
    world.run_to_step(53)
    world.store.spoil()
    lose_all(world)
    line = world.run_to("restored")
    assert line.fields["step"] == 40
    line = world.run_to("restored")
    assert line.fields["step"] == 20
    assert [one.step for one in world.store.quarantined] == [40]
    found = succeeded(world)
    assert found["restarts"].get("restore-failed") == 1
    assert 40 in steps(world)


def test_a_lost_object_is_not_offered() -> None:
    world = cluster()
    world.run_to_step(53)
    world.store.spoil(lose=True)
    lose_all(world)
    assert world.run_to("restored").fields["step"] == 20
    succeeded(world)


def test_refused_reading_ends_the_job() -> None:
    world = cluster()
    world.run_to_step(33)
    lose_all(world, 0.5)
    world.run_to("restored")
    world.store.trouble = "denied"
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "could not restore step 20" in finish.reason
    assert "a person must act" in finish.reason


def test_restore_failures_do_not_count_as_the_scripts_own_error() -> None:
    world = cluster()
    world.store.keep = 10
    world.run_to_step(93)
    for position in range(4):
        world.store.spoil(position)
    lose_all(world)
    world.run_to("restored-none")
    assert len(world.store.quarantined) == 4
    succeeded(world)


# --- other jobs' checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [4, 2])
def test_a_branch_begins_with_another_jobs_checkpoint(nodes: int) -> None:
    world = cluster()
    world.store.lend(40, nodes, 1, {"script": "script-0", "spec": "spec-1"})
    line = world.run_to("restored")
    assert line.fields["step"] == 40
    assert line.fields["direct"]
    changed = world.run_to("fingerprint-changed")
    assert changed.fields["changed"] == ["script"]
    found = succeeded(world)
    assert steps(world)[0] < 60, "the branch's own first checkpoint comes soon"
    assert found["attempt"] == 1


def test_a_branch_goes_on_from_its_own_checkpoints() -> None:
    world = cluster()
    world.store.lend(40, 4, 1)
    world.run_to_step(67)
    lose_all(world)
    assert world.run_to("restored").fields["step"] == 60
    succeeded(world)


def _cannot_read(world: Cluster, generation: Generation) -> None:
    attempt = world.machine.job.attempt
    assert attempt is not None
    world.tell(m.RestoreFailed(world.seated(0).name, attempt, generation, "rank 0's image is damaged", "bad", 0))


def test_another_jobs_damaged_checkpoint_is_passed_over_for_an_older_one() -> None:
    world = cluster()
    newest, older = world.store.lend(60, 4, 1), world.store.lend(40, 4, 1)
    world.run_to("restored")
    _cannot_read(world, newest.generation)
    world.run_to("recovered")
    assert world.machine.job.origin == older
    succeeded(world)


@pytest.mark.parametrize("trouble", [None, "unavailable"])
def test_when_none_is_left_of_another_jobs_checkpoints_the_job_does_not_begin_without(
    trouble: StoreTrouble | None,
) -> None:
    world = cluster()
    lent = world.store.lend(40, 4, 1)
    world.run_to("restored")
    world.store.trouble = trouble
    _cannot_read(world, lent.generation)
    world.run(30.0)
    assert world.kinds().count("restored") == 1
    assert not {"fresh", "restored-none"} & set(world.kinds())
    world.store.recover()
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "checkpoints cannot be used" in finish.reason


@pytest.mark.parametrize("own", [None, "unavailable"])
def test_a_lender_that_is_away_for_a_moment_is_waited_for(own: StoreTrouble | None) -> None:
    world = cluster()
    world.store.lend(40, 4, 1)
    world.store.lender, world.store.trouble = "unavailable", own
    world.run_to("waiting-for-store")
    world.run(5.0)
    world.store.trouble = None
    world.run(5.0)
    assert not {"fresh", "restored", "restored-none"} & set(world.kinds())
    world.store.lender = None
    assert world.run_to("restored").fields["step"] == 40
    succeeded(world)


@pytest.mark.parametrize("lose", [False, True], ids=["damaged", "missing"])
def test_a_branch_never_begins_anew_when_what_it_has_and_what_it_was_lent_are_gone(lose: bool) -> None:
    world = cluster(total=200)
    lent = world.store.lend(40, 4, 1)
    world.run_to_step(45)
    world.store.quarantined.append(lent.generation)
    world.restart_controller()
    world.run_to("restore-from-unseen")
    world.run_to("checkpoint-committed")
    while any(world.store.images.get((c.generation, c.images[-1].rank)) for c in world.store.line):
        for place in range(len(world.store.line)):
            world.store.spoil(place, lose=lose)
    lose_all(world, 0.5)
    finish = world.run_to_end()
    assert finish.outcome == "failed"
    assert "what restoreFrom names is damaged" in finish.reason
    assert "restored-none" not in world.kinds()


# --- how long the store is waited for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("upload_s", [500.0, 1000.0, 5000.0])
def test_a_store_that_is_slow_and_well_is_waited_for(upload_s: float) -> None:
    world = cluster()
    world.store.upload_s = upload_s
    finish = world.run_to_end(30000.0)
    assert finish.outcome == "succeeded", finish
    assert world.store.line[-1].generation.step == world.total


def test_a_complaint_while_the_last_upload_goes_on_has_the_stores_patience_from_then_on() -> None:
    world = cluster(config=replace(CONFIG, patience=replace(Patience(), final_s=100.0)))
    world.run_to("last-step")
    world.store.upload_s = 10_000.0
    world.run(300.0)
    job, node = world.machine.job, world.seated(1).name
    world.tell(m.Note(node, None, "store-unavailable", "503"))
    world.run(90.0)
    assert job.outcome is None
    world.tell(m.Note(node, None, "store-answers", "200"))
    world.run(300.0)
    assert job.outcome is None, "the complaint is over"
    world.tell(m.Note(node, None, "store-unavailable", "503"))
    assert world.run_to_end(150.0).outcome == "failed"


def test_what_says_nothing_of_the_store_is_no_complaint_of_its() -> None:
    world = cluster(config=replace(CONFIG, patience=replace(Patience(), final_s=100.0)))
    world.run_to("last-step")
    world.store.upload_s = 1000.0
    world.run(5.0)
    node, final = world.seated(1).name, world.machine.job.final
    assert final is not None
    world.tell(m.UploadFailed(node, generation(3), "it was overwritten while it was uploaded"))
    finish = world.run_to_end(3000.0)
    assert finish.outcome == "succeeded", "of a generation that nobody waits for"


def test_a_new_controller_has_nobody_load_what_is_not_there_yet() -> None:
    """It finds ranks that wait for a word which the controller before it may not have said."""
    world = cluster(4, config=replace(CONFIG, spares=0, start_timeout_s=7200.0), total=400)
    world.run_to("checkpoint-committed")
    rebuild, fetched = world._rebuild, []

    def slowly(node: Any, start: m.Start) -> None:
        plan = start.restore
        if plan is not None and any(item.source == "object" for item in plan.on_node(node.name)):
            fetched.append(node.name)
            world.at(400.0 if node.seat == 0 else 30.0, lambda: rebuild(node, start))
        else:
            rebuild(node, start)

    world._rebuild = slowly  # type: ignore[method-assign]
    lose_all(world)
    world.run_to("restored")
    for _ in range(3):
        world.run(100.0)
        world.restart_controller()
    finish = world.run_to_end(3000.0)
    assert finish.outcome == "succeeded", finish
    assert len(fetched) == 4, "nothing is fetched twice"


@pytest.mark.parametrize("after_s", [0.5, 10.0, 30.0])
def test_a_suspension_after_an_outage_tries_the_store_at_once(after_s: float) -> None:
    world = cluster(total=100_000)
    world.run_to("checkpoint-committed")
    world.store.trouble = "unavailable"
    cycle = world.machine.job.checkpoints
    assert cycle is not None
    world.run(600.0)
    failed = cycle.totals.failed
    world.run(300.0, lambda: cycle.totals.failed > failed)
    world.store.recover()
    world.run(after_s)
    world.tell(m.SuspendRequested(60.0, "spec.suspend"))
    finish = world.run_to_end(500.0)
    assert finish.outcome == "suspended"
    assert "which is in the store" in finish.reason


@pytest.mark.parametrize("lost", ["the order", "the answer"])
def test_an_upload_whose_order_or_answer_is_lost_is_asked_for_again(lost: str) -> None:
    world = cluster(total=100_000)
    begin, say, victims = world._on_upload, world.say, []

    def lose_an_order(node: Any, upload: m.Upload) -> None:
        if victims:
            begin(node, upload)
        else:
            victims.append(node.name)

    def lose_an_answer(event: m.Event, *delay: float) -> None:
        if isinstance(event, m.Uploaded) and not victims:
            victims.append(event.node)
        else:
            say(event, *delay)

    if lost == "the order":
        world._on_upload = lose_an_order  # type: ignore[method-assign]
    else:
        world.say = lose_an_answer  # type: ignore[method-assign]
    world.run_to("checkpoint-committed", 120.0)
    assert victims
    world.run_to("checkpoint-committed", 30.0)
    assert status(world)["checkpoints"]["failed"] == 0


def test_checkpoints_that_have_expired_are_forgotten() -> None:
    world = cluster(total=1000)
    succeeded(world)
    stored = world.machine.job.claims.stored
    assert [known.generation for known in stored or ()] == [known.generation for known in reversed(world.store.line)]


def test_no_more_checkpoints_are_known_than_a_claim_is_answered_with() -> None:
    claims = Claims(True)
    claims.stored = ()
    for step in range(100):
        claims.add(stored(step))
    assert [known.generation.step for known in claims.stored] == list(range(99, 91, -1))


def test_the_same_fingerprint_is_no_news() -> None:
    world = cluster()
    world.run_to_step(33)
    lose_all(world)
    world.run_to("recovered")
    assert "fingerprint-changed" not in world.kinds()


def test_a_changed_script_is_told_when_it_reads_a_checkpoint() -> None:
    world = cluster()
    world.run_to_step(33)
    world.script = "script-2"
    lose_all(world)
    assert "the script changed" in world.run_to("fingerprint-changed").text


# --- the end --------------------------------------------------------------------------------------------------------


def test_the_last_step_is_held_and_stored_before_the_job_has_succeeded() -> None:
    world = cluster(total=97)
    world.store.upload_s = 5.0
    world.run_to("last-step")
    assert all(node.held for node in world.nodes.values() if node.running)
    done_at = world.now
    found = succeeded(world)
    assert world.now - done_at >= 5.0
    assert found["phase"] == "Succeeded"
    permits = [line for line in world.log if line.kind == "snapshot-permitted"]
    assert permits[-1].fields["step"] == 97


def test_a_job_of_very_few_steps_is_planned_and_stored_at_its_end() -> None:
    world = cluster(total=2)
    found = succeeded(world)
    assert steps(world) == [2]
    assert found["snapshots"]["count"] == 1


def test_a_snapshot_that_is_missed_at_the_end_is_taken_again() -> None:
    world = cluster(total=20)
    world.run_to_step(14)
    while world.run_to("snapshot-permitted").fields["step"] < 20:
        pass
    work = world.machine.job.cycle.work  # type: ignore[union-attr]
    assert work is not None
    assert work.hold
    world.tell(m.Missed(world.seated(0).name, 0, work.generation, "replan"))
    succeeded(world)


def test_waiting_at_the_end_is_no_hang() -> None:
    world = cluster(total=20, config=replace(CONFIG, hang_timeout_s=10.0))
    world.run_to_step(17)
    node = world.seated(1)
    world.crash_keeper(node, back_after=100.0)
    found = succeeded(world)
    assert found["recoveries"] == []


def test_holding_is_no_hang_while_the_store_does_not_answer() -> None:
    world = cluster(total=40, config=replace(CONFIG, hang_timeout_s=10.0))
    world.run_to("last-step")
    world.store.trouble = "unavailable"
    world.run(400.0)
    assert not world.machine.over
    world.store.trouble = None
    assert succeeded(world)["recoveries"] == []


def test_a_last_step_that_never_gets_there_fails_and_says_where_the_weights_are() -> None:
    world = cluster(total=40)
    world.run_to("last-step")
    world.store.trouble = "unavailable"
    finish = world.run_to_end(2000.0)
    assert finish.outcome == "failed"
    assert "within 900 s" in finish.reason
    assert "the weights are in the run's final folder" in finish.reason


def test_a_node_lost_before_its_part_of_the_last_step_is_stored_is_a_fault() -> None:
    world = cluster(total=40)
    world.store.upload_s = 10.0
    world.run_to("last-step")
    world.run(1.0)
    assert len(world.machine.job.progress.done) == 4
    world.lose_node(world.seated(1), replace_after=None)
    found = succeeded(world)
    (record,) = found["recoveries"]
    assert (record["kind"], record["restored_step"]) == ("node-lost", 40)


def test_a_node_lost_after_its_part_of_the_last_step_is_stored_is_none() -> None:
    world = cluster(total=40)
    world.run_to("last-step")
    world.store.upload_s = 10.0
    generation_, name = world.machine.job.final, world.seated(0).name
    assert generation_ is not None
    uploaded = world.machine.job.checkpoints
    assert uploaded is not None
    assert world.run(30.0, lambda: uploaded.uploaded_by(name, generation_))
    world.lose_node(world.seated(0), replace_after=None)
    assert succeeded(world)["recoveries"] == []


def test_an_image_damaged_at_the_end_is_rebuilt() -> None:
    world = cluster(total=40)
    world.store.upload_s = 5.0
    world.run_to("last-step")
    node = world.seated(2)
    for key, image in node.images.items():
        if image.kind == "shard" and image.generation.step == 40:
            node.images[key] = replace(image, bad_blocks=(1,))
    found = succeeded(world)
    assert found["restarts"] == {"image-damaged": 1}
    assert found["recoveries"][0]["restored_step"] == 40


def test_ranks_that_end_early_leave_the_last_checkpoint_as_it_is() -> None:
    world = cluster()
    world.run_to_step(33)
    attempt = world.machine.job.attempt
    assert attempt is not None
    for seat in range(4):
        world.tell(m.RankDone(world.seated(seat).name, attempt, seat, "early", 33))
    assert "no-final-checkpoint" in world.kinds()
    finish = world.run_to_end()
    assert finish.outcome == "succeeded"


def test_a_resumed_job_that_was_finished_is_not_uploaded_again() -> None:
    world = cluster(total=40)
    succeeded(world)
    line, now = list(world.store.line), world.now
    again = cluster(total=40)
    again.store = world.store
    again.store.owner = None
    succeeded(again)
    assert again.store.line == line
    assert now > 0


@pytest.mark.parametrize("moment", ["snapshot-permitted", "last-step", "checkpoint-started"])
def test_a_new_controller_at_the_end(moment: str) -> None:
    world = cluster(total=40)
    world.store.upload_s = 3.0
    world.run_to_step(36)
    world.run_to(moment)
    world.run(0.3)
    world.restart_controller()
    found = succeeded(world)
    assert found["recoveries"] == []


def test_a_node_that_leaves_at_the_end_uploads_first() -> None:
    world = cluster(total=40)
    world.store.upload_s = 4.0
    world.run_to("last-step")
    world.run(0.5)
    node = world.seated(1)
    world.leave(node, 30.0)
    found = succeeded(world)
    assert found["recoveries"] == []


# --- keepers and agents during uploads ------------------------------------------------------------------------------


def test_a_keepers_crash_during_an_upload_repeats_it() -> None:
    world = cluster()
    world.store.upload_s = 2.0
    world.run_to("checkpoint-started")
    world.run(0.5)
    world.crash_keeper(world.seated(1))
    world.run_to("checkpoint-committed")
    assert succeeded(world)["checkpoints"]["failed"] == 0


def test_a_fault_during_an_upload_drops_it() -> None:
    world = cluster()
    world.store.upload_s = 2.0
    world.run_to("checkpoint-started")
    world.run(0.5)
    world.crash_rank(2)
    world.run_to("recovered")
    world.run_to("checkpoint-committed")
    succeeded(world)


def test_resizes_and_checkpoints_together() -> None:
    world = cluster(4, ELASTIC, total=300)
    world.store.upload_s = 1.5
    world.run_to_step(33)
    world.lose_node(world.seated(1), replace_after=None)
    world.run_to("resized")
    world.run(6.0)
    world.add_node()
    world.run_to("resumed")
    world.leave(world.seated(0))
    found = succeeded(world)
    assert [(one["from"], one["to"]) for one in found["resizes"]] == [(4, 3), (3, 4), (4, 3)]
    assert {one.nodes for one in world.store.line} <= {3, 4}


def test_patience_for_the_store_is_a_setting() -> None:
    config = replace(CONFIG, patience=replace(Patience(), final_s=30.0))
    world = cluster(config=config, total=40)
    world.run_to("last-step")
    world.store.trouble = "denied"
    assert "within 30 s" in world.run_to_end().reason


@pytest.mark.parametrize("dies", [False, True], ids=["one controller", "another one"])
def test_a_job_that_is_asked_for_fewer_steps_than_it_has_done_succeeds(dies: bool) -> None:
    """Its ranks wait after a step beyond the last: that is what is snapshot and stored."""
    world = cluster()
    world.run_to_step(33)
    world.run_to("snapshot-committed")
    world.total = 20
    world.crash_rank(0)
    line = world.run_to("restored")
    if dies:
        world.run(0.2)
        world.restart_controller()
    assert world.run(200.0, lambda: world.finished is not None)
    assert world.finished is not None
    assert world.finished.outcome == "succeeded"
    assert world.store.line[-1].generation.step == line.fields["step"]
