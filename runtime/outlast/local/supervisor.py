"""``python -m outlast.local.supervisor --dir DIR``: one job on this machine, from nothing to nothing left.

Started by ``trainctl run``, with DIR/job.yaml there. Its life::

    the store asked -> folders, token -> zygote beside Ray's head -> nodes -> controller -> watch -> report
    -> kill all, remove all

It never imports torch or ray: training happens in the nodes' processes, decisions in the controller, and this process
stands for the data centre: it gives nodes, takes them away and replaces them. It writes JSON lines to its standard
output; SIGINT (or the end of its standard input, for when its starter dies) stops the job, SIGTERM or a second SIGINT
ends everything at once. Exit status: 0 succeeded, 1 failed or stopped, 3 suspended.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outlast.api import TrainingJob, load
from outlast.config import ControllerConfig
from outlast.errors import CheckpointError, OutlastError, RequestError, StoreDenied, StoreError, TransferError
from outlast.hosting import processes
from outlast.hosting.launching import Launcher
from outlast.hosting.raynode import RayHead, RaySite
from outlast.local.board import Board, Replacements
from outlast.local.care import NodeCare
from outlast.local.client import LocalClient
from outlast.local.environment import describe_environment
from outlast.local.faultgate import FaultGate, FaultPlan
from outlast.local.faults import Fault, parse_fault
from outlast.local.folders import RunFolders, memory_share
from outlast.local.history import History
from outlast.local.injury import Injury
from outlast.local.nodes import LocalNodes, NodeTemplate
from outlast.local.output import Output
from outlast.local.report import build_report
from outlast.local.storecheck import identity_of
from outlast.local.watching import PhaseFaults, StatusWatch, watch_events, watch_head

STOP_LIMIT_S = 15.0
"""How long a job may take to stop after it was asked to."""
INJURY_FRESH_S = 2.0
"""A head that is found lost so soon after a fault was lost by it."""
SUSPENDED_STATUS = 3
"""The exit status of a run that goes on when it is started again with --resume."""
LAUNCHES = 3
"""How often the head and the controller are started again in a row before the run is given up."""


@dataclass(frozen=True)
class Options:
    """``replace_after_s`` None: a lost node is never replaced. ``resume``: go on from what the job's store holds."""

    directory: Path
    faults: tuple[Fault, ...]
    replace_after_s: float | None
    resume: bool = False


@dataclass(frozen=True)
class End:
    """How a run ended."""

    outcome: str
    reason: str

    @property
    def status(self) -> int:
        """The exit status."""
        return {"succeeded": 0, "suspended": SUSPENDED_STATUS}.get(self.outcome, 1)


