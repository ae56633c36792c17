"""Does what a plan says: requests to the API server and to the job's controller, in the plan's order.

Nothing is written blindly: a create bears a name that is used once, a delete the uid that it means, an apply is forced
only on an object that this job owns already. After a refusal of the API server's nothing more is made, but what is to
go goes, and the controller is told what it has to know: a spare for which there is no quota must not keep the job from
being resized. Any other error of the API server's ends the pass; a call that the job's controller does not take holds
back nothing (it may be gone for good; Pods must be made all the same), nor does a delete that is answered with an
error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from outlast import kube
from outlast.clock import Clock
from outlast_operator.caches import Caches
from outlast_operator.cluster import Cluster
from outlast_operator.expectations import Expectations
from outlast_operator.kinds import BY_NAME, JOB, POD, Kind, kind_of
from outlast_operator.model import Action, Apply, Call, Create, Delete, Key, Object
from outlast_operator.pods import owner_uid
from outlast_operator.poller import CallFailed, Poller
from outlast_operator.refusals import NAME_TAKEN, WEBHOOK, ApiError, Verdict, verdict

log = logging.getLogger(__name__)

OWN_LABELS = frozenset({kube.JOB_LABEL, kube.MANAGED_BY_LABEL, kube.ROLE_LABEL, kube.POD_LABEL})
"""The labels of a Pod that others may not change."""
CALLS_S = 20.0
"""In so long one pass makes calls to the job's controller; what is left is for the next."""


@dataclass(frozen=True)
class Done:
    """How far a plan's actions came: ``error`` ended them, or kept more from being made; ``calls_failed`` did not.
    ``objection``: why the job's controller will not do what it was asked, "" when it objects to nothing; ``made``: the
    names of what was; ``calls_left``: those that were not made."""

    error: ApiError | None = None
    calls_failed: int = 0
    objection: str = ""
    made: tuple[str, ...] = ()
    calls_left: int = 0


@dataclass
class _Tally:
    """How far one pass's actions have come. ``kept``: why what was to go did not: what takes its place is made all the
    same; ``calls_end``: when no more calls are made."""

    refused: ApiError | None = None
    kept: ApiError | None = None
    calls_failed: int = 0
    calls_left: int = 0
    objection: str = ""
    calls_end: float | None = None
    made: list[str] = field(default_factory=list)

    def leaves_out(self, action: Action, now: float) -> bool:
        """Whether ``action`` is left to a later pass."""
        if isinstance(action, Create | Apply):
            return self.refused is not None
        if not isinstance(action, Call):
            return False
        self.calls_end = now + CALLS_S if self.calls_end is None else self.calls_end
        late = now >= self.calls_end
        self.calls_failed += late
        self.calls_left += late
        return late

    def call_failed(self, error: CallFailed) -> None:
        """A controller that does not answer is asked nothing more in this pass."""
        self.calls_failed += 1
        self.objection = error.objection or self.objection
        self.calls_end = self.calls_end if error.answered else 0.0

    def goes_on_after(self, error: ApiError, action: Action) -> bool:
        """Whether what follows ``action`` is done."""
        found = verdict(error)
        if found is Verdict.DONE:
            return True
        if isinstance(action, Delete) and error.status:
            self.kept = self.kept or error
            return True
        if found is Verdict.REFUSED:
            self.refused = self.refused or error
        return found is Verdict.REFUSED

    def was_done(self, action: Action) -> None:
        if isinstance(action, Create):
            self.made.append(action.object["metadata"]["name"])

    def done(self, error: ApiError | None = None) -> Done:
        """``error`` ended the pass."""
        if error is None and self.kept is not None and verdict(self.kept) is Verdict.RETRY:
            error = self.kept
        return Done(
            error or self.refused or self.kept, self.calls_failed, self.objection, tuple(self.made), self.calls_left
        )


