"""Ranks of a sharded model that do what a benchmark tells them: train, take a snapshot, save with DCP, restore.

``Ranks(world)`` starts them; ``ask("train", ...)`` has all of them do it at once and gives their answers in the order of
ranks. FSDP2 with AdamW as in ``blocked.py``; each rank computes with one thread.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "bytelm"))

WAIT_S = 300.0
"""The longest that ranks may take for one thing."""


class Silent:
    """Stands for a rank's link to its agent, which a benchmark does not have: what is told is not needed."""

    def send(self, op: str, **fields: Any) -> None: ...


class Rank:
    """What one process has: a model and its optimizer after one step. Its methods are what ``Ranks.ask`` can ask."""

    def __init__(self, rank: int, world: int, width: int) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        from model import GPT, Size

        torch.manual_seed(0)
        self.rank, self.world = rank, world
        self.model = GPT(Size(8, width, 8), 64)
        mesh = init_device_mesh("cpu", (world,))
        for block in self.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.inputs = torch.randint(0, 256, (4, 64))
        self.saving = dist.new_group(backend="gloo")
        self.capture: Any = None
        self.train(1)

    @property
    def objects(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}

    def train(self, steps: int) -> list[float]:
        """The seconds of each step."""
        lengths = []
        for _ in range(steps):
            began = time.perf_counter()
            self.model(self.inputs, self.inputs).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            lengths.append(time.perf_counter() - began)
        return lengths

    def snapshot(self, folder: str, generation: str, slot: int = 0) -> int:
        """Write this rank's image as ``outlast`` does; returns once it is sealed, with the bytes of state."""
        from outlast.protect import rng
        from outlast.protect.capture import Capture, Seat
        from outlast.protect.leaves import Collector
        from outlast.snapshot.identity import Generation

        if self.capture is None:
            seat = Seat(pathlib.Path(folder), self.rank, self.world, self.rank, 0)
            self.capture = Capture(Collector(self.objects), seat)
        moment = self.capture.observe({"step": 1, "rng": rng.capture(), "ddp": [], "environment": {}})
        if self.capture.plan is None:
            self.capture.make_plan(moment, {})
        self.capture.start(moment, Generation.parse(generation), slot, fresh=False).wait(WAIT_S)
        return sum(leaf.nbytes for leaf in moment.leaves.values())

    def dcp(self, url: str) -> tuple[float, float]:
        """DCP's ``async_save`` to ``url``: the seconds until it returned, and until everything was stored."""
        import torch.distributed.checkpoint as checkpoint
        from torch.distributed.checkpoint.state_dict import get_state_dict

        began = time.perf_counter()
        model, optimizer = get_state_dict(self.model, self.optimizer)
        pending: Any = checkpoint.async_save(
            {"model": model, "optimizer": optimizer}, storage_writer=dcp_writer(url), process_group=self.saving
        )
        returned = time.perf_counter() - began
        getattr(pending, "upload_completion", pending).result()
        return returned, time.perf_counter() - began

    def restore(self, message: Mapping[str, Any]) -> float:
        """Load what a ``restore`` message of the agent says; the seconds that took."""
        from outlast.protect.leaves import Collector
        from outlast.rank.restoring import restore

        began = time.perf_counter()
        restore(Silent(), message, Collector(self.objects), None, self.rank, self.world)  # type: ignore[arg-type]
        return time.perf_counter() - began

    def digest(self) -> str:
        """Of all parameters and optimizer states, gathered: the same on any number of ranks."""
        import hashlib

        import torch
        from torch.distributed.tensor import DTensor

        found = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            for tensor in (parameter, *(state[key] for key in sorted(state))):
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                found.update(name.encode() + whole.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


def dcp_writer(url: str) -> Any:
    """S3 through the writer that AWS has for DCP (``pip install s3torchconnector[dcp]``), a folder through torch's own."""
    import torch.distributed.checkpoint as checkpoint

    if url.startswith("file://"):
        return checkpoint.FileSystemWriter(url.removeprefix("file://"), overwrite=True)
    from s3torchconnector import S3ClientConfig
    from s3torchconnector.dcp import S3StorageWriter

    region = os.environ.get("AWS_REGION", "us-east-1")
    return S3StorageWriter(region, url, S3ClientConfig(force_path_style=True), overwrite=True)


def be_rank(rank: int, world: int, width: int, folder: str, cores: Collection[int], pipe: Any) -> None:
    import torch
    import torch.distributed as dist

    os.sched_setaffinity(0, cores)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    me = Rank(rank, world, width)
    pipe.send(("ready", None))
    while (task := pipe.recv()) is not None:
        name, arguments = task
        try:
            dist.barrier()
            pipe.send(("done", getattr(me, name)(*arguments)))
        except Exception:  # noqa: BLE001 - told to the benchmark, which ends
            pipe.send(("failed", traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """``world`` processes on ``cores``. Used as ``with started(...)``."""

    def __init__(self, world: int, width: int, folder: str, cores: Collection[int]) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(world)]
        self._pipes = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=be_rank, args=(rank, world, width, folder, cores, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self._processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        self._answers("to start")

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes if process.pid is not None]

    def ask(self, name: str, *arguments: Any, each: Sequence[Any] = ()) -> list[Any]:
        """Have all ranks do ``name``; ``each`` has one more first argument for every rank."""
        for rank, pipe in enumerate(self._pipes):
            pipe.send((name, (*each[rank : rank + 1], *arguments)))
        return self._answers(name)

    def _answers(self, what: str) -> list[Any]:
        found, until = [], time.monotonic() + WAIT_S
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, until - time.monotonic())):
                raise SystemExit(f"rank {rank} takes more than {WAIT_S:g} s {what}")
            kind, answer = pipe.recv()
            if kind == "failed":
                raise SystemExit(f"rank {rank} failed {what}:\n{answer}")
            found.append(answer)
        return found

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(30)
            process.kill()


@contextmanager
def started(world: int, width: int, cores: Collection[int] = ()) -> Iterator[Ranks]:
    """Ranks for as long as the block lasts; ``cores``: where they run (default: anywhere)."""
    with tempfile.TemporaryDirectory(prefix="outlast-bench-") as folder:
        ranks = Ranks(world, width, folder, cores or os.sched_getaffinity(0))
        try:
            yield ranks
        finally:
            ranks.stop()
