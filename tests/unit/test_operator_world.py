"""Any history of a job: passes settle, do nothing twice, use no index twice, and never make more Pods than wanted.

In a small world in memory (``support.operator_world``): it shows that the plan is consistent with itself, no more.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outlast import kube
from outlast.api import TrainingJob
from outlast_operator.model import Create
from outlast_operator.objects import kept_job
from outlast_operator.plan import SOONEST_S
from support.operator_world import NAME, World, machine, resource, word

STORE = {"url": "s3://bucket/training"}
MACHINES = ("m1", "m2", "m3")


class History(RuleBasedStateMachine):
    """What people, machines, Pods and the controller do, in any order; a pass may come at any time, or not."""

    def __init__(self) -> None:
        super().__init__()
        spec = {"checkpoint": STORE, "ttlSecondsAfterFinished": 5000, "activeDeadlineSeconds": 50_000}
        self.world = World(resource(spec, workers={"replicas": 2, "spares": 1}))
        self.world.machines = {name: machine(name) for name in MACHINES}
        self.controllers = 0
        self.finished = ""

    # --- what happens ---------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([1, 6, 20, 61, 120, 700, 1000]))
    def time_passes(self, seconds: int) -> None:
        self.world.now += seconds

    @rule()
    def look(self) -> None:
        self.one_pass()

    @rule(replicas=st.integers(1, 4), spares=st.integers(0, 2))
    def scale(self, replicas: int, spares: int) -> None:
        self.world.edit(workers={"replicas": replicas, "spares": spares})

    @rule(suspend=st.booleans())
    def suspend(self, suspend: bool) -> None:
        self.world.edit(suspend=suspend)

    @rule(broken=st.booleans())
    def edit_template(self, broken: bool) -> None:
        container = {"name": "outlast", **({"command": ["x"]} if broken else {})}
        self.world.edit(workers={**self.world.spec["workers"], "template": {"spec": {"containers": [container]}}})

    @rule(data=st.data(), phase=st.sampled_from(["Failed", "Succeeded", "gone", "deleted"]), soon=st.booleans())
    def lose_a_pod(self, data: Any, phase: str, soon: bool) -> None:
        if not self.world.pods:
            return
        name = data.draw(st.sampled_from(sorted(self.world.pods)))
        if phase == "gone":
            del self.world.pods[name]
        elif phase == "deleted":
            self.world.pods[name]["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
        else:
            self.world.end(name, phase, after_s=5.0 if soon else 4000.0)

    @rule(name=st.sampled_from(MACHINES))
    def lose_a_machine(self, name: str) -> None:
        self.world.lose_machine(name)

    @rule(name=st.sampled_from(MACHINES))
    def machine_returns(self, name: str) -> None:
        self.world.machines[name] = machine(name)

    @rule(data=st.data())
    def pods_start(self, data: Any) -> None:
        waiting = sorted(name for name, pod in self.world.pods.items() if pod["status"]["phase"] == "Pending")
        up = [name for name in MACHINES if self.world.machines[name]["status"]["conditions"][0]["status"] == "True"]
        for name in waiting if up else ():
            self.world.start(name, data.draw(st.sampled_from(up)))

    @rule()
    def deleted_pods_go(self) -> None:
        self.world.let_go()

    @rule()
    def the_controller_is_silent(self) -> None:
        self.world.failing_since = self.world.now

    @rule(data=st.data(), phase=st.sampled_from(["Pending", "Starting", "Running", "Recovering"]))
    def the_controller_speaks(self, data: Any, phase: str) -> None:
        head = self.world.pods.get(self.world.status.head or "")
        if head is None or head["status"]["phase"] != "Running":
            self.world.said = None
            return
        if self.world.said is None:
            self.controllers += 1
        workers, least = self.world.spec["workers"], self.world.spec["workers"]["replicas"]
        states = {
            name: data.draw(st.sampled_from(["active", "spare", "leaving", "left", "lost"]))
            for name in self.world.live_nodes()
        }
        self.world.said = word(states, phase=phase, controller=f"c{self.controllers}")
        self.world.said["workers"] |= {"wanted": workers["replicas"], "least": least}
        self.world.failing_since = None

    @rule(outcome=st.sampled_from(["succeeded", "failed", "suspended"]))
    @precondition(lambda self: self.world.said is not None)
    def the_controller_ends(self, outcome: str) -> None:
        assert self.world.said is not None
        self.world.said["outcome"] = outcome

    # --- what holds -----------------------------------------------------------------------------------------------

    def one_pass(self) -> None:
        head = self.world.status.head
        over, suspended = self.world.status.phase in ("Succeeded", "Failed"), self.world.spec.get("suspend", False)
        before = len(self.world.live_nodes())
        decided = self.world.step()
        made = [action for action in decided.actions if isinstance(action, Create) and action.object["kind"] == "Pod"]
        assert not (made and (over or suspended)), "a finished or suspended job gets no Pods"
        wanted = self.wanted()
        assert len(self.world.live_nodes()) <= max(before, wanted)
        assert not decided.happenings or decided.urgent
        if self.world.status.head != head:
            self.world.said, self.world.failing_since = None, None

    def wanted(self) -> int:
        """The greater of what is asked for and what was last asked for in a way that can be obeyed."""
        kept = kept_job(self.world.owned.get(("Secret", kube.secret_name(NAME))))
        asked = self.world.spec["workers"]
        known = [TrainingJob.model_validate(json.loads(kept)).spec.workers] if kept else []
        return max(asked["replicas"] + asked["spares"], *(one.replicas + one.spares for one in known), 0)

    @invariant()
    def passes_settle(self) -> None:
        """From wherever the job is, passes alone come to rest, and then do nothing; time is what moves them on."""
        world = copy.deepcopy(self.world)
        head = world.status.head
        for _ in range(8):
            before = copy.deepcopy((world.job, world.pods, world.owned, world.deleted))
            calls = len(world.calls)
            decided = world.step()
            if world.status.head != head:
                head, world.said, world.failing_since = world.status.head, None, None
                continue
            if before == (world.job, world.pods, world.owned, world.deleted):
                assert not [action for action in decided.actions if not _is_call(action)]
                assert not decided.happenings
                assert decided.again_in_s is None or decided.again_in_s > SOONEST_S, "a pass that only repeats itself"
                assert world.calls[calls:] == list(filter(_is_call, decided.actions))
                break
        else:
            raise AssertionError("passes do not settle")
        assert len(world.names("head")) <= 1
        if world.status.phase in ("Suspended", "Succeeded", "Failed") and world.status.phase == self.world.status.phase:
            assert world.made == self.world.made

    @invariant()
    def a_finished_job_stays_so(self) -> None:
        phase = self.world.status.phase
        assert not self.finished or phase == self.finished
        if phase in ("Succeeded", "Failed"):
            self.finished = phase


def _is_call(action: Any) -> bool:
    return type(action).__name__ == "Call"


TestHistory = History.TestCase
TestHistory.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_the_world_refuses_what_the_api_server_would() -> None:
    """The world can say no: a name that is taken, an index that was used."""
    world = World(resource())
    world.run()
    name = world.names("node")[0]
    made = copy.deepcopy(world.pods[name])
    del world.pods[name]
    with pytest.raises(AssertionError, match="was used before"):
        world.create(made)
