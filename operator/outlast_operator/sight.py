"""One pass's input as the rules read it: the job in force, its Pods as values, which of them are lost, what is heard.

Pure. ``sight_of`` makes it of an ``Observed``. The job in force is the resource; when that cannot be obeyed
(``problem``) the last one that could, which the job's Secret holds: a job that runs goes on as before, and is mended by
another edit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import ValidationError

from outlast import kube
from outlast.api import TrainingJob
from outlast.errors import SpecError
from outlast.jobstatus import Condition, TrainingJobStatus
from outlast_operator import podspec
from outlast_operator.heard import LEFT, LOST, SUSPENDED, Heard
from outlast_operator.machines import doubted_until, why_lost
from outlast_operator.model import Controller, Key, Object, Observed, Settings, Trouble
from outlast_operator.objects import kept_job
from outlast_operator.pods import Pod, index_of, owned_by, owner_uid, pod_of

DOUBT_S = 40.0
"""How long it is not believed that all of a job's machines are lost at once."""
SILENT_S = 10.0
"""A node that its controller gave up so long ago is not waited for, whatever its machine says: that a kubelet is cut
off shows after 40 s, that a node is after 1.5 s. One whose container starts again is not ready meanwhile."""


@dataclass(frozen=True)
class Sight:
    """``job``: in force; ``problem``: why the resource is not, "" when it is; ``old``: the status that it has;
    ``pods``: its own, by index; ``heard``: what the controller of the head in force says, None when it has said
    nothing yet.
    """

    key: Key
    job: TrainingJob
    problem: str
    old: TrainingJobStatus
    pods: tuple[Pod, ...]
    machines: Mapping[str, Object]
    owned: Mapping[tuple[str, str], Object]
    controller: Controller
    heard: Heard | None
    trouble: Trouble | None
    objection: str
    settings: Settings
    new_token: str
    highest_index: int
    now: float

    @property
    def name(self) -> str:
        return self.job.metadata.name

    @cached_property
    def nodes(self) -> tuple[Pod, ...]:
        return tuple(pod for pod in self.pods if pod.is_node)

    def condition(self, kind: str) -> Condition | None:
        """What the status that it has says of ``kind``."""
        return next((condition for condition in self.old.conditions if condition.type == kind), None)

    @property
    def wanted(self) -> int:
        """Node Pods that the job shall have: as many as the controller goes on with while it objects to fewer."""
        return max(self.job.spec.workers.replicas, self._insisted("wanted")) + self.job.spec.workers.spares

    @property
    def least(self) -> int:
        """Nodes without which no rank starts. A job that was on fewer when more were asked for goes on with those."""
        least = max(self.job.spec.workers.least, self._insisted("least"))
        size = self._size()
        return min(least, size) if size else least

    def _size(self) -> int:
        """Nodes that the job trains on, 0 when unknown; an operator that has heard nothing yet goes by the status."""
        if self.heard is not None:
            return self.heard.count(self.heard.workers, "size")
        trains = self.old.phase == "Running" and self.head is not None
        return max(0, self.old.workers.ready - self.old.workers.spares) if trains else 0

    def _insisted(self, number: str) -> int:
        """A number of the controller's that an objection of its makes count; 0: there is none."""
        return self.heard.count(self.heard.workers, number) if self.objection and self.heard is not None else 0

    @cached_property
    def lost(self) -> dict[str, str]:
        """Why Pods do not count any more, by name: predicates such as "failed"."""
        return {pod.name: why for pod in self.pods if (why := self._why_lost(pod))}

    @cached_property
    def live(self) -> tuple[Pod, ...]:
        """The Pods that count, the head's too."""
        return tuple(pod for pod in self.pods if pod.name not in self.lost)

    @cached_property
    def head(self) -> Pod | None:
        """The head Pod in force, if it counts."""
        heads = (pod for pod in self.live if pod.role == kube.HEAD_ROLE)
        return next((pod for pod in heads if pod.name == self.old.head), None)

    @property
    def unasked(self) -> bool:
        """Whether the controller in force is being asked for the first time by this operator, and has neither answered
        nor failed to: what it will say may be that the job is done, trains or suspends."""
        controller = self.controller
        asked = self.head is not None and controller.pod == self.head.name
        return asked and controller.status is None and controller.failing_since is None

    @property
    def answering(self) -> bool:
        """Whether the controller in force can be asked for something."""
        return self.heard is not None and self.controller.failing_since is None and self.head is not None

    @property
    def suspended(self) -> bool:
        """Whether the controller has suspended the job, and ended with that."""
        return self.heard is not None and self.heard.outcome == SUSPENDED

    @cached_property
    def doubt_ends(self) -> float | None:
        """Until when it is not believed that the machines are lost."""
        in_use = {pod.machine for pod in self.pods if not pod.ended and not pod.deleting}
        machines = [machine for name, machine in self.machines.items() if name in in_use]
        until = doubted_until(machines, self.heard.at if self.heard else None, DOUBT_S)
        return until if until is not None and until > self.now else None

    @cached_property
    def silent(self) -> dict[str, float]:
        """Nodes whose controller has given them up while Kubernetes calls them ready, and when they are no more waited
        for. Empty when they are half of those that it knows and that have Pods, or more: then it may be the controller
        that is cut off."""
        if self.heard is None or self.controller.failing_since is not None:
            return {}
        since, states = self.heard.lost_since, self.heard.states
        counted = [pod for pod in self.nodes if not pod.ended and not pod.deleting]
        known = sum(pod.name in states for pod in counted)
        found = {pod.name: since[pod.name] + SILENT_S for pod in counted if pod.ready and pod.name in since}
        return found if 2 * len(found) < known else {}

    def _why_lost(self, pod: Pod) -> str:
        if pod.deleting:
            return "is being deleted"
        if pod.ended:
            return f"{'failed' if pod.phase == 'Failed' else 'ended'}{f' ({pod.why})' if pod.why else ''}"
        state = self.heard.states.get(pod.name, "") if self.heard is not None and pod.is_node else ""
        if state == LEFT:
            return "has left the job"
        if self.silent.get(pod.name, self.now + 1) <= self.now:
            return "its controller does not hear any more"
        if not pod.machine or self.doubt_ends is not None:
            return ""
        machine = self.machines.get(pod.machine)
        if machine is not None:
            why = why_lost(machine)
            return f"is on {pod.machine}, which {why}" if why else ""
        silent = state == LOST if pod.is_node else self.controller.failing_since is not None
        return f"is on {pod.machine}, which is gone" if silent else ""


