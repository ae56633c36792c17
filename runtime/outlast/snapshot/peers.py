"""The connections of one operation to other keepers: made when needed, closed together, ended together."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from types import TracebackType
from typing import Generic, TypeVar

from outlast.errors import RequestError, StaleAttemptError
from outlast.snapshot.wire import Deadline, KeeperClient

Key = TypeVar("Key", bound=Hashable)


class Peers(Generic[Key]):
    """Clients of the keepers at ``addresses``, (host, port) by key. One thread uses them; any may ``shutdown``."""

    def __init__(self, addresses: Mapping[Key, tuple[str, int]], token: str) -> None:
        self._addresses = addresses
        self._token = token
        self._lock = threading.Lock()
        self._clients: dict[Hashable, KeeperClient] = {}
        self._ended = False

    def client(self, key: Key, deadline: Deadline, purpose: Hashable = None) -> KeeperClient:
        """The connection to ``key`` for ``purpose``; one for each of them.

        Raises RequestError when no address is known, TransferError, StaleAttemptError after ``shutdown``.
        """
        if (key, purpose) in self._clients:
            return self._clients[key, purpose]
        if key not in self._addresses:
            raise RequestError(f"no address of the keeper of {key} was given: {sorted(map(str, self._addresses))} were")
        host, port = self._addresses[key]
        client = KeeperClient(host, port, self._token, deadline.left())
        with self._lock:
            self._clients[key, purpose] = client
            if self._ended:
                client.shutdown()
                raise StaleAttemptError("the operation was ended from outside")
        return client

    def shutdown(self) -> None:
        """End every wait on these connections, now and later."""
        with self._lock:
            self._ended = True
            for client in self._clients.values():
                client.shutdown()

    def __enter__(self) -> Peers[Key]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()
