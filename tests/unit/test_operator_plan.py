"""What the operator decides, one promise a test: Pods, resource, controller's word in, plan out."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest

from outlast import kube
from outlast.api import TrainingJob
from outlast_operator.model import Apply, Call, Create, Delete, Plan, Trouble
from outlast_operator.objects import agrees
from outlast_operator.plan import plan
from support.operator_world import (
    NAME,
    NOW,
    SETTINGS,
    TOKEN,
    World,
    container,
    deleted,
    head,
    machine,
    node,
    pod,
    resource,
    word,
)

STORE = {"url": "s3://bucket/training"}


def kinds(decided: Plan) -> list[str]:
    """The plan's actions as short words."""

    def short(action: Any) -> str:
        match action:
            case Create() | Apply():
                return f"{type(action).__name__} {action.object['kind']} {action.object['metadata']['name']}"
            case Delete():
                return f"Delete {action.kind} {action.name}"
            case _:
                return f"{action.method} {action.path}"

    return [short(action) for action in decided.actions]


def created(decided: Plan) -> list[str]:
    return [text.rpartition(" ")[2] for text in kinds(decided) if text.startswith("Create Pod")]


def deletes(decided: Plan) -> list[str]:
    return [text.rpartition(" ")[2] for text in kinds(decided) if text.startswith("Delete Pod")]


def calls(decided: Plan) -> list[Call]:
    return [action for action in decided.actions if isinstance(action, Call)]


def reasons(decided: Plan) -> list[str]:
    return [happening.reason for happening in decided.happenings]


def ready(decided: Plan) -> Any:
    assert decided.status is not None
    return next(one for one in decided.status.conditions if one.type == "Ready")


# --- a job begins ---------------------------------------------------------------------------------------------------


def test_a_new_job_gets_its_objects_before_its_pods() -> None:
    world = World(resource())
    first = world.step()
    assert kinds(first) == [
        "Create Secret bytelm-outlast",
        "Apply NetworkPolicy bytelm",
        "Apply PodDisruptionBudget bytelm",
        "Apply Service bytelm-head",
        f"Create Pod {head(0)}",
        *(f"Create Pod {node(index)}" for index in (1, 2, 3, 4)),
    ]
    assert first.urgent
    assert reasons(first) == ["PodsMade"]
    assert first.status is not None
    assert (first.status.head, first.status.next_pod) == (head(0), 5)
    assert first.status.selector == "outlast.dev/job=bytelm,outlast.dev/role=node"
    assert kinds(world.step()) == []


def test_a_job_being_deleted_is_left_to_the_garbage_collector() -> None:
    assert World(resource(deletionTimestamp="2026-01-01T00:00:00Z")).look() == Plan()


def test_the_token_is_made_once_and_the_job_is_kept_up_to_date() -> None:
    world = World.training()
    secret = world.owned[("Secret", "bytelm-outlast")]
    token = base64.b64decode(secret["data"][kube.TOKEN_KEY]).decode()
    assert token.startswith(TOKEN)
    world.edit(recovery={"maxRestarts": 7})
    assert "Apply Secret bytelm-outlast" in kinds(world.step())
    secret = world.owned[("Secret", "bytelm-outlast")]
    assert base64.b64decode(secret["data"][kube.TOKEN_KEY]).decode() == token
    kept = TrainingJob.model_validate(json.loads(base64.b64decode(secret["data"][kube.JOB_KEY])))
    assert kept.spec.recovery.max_restarts == 7
    assert (kept.metadata.name, kept.metadata.uid) == (NAME, world.job["metadata"]["uid"])
    assert kinds(world.step()) == []


def test_a_job_without_a_token_to_draw_is_a_bug_of_the_caller() -> None:
    with pytest.raises(ValueError, match="new_token"):
        plan(replace(World(resource()).observed(), new_token=""), SETTINGS, NOW)


@pytest.mark.parametrize("kind", ["Service", "NetworkPolicy", "PodDisruptionBudget"])
def test_what_somebody_else_changed_is_applied_again(kind: str) -> None:
    world = World.training()
    key = next(key for key in world.owned if key[0] == kind)
    world.owned[key]["spec"]["selector" if kind != "NetworkPolicy" else "podSelector"] = {"other": "thing"}
    assert kinds(world.step()) == [f"Apply {kind} {key[1]}"]
    assert kinds(world.step()) == []


def test_what_the_api_server_leaves_out_because_it_is_empty_is_there() -> None:
    assert agrees({"spec": {"selector": {}, "ports": [{"port": 1}]}}, {"spec": {"ports": [{"port": 1, "name": "x"}]}})
    assert not agrees({"spec": {"selector": {"a": "b"}}}, {"spec": {}})
    assert not agrees({"spec": {}}, {"spec": "text"})


def test_pods_of_another_job_of_the_same_name_use_up_indices_only() -> None:
    other = pod(node(8))
    other["metadata"]["ownerReferences"][0]["uid"] = "another"
    world = World(resource(), pods={node(8): other})
    assert created(world.step()) == [head(9), *(node(index) for index in (10, 11, 12, 13))]


# --- Pods and machines are lost -------------------------------------------------------------------------------------


def lose_nothing(world: World) -> None:
    """The control: nothing happens."""


def vanish(world: World) -> None:
    del world.pods[node(2)]


def fail(world: World) -> None:
    world.end(node(2), "Failed")


def evict(world: World) -> None:
    world.end(node(2), "Failed")
    world.pods[node(2)]["status"] |= {"reason": "Evicted", "message": "The node was low on resource: memory."}


def succeed(world: World) -> None:
    world.end(node(2), "Succeeded")
    world.now += 6


def delete(world: World) -> None:
    world.pods[node(2)] = deleted(world.pods[node(2)])


def on_other_machine(world: World, **state: Any) -> None:
    world.pods[node(2)]["spec"]["nodeName"] = "m2"
    world.machines["m2"] = machine("m2", **state)


