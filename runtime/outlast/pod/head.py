"""``python -m outlast.pod.head``: the head Pod's first process. Its life::

    folders -> Ray's head -> controller -> both watched -> the controller has left after the job's end -> 0

Ray's head is started again when it is gone, a few times in a row, and the container ends with 1 after that, so that the
kubelet starts it again; the controller's folder outlives the container. A controller that crashes is started again by
Ray, one that stays silent from here. On SIGTERM the ranks are asked to wait at a committed snapshot, so that the next
head loses no step. Exit status 2: the Pod is not what ``outlast.kube`` says.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from outlast.api import TrainingJob
from outlast.config import ControllerConfig
from outlast.errors import OutlastError, RequestError, TransferError
from outlast.hosting import processes
from outlast.hosting.client import ControllerClient, ControllerRefused, controller_pid, told_by
from outlast.hosting.launching import Launcher
from outlast.hosting.raynode import RayHead, RaySite
from outlast.pod.console import Console
from outlast.pod.process import run
from outlast.pod.settings import PodSettings, head_settings

LAUNCHES = 3
"""How often Ray's head and the controller are started in a row before the container ends."""
SILENCE_S = 30.0
"""A controller that has not answered for so long, while Ray's head lives, is launched again."""
LEFT_S = 5.0
"""A controller whose process is gone for so long after the job's end has left: Ray does not start it again."""
MARGIN_S = 5.0
"""Seconds of the Pod's grace that are kept for ending."""
EVENTS_S = 10.0
POLL_S = 0.25
_PRIVATE = 0o700


class HeadPod:
    """One head Pod. ``run`` once."""

    def __init__(self, settings: PodSettings, job: TrainingJob, token: str, console: Console) -> None:
        folders = settings.folders
        self._settings, self._job, self._console = settings, job, console
        self._config = controller_config(settings, job)
        self._config_file = folders.run / "controller.json"
        site = RaySite(
            folders.ray, folders.token_file, folders.logs / "ray.log", dict(os.environ), self._spare, settings.ip
        )
        self._ray = RayHead(site, settings.gcs_port)
        log = folders.logs / "launch.log"
        self._launcher = Launcher(self._config_file, log, self._ray.env, folders.controller)
        self._client = ControllerClient(told_by(self._config.http_file), token)
        self._ending = asyncio.Event()
        self._address = ""
        self._answered = False  # whether a controller of this job has ever been up here

    async def run(self) -> int:
        """Be the head until the job is over; the exit status. Raises OutlastError when Ray does not come up."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._ending.set)
        loop.add_signal_handler(signal.SIGCHLD, lambda: processes.reap(self._spare()))
        self._prepare()
        async with self._client:
            try:
                return await self._first(self._live(), self._told_to_end())
            finally:
                await processes.kill_all(lambda: processes.descendants(os.getpid()))

    async def _first(self, *ways: Coroutine[Any, Any, int]) -> int:
        """The result of the first of ``ways`` that ends; the others are cancelled."""
        tasks = [asyncio.create_task(way) for way in ways]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return max(task.result() for task in done)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # --- the stages -------------------------------------------------------------------------------------------------

    async def _live(self) -> int:
        await self._start()
        return await self._first(self._keep_ray(), self._follow())

    async def _start(self) -> None:
        """Ray's head and the controller in it, anew. Raises OutlastError after some failures in a row."""
        loop = asyncio.get_running_loop()
        for left in reversed(range(LAUNCHES)):
            began = loop.time()
            try:
                self._forget_nodes()
                self._address = await self._ray.start()
                self._console.say("ray-started", address=self._address, seconds=loop.time() - began)
                self._write_config()
                await self._launcher.launch(self._address)
                self._console.say("controller-up", seconds=loop.time() - began)
                return
            except OutlastError as error:
                self._console.say("start-failed", reason=str(error), more=left)
                await self._ray.kill()
                if not left:
                    raise

    async def _keep_ray(self) -> int:
        while True:
            await processes.ended(self._ray.pids)
            self._console.say("ray-lost", reason="its GCS or raylet has ended")
            await self._ray.kill()
            await self._start()

    async def _follow(self) -> int:
        """The job's story onto the output; 0 once the controller has left after the job's end."""
        loop = asyncio.get_running_loop()
        seq, heard = await self._newest(), loop.time()
        while True:
            try:
                events = await self._client.events(seq, EVENTS_S)
                heard, self._answered = loop.time(), True
                for event in events:
                    seq = max(seq, int(event["seq"]))
                    self._console.say(event["kind"], attempt=event["attempt"], text=event["text"])
            except TransferError as error:
                silent = loop.time() - heard
                if self._has_left() and silent > LEFT_S:
                    self._console.say("controller-left")
                    return 0
                if silent > SILENCE_S and self._ray.alive():
                    self._console.say("controller-silent", seconds=silent, reason=str(error))
                    await self._relaunch()
                    heard = loop.time()
                await asyncio.sleep(POLL_S)

    async def _newest(self) -> int:
        """The number of the newest event: what was before is the story of the container before."""
        try:
            return max(0, int((await self._client.status())["seq"]) - 1)
        except TransferError:
            return 0

    def _has_left(self) -> bool:
        """Whether the job is over and no controller's process is there."""
        pid = controller_pid(self._config.http_file)
        return self._config.final_file.exists() and (pid is None or not processes.is_running(pid))

    async def _relaunch(self) -> None:
        try:
            await self._launcher.launch(self._address)
        except OutlastError as error:
            self._console.say("launch-failed", reason=str(error))

    # --- the end ----------------------------------------------------------------------------------------------------

    async def _told_to_end(self) -> int:
        """SIGTERM: have the ranks wait at a snapshot, if there is any use in that."""
        await self._ending.wait()
        limit = max(self._settings.grace_s - MARGIN_S, 0.0)
        self._console.say("ending", seconds=limit)
        try:
            async with asyncio.timeout(limit):
                await self._hold()
        except TimeoutError:
            self._console.say("not-held", reason=f"no snapshot was held within {limit:g} s")
        except TransferError as error:
            self._console.say("not-held", reason=str(error))
        return 0

    async def _hold(self) -> None:
        """Return when the ranks wait at a committed snapshot, or there is nothing to wait for.

        A controller that does not answer for a while may be busy, or be started again by Ray, and is asked anew; one
        that was never up has nothing that could be held.
        """
        asked = silent = restarted = False
        while True:
            try:
                status = await self._client.status()
                silent = False
                if is_held(status):
                    self._console.say("held", step=status["snapshot"].get("step"))
                    return
                if worth_holding(status):
                    if not asked:
                        await self._client.hold(self._settings.grace_s)
                        asked = True
                elif not (restarted and status.get("stage") == "gathering"):
                    self._console.say("not-held", reason="no ranks run on nodes that stay")
                    return
            except ControllerRefused:
                raise
            except TransferError as error:
                if not self._ray.alive():
                    raise
                if not silent:
                    self._console.say("controller-silent", reason=str(error))
                asked, silent, restarted = False, True, self._answered
            await asyncio.sleep(POLL_S)

    # --- how --------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Folders; what the container before left of its processes goes, the controller's folder stays."""
        folders = self._settings.folders
        shutil.rmtree(folders.ray, ignore_errors=True)
        self._answered = self._config.control_dir.exists()
        for folder in (folders.ray, folders.logs, self._config.control_dir):
            folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
        self._config.http_file.unlink(missing_ok=True)
        self._console.say("head-starts", ip=self._settings.ip, folder=str(folders.controller))

    def _write_config(self) -> None:
        config = self._config.model_copy(update={"ray_session": self._ray.session})
        self._config_file.write_text(config.model_dump_json())

    def _forget_nodes(self) -> None:
        """A new Ray knows no agents: every node that is here registers itself."""
        self._config.nodes_file.unlink(missing_ok=True)

    def _spare(self) -> list[int]:
        """Children that somebody waits for."""
        return [pid for pid in (self._ray.starter, self._launcher.pid) if pid is not None]


