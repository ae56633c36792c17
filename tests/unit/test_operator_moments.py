"""What the operator decides at the wrong moment: it was away, the controller has just fallen silent, the head is lost
while the job is suspended, machines are lost as soon as they have Pods."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from outlast import kube
from outlast_operator.model import Call, Create, Delete, Plan, Trouble
from outlast_operator.plan import plan
from support.operator_world import NOW, SETTINGS, World, container, deleted, head, machine, node, pod, resource, word

STORE = {"url": "s3://bucket/training"}
NOTHING_YET = {"step": 0, "best_step": 0, "attempts": 0, "attempt": 0, "phase": "Pending", "snapshot": None}
"""Of a controller that has started no ranks."""


def made(decided: Plan) -> list[str]:
    pods = [action.object for action in decided.actions if isinstance(action, Create)]
    return [obj["metadata"]["name"] for obj in pods if obj["kind"] == "Pod"]


def let_go(decided: Plan) -> list[str]:
    return [action.name for action in decided.actions if isinstance(action, Delete)]


def asked(decided: Plan) -> list[str]:
    return [action.path for action in decided.actions if isinstance(action, Call)]


def uploading(**spec: Any) -> World:
    """A job whose controller has been bringing its last checkpoint to the store for longer than its patience."""
    world = World.training(resource({"checkpoint": STORE, **spec}), checkpoint={"step": 10, "age_s": 5.0})
    world.edit(suspend=True)
    world.step()
    assert world.said is not None
    world.said["suspending"] = True
    world.now += 200
    assert let_go(world.step()) == []
    return world


# --- before the first answer ----------------------------------------------------------------------------------------


def test_nothing_is_decided_before_the_controller_was_asked() -> None:
    world = World.training(resource(workers={"replicas": 3, "spares": 1}))
    for name in [name for name in world.pods if "-node-" in name]:
        world.end(name, "Succeeded")
    world.now += 600
    world.said, world.unasked = None, True
    assert world.look() == Plan(), "it may say that the job is done"
    world.unasked, world.failing_since = False, world.now
    assert len(made(world.look())) == 4, "it does not answer"


def test_a_new_operator_leaves_a_long_upload_alone() -> None:
    world = uploading()
    word, world.said, world.unasked = world.said, None, True
    assert world.look() == Plan()
    world.said, world.unasked = word, False
    assert let_go(world.look()) == []


def test_a_job_that_is_over_is_seen_off_without_any_answer() -> None:
    world = World.training(resource({"ttlSecondsAfterFinished": 10}))
    assert world.said is not None
    world.said |= {"outcome": "succeeded"}
    world.run()
    world.said, world.unasked = None, True
    world.now += 20
    assert [action.kind for action in world.look().actions if isinstance(action, Delete)] == ["TrainingJob"]


def test_a_job_that_was_gathered_unseen_counts_anew_when_it_lacks_a_node() -> None:
    world = World(resource({"checkpoint": STORE}, workers={"replicas": 3, "spares": 0}))
    world.run()
    for name in world.pods:
        world.start(name)
    world.now += 3600  # the operator is away; the job trains
    states = {node(1): "active", node(2): "active", node(3): "lost"}
    world.said = word(states, phase="Recovering", step=9000, best_step=9000)
    world.said["workers"] |= {"ready": 2, "size": 3}
    world.machines = {"m1": machine("m1"), "m2": machine("m2", "Unknown")}
    world.pods[node(3)]["spec"]["nodeName"] = "m2"
    decided = world.step()
    assert (made(decided), let_go(decided)) == ([node(4)], [node(3)])
    world.now += 890
    world.said["attempts"] = 1
    assert let_go(world.step()) == [], "and not in each pass anew"
    world.now += 20
    assert len(let_go(world.step())) == 4, "the fourth Pod is on its way out already"


@pytest.mark.parametrize("store", [True, False])
def test_nodes_that_are_lacking_again_are_not_lacking_still(store: bool) -> None:
    """The attempt that was being prepared when the operator went has trained for an hour."""
    world = World.training(resource({"checkpoint": STORE} if store else {}, workers={"replicas": 3, "spares": 0}))
    assert world.said is not None
    del world.pods[node(3)]
    world.said["nodes"][node(3)]["state"] = "lost"
    world.said |= {"phase": "Recovering", "attempt": 2, "attempts": 1}
    world.said["workers"] |= {"ready": 2}
    world.run()
    world.start(node(4))
    world.said["nodes"] = {name: {"node": name, "state": "active"} for name in (node(1), node(2), node(4))}
    world.said |= {"attempts": 2, "step": 9000, "best_step": 9000}
    world.now += 3600
    del world.pods[node(2)]
    world.said["nodes"][node(2)]["state"] = "lost"
    decided = world.step()
    assert (made(decided), let_go(decided)) == ([node(5)], [])
    assert decided.status is not None
    assert decided.status.phase == "Recovering"


# --- a suspension that is disturbed ---------------------------------------------------------------------------------


def test_one_question_that_fails_does_not_end_an_upload() -> None:
    world = uploading()
    world.failing_since = world.now
    assert let_go(world.step()) == []
    world.now += 74
    assert let_go(world.step()) == []
    world.now += 2
    assert len(let_go(world.step())) == 5


def test_a_suspension_that_was_taken_back_unseen_and_asked_for_again_counts_anew() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.edit(suspend=True)
    world.step()
    world.edit(suspend=False)
    world.edit(suspend=True)
    world.now += 3600
    decided = world.step()
    assert (let_go(decided), asked(decided)) == ([], ["/suspend"])
    world.now += 76
    assert len(let_go(world.step())) == 5


def test_a_head_that_is_lost_meanwhile_gets_a_successor_that_is_told() -> None:
    world = uploading()
    word, world.said = world.said, None
    del world.pods[head(0)]
    decided = world.step()
    assert (made(decided), let_go(decided)) == ([head(5)], [])
    assert ("Service", f"{kube.pod_name('bytelm', 'head', 0).rpartition('-')[0]}") in world.owned
    assert "the head was lost" in world.condition("Suspended").message
    world.now += 100
    world.run()
    assert head(5) in world.pods, "it may take a while"
    world.start(head(5))
    assert word is not None
    world.said = {**word, "suspending": False, "controller": "c2", "phase": "Recovering"}
    assert asked(world.step()) == ["/suspend"]
    world.said["suspending"] = True
    world.now += 3600
    assert let_go(world.step()) == []
    world.said["outcome"] = "suspended"
    assert len(let_go(world.step())) == 5


def test_a_controller_that_is_restarted_meanwhile_is_told_again() -> None:
    """In the same Pod, by Ray; the one before had been uploading for longer than its patience."""
    world = uploading()
    world.failing_since = world.now
    world.step()
    world.now += 20
    world.failing_since = None
    assert world.said is not None
    world.said |= {"suspending": False, "controller": "c2", "stage": "gathering"}
    decided = world.step()
    assert (let_go(decided), asked(decided)) == ([], ["/suspend"])
    world.now += 60
    assert let_go(world.step()) == []
    world.now += 20
    assert len(let_go(world.step())) == 5, "it does nothing"


def test_a_head_that_was_made_just_before_may_take_a_while_to_answer() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.said = None
    del world.pods[head(0)]
    world.step()
    world.now += 10
    world.edit(suspend=True)
    world.step()
    world.now += 100
    assert let_go(world.step()) == []
    world.now += 100
    assert len(let_go(world.step())) == 5


def test_edits_do_not_prolong_a_suspension() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.failing_since = world.now
    world.edit(suspend=True)
    for _ in range(30):
        world.step()
        if world.status.phase == "Suspended":
            break
        world.now += 10
        if world.now < NOW + 70:
            world.edit(activeDeadlineSeconds=10**6 + int(world.now - NOW))
    assert world.now <= NOW + 90


def test_a_head_that_comes_back_while_another_is_made_goes() -> None:
    world = uploading()
    world.machines = {"m1": machine("m1"), "m2": machine("m2", "Unknown", since=world.now - 100)}
    world.pods[head(0)]["spec"]["nodeName"] = "m2"
    world.said = None
    assert (made(decided := world.step()), let_go(decided)) == ([head(5)], [head(0)])


@pytest.mark.parametrize("loss", ["no store", "no nodes"])
def test_a_head_that_could_save_nothing_gets_none(loss: str) -> None:
    world = World.training(resource({} if loss == "no store" else {"checkpoint": STORE}))
    world.edit(suspend=True)
    world.step()
    lost = [head(0)] if loss == "no store" else [name for name in world.pods if name != node(1)]
    for name in lost:
        del world.pods[name]
    if loss == "no nodes":
        world.end(node(1), "Failed")
    world.said = None
    assert made(world.step()) == []
    world.now += 76
    assert world.step().status is not None
    assert world.status.phase == "Suspended"


def test_a_head_that_never_answers_or_is_refused_does_not_hold_up_a_suspension() -> None:
    world = uploading()
    world.said = None
    del world.pods[head(0)]
    observed = replace(world.observed(), trouble=Trouble("QuotaExceeded", "no room", world.now - 80))
    assert len(let_go(plan(observed, SETTINGS, world.now))) == 4, "refused for longer than the patience"
    world.step()
    world.now += 190
    assert let_go(world.step()) == []
    world.now += 10
    assert len(let_go(world.step())) == 5


def test_nodes_that_are_lost_meanwhile_are_not_replaced() -> None:
    world = uploading()
    del world.pods[node(1)]
    assert made(world.step()) == []


@pytest.mark.parametrize("answers", [True, False])
def test_nothing_is_promised_of_a_controller_that_could_not_be_heard(answers: bool) -> None:
    """What was written last may be hundreds of steps old."""
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 40, "age_s": 5.0})
    world.failing_since = None if answers else world.now
    world.now += 600
    world.edit(suspend=True)
    world.step()
    if answers:
        assert world.said is not None
        world.said["outcome"] = "suspended"
    world.now += 80
    decided = world.step()
    suspended = world.condition("Suspended")
    assert suspended.reason == ("Suspended" if answers else "SuspendedWithLoss")
    assert ("nothing is lost" in suspended.message) is answers
    assert ("did not answer" in suspended.message) is not answers
    (told,) = [happening for happening in decided.happenings if happening.reason == "Suspended"]
    assert told.type == ("Normal" if answers else "Warning")


def short_of_nodes() -> World:
    """For longer than startTimeout; done to step 50, 40 of these after the last checkpoint."""
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 10, "age_s": 60.0}, best_step=50)
    assert world.said is not None
    for index in (3, 4):
        del world.pods[node(index)]
        world.said["nodes"][node(index)]["state"] = "lost"
    world.said["workers"] |= {"ready": 2, "spares": 0}
    world.run()
    world.now += 1000
    return world


def given_back() -> World:
    """It has no Pods left."""
    world = short_of_nodes()
    world.run()
    world.said = None
    world.let_go()
    world.run()
    assert not world.pods
    return world


def suspended_word(world: World) -> tuple[str, str]:
    condition = world.condition("Suspended")
    (told, *_) = [one for one in reversed(world.happenings) if one.reason == "Suspended"]
    assert told.type == ("Normal" if condition.reason == "Suspended" else "Warning")
    return world.status.phase, condition.reason


def test_nothing_is_lost_by_a_suspension_between_two_others() -> None:
    """Resumed by mistake: the new Pods have not begun, and nobody can be asked."""
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 40, "age_s": 5.0})
    assert world.said is not None
    world.edit(suspend=True)
    world.step()
    world.said["outcome"] = "suspended"
    world.run()
    world.let_go()
    world.said = None
    world.edit(suspend=False)
    world.run()
    assert len(world.pods) == 5
    world.edit(suspend=True)
    world.run()
    assert suspended_word(world) == ("Suspended", "Suspended")


@pytest.mark.parametrize("asked_again", [False, True])
def test_what_a_giving_back_lost_is_told_once(asked_again: bool) -> None:
    world = given_back()
    if asked_again:
        world.now += 100
        world.run()
        assert world.pods
    world.edit(suspend=True)
    world.run()
    assert suspended_word(world) == ("Suspended", "Suspended")
    assert "step 10 is kept" in world.condition("Suspended").message


def test_a_second_giving_back_loses_nothing_more() -> None:
    world = given_back()
    assert "the 40 steps" in world.condition("Ready").message
    world.now += 100
    world.run()
    world.now += 1000
    world.run()
    assert "2 times in a row" in world.condition("Ready").message
    assert "lost" not in world.condition("Ready").message


def test_a_controllers_end_is_believed_though_its_pod_goes_already() -> None:
    """The status write of the pass that let it go was refused."""
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 40, "age_s": 5.0})
    assert world.said is not None
    world.edit(suspend=True)
    world.step()
    world.said["outcome"] = "suspended"
    before = world.job["status"]
    assert len(let_go(world.step())) == 5
    world.job["status"] = before
    world.step()
    assert suspended_word(world) == ("Suspended", "Suspended")


def test_pods_that_all_went_with_a_job_take_what_they_had() -> None:
    world = World.training(resource({"checkpoint": STORE}), checkpoint={"step": 40, "age_s": 5.0})
    world.pods, world.said = {}, None
    world.edit(suspend=True)
    world.run()
    assert suspended_word(world) == ("Suspended", "SuspendedWithLoss")


@pytest.mark.parametrize("before", ["new", "given back"])
@pytest.mark.parametrize("trouble", ["silent", "head lost", "heard before"])
def test_a_job_that_began_unseen_is_asked_for_its_state(before: str, trouble: str) -> None:
    """Its Pods were made, and the operator went; hours later nobody answers it at first."""
    world = given_back() if before == "given back" else World(resource({"checkpoint": STORE}))
    world.now += 100
    world.run()
    for name in world.pods:
        world.start(name)
    world.machines = {"m1": machine("m1")}
    (first,) = world.names("head")
    nodes = world.live_nodes()
    if trouble == "heard before":
        world.said = word({nodes[0]: "joining"}, **NOTHING_YET)
        world.run()
    world.now += 6 * 3600
    world.edit(suspend=True)
    if trouble == "head lost":
        world.end(first, "Failed")
    else:
        world.failing_since = world.now - 1
    decided = world.step()
    assert let_go(decided) in ([], [first])
    assert len(made(decided)) == (trouble == "head lost")
    if trouble == "head lost":
        world.start(world.names("head")[-1])
        world.said = word({}, stage="gathering", **NOTHING_YET)
        decided = world.step()
        assert (asked(decided), let_go(decided)) == (["/suspend"], []), "its nodes have yet to find it"
    world.failing_since, world.said = None, word(dict.fromkeys(nodes[:3], "active"), step=9000)
    decided = world.step()
    assert (asked(decided), let_go(decided)) == (["/suspend"], [])
    world.end(world.names("head")[-1], "Failed")
    world.said = None
    decided = world.step()
    assert len(made(decided)) == 1
    world.now += 500
    world.step()
    assert suspended_word(world) == ("Suspended", "SuspendedWithLoss")


def test_a_job_whose_nodes_never_ran_is_suspended_at_once() -> None:
    world = World(resource({"checkpoint": STORE}))
    world.run()
    world.edit(suspend=True)
    world.failing_since = world.now
    assert len(let_go(world.step())) == 5
    assert "has not begun" in world.condition("Suspended").message


@pytest.mark.parametrize("coming", [True, False])
def test_a_controller_that_gathers_is_left_alone_while_a_node_is_on_its_way(coming: bool) -> None:
    """A machine with the head and a node was lost: nothing can be saved before there are nodes enough."""
    world = World.training(resource({"checkpoint": STORE}, workers={"replicas": 3, "spares": 0}))
    assert world.said is not None
    world.said |= {"stage": "gathering", "phase": "Recovering", "suspending": True, "attempts": 0}
    world.said["nodes"] = {name: {"node": name, "state": "joining"} for name in (node(1), node(2))}
    world.said["workers"] |= {"ready": 2, "size": 0}
    del world.pods[node(3)]
    if coming:
        world.pods[node(4)] = pod(node(4), "Pending")
    world.edit(suspend=True)
    world.step()
    world.now += 74
    assert let_go(world.step()) == []
    world.now += 2
    assert bool(let_go(world.step())) is not coming
    if not coming:
        assert suspended_word(world)[1] != "Suspended", "nobody knows what those nodes had"
    if coming:
        world.now += 800
        world.said["nodes"][node(4)] = {"node": node(4), "state": "joining"}
        world.said["workers"]["ready"] = 3
        assert let_go(world.step()) == [], "it is about to begin"


@pytest.mark.parametrize("store", [True, False])
def test_nodes_that_lack_do_not_count_during_a_suspension(store: bool) -> None:
    spec = {"checkpoint": STORE} if store else {}
    world = World.training(resource(spec, workers={"replicas": 3, "spares": 0}))
    assert world.said is not None
    del world.pods[node(3)]
    world.said["nodes"][node(3)]["state"] = "lost"
    world.said |= {"phase": "Recovering", "suspending": True}
    world.said["workers"] |= {"ready": 2}
    world.run()
    world.now += 780
    world.edit(suspend=True)
    world.step()
    world.now += 130
    world.step()
    world.edit(suspend=False)
    decided = world.step()
    assert (world.status.phase, let_go(decided)) == ("Recovering", [])
    world.now += 880
    assert let_go(world.step()) == []
    world.now += 30
    world.step()
    assert world.status.phase == ("Pending" if store else "Failed")


# --- who is believed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stuck", [0, 4])
def test_nodes_stuck_on_a_dead_machine_say_nothing_of_a_controller_that_is_cut_off(stuck: int) -> None:
    world = World.training(resource(workers={"replicas": 3, "spares": 0}))
    assert world.said is not None
    for index in range(50, 50 + stuck):
        world.pods[node(index)] = deleted(pod(node(index), machine="dead", ready=False))
        world.said["nodes"][node(index)] = {"node": node(index), "state": "lost", "gone_s": 5000.0}
        world.machines["dead"] = machine("dead", "Unknown", since=NOW - 5000)
    world.run()
    for name in (node(1), node(2), node(3)):
        world.said["nodes"][name] = {"node": name, "state": "lost", "gone_s": 11.0}
    world.said["workers"] |= {"ready": 0, "size": 3}
    assert let_go(world.look()) == []


def test_a_second_node_without_power_is_replaced_though_the_first_is_called_ready_still() -> None:
    world = World.training(resource(workers={"replicas": 5, "spares": 0}))
    assert world.said is not None
    world.pods[node(1)] = deleted(world.pods[node(1)])
    for name, seconds in ((node(1), 24.0), (node(2), 12.0)):
        world.said["nodes"][name] = {"node": name, "state": "lost", "gone_s": seconds}
    world.pods[node(6)] = pod(node(6))
    assert made(world.step()) == [node(7)]


@pytest.mark.parametrize("other", [None, "Failed", "Terminating"])
def test_a_pod_that_is_over_says_nothing_of_machines_that_are_all_lost(other: str | None) -> None:
    world = World.training(resource(workers={"replicas": 3, "spares": 0}))
    for name, place in zip(sorted(world.pods), ("m1", "m1", "m2", "m2"), strict=True):
        world.pods[name]["spec"]["nodeName"] = place
    world.machines = {name: machine(name) for name in ("m1", "m2", "m3")}
    if other == "Failed":
        world.pods[node(90)] = pod(node(90), "Failed", machine="m3")
        world.end(node(90), "Failed")
    elif other == "Terminating":
        world.pods[node(90)] = deleted(pod(node(90), machine="m3"))
    world.run()
    world.lose_machine("m1")
    world.lose_machine("m2")
    assert (made(world.look()), let_go(world.look())) == ([], [])


def test_a_node_is_no_head_whatever_the_status_says() -> None:
    world = World.training()
    world.job["status"]["head"], world.said = node(1), None
    assert head(0) not in let_go(world.look())


def test_a_machine_whose_clock_is_ahead_holds_no_successor_up() -> None:
    world = World.training(resource(workers={"replicas": 3, "spares": 0}))
    world.end(node(1), "Succeeded")
    (ended,) = world.pods[node(1)]["status"]["containerStatuses"]
    ended["state"]["terminated"]["finishedAt"] = "2099-01-01T00:00:00Z"
    again_in = world.look().again_in_s
    assert again_in is not None
    assert again_in <= 5


# --- Pods that cannot live ------------------------------------------------------------------------------------------


def test_pods_on_a_machine_that_is_lost_are_made_ever_more_slowly() -> None:
    """A template that tolerates everything, or names its machine, has each successor on the same dead one."""
    world = World.training(resource(workers={"replicas": 1, "spares": 0}))
    world.machines |= {"m2": machine("m2")}
    world.pods[node(1)]["spec"]["nodeName"] = "m2"
    world.lose_machine("m2")
    counts = []
    for _ in range(4):
        until = world.now + 60
        before = len(world.made)
        while world.now < until:
            for name in made(world.step()):
                world.start(name, at="m2", ready=False)
            world.now += 1
        counts.append(len(world.made) - before)
    assert counts[0] <= 5, "at once, at once, after 10 s, after 20 s"
    assert counts[-1] <= 1


def test_a_pod_that_was_lost_with_its_machine_after_hours_is_replaced_at_once() -> None:
    world = World.training(resource(workers={"replicas": 3, "spares": 0}))
    for _ in range(3):
        names = [name for name in world.live_nodes() if world.pods[name]["spec"].get("nodeName") == "m1"]
        world.machines["m2"] = machine("m2", "Unknown", since=world.now)
        world.pods[names[0]]["spec"]["nodeName"] = "m2"
        (successor,) = made(world.step())
        world.start(successor)
        world.let_go()
        world.now += 7200


# --- giving back ----------------------------------------------------------------------------------------------------


def test_giving_back_says_what_the_nodes_memory_had() -> None:
    world = short_of_nodes()
    world.step()
    assert (
        "the 40 steps that were done after the newest checkpoint (step 10) are lost" in world.condition("Ready").message
    )


@pytest.mark.parametrize(("trained", "phase"), [(True, "Pending"), (False, "Failed")])
def test_a_registry_that_is_away_fails_no_job_that_has_trained(trained: bool, phase: str) -> None:
    spec = resource({"checkpoint": STORE}, workers={"replicas": 3, "spares": 0})
    world = World.training(spec) if trained else World(spec)
    if trained:
        assert world.said is not None
        del world.pods[node(3)]
        world.said["nodes"][node(3)]["state"] = "lost"
        world.said["workers"] |= {"ready": 2}
    world.run()
    for one in world.pods.values():
        if one["status"]["phase"] == "Pending":
            one["status"]["containerStatuses"] = [container(waiting={"reason": "ImagePullBackOff", "message": "503"})]
    world.step()
    world.now += 1000
    decided = world.step()
    assert decided.status is not None
    assert decided.status.phase == phase


def test_while_pods_are_not_asked_for_it_is_still_said_what_was_in_the_way() -> None:
    world = World(resource())
    world.run()
    for one in world.pods.values():
        unfit = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 machines"}
        one["status"]["conditions"] = [unfit]
    world.step()
    world.now += 1000
    world.run()
    for _ in range(3):
        world.now += 10
        world.step()
        assert (ready := world.condition("Ready")).reason == "WaitingToRetry"
        assert "0/3 machines" in ready.message


def test_a_recovery_from_a_lost_head_is_told_when_it_is_over() -> None:
    """The new controller knows of no recovery: it was not there."""
    world = World.training(resource({"checkpoint": STORE}))
    said, world.said = world.said, None
    assert said is not None
    del world.pods[head(0)]
    world.run()
    assert world.condition("Recovering").reason == "HeadLost"
    (name,) = world.names("head")
    world.start(name)
    world.said = {**said, "controller": "c2", "phase": "Starting", "attempts": 2, "attempt": 2}
    world.run()
    assert world.condition("Recovering").status == "True"
    world.said["phase"] = "Running"
    world.run()
    over = world.condition("Recovering")
    assert (over.status, over.reason) == ("False", "Recovered")
    assert over.message == "the head was lost: the next one has gathered the nodes"


# --- what is told too often -----------------------------------------------------------------------------------------


def test_failures_of_one_second_are_written_once() -> None:
    told = [
        {"cause": "rank-crash", "text": f"boom {at}", "time": NOW - 10 + min(at, 1), "rank": at} for at in range(12)
    ]
    world = World.training(failures=told)
    world.run()
    kept = world.status.failures
    for _ in range(4):
        assert not world.step().urgent
        assert world.status.failures == kept


# --- the store ------------------------------------------------------------------------------------------------------

DENIED = "the store does not answer: s3://bucket: connection refused"


def test_a_job_that_waits_for_its_store_says_so() -> None:
    world = World.training(resource({"checkpoint": STORE}), phase="Pending", stage="waiting", attempts=0, attempt=0)
    assert world.said is not None
    world.said["store_trouble"] = {"text": DENIED, "s": 1.0}
    decided = world.step()
    ready = world.condition("Ready")
    assert (ready.status, ready.reason) == ("False", "WaitingForStore")
    assert DENIED in ready.message
    assert [(told.type, told.reason) for told in decided.happenings] == [("Warning", "WaitingForStore")]


def test_a_job_that_trains_without_its_store_says_so_while_that_lasts() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    assert world.said is not None
    told = []
    for seconds in (3.0, 20.0, 50.0, None):
        world.said["store_trouble"] = None if seconds is None else {"text": DENIED, "s": seconds}
        told += [happening.reason for happening in world.step().happenings]
        ready = world.condition("Ready")
        assert (ready.status, ready.reason == "StoreUnavailable") == ("True", seconds in (20.0, 50.0))
    assert told == ["StoreUnavailable"], "once, and its end is no news"


def test_nodes_that_have_no_seats_yet_are_no_spares() -> None:
    states = {node(index): "spare" for index in (1, 2, 3, 4)}
    world = World.training()
    world.said = word(states, phase="Starting")
    world.step()
    workers = world.status.workers
    assert (workers.ready, workers.wanted, workers.spares) == (4, 3, 1)
