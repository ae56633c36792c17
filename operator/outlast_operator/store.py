"""The caches: objects by (namespace, name), with indexes, safe to use from several threads.

Written by the informers' threads alone, so that a store is never ahead of its watch; what a pass has written and not
seen yet is ``expectations``' business. What is stored is not changed any more: readers may keep what they were given.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping

from outlast_operator.model import Key, Object
from outlast_operator.pruning import same

Indexer = Callable[[Object], Hashable | None]
"""The value that an object is found by; None: not at all."""


def key_of(obj: Object) -> Key:
    """Where the object is; the namespace is "" for what has none."""
    return Key(obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def version_of(obj: Object) -> int:
    """The resourceVersion as a number: later writes have greater ones (Kubernetes, KEP-5504)."""
    text = obj["metadata"].get("resourceVersion", "")
    return int(text) if text.isdigit() else 0


class Store:
    """All objects of one kind that are of interest."""

    def __init__(self, indexers: Mapping[str, Indexer] | None = None) -> None:
        self._indexers = dict(indexers or {})
        self._objects: dict[Key, Object] = {}
        self._found: dict[str, dict[Hashable, dict[Key, Object]]] = {name: {} for name in self._indexers}
        self._lock = threading.Lock()

    def put(self, obj: Object) -> bool:
        """Keep ``obj``; whether it differs from what was known in more than its version."""
        key = key_of(obj)
        with self._lock:
            known = self._objects.get(key)
            if known is not None:
                self._unindex(key, known)
            self._objects[key] = obj
            for name, indexer in self._indexers.items():
                value = indexer(obj)
                if value is not None:
                    self._found[name].setdefault(value, {})[key] = obj
        return not same(known, obj)

    def remove(self, key: Key) -> Object | None:
        """Forget the object; the last that was known of it."""
        with self._lock:
            known = self._objects.pop(key, None)
            if known is not None:
                self._unindex(key, known)
            return known

    def get(self, key: Key) -> Object | None:
        """The object, None when there is none."""
        with self._lock:
            return self._objects.get(key)

    def by(self, index: str, value: Hashable) -> list[Object]:
        """The objects that ``index`` finds by ``value``."""
        with self._lock:
            return list(self._found[index].get(value, {}).values())

    def all(self) -> list[Object]:
        """All objects."""
        with self._lock:
            return list(self._objects.values())

    def __len__(self) -> int:
        return len(self._objects)

    def _unindex(self, key: Key, obj: Object) -> None:
        for name, indexer in self._indexers.items():
            value = indexer(obj)
            members = self._found[name].get(value) if value is not None else None
            if members is None:
                continue
            members.pop(key, None)
            if not members:
                del self._found[name][value]
