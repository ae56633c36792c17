"""One cache kept like the API server: the official client's ``SharedInformer`` over a source of plain JSON.

The informer lists, watches, resumes a watch that ended and lists anew after one that expired (410). Used through its
public interface alone; what it lacks (kubernetes 37.0.1) is in ``Source``, the function it lists and watches by:

- it decodes into models: 1.4 ms a Pod; given ``object`` as the return type it keeps plain JSON, 0.13 ms.
- a server that refuses connections is asked again at once, for ever: here each failure makes the next request wait.
- a connection that died silently is read for ever: here the server ends each watch after some minutes, and a read of
  more than two minutes without a byte (bookmarks come every minute) fails.
- it asks for no bookmarks, so a quiet watch that is resumed has expired; for one list in one piece; and for everything
  of an object to be kept.
- a listing tells handlers of deleted objects before they have left its cache, and of all objects as modified: here the
  handlers keep the ``Store`` themselves, before they tell anybody, and pass on only what differs.
- it does not say when it has the whole list: it has, with all handlers called, when it asks for the first watch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import urllib3
from kubernetes.client.exceptions import ApiException
from kubernetes.informer import ADDED, DELETED, ERROR, MODIFIED, SharedInformer

from outlast.clock import Clock
from outlast_operator.cluster import Cluster
from outlast_operator.kinds import Kind
from outlast_operator.model import Object
from outlast_operator.pruning import pruned
from outlast_operator.refusals import ApiError
from outlast_operator.store import Store, key_of

log = logging.getLogger(__name__)
logging.getLogger("kubernetes.informer.informer").setLevel(logging.CRITICAL)
# It logs a stack trace each time that a connection ends; ``_failed`` says it in a line.

WATCH_S = 300
"""How long one watch lasts; each lasts up to a quarter longer, so that they do not all end at once."""
SILENT_S = 130.0
FIRST_WAIT_S, LONGEST_WAIT_S = 0.2, 15.0
HASTY_S = 0.5
TOO_LARGE = "Too large resource version"
"""What is said of a version from before etcd was restored from a backup: all must be listed anew, as after 410."""

Changed = Callable[[Kind, Object], None]
"""Told of each object that was added, has changed in what is kept, or is gone; the store shows it by then."""


@dataclass(frozen=True)
class _Version:
    resource_version: str


@dataclass(frozen=True)
class _Listed:
    """What the informer reads of a list's answer."""

    items: list[Object]
    metadata: _Version


class Source:
    """Lists and watches one kind, in one namespace or (None) all; called by the informer's thread alone."""

    def __init__(
        self, cluster: Cluster, kind: Kind, namespace: str | None, selector: str, clock: Clock, chance: Random
    ) -> None:
        self._cluster, self._kind, self._namespace, self._selector = cluster, kind, namespace, selector
        self._clock, self._chance = clock, chance
        self._failures = 0
        self._watched_at = float("-inf")
        self._leaving = threading.Event()
        self.synced = threading.Event()
        self.thread: threading.Thread | None = None
        self.asked_at = clock.monotonic()
        """When the informer asked for something last: it is stuck when that is too long ago."""

    def ask(self, watch: bool = False, resource_version: str = "", **_: object) -> Any:
        """What the informer calls to list, and with ``watch`` to watch. Raises ApiException, as it expects.

        The next line is read by the client: it decodes into this, and remembers the version of what it decoded.

        :rtype: object
        """
        self.thread = threading.current_thread()
        if watch:
            self.synced.set()
        self._wait()
        self.asked_at = self._clock.monotonic()
        try:
            answer = self._watch(resource_version) if watch else self._list()
        except ApiError as error:
            self._failures += 1
            gone = error.status == 410 or TOO_LARGE in error.message
            raise ApiException(status=410 if gone else error.status, reason=str(error)) from error
        self._failures = 0
        return answer

    def leave(self) -> None:
        """Wait no longer: the informer is to end."""
        self._leaving.set()

    def failed(self) -> None:
        """A watch broke off: the next request waits."""
        self._failures = max(1, self._failures)

    def _wait(self) -> None:
        """After failures, and when watches end as soon as they begin."""
        hasty = self._clock.monotonic() - self._watched_at < HASTY_S
        if self._failures or hasty:
            most = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** max(0, self._failures - 1))
            self._leaving.wait(most * self._chance.uniform(0.5, 1.0))

    def _list(self) -> _Listed:
        items: list[Object] = []
        version = ""
        for page in self._cluster.pages(self._kind, self._namespace, self._selector):
            version = page["metadata"]["resourceVersion"]
            items.extend(pruned(self._kind, item) for item in page["items"] or ())
        return _Listed(items, _Version(version))

    def _watch(self, version: str) -> urllib3.BaseHTTPResponse:
        self._watched_at = self._clock.monotonic()
        lasts_s = int(WATCH_S * self._chance.uniform(1.0, 1.25))
        return self._cluster.watch(self._kind, self._namespace, self._selector, version, lasts_s, SILENT_S)


class Informer:
    """Keeps ``store`` like the API server and tells ``changed``, on a thread of its own."""

    def __init__(self, source: Source, kind: Kind, store: Store, changed: Changed) -> None:
        self._source, self._kind, self._store, self._changed = source, kind, store, changed
        self._shared = SharedInformer(source.ask)
        self._shared.add_event_handler(ADDED, self._put)
        self._shared.add_event_handler(MODIFIED, self._put)
        self._shared.add_event_handler(DELETED, self._remove)
        self._shared.add_event_handler(ERROR, self._failed)

    def start(self) -> None:
        self._shared.start()

    def stop(self) -> None:
        """Ends the thread; may take as long as a request that is under way."""
        self._source.leave()
        self._shared.stop()

    @property
    def name(self) -> str:
        """What it keeps."""
        return self._kind.plural

    @property
    def synced(self) -> bool:
        """Whether the store has been filled once."""
        return self._source.synced.is_set()

    def ailing(self, now: float) -> str:
        """Why this informer cannot be trusted to go on, "" when it can; ``now`` monotonic."""
        thread = self._source.thread
        if thread is not None and not thread.is_alive():
            return f"the informer of {self._kind.plural} has ended"
        silent = now - self._source.asked_at
        if silent > WATCH_S * 1.25 + 2 * SILENT_S:
            return f"the informer of {self._kind.plural} has asked for nothing for {silent:.0f} s"
        return ""

    def _put(self, obj: dict[str, Any]) -> None:
        kept = pruned(self._kind, obj)
        obj.clear()
        obj.update(kept)  # in place: the informer's own cache holds this object, and would hold all of it
        if self._store.put(obj):
            self._changed(self._kind, obj)

    def _remove(self, obj: Object) -> None:
        known = self._store.remove(key_of(obj))
        self._changed(self._kind, known if known is not None else pruned(self._kind, obj))

    def _failed(self, error: object) -> None:
        self._source.failed()
        log.warning("informer-interrupted kind=%s cause=%s", self._kind.plural, str(error).replace("\n", " ")[:300])
