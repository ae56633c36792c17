"""How keepers are talked to: frames over TCP, and the client.

A frame is a u32 (big endian) length, then so many bytes of a JSON object. A reply whose object has ``payload`` is
followed by that many raw bytes. The first frame on a connection is ``{"op": "hello", "token": ...}``; anything else,
or another token, closes it. A reply is ``{"ok": true, ...}`` or ``{"error": NAME, "message": TEXT}``, where NAME is one
of the classes of `outlast.errors`, which the client raises again.

Call order: ``KeeperClient(...)`` connects and says hello; then any number of ``call`` and ``read``, one at a time. For
a stream of pieces: ``begin_read`` (ranges in any order), then ``receive`` until every byte has come, then ``confirm``,
which fails if the generation was overwritten meanwhile. ``put`` opens a push of parity, ``send`` feeds it,
``put_done`` ends it.

Every wait has a `Deadline`. Sockets stay in blocking mode with the kernel's own timeouts, so that one system call
(``MSG_WAITALL``) fills a piece. Bytes are sent from the mapping: sendfile from tmpfs took twice as much (medians of 4
runs over loopback, core-seconds a GB: 0.35; sendfile 0.70; without MSG_WAITALL 0.41). Buffer sizes are left to the
kernel's autotuning: 1 and 4 MiB made no difference there.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, TypeAlias

from outlast import errors
from outlast.errors import OutlastError, TransferError
from outlast.snapshot.identity import Generation
from outlast.snapshot.inventory import Kind

MAX_FRAME = 64 << 20
MAX_HELLO = 4096
SEND_PIECE = 4 << 20
CONNECT_SECONDS = 5.0
"""The longest wait for a connection: no one can end it from outside."""

_LENGTH = struct.Struct(">I")
_TIMEVAL = struct.Struct("@ll")
_ERRORS: dict[str, type[OutlastError]] = {
    kind.__name__: kind
    for kind in (
        errors.RequestError,
        errors.CapacityError,
        errors.StaleAttemptError,
        errors.SnapshotError,
        errors.ImageError,
        errors.UnrecoverableError,
        errors.StoreError,
        errors.StoreUnavailable,
        errors.StoreDenied,
        errors.ObjectMissing,
        errors.PreconditionFailed,
        errors.CheckpointError,
        errors.ClaimLost,
        errors.TransferError,
    )
}


@dataclass(frozen=True)
class Deadline:
    """A moment (monotonic seconds) until which something is waited for, and what that is, for the error."""

    at: float
    seconds: float
    what: str

    @classmethod
    def after(cls, seconds: float, what: str) -> Deadline:
        return cls(time.monotonic() + seconds, seconds, what)

    def on(self, what: str) -> Deadline:
        """The same moment, waiting for something else."""
        return Deadline(self.at, self.seconds, what)

    def left(self) -> float:
        """Seconds left. Raises TransferError when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise self.error()
        return left

    def error(self) -> TransferError:
        return TransferError(f"no answer within {self.seconds:g} s: {self.what}")


ReadRange: TypeAlias = tuple[int, int, str]
"""Offset, length, and the entry that the offset counts from ("" for the file's beginning)."""


@dataclass(frozen=True)
class ImageName:
    """Which sealed image of a keeper is meant: of a seat's rank ("shard"), or the parity that the seat's node holds.

    seat None: any, for one who knows that the keeper holds but one.
    """

    kind: Kind
    local_rank: int
    generation: Generation
    seat: int | None = None

    def __str__(self) -> str:
        seat = "" if self.seat is None else f"seat {self.seat}, "
        return f"the {self.kind} image of {seat}local rank {self.local_rank}, generation {self.generation}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "generation": str(self.generation)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ImageName:
        kind: Kind = "parity" if data["kind"] == "parity" else "shard"
        generation, seat = Generation.parse(data["generation"]), data.get("seat")
        return cls(kind, int(data["local_rank"]), generation, None if seat is None else int(seat))


