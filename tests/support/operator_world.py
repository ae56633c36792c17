"""What an operator's plan is tested on: builders of resources, Pods, machines and controllers' words, and a small world.

``World`` keeps a job's objects in memory as the API server would keep them, as far as a plan can tell: it fills in
defaults, keeps a deleted Pod until its machine lets it go, and refuses a name that is taken. It has no scheduler and no
kubelet: a test says what becomes of a Pod. It models bookkeeping alone, and proves nothing about Kubernetes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outlast import kube
from outlast.api import API_VERSION, KIND
from outlast.jobstatus import TrainingJobStatus
from outlast_operator.caches import parse
from outlast_operator.model import Apply, Call, Controller, Create, Delete, Happening, Key, Observed, Plan, Settings
from outlast_operator.plan import plan
from outlast_operator.sight import old_status
from outlast_operator.timestamps import written

NOW = 1_800_000_000.0
UID = "job-uid"
NAME, NAMESPACE = "bytelm", "research"
TOKEN = "t" * 43
SETTINGS = Settings(
    version="0.1.0",
    training_image="outlast-training:dev",
    operator_namespace="outlast-system",
    operator_labels={"app.kubernetes.io/name": "outlast"},
)

Json = dict[str, Any]


def resource(
    spec: Mapping[str, Any] | None = None, *, workers: Mapping[str, Any] | None = None, **metadata: Any
) -> Json:
    """A TrainingJob as the API server has it: three nodes and a spare, unless ``workers`` says otherwise."""
    base: Json = {"entrypoint": ["python", "train.py"], "workers": {"replicas": 3, "spares": 1, **(workers or {})}}
    base |= dict(spec or {})
    named = {"name": NAME, "namespace": NAMESPACE, "uid": UID, "generation": 1, **metadata}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": named, "spec": base}


def pod(name: str, phase: str = "Running", *, ready: bool = True, machine: str = "m1", **status: Any) -> Json:
    """A Pod of the job as its cache has it; ``status`` is added to its status."""
    role = kube.HEAD_ROLE if f"-{kube.HEAD_ROLE}-" in name else kube.NODE_ROLE
    ready = ready and phase == "Running"
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "uid": f"uid-{name}",
            "creationTimestamp": written(NOW - 3600),
            "labels": {kube.JOB_LABEL: NAME, kube.ROLE_LABEL: role, kube.POD_LABEL: name},
            "ownerReferences": [{"kind": KIND, "name": NAME, "uid": UID, "controller": True}],
        },
        "spec": {"nodeName": machine} if machine else {},
        "status": {
            "phase": phase,
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            **status,
        },
    }


def deleted(obj: Json) -> Json:
    """``obj`` on its way out."""
    gone = copy.deepcopy(obj)
    gone["metadata"]["deletionTimestamp"] = written(NOW - 1)
    return gone


def container(name: str = kube.CONTAINER, *, ready: bool = False, restarts: int = 0, **states: Any) -> Json:
    """A container's status; ``states``: ``waiting``, ``terminated`` or ``last`` (of the run before)."""
    state = {kind: value for kind, value in states.items() if kind in ("waiting", "terminated", "running")}
    last = {"terminated": states["last"]} if "last" in states else {}
    return {"name": name, "ready": ready, "restartCount": restarts, "state": state, "lastState": last}


def machine(
    name: str = "m1", ready: str = "True", *, taints: tuple[str, ...] = (), since: float = NOW - 60, **labels: str
) -> Json:
    """A Node; ``labels`` with ``__`` for ``/`` and ``_`` for ``.``."""
    return {
        "kind": "Node",
        "metadata": {
            "name": name,
            "labels": {key.replace("__", "/").replace("_", "."): v for key, v in labels.items()},
        },
        "spec": {"taints": [{"key": key, "effect": "NoExecute"} for key in taints]},
        "status": {"conditions": [{"type": "Ready", "status": ready, "lastTransitionTime": written(since)}]},
    }


