"""Does what a plan says: requests to the API server and to the job's controller, in the plan's order.

Nothing is written blindly: a create bears a name that is used once, a delete the uid that it means, an apply is forced
only on an object that this job owns already. The first action that the API server does not take ends the pass; a call
that the job's controller does not take holds back nothing (it may be gone for good; Pods must be made all the same).
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
from outlast_operator.poller import CallFailed, Poller
from outlast_operator.refusals import NAME_TAKEN, ApiError, Verdict, verdict

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """How far a plan's actions came: ``error`` ended them; ``calls_failed`` did not. ``objection``: why the job's
    controller will not do what it was asked, "" when it objects to nothing."""

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
        """All of them, until one is not taken."""
        calls_failed, objection = 0, ""
        for action in actions:
            self.may_write()
            try:
                self._one(key, raw, action)
            except CallFailed as error:
                calls_failed += 1
                objection = error.objection or objection
                log.warning("call-failed job=%s cause=%s", key, error)
            except ApiError as error:
                if verdict(error) is not Verdict.DONE:
                    return Done(error, calls_failed, objection)
        return Done(None, calls_failed, objection)

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
        name that was deleted is on its way out."""
        found = self._cluster.get(kind, key.namespace, obj["metadata"]["name"])
        owners = found["metadata"].get("ownerReferences") or ()
        if not any(owner.get("kind") == JOB.name and owner.get("name") == key.name for owner in owners):
            what = f"{kind.name} {obj['metadata']['name']}"
            text = "it exists and is not this job's: delete it, or give the job another name"
            raise ApiError("create", what, 409, NAME_TAKEN, text)
