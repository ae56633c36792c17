"""A TCP connection to a port of a Pod, through the API server: port-forward over a WebSocket, without a local port.

Source: Kubernetes, ``pods/portforward`` with subprotocol v4.channel.k8s.io: channel 0 carries the port's data,
channel 1 what went wrong; each begins with a frame that holds the port's number.
"""

from __future__ import annotations

import io
import ssl
from typing import Any

import certifi
import websocket
from kubernetes.stream.ws_client import get_websocket_url, websocket_proxycare

from trainctl.cluster.connection import Cluster
from trainctl.cluster.refusals import Asked, ControllerAway, forward_refusal, port_error
from trainctl.cluster.resources import core_path

SUBPROTOCOL = "v4.channel.k8s.io"
_DATA, _ERROR = 0, 1
_WHO = ("authorization", "impersonate-")
"""Headers that say who asks."""


class ForwardedSocket:
    """What ``http.client`` needs of a socket. Raises ControllerAway when the Pod cannot be reached or goes away."""

    def __init__(self, cluster: Cluster, namespace: str, pod: str, port: int, timeout_s: float) -> None:
        self._what, self._pod = f"port {port} of Pod {pod}", pod
        path = core_path(namespace, "pods", pod, "portforward")
        self._web = _connect(cluster, path, port, timeout_s, self._what)
        self._opened: set[int] = set()

    def settimeout(self, timeout_s: float) -> None:
        """How long one send or receive may take."""
        self._web.settimeout(timeout_s)

    def sendall(self, data: Any) -> None:
        """Send bytes to the port."""
        try:
            self._web.send_binary(bytes((_DATA,)) + bytes(data))
        except (websocket.WebSocketException, OSError) as error:
            raise ControllerAway(f"{self._what}: the connection was lost: {error}") from error

    def receive(self) -> bytes:
        """The next bytes from the port; none at its end."""
        while True:
            try:
                opcode, data = self._web.recv_data()
            except websocket.WebSocketConnectionClosedException:
                return b""
            except websocket.WebSocketTimeoutException as error:
                raise ControllerAway(f"{self._what} does not answer in time") from error
            except (websocket.WebSocketException, OSError) as error:
                raise ControllerAway(f"{self._what}: the connection was lost: {error}") from error
            if opcode == websocket.ABNF.OPCODE_CLOSE:
                return b""
            if opcode != websocket.ABNF.OPCODE_BINARY or not data:
                continue
            if data[0] not in self._opened:
                self._opened.add(data[0])  # the port's number
            elif data[0] == _ERROR:
                raise port_error(data[1:], self._what, self._pod)
            elif data[1:]:
                return bytes(data[1:])

    def makefile(self, mode: str) -> io.BufferedReader:
        """A reader of what comes; ``mode`` is "rb"."""
        assert mode == "rb"
        return io.BufferedReader(_Raw(self))

    def close(self) -> None:
        """End the connection."""
        self._web.shutdown()


class _Raw(io.RawIOBase):
    def __init__(self, socket: ForwardedSocket) -> None:
        self._socket = socket
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._left or self._socket.receive()
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self._left = data[count:]
        return count


def _connect(cluster: Cluster, path: str, port: int, timeout_s: float, what: str) -> websocket.WebSocket:
    """The WebSocket, once the kubelet has been found. Raises ControllerAway, Forbidden, Absent."""
    url, signed = cluster.signed(path)
    headers = {name.lower(): value for name, value in signed.items()}
    own = [f"{name}: {value}" for name, value in signed.items() if name.lower().startswith(_WHO)]
    options: dict[str, Any] = {
        "header": own,
        "subprotocols": [SUBPROTOCOL],
        "timeout": timeout_s,
    }
    settings = cluster.configuration
    if settings.proxy or settings.proxy_headers:
        options = websocket_proxycare(options, settings, url, headers)
    web = websocket.WebSocket(sslopt=_tls(settings), skip_utf8_validation=True)
    try:
        web.connect(get_websocket_url(url, [("ports", str(port))]), **options)
    except websocket.WebSocketBadStatusException as error:
        asked = Asked("GET", path, cluster.context, "create")
        raise forward_refusal(error.status_code, error.resp_body or b"", asked, what) from error
    except (websocket.WebSocketException, OSError) as error:
        raise ControllerAway(f"{what} cannot be reached: {error}") from error
    return web


def _tls(settings: Any) -> dict[str, Any]:
    """TLS as the API server's own requests have it."""
    options: dict[str, Any] = {"cert_reqs": ssl.CERT_NONE, "check_hostname": False}
    if settings.verify_ssl:
        options = {"cert_reqs": ssl.CERT_REQUIRED, "ca_certs": settings.ssl_ca_cert or certifi.where()}
    if settings.assert_hostname is not None:
        options["check_hostname"] = settings.assert_hostname
    named = {"certfile": settings.cert_file, "keyfile": settings.key_file, "server_hostname": settings.tls_server_name}
    return options | {name: value for name, value in named.items() if value}
