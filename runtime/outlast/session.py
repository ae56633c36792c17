"""What a training script calls: ``init``, ``Run.protect``, ``Run.steps``, ``Run.report``, ``Run.busy``.

::

    import outlast
    run = outlast.init()
    sampler = outlast.ElasticSampler(len(dataset), global_batch=64, seed=7)
    loader = DataLoader(dataset, batch_sampler=sampler)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)
    for batch in run.steps(loader, total=2000):
        loss = train_step(batch)
        run.report(loss=loss)

Under ``trainctl run`` or in a training Pod the rank is protected; under plain torchrun or alone it trains the same way
without protection, and says so in one line.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from outlast.errors import CapacityError, RequestError
from outlast.protect import rng
from outlast.protect.capture import Capture, Seat, check_capacity
from outlast.protect.leaves import Collector
from outlast.protect.plan import estimate_bytes
from outlast.protect.resize import OnResize
from outlast.protect.weights import write_weights
from outlast.quantities import parse_duration
from outlast.rank.about import about
from outlast.rank.batches import Batches, position_is_protected
from outlast.rank.bucket_orders import BucketOrders
from outlast.rank.environment import differences, environment
from outlast.rank.gate import FaultGate
from outlast.rank.link import AgentLink, NoLink, error_fields, write_error_file
from outlast.rank.pace import Pace
from outlast.rank.restoring import Restored, restore
from outlast.rank.snapshots import FINAL_DEADLINE_S, RankSnapshots

RESTORE_DEADLINE_S = 7 * 3600.0
"""Nodes may have much to fetch: the controller bounds it (``recovery.startTimeout``), and its agent ends the rank."""
WEIGHTS_LIMIT_S = 1800.0
PORT_LIMIT_S = 10.0


class Run:
    """One rank's part of a job. Made by ``init``.

    Attributes:
        rank, world_size, local_rank: as torchrun's environment gives them.
        device: where this rank computes.
        attempt: the number of this start of all ranks; 0 without a controller.
        step: the step being done, from 0.
        last: whether the optimizer steps after the current micro-batch.
        weight: factor for the current micro-batch's mean loss, so that the step's gradient is the mean over the global
            batch after averaging over ranks and summing over micro-batches.
    """

    def __init__(self, link: AgentLink | NoLink, backend: str) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        self.attempt = int(os.environ.get("OUTLAST_ATTEMPT", "0"))
        self.step, self.last, self.weight = 0, True, 1.0
        self._link, self._environment = link, environment(backend)
        self._collector: Collector | None = None
        self._snapshots: RankSnapshots | None = None
        self._restored: Restored | None = None
        self._seed: int | None = None
        self._metrics: dict[str, Any] = {}
        self._ddp = BucketOrders()
        self._pace = Pace()
        self._gate = FaultGate.from_environment(
            {"rank": self.rank, "node": os.environ.get("OUTLAST_NODE", ""), "attempt": self.attempt, "pid": os.getpid()}
        )

    # -- protect

    def protect(self, *, check: bool = False, on_resize: OnResize | None = None, **objects: Any) -> int:
        """Make ``objects`` part of every snapshot, and restore them if there is anything to restore.

        objects: nn.Modules (wrapped ones too), optimizers, anything with state_dict/load_state_dict, dicts, lists and
        tensors. Call it once, after wrapping, on every rank. ``check`` reads every lazily copied tensor twice and
        reports those that something else than an optimizer changed meanwhile (slow).

        Where the snapshot was written by another number of ranks, sharded tensors are cut anew, generators are derived
        from (seed, step, rank, world), and of what each rank had for itself rank 0's is taken. ``on_resize(old)`` may
        choose otherwise for objects that are neither modules nor optimizers: ``old[rank][name]`` is what an old rank
        had (read when looked at), and what it returns, name -> state, is loaded here in place of rank 0's.

        Returns the number of steps that are done already. Raises StateError when an object cannot be held or does not
        fit what is to be restored, CapacityError when the node's memory cannot hold the snapshots.
        """
        if self._collector is not None:
            raise RequestError("run.protect was called twice: name all objects in one call")
        collector = self._collector = Collector(objects)
        for value in objects.values():
            if callable(getattr(value, "set_world", None)):
                value.set_world(self.rank, self.world_size)
        if isinstance(self._link, AgentLink):
            self._protect_with_agent(self._link, collector, on_resize, check=check)
        return self.step

    def _protect_with_agent(
        self, link: AgentLink, collector: Collector, on_resize: OnResize | None, *, check: bool
    ) -> None:
        began = time.perf_counter()
        message = link.wait_restore(RESTORE_DEADLINE_S)
        self._limits = dict(message.get("protection") or {})
        source = "none"
        if message.get("plan"):
            self._restored = restore(link, message, collector, on_resize, self.rank, self.world_size)
            self.step, self._seed, source = self._restored.step, self._restored.seed, self._restored.source
            self._compare_environment(self._restored.session["environment"])
        seat = Seat(
            pathlib.Path(os.environ["OUTLAST_MEMORY_DIR"]), self.rank, self.world_size,
            int(os.environ["GROUP_RANK"]), self.local_rank,
        )  # fmt: skip
        self._check_estimate(link, collector, seat)
        fits = partial(self._fits, link, seat)
        self._snapshots = RankSnapshots(link, Capture(collector, seat), self._session_state, fits, check=check)
        origin = {"about": about(p for _, p in collector.parameters.values())} if self.rank == 0 else {}
        seconds = time.perf_counter() - began
        link.send("ready", restored_step=self.step, restore_s=seconds, source=source, **origin)

    def _check_estimate(self, link: AgentLink, collector: Collector, seat: Seat) -> None:
        """Refuse before training what cannot work, from what is known now; the plan checks the real size."""
        leaves = list(collector.collect().leaves.values())
        known = any("/state/" in leaf.name for leaf in leaves) or not collector.optimizers
        replicas = self.world_size if not any(leaf.distributed for leaf in leaves) else 1
        self._fits(link, seat, estimate_bytes(leaves, known, replicas))

    def _fits(self, link: AgentLink, seat: Seat, image_bytes: int) -> None:
        held = sum(file.stat().st_blocks * 512 for file in seat.memory_dir.iterdir() if file.is_file())
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        try:
            check_capacity(seat.memory_dir, image_bytes, held, self._limits, ranks)
        except CapacityError as error:
            link.send("capacity", missing=0, text=str(error))
            raise

    def _compare_environment(self, before: Mapping[str, Any]) -> None:
        changed = differences(dict(before), self._environment)
        if changed:
            self._link.send("note", kind="environment-changed", text=f"results may differ in bits: {changed}")

    # -- steps

    def steps(self, loader: Any, total: int, *, micro_batches: int = 1) -> Iterator[Any]:
        """Yield the micro-batches of the steps that are not done yet, up to ``total`` steps in all.

        Epochs roll over by themselves. Asking for the next batch after a step's last one is the boundary at which
        snapshots are taken. After the last step the weights are gathered and written (a collective); where the job has
        checkpoints, that step is made one first.
        """
        batches = Batches(loader, micro_batches)
        if batches.sampler is not None:
            batches.sampler.set_world(self.rank, self.world_size)
        if self._snapshots and not position_is_protected(batches, self._collector.objects if self._collector else {}):
            text = "the data position is not protected: pass the sampler or a stateful loader to run.protect"
            self._link.send("note", kind="position-unprotected", text=text)
        if self.step < total:
            batches.open()
            self._resume()
            with self._pace.watching():
                yield from self._steps(batches, total)
        else:
            self._resume()
            if self.step > total and self.rank == 0:
                text = (
                    f"the state is that of step {self.step}, beyond the {total} steps that are asked for: none is done"
                )
                self._link.send("note", kind="beyond-total", text=text)
            self._link.send("step", step=self.step, seconds=0.0, own_seconds=0.0, metrics={}, total=total)
        self._complete()

    def _resume(self) -> None:
        """Set what the making of the loader's iterator and of other objects changes."""
        self._ddp.find(parameter for _, parameter in (self._collector.parameters.values() if self._collector else ()))
        if self._restored is not None:
            self._ddp.restore(self._restored.session["ddp"])
            self._restored.set_generators(self.rank, self.world_size)
            self._restored = None

    def _steps(self, batches: Batches, total: int) -> Iterator[Any]:
        while self.step < total:
            self._boundary()
            for batch, last, weight in self._pace.fetching(batches.step()):
                self.last, self.weight = last, weight
                yield batch
            batches.finished()
            self.step += 1
            self._after_step(total)

    def _boundary(self) -> None:
        self._ddp.settle()
        if self._gate is not None:
            self._gate.pass_step(self.step)
        self._pace.begin()
        if self._snapshots is not None:
            self._pace.held(self._snapshots.boundary(self.step))

    def _after_step(self, total: int) -> None:
        seconds, own = self._pace.end()
        metrics = {"step_s": round(seconds, 6), **{k: _number(v) for k, v in self._metrics.items()}}
        self._metrics = {}
        self._link.send("step", step=self.step, seconds=seconds, own_seconds=own, metrics=metrics, total=total)

    def _session_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "rng": rng.capture(self._seed),
            "ddp": self._ddp.orders(),
            "environment": self._environment,
        }

    # -- the rest of the contract

    def report(self, **metrics: Any) -> None:
        """Numbers of the current step (floats or one-element tensors), shown and logged with it."""
        self._metrics.update(metrics)

    @contextlib.contextmanager
    def busy(self, label: str, limit: str | float | None = None) -> Iterator[None]:
        """Announce a long pause ("10m", seconds, or None for no limit), so that it is not taken for a hang."""
        limit_s = parse_duration(limit) if isinstance(limit, str) else limit
        self._link.send("busy", label=label, limit_s=limit_s)
        try:
            yield
        finally:
            self._link.send("idle")

    def _complete(self) -> None:
        if self._snapshots is not None:
            self._snapshots.barrier()
            if self._limits.get("final"):
                self._ddp.settle()
                with self.busy("final snapshot", limit=FINAL_DEADLINE_S):
                    self._snapshots.final(self.step)
        if self._collector is None:
            return
        modules = self._collector.modules
        folder = os.environ.get("OUTLAST_RUN_DIR") if isinstance(self._link, AgentLink) else None
        with self.busy("writing the weights", limit=WEIGHTS_LIMIT_S):
            digest = write_weights(modules, pathlib.Path(folder) / "final" if folder else None, self.rank)
            dist.barrier()
        self._link.send("done", digest=digest, steps=self.step, environment=self._environment)


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value


