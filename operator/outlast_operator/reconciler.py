"""One pass over one job: observe, plan, apply, one status write if it changed, then events.

``Reconciler.reconcile`` is the loop; it is called by the work queue's threads, for one job by one thread at a time.
Nothing it keeps between passes is needed by a successor: ``_Memory`` holds when a status was written last, since when
something is refused, and what the job's controller objected to.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Protocol

from outlast.clock import Clock
from outlast.kube import MANAGED_BY, MANAGED_BY_LABEL
from outlast_operator.applying import Applier, Done
from outlast_operator.caches import Caches
from outlast_operator.cluster import Cluster
from outlast_operator.expectations import Expectations
from outlast_operator.kinds import JOB, POD
from outlast_operator.model import Happening, Key, Object, Observed, Plan, Trouble
from outlast_operator.pods import index_of, owned_by, owner_uid
from outlast_operator.poller import Poller, Target
from outlast_operator.refusals import ApiError, Verdict, reason_of, verdict
from outlast_operator.statuswrite import Pace, patch_of
from outlast_operator.store import version_of

log = logging.getLogger(__name__)

Decide = Callable[[Observed, float], Plan]
"""``plan.plan`` with its settings; ``now`` in wall seconds."""
LOOK_AGAIN_S = 1.0
"""How soon to look whether the cache has caught up, if no event says so before."""


class Recorder(Protocol):
    """Where events go (``events.Events``)."""

    def tell(self, job: Object, happenings: Sequence[Happening]) -> None: ...

    def forget(self, key: Key) -> None: ...


@dataclass(frozen=True)
class Passed:
    """How a pass ended. ``again_in_s``: look again then, if nothing makes it happen before; ``refused``: not everything
    was taken, so it is repeated with back-off."""

    again_in_s: float | None = None
    refused: bool = False


@dataclass
class _Memory:
    """``puzzled_since``: since when no plan can be made with what the controller says."""

    pace: Pace
    trouble: Trouble | None = None
    puzzled_since: float | None = None
    objection: str = ""


class Reconciler:
    """What a pass needs, given once."""

    def __init__(
        self,
        caches: Caches,
        cluster: Cluster,
        expectations: Expectations,
        poller: Poller,
        applier: Applier,
        recorder: Recorder,
        decide: Decide,
        clock: Clock,
        chance: Random,
        progress_every_s: float,
    ) -> None:
        self._caches, self._cluster, self._expectations, self._poller = caches, cluster, expectations, poller
        self._applier, self._recorder, self._decide = applier, recorder, decide
        self._clock, self._chance, self._progress_every_s = clock, chance, progress_every_s
        self._memories: dict[Key, _Memory] = {}

    def reconcile(self, key: Key) -> Passed:
        """One pass. Raises ApiError when the API server did not take what a later pass may have it take."""
        if self._is_behind(key):  # before anything is read: what arrives in between must be in what is read
            return Passed(again_in_s=LOOK_AGAIN_S)
        observed = self._observe(key)
        if observed is None:
            return self._forget(key)
        plan = self._decided(observed)
        done = self._applier.do(key, observed.raw, plan.actions)
        if done.error is not None and verdict(done.error) is not Verdict.REFUSED:
            raise done.error
        memory = self._memory(key)
        memory.objection = done.objection or (memory.objection if done.calls_left else "")
        plan = self._with_trouble(observed, plan, done)
        wait_s = self._write_status(observed, plan)
        self._recorder.tell(observed.raw, plan.happenings)
        again_in_s = min((seconds for seconds in (wait_s, plan.again_in_s) if seconds is not None), default=None)
        return Passed(again_in_s, refused=done.error is not None or done.calls_failed > 0)

    def progress_due_in_s(self, key: Key) -> float:
        """How long until the job's progress may be written; called from any thread."""
        memory = self._memories.get(key)
        return 0.0 if memory is None else memory.pace.wait_s(False, self._clock.monotonic())

    def _observe(self, key: Key) -> Observed | None:
        observed = self._caches.observe(key)
        if observed is None:
            return None
        self._poller.aim(key, self._target(observed))
        heard = self._poller.heard(key)
        objection = self._memory(key).objection
        return replace(observed, controller=heard, objection=objection, new_token=secrets.token_urlsafe(32))

    def _target(self, observed: Observed) -> Target | None:
        """The head Pod in force, if it can be asked."""
        head = (observed.raw.get("status") or {}).get("head")
        own = owned_by(observed.pods, observed.raw["metadata"]["uid"])
        pod = next((pod for pod in own if pod["metadata"]["name"] == head), None)
        token = self._caches.token(observed.raw)
        status = pod.get("status", {}) if pod else {}
        if pod is None or not token or not status.get("podIP") or status.get("phase") != "Running":
            return None
        return Target(pod["metadata"]["name"], pod["metadata"]["uid"], status["podIP"], token)

    def _decided(self, observed: Observed) -> Plan:
        """The plan; a controller whose answer no plan can be made with counts as silent."""
        memory = self._memory(observed.key)
        try:
            plan = self._decide(observed, self._clock.wall())
            memory.puzzled_since = None
            return plan
        except Exception as error:
            if observed.controller.status is None:
                raise
            log.exception("answer-not-understood job=%s pod=%s", observed.key, observed.controller.pod)
            since = memory.puzzled_since = memory.puzzled_since or self._clock.wall()
            trouble = f"its answer is not understood: {error!r}"
            silent = replace(observed.controller, status=None, failing_since=since, trouble=trouble)
            return self._decide(replace(observed, controller=silent), self._clock.wall())

    def _is_behind(self, key: Key) -> bool:
        """Whether the cache lacks what earlier passes wrote; what is overdue is asked for at the API server."""
        job = self._caches.job(key)
        if job is None:
            return False
        has_pod = self._caches.has_pod(key.namespace)
        missing = self._expectations.outstanding(key, version_of(job), has_pod, self._clock.monotonic())
        if missing is None:
            return False
        for name in sorted(missing.pods) if missing.overdue else ():
            try:
                pod = self._cluster.get(POD, key.namespace, name)
            except ApiError as error:
                if error.status != 404:
                    raise
                self._expectations.seen(key, name)
                continue
            log.warning("cache-behind job=%s pod=%s", key, name)
            hidden = (pod["metadata"].get("labels") or {}).get(MANAGED_BY_LABEL) != MANAGED_BY
            if hidden and owner_uid(pod) == job["metadata"]["uid"]:  # its creation was not answered, and it is no use
                self._applier.may_write()
                self._cluster.delete(POD, key.namespace, name, pod["metadata"]["uid"], None)
                self._expectations.seen(key, name)
        return True

    def _with_trouble(self, observed: Observed, plan: Plan, done: Done) -> Plan:
        """The plan whose status is written: after a refusal one that knows of it, and has made no Pods."""
        memory = self._memory(observed.key)
        if done.error is None:
            memory.trouble = None
            return plan
        reason, message = reason_of(done.error), str(done.error)
        known = memory.trouble
        since = known.since if known is not None and known.reason == reason else self._clock.wall()
        memory.trouble = Trouble(reason, message, since)
        log.warning("refused job=%s reason=%s message=%s", observed.key, reason, message)
        told = self._decided(replace(observed, trouble=memory.trouble))
        if told.status is None or observed.job is None:
            return told
        names = [*done.made, *(pod["metadata"]["name"] for pod in observed.pods)]
        used = max((index_of(name) for name in names), default=-1)  # no index is used twice
        next_pod = max(observed.job.status.next_pod if observed.job.status else 0, used + 1)
        return replace(told, status=told.status.model_copy(update={"next_pod": next_pod}))

    def _write_status(self, observed: Observed, plan: Plan) -> float | None:
        """Write it, or say how long that can wait; None: there is nothing to write."""
        patch = None if plan.status is None else patch_of(observed.raw, plan.status)
        if patch is None:
            return None
        key, now, pace = observed.key, self._clock.monotonic(), self._memory(observed.key).pace
        wait_s = pace.wait_s(plan.urgent, now)
        if wait_s:
            return wait_s
        self._applier.may_write()
        written = self._cluster.patch(JOB, key.namespace, key.name, patch, "status")
        self._expectations.wrote(key, version_of(written), now)
        pace.last = now
        return None

    def _memory(self, key: Key) -> _Memory:
        memory = self._memories.get(key)
        if memory is None:
            # A new operator knows of no earlier write: spread the first ones, or all jobs' fall together for ever.
            last = self._clock.monotonic() - self._progress_every_s * self._chance.random()
            memory = self._memories[key] = _Memory(Pace(self._progress_every_s, last))
        return memory

    def _forget(self, key: Key) -> Passed:
        self._poller.aim(key, None)
        self._expectations.forget(key)
        self._recorder.forget(key)
        self._memories.pop(key, None)
        return Passed()
