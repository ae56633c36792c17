"""A keeper's way to object storage: `ObjectTier` over `Store`. One for a process, shared by its threads.

Stores are opened when they are first needed and kept, one for each URL and limits: opening one imports its library and
makes its connections, and all transfers of one store share its bandwidth.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from outlast.checkpoint.store import Store, StoreOptions, open_store
from outlast.errors import CheckpointError
from outlast.snapshot.stored import TransferLimits


class StoreTier:
    """See `ObjectTier` for what it does and raises. ``options``: what the limits of a transfer leave open."""

    def __init__(self, options: StoreOptions | None = None) -> None:
        self._options = replace(options or StoreOptions(), on_wait=self._hear)
        self._lock = threading.Lock()
        self._stores: dict[tuple[str, StoreOptions], Store] = {}
        self._hearing = threading.Lock()
        self._troubles: dict[int, str] = {}
        """Of each thread that waits what it heard last, the latest at the end."""

    def upload(self, url: str, key: str, data: memoryview, limits: TransferLimits) -> None:
        """Make the object ``key`` out of ``data``."""
        self._store(url, limits).upload(key, data, limits.cancelled)

    def fetch(self, url: str, key: str, target: memoryview, limits: TransferLimits) -> None:
        """Fill ``target`` with the object, which must have exactly that size."""
        store = self._store(url, limits)
        size = store.head(key).size
        if size != len(target):
            raise CheckpointError(f"{url}/{key} has {size} bytes, not the {len(target)} that it was uploaded with")
        store.read_into(key, 0, target, limits.cancelled)

    def trouble(self) -> str | None:
        """Why transfers wait for a store, as it said last; None while none waits."""
        with self._hearing:
            return next(reversed(self._troubles.values()), None)

    def close(self) -> None:
        """Let all connections go."""
        with self._lock:
            stores, self._stores = self._stores, {}
        for store in stores.values():
            store.close()

    def _hear(self, trouble: str | None) -> None:
        """See `StoreOptions`: the thread that waits is the one that tells, also that it waits no more."""
        thread = threading.get_ident()
        with self._hearing:
            self._troubles.pop(thread, None)
            if trouble is not None:
                self._troubles[thread] = trouble

    def _store(self, url: str, limits: TransferLimits) -> Store:
        options = replace(self._options, patience_s=limits.patience_s, bandwidth=limits.bandwidth)
        with self._lock:
            if (url, options) not in self._stores:
                self._stores[url, options] = open_store(url, options)
            return self._stores[url, options]
