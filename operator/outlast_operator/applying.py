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
from dataclasses import dataclass

from outlast.clock import Clock
from outlast_operator.caches import Caches
from outlast_operator.cluster import Cluster
from outlast_operator.expectations import Expectations
from outlast_operator.kinds import BY_NAME, JOB, POD, Kind, kind_of
from outlast_operator.model import Action, Apply, Call, Create, Delete, Key, Object
from outlast_operator.pods import owner_uid
from outlast_operator.poller import CallFailed, Poller
from outlast_operator.refusals import NAME_TAKEN, ApiError, Verdict, verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """How far a plan's actions came: ``error`` ended them, or kept more from being made; ``calls_failed`` did not.
    ``objection``: why the job's controller will not do what it was asked, "" when it objects to nothing."""

    error: ApiError | None = None
    calls_failed: int = 0
    objection: str = ""


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
        calls_failed, objection = 0, ""
        refused: ApiError | None = None
        kept: ApiError | None = None  # why what was to go did not: what takes its place is made all the same
        for action in actions:
            if refused is not None and isinstance(action, Create | Apply):
                continue
            self.may_write()
            try:
                self._one(key, raw, action)
            except CallFailed as error:
                calls_failed += 1
                objection = error.objection or objection
                log.warning("call-failed job=%s cause=%s", key, error)
            except ApiError as error:
                found = verdict(error)
                if found is Verdict.DONE:
                    continue
                if isinstance(action, Delete) and error.status:
                    kept = kept or error
                elif found is Verdict.REFUSED:
                    refused = refused or error
                else:
                    return Done(error, calls_failed, objection)
        if kept is not None and verdict(kept) is Verdict.RETRY:
            return Done(kept, calls_failed, objection)
        return Done(refused or kept, calls_failed, objection)

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
            self._cluster.create(kind, key.namespace, obj)
        except ApiError as error:
            if 400 <= error.status < 500:
                self._expectations.seen(key, name)  # it was not made; without a clear answer it may have been
            if error.reason == "AlreadyExists":
                self._check_owner(key, kind, obj)
            raise
        log.info("created job=%s kind=%s name=%s", key, kind.name, name)

    def _check_owner(self, key: Key, kind: Kind, obj: Object) -> None:
        """Raises ApiError when the object of that name is not, and will not be, this job's. One of a job of the same
        name that was deleted is on its way out; one that has lost the labels by which caches know it gets them back."""
        name, labels = obj["metadata"]["name"], obj["metadata"]["labels"]
        found = self._cluster.get(kind, key.namespace, name)
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
