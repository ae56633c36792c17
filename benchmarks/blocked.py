"""How long training is blocked by one snapshot, and how much its copy lengthens the step.

Four FSDP2 ranks, about 400 MB of parameters and AdamW state each, on this machine's cores; beside outlast's copy, in the
same processes, ``torch.save``, DCP's ``async_save`` as it comes, and with an asynchronous stager. Variants take turns, so
that drift of a shared machine meets all of them alike.

    python benchmarks/blocked.py [--rounds 4] [--width 1152]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "examples" / "bytelm"))

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from model import GPT, Size
from outlast.protect.capture import Capture, Seat
from outlast.protect.leaves import Collector
from outlast.snapshot.identity import Generation

WORLD = 4


class Variant:
    """A way to save: ``save`` is called at the boundary, ``before_update`` before the optimizer's step."""

    def save(self, number: int) -> None: ...

    def before_update(self) -> None: ...

    def settle(self) -> None: ...


class Outlast(Variant):
    def __init__(self, objects: dict[str, Any], folder: pathlib.Path, rank: int) -> None:
        self.capture = Capture(Collector(objects), Seat(folder, rank, WORLD, rank, rank))
        self.capture.make_plan(self.capture.observe({}), {})
        self.ticket: Any = None

    def save(self, number: int) -> None:
        moment = self.capture.observe({"step": number})
        self.ticket = self.capture.start(moment, Generation(1, number, "0" * 16), number % 2, fresh=False)

    def before_update(self) -> None:
        self.ticket.wait(600)


class TorchSave(Variant):
    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: pathlib.Path, rank: int
    ) -> None:
        self.model, self.optimizer, self.path = model, optimizer, folder / f"{rank}.pt"

    def save(self, number: int) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, self.path)


class Dcp(Variant):
    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: pathlib.Path, stager: bool, group: Any
    ) -> None:
        self.model, self.optimizer, self.folder = model, optimizer, folder
        self.group = group
        self.options: dict[str, Any] = {}
        if stager:
            self.options["async_stager"] = DefaultStager(StagingOptions(False, False, True, False))
        self.staging: Any = None
        self.pending: Any = None

    def save(self, number: int) -> None:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        answer = dcp.async_save(
            {"model": model, "optimizer": optimizer},
            storage_writer=dcp.FileSystemWriter(str(self.folder), overwrite=True),
            process_group=self.group,
            **self.options,
        )
        self.staging = getattr(answer, "staging_completion", None)
        self.pending = getattr(answer, "upload_completion", answer)

    def before_update(self) -> None:
        if self.staging is not None:
            self.staging.result()

    def settle(self) -> None:
        self.pending.result()


def worker(rank: int, rounds: int, width: int, ways: int, folder: str, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    group = dist.new_group(backend="gloo")
    torch.manual_seed(0)
    model = GPT(Size(8, width, 16), 64)
    mesh = init_device_mesh("cpu", (WORLD,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    inputs = torch.randint(0, 256, (4, 64))

    def step(save: Callable[[], None], before_update: Callable[[], None]) -> tuple[float, float]:
        began = time.perf_counter()
        save()
        blocked = time.perf_counter() - began
        model(inputs, inputs).backward()
        waiting = time.perf_counter()
        before_update()
        blocked += time.perf_counter() - waiting
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began, blocked

    def nothing() -> None: ...

    step(nothing, nothing)
    home = pathlib.Path(folder)
    shm = pathlib.Path(tempfile.mkdtemp(prefix="outlast-bench-", dir="/dev/shm"))
    variants: dict[str, Variant] = {
        "none": Variant(),
        "outlast": Outlast({"model": model, "optimizer": optimizer}, shm, rank),
        "torch.save": TorchSave(model, optimizer, home, rank),
        "dcp async_save": Dcp(model, optimizer, home / "dcp1", False, group),
        "dcp async_save, async stager": Dcp(model, optimizer, home / "dcp2", True, group),
    }
    variants = dict(list(variants.items())[:ways])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            dist.barrier()
            lengths = [step(lambda v=variant, n=2 * number: v.save(n), variant.before_update)]
            if number:
                found[name] += lengths
            variant.settle()
            dist.barrier()
    size = sum(f.stat().st_size for f in shm.glob("slot-*-0.img"))
    for file in shm.iterdir():
        file.unlink()
    shm.rmdir()
    results[rank] = (found, size)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--ways", type=int, default=5, help="the first so many: none, outlast, torch.save, DCP's two")
    args = parser.parse_args()
    results = mp.Manager().dict()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            worker, args=(args.rounds, args.width, args.ways, folder, results), nprocs=WORLD, start_method="spawn"
        )
    table = {name: [dict(results)[rank][0][name] for rank in range(WORLD)] for name in results[0][0]}
    print(f"4 FSDP2 ranks, {results[0][1] / 1e6:.0f} MB a rank, {args.rounds} snapshots each way")
    base = statistics.median(length for rank in table["none"] for length, _ in rank)
    print(
        "| way | blocked, median (ms) | worst rank's median (ms) | of a step | step, median (s) | longer by |\n|---|---|---|---|---|---|"
    )
    for name, ranks in table.items():
        blocked = statistics.median(b for rank in ranks for _, b in rank)
        worst = max(statistics.median(b for _, b in rank) for rank in ranks)
        length = statistics.median(length for rank in ranks for length, _ in rank)
        print(
            f"| {name} | {blocked * 1e3:.2f} | {worst * 1e3:.2f} | {blocked / base:.3%} | {length:.3f} | {length / base - 1:+.1%} |"
        )


if __name__ == "__main__":
    main()