class Channel:
    """A connected socket that speaks frames. ``peer`` names the other side in errors. Not for several threads at once,
    but any thread may ``shutdown`` it, which ends every wait on it."""

    def __init__(self, sock: socket.socket, peer: str) -> None:
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self.peer = peer

    def send(self, message: dict[str, Any], deadline: Deadline) -> None:
        """Send one frame."""
        body = json.dumps(message, separators=(",", ":")).encode()
        self.send_bytes(_LENGTH.pack(len(body)) + body, deadline)

    def send_bytes(self, data: bytes | memoryview, deadline: Deadline) -> None:
        """Send all of ``data``."""
        view = memoryview(data)
        sent = 0
        while sent < len(view):
            self._limit(socket.SO_SNDTIMEO, deadline)
            try:
                sent += self._sock.send(view[sent : sent + SEND_PIECE])
            except BlockingIOError:
                raise self._late(deadline) from None
            except OSError as error:
                raise self._broken(error) from error

    def recv(self, deadline: Deadline, limit: int = MAX_FRAME) -> dict[str, Any]:
        """Receive one frame of at most ``limit`` bytes."""
        head = bytearray(_LENGTH.size)
        self.recv_into(memoryview(head), deadline)
        (length,) = _LENGTH.unpack(head)
        if length > limit:
            raise TransferError(f"{self.peer}: a frame of {length} bytes (at most {limit}): not a keeper's protocol")
        body = bytearray(length)
        self.recv_into(memoryview(body), deadline)
        try:
            message = json.loads(body)
        except ValueError as error:
            raise TransferError(f"{self.peer}: a frame that is no JSON: not a keeper's protocol") from error
        if not isinstance(message, dict):
            raise TransferError(f"{self.peer}: a frame that is no JSON object: not a keeper's protocol")
        return message

    def recv_into(self, out: memoryview, deadline: Deadline) -> None:
        """Fill ``out``."""
        filled = 0
        while filled < len(out):
            self._limit(socket.SO_RCVTIMEO, deadline)
            try:
                got = self._sock.recv_into(out[filled:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                raise self._late(deadline) from None
            except OSError as error:
                raise self._broken(error) from error
            if not got:
                raise TransferError(f"{self.peer}: closed the connection ({deadline.what})")
            filled += got

    def wait_request(self, seconds: float) -> bool:
        """Whether something (or the end) arrives within ``seconds``."""
        try:
            poller = select.poll()
            poller.register(self._sock, select.POLLIN)
            return bool(poller.poll(seconds * 1000))
        except (OSError, ValueError):
            return False

    def shutdown(self) -> None:
        """End every wait on this connection, from any thread."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        self._sock.close()

    def _limit(self, option: int, deadline: Deadline) -> None:
        left = max(deadline.on(f"{deadline.what} ({self.peer})").left(), 1e-3)
        try:
            self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(left), int(left % 1 * 1e6)))
        except OSError as error:
            raise self._broken(error) from error

    def _late(self, deadline: Deadline) -> TransferError:
        return deadline.on(f"{deadline.what} ({self.peer})").error()

    def _broken(self, error: OSError) -> TransferError:
        return TransferError(f"{self.peer}: {error.strerror or error}")


def error_message(error: OutlastError) -> dict[str, Any]:
    """The reply that makes the client raise ``error`` again."""
    name = next((kind.__name__ for kind in type(error).__mro__ if kind.__name__ in _ERRORS), "SnapshotError")
    return {"error": name, "message": str(error)}


def checked(reply: dict[str, Any], peer: str) -> dict[str, Any]:
    """``reply`` if it is none of an error, else raises that error."""
    if "error" in reply:
        kind = _ERRORS.get(str(reply["error"]), TransferError)
        raise kind(f"{peer}: {reply.get('message', 'no reason given')}")
    return reply


class KeeperClient:
    """One connection to a keeper. ``timeout`` (seconds) bounds each call that names none of its own.

    Raises TransferError when the keeper cannot be reached in time; a token that it refuses raises RequestError at the
    first call (so that ``shutdown`` can end every wait but that for the connection).
    """

    def __init__(self, host: str, port: int, token: str, timeout: float = 30.0) -> None:
        self.timeout = timeout
        self.peer = f"keeper {host}:{port}"
        deadline = Deadline.after(min(timeout, CONNECT_SECONDS), "connecting")
        try:
            sock = socket.create_connection((host, port), deadline.seconds)
        except OSError as error:
            raise TransferError(f"{self.peer}: cannot connect: {error.strerror or error}") from error
        self._channel = Channel(sock, self.peer)
        self._greeted = False
        try:
            self._channel.send({"op": "hello", "token": token}, deadline)
        except TransferError:
            self.close()
            raise

    @classmethod
    def answers(cls, host: str, port: int, token: str, timeout: float) -> bool:
        """Whether a keeper greets a caller within ``timeout`` seconds: one of a stopped process is never heard."""
        try:
            with cls(host, port, token, timeout) as client:
                client._greet(Deadline.after(timeout, "the greeting"))
        except OutlastError:
            return False
        return True

    def call(self, op: str, *, timeout: float | None = None, **args: Any) -> dict[str, Any]:
        """One operation; the reply's fields. Raises what the keeper raised, TransferError when it does not answer.

        The keeper is told nine tenths of the time, so that its own reason arrives before ours.
        """
        seconds = self.timeout if timeout is None else timeout
        return self._ask({"op": op, "timeout": seconds * 0.9, **args}, Deadline.after(seconds, f"the answer to {op}"))

    def read(
        self, kind: Kind, local_rank: int, generation: str, offset: int, out: memoryview, seat: int | None = None
    ) -> None:
        """Fill ``out`` with the bytes of an image from ``offset`` on.

        Raises ImageError when it is not held (any more), TransferError when it was overwritten in the middle of it.

        A node that changed its seat can hold several images of one local rank; ``seat`` tells which is meant.
        """
        image = ImageName(kind, local_rank, Generation.parse(generation), seat)
        deadline = Deadline.after(self.timeout, f"reading {image}")
        self.begin_read(image, [(offset, len(out), "")], deadline)
        self.receive(out, deadline)
        self.confirm(image, deadline)

    def begin_read(self, image: ImageName, ranges: Iterable[ReadRange], deadline: Deadline) -> None:
        """Ask for ranges of an image; their bytes follow in that order, for ``receive``. Raises ImageError."""
        wanted = [list(item) for item in ranges]
        self._ask({"op": "read", **image.to_json(), "ranges": wanted, "timeout": deadline.left()}, deadline)

    def receive(self, out: memoryview, deadline: Deadline) -> None:
        """The next ``len(out)`` bytes of what ``begin_read`` asked for."""
        self._channel.recv_into(out, deadline)

    def confirm(self, image: ImageName, deadline: Deadline) -> None:
        """Make sure that what was received is of that image: it is still held, so nothing overwrote it."""
        self._ask({"op": "holds", **image.to_json(), "timeout": deadline.left()}, deadline)

    def put(self, deadline: Deadline, **args: Any) -> bool:
        """Open a push of parity; whether the keeper wants it. If so, ``send`` its bytes, then ``put_done``."""
        return bool(self._ask({"op": "put_parity", "timeout": deadline.left(), **args}, deadline)["want"])

    def send(self, data: memoryview, deadline: Deadline) -> None:
        self._channel.send_bytes(data, deadline)

    def put_done(self, deadline: Deadline) -> None:
        """All bytes of the push are sent and right."""
        self._ask({"op": "put_done"}, deadline)

    def shutdown(self) -> None:
        """End every wait on this connection, from any thread."""
        self._channel.shutdown()

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> KeeperClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _ask(self, message: dict[str, Any], deadline: Deadline) -> dict[str, Any]:
        self._greet(deadline)
        self._channel.send(message, deadline)
        return checked(self._channel.recv(deadline), self.peer)

    def _greet(self, deadline: Deadline) -> None:
        if not self._greeted:
            checked(self._channel.recv(deadline), self.peer)
            self._greeted = True
