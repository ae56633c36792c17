"""A process that has imported torch already and forks itself into ranks, keepers and further forkservers.

::

    python -m outlast.agent.forkserver --socket PATH [--preload numpy,torch]

A client talks newline-delimited JSON over the Unix socket. Each request may carry ``req``, which its reply repeats.

    {"op": "spawn", ...Spawn}                -> {"op": "spawned", "id", "pid"}
    {"op": "kill", "id", "signal"}           -> {"op": "killed", "id"}            to the whole process group
    {"op": "list"}                           -> {"op": "list", "pid", "threads", "missing", "children": [...]}
    {"op": "fork_server", ...ServerSetup}    -> {"op": "forked", "pid"}           listening already
    {"op": "attend", "grace_s"}              -> {"op": "attending"}               this client is told of a SIGTERM
    {"op": "shutdown"}                       -> {"op": "ending"}
    anything that cannot be done             -> {"op": "error", "text"}
    a child's end, unasked                   -> {"op": "exited", "id", "pid", "code", "signal"}
    SIGTERM, unasked                         -> {"op": "terminating", "seconds"}  what is left of the grace

Forking is safe because the server never has a second thread. A child of lifetime "client" is killed when the client
that asked for it disconnects, one of lifetime "server" when the server ends, and then every client is told of its end.
When a child has ended, what is left of its process group is killed before the end is reported, so that nothing of it
runs any more; orphans that left the group are adopted and killed once no client's child is alive.

SIGTERM ends the server with all its children: at once, unless a client attends, which may hand over what it has first.
The server then goes on as before until a client says ``shutdown`` or the longest grace is over. Where one has attended
and is gone while a child of lifetime "server" (the keeper) lives, it is being started again: for ``COMEBACK_S`` it is
waited for, and told when it attends.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.agent import isolation
from outlast.agent.accepting import Acceptor
from outlast.agent.forkchild import become, redirect, separate
from outlast.agent.forkconnection import Connection, listen
from outlast.agent.forkprotocol import DEFAULT_PRELOAD, ServerSetup, Spawn, preload
from outlast.agent.pidfiles import remove_pid, write_pid
from outlast.errors import RequestError

__all__ = ["DEFAULT_PRELOAD", "ForkServer", "ServerSetup", "listen", "main"]

STOP_S = 5.0
"""How long children may take to end when the server is asked to."""

COMEBACK_S = 10.0
"""How long a client that attended may take to come back, once the server was told to go."""

_IDLE_S = 1.0
_END_AT_ONCE = signal.SIGHUP
"""What a server sends to the further servers that it ends."""


@dataclass(frozen=True)
class Task:
    """What a fork is to be. ``listener`` is there for a server."""

    what: Spawn | ServerSetup
    parent: int
    listener: socket.socket | None = None


class _Forked(Exception):
    """Raised in the child of a fork, so that it leaves the server's stack at once."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.task = task


@dataclass
class _Child:
    id: str
    pid: int
    lifetime: str
    role: str
    client: Connection | None
    server: bool = False

    def describe(self) -> dict[str, Any]:
        told = {"id": self.id, "pid": self.pid, "lifetime": self.lifetime, "role": self.role}
        return {**told, "orphan": self.lifetime == "client" and self.client is None}


