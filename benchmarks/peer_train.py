"""What peer_torchrun.py runs in its Pods: the example's model and data under plain torchrun, with a checkpoint of all
ranks every so many steps by torch.save to S3, and a restart from the last whole one.

Rank 0 tells the benchmark about each step it has done by one datagram: attempt's start and step, as JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import boto3
import torch
import torch.distributed as dist
from botocore.exceptions import ClientError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, "/opt/outlast/examples/bytelm")

from corpus import ByteWindows, load_corpus
from model import GPT, SIZES


class Store:
    """Checkpoints below ``prefix``: a file for each rank, and one that names the last whole step."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self._client, self._bucket, self._prefix = boto3.client("s3"), bucket, prefix

    def save(self, step: int, rank: int, state: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/{step}/{rank}.pt", Body=buffer.getvalue())
        dist.barrier()
        if rank == 0:
            self._client.put_object(Bucket=self._bucket, Key=f"{self._prefix}/last", Body=str(step).encode())

    def last(self) -> int:
        try:
            return int(self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/last")["Body"].read())
        except ClientError as error:
            if error.response["Error"]["Code"] != "NoSuchKey":
                raise
            return 0

    def load(self, step: int, rank: int) -> dict[str, Any]:
        body = self._client.get_object(Bucket=self._bucket, Key=f"{self._prefix}/{step}/{rank}.pt")["Body"].read()
        state: dict[str, Any] = torch.load(io.BytesIO(body), weights_only=False)
        return state


def batches(windows: ByteWindows, share: int, rank: int, world: int, step: int) -> Iterator[tuple[Any, Any]]:
    """From ``step`` on: the samples of a step follow from its number."""
    while True:
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(windows), (share * world,), generator=generator)[rank::world]
        yield windows.batch(chosen.tolist())
        step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--every", type=int, required=True, help="steps from one checkpoint to the next")
    parser.add_argument("--bucket", required=True)
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--tell", required=True, help="HOST:PORT of the benchmark")
    args = parser.parse_args()
    host, port = args.tell.rsplit(":", 1)
    tell, began = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), time.time()
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(7)
    training, _ = load_corpus()
    windows = ByteWindows(training, 64)
    model, mesh = GPT(SIZES["small"], 64), init_device_mesh("cpu", (world,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)

    store = Store(args.bucket, args.prefix)
    step = store.last()
    if step:
        state = store.load(step, rank)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    for inputs, targets in batches(windows, 32 // world, rank, world, step):
        model.loss(inputs, targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if rank == 0:
            tell.sendto(json.dumps({"began": began, "step": step}).encode(), (host, int(port)))
        if step % args.every == 0:
            store.save(step, rank, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if step == args.steps:
            break
    dist.destroy_process_group()
    print(f"done: {step} steps, pid {os.getpid()}", flush=True)


if __name__ == "__main__":
    main()