def word(states: Mapping[str, str] | None = None, **fields: Any) -> Json:
    """A controller's /status: three nodes train and one waits, at step 40 of 100, unless told otherwise."""
    known = dict(
        states if states is not None else {node(1): "active", node(2): "active", node(3): "active", node(4): "spare"}
    )
    here = sum(state in ("active", "spare", "joining", "leaving") for state in known.values())
    spares = sum(state == "spare" for state in known.values())
    size = sum(state == "active" for state in known.values())
    said: Json = {
        "phase": "Running",
        "outcome": None,
        "reason": "",
        "step": 40,
        "best_step": 40,
        "total": 100,
        "attempts": 1,
        "attempt": 1,
        "restarts": {},
        "nodes": {name: {"node": name, "state": state} for name, state in known.items()},
        "workers": {"ready": here, "wanted": 3, "least": 3, "size": size, "spares": spares},
        "snapshot": {"step": 38, "age_s": 2.0},
        "checkpoint": None,
        "checkpoints": {},
        "goodput": {"ratio": 0.9, "train_s": 90.0, "lost_s": {"start": 10.0}},
        "recoveries": [],
        "failures": [],
        "weights_digest": None,
        "controller": "c1",
        "version": "0.1.0",
        "unplaced": [],
    }
    return said | fields


def node(index: int) -> str:
    return kube.pod_name(NAME, kube.NODE_ROLE, index)


def head(index: int = 0) -> str:
    return kube.pod_name(NAME, kube.HEAD_ROLE, index)


