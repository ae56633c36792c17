"""The objects that ``trainctl`` reads and changes: TrainingJobs, their Pods, Secrets, Events and packed code."""

from __future__ import annotations

import base64
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from outlast.errors import RequestError
from outlast.kube import JOB_LABEL, ROLE_LABEL, TOKEN_KEY, secret_name
from trainctl.cluster.connection import Cluster, Json, Query
from trainctl.cluster.refusals import (
    Absent,
    ClusterError,
    Forbidden,
    Gone,
    NotInstalled,
    Unauthorized,
    Unreachable,
    Unwell,
    is_unwell,
)
from trainctl.columns import printable
from trainctl.timeline import is_since

JOBS_API = "/apis/outlast.dev/v1alpha1"
PAGE = 500
"""Objects in one answer to a list."""
WATCH_S, QUIET_S = 240, 270.0
"""How long the server keeps a watch, and when silence means that it is lost."""
PATIENCE_S = 60.0
"""How long a follower asks an API server that does not answer, is not well, or refuses what it allowed before."""
BRIEF_S = 1.0
"""A watch that ends sooner and has brought nothing is not asked for again at once."""
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_REFUSALS = (Unauthorized, Forbidden, NotInstalled)
"""What a starting API server answers until it has read who may do what, and which definitions there are."""

