"""``python -m outlast.pod.node``: a node Pod's first process. Its life::

    folders -> forkserver (imports torch) beside Ray (RayCare) -> registered (Registration), again for every new head
    -> the job is over, or the node has left -> all ended, 0

Forkserver and keeper hold the node's memory and live on, whatever becomes of Ray and the head. When the forkserver ends
by itself the container ends with 1: started again, it finds the memory files and joins under the same id. SIGTERM is
handed to the forkserver, whose agent hands over what the node has; when nobody is at the head who could take it (the
job was deleted), the node ends soon. Exit status 2: the Pod is not what ``outlast.kube`` says.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from outlast.agent import forkclient
from outlast.agent.shipping import SETTLE_S, under_way
from outlast.api import TrainingJob
from outlast.config import NodeConfig
from outlast.controller.registry import write_private_json
from outlast.errors import RequestError
from outlast.hosting import processes
from outlast.hosting.client import ControllerClient
from outlast.hosting.raynode import RayMember, RaySite
from outlast.pod.console import Console
from outlast.pod.cpu import rank_threads
from outlast.pod.health import answering
from outlast.pod.process import run
from outlast.pod.ranklogs import RankLogs
from outlast.pod.raycare import Joined, RayCare, listens
from outlast.pod.registration import Registration
from outlast.pod.settings import NodeSettings, node_settings

MARGIN_S = 5.0
"""Seconds of the Pod's grace that are kept for ending."""
HEADLESS_S = 5.0
"""A node that leaves waits so long for a head that does not answer."""
PROBE_S = 0.5
_PRIVATE = 0o700