def init(backend: str | None = None, timeout: str | float = "30m") -> Run:
    """Join the job: afterwards ``torch.distributed`` is up.

    backend: as ``init_process_group`` takes it; default gloo, with nccl beside it where there are GPUs. timeout: of its
    collectives. Without any launcher the world is one process. Raises TransferError when the agent cannot be reached.
    """
    chosen = backend or ("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    limit = timedelta(seconds=parse_duration(timeout) if isinstance(timeout, str) else timeout)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    path = os.environ.get("OUTLAST_AGENT")
    link: AgentLink | NoLink = AgentLink(path) if path else NoLink()
    if isinstance(link, AgentLink):
        link.send("hello", rank=int(os.environ["RANK"]), pid=os.getpid())
        _report_errors(link)
    if not dist.is_initialized():
        _join(chosen, limit)
    if not path:
        _say_unprotected()
    return Run(link, chosen)


def _join(backend: str, limit: timedelta) -> None:
    if "RANK" in os.environ:
        if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        _rendezvous(backend, limit)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)
    atexit.register(_leave)


def _rendezvous(backend: str, limit: timedelta) -> None:
    """``init_process_group``; rank 0 tries again for a while when a dying connection still has the store's port."""
    until = time.monotonic() + PORT_LIMIT_S
    while True:
        try:
            dist.init_process_group(backend, timeout=limit)
            return
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.1)


def _leave() -> None:
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):  # the process ends anyway; peers may be gone already
            dist.destroy_process_group()


def _say_unprotected() -> None:
    if dist.get_rank() == 0:
        print(
            "outlast: not started by a controller, so this run is not protected (use `trainctl run`)", file=sys.stderr
        )


def _report_errors(link: AgentLink) -> None:
    """Send an uncaught exception to the agent, and write torchelastic's error file, before Python prints it."""
    original = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not isinstance(error, KeyboardInterrupt):
            link.send("error", **error_fields(error.with_traceback(traceback)))
            write_error_file(error)
        original(kind, error, traceback)

    sys.excepthook = hook
