"""What is done of a plan when the API server does not take all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from outlast.clock import ManualClock
from outlast_operator.applying import Applier, Done
from outlast_operator.caches import Caches
from outlast_operator.cluster import Cluster
from outlast_operator.expectations import Expectations
from outlast_operator.kinds import Kind
from outlast_operator.model import Action, Call, Create, Delete, Key, Object
from outlast_operator.poller import CallFailed, Poller
from outlast_operator.refusals import NAME_TAKEN, ApiError
from support.operator_world import NAME, NAMESPACE, UID, World, node, pod, resource, word

KEY = Key(NAMESPACE, NAME)
DOMAINS = Call("PUT", "/domains", {node(1): "a"})


@dataclass
class Server:
    """An API server and a controller that note what they are asked, and answer creates as told."""

    there: dict[str, Object] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    error: tuple[int, str, str] | None = None
    delete_error: tuple[int, str, str] | None = None
    call_error: CallFailed | None = None
    call_s: float = 0.0
    clock: ManualClock = field(default_factory=ManualClock)
    asked: list[tuple[str, str]] = field(default_factory=list)
    patches: list[Mapping[str, Any]] = field(default_factory=list)

    def create(self, kind: Kind, namespace: str, obj: Object) -> Object:
        name = obj["metadata"]["name"]
        self.asked.append(("create", name))
        if self.error is not None:
            status, reason, message = self.error
            raise ApiError("create", f"{kind.name} {name}", status, reason, message)
        if name in self.there:
            raise ApiError("create", f"{kind.name} {name}", 409, "AlreadyExists", f'"{name}" already exists')
        return {**obj, "metadata": {**obj["metadata"], "labels": {**obj["metadata"]["labels"], **self.labels}}}

    def get(self, kind: Kind, namespace: str | None, name: str) -> Object:
        return self.there[name]

    def patch(self, kind: Kind, namespace: str, name: str, change: Mapping[str, Any], part: str = "") -> Object:
        self.asked.append(("patch", name))
        self.patches.append(change)
        return self.there[name]

    def delete(self, kind: Kind, namespace: str, name: str, uid: str, grace_s: int | None) -> None:
        self.asked.append(("delete", name))
        if self.delete_error is not None:
            status, reason, message = self.delete_error
            raise ApiError("delete", f"{kind.name} {name}", status, reason, message)

    def call(self, key: Key, call: Call) -> None:
        self.asked.append((call.method, call.path))
        self.clock.advance(self.call_s)
        if self.call_error is not None:
            raise self.call_error


def do(server: Server, *actions: Action) -> Done:
    caches = Caches(lambda _: None, lambda _: None)
    cluster, poller = cast(Cluster, server), cast(Poller, server)
    applier = Applier(cluster, caches, Expectations(patience_s=10), poller, server.clock, lambda: None)
    return applier.do(KEY, resource(), actions)


REFUSED = (403, "Forbidden", 'pods "x" is forbidden: exceeded quota: small')
LOST = (0, "ReadTimeoutError", "no answer")


def test_a_refusal_keeps_more_from_being_made_and_nothing_else() -> None:
    server = Server(error=REFUSED)
    done = do(server, Create(pod(node(5))), Create(pod(node(6))), Delete("Pod", node(2), "u"), DOMAINS)
    assert done.error is not None
    assert "exceeded quota" in done.error.message
    assert server.asked == [("create", node(5)), ("delete", node(2)), ("PUT", "/domains")]


def test_an_answer_that_is_missing_ends_the_pass() -> None:
    server = Server(error=LOST)
    assert do(server, Create(pod(node(5))), DOMAINS).error is not None
    assert server.asked == [("create", node(5))]


@pytest.mark.parametrize("error", [(403, "Forbidden", "a webhook keeps it"), (503, "", "the webhook is down")])
def test_what_cannot_be_deleted_is_replaced_all_the_same(error: tuple[int, str, str]) -> None:
    server = Server(delete_error=error)
    done = do(server, Delete("Pod", node(2), "u"), Create(pod(node(5))), DOMAINS)
    assert server.asked == [("delete", node(2)), ("create", node(5)), ("PUT", "/domains")]
    assert done.error is not None, "it is told, or tried again"
    assert done.error.status == error[0]


FORGET = tuple(Call("DELETE", f"/nodes/{node(at)}") for at in range(32))


def test_a_controller_that_does_not_answer_is_asked_nothing_more_in_this_pass() -> None:
    server = Server(call_error=CallFailed("DELETE: timeout"))
    done = do(server, *FORGET, Delete("Pod", node(2), "u"))
    assert server.asked == [("DELETE", FORGET[0].path), ("delete", node(2))]
    assert done.calls_failed == 32, "the pass is repeated"


def test_a_controller_that_answers_with_an_error_is_asked_on() -> None:
    server = Server(call_error=CallFailed("DELETE: 500", answered=True))
    do(server, *FORGET)
    assert len(server.asked) == 32


def test_calls_that_take_long_are_left_to_the_next_pass() -> None:
    server = Server(call_s=4.5)
    done = do(server, *FORGET)
    assert (len(server.asked), done.calls_failed) == (5, 27)


def test_a_webhook_that_is_down_keeps_nothing_else_from_being_done() -> None:
    text = 'Internal error occurred: failed calling webhook "mesh.test": connection refused'
    server = Server(error=(500, "InternalError", text))
    done = do(server, Create(pod(node(5))), Create(pod(node(6))), Delete("Pod", node(2), "u"), DOMAINS)
    assert server.asked == [("create", node(5)), ("delete", node(2)), ("PUT", "/domains")]
    assert done.error is not None
    assert "mesh.test" in done.error.message


@pytest.mark.parametrize("label", ["app.kubernetes.io/managed-by", "outlast.dev/job"])
def test_a_pod_whose_labels_admission_changes_is_made_no_more(label: str) -> None:
    server = Server(labels={label: "platform"})
    one = World(resource())
    one.run()
    pods = [Create({**found, "metadata": {**found["metadata"]}}) for found in one.pods.values()]
    done = do(server, *pods[:2])
    name = pods[0].object["metadata"]["name"]
    assert server.asked == [("create", name), ("delete", name)]
    assert done.error is not None
    assert (done.error.status, label in done.error.message) == (403, True)
    assert done.made == ()


def test_labels_of_the_templates_own_may_be_changed() -> None:
    template = {"metadata": {"labels": {"team": "nlp"}}}
    world = World(resource(workers={"template": template}))
    world.run()
    pods = [Create(found) for name, found in world.pods.items() if "-node-" in name]
    assert pods[0].object["metadata"]["labels"]["team"] == "nlp"
    done = do(Server(labels={"team": "NLP-7"}), *pods)
    assert (done.error, len(done.made)) == (None, 4)


def test_what_was_made_before_a_refusal_is_known() -> None:
    server = Server({node(6): pod(node(6))})
    assert do(server, Create(pod(node(5))), Create(pod(node(6)))).made == (node(5),)


def secret(uid: str, **labels: str) -> Object:
    owner = {"kind": "TrainingJob", "name": NAME, "uid": uid, "controller": True}
    metadata = {"name": f"{NAME}-outlast", "labels": labels, "ownerReferences": [owner]}
    return {"kind": "Secret", "metadata": metadata}


def test_a_secret_that_lost_its_labels_gets_them_back() -> None:
    wanted = secret(UID, managed="outlast", job=NAME)
    server = Server({f"{NAME}-outlast": secret(UID, managed="somebody", team="a")})
    done = do(server, Create(wanted))
    assert done.error is not None, "the cache is behind: the next pass sees it"
    assert server.patches == [{"metadata": {"labels": {"managed": "outlast", "job": NAME}}}]
    server.there[f"{NAME}-outlast"] = wanted
    do(server, Create(wanted))
    assert len(server.patches) == 1


def test_a_secret_of_somebody_else_is_left_alone() -> None:
    other = {"kind": "Secret", "metadata": {"name": f"{NAME}-outlast", "labels": {}}}
    server = Server({f"{NAME}-outlast": other})
    done = do(server, Create(secret(UID, managed="outlast")))
    assert done.error is not None
    assert (done.error.reason, server.patches) == (NAME_TAKEN, [])


def test_what_is_let_go_makes_room_for_what_replaces_it() -> None:
    world = World.training()
    world.said = word({node(1): "active", node(2): "lost", node(3): "active", node(4): "spare"}, unplaced=["m1"])
    world.pods[node(2)]["spec"]["nodeName"] = "m2"
    world.lose_machine("m2")
    kinds = [type(action).__name__ for action in world.look().actions]
    assert kinds.index("Delete") < kinds.index("Create") < kinds.index("Call")