class NodePod:
    """One node Pod. ``run`` once."""

    def __init__(self, settings: NodeSettings, job: TrainingJob, token: str, console: Console) -> None:
        own, folders = settings.own, settings.own.folders
        self._settings, self._job, self._console = settings, job, console
        self._memory = folders.memory / "outlast"
        self._forkserver: subprocess.Popen[bytes] | None = None
        site = RaySite(folders.ray, folders.token_file, folders.logs / "ray.log", dict(os.environ), self._spare, own.ip)
        self._ray = RayMember(site)
        self._care = RayCare(self._ray, settings.head, own.gcs_port, own.pod, console)
        self._client = ControllerClient(self._where, token)
        self._registration = Registration(self._client, self._care, self._config, own.pod, console)
        self._logs = RankLogs(folders.logs, console.write)
        self._leaving = asyncio.Event()

    async def run(self) -> int:
        """Be the node until it is not needed any more; the exit status."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_sigterm)
        loop.add_signal_handler(signal.SIGCHLD, lambda: processes.reap(self._spare()))
        self._prepare()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._client)
            await stack.enter_async_context(answering(self._settings.port, lambda: self._registration.known))
            self._logs.start()
            try:
                return await self._live()
            finally:
                await processes.kill_all(lambda: processes.descendants(os.getpid()))
                await asyncio.to_thread(self._logs.close)

    # --- the stages -------------------------------------------------------------------------------------------------

    async def _live(self) -> int:
        """Until one of the ways in which a node ends."""
        self._start_forkserver()
        ways = (self._forkserver_end(), self._job_end(), self._abandoned())
        tasks: list[asyncio.Task[int]] = [asyncio.create_task(way) for way in ways]
        care = asyncio.create_task(self._care.run())
        try:
            done, _ = await asyncio.wait([*tasks, care], return_when=asyncio.FIRST_COMPLETED)
            return max(int(task.result() or 0) for task in done)
        finally:
            for task in [*tasks, care]:
                task.cancel()
            await asyncio.gather(*tasks, care, return_exceptions=True)

    async def _forkserver_end(self) -> int:
        forkserver = self._forkserver
        assert forkserver is not None
        await processes.ended([forkserver.pid])
        status = forkserver.wait()
        fine = status == 0 or self._leaving.is_set()
        self._console.say("node-left" if fine else "forkserver-ended", status=status)
        return 0 if fine else 1

    async def _job_end(self) -> int:
        await self._forkserver_ready()
        outcome = await self._registration.run()
        self._console.say("job-over", outcome=outcome)
        await self._logs_stored()
        return 0

    async def _abandoned(self) -> int:
        """The node leaves, and there is nobody to whom it could hand over what it has."""
        await self._leaving.wait()
        loop = asyncio.get_running_loop()
        heard = loop.time()
        while loop.time() - heard < HEADLESS_S:
            head = self._care.head
            if head is not None and await listens(head, self._settings.own.controller_port):
                heard = loop.time()
            await asyncio.sleep(PROBE_S)
        self._console.say("abandoned", reason="no controller answers: nobody can take over what the node has")
        return 0

    async def _forkserver_ready(self) -> None:
        """The agent needs it; until then the node is not registered."""
        while not self._socket.exists():
            await asyncio.sleep(0.05)
        self._console.say("forkserver-ready")

    async def _logs_stored(self) -> None:
        """Wait until no process puts logs into the store any more."""
        deadline = asyncio.get_running_loop().time() + SETTLE_S
        while under_way(self._settings.own.folders.sockets):
            if asyncio.get_running_loop().time() > deadline:
                self._console.say("logs-not-stored", reason=f"the store took more than {SETTLE_S:g} s")
                return
            await asyncio.sleep(PROBE_S)

    # --- how --------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Folders; what the container before left of its processes goes, memory and logs stay."""
        folders = self._settings.own.folders
        for folder in (folders.sockets, folders.ray):
            shutil.rmtree(folder, ignore_errors=True)
        for folder in (folders.sockets, folders.ray, folders.logs, self._memory):
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        write_private_json(self._env_file, dict(os.environ))
        images = sum(1 for _ in self._memory.glob("*.img*"))
        self._console.say("node-starts", machine=self._settings.machine, ip=self._settings.own.ip, images=images)

    def _start_forkserver(self) -> None:
        folders = self._settings.own.folders
        log, place = folders.logs / "forkserver.log", str(folders.sockets)
        self._forkserver = forkclient.launch(str(self._socket), log=log, pid_dir=place)

    @property
    def _env_file(self) -> Path:
        return self._settings.own.folders.sockets / "environment.json"

    @property
    def _socket(self) -> Path:
        return self._settings.own.folders.sockets / "forkserver"

    def _config(self, joined: Joined) -> NodeConfig:
        """The node as it is with that raylet."""
        own, folders = self._settings.own, self._settings.own.folders
        name = self._job.metadata.name
        return NodeConfig(
            node=own.pod,
            machine=self._settings.machine,
            host=own.ip,
            job=self._job.model_dump(mode="json", by_alias=True),
            namespace=f"outlast-{name}",
            cwd=str(Path.cwd()),
            run_dir=str(folders.run),
            log_dir=str(folders.logs),
            memory_dir=str(self._memory),
            socket_dir=str(folders.sockets),
            token_file=str(folders.token_file),
            forkserver_socket=str(self._socket),
            ray_resource=joined.resource,
            env_file=str(self._env_file),
            threads=rank_threads(self._job.spec.workers.procs_per_worker),
            grace_s=max(own.grace_s - MARGIN_S, 1.0),
        )

    def _where(self) -> str:
        head = self._care.head
        if head is None:
            raise KeyError("no head is known")
        return f"http://{head}:{self._settings.own.controller_port}"

    def _spare(self) -> list[int]:
        """Children that are not Ray's, or that somebody waits for."""
        forkserver = self._forkserver.pid if self._forkserver is not None else None
        return [pid for pid in (forkserver, self._ray.starter) if pid is not None]

    def _on_sigterm(self) -> None:
        self._console.say("leaving", grace_s=self._settings.own.grace_s)
        self._leaving.set()
        if self._forkserver is not None:
            processes.send([self._forkserver.pid], signal.SIGTERM)


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a node Pod; the exit status."""
    try:
        settings = node_settings(arguments, os.environ)
        folders = settings.own.folders
        job, token = folders.read_job(), folders.read_token()
    except RequestError as error:
        print(f"outlast.pod.node: {error}", file=sys.stderr)
        return 2
    console = Console(sys.stdout.fileno(), {"job": job.metadata.name, "node": settings.own.pod})
    return run(NodePod(settings, job, token, console).run, console)


if __name__ == "__main__":
    raise SystemExit(main())
