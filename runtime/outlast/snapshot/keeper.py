"""The keeper: the process on each node that holds snapshots, protects them, serves them and gives them back.

It outlives the ranks whose images it serves, and is no loss itself: all it needs to know is in the files of its memory
directory, so that one started anew after a kill goes on serving them. It decides nothing; the controller tells it what
to do, other keepers ask it for bytes. Threads: one accepts, one for each connection. A connection begins with the
job's token.

Operations (see `KeeperClient.call`; those marked * carry ``attempt`` and ``incarnation`` and are refused by the fence
when these are not in force; a newer attempt comes in force by its first message):

========== ============================================================ =============================================
op         arguments                                                    answer
========== ============================================================ =============================================
status                                                                  node, commit, attempt, images; used, max_memory
                                                                        and available (bytes)
inventory                                                               node, images (`Inventory`), damaged: texts
holds      kind, seat, local_rank, generation                           length
read       the same and ranges: (offset, bytes, entry)                  payload, then so many bytes
fence *                                                                 attempt
encode *   generation, slot, group: {seats, parity, lengths by local    bytes, seconds
           rank}, index, peers: [{host, port} or null], targets?
put_parity attempt, ... of `ParityRequest`, stripe, row                 want; then bytes, put_done
rebuild *  generation, restore (`RankRestore`), peers: {node: [host,    bytes, seconds
           port]}, fresh?
upload *   generation, seat, url, bandwidth?, procs?                    images (`StoredImage`), bytes, seconds
waiting                                                                 trouble: why transfers wait for the store
commit *   generation, slots?, procs?                                   commit, removed: how many images
========== ============================================================ =============================================

Run as ``python -m outlast.snapshot.keeper CONFIG`` (a JSON file with the fields of `KeeperConfig`, ``-`` for stdin), or
``main(config)`` in a forked child; ``outlast.checkpoint.serving`` is the same with an object tier.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.errors import OutlastError, RequestError, SnapshotError, TransferError
from outlast.snapshot.encoding import EncodeRequest, Encoding, receive_parity
from outlast.snapshot.fence import write_json
from outlast.snapshot.identity import Attempt, Generation
from outlast.snapshot.image import ImageFile
from outlast.snapshot.inventory import GUEST_SLOT
from outlast.snapshot.keeper_store import Place, Store
from outlast.snapshot.offloading import NO_TIER, Upload, UploadRequest, Uploads
from outlast.snapshot.peers import Peers
from outlast.snapshot.rebuilding import Rebuilding, RebuildRequest
from outlast.snapshot.stored import ObjectTier
from outlast.snapshot.wire import MAX_HELLO, SEND_PIECE, Channel, Deadline, ImageName, error_message

HELLO_SECONDS = 10.0
IDLE_SECONDS = 900.0
FRAME_SECONDS = 30.0
DEFAULT_SECONDS = 30.0
PAUSE_SECONDS = 0.1

Message = Mapping[str, Any]
Reply = dict[str, Any]
log = logging.getLogger("outlast.keeper")


@dataclass(frozen=True)
class KeeperConfig:
    """``max_memory``: bytes that the node's images may take, None for no limit but the file system's. ``port`` 0: any.

    ``info_path`` is written when the keeper is ready: {"pid", "host", "port"}.
    """

    node: str
    memory_dir: str
    host: str
    token: str
    info_path: str
    max_memory: int | None = None
    port: int = 0

    @classmethod
    def from_json(cls, data: Message) -> KeeperConfig:
        """Raises TypeError for fields that are missing or unknown."""
        return cls(**data)


class Keeper:
    """The server of one node's images. ``objects``: its way to object storage, None where the job has none.

    Raises RequestError when its address cannot be had.
    """

    def __init__(self, config: KeeperConfig, objects: ObjectTier | None = None) -> None:
        self._config = config
        self._objects = objects
        self._store = Store(config.node, Path(config.memory_dir), config.max_memory)
        try:
            self._listener = socket.create_server((config.host, config.port), backlog=128)
        except OSError as error:
            where = f"{config.host}:{config.port}"
            raise RequestError(f"{config.node}: the keeper cannot listen on {where}: {error.strerror}") from error
        self.host, self.port = config.host, int(self._listener.getsockname()[1])
        self._short = False
        self._rebuilds: dict[Place, threading.Lock] = {}
        self._uploads = Uploads()
        self._handlers: dict[str, Callable[[Message, Channel, Deadline], Reply | None]] = {
            "status": lambda _message, _channel, _deadline: self._store.status(),
            "inventory": self._inventory,
            "holds": self._holds,
            "read": self._read,
            "fence": self._fence,
            "encode": self._encode,
            "put_parity": self._put_parity,
            "rebuild": self._rebuild,
            "upload": self._upload,
            "waiting": lambda _message, _channel, _deadline: {"trouble": self._objects and self._objects.trouble()},
            "commit": self._commit,
        }

    def serve(self) -> None:
        """Write ``info_path`` and answer until ``close``."""
        write_json(Path(self._config.info_path), {"pid": os.getpid(), "host": self.host, "port": self.port})
        log.info("ready node=%s host=%s port=%d", self._config.node, self.host, self.port)
        while True:
            try:
                self._accept()
            except (OSError, RuntimeError) as error:
                if self._listener.fileno() < 0:
                    return
                self._pause(error)

    def close(self) -> None:
        """Stop accepting."""
        self._listener.close()

    def _accept(self) -> None:
        """Raises OSError, and RuntimeError when there can be no further thread."""
        sock, address = self._listener.accept()
        channel = Channel(sock, f"{address[0]}:{address[1]}")
        try:
            threading.Thread(target=self._converse, args=(channel,), name=channel.peer, daemon=True).start()
        except RuntimeError:
            channel.close()
            raise

    def _pause(self, error: Exception) -> None:
        """Descriptors, memory or threads are short: leave some time for others to give them back."""
        if not self._short:
            log.warning("accepting no connections for now node=%s reason=%s", self._config.node, error)
        self._short = True
        time.sleep(PAUSE_SECONDS)

    def _converse(self, channel: Channel) -> None:
        """One connection, to its end."""
        try:
            self._greet(channel)
            while channel.wait_request(IDLE_SECONDS):
                self._answer(channel, channel.recv(Deadline.after(FRAME_SECONDS, "a whole request")))
        except TransferError as error:
            log.debug("connection over node=%s reason=%s", self._config.node, error)
        finally:
            channel.close()

    def _greet(self, channel: Channel) -> None:
        deadline = Deadline.after(HELLO_SECONDS, "the token")
        hello = channel.recv(deadline, MAX_HELLO)
        token = str(hello.get("token", "")).encode()
        if hello.get("op") != "hello" or not hmac.compare_digest(token, self._config.token.encode()):
            channel.send(
                error_message(RequestError(f"{self._config.node}: this is not the token of the job")), deadline
            )
            raise TransferError(f"{channel.peer}: wrong token")
        channel.send({"ok": True, "node": self._config.node}, deadline)

    def _answer(self, channel: Channel, message: Message) -> None:
        op = str(message.get("op"))
        try:
            if op not in self._handlers:
                raise RequestError(f"{self._config.node}: a keeper knows no operation {op!r}")
            seconds = float(message.get("timeout", DEFAULT_SECONDS))
            reply = self._handlers[op](message, channel, Deadline.after(seconds, op))
            if reply is not None:
                reply = {"ok": True, **reply}
        except OutlastError as error:
            log.warning("refused node=%s op=%s error=%s reason=%s", self._config.node, op, type(error).__name__, error)
            reply = error_message(error)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            log.exception("malformed node=%s op=%s", self._config.node, op)
            reply = error_message(RequestError(f"{self._config.node}: malformed {op}: {error!r}"))
        except OSError as error:
            log.exception("failed node=%s op=%s", self._config.node, op)
            reply = error_message(SnapshotError(f"{self._config.node}: {op} failed: {error}"))
        if reply is not None:
            channel.send(reply, Deadline.after(FRAME_SECONDS, f"the answer to {op} to be taken"))

    def _inventory(self, _message: Message, _channel: Channel, _deadline: Deadline) -> Reply:
        inventory, damaged = self._store.inventory()
        return {**inventory.to_json(), "damaged": damaged}

    def _holds(self, message: Message, _channel: Channel, _deadline: Deadline) -> Reply:
        image = self._store.find(ImageName.from_json(message))
        image.close()
        return {"length": image.layout.total_bytes}

    def _read(self, message: Message, channel: Channel, deadline: Deadline) -> None:
        """Send the ranges. The seal is looked at before each piece; an image that goes away ends the connection."""
        name = ImageName.from_json(message)
        image = self._store.find(name)
        views = [_range_view(image, *item) for item in message["ranges"]]
        channel.send({"ok": True, "payload": sum(map(len, views))}, deadline)
        for view in views:
            for start in range(0, len(view), SEND_PIECE):
                if image.generation != name.generation:
                    channel.shutdown()
                    raise TransferError(f"{name} was overwritten while it was read")
                channel.send_bytes(view[start : start + SEND_PIECE], deadline)

    def _fence(self, message: Message, _channel: Channel, _deadline: Deadline) -> Reply:
        attempt = _attempt(message)
        self._store.fence.admit(attempt)
        return {"attempt": str(attempt)}

    def _encode(self, message: Message, _channel: Channel, deadline: Deadline) -> Reply:
        addresses = {i: (str(a["host"]), int(a["port"])) for i, a in enumerate(message["peers"]) if a}
        request = EncodeRequest.from_json(message)
        encoding = Encoding(self._store, Peers(addresses, self._config.token), request, deadline)
        with self._store.fence.writing(request.attempt, encoding.cancel):
            return encoding.run()

    def _put_parity(self, message: Message, channel: Channel, deadline: Deadline) -> None:
        receive_parity(self._store, channel, message, deadline)

    def _rebuild(self, message: Message, _channel: Channel, deadline: Deadline) -> Reply:
        addresses = {node: (str(host), int(port)) for node, (host, port) in message["peers"].items()}
        addresses[self._config.node] = (self.host, self.port)
        request = RebuildRequest.from_json(message)
        rebuilding = Rebuilding(self._store, Peers(addresses, self._config.token), request, deadline, self._objects)
        lock = self._rebuilds.setdefault(request.place, threading.Lock())
        with self._store.fence.writing(request.attempt, rebuilding.cancel):
            if not lock.acquire(timeout=deadline.left()):
                raise deadline.on(f"another rebuild of {request.place.file_name} to end").error()
            try:
                return rebuilding.run()
            finally:
                lock.release()

    def _upload(self, message: Message, _channel: Channel, deadline: Deadline) -> Reply:
        if self._objects is None:
            raise RequestError(f"{self._config.node}: {NO_TIER}")
        request = UploadRequest.from_json(message)
        upload = Upload(self._store, self._objects, request, deadline)
        with self._store.fence.reading(request.attempt, upload.cancel), self._uploads.alone(upload, deadline):
            return upload.run()

    def _commit(self, message: Message, _channel: Channel, deadline: Deadline) -> Reply:
        """Remember it, and remove what it makes useless (``slots`` and ``procs``: how many the job has)."""
        generation = Generation.parse(message["generation"])
        slots, procs = int(message.get("slots", GUEST_SLOT)), int(message.get("procs", sys.maxsize))
        with self._store.fence.writing(_attempt(message), _nothing):
            self._store.remember_commit(generation)
            removed = self._store.drop_leftovers(generation, slots, procs, deadline)
        return {"commit": str(generation), "removed": removed}


def run(config: KeeperConfig, objects: ObjectTier | None) -> None:
    """Be a keeper until SIGTERM; its files stay."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", stream=sys.stderr)
    _allow_descriptors()
    keeper = Keeper(config, objects)
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(0))
    try:
        keeper.serve()
    finally:
        keeper.close()


def _allow_descriptors() -> None:
    """Let this process have as many open files as it may."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(config: Message) -> None:
    """Be a keeper of a job without an object tier (``outlast.checkpoint.serving`` has one)."""
    run(KeeperConfig.from_json(config), None)


def read_config(argv: Sequence[str]) -> Message:
    """The JSON object in the file that a command line names, or on the standard input."""
    source = argv[1] if len(argv) == 2 else "-"
    config: Message = json.loads(sys.stdin.read() if source == "-" else Path(source).read_text())
    return config


def _range_view(image: ImageFile, offset: int, length: int, entry: str) -> memoryview:
    return image.entry_view(entry)[offset : offset + length] if entry else image.view(offset, length)


def _attempt(message: Message) -> Attempt:
    return Attempt(int(message["attempt"]), str(message["incarnation"]))


def _nothing() -> None:
    """There is nothing to end: such a writer leaves by itself."""


if __name__ == "__main__":
    main(read_config(sys.argv))