class Supervisor:
    """One run. ``run`` once."""

    def __init__(self, options: Options, folders: RunFolders, job: TrainingJob, identity: str, output: Output) -> None:
        self._folders = folders
        self._output = output
        self._began = time.time()
        self._over: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        self._interrupts = 0
        workers = job.spec.workers
        self._node_count = workers.replicas + workers.spares
        self._config = _controller_config(folders, job, identity, options.resume)
        self._nodes = LocalNodes(folders, _template(options, job, self._config))
        log, env = folders.logs / "ray.log", dict(os.environ)
        self._ray = RayHead(RaySite(folders.short, folders.token_file, log, env, self._known_children))
        self._client = LocalClient(self._config.http_file, folders.token_file.read_text())
        self._launcher = Launcher(folders.config_file, folders.logs / "launch.log", self._ray.env, folders.root)
        plan = FaultPlan(options.faults)
        self._plan = plan
        self._history = History()
        self._care = NodeCare(self._client, output, self._nodes, Replacements(options.replace_after_s))
        self._injury = Injury(
            self._nodes,
            self._ray,
            self._client,
            self._care.introduce,
            folders.faults_file,
            output.progress,
            self._history.reached,
        )
        self._gate = FaultGate(folders.gate_socket, plan, workers.procs_per_worker, self._injury.perform)
        self._phases = PhaseFaults(plan, self._injury, self._nodes)
        self._watch = StatusWatch(self._client)

    async def run(self) -> int:
        """Run the job to its end, write the report, and return the exit status once nothing is left."""
        tasks: list[asyncio.Task[None]] = []
        try:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(self._client)
                tasks.append(self._guard(self._live()))
                end = await self._over
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._clean()
        report = self._report(end)
        words = _last_words(end, report, self._folders)
        self._output.end(end.status, end.outcome, words, str(self._folders.report_file))
        return end.status

    def interrupt(self, at_once: bool = False) -> None:
        """Stop the job; the second time, or ``at_once``, without waiting for it."""
        self._interrupts += 1
        if at_once or self._interrupts > 1 or not self._watch.board.status:
            self._finish(End("stopped", "interrupted"))
        else:
            self._output.progress("stopping the job")
            asyncio.get_running_loop().call_later(STOP_LIMIT_S, self._finish, End("stopped", "interrupted"))
            self._stop_task = self._guard(self._stop())

    # --- the stages -------------------------------------------------------------------------------------------------

    async def _live(self) -> None:
        await self._start()
        async with asyncio.TaskGroup() as group:
            side = [
                group.create_task(watch_head(self._ray, self._revive)),
                group.create_task(watch_events(self._client, self._on_event)),
                group.create_task(self._phases.watch_images()),
                group.create_task(self._care.watch_leaving()),
                group.create_task(self._reap()),
            ]
            board = await self._watch.run(self._on_status, self._relaunch)
            if not await self._nodes.settle_logs():
                self._output.progress("not all ranks' logs are in the store: it took too long")
            for task in side:
                task.cancel()
        self._finish(End(str(board.outcome), str(board.status.get("reason") or "")))

    async def _start(self) -> None:
        self._output.progress("starting the forkserver and Ray")
        await self._gate.open()
        address, _ = await asyncio.gather(self._ray.start(), self._nodes.start_zygote())
        self._output.progress(f"starting {self._node_count} nodes")
        configs = [await self._nodes.create() for _ in range(self._node_count)]
        nodes = [json.loads(config.model_dump_json()) for config in configs]
        self._config.nodes_file.write_text(json.dumps({"nodes": nodes}))
        self._output.progress("starting the controller")
        await self._launcher.launch(address)
        self._address = address

    async def _on_event(self, event: dict[str, Any]) -> None:
        self._output.event(event)
        self._history.feed_event(event)
        await self._phases.on_event(event)

    async def _on_status(self, board: Board) -> None:
        self._history.feed(board.status, time.time())
        self._injury.know(board)
        self._output.status(self._history.merged())
        await self._care.tend(board)

    async def _revive(self) -> None:
        """Ray's head is gone: remove what is left of it, and start head and controller again."""
        now = time.time()
        injured = self._injury.head_killed
        self._history.head_lost(injured if now - injured < INJURY_FRESH_S else now, now)
        for left in reversed(range(LAUNCHES)):
            self._output.progress("Ray's head is gone: starting it and the controller again")
            try:
                await self._ray.kill()
                self._address = await self._ray.start()
                await self._launcher.launch(self._address)
                return
            except OutlastError as error:
                self._output.progress(str(error))
                if not left:
                    raise

    async def _relaunch(self) -> None:
        if self._ray.alive():
            self._output.progress("the controller does not answer: starting it again")
            await self._launcher.launch(self._address)

    async def _reap(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            processes.reap(self._known_children())

    async def _stop(self) -> None:
        try:
            await self._client.stop("interrupted")
        except TransferError:
            self._finish(End("stopped", "interrupted"))

    # --- the end ----------------------------------------------------------------------------------------------------

    def _guard(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task whose failure ends the run."""
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._judge)
        return task

    def _judge(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        errors = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)
        known = [item for item in errors if isinstance(item, OutlastError)]
        if known:
            self._finish(End("failed", str(known[0])))
        elif not self._over.done():
            self._over.set_exception(error)

    def _finish(self, end: End) -> None:
        if not self._over.done():
            self._over.set_result(end)

    async def _clean(self) -> None:
        """Kill every descendant and remove the run's sockets and memory."""
        await self._gate.close()
        try:
            await processes.kill_all(lambda: processes.descendants(os.getpid()))
        finally:
            self._folders.remove()

    def _known_children(self) -> list[int]:
        """Children that are waited for by those who started them, and are not Ray's."""
        return [pid for pid in (self._nodes.zygote_pid, self._launcher.pid, self._ray.starter) if pid is not None]

    def _report(self, end: End) -> dict[str, Any]:
        faults = _read_lines(self._folders.faults_file)
        status = {**self._history.merged(), "outcome": end.outcome}
        report = build_report(status, faults, describe_environment(), time.time() - self._began, end.reason)
        report["faults_not_reached"] = [str(fault) for fault in self._plan.left]
        self._folders.report_file.write_text(json.dumps(report, indent=2) + "\n")
        return report


def _controller_config(folders: RunFolders, job: TrainingJob, identity: str, resume: bool) -> ControllerConfig:
    name = job.metadata.name
    config = ControllerConfig(
        job=job.model_dump(mode="json", by_alias=True),
        name=name,
        dir=str(folders.root),
        namespace=f"outlast-{name}",
        token_file=str(folders.token_file),
        store_identity=identity,
        resume=resume,
    )
    folders.config_file.write_text(config.model_dump_json())
    return config


def _template(options: Options, job: TrainingJob, config: ControllerConfig) -> NodeTemplate:
    world = job.spec.workers.replicas * job.spec.workers.procs_per_worker
    cores = len(os.sched_getaffinity(0))
    return NodeTemplate(
        job=config.job,
        namespace=config.namespace,
        cwd=Path.cwd(),
        env=dict(os.environ),
        faults=options.faults,
        threads=max(1, cores // world),
        share=memory_share(job.spec.workers.replicas),
    )


def _last_words(end: End, report: Mapping[str, Any], folders: RunFolders) -> str:
    """How it ended, for people: of a failure the first cause, and where to read on."""
    text = f"{end.outcome} after {report['steps']} steps in {report['wall_s']:.1f} s"
    missed = report["faults_not_reached"]
    text += f"; not reached: {', '.join(missed)}" if missed else ""
    if end.outcome == "succeeded":
        return f"{text}, {len(report['recoveries'])} recoveries, weights {report['weights_digest'] or 'not known'}"
    rank = (report["first_error"] or {}).get("rank")
    logs = sorted(folders.logs.glob(f"rank-{rank}.attempt-*.log"), key=lambda path: path.stat().st_mtime)
    return f"{text}: {end.reason}" + (f"\nits log is {logs[-1]}" if logs and end.outcome == "failed" else "")


def _read_lines(path: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _parse(argv: Sequence[str] | None) -> Options:
    parser = argparse.ArgumentParser(
        prog="python -m outlast.local.supervisor", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--dir", type=Path, required=True, help="the run's folder, which holds job.yaml")
    parser.add_argument("--fault", action="append", default=[], help="KIND@STEP:TARGET")
    parser.add_argument("--replace-after", default="5", help="seconds, or never")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in the job's store")
    args = parser.parse_args(argv)
    after = None if args.replace_after == "never" else float(args.replace_after)
    return Options(args.dir, tuple(parse_fault(text) for text in args.fault), after, args.resume)


async def _main(options: Options, output: Output) -> int:
    job = load((options.directory / "job.yaml").read_text())
    identity = await asyncio.to_thread(identity_of, job, options.resume, output.progress)
    processes.become_subreaper()
    folders = RunFolders.create(options.directory)
    supervisor = Supervisor(options, folders, job, identity, output)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, supervisor.interrupt)
    loop.add_signal_handler(signal.SIGTERM, supervisor.interrupt, True)
    loop.add_reader(sys.stdin.fileno(), _watch_starter, supervisor)
    return await supervisor.run()


def _watch_starter(supervisor: Supervisor) -> None:
    """The standard input is readable: at its end, whoever started this process is gone."""
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        supervisor.interrupt(at_once=True)


def main(argv: Sequence[str] | None = None) -> int:
    output = Output(sys.stdout.fileno())
    try:
        return asyncio.run(_main(_parse(argv), output))
    except (RequestError, StoreDenied) as error:
        output.end(2, "refused", str(error), "")
        return 2
    except (StoreError, CheckpointError) as error:
        output.end(1, "failed", str(error), "")
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