class Applier:
    """``may_write`` is asked before each request; it raises when this operator does not lead."""

    def __init__(
        self,
        cluster: Cluster,
        caches: Caches,
        expectations: Expectations,
        poller: Poller,
        clock: Clock,
        may_write: Callable[[], None],
    ) -> None:
        self._cluster, self._caches, self._expectations = cluster, caches, expectations
        self._poller, self._clock, self.may_write = poller, clock, may_write

    def do(self, key: Key, raw: Object, actions: Sequence[Action]) -> Done:
        """All of them, as far as they are taken."""
        tally = _Tally()
        for action in actions:
            if tally.leaves_out(action, self._clock.monotonic()):
                continue
            self.may_write()
            try:
                self._one(key, raw, action)
            except CallFailed as error:
                tally.call_failed(error)
                log.warning("call-failed job=%s cause=%s", key, error)
            except ApiError as error:
                if not tally.goes_on_after(error, action):
                    return tally.done(error)
            else:
                tally.was_done(action)
        return tally.done()

    def _one(self, key: Key, raw: Object, action: Action) -> None:
        if isinstance(action, Create):
            self._create(key, action.object)
        elif isinstance(action, Apply):
            kind = kind_of(action.object)
            owned = self._caches.owns(raw, kind, action.object["metadata"]["name"])
            self._cluster.apply(kind, key.namespace, action.object, force=owned)
        elif isinstance(action, Delete):
            self._cluster.delete(BY_NAME[action.kind], key.namespace, action.name, action.uid, action.grace_s)
            log.info("deleted job=%s kind=%s name=%s", key, action.kind, action.name)
        elif isinstance(action, Call):
            self._poller.call(key, action)
            log.info("called job=%s method=%s path=%s", key, action.method, action.path)

    def _create(self, key: Key, obj: Object) -> None:
        kind, name = kind_of(obj), obj["metadata"]["name"]
        if kind is POD:
            self._expectations.created(key, name, self._clock.monotonic())
        try:
            made = self._cluster.create(kind, key.namespace, obj)
        except ApiError as error:
            if 400 <= error.status < 500 or WEBHOOK in error.message:
                self._expectations.seen(key, name)  # it was not made; without a clear answer it may have been
            if error.reason == "AlreadyExists":
                self._check_owner(key, kind, obj)
            raise
        log.info("created job=%s kind=%s name=%s", key, kind.name, name)
        if kind is POD:
            self._check_labels(key, obj, made)

    def _check_labels(self, key: Key, wanted: Object, made: Object) -> None:
        """A Pod whose labels somebody's admission has changed would never be seen in the caches: it is deleted again.
        Raises ApiError that says so."""
        found = made["metadata"].get("labels") or {}
        labels = wanted["metadata"]["labels"]
        changed = [label for label in sorted(OWN_LABELS) if found.get(label) != labels.get(label)]
        if not changed:
            return
        name = made["metadata"]["name"]
        self._cluster.delete(POD, key.namespace, name, made["metadata"]["uid"], 0)  # its name is free for the next try
        self._expectations.seen(key, name)
        text = f"admission changes its label {changed[0]}, by which the operator knows its Pods: exempt them"
        raise ApiError("create", f"Pod {name}", 403, "Forbidden", text)

    def _check_owner(self, key: Key, kind: Kind, obj: Object) -> None:
        """Raises ApiError when the object of that name is not, and will not be, this job's. One of a job of the same
        name that was deleted is on its way out; one that has lost the labels by which caches know it gets them back."""
        name, labels = obj["metadata"]["name"], obj["metadata"]["labels"]
        try:
            found = self._cluster.get(kind, key.namespace, name)
        except ApiError as error:
            if error.status == 404:  # it has just gone
                return
            raise
        if owner_uid(found) == owner_uid(obj):
            if kind is not POD and not labels.items() <= (found["metadata"].get("labels") or {}).items():
                self._cluster.patch(kind, key.namespace, name, {"metadata": {"labels": labels}})
                log.warning("labels-restored job=%s kind=%s name=%s", key, kind.name, name)
            return
        owners = found["metadata"].get("ownerReferences") or ()
        if not any(owner.get("kind") == JOB.name and owner.get("name") == key.name for owner in owners):
            what = f"{kind.name} {obj['metadata']['name']}"
            text = "it exists and is not this job's: delete it, or give the job another name"
            raise ApiError("create", what, 409, NAME_TAKEN, text)
