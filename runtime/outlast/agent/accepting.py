"""Taking connections in a loop that must go on."""

from __future__ import annotations

import errno
import socket
import sys
import time

_SHORTAGES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_NOTHING = frozenset({errno.EAGAIN, errno.ECONNABORTED})
_PAUSE_S = 0.05


class Acceptor:
    """Takes connections from a listener that does not block, and bears that descriptors or memory are short."""

    def __init__(self, listener: socket.socket, name: str) -> None:
        self._listener, self._name = listener, name
        self._told = False

    def accept(self) -> socket.socket | None:
        """A connection that does not block; None where there is none, or none can be had for now (after a pause)."""
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _SHORTAGES:
                self._pause(error)
            elif error.errno not in _NOTHING:
                raise
            return None
        sock.setblocking(False)
        return sock

    def _pause(self, error: OSError) -> None:
        if not self._told:
            print(f"{self._name} accepts no connections for now: {error.strerror}", file=sys.stderr, flush=True)
        self._told = True
        time.sleep(_PAUSE_S)