def controller_config(settings: PodSettings, job: TrainingJob) -> ControllerConfig:
    """The controller's. It waits for nodes as long as the operator does, which sees why they do not come."""
    name = job.metadata.name
    return ControllerConfig(
        job=job.model_dump(mode="json", by_alias=True),
        name=name,
        dir=str(settings.folders.controller),
        namespace=f"outlast-{name}",
        host="0.0.0.0",
        http_port=settings.controller_port,
        token_file=str(settings.folders.token_file),
        store_identity=job.metadata.uid or name,
        patient=True,
    )


def worth_holding(status: Mapping[str, Any]) -> bool:
    """Whether ranks run that could wait at a snapshot, and some of their nodes stay: when all go, so does the job."""
    nodes = (status.get("nodes") or {}).values()
    stays = any(node.get("state") == "active" for node in nodes)
    return status.get("outcome") is None and status.get("stage") == "running" and stays


def is_held(status: Mapping[str, Any]) -> bool:
    """Whether the ranks wait at a committed snapshot."""
    return bool((status.get("snapshot") or {}).get("held"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a head Pod; the exit status."""
    try:
        settings = head_settings(arguments, os.environ)
        job, token = settings.folders.read_job(), settings.folders.read_token()
    except RequestError as error:
        print(f"outlast.pod.head: {error}", file=sys.stderr)
        return 2
    console = Console(sys.stdout.fileno(), {"job": job.metadata.name, "head": settings.pod})
    return run(HeadPod(settings, job, token, console).run, console)


if __name__ == "__main__":
    raise SystemExit(main())