def old_status(raw: Object) -> TrainingJobStatus:
    """The resource's status; what cannot be read of it (another version wrote it) counts as absent."""
    tree = dict(raw.get("status") or {})
    while True:
        try:
            return TrainingJobStatus.from_yaml_tree(tree)
        except ValidationError as error:
            bad = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]} & tree.keys()
            if not bad:
                return TrainingJobStatus()
            tree = {name: value for name, value in tree.items() if name not in bad}


def problem_of(observed: Observed) -> str:
    """Why the resource cannot be obeyed; "" when it can."""
    if observed.job is None:
        return observed.invalid or "it is no TrainingJob"
    longest = kube.LONGEST_JOB_NAME
    found = list(podspec.problems(observed.job))
    if len(observed.key.name.encode()) > longest:
        found.insert(0, ("metadata.name", f"must have at most {longest} bytes: its Pods' names are host names"))
    if observed.key.name[:1].isdigit():
        found.insert(0, ("metadata.name", "must begin with a letter, as the name of its Service does"))
    return "; ".join(f"{path}: {text}" for path, text in found)


def job_in_force(observed: Observed, problem: str) -> TrainingJob | None:
    """The job to go by; None: there is none that could be."""
    if not problem:
        return observed.job
    text = kept_job(observed.owned.get(("Secret", kube.secret_name(observed.key.name))))
    if text is None:
        return None
    try:
        kept = TrainingJob.model_validate(json.loads(text))
    except (ValueError, SpecError):
        return None
    if kept.metadata.uid != observed.raw["metadata"].get("uid") or podspec.problems(kept):
        return None
    spec = observed.raw.get("spec") or {}
    suspend = bool(spec["suspend"]) if isinstance(spec.get("suspend"), bool) else kept.spec.suspend
    metadata = kept.metadata.model_copy(update={"generation": observed.raw["metadata"].get("generation")})
    spec_in_force = kept.spec.model_copy(update={"suspend": suspend})
    return kept.model_copy(update={"metadata": metadata, "spec": spec_in_force})


def sight_of(
    observed: Observed, job: TrainingJob, problem: str, old: TrainingJobStatus, settings: Settings, now: float
) -> Sight:
    """What ``observed`` shows of ``job``."""
    uid = observed.raw["metadata"].get("uid", "")
    pods = sorted((pod_of(pod, now) for pod in owned_by(observed.pods, uid)), key=lambda pod: pod.index)
    heard = _heard(observed.controller, old, now)
    return Sight(
        key=observed.key,
        job=job,
        problem=problem,
        old=old,
        pods=tuple(pods),
        machines=observed.machines,
        owned={key: found for key, found in observed.owned.items() if owner_uid(found) == uid},
        controller=observed.controller,
        heard=heard,
        trouble=observed.trouble,
        objection=observed.objection if heard is not None else "",
        settings=settings,
        new_token=observed.new_token,
        highest_index=max(_indices(observed.pods, heard, observed.key.name), default=-1),
        now=now,
    )


def _heard(controller: Controller, old: TrainingJobStatus, now: float) -> Heard | None:
    if controller.status is None or not old.head or controller.pod != old.head:
        return None
    return Heard(controller.status, now if controller.heard_at is None else controller.heard_at)


def _indices(pods: Sequence[Object], heard: Heard | None, job: str) -> Iterator[int]:
    """The indices in use, or used, by whosever Pods they are."""
    names: list[Any] = [pod["metadata"]["name"] for pod in pods]
    names += [name for name in (heard.states if heard is not None else ()) if name.startswith(f"{job}-")]
    return (index_of(name) for name in names)