def not_ready(world: World) -> None:
    on_other_machine(world, ready="False")


def unknown(world: World) -> None:
    on_other_machine(world, ready="Unknown")


def unreachable(world: World) -> None:
    on_other_machine(world, taints=("node.kubernetes.io/unreachable",))


def out_of_service(world: World) -> None:
    on_other_machine(world, taints=("node.kubernetes.io/out-of-service",))


def shut_down(world: World) -> None:
    on_other_machine(world, taints=("node.cloudprovider.kubernetes.io/shutdown",))


def machine_gone(world: World) -> None:
    world.pods[node(2)]["spec"]["nodeName"] = "m2"
    assert world.said is not None
    world.said["nodes"][node(2)]["state"] = "lost"


@pytest.mark.parametrize(
    ("loss", "replaced", "let_go"),
    [
        (lose_nothing, [], []),
        (vanish, [node(5)], []),
        (fail, [node(5)], []),
        (evict, [node(5)], []),
        (succeed, [node(5)], []),
        (delete, [node(5)], []),
        (not_ready, [node(5)], [node(2)]),
        (unknown, [node(5)], [node(2)]),
        (unreachable, [node(5)], [node(2)]),
        (out_of_service, [node(5)], [node(2)]),
        (shut_down, [node(5)], [node(2)]),
        (machine_gone, [node(5)], [node(2)]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_lost_node_is_replaced_at_once_under_a_new_name(loss: Any, replaced: list[str], let_go: list[str]) -> None:
    world = World.training()
    loss(world)
    decided = world.step()
    assert (created(decided), deletes(decided)) == (replaced, let_go)
    assert decided.urgent == bool(replaced)
    assert reasons(decided) == ([] if not replaced or loss is vanish else ["PodReplaced"])
    assert decided.status is not None
    assert decided.status.next_pod == (6 if replaced else 5)
    assert not created(world.step())


def test_why_a_pod_was_replaced_is_told() -> None:
    world = World.training()
    not_ready(world)
    (told,) = world.step().happenings
    assert told.message == f"{node(5)} replaces {node(2)}, which is on m2, which is not ready"


def test_a_machine_that_cannot_be_seen_is_not_lost_by_itself() -> None:
    world = World.training()
    world.machines.clear()
    assert kinds(world.step()) == []


def test_a_node_that_its_controller_has_not_heard_for_long_is_replaced_before_its_machine_is_missed() -> None:
    world = World.training()
    assert world.said is not None
    world.said["nodes"][node(2)] |= {"state": "lost", "gone_s": 4.0}
    decided = world.step()
    assert created(decided) == []
    assert decided.again_in_s == pytest.approx(6.0, abs=0.1)
    world.now += 6.0
    world.said["nodes"][node(2)]["gone_s"] = 10.0
    decided = world.step()
    assert (created(decided), deletes(decided)) == ([node(5)], [node(2)])
    assert "does not hear any more" in decided.happenings[0].message


def test_a_node_whose_container_starts_again_is_waited_for() -> None:
    world = World.training()
    assert world.said is not None
    world.said["nodes"][node(2)] |= {"state": "lost", "gone_s": 60.0}
    world.pods[node(2)]["status"]["conditions"] = [{"type": "Ready", "status": "False"}]
    assert created(world.step()) == []


def test_a_controller_that_hears_only_half_of_its_nodes_may_be_cut_off_itself() -> None:
    world = World.training()
    assert world.said is not None
    for index in (2, 3):
        world.said["nodes"][node(index)] |= {"state": "lost", "gone_s": 60.0}
    assert created(world.step()) == []


def test_a_pod_that_waits_for_a_machine_is_not_lost() -> None:
    world = World.training()
    world.pods[node(3)] = pod(node(3), "Pending", machine="")
    assert created(world.step()) == []


def test_a_deleted_pod_on_a_dead_machine_is_not_replaced_twice() -> None:
    world = World.training()
    unknown(world)
    world.run()
    assert world.pods[node(2)]["metadata"]["deletionTimestamp"], "it goes when the machine returns"
    assert world.names("node") == [node(index) for index in (1, 3, 4, 5)]


def test_indices_that_only_the_controller_remembers_are_not_used_again() -> None:
    world = World.training()
    assert world.said is not None
    world.said["nodes"][node(11)] = {"node": node(11), "state": "lost"}
    del world.pods[node(1)]
    assert created(world.step()) == [node(12)]


def test_nodes_that_end_with_the_job_are_not_replaced_before_its_outcome_is_heard() -> None:
    world = World.training()
    world.end(node(2), "Succeeded")
    decided = world.step()
    assert created(decided) == []
    assert decided.again_in_s == pytest.approx(5.0)


def test_all_machines_lost_at_once_are_not_believed_while_the_head_answers() -> None:
    world = World.training()
    world.pods[node(2)]["spec"]["nodeName"] = "m2"
    for name in ("m1", "m2"):
        world.lose_machine(name)
    assert kinds(world.step()) == [], "the API server has lost sight of machines that train"
    world.now += 600
    assert kinds(world.step()) == [], "the controller has answered since"
    world.failing_since, world.said = world.now, None
    decided = world.step()
    assert len(created(decided)) == 5
    assert len(deletes(decided)) == 5


def test_a_single_machine_that_is_lost_is_believed() -> None:
    world = World.training()
    world.lose_machine("m1")
    assert len(created(world.step())) == 5


def test_pods_that_cannot_live_are_made_again_ever_more_slowly() -> None:
    world = World.training(resource(workers={"replicas": 1, "spares": 0}))
    pauses, at = [], world.now
    for _ in range(5):
        (name,) = world.names("node")
        world.end(name, "Failed", after_s=1)
        ended = world.now
        decided = world.step()
        while not created(decided):
            assert decided.again_in_s is not None
            world.now += decided.again_in_s
            decided = world.step()
        pauses.append(round(world.now - ended))
        world.now += 1
    assert pauses == [0, 10, 20, 40, 80]
    assert world.now > at


@pytest.mark.parametrize(("replicas", "bad"), [(3, 1), (3, 3), (24, 1), (24, 8), (64, 64)])
def test_bad_places_have_pauses_of_their_own_however_large_the_job_is(replicas: int, bad: int) -> None:
    """Everything that ends soon on ``bad`` of the places, and a look every second for two minutes."""
    world = World.training(resource(workers={"replicas": replicas, "spares": 0}))
    failing, made = set(world.names("node")[:bad]), 0
    for _ in range(120):
        for name in failing & set(world.names("node")):
            world.end(name, "Failed", after_s=1)
        new = created(world.step())
        made, failing = made + len(new), failing | set(new)
        assert len(world.pods) <= 3 * replicas + 21, "not all of them are kept"
        world.now += 1
    # At once, then after 10, 20 and 40 s.
    assert made == 4 * bad


def test_a_place_that_is_waited_for_is_not_forgotten_for_others_that_end() -> None:
    """The head's Pods end as well, and those of other places, which have successors soon."""
    world = World.training(resource(workers={"replicas": 24, "spares": 0}))
    made = 0
    for _ in range(300):
        for name in [*world.names("head"), *world.names("node")]:
            world.end(name, "Failed", after_s=1)
        made += len(created(world.step()))
        world.now += 1
    # At once, then after 10, 20, 40, 80 and 160 s.
    assert made <= 6 * 25


def test_a_place_whose_pods_cannot_live_does_not_hold_up_others() -> None:
    world = World.training()
    for _ in range(2):
        (bad,) = [name for name in world.names("node") if name not in (node(1), node(3), node(4))]
        world.end(bad, "Failed", after_s=1)
        world.step()
    assert len(world.names("node")) == 3, "it is waited for"
    world.now += 1
    world.end(node(3), "Failed")
    (new,) = created(world.step())
    assert world.pods[new]["metadata"]["annotations"][kube.REPLACES_ANNOTATION] == node(3)
    world.now += 10
    (new,) = created(world.step())
    annotations = world.pods[new]["metadata"]["annotations"]
    assert (annotations[kube.REPLACES_ANNOTATION], annotations[kube.ENDED_SOON_ANNOTATION]) == (bad, "2")


def test_ended_pods_are_kept_for_their_logs_and_not_for_ever() -> None:
    world = World.training()
    world.end(node(2), "Failed")
    world.run()
    assert node(2) in world.pods
    world.now += 601
    assert deletes(world.step()) == [node(2)]


# --- the head -------------------------------------------------------------------------------------------------------


def lose_head(world: World) -> None:
    del world.pods[head(0)]


def end_head(world: World) -> None:
    world.end(head(0), "Failed")


def delete_head(world: World) -> None:
    world.pods[head(0)] = deleted(world.pods[head(0)])


def power_off_head(world: World) -> None:
    world.pods[head(0)]["spec"]["nodeName"] = "m2"
    world.machines["m2"] = machine("m2", "Unknown")


@pytest.mark.parametrize("loss", [lose_head, end_head, delete_head, power_off_head])
def test_a_lost_head_is_replaced_at_once_and_found_under_the_same_name(loss: Any) -> None:
    world = World.training()
    loss(world)
    decided = world.step()
    assert created(decided) == [head(5)]
    assert kinds(decided)[0] == "Apply Service bytelm-head"
    assert decided.status is not None
    assert decided.status.head == head(5)
    assert decided.status.phase == "Recovering"
    assert world.owned[("Service", "bytelm-head")]["spec"]["selector"][kube.POD_LABEL] == head(5)
    assert "HeadReplaced" in reasons(decided)
    world.said = None
    assert created(world.run()) == []
    assert world.names("head") == [head(5)]


def test_a_head_that_an_interrupted_pass_has_made_is_taken() -> None:
    world = World.training()
    before = world.job["status"]
    del world.pods[head(0)]
    world.step()
    world.job["status"] = before
    decided = world.step()
    assert created(decided) == []
    assert decided.status is not None
    assert decided.status.head == head(5)


def test_of_two_heads_the_one_not_in_force_goes() -> None:
    world = World.training()
    world.pods[head(7)] = pod(head(7))
    assert deletes(world.step()) == [head(7)]


def test_another_heads_word_is_not_believed() -> None:
    world = World.training()
    observed = world.observed()
    other = replace(observed.controller, pod=head(9), status=word(outcome="succeeded"))
    decided = plan(replace(observed, controller=other), SETTINGS, world.now)
    assert decided.status is not None
    assert decided.status.phase != "Succeeded"


# --- another size ---------------------------------------------------------------------------------------------------


def test_more_nodes_are_made_and_the_controller_is_told() -> None:
    world = World.training()
    world.edit(workers={"replicas": 5, "spares": 1})
    decided = world.step()
    assert created(decided) == [node(5), node(6)]
    assert calls(decided) == [Call("POST", "/resize", {"replicas": 5, "minReplicas": None, "spares": 1})]


def test_fewer_nodes_wait_for_the_controller_to_name_who_left() -> None:
    world = World.training()
    world.edit(workers={"replicas": 2, "spares": 1})
    decided = world.step()
    assert (deletes(decided), [call.path for call in calls(decided)]) == ([], ["/resize"])
    assert world.said is not None
    world.said["workers"] |= {"wanted": 2, "least": 2}
    world.said["nodes"][node(4)]["state"] = "leaving"
    assert kinds(world.step()) == []
    world.said["nodes"][node(4)]["state"] = "left"
    assert kinds(world.step()) == [f"Delete Pod {node(4)}"]
    world.let_go()
    assert kinds(world.step()) == [f"DELETE /nodes/{node(4)}"]
    del world.said["nodes"][node(4)]
    assert kinds(world.step()) == []
    assert world.names("node") == [node(1), node(2), node(3)]


def test_while_the_controller_objects_to_fewer_nodes_it_keeps_as_many_and_says_why() -> None:
    """With one of its nodes lost it would wait for ever: three are left, and it goes on with four."""
    world = World.training(resource(workers={"replicas": 4, "spares": 0}))
    world.edit(workers={"replicas": 1, "spares": 0})
    assert [call.path for call in calls(world.step())] == ["/resize"]
    assert world.said is not None
    world.said["nodes"][node(4)]["state"] = "lost"
    world.pods.pop(node(4))
    text = "/resize: 1 nodes are too small for the job"
    decided = plan(replace(world.observed(), objection=text), SETTINGS, NOW)
    assert created(decided) == [node(5)]
    assert ready(decided).reason == "ResizeRefused"
    assert text in ready(decided).message
    assert "/resize" in [call.path for call in calls(decided)], "it is asked again"
    assert created(plan(world.observed(), SETTINGS, NOW)) == []


def test_fewer_spares_are_told_though_no_other_number_changes() -> None:
    world = World.training()
    world.edit(workers={"replicas": 3, "spares": 0})
    assert [call.path for call in calls(world.step())] == ["/resize"]
    assert len(world.live_nodes()) == 4


def test_another_number_of_spares_is_told() -> None:
    world = World.training()
    assert world.said is not None
    world.said["workers"]["wanted_spares"] = 1
    assert calls(world.step()) == []
    world.edit(workers={"replicas": 3, "spares": 2})
    assert [call.path for call in calls(world.step())] == ["/resize"]


def test_surplus_pods_that_no_controller_knows_go_newest_first() -> None:
    world = World.training()
    world.edit(workers={"replicas": 5, "spares": 1})
    world.step()
    world.edit(workers={"replicas": 3, "spares": 1})
    assert deletes(world.step()) == [node(6), node(5)]


def test_without_any_controller_the_newest_go() -> None:
    world = World(resource())
    world.run()
    world.edit(workers={"replicas": 1, "spares": 1})
    assert deletes(world.step()) == [node(4), node(3)]


def test_while_the_controller_is_gone_nobody_is_chosen() -> None:
    world = World.training()
    world.said, world.failing_since = None, world.now
    world.edit(workers={"replicas": 1, "spares": 1})
    assert deletes(world.step()) == []


def test_the_failure_domains_that_are_asked_for_are_told() -> None:
    label = "topology.kubernetes.io/zone"
    world = World.training(resource(workers={"failureDomain": label}))
    assert world.said is not None
    world.machines["m1"]["metadata"]["labels"] = {label: "north"}
    world.pods[node(1)]["spec"]["nodeName"] = "m2"
    world.machines["m2"] = machine("m2")
    world.said["unplaced"] = ["m1", "m2", "m3"]
    assert calls(world.step()) == [Call("PUT", "/domains", {"m1": "north", "m2": "m2"})]


def test_a_controller_that_does_not_answer_is_not_called() -> None:
    world = World.training()
    assert world.said is not None
    world.said["unplaced"] = ["m1"]
    world.failing_since = world.now
    assert calls(world.step()) == []


def test_nodes_are_forgotten_once_their_pods_are_gone() -> None:
    world = World.training()
    assert world.said is not None
    for index in (11, 12):
        world.said["nodes"][node(index)] = {"state": "lost"}
    world.pods[node(12)] = deleted(pod(node(12)))
    assert [call.path for call in calls(world.step())] == [f"/nodes/{node(11)}"]


# --- enough nodes or none -------------------------------------------------------------------------------------------


def starved(spec: dict[str, Any] | None = None, joined: int = 2, **said: Any) -> World:
    """A job of three nodes and a spare that has only ``joined``."""
    world = World(resource({"checkpoint": STORE, **(spec or {})}))
    world.run()
    for name in list(world.pods):
        if name == head(0) or kube.pod_index(name) <= joined:
            world.start(name)
    states = {node(index): "joining" for index in range(1, joined + 1)}
    world.said = word(states, **({"phase": "Pending", "step": 0, "best_step": 0, "attempts": 0, "attempt": 0} | said))
    world.said["snapshot"] = said.get("snapshot")
    world.run()
    return world


def test_too_few_nodes_are_given_back_and_asked_for_again_ever_later() -> None:
    world = starved()
    delays = []
    for failures in range(1, 7):
        looked = world.look()
        assert looked.again_in_s is not None
        world.now += looked.again_in_s
        decided = world.step()
        assert len(deletes(decided)) == 5, "all or nothing: the head too"
        assert reasons(decided) == ["GivenBack"]
        assert decided.status is not None
        assert (decided.status.start.failures, decided.status.phase, decided.status.head) == (failures, "Pending", None)
        assert ready(decided).reason == "GivenBack"
        world.let_go()
        world.said = None
        waiting = world.run()
        assert not world.pods
        assert waiting.again_in_s is not None
        delays.append(round(waiting.again_in_s))
        world.now += waiting.again_in_s
        assert len(created(world.step())) == 5
    assert delays == [60, 120, 240, 480, 900, 900]


def test_enough_nodes_end_the_count() -> None:
    world = starved()
    world.now += 900
    world.step()
    world.let_go()
    world.now += 61
    world.step()
    for name in list(world.pods):
        world.start(name)
    fresh = [name for name in world.pods if "-node-" in name]
    world.said = word(dict.fromkeys(fresh, "joining"), phase="Pending")
    assert world.status.start.failures == 1
    world.run()
    assert world.status.start.failures == 0
    assert world.status.start.since is None


@pytest.mark.parametrize(("least", "short"), [(None, True), (3, True), (2, False)])
def test_what_is_enough_is_min_replicas(least: int | None, short: bool) -> None:
    world = World(resource({"checkpoint": STORE}, workers={} if least is None else {"minReplicas": least}))
    world.run()
    world.start(head(0))
    world.said = word({node(1): "joining", node(2): "joining"})
    world.run()
    assert (world.status.start.since is not None) == short


def trains_on_three_of_five(spec: dict[str, Any], asked: dict[str, Any]) -> World:
    """More nodes were asked for, and the controller has heard of it."""
    world = World.training(resource(spec))
    world.edit(workers={**world.spec["workers"], **asked})
    assert world.said is not None
    world.said["workers"] |= {"wanted": 5, "least": 5}
    world.run()
    return world


@pytest.mark.parametrize("spec", [{"checkpoint": STORE}, {}], ids=["with a store", "from memory alone"])
@pytest.mark.parametrize("asked", [{"replicas": 5}, {"replicas": 5, "minReplicas": 5}], ids=str)
def test_an_operator_that_has_heard_nothing_yet_knows_what_a_job_trains_on(
    spec: dict[str, Any], asked: dict[str, Any]
) -> None:
    """It began after more were asked for, and cannot reach the head."""
    world = trains_on_three_of_five(spec, asked)
    world.failing_since, world.said = world.now, None
    for _ in range(40):
        decided = world.run()
        assert deletes(decided) == []
        world.now += 60
    assert world.status.phase == "Running"
    assert ready(decided).reason == "ControllerSilent"


@pytest.mark.parametrize("spec", [{"checkpoint": STORE}, {}], ids=["with a store", "from memory alone"])
@pytest.mark.parametrize("asked", [{"replicas": 5}, {"replicas": 5, "minReplicas": 5}], ids=str)
def test_a_job_that_trains_waits_for_more_nodes_as_long_as_it_takes(
    spec: dict[str, Any], asked: dict[str, Any]
) -> None:
    world = trains_on_three_of_five(spec, asked)
    world.now += 5000
    decided = world.run()
    assert deletes(decided) == []
    assert (world.status.phase, world.status.start.since) == ("Running", None)
    assert "on 3 nodes, while 5 are wanted" in ready(decided).message


def test_a_job_whose_state_is_in_memory_alone_is_not_given_back() -> None:
    world = starved(
        {"checkpoint": None}, snapshot={"step": 30, "age_s": 1.0}, attempts=1, attempt=1, phase="Recovering"
    )
    world.now += 899
    assert deletes(world.step()) == []
    world.now += 2
    decided = world.step()
    assert decided.status is not None
    assert decided.status.phase == "Failed"
    failed = world.condition("Failed")
    assert failed.reason == "StartTimeout"
    assert "only state is in its nodes' memory" in failed.message
    assert "spec.checkpoint" in failed.message


def test_without_any_state_nothing_is_lost_by_giving_back() -> None:
    world = starved({"checkpoint": None})
    world.now += 900
    assert reasons(world.step()) == ["GivenBack"]


def test_pods_that_are_ready_count_while_the_controller_is_silent() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.failing_since = world.now
    world.now += 5000
    decided = world.run()
    assert deletes(decided) == []
    assert world.status.start.since is None
    assert (ready(decided).status, ready(decided).reason) == ("Unknown", "ControllerSilent")
    assert decided.again_in_s is None, "nothing of it is looked at for the sake of time alone"


WAITING = {
    "ErrImagePull": "ImagePullBackOff",
    "ImagePullBackOff": "ImagePullBackOff",
    "InvalidImageName": "InvalidImageName",
    "CreateContainerConfigError": "CreateContainerConfigError",
    "RunContainerError": "RunContainerError",
    "CrashLoopBackOff": "CrashLoopBackOff",
}


@pytest.mark.parametrize("raw", WAITING)
def test_what_no_waiting_mends_is_named_at_once_and_fails_the_job_in_time(raw: str) -> None:
    world = World(resource({"checkpoint": STORE, "recovery": {"startTimeout": "2m"}}))
    world.run()
    for name in list(world.pods):
        world.start(name, ready=False)
        world.pods[name]["status"]["containerStatuses"] = [
            container(waiting={"reason": raw, "message": "the very words"})
        ]
    decided = world.step()
    assert decided.urgent
    assert ready(decided).reason == WAITING[raw]
    if raw != "CrashLoopBackOff":
        assert "the very words" in ready(decided).message
    assert "and 4 more" in ready(decided).message
    assert reasons(decided) == [WAITING[raw]]
    assert not world.step().happenings, "once"
    world.now += 121
    failed = world.step()
    assert failed.status is not None
    assert failed.status.phase == "Failed"
    assert world.condition("Failed").reason == WAITING[raw]
    assert len(deletes(world.step())) == 5, "they would crash for ever"


def test_unschedulable_pods_are_given_back() -> None:
    world = World(resource({"checkpoint": STORE}))
    world.run()
    for name in world.pods:
        world.pods[name]["status"]["conditions"] = [
            {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}
        ]
    decided = world.step()
    assert ready(decided).reason == "Unschedulable"
    assert "0/3 nodes are available" in ready(decided).message
    world.now += 901
    decided = world.step()
    assert decided.status is not None
    assert decided.status.phase == "Pending"
    assert "0/3 nodes are available" in ready(decided).message


@pytest.mark.parametrize(
    ("reason", "phase"), [("InvalidPod", "Failed"), ("QuotaExceeded", "Pending"), ("Forbidden", "Pending")]
)
def test_pods_that_the_api_server_refuses(reason: str, phase: str) -> None:
    world = World(resource({"checkpoint": STORE}))
    trouble = Trouble(reason, "create Pod: the API server's words", NOW)
    decided = plan(replace(world.observed(), trouble=trouble), SETTINGS, NOW)
    assert (ready(decided).reason, ready(decided).message) == (reason, trouble.message)
    assert [happening.reason for happening in decided.happenings] == [reason], "no Pods were made"
    assert decided.status is not None
    world.job["status"] = decided.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    world.now += 901
    later = world.look()
    assert later.status is not None
    assert later.status.phase == phase
    failed = next(one for one in later.status.conditions if one.type == "Failed")
    assert "the API server's words" in (failed if phase == "Failed" else ready(later)).message


def test_a_refusal_is_over_when_pods_are_made() -> None:
    world = World(resource({"checkpoint": STORE}))
    trouble = Trouble("QuotaExceeded", "create Pod: exceeded quota", NOW)
    decided = plan(replace(world.observed(), trouble=trouble), SETTINGS, NOW)
    assert decided.status is not None
    world.job["status"] = decided.status.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert (decided.status.head, decided.status.next_pod) == (None, 0)
    assert reasons(world.step()) == ["PodsMade"]
    assert world.condition("Ready").reason == "WaitingForNodes"


# --- suspension -----------------------------------------------------------------------------------------------------


def test_a_job_made_suspended_has_no_pods_until_it_is_wanted() -> None:
    world = World(resource({"suspend": True}))
    decided = world.run()
    assert (kinds(decided), decided.again_in_s) == ([], None)
    assert (world.status.phase, world.condition("Suspended").status) == ("Suspended", "True")
    assert not world.owned
    world.edit(suspend=False)
    assert len(created(world.step())) == 5
    assert world.condition("Suspended").status == "False"


def test_a_suspended_job_keeps_its_checkpoint_before_its_pods_go() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.edit(suspend=True)
    decided = world.step()
    assert calls(decided) == [Call("POST", "/suspend", {"patience_s": 60.0, "reason": "spec.suspend"})]
    assert deletes(decided) == []
    assert (world.condition("Suspended").status, world.condition("Suspended").reason) == ("False", "Suspending")
    assert ready(decided).status == "False"
    assert world.said is not None
    world.said |= {
        "outcome": "suspended",
        "checkpoint": {"step": 40, "age_s": 1.0, "url": "s3://bucket/training/research/bytelm"},
    }
    decided = world.step()
    assert len(deletes(decided)) == 5
    assert (world.status.phase, world.status.step, world.status.start_time) == ("Suspended", 40, None)
    message = world.condition("Suspended").message
    assert message == "step 40 is kept at s3://bucket/training/research/bytelm; nothing is lost"
    world.let_go()
    assert kinds(world.run()) == []


@pytest.mark.parametrize(
    ("spec", "checkpoint", "reason", "message"),
    [
        (
            {"checkpoint": STORE},
            {"step": 30, "age_s": 9.0},
            "SuspendedWithLoss",
            "step 30 is kept at s3://bucket/training/research/bytelm; the 10 steps done after it are lost",
        ),
        (
            {"checkpoint": STORE},
            None,
            "SuspendedWithoutCheckpoint",
            "the job has no checkpoint yet: all 40 steps that were done are lost; it begins at step 0",
        ),
        (
            {},
            None,
            "SuspendedWithoutCheckpoint",
            "the job has no object tier (spec.checkpoint): all 40 steps that were done are lost; it begins at step 0",
        ),
    ],
)
def test_a_suspension_goes_on_without_a_store_and_says_what_is_lost(
    spec: Any, checkpoint: Any, reason: str, message: str
) -> None:
    world = World.training(resource(spec), checkpoint=checkpoint)
    world.edit(suspend=True)
    waiting = world.step()
    assert waiting.again_in_s == pytest.approx(75.0)
    world.now += 74
    assert deletes(world.step()) == []
    world.now += 1
    decided = world.step()
    assert len(deletes(decided)) == 5
    suspended = world.condition("Suspended")
    assert (suspended.status, suspended.reason, suspended.message) == ("True", reason, message)
    assert ("Warning", "Suspended") in [(told.type, told.reason) for told in decided.happenings]


def test_an_upload_that_goes_on_without_complaint_is_waited_for() -> None:
    """The controller knows when to wait no longer, and says so; one that does not take the suspension up does not."""
    world = World.training(resource({"checkpoint": STORE}), suspending=True)
    world.edit(suspend=True)
    world.step()
    world.now += 6 * 3600
    assert deletes(world.step()) == []
    assert world.said is not None
    world.said["suspending"] = False
    assert len(deletes(world.step())) == 5


def test_a_silent_controller_is_not_waited_for_any_longer() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.failing_since = world.now
    world.edit(suspend=True)
    assert kinds(world.step()) == []
    world.now += 76
    assert len(deletes(world.step())) == 5


def test_a_snapshot_of_long_steps_is_waited_for() -> None:
    world = World.training(resource({"checkpoint": STORE}), step_s=60.0)
    world.edit(suspend=True)
    world.step()
    world.now += 370
    assert deletes(world.step()) == []
    world.now += 10
    assert len(deletes(world.step())) == 5


def test_a_job_that_has_not_begun_is_suspended_at_once() -> None:
    world = World(resource())
    world.run()
    world.edit(suspend=True)
    assert len(deletes(world.step())) == 5
    assert world.condition("Suspended").message == "the job has not begun; it starts when spec.suspend is false"


@pytest.mark.parametrize("store", [None, STORE])
def test_a_suspension_that_is_taken_back_when_it_is_complete_begins_anew(store: Any) -> None:
    spec = {"activeDeadlineSeconds": 1000} | ({} if store is None else {"checkpoint": store})
    world = World.training(resource(spec), checkpoint=None if store is None else {"step": 40, "age_s": 5.0})
    world.edit(suspend=True)
    world.step()
    assert world.said is not None
    world.now += 900
    world.said["outcome"] = "suspended"
    world.edit(suspend=False)
    decided = world.step()
    assert decided.status is not None
    assert (decided.status.phase, decided.status.step) == ("Pending", 0 if store is None else 40)
    kept = "all 40 steps that were done are lost" if store is None else "step 40 is kept"
    told = [(told.type, told.reason) for told in decided.happenings if kept in told.message]
    assert told == [("Warning" if store is None else "Normal", "Resumed")]
    assert world.condition("Recovering").status == "False", "nothing was lost: it was asked for"
    world.said, world.pods = None, {}
    for _ in range(2):
        world.now += 100
        world.step()
        assert world.status.phase == "Pending", "its deadline counts from now"
        assert world.condition("Recovering").reason == "NothingLost"


def test_a_resumed_job_gets_new_pods_and_counts_on() -> None:
    world = World.training(
        resource({"checkpoint": STORE}), restarts={"rank-exit": 2}, checkpoint={"step": 30, "age_s": 1.0}
    )
    world.edit(suspend=True)
    world.step()
    assert world.said is not None
    world.said["outcome"] = "suspended"
    world.step()
    world.let_go()
    world.said = None
    world.edit(suspend=False)
    decided = world.step()
    assert created(decided) == [head(5), *(node(index) for index in (6, 7, 8, 9))]
    assert sorted(reasons(decided)) == ["PodsMade", "Resumed"]
    assert "step 30" in next(told.message for told in decided.happenings if told.reason == "Resumed")
    world.start(head(5))
    world.said = word(
        {node(6): "joining"}, controller="c2", phase="Pending", attempts=0, attempt=0, step=0, best_step=0
    )
    world.run()
    assert world.status.restarts == {"rank-exit": 2}
    assert world.status.phase == "Pending"
    assert world.status.step == 30


def test_a_suspension_that_is_taken_back_too_late_starts_the_job_anew() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.edit(suspend=True)
    world.step()
    world.edit(suspend=False)
    assert world.said is not None
    world.said["outcome"] = "suspended"
    assert len(deletes(world.step())) == 5
    world.said = None
    world.let_go()
    decided = world.step()
    assert created(decided) == [head(5), *(node(index) for index in (6, 7, 8, 9))]


# --- the end --------------------------------------------------------------------------------------------------------


def finished(outcome: str = "succeeded", spec: dict[str, Any] | None = None, **said: Any) -> World:
    world = World.training(resource(spec))
    assert world.said is not None
    world.said |= {"outcome": outcome, "reason": "the controller's words", "weights_digest": "d1", "step": 100, **said}
    return world


def test_an_outcome_is_recorded_before_the_controller_may_end() -> None:
    world = finished()
    decided = world.step()
    assert kinds(decided) == []
    assert decided.status is not None
    assert (decided.status.phase, decided.status.weights_digest, decided.status.step) == ("Succeeded", "d1", 100)
    assert decided.status.completion_time is not None
    assert "Succeeded" in reasons(decided)
    assert [call.path for call in calls(world.step())] == ["/stop"]
    for name in world.pods:
        world.end(name, "Succeeded")
    world.said = None
    last = world.run()
    assert (kinds(last), last.again_in_s) == ([], None)
    assert len(world.pods) == 5, "kept for their logs"


@pytest.mark.parametrize(
    ("outcome", "said", "reason"),
    [
        ("failed", {"first_error": {"cause": "rank-exit"}}, "RankExit"),
        ("failed", {}, "JobFailed"),
        ("failed", {"reason": "not ended within its activeDeadlineSeconds (5)"}, "DeadlineExceeded"),
        ("stopped", {}, "Stopped"),
    ],
)
def test_why_a_job_failed_is_kept(outcome: str, said: dict[str, Any], reason: str) -> None:
    world = finished(outcome, **said)
    world.step()
    assert world.status.phase == "Failed"
    assert (world.condition("Failed").status, world.condition("Failed").reason) == ("True", reason)
    assert world.condition("Failed").message == said.get("reason", "the controller's words")
    assert world.condition("Succeeded").status == "False"


def test_a_finished_job_stays_finished_whatever_is_edited() -> None:
    world = finished()
    world.step()
    world.pods.clear()
    world.said = None
    for change in ({"suspend": True}, {"suspend": False}, {"workers": {"replicas": 9}}):
        world.edit(**change)
        decided = world.run()
        assert kinds(decided) == []
        assert world.status.phase == "Succeeded"
        assert world.condition("Suspended").status == "False"
        assert world.status.observed_generation == world.job["metadata"]["generation"]


def test_pods_that_do_not_end_by_themselves_are_deleted() -> None:
    world = finished()
    world.step()
    world.failing_since = world.now
    assert kinds(world.step()) == []
    world.now += 121
    assert len(deletes(world.step())) == 5


def test_a_job_is_deleted_when_its_time_has_come() -> None:
    world = finished(spec={"ttlSecondsAfterFinished": 100})
    world.step()
    for name in world.pods:
        world.end(name, "Succeeded")
    assert world.step().again_in_s == pytest.approx(100, abs=1)
    world.now += 100
    world.step()
    assert world.deleted


def test_the_deadline_ends_a_job_that_never_gets_its_nodes() -> None:
    world = starved({"activeDeadlineSeconds": 5000}, joined=0)
    for _ in range(60):
        decided = world.step()
        if decided.status is not None and decided.status.phase == "Failed":
            break
        world.let_go()
        assert decided.again_in_s is not None
        world.now += decided.again_in_s
    assert world.condition("Failed").reason == "DeadlineExceeded"
    assert world.now - NOW == pytest.approx(5000, abs=2)


def test_the_deadline_counts_across_controllers() -> None:
    world = World.training(resource({"activeDeadlineSeconds": 500}))
    world.now += 499
    assert world.said is not None
    world.said["controller"] = "c2"
    world.step()
    assert world.status.phase == "Running"
    world.now += 1
    decided = world.step()
    assert decided.status is not None
    assert decided.status.phase == "Failed"
    assert world.condition("Failed").reason == "DeadlineExceeded"
    assert [call.path for call in calls(world.step())] == ["/stop"]


def test_a_deadline_is_looked_at_in_time() -> None:
    world = World.training(resource({"activeDeadlineSeconds": 500}))
    assert world.look().again_in_s == pytest.approx(500, abs=1)


def test_an_outcome_wins_over_the_deadline() -> None:
    world = finished(spec={"activeDeadlineSeconds": 500})
    world.now += 600
    world.step()
    assert world.status.phase == "Succeeded"


# --- a resource that cannot be obeyed -------------------------------------------------------------------------------

COMMAND = {"spec": {"containers": [{"name": "outlast", "command": ["python"]}]}}


def test_an_invalid_job_is_not_started_until_it_is_mended() -> None:
    world = World(resource(workers={"template": COMMAND}))
    decided = world.step()
    assert kinds(decided) == []
    assert (world.status.phase, world.condition("Ready").reason) == ("Pending", "InvalidSpec")
    assert "spec.workers.template.spec.containers[0].command" in world.condition("Ready").message
    assert "spec.entrypoint" in world.condition("Ready").message
    assert [(told.type, told.reason) for told in decided.happenings] == [("Warning", "InvalidSpec")]
    assert not world.step().happenings
    world.edit(workers={"replicas": 3, "spares": 1})
    assert len(created(world.step())) == 5


def test_an_invalid_job_has_all_conditions() -> None:
    world = World(resource(workers={"template": COMMAND}))
    world.step()
    fresh = World(resource({"suspend": False}))
    fresh.step()
    told = [(one.type, one.status, one.reason) for one in world.status.conditions]
    assert told[0] == ("Ready", "False", "InvalidSpec")
    assert told[1:] == [(one.type, one.status, one.reason) for one in fresh.status.conditions][1:]
    assert {one.observed_generation for one in world.status.conditions} == {1}
    since = [one.last_transition_time for one in world.status.conditions]
    world.now += 60
    world.edit(workers={"replicas": 2, "template": COMMAND})
    world.step()
    assert [one.last_transition_time for one in world.status.conditions] == since
    assert {one.observed_generation for one in world.status.conditions} == {2}
    assert world.look().urgent is False


def test_an_invalid_job_that_is_suspended_is_suspended() -> None:
    """Fields that are fixed while Pods run can be corrected only in that phase (``crd.WITHOUT_PODS``)."""
    world = World(resource(workers={"template": COMMAND}))
    world.step()
    world.edit(suspend=True)
    decided = world.step()
    assert decided.urgent
    assert [told.reason for told in decided.happenings] == ["Suspended"]
    assert (world.status.phase, world.condition("Ready").reason) == ("Suspended", "InvalidSpec")
    assert (world.condition("Suspended").status, world.condition("Suspended").reason) == ("True", "Suspended")
    world.edit(suspend=False, workers={"replicas": 3, "spares": 1})
    assert len(created(world.step())) == 5


def test_an_invalid_job_that_has_pods_is_not_said_to_be_suspended() -> None:
    world = World.training()
    world.owned.clear()  # nothing to go on with: the Secret is gone
    world.edit(suspend=True, workers={"replicas": 3, "spares": 1, "template": COMMAND})
    world.step()
    assert (world.status.phase, world.condition("Suspended").status) == ("Pending", "False")


def test_what_cannot_be_read_at_all_is_told_too() -> None:
    world = World(resource({"entrypoint": []}))
    assert kinds(world.step()) == []
    assert "entrypoint" in world.condition("Ready").message


def test_a_memory_limit_that_is_too_small_is_refused_with_the_sum() -> None:
    small = {"spec": {"containers": [{"name": "outlast", "resources": {"limits": {"memory": "1Gi"}}}]}}
    world = World(resource({"snapshot": {"maxMemory": "512Mi"}}, workers={"template": small}))
    assert kinds(world.step()) == []
    message = world.condition("Ready").message
    for part in ("1Gi is too small", "512Mi of snapshots", "256Mi for Ray", "1Gi at least for the ranks", "= 1792Mi"):
        assert part in message


def test_a_name_that_is_too_long_is_refused() -> None:
    world = World(resource())
    observed = world.observed()
    long = replace(observed, key=replace(observed.key, name="n" * 51))
    decided = plan(long, SETTINGS, NOW)
    assert decided.actions == ()
    assert "at most 50 bytes" in ready(decided).message


def test_a_name_that_no_service_can_have_is_refused() -> None:
    world = World(resource())
    observed = world.observed()
    decided = plan(replace(observed, key=replace(observed.key, name="7b")), SETTINGS, NOW)
    assert decided.actions == ()
    assert "metadata.name: must begin with a letter" in ready(decided).message


def test_a_suspended_job_does_not_begin_with_what_it_was_before_an_invalid_edit() -> None:
    world = World.training(resource({"checkpoint": STORE}))
    world.edit(suspend=True)
    assert world.said is not None
    world.said["outcome"] = "suspended"
    world.run()
    world.said = None
    world.let_go()
    world.run()
    assert world.status.phase == "Suspended"
    world.edit(suspend=False, workers={"replicas": 3, "spares": 1, "template": COMMAND})
    decided = world.run()
    assert not world.pods
    assert (world.status.phase, ready(decided).reason) == ("Suspended", "InvalidSpec")
    world.edit(workers={"replicas": 3, "spares": 1})
    world.run()
    assert len(world.live_nodes()) == 4


def test_an_invalid_edit_leaves_a_running_job_running() -> None:
    world = World.training()
    world.edit(workers={"replicas": 3, "spares": 1, "template": COMMAND})
    decided = world.step()
    assert kinds(decided) == []
    assert world.status.phase == "Running"
    assert (world.condition("Ready").status, world.condition("Ready").reason) == ("True", "InvalidSpec")
    assert world.status.observed_generation == 2
    del world.pods[node(1)]
    assert created(world.step()) == [node(5)], "it is looked after as before"
    world.edit(suspend=True)
    assert [call.path for call in calls(world.step())] == ["/suspend"], "and can be suspended"


def test_a_status_of_another_version_is_read_as_far_as_it_goes() -> None:
    world = World.training()
    world.job["status"] |= {"phase": "Meditating", "newField": 1}
    decided = world.step()
    assert created(decided) == []
    assert decided.status is not None
    assert (decided.status.phase, decided.status.head) == ("Running", head(0))