@dataclass
class World:
    """``run`` makes passes until nothing changes any more. ``made``: every Pod name that ever was; ``machines`` that are
    not ready keep their deleted Pods. ``said`` None: nobody can be asked, or, if ``unasked``, nobody has answered yet."""

    job: Json
    pods: dict[str, Json] = field(default_factory=dict)
    machines: dict[str, Json] = field(default_factory=dict)
    owned: dict[tuple[str, str], Json] = field(default_factory=dict)
    said: Json | None = None
    failing_since: float | None = None
    unasked: bool = False
    now: float = NOW
    deleted: bool = False
    made: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)
    most_live: int = 0
    _uids: itertools.count[int] = field(default_factory=lambda: itertools.count(1))

    @classmethod
    def training(cls, job: Json | None = None, **said: Any) -> World:
        """A job that trains: one head, its nodes, a controller that says so."""
        world = cls(job or resource())
        world.run()
        for name in list(world.pods):
            world.start(name)
        world.machines = {"m1": machine("m1")}
        workers = world.spec["workers"]
        nodes = sorted((name for name in world.pods if "-node-" in name), key=kube.pod_index)
        states = {name: "active" if at < workers["replicas"] else "spare" for at, name in enumerate(nodes)}
        least = workers.get("minReplicas") or workers["replicas"]
        world.said = word(states, **said)
        world.said["workers"] |= {"wanted": workers["replicas"], "least": least}
        world.run()
        return world

    # --- what a pass reads, and does --------------------------------------------------------------------------------

    @property
    def spec(self) -> Json:
        spec: Json = self.job["spec"]
        return spec

    @property
    def status(self) -> TrainingJobStatus:
        return old_status(self.job)

    def condition(self, kind: str) -> Any:
        return next(one for one in self.status.conditions if one.type == kind)

    def observed(self) -> Observed:
        parsed, invalid = parse(self.job)
        nobody = self.said is None and self.failing_since is None and not self.unasked  # no head Pod that runs
        pod = "" if nobody else self.status.head or ""
        controller = Controller(pod, self.said, None if self.said is None else self.now, self.failing_since)
        there = {one["spec"].get("nodeName") for one in self.pods.values()}
        return Observed(
            Key(NAMESPACE, NAME),
            copy.deepcopy(self.job),
            parsed,
            invalid,
            list(copy.deepcopy(self.pods).values()),
            {name: one for name, one in self.machines.items() if name in there},
            copy.deepcopy(self.owned),
            controller,
            new_token=f"{TOKEN}{next(self._uids)}",
        )

    def look(self) -> Plan:
        """What a pass would do now."""
        return plan(self.observed(), SETTINGS, self.now)

    def step(self) -> Plan:
        """One pass, done."""
        decided = self.look()
        for action in decided.actions:
            self._do(action)
        if decided.status is not None and not self.deleted:
            self.job["status"] = decided.status.model_dump(mode="json", by_alias=True, exclude_none=True)
        self.happenings += decided.happenings
        self.most_live = max(self.most_live, len(self.live_nodes()))
        return decided

    def run(self, most: int = 12) -> Plan:
        """Passes until one changes nothing."""
        for _ in range(most):
            before = copy.deepcopy((self.job, self.pods, self.owned, self.deleted))
            done = self.step()
            if before == (self.job, self.pods, self.owned, self.deleted):
                return done
        raise AssertionError(f"{most} passes, and the last one still did {done.actions}")

    def live_nodes(self) -> list[str]:
        """Node Pods that are neither ended nor on their way out, nor on a machine that is lost."""
        return [name for name, one in self.pods.items() if "-node-" in name and self._lives(one)]

    def names(self, role: str) -> list[str]:
        return sorted(
            (name for name, one in self.pods.items() if f"-{role}-" in name and self._lives(one)), key=kube.pod_index
        )

    def _lives(self, one: Json) -> bool:
        if one["metadata"].get("deletionTimestamp") or one["status"]["phase"] in ("Failed", "Succeeded"):
            return False
        return not self._is_lost(one["spec"].get("nodeName"))

    def _is_lost(self, name: str | None) -> bool:
        found = self.machines.get(name or "")
        return found is not None and found["status"]["conditions"][0]["status"] != "True"

    # --- what happens -----------------------------------------------------------------------------------------------

    def start(self, name: str, at: str = "m1", ready: bool = True) -> None:
        """A Pod runs on machine ``at``."""
        self.pods[name]["spec"]["nodeName"] = at
        self.pods[name]["status"] = {
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        }

    def end(self, name: str, phase: str, after_s: float = 3600.0) -> None:
        """A Pod ends, ``after_s`` seconds after it was made."""
        one = self.pods[name]
        one["metadata"]["creationTimestamp"] = written(self.now - after_s)
        ended = container(terminated={"finishedAt": written(self.now), "exitCode": 0 if phase == "Succeeded" else 1})
        one["status"] = {"phase": phase, "conditions": [], "containerStatuses": [ended]}

    def lose_machine(self, name: str) -> None:
        self.machines[name] = machine(name, "Unknown", since=self.now)

    def edit(self, **spec: Any) -> None:
        """The resource's spec is changed."""
        self.job["spec"] |= spec
        self.job["metadata"]["generation"] += 1

    def let_go(self) -> None:
        """Deleted Pods go, where their machine can let them."""
        for name, one in list(self.pods.items()):
            if one["metadata"].get("deletionTimestamp") and not self._is_lost(one["spec"].get("nodeName")):
                del self.pods[name]

    def _do(self, action: Any) -> None:
        match action:
            case Create():
                self.create(copy.deepcopy(dict(action.object)))
            case Apply():
                obj = copy.deepcopy(dict(action.object))
                self.owned[(obj["kind"], obj["metadata"]["name"])] = _defaulted(obj)
            case Delete():
                self._delete(action)
            case Call():
                self.calls.append(action)

    def create(self, obj: Json) -> None:
        """An object is made; AssertionError where the name is taken, or was used."""
        kind, name = obj["kind"], obj["metadata"]["name"]
        if kind != "Pod":
            assert (kind, name) not in self.owned, f"{kind} {name} exists"
            self.owned[(kind, name)] = _defaulted(obj)
            return
        assert name not in self.made, f"{name} was used before"
        self.made.add(name)
        obj["metadata"] |= {"uid": f"uid-{next(self._uids)}", "creationTimestamp": written(self.now)}
        obj["status"] = {"phase": "Pending"}
        self.pods[name] = obj

    def _delete(self, action: Delete) -> None:
        if action.kind == KIND:
            assert action.uid == UID
            self.deleted = True
            return
        one = self.pods[action.name]
        assert one["metadata"]["uid"] == action.uid
        if one["spec"].get("nodeName") and one["status"]["phase"] not in ("Failed", "Succeeded"):
            one["metadata"]["deletionTimestamp"] = written(self.now)
        else:
            del self.pods[action.name]


def _defaulted(obj: Json) -> Json:
    """As it comes back from the API server, with what that fills in."""
    obj["metadata"] |= {"uid": f"uid-{obj['kind']}", "resourceVersion": "1", "creationTimestamp": written(NOW)}
    if obj["kind"] == "Service":
        obj["spec"] |= {"sessionAffinity": "None", "type": "ClusterIP", "clusterIPs": ["None"], "ipFamilies": ["IPv4"]}
    if obj["kind"] == "PodDisruptionBudget":
        obj["status"] = {"disruptionsAllowed": 1}
    return obj