Object = Mapping[str, Any]
NAME = re.compile(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?")
"""What the API server takes for a name. It is put into paths as it is."""


def jobs_path(namespace: str | None, name: str = "", part: str = "") -> str:
    """The path of the jobs of a namespace (None: of all), of one job, or of a subresource of it."""
    place = f"{JOBS_API}/namespaces/{namespace}" if namespace else JOBS_API
    return "/".join(word for word in (f"{place}/trainingjobs", name, part) if word)


def core_path(namespace: str | None, resource: str, name: str = "", part: str = "") -> str:
    """The same for what is in the core group: pods, secrets, events, configmaps."""
    place = f"/api/v1/namespaces/{namespace}" if namespace else "/api/v1"
    return "/".join(word for word in (f"{place}/{resource}", name, part) if word)


@dataclass(frozen=True)
class JobRef:
    """One job in one namespace of a cluster."""

    cluster: Cluster
    namespace: str
    name: str

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise RequestError(
                f'"{self.name}" is no name of a TrainingJob: lower-case letters, digits and -; `trainctl status` lists '
                "those there are"
            )

    @property
    def path(self) -> str:
        return jobs_path(self.namespace, self.name)

    def get(self) -> Json:
        """The resource. Raises Absent."""
        return self.cluster.get(self.path)

    def change(self, change: Mapping[str, Any], part: str = "") -> Json:
        """Merge ``change`` into the resource, or into a subresource of it."""
        return self.cluster.merge(jobs_path(self.namespace, self.name, part), change)

    def pods(self) -> list[Json]:
        """All its Pods, terminating ones too."""
        return list_all(self.cluster, core_path(self.namespace, "pods"), {"labelSelector": self.selector})

    def token(self) -> str:
        """The job's bearer token. Raises Absent before the operator has made it, Forbidden."""
        secret = self.cluster.get(core_path(self.namespace, "secrets", secret_name(self.name)))
        return base64.b64decode((secret.get("data") or {}).get(TOKEN_KEY, "")).decode()

    @property
    def selector(self) -> str:
        """Selects what belongs to the job."""
        return f"{JOB_LABEL}={self.name}"

    def watch_itself(self) -> Iterator[Json]:
        """The resource, now and at each change, until it is gone (Absent)."""
        query = {"fieldSelector": f"metadata.name={self.name}"}
        known = False
        for objects in follow(self.cluster, jobs_path(self.namespace), query):
            if not objects:
                if known:
                    raise Absent(f'the TrainingJob "{self.name}" in namespace "{self.namespace}" was deleted')
                self.get()
                continue
            known = True
            yield next(iter(objects.values()))

    def watch_pods(self) -> Iterator[list[Json]]:
        """Its Pods, now and at each change."""
        for objects in follow(self.cluster, core_path(self.namespace, "pods"), {"labelSelector": self.selector}):
            yield list(objects.values())

    def events(self, resource: Object) -> list[Json]:
        """Kubernetes Events about the job that ``resource`` is, and about its Pods."""
        path = core_path(self.namespace, "events")
        own = list_all(self.cluster, path, {"fieldSelector": self.event_selector})
        pods = list_all(self.cluster, path, {"fieldSelector": "involvedObject.kind=Pod"})
        return [event for event in (*own, *pods) if self.is_about(event, resource)]

    @property
    def event_selector(self) -> str:
        """Selects the Events about the job itself, and about earlier ones of its name."""
        return f"involvedObject.kind=TrainingJob,involvedObject.name={self.name}"

    def is_about(self, event: Object, resource: Object) -> bool:
        """Whether an Event is about the job that ``resource`` is or one of its Pods, and not about an earlier job of
        its name: by the uid; where that says nothing, as of Pods that are gone, by the time."""
        about, meta = event.get("involvedObject") or {}, resource["metadata"]
        if about.get("kind") == "Pod":
            return self.has_pod(event) and is_since(event, meta.get("creationTimestamp"))
        if about.get("uid") and meta.get("uid"):
            return bool(about["uid"] == meta["uid"])
        return about.get("name") == self.name and is_since(event, meta.get("creationTimestamp"))

    def has_pod(self, event: Object) -> bool:
        """Whether an Event is about a Pod of the job, also one that is gone: by its name."""
        about = event.get("involvedObject") or {}
        name = str(about.get("name", ""))
        role, _, index = name.removeprefix(f"{self.name}-").partition("-")
        return name.startswith(f"{self.name}-") and role in ("head", "node") and index.isdecimal()


def role_of(pod: Object) -> str:
    """``head``, ``node`` or nothing."""
    return str((pod["metadata"].get("labels") or {}).get(ROLE_LABEL, ""))


def list_all(cluster: Cluster, path: str, query: Query | None = None) -> list[Json]:
    """All objects of a list, in pages."""
    return list(_listed(cluster, path, query or {})[0])


def _listed(cluster: Cluster, path: str, query: Query) -> tuple[list[Json], str]:
    """The objects and the version they are of."""
    found: list[Json] = []
    more = ""
    while True:
        page = cluster.get(path, {**query, "limit": PAGE, "continue": more or None}, verb="list")
        found += page.get("items") or []
        more = (page.get("metadata") or {}).get("continue") or ""
        if not more:
            return found, str((page.get("metadata") or {}).get("resourceVersion", ""))


def follow(cluster: Cluster, path: str, query: Query | None = None) -> Iterator[dict[str, Json]]:
    """All objects of a list by uid, now and after each change, for as long as they are asked for.

    An API server that goes away, is unwell, or refuses what it allowed before, is asked again for ``PATIENCE_S``; then
    its error is raised, and at once when it refuses from the beginning or there was never an answer.
    """
    away, listed = Away(), False
    while True:
        try:
            objects, version = _listed(cluster, path, query or {})
            listed = True
            known = {item["metadata"]["uid"]: item for item in objects}
            yield dict(known)
            for kind, item in _changes(cluster, path, query or {}, version, away):
                uid = item["metadata"]["uid"]
                if kind == "DELETED":
                    known.pop(uid, None)
                else:
                    known[uid] = item
                yield dict(known)
        except Gone:
            continue
        except Unreachable as error:
            if not (listed or cluster.has_answered or isinstance(error, Unwell)):
                raise
            away.wait_or_raise(error)
        except _REFUSALS as error:
            away.wait_or_raise(error)


def _changes(cluster: Cluster, path: str, query: Query, version: str, away: Away) -> Iterator[tuple[str, Json]]:
    """One watch after another. Raises Gone when it came too late."""
    while True:
        asked = {**query, "watch": "true", "allowWatchBookmarks": "true", "timeoutSeconds": WATCH_S}
        began, silent = time.monotonic(), True
        lines = cluster.lines(path, {**asked, "resourceVersion": version}, verb="watch", quiet_s=QUIET_S)
        away.allowed = True
        for line in lines:
            silent = False
            try:
                change = json.loads(line)
            except ValueError:
                break  # torn: the connection was lost in the middle of it
            if change["type"] == "ERROR":
                raise _watch_error(change["object"])
            away.over()
            version = change["object"]["metadata"]["resourceVersion"]
            if change["type"] != "BOOKMARK":
                yield change["type"], change["object"]
        if silent and time.monotonic() - began < BRIEF_S:
            away.pause()
        else:
            away.over()


def _watch_error(status: Object) -> ClusterError:
    message, code = str(status.get("message", "the watch was ended")), int(status.get("code") or 0)
    if code == 410:
        return Gone(message)
    return Unwell(message) if is_unwell(code) else ClusterError(message)


class Note:
    """Says that the API server is waited for: once in ``PATIENCE_S``, for all followers of one command together."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._said_at = float("-inf")

    def say(self, error: ClusterError) -> None:
        """Say it, unless that was done a moment ago."""
        with self._lock:
            now = self._clock()
            if now - self._said_at <= PATIENCE_S:
                return
            self._said_at = now
        print(
            f"note: the API server is asked again, for {PATIENCE_S:.0f} s at most: {printable(str(error))}",
            file=sys.stderr,
            flush=True,
        )


_note = Note()


class Away:
    """Patience with an API server that does not answer, is not well, or refuses although it is ``allowed``: known to
    have done what is asked of it."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        note: Note = _note,
    ) -> None:
        self._clock, self._sleep, self._note = clock, pause, note
        self._since: float | None = None
        self._times = 0
        self.allowed = False

    def over(self) -> None:
        """It answers."""
        self._since, self._times, self.allowed = None, 0, True

    def wait_or_raise(self, error: ClusterError) -> None:
        """Pause; raise ``error`` when it has been too long, and a refusal at once where nothing was allowed yet."""
        if isinstance(error, _REFUSALS) and not self.allowed:
            raise error
        now = self._clock()
        self._since = now if self._since is None else self._since
        if now - self._since > PATIENCE_S:
            raise error
        self._note.say(error)
        self.pause()

    def pause(self) -> None:
        """Pause, a little longer each time until it answers."""
        self._sleep(_PAUSES_S[min(self._times, len(_PAUSES_S) - 1)])
        self._times += 1