class ForkServer:
    """One server. ``serve`` returns None when it is to end, or, in a forked child, what that is to be."""

    def __init__(self, setup: ServerSetup, listener: socket.socket, missing: Sequence[str], watch: int | None) -> None:
        self._setup = setup
        self._listener = listener
        self._acceptor = Acceptor(listener, "the forkserver")
        self._missing = list(missing)
        self._watch = watch
        self._children: dict[int, _Child] = {}
        self._clients: set[Connection] = set()
        self._stopping: float | None = None
        self._leave_by: float | None = None
        self._told_at = 0.0
        self._attended = self._awaiting = False
        self._selector = selectors.DefaultSelector()
        self._wake_out, self._wake_in = socket.socketpair()
        self._operations: dict[str, Callable[[Connection, dict[str, Any]], dict[str, Any]]] = {
            "spawn": self._spawn,
            "kill": lambda _, fields: self._kill(str(fields["id"]), int(fields["signal"])),
            "list": lambda _, __: self._list(),
            "fork_server": self._fork_server,
            "attend": lambda client, fields: self._attend(client, float(fields["grace_s"])),
            "shutdown": lambda _, __: self._shutdown(),
        }

    def serve(self) -> Task | None:
        """Serve until told to end, or until this process is a fork."""
        self._open()
        try:
            while not (self._stopping is not None and self._stopped()):
                self._turn()
        except _Forked as forked:
            self._abandon()
            return forked.task
        self._close()
        return None

    def _open(self) -> None:
        isolation.adopt_orphans()
        for end in (self._wake_out, self._wake_in):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake_in.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM, _END_AT_ONCE):
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._wake_out, selectors.EVENT_READ, self._signalled)
        if self._watch is not None:
            self._selector.register(self._watch, selectors.EVENT_READ, self._stop)
        if self._setup.pid_dir:
            write_pid(Path(self._setup.pid_dir), "forkserver", os.getpid())

    def _turn(self) -> None:
        ready = [(key.data, mask) for key, mask in self._selector.select(_IDLE_S)]
        for client, mask in ready:
            if isinstance(client, Connection):
                self._serve_client(client, mask)
        for act, _ in ready:  # after what clients said before: one that has left is not waited for
            if not isinstance(act, Connection):
                act()
        if self._leave_by is not None and time.monotonic() > self._leave_by:
            self._stop()
        self._kill_orphans()

    # -- clients

    def _accept(self) -> None:
        sock = self._acceptor.accept()
        if sock is None:
            return
        client = Connection(sock)
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)

    def _serve_client(self, client: Connection, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                client.flush()
                self._listen_to(client)
            if mask & selectors.EVENT_READ:
                self._read(client)
        except (ConnectionError, ValueError):
            self._drop(client)

    def _read(self, client: Connection) -> None:
        for request in client.receive():
            self._send(client, {**self._answer(client, request), "req": request.get("req")})

    def _answer(self, client: Connection, request: dict[str, Any]) -> dict[str, Any]:
        operation = self._operations.get(str(request.get("op")))
        if operation is None:
            return {"op": "error", "text": f"unknown operation {request.get('op')!r}"}
        fields = {key: value for key, value in request.items() if key not in ("op", "req")}
        try:
            return operation(client, fields)
        except (RequestError, OSError, TypeError, KeyError) as error:
            return {"op": "error", "text": f"{request['op']}: {error}"}

    def _send(self, client: Connection, message: dict[str, Any]) -> None:
        client.put(message)
        self._listen_to(client)

    def _listen_to(self, client: Connection) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.waiting else 0)
        self._selector.modify(client.sock, events, client)

    def _drop(self, client: Connection) -> None:
        self._selector.unregister(client.sock)
        client.sock.close()
        self._clients.discard(client)
        for child in self._children.values():
            if child.client is client:
                child.client = None
                if child.lifetime == "client":
                    _signal_group(child.pid, signal.SIGKILL)

    # -- operations

    def _spawn(self, client: Connection, fields: dict[str, Any]) -> dict[str, Any]:
        spawn = Spawn.from_json(fields)
        if any(child.id == spawn.id for child in self._children.values()):
            raise RequestError(f"a child {spawn.id!r} is alive")
        pid = self._fork(Task(spawn, os.getpid()))
        self._children[pid] = _Child(spawn.id, pid, spawn.lifetime, spawn.role, client)
        if spawn.role and self._setup.pid_dir:
            write_pid(Path(self._setup.pid_dir), spawn.role, pid)
        return {"op": "spawned", "id": spawn.id, "pid": pid}

    def _fork_server(self, client: Connection, fields: dict[str, Any]) -> dict[str, Any]:
        setup = ServerSetup.from_json(fields)
        listener = listen(setup.socket)
        pid = self._fork(Task(setup, os.getpid(), listener))
        listener.close()
        self._children[pid] = _Child(setup.socket, pid, "server", "", client, server=True)
        return {"op": "forked", "id": setup.socket, "pid": pid}

    def _fork(self, task: Task) -> int:
        if self._stopping is not None:
            raise RequestError("the forkserver is ending")
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            raise _Forked(task)
        return pid

    def _kill(self, name: str, number: int) -> dict[str, Any]:
        for child in self._children.values():
            if child.id == name:
                _signal_group(child.pid, number)
                return {"op": "killed", "id": name}
        raise RequestError(f"no child {name!r}")

    def _list(self) -> dict[str, Any]:
        children = [child.describe() for child in self._children.values()]
        threads = len(list(Path("/proc/self/task").iterdir()))
        return {"op": "list", "pid": os.getpid(), "threads": threads, "missing": self._missing, "children": children}

    # -- ends of children

    def _signalled(self) -> None:
        numbers = self._wake_out.recv(4096)
        if _END_AT_ONCE in numbers:
            self._stop()
        elif signal.SIGTERM in numbers:
            self._leave()
        if signal.SIGCHLD in numbers:
            self._reap()

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            child = self._children.pop(ended.si_pid, None)
            if child is not None:  # while it is a zombie, its number cannot be another group's
                _signal_group(ended.si_pid, signal.SIGKILL)
            os.waitpid(ended.si_pid, 0)
            if child is not None:
                self._report(child, ended)

    def _report(self, child: _Child, ended: os.waitid_result) -> None:
        if child.role and self._setup.pid_dir:
            remove_pid(Path(self._setup.pid_dir), child.role, child.pid)
        by_itself = ended.si_code == os.CLD_EXITED
        status = {"code": ended.si_status, "signal": None} if by_itself else {"code": None, "signal": ended.si_status}
        message = {"op": "exited", "id": child.id, "pid": child.pid, **status}
        told = list(self._clients) if child.lifetime == "server" else [child.client] if child.client else []
        for client in told:
            self._send(client, message)

    def _kill_orphans(self) -> None:
        """What left its group and lost its parent became our child; nobody will need it when no rank is left."""
        if any(child.lifetime == "client" for child in self._children.values()):
            return
        for pid in isolation.children():
            if pid not in self._children:
                _signal_group(pid, signal.SIGKILL)
        self._reap()

    # -- the end

    def _leave(self) -> None:
        """Told to go: as soon as clients that attend say so, at the end of their grace at the latest."""
        graces = [client.grace_s for client in self._clients if client.grace_s is not None]
        told_before = self._leave_by is not None
        if not graces and (told_before or not self._awaits_attendance()):
            self._stop()
        elif not told_before:
            self._told_at = time.monotonic()
            self._leave_by = self._told_at + max(graces, default=COMEBACK_S)
            self._awaiting = not graces
            for client in self._clients:
                self._tell_of_leaving(client)

    def _awaits_attendance(self) -> bool:
        """Whether who attended will be back: what it would hand over is still served."""
        return self._attended and any(child.lifetime == "server" for child in self._children.values())

    def _attend(self, client: Connection, grace_s: float) -> dict[str, Any]:
        client.grace_s, self._attended = grace_s, True
        if self._awaiting:
            self._leave_by, self._awaiting = self._told_at + grace_s, False
        self._tell_of_leaving(client)
        return {"op": "attending"}

    def _tell_of_leaving(self, client: Connection) -> None:
        if client.grace_s is not None and self._leave_by is not None:
            self._send(client, {"op": "terminating", "seconds": max(self._leave_by - time.monotonic(), 0.0)})

    def _shutdown(self) -> dict[str, Any]:
        self._stop()
        return {"op": "ending"}

    def _stop(self) -> None:
        if self._stopping is None:
            self._stopping = time.monotonic() + STOP_S
            for child in self._children.values():
                _signal_group(child.pid, _END_AT_ONCE if child.server else signal.SIGKILL)
            if self._watch is not None:
                self._selector.unregister(self._watch)

    def _stopped(self) -> bool:
        if self._children and self._stopping is not None and time.monotonic() > self._stopping:
            for child in self._children.values():
                _signal_group(child.pid, signal.SIGKILL)
            return True
        return not self._children

    def _close(self) -> None:
        Path(self._setup.socket).unlink(missing_ok=True)
        if self._setup.pid_dir:
            remove_pid(Path(self._setup.pid_dir), "forkserver", os.getpid())

    def _abandon(self) -> None:
        """In a fork: let go of everything that is the server's."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        for sock in (self._listener, self._wake_in, self._wake_out, *(client.sock for client in self._clients)):
            sock.close()
        if self._watch is not None:
            os.close(self._watch)


def _signal_group(pid: int, number: int) -> None:
    """Signal a child's process group; the child alone in the moment before it leads one."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, preload, serve; a fork ends here as what it was made for."""
    parser = argparse.ArgumentParser(prog="outlast.agent.forkserver", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", required=True, help="where to listen")
    parser.add_argument("--preload", default=",".join(DEFAULT_PRELOAD), help="modules to import, separated by commas")
    parser.add_argument("--pid-dir", default="", help="where to write pid files")
    parser.add_argument("--survive-parent", action="store_true", help="go on when the parent process ends")
    args = parser.parse_args(argv)
    watch = None if args.survive_parent else os.pidfd_open(os.getppid())
    missing = preload([name for name in args.preload.split(",") if name])
    setup = ServerSetup(args.socket, args.pid_dir, survive_parent=args.survive_parent)
    task = ForkServer(setup, listen(args.socket), missing, watch).serve()
    while task is not None and isinstance(task.what, ServerSetup):
        task = _server(task, task.what, missing).serve()
    if task is not None and isinstance(task.what, Spawn):
        become(task.what, task.parent)
    return 0


def _server(task: Task, setup: ServerSetup, missing: Sequence[str]) -> ForkServer:
    """In a fork: the further server that it is to be."""
    assert task.listener is not None
    separate(None if setup.survive_parent else task.parent)
    if setup.log:
        redirect(setup.log, setup.log)
    if setup.isolate is not None:
        isolation.enter(setup.isolate)
    return ForkServer(setup, task.listener, missing, None)


if __name__ == "__main__":
    sys.exit(main())
