"""Train a byte-level GPT on the Python standard library's own sources, sharded with FSDP2.

trainctl run examples/bytelm/job.yaml          # protected: 4 nodes and a spare on this machine
trainctl run examples/bytelm/elastic.yaml --set checkpoint.url=file:///tmp/store    # 2 to 4 nodes, checkpoints
python examples/bytelm/train.py --steps 20     # alone, unprotected
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

import outlast
from corpus import ByteWindows, load_corpus
from model import GPT, SIZES

VALIDATION = 128
"""Held-out sequences."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="small", help="model size; the bigger ones are for benchmarks"
    )
    parser.add_argument("--global-batch", type=int, default=32, help="sequences in one step of the whole job")
    parser.add_argument("--micro-batch", type=int, default=None, help="sequences in one forward of one rank")
    parser.add_argument("--context", type=int, default=64, help="bytes in one sequence")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--validate-every", type=int, default=50)
    parser.add_argument(
        "--step-time", type=float, default=0.0, help="least seconds of a step: faults are easier to watch"
    )
    return parser.parse_args()


def shard(model: GPT, world_size: int, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def validation_loss(model: GPT, windows: ByteWindows, rank: int, world_size: int, device: torch.device) -> float:
    """Mean loss in nats a byte over 128 held-out sequences, the same ones every time, on however many ranks."""
    model.eval()
    index = torch.linspace(0, len(windows) - 1, VALIDATION).long()[rank::world_size]
    inputs, targets = windows.batch(index.tolist())
    total = model.loss(inputs.to(device), targets.to(device)) * len(index)
    dist.all_reduce(total)
    model.train()
    return float(total) / VALIDATION


def main() -> None:
    args = arguments()
    run = outlast.init()
    torch.manual_seed(args.seed)
    training, held_out = load_corpus()
    dataset = ByteWindows(training, args.context)
    validation = ByteWindows(held_out, args.context)

    model = GPT(SIZES[args.size], args.context).to(run.device)
    shard(model, run.world_size, run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(1, args.steps // 20)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.1 + 0.45 * (1 + math.cos(math.pi * min(step / args.steps, 1)))),
    )
    sampler = outlast.ElasticSampler(len(dataset), args.global_batch, seed=args.seed, micro_batch=args.micro_batch)
    loader = DataLoader(dataset, batch_sampler=sampler)
    run.protect(model=model, optimizer=optimizer, scheduler=scheduler, sampler=sampler)

    done = time.monotonic()
    for inputs, targets in run.steps(loader, total=args.steps):
        loss = model.loss(inputs.to(run.device), targets.to(run.device))
        (loss * run.weight).backward()
        if not run.last:
            continue
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.report(loss=loss.detach())
        if (run.step + 1) % args.validate_every == 0 or run.step + 1 == args.steps:
            with run.busy("validation", limit="10m"):
                value = validation_loss(model, validation, run.rank, run.world_size, run.device)
            run.report(validation_loss=value)
            if run.rank == 0:
                print(f"step {run.step + 1}: validation loss {value:.3f} nats/byte "
                      f"(byte frequencies alone: {validation.frequency_entropy(training):.3f})", flush=True)  # fmt: skip
        time.sleep(max(0.0, done + args.step_time - time.monotonic()))
        done = time.monotonic()


if __name__ == "__main__":
    main()
