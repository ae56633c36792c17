"""A port kept free for a rendezvous: bound, never listening, and shared by SO_REUSEADDR with who will listen there."""

from __future__ import annotations

import socket


class PortHolder:
    """Holds one port of ``host``; ``renew`` takes another, so that no attempt meets the one before."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._held = _bind(host)

    @property
    def port(self) -> int:
        return int(self._held.getsockname()[1])

    def renew(self) -> int:
        """Let this one go and hold another."""
        before, self._held = self._held, _bind(self._host)
        before.close()
        return self.port

    def close(self) -> None:
        self._held.close()


def _bind(host: str) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    held = socket.socket(family, kind, protocol)
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(address)
    return held
