"""A training script for fault tests: small, deterministic, in every kind of parallelism that outlast promises.

--parallel  plain (hand-made gradient averaging), ddp, fsdp, hsdp
--model     mlp (several communication buckets, a parameter smaller than the world) or
            rich (dropout, BatchNorm, DataLoader workers with random augmentation, fused optimizer, weight average,
            tied and frozen and bf16 parameters, two optimizers, one of them late)
--record    a folder: each rank writes which samples it took for which step, and the loss over the whole global batch is
            reported as global_loss
"""

from __future__ import annotations

import argparse
import pathlib
import random
import time

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

import outlast


class Points(Dataset):
    """Deterministic samples; with ``noisy`` each is augmented by every kind of random generator."""

    def __init__(self, size: int, noisy: bool) -> None:
        self.size, self.noisy = size, noisy

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = torch.sin(torch.arange(64) * (index + 1) * 0.013)
        if self.noisy:
            x = x + 0.1 * torch.rand(64) + random.random() * 0.1 + float(np.random.rand()) * 0.1
        return x, x.flip(0).cumsum(0) / 10, index


class Mlp(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 64)
        self.scale = nn.Parameter(torch.ones(2))  # smaller than the world

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.last(x) * self.scale.mean()


class Rich(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.ReLU()
        )
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.tied_in = nn.Linear(width, 64, bias=False)
        self.tied_out = nn.Linear(width, 64, bias=False)
        self.tied_out.weight = self.tied_in.weight
        self.scale16 = nn.Parameter(torch.randn(64).bfloat16())
        self.late = nn.Parameter(torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.frozen(self.body(x))
        return (self.tied_in(h) + self.tied_out(torch.relu(h))) * self.scale16.float() * self.late


def average_in_double(_, bucket):  # without annotations: DDP checks them, and cannot read them as text
    """A communication hook of the script's own: it must be in force after a restart too."""
    buffer = bucket.buffer()
    wide = buffer.double() / dist.get_world_size()
    work = dist.all_reduce(wide, async_op=True)
    return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))


def wrap(model: nn.Module, parallel: str, world: int) -> nn.Module:
    if parallel == "ddp":
        wrapped = DistributedDataParallel(model, bucket_cap_mb=0.05)
        wrapped.register_comm_hook(None, average_in_double)
        return wrapped
    if parallel in ("fsdp", "hsdp"):
        shape = (world,) if parallel == "fsdp" else (2, world // 2)
        names = ("shard",) if parallel == "fsdp" else ("replicate", "shard")
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def average_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()


class Record:
    """Writes this rank's samples of each step, and keeps the loss over all ranks and micro-batches."""

    def __init__(self, folder: str, run: outlast.Run) -> None:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = open(pathlib.Path(folder) / f"attempt-{run.attempt}.rank-{run.rank}.txt", "a")  # noqa: SIM115
        self._run, self._samples, self._loss = run, [], torch.zeros(())

    def take(self, indices: torch.Tensor, loss: torch.Tensor) -> None:
        self._samples += indices.tolist()
        self._loss = self._loss + loss.detach() * self._run.weight

    def step(self) -> None:
        dist.all_reduce(self._loss)
        self._run.report(global_loss=self._loss / self._run.world_size)
        print(self._run.step, *self._samples, file=self._file, flush=True)
        self._samples, self._loss = [], torch.zeros(())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--parallel", choices=["plain", "ddp", "fsdp", "hsdp"], default="fsdp")
    parser.add_argument("--model", choices=["mlp", "rich"], default="mlp")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--pace", type=float, default=0.0, help="seconds that a step takes at least")
    parser.add_argument("--pace-until", default="", help="a file that, once it is there, ends that")
    parser.add_argument("--global-batch", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=None)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--apart-from", type=int, default=10**9, help="plain: ranks stop averaging at this step")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", default=None)
    args = parser.parse_args()

    run = outlast.init()
    torch.manual_seed(11)
    rich = args.model == "rich"
    model = Rich(args.width) if rich else Mlp(args.width, args.depth)
    wrapped = wrap(model, args.parallel, run.world_size)
    late = [model.late] if rich else []
    early = [p for p in wrapped.parameters() if p.requires_grad and not any(p is q for q in late)]
    optimizer = torch.optim.AdamW(early, lr=1e-3, fused=rich)
    second = torch.optim.SGD(late or [torch.zeros(1, requires_grad=True)], lr=1e-2, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if rich else None
    dataset = Points(1000, noisy=rich)
    sampler = outlast.ElasticSampler(len(dataset), args.global_batch, seed=7, micro_batch=args.micro_batch)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=args.workers)
    notes: dict[str, object] = {"losses": []}
    objects = {"model": wrapped, "optimizer": optimizer, "scheduler": scheduler, "sampler": sampler, "notes": notes}
    if rich:
        objects |= {"second": second, "average": average}
    run.protect(check=args.check, **objects)

    record = Record(args.record, run) if args.record else None
    stepped = time.monotonic()
    for x, y, indices in run.steps(loader, total=args.steps):
        loss = (wrapped(x) - y).square().mean()
        (loss * run.weight).backward()
        if record is not None:
            record.take(indices, loss)
        if not run.last:
            continue
        if args.parallel == "plain" and run.step < args.apart_from:
            average_gradients(model)
        optimizer.step()
        if rich and run.step >= args.steps // 3:
            second.step()
        scheduler.step()
        optimizer.zero_grad()
        second.zero_grad()
        if average is not None:
            average.update_parameters(model)
        notes["losses"].append(float(loss.detach()))
        notes["losses"] = notes["losses"][-5:]
        if record is not None:
            record.step()
        if args.pace and not (args.pace_until and pathlib.Path(args.pace_until).exists()):
            time.sleep(max(0.0, stepped + args.pace - time.monotonic()))
        stepped = time.monotonic()
        run.report(loss=loss.detach(), noise=random.random())


if __name__ == "__main__":
    main()
